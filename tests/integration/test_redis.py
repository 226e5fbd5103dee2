"""RedisStore against a real server: what it keeps, and what it makes of foreign data."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import redis.asyncio
from redis_servers import BINARY, Sentinel, Server, free_port, running

from layered_store.call import call_begins
from layered_store.errors import ClosedError, ConfigError, UnavailableError, ValidationError
from layered_store.snapshot import StateSnapshot
from layered_store.stores.redis import RedisScript, RedisStore
from layered_store.stores.redis.address import address_of_url
from layered_store.stores.redis.links import LaneLink
from layered_store.stores.redis.record import (
    FILLED,
    MAX_VERSION,
    STATE,
    TOKEN,
    TOMBSTONE,
    pack,
    unpack,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

pytestmark = pytest.mark.skipif(BINARY is None, reason="redis-server is not installed")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as own:
        yield own


@pytest.fixture
async def store(server: Server) -> AsyncIterator[RedisStore]:
    async with RedisStore(server.url, history_limit=3) as own:
        await own.command("FLUSHALL")
        yield own


def state(user_id: str = "u-1", **axes: float) -> StateSnapshot:
    return StateSnapshot(user_id, axes=axes)


async def test_latest_and_history(store: RedisStore) -> None:
    """The last upsert is the latest state; history is newest first and of limited length."""
    for n in range(5):
        await store.upsert_latest(state(a=n / 10))
    latest = await store.get_latest("u-1")
    assert latest is not None
    assert latest.axes == {"a": 0.4}
    history = await store.get_history("u-1", 10)
    assert [entry.axes["a"] for entry in history] == [0.4, 0.3, 0.2]
    assert await store.command("LLEN", store.key(store.digest("u-1"), "h")) == 3
    assert await store.get_history("u-1", 1) == history[:1]
    assert await store.get_history("u-1", 0) == []


async def test_delete_removes_all(store: RedisStore) -> None:
    """After delete no key holds the user's data; a later upsert begins anew."""
    await store.upsert_latest(state("marked-user", a=0.5))
    await store.delete("marked-user")
    await store.delete("never-there")
    assert await store.get_latest("marked-user") is None
    assert await store.get_history("marked-user", 5) == []
    for key in await store.command("KEYS", "*"):
        assert b"marked-user" not in await store.command("GET", key)
    await store.upsert_latest(state("marked-user", a=0.7))
    assert len(await store.get_history("marked-user", 5)) == 1


async def test_what_is_left_of_an_erased_user_ends_in_a_week(store: RedisStore) -> None:
    """Whole, also when many writes came before: it holds the ids of the last 16 calls."""
    for _ in range(20):
        await store.upsert_latest(state())
    await store.delete("u-1")
    key = store.key(store.digest("u-1"))
    record = unpack(await store.command("GET", key))
    assert record is not None
    assert (record.kind, record.version) == (TOMBSTONE, 21)
    assert (len(record.write_ids), len(record.body)) == (16, 8)
    week = 7 * 86_400_000
    assert week - 60_000 < await store.command("PTTL", key) <= week


async def test_a_history_may_be_of_one_state(server: Server) -> None:
    """And one that is no history is replaced, by a repeat too."""
    async with RedisStore(server.url, history_limit=1, prefix="one:") as store:
        with call_begins() as call:
            assert call.first_attempt()
            await store.command("SET", store.key(store.digest("u-1"), "h"), "x")
            await store.upsert_latest(state(a=0.1))
        assert not call.superseded
        await store.upsert_latest(state(a=0.2))
        assert [entry.axes["a"] for entry in await store.get_history("u-1", 9)] == [0.2]


async def test_write_from_before_an_erasure_is_dropped(store: RedisStore) -> None:
    """A write that began before the erasure does not bring the user back."""
    with call_begins() as call:
        # Longer than any way to the server: the time on it makes the call look younger.
        await asyncio.sleep(0.2)
        await _elsewhere(store.delete("u-1"))
        await store.upsert_latest(state())
    assert call.superseded
    assert await store.get_latest("u-1") is None


