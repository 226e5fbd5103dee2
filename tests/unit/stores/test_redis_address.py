"""What a URL or a client that is passed in stands for, without a server."""

from __future__ import annotations

from typing import Any

import pytest
import redis.asyncio
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.connection import SSLConnection
from redis.cluster import LoadBalancingStrategy

from layered_store.errors import ConfigError
from layered_store.stores.redis import RedisStore
from layered_store.stores.redis import address as address_module
from layered_store.stores.redis.address import Address, address_of_client, address_of_url
from layered_store.testing.clock import FakeClock


def address(url: str) -> Address:
    return address_of_url(url, 0.5, 0.7)()


def connection(url: str) -> Any:
    made = address(url).connection
    assert made is not None
    return made()


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("redis://[::1", "cannot be read"),
        ("redis://[s3cret]:1", "cannot be read"),
        ("unix://", "cannot be read"),
        ("ftp+sentinel://a/service", "cannot be read"),
        ("redis+sentinel://a,/service", "cannot be read"),
        ("redis+sentinel://a/service/s3cret", "cannot be read"),
        ("redis+cluster://a,:1", "cannot be read"),
        ("redis+sentinel://a,b", "write redis+sentinel://host1,host2/service"),
        ("redis://a/s3cret", "names a database that is no number"),
        ("redis://a/1x", "names a database that is no number"),
        ("redis://:pa?s3cret=x@h/0", "cannot be read"),
        ("redis://h?bogus=s3cret", "does not know: bogus"),
        ("redis+cluster://a,b?bogus=s3cret", "does not know: bogus"),
        ("redis+sentinel://a/service?bogus=s3cret", "does not know: bogus"),
        ("redis+cluster://a?read_from_replicas=yes", "would not see the write before it"),
        ("redis+cluster://a?load_balancing_strategy=random", "would not see the write before it"),
        ("redis+cluster://a?address_remap=s3cret", "which a URL cannot hold; pass client="),
        ("redis+cluster://a?reinitialize_steps=s3cret", "cannot be read"),
    ],
)
def test_a_url_that_cannot_be_read_is_a_mistake_that_is_named(url: str, text: str) -> None:
    """With what it should look like, and without showing it."""
    with pytest.raises(ConfigError) as caught:
        address(url)
    error = caught.value
    assert text in error.message
    assert (error.option, error.layer) == ("url", "RedisStore")
    assert error.__cause__ is None and error.__context__ is None
    assert "s3cret" not in str(error)


@pytest.mark.parametrize(
    ("url", "near"),
    [
        ("redis://h?socket_timout=1", "socket_timeout"),
        ("rediss://h?ssl_cacerts=x", "ssl_ca_certs"),
        ("unix:///x?timeout=1", "socket_timeout"),
        ("redis://h?bogus=1", None),
    ],
)
def test_an_unknown_option_is_told_with_the_nearest(url: str, near: str | None) -> None:
    """What the driver's connections take is known from their constructors."""
    with pytest.raises(ConfigError) as caught:
        address(url)
    assert caught.value.suggestion == near


def test_how_many_sentinels_must_agree_is_a_number() -> None:
    """The driver compares it with one when it looks for the primary, and makes none of a text."""
    made = connection("redis+sentinel://a/service?min_other_sentinels=2")
    assert made.connection_pool.sentinel_manager.min_other_sentinels == 2
    with pytest.raises(ConfigError, match="cannot be read"):
        address("redis+sentinel://a/service?min_other_sentinels=some")


def test_options_of_a_cluster_have_their_types() -> None:
    """The driver takes any text for true, and counts with text when a slot moves."""
    options = "read_from_replicas=false&require_full_coverage=no&reinitialize_steps=3"
    make = address(f"redis+cluster://a?{options}&dynamic_startup_nodes=0").client
    assert make is not None
    client = make()
    assert client.read_from_replicas is False
    assert client.nodes_manager.require_full_coverage is False
    assert client.nodes_manager._dynamic_startup_nodes is False
    assert client.reinitialize_steps == 3