@pytest.mark.parametrize(
    "left",
    [
        pack(TOMBSTONE, 3, (2**60).to_bytes(8, "big")),
        pack(STATE, 3, write_ids=[bytes(16)])[:-3],
        pack(STATE, 3, write_ids=[bytes(16)] * 255)[:60],
    ],
    ids=["erased in the future", "cut off in an id", "fewer ids than it says"],
)
async def test_a_damaged_record_swallows_no_write(store: RedisStore, left: bytes) -> None:
    """An acknowledged write can be read, whatever was under the key before."""
    await store.upsert_latest(state())
    key = store.key(store.digest("u-1"))
    await store.command("SET", key, left)
    assert await store.get_latest("u-1") is None
    written = state(a=0.7)
    await store.upsert_latest(written)
    assert await store.get_latest("u-1") == written


@pytest.mark.parametrize("nothing", ["tombstone of a tier", "state of a tier"])
async def test_a_tiers_record_tells_of_no_erasure(store: RedisStore, nothing: str) -> None:
    """Whatever its digest or its generation would read as."""
    await store.get_latest("u-1")
    key, written = store.key(store.digest("u-1")), state(a=0.7)
    with call_begins() as call:
        await asyncio.sleep(0.1)
        seconds, micros = await store.command("TIME")
        looks = (int(seconds) * 1_000_000 + int(micros)).to_bytes(8, "big")
        left = {
            "tombstone of a tier": pack(TOMBSTONE, 3, bytes(8) + looks, generation=b"g" * 16),
            "state of a tier": pack(STATE, 3, b"x", generation=b"\x01" * 8 + looks),
        }[nothing]
        await store.command("SET", key, left)
        await asyncio.sleep(0.1)
        await store.upsert_latest(written)
    assert not call.superseded
    assert await store.get_latest("u-1") == written


@pytest.mark.parametrize(
    ("left", "version"),
    [
        (pack(STATE, MAX_VERSION - 1, b"x"), MAX_VERSION),
        (pack(STATE, MAX_VERSION, b"x"), 1),
        (b"LS\x02" + pack(STATE, 7, b"x" * 40)[3:], 1),
        (b"another program's text, of more than a header's length", 1),
        (pack(STATE, 7)[:28], 1),
        (pack(TOKEN, 0), 1),
    ],
    ids=["highest but one", "highest", "newer form", "foreign", "cut", "token"],
)
async def test_versions_go_on_from_a_record_and_begin_behind_anything_else(
    store: RedisStore, left: bytes, version: int
) -> None:
    """A write and an erasure alike."""
    key = store.key(store.digest("u-1"))
    for work in (lambda: store.upsert_latest(state()), lambda: store.delete("u-1")):
        await store.command("SET", key, left)
        await work()
        record = unpack(await store.command("GET", key))
        assert record is not None and record.version == version


async def test_repeated_write_takes_effect_once(store: RedisStore) -> None:
    """A write that is repeated appends once, and does not replace what came after it."""
    first, second = state(a=0.1), state(a=0.2)
    with call_begins() as call:
        await store.upsert_latest(first)
        await store.upsert_latest(first)
        assert not call.superseded
    assert len(await store.get_history("u-1", 9)) == 1
    with call_begins() as call:
        await store.upsert_latest(second)
        await _elsewhere(store.upsert_latest(state(a=0.3)))
        await store.upsert_latest(second)
        assert call.superseded
    assert [entry.axes["a"] for entry in await store.get_history("u-1", 9)] == [0.3, 0.2, 0.1]


async def test_a_repeated_write_is_known_after_many_others(server: Server) -> None:
    """From the history, which remembers more of them than the record does."""
    async with RedisStore(server.url, history_limit=30, prefix="many:") as store:
        first = state(a=0.5)
        with call_begins() as call:
            await store.upsert_latest(first)
            for number in range(20):
                await _elsewhere(store.upsert_latest(state(a=number / 100)))
            await store.upsert_latest(first)
            assert call.superseded
        latest = await store.get_latest("u-1")
        assert latest is not None
        assert latest.axes == {"a": 0.19}
        assert len(await store.get_history("u-1", 30)) == 21


async def test_what_a_cache_tier_left_is_read_as_it_is_meant(store: RedisStore) -> None:
    """What a reader filled in is a state; neither a tombstone nor a token is damage."""
    key, filled = store.key(store.digest("u-1")), state(a=0.5)
    for left, found in (
        (pack(FILLED, 3, store.codec.encode(filled), generation=b"g" * 16), filled),
        (pack(TOMBSTONE, 3, store.digest("u-1"), generation=b"g" * 16), None),
        (pack(TOKEN, 0, generation=b"t" * 16), None),
    ):
        await store.command("SET", key, left)
        assert await store.get_latest("u-1") == found
    assert store.corrupt_records == 0


async def _elsewhere(work: Any) -> None:
    import contextvars

    await asyncio.get_running_loop().create_task(work, context=contextvars.Context())


async def test_closing_ends_the_connections_of_other_event_loops(server: Server) -> None:
    """Each on its own loop, which still runs in another thread."""
    store = RedisStore(server.url)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    async with RedisStore(server.url) as watch, asyncio.timeout(10):

        async def connected() -> int:
            return len((await watch.command("CLIENT", "LIST", "TYPE", "normal")).splitlines())

        before = await connected()
        await asyncio.wrap_future(
            asyncio.run_coroutine_threadsafe(store.upsert_latest(state()), loop)
        )
        assert await connected() > before
        await store.aclose()
        while await connected() > before:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


async def test_many(store: RedisStore) -> None:
    """Batches keep the order of one user's snapshots and leave absent users out."""
    await store.command("SCRIPT", "FLUSH")
    await store.upsert_latest_many(state(f"m-{n % 400}", a=n / 1000) for n in range(1000))
    hits, misses = store.reads.hit, store.reads.miss
    found = await store.get_latest_many([*(f"m-{n}" for n in range(500)), "m-1"])
    assert (store.reads.hit - hits, store.reads.miss - misses) == (400, 100)
    assert len(found) == 400
    assert found["m-0"].axes == {"a": 0.8}
    assert found["m-399"].axes == {"a": 0.799}
    assert await store.get_latest_many([]) == {}
    await store.upsert_latest_many([])
    with pytest.raises(ValidationError):
        await store.upsert_latest_many([state("fine"), StateSnapshot("not fine!")])
    assert await store.get_latest("fine") is None


async def test_ttl_covers_record_and_history(server: Server) -> None:
    """With a ttl both keys expire; without one neither does, whatever stood there."""
    async with RedisStore(server.url, ttl=50, history_limit=2, prefix="ttl:") as store:
        await store.upsert_latest(state())
        digest = store.digest("u-1")
        for kind in "sh":
            assert 0 < await store.command("PTTL", store.key(digest, kind)) <= 50_000
    async with RedisStore(server.url, history_limit=2, prefix="ttl:") as store:
        await store.upsert_latest(state())
        for kind in "sh":
            assert await store.command("PTTL", store.key(digest, kind)) == -1


@pytest.mark.parametrize("ttl", [1e-320, 1e17, 2**63, 1e308, timedelta.max])
async def test_a_ttl_of_any_length_is_taken(server: Server, ttl: float | timedelta) -> None:
    """One that is longer than Redis can count is as long as it can; so is a history."""
    options = {"ttl": ttl, "history_limit": 2**63 - 1}
    async with RedisStore(server.url, prefix="any:", **options) as store:
        await store.upsert_latest_many([state(), state(warmth=0.5)])
        left = await store.command("PTTL", store.key(store.digest("u-1"), "s"))
        if ttl == 1e-320:
            assert left < 2
        else:
            assert left > 10**15
            assert len(await store.get_history("u-1", 9)) == 2
        await store.delete("u-1")


@pytest.mark.parametrize(
    "value",
    [b"", b"LS", b"LS\x01S", b"LS\x02S" + bytes(60), b"{}", bytes(100), b"LS\x01S" + b"\xff" * 60]
    + [pack(STATE, 3), pack(STATE, 3, b"\x01\x80"), pack(STATE, 3, b"\x09abc")],
)
async def test_foreign_value_is_a_miss_and_overwritten(store: RedisStore, value: bytes) -> None:
    """Truncated, newer and foreign values are counted misses, replaced by the next upsert."""
    key = store.key(store.digest("u-1"))
    await store.command("SET", key, value)
    before = store.corrupt_records
    assert await store.get_latest("u-1") is None
    assert await store.get_latest_many(["u-1"]) == {}
    assert store.corrupt_records == before + 2
    await store.upsert_latest(state(a=0.5))
    assert await store.get_latest("u-1") is not None