@pytest.mark.parametrize(
    "options",
    [{"read_from_replicas": True}, {"load_balancing_strategy": LoadBalancingStrategy.ROUND_ROBIN}],
)
@pytest.mark.filterwarnings("ignore:.*read_from_replicas:DeprecationWarning")
def test_a_clients_reads_come_from_primaries(options: dict[str, Any]) -> None:
    """A replica is behind: a read would not see the write before it."""
    client = RedisCluster(host="a", **options)
    with pytest.raises(ConfigError, match=f"{next(iter(options))}, by which.*build it without"):
        RedisStore(client=client)
    assert RedisStore(client=RedisCluster(host="a")).is_cluster


def test_connections_have_the_limits_and_repeat_nothing() -> None:
    """A repeat belongs to the Retry layer, which a driver's own would multiply."""
    made = connection("redis://u:p@h:7/3")
    assert (made.host, made.port, made.db) == ("h", 7, 3)
    assert (made.username, made.password) == ("u", "p")
    assert (made.socket_connect_timeout, made.socket_timeout) == (0.5, 0.7)
    assert made.retry.get_retries() == 0
    assert not made.encoder.decode_responses


def test_options_in_the_url_are_the_drivers_and_win() -> None:
    """Except for decoding, since records are bytes, and for the version of the protocol: in its
    third the driver swallows what the invalidation channel tells.
    """
    for start in ("redis://h", "redis+sentinel://h/service"):
        made = connection(f"{start}?socket_timeout=9&decode_responses=True&protocol=3")
        assert made.socket_timeout == 9
        assert not made.encoder.decode_responses
        assert int(made.protocol) == 2
    client = address("redis+cluster://h?protocol=3").client
    assert client is not None
    assert client().get_connection_kwargs()["protocol"] == 2


def test_options_for_the_sentinels_are_numbers_where_the_driver_wants_such() -> None:
    """And text where it wants that."""
    url = "redis+sentinel://h/service?socket_timeout=9&sentinel_socket_timeout=3&sentinel_password=7"
    made = connection(url)
    assert made.socket_timeout == 9
    (sentinel,) = made.layered_store_pool.sentinel_manager.sentinels
    options = sentinel.connection_pool.connection_kwargs
    assert (options["socket_timeout"], options["password"]) == (3.0, "7")
    with pytest.raises(ConfigError, match="cannot be read"):
        address("redis+sentinel://h/service?sentinel_socket_timeout=soon")


def test_a_socket_and_tls_are_told_by_the_scheme() -> None:
    """As the driver reads them."""
    assert connection("unix:///run/redis.sock?db=2").path == "/run/redis.sock"
    assert isinstance(connection("rediss://h"), SSLConnection)


def test_a_client_of_the_driver_gives_its_connections_and_any_other_is_called() -> None:
    """The caller's limits stay; what the driver repeats by itself is turned off."""
    client = redis.asyncio.Redis(host="h", socket_timeout=4)
    assert client.connection_pool.make_connection().retry.get_retries() > 0
    own = address_of_client(client, 0.5)
    assert own.client is None and own.connection is not None
    made = own.connection()
    assert made.socket_timeout == 4
    assert made.retry.get_retries() == 0

    class Own(redis.asyncio.Connection):
        """A connection of the application's."""

    other = redis.asyncio.Redis(
        connection_pool=redis.asyncio.ConnectionPool(connection_class=Own)
    )
    called = address_of_client(other, 0.5)
    assert called.connection is None and called.client is not None
    assert called.client() is other and called.shared and not called.cluster


@pytest.mark.parametrize("scheme", ["rediss", "rediss+sentinel"])
def test_connections_made_soon_after_one_another_share_a_tls_context(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Making one costs 20 ms, at each attempt while a server is away; certificates are replaced."""
    clock = FakeClock()
    monkeypatch.setattr(address_module, "SYSTEM_CLOCK", clock)
    connect = address(f"{scheme}://127.0.0.1:6379/0").connection
    assert connect is not None
    first = connect()
    assert first.ssl_context.get() is connect().ssl_context.get()
    other = address(f"{scheme}://127.0.0.1:6379/0?ssl_cert_reqs=none").connection
    assert other is not None
    assert other().ssl_context is not first.ssl_context
    clock.set(clock.monotonic() + 10.0)
    later = connect()
    assert later.ssl_context is not first.ssl_context
    assert later.ssl_context is connect().ssl_context