async def test_foreign_type_is_a_miss_and_overwritten(store: RedisStore) -> None:
    """Keys of another Redis type are counted misses, replaced by the next upsert."""
    digest = store.digest("u-1")
    await store.command("RPUSH", store.key(digest), "x")
    await store.command("SET", store.key(digest, "h"), "x")
    assert await store.get_latest("u-1") is None
    assert await store.get_history("u-1", 3) == []
    assert store.corrupt_records == 2
    assert (store.reads.hit, store.reads.miss) == (0, 1)
    await store.upsert_latest(state(a=0.5))
    assert await store.get_latest("u-1") is not None
    assert len(await store.get_history("u-1", 3)) == 1
    await store.command("DEL", store.key(digest))
    await store.command("RPUSH", store.key(digest), "x")
    await store.delete("u-1")
    assert await store.get_latest("u-1") is None


async def test_record_of_another_user_is_never_returned(store: RedisStore) -> None:
    """A record copied under another user's key is a counted miss, in the history too."""
    await store.upsert_latest(state("owner", a=0.9))
    for kind, command in (("s", "COPY"), ("h", "COPY")):
        await store.command(
            command,
            store.key(store.digest("owner"), kind),
            store.key(store.digest("thief"), kind),
        )
    assert await store.get_latest("thief") is None
    assert await store.get_latest_many(["thief"]) == {}
    assert await store.get_history("thief", 3) == []
    assert store.corrupt_records == 3


def test_record_form() -> None:
    """Packing and unpacking agree; anything else is recognised as none."""
    ids = (bytes(range(16)), bytes(16))
    whole = pack(STATE, MAX_VERSION, b"body", generation=b"g" * 16, write_ids=ids)
    record = unpack(whole)
    assert record == (STATE, MAX_VERSION, b"g" * 16, ids, b"body")
    assert unpack(pack(TOKEN, 0)) == (TOKEN, 0, bytes(16), (), b"")
    assert unpack(pack(TOMBSTONE, 7)[:28]) == (TOMBSTONE, 7, bytes(16), (), b"")
    for end in range(len(whole) - 4):
        assert unpack(whole[:end]) is None
    high = [pack(STATE, version, b"x") for version in (MAX_VERSION + 1, 2**60)]
    for wrong in (None, 3, [b"x"], b"LS\x01X" + whole[4:], *high):
        assert unpack(wrong) is None


async def test_scripts_survive_a_flush(store: RedisStore) -> None:
    """A script that the server forgot is sent whole; replies and arguments are binary safe."""
    script = RedisScript("return {KEYS[1], ARGV[1], 7}")
    raw = bytes(range(256))
    key = store.bucket_key("0", "x")
    for _ in range(2):
        await store.command("SCRIPT", "FLUSH")
        assert await store.run_script(script, [key], [raw]) == [key, raw, 7]
        assert await store.run_script(script, [key], [raw]) == [key, raw, 7]


async def test_several_event_loops(server: Server) -> None:
    """One store serves several event loops in turn and at once."""
    store = RedisStore(server.url)

    async def use() -> None:
        await store.upsert_latest(state("loops"))
        assert await store.get_latest("loops") is not None

    await use()
    for _ in range(3):
        await asyncio.to_thread(asyncio.run, use())
    await asyncio.gather(use(), *(asyncio.to_thread(asyncio.run, use()) for _ in range(4)))
    await asyncio.to_thread(asyncio.run, use())
    assert len(store._links) <= 2, "event loops that ended are forgotten"
    await store.aclose()
    await store.aclose()
    with pytest.raises(ClosedError):
        await store.get_latest("loops")


async def test_client_stays_the_callers(server: Server) -> None:
    """A client that was passed in works afterwards; one that decodes is refused by name."""
    client = redis.asyncio.Redis(port=server.port)
    async with RedisStore(client=client, prefix="client:") as store:
        await store.upsert_latest(state())
        assert await store.get_latest("u-1") is not None
    assert await client.ping()
    await client.aclose()
    decoding = redis.asyncio.Redis(port=server.port, decode_responses=True)
    with pytest.raises(ConfigError, match="decode_responses=False"):
        RedisStore(client=decoding)
    with pytest.raises(ConfigError, match="client: must be a redis.asyncio client"):
        RedisStore(client=redis.Redis(port=server.port))


class _Wrapped:
    """A client of a class that the store does not know."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def execute_command(self, *args: Any) -> Any:
        return await self._client.execute_command(*args)


async def test_unknown_client_is_called(server: Server) -> None:
    """A client whose connections are not the driver's is called, with all operations working."""
    client = redis.asyncio.Redis(port=server.port)
    async with RedisStore(client=_Wrapped(client), prefix="odd:", history_limit=2) as store:
        await store.command("SCRIPT", "FLUSH")
        await store.upsert_latest_many([state(a=0.1), state(a=0.2), state("u-2")])
        assert set(await store.get_latest_many(["u-1", "u-2", "u-3"])) == {"u-1", "u-2"}
        assert [entry.axes["a"] for entry in await store.get_history("u-1", 5)] == [0.2, 0.1]
        await store.command("RPUSH", store.key(store.digest("u-9")), "x")
        assert await store.get_latest("u-9") is None
        assert await store.health_check()
    assert await client.ping()
    await client.aclose()


class _OwnConnection(redis.asyncio.Connection):
    """A connection of the application's own class."""


async def test_a_client_with_connections_of_its_own_class_is_called(server: Server) -> None:
    """Connections for messages are made as its pool makes them; one server answers for all."""
    pool = redis.asyncio.ConnectionPool(
        connection_class=_OwnConnection, host="127.0.0.1", port=server.port
    )
    client = redis.asyncio.Redis(connection_pool=pool)
    async with RedisStore(client=client, prefix="own:") as store:
        await store.upsert_latest(state())
        assert await store.get_latest("u-1") is not None
        assert await store.group_buckets() == [list(store.buckets)]
        connection = await store.new_connection()
        assert isinstance(connection, _OwnConnection)
        await connection.disconnect()
        pool.connection_kwargs["port"] = free_port()
        with pytest.raises(UnavailableError) as caught:
            await store.new_connection()
        assert (caught.value.operation, caught.value.layer) == ("new_connection", "RedisStore")
    await client.aclose()


async def test_database_and_login_of_the_url(server: Server) -> None:
    """Database, user and password of a URL are used, and the password is shown nowhere."""
    async with RedisStore(server.url) as admin:
        await admin.command(
            "ACL", "SETUSER", "eva", "on", ">s3cr:t", "~*", "&*", "+@all", write=True
        )
    url = f"redis://eva:s3cr%3At@127.0.0.1:{server.port}/5"
    async with RedisStore(url) as store:
        await store.upsert_latest(state())
        assert await store.command("DBSIZE") == 1
        assert "s3cr" not in repr(store)
    async with RedisStore(f"{url}?protocol=3") as store:
        assert await store.get_latest("u-1") is not None


def test_unix_socket_url(tmp_path: Any) -> None:
    """A unix:// URL works."""
    path = f"{tmp_path}/r.sock"
    with running("--unixsocket", path):

        async def use() -> None:
            async with RedisStore(f"unix://{path}?db=2") as store:
                await store.upsert_latest(state())
                assert await store.get_latest("u-1") is not None

        asyncio.run(use())


async def test_sentinel_url(server: Server) -> None:
    """A redis+sentinel:// URL finds the primary, past a Sentinel that is down."""
    sentinel = Sentinel(server)
    try:
        url = f"redis+sentinel://127.0.0.1:1,127.0.0.1:{sentinel.port}/mymaster/3"
        async with RedisStore(url) as store:
            await store.upsert_latest(state("by-sentinel"))
            assert await store.get_latest("by-sentinel") is not None
            assert await store.command("DBSIZE") == 1
    finally:
        sentinel.remove()


async def test_no_sentinel_is_lost(server: Server) -> None:
    """Many connections that look for the primary at once: every Sentinel stays known."""
    sentinel = Sentinel(server)
    try:
        hosts = f"127.0.0.1:1,127.0.0.1:2,127.0.0.1:{sentinel.port}"
        address = address_of_url(f"redis+sentinel://{hosts}/mymaster", 1.0, 1.0)()
        assert address.connection is not None
        assert address.release is not None
        connections = [address.connection() for _ in range(5)]
        manager = connections[0].connection_pool.sentinel_manager
        before = set(manager.sentinels)
        for _ in range(3):
            await asyncio.gather(*(each.connect() for each in connections))
            for each in connections:
                await each.disconnect()
            assert len(manager.sentinels) == 3
            assert set(manager.sentinels) == before
        port = manager.sentinels[0].connection_pool.connection_kwargs["port"]
        assert port == sentinel.port, "the one that answered is asked first"
        await address.release()
    finally:
        sentinel.remove()


async def test_tls_url(tmp_path: Any) -> None:
    """A rediss:// URL speaks TLS, checks the certificate and takes the driver's options."""
    key, certificate = f"{tmp_path}/key.pem", f"{tmp_path}/cert.pem"
    subprocess.run(  # noqa: ASYNC221, S603
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]  # noqa: S607
        + ["-keyout", key, "-out", certificate, "-subj", "/CN=localhost"]
        + ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        check=True,
        capture_output=True,
    )
    port = free_port()
    tls = ("--tls-port", str(port), "--tls-cert-file", certificate, "--tls-key-file", key)
    with running(*tls, "--tls-ca-cert-file", certificate, "--tls-auth-clients", "no"):
        url = f"rediss://127.0.0.1:{port}/1"
        async with RedisStore(f"{url}?ssl_ca_certs={certificate}") as store:
            big = {f"axis_{n}": n / 20_000 for n in range(20_000)}
            await store.upsert_latest_many([state(f"u-{n}", **big) for n in range(8)])
            found = await asyncio.gather(*(store.get_latest(f"u-{n}") for n in range(8)))
            assert all(snapshot is not None and snapshot.axes == big for snapshot in found)
        store = RedisStore(url)
        with pytest.raises(UnavailableError):
            await store.get_latest("u-1")
        await store.aclose()


async def test_cluster_url() -> None:
    """All operations work on a cluster, users spread over buckets, a user's keys in one slot."""
    with running("--cluster-enabled", "yes") as node:
        async with RedisStore(node.url) as single:
            await single.command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            while b"cluster_state:ok" not in await single.command("CLUSTER", "INFO"):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        url = f"redis+cluster://127.0.0.1:1,127.0.0.1:{node.port}"
        async with RedisStore(url, history_limit=3) as store:
            users = [f"c-{n}" for n in range(100)]
            assert len({store.bucket_of(store.digest(user)) for user in users}) == 16
            await store.upsert_latest_many([state(user, a=0.5) for user in users])
            await store.upsert_latest(state("c-1", a=0.6))
            assert set(await store.get_latest_many(users)) == set(users)
            assert [e.axes["a"] for e in await store.get_history("c-1", 5)] == [0.6, 0.5]
            await store.delete("c-1")
            assert await store.get_latest("c-1") is None
            assert await store.health_check()
            assert await store.group_buckets() == [list(store.buckets)]
            connection = await store.new_connection("f")
            await connection.disconnect()


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1",
        "redis+sentinel://127.0.0.1",
        "redis+sentinel:///service",
        "ftp+cluster://x",
        "redis://127.0.0.1:port",
        "redis://127.0.0.1/0?socket_timeout=s3cret",
        "redis://127.0.0.1/0?s3cret=1",
        "",
    ],
)
def test_bad_url(url: str) -> None:
    """A URL that cannot be read is refused when the store is built, without showing it."""
    with pytest.raises(ConfigError) as caught:
        RedisStore(url)
    assert "s3cret" not in f"{caught.value!r}{caught.value.__cause__!r}"
    assert caught.value.option == "url"


@pytest.mark.parametrize(
    "options",
    [
        {"ttl": 0},
        {"timeout": 0},
        {"connect_timeout": -1},
        {"max_connections": 0},
        {"history_limit": -1},
        {"prefix": "a{b}"},
        {"digest_key": b"x" * 65},
        {"probe_seconds": float("inf")},
        {"client": object()},
    ],
)
def test_bad_options(options: dict[str, Any]) -> None:
    """Options out of range are refused by name."""
    with pytest.raises(ConfigError) as caught:
        RedisStore("redis://127.0.0.1", **options)
    assert caught.value.option in {*options, "url"}
    with pytest.raises(ConfigError):
        RedisStore()


@pytest.mark.parametrize("kept", [False, True])
def test_exit_without_closing_is_silent(kept: bool, server: Server) -> None:
    """A process that never closes the store ends without a warning, also with warnings on.

    An event loop that ends closes the connections that were made on it.
    """
    program = f"""
import asyncio, gc
from layered_store.stores.redis import RedisStore
from layered_store.snapshot import StateSnapshot
kept = RedisStore("{server.url}")
async def main():
    store = kept if {kept} else RedisStore("{server.url}")
    await store.upsert_latest(StateSnapshot("u-1"))
for _ in range(2):
    asyncio.run(main())
    gc.collect()
"""
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-W", "always", "-c", program], capture_output=True, check=False
    )
    assert done.returncode == 0
    assert done.stderr == b""


async def counted(store: RedisStore, command: str) -> int:
    """Return how often the server was sent a command."""
    info = await store.command("INFO", "commandstats")
    for line in info.decode().splitlines():
        if line.startswith(f"cmdstat_{command}:calls="):
            return int(line.partition("=")[2].partition(",")[0])
    return 0


async def test_a_burst_on_a_fresh_store_is_a_few_reads_over_one_connection(
    server: Server, store: RedisStore
) -> None:
    """A thousand callers at once share round trips; absent users are absent, none fails."""
    users = [f"burst-{n}" for n in range(1000)]
    await store.upsert_latest_many(StateSnapshot(user, n) for n, user in enumerate(users[:500]))
    fresh = RedisStore(server.url)
    connections = int((await info_of(store, "stats"))["total_connections_received"])
    gets, mgets = await counted(store, "get"), await counted(store, "mget")
    found = await asyncio.gather(*map(fresh.get_latest, users))
    assert [state and state.updated_at_unix_ms for state in found] == [*range(500), *[None] * 500]
    assert await counted(store, "get") == gets
    # The first few leave before the turn is over, the others as many together as may be.
    assert await counted(store, "mget") - mgets == 5
    assert int((await info_of(store, "stats"))["total_connections_received"]) - connections == 1
    await fresh.aclose()


async def info_of(store: RedisStore, section: str) -> dict[str, str]:
    text = (await store.command("INFO", section)).decode()
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)


async def test_reads_together_are_judged_one_by_one(store: RedisStore) -> None:
    """Of reads that share a command each gets its own: found, absent, broken; twice the same."""
    for user in ("one", "two", "broken", "list"):
        await store.upsert_latest(state(user, a=0.5))
    await store.command("SET", store.key(store.digest("broken")), b"nonsense")
    await store.command("DEL", store.key(store.digest("list")))
    await store.command("LPUSH", store.key(store.digest("list")), "x")
    bad = store.corrupt_records
    asked = ("one", "broken", "absent", "list", "two", "one")
    found = await asyncio.gather(*map(store.get_latest, asked))
    assert [each and each.user_id for each in found] == ["one", None, None, None, "two", "one"]
    assert store.corrupt_records == bad + 1
    assert await store.get_latest("list") is None
    assert store.corrupt_records == bad + 2


async def test_a_cancelled_reader_of_several_harms_no_other(store: RedisStore) -> None:
    """Before the command leaves and while it is under way."""
    await store.upsert_latest(state("kept", a=0.5))
    for turns in range(4):
        tasks = [asyncio.ensure_future(store.get_latest("kept")) for _ in range(5)]
        for _ in range(turns):
            await asyncio.sleep(0)
        tasks[0].cancel()
        tasks[3].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(each, StateSnapshot) for each in results].count(True) >= 3


async def test_close_waits_for_reads_that_were_begun(server: Server) -> None:
    """Also for those that were to leave in this very turn."""
    store = RedisStore(server.url)
    await store.upsert_latest(state("last", a=0.5))
    reads = [asyncio.ensure_future(store.get_latest("last")) for _ in range(50)]
    await asyncio.sleep(0)
    await store.aclose()
    assert all(found is not None for found in await asyncio.gather(*reads))


async def test_a_close_whose_caller_is_cancelled_goes_on(server: Server) -> None:
    """The caller leaves at once; who closes again waits until the connections are gone."""
    store = RedisStore(server.url)
    await store.get_latest("u-1")
    (link,) = store._links.values()
    assert isinstance(link, LaneLink)
    (lane,) = link._lanes
    read = asyncio.create_task(store.get_latest("u-1"))
    await asyncio.sleep(0)
    closing = asyncio.create_task(store.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert lane.open
    await store.aclose()
    assert not lane.open
    assert read.done()
