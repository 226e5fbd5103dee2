"""Where Redis is: a URL, or a client that was passed in, becomes something that connects."""

from __future__ import annotations

import asyncio
import inspect
import re
from copy import copy
from dataclasses import dataclass
from random import sample
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from layered_store.clock import SYSTEM_CLOCK
from layered_store.errors import ConfigError
from layered_store.options import nearest

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Address", "address_of_client", "address_of_url"]

_SCHEMES: Final = (
    "redis://, rediss://, unix://, redis+cluster://, rediss+cluster://,"
    " redis+sentinel://host1,host2/service or rediss+sentinel://..."
)
_SENTINEL_PORT: Final = 26379
# Whatever a URL says: records are bytes, and in version 3 of the protocol the driver swallows the
# messages that stand between replies, those of the invalidation channel among them.
_ALWAYS: Final = {"decode_responses": False, "protocol": 2}
_CONTEXT_SECONDS: Final = 10.0
_OBJECTS: Final = (
    "address_remap",
    "credential_provider",
    "event_dispatcher",
    "policy_resolver",
    "retry",
)
_FROM_REPLICAS: Final = ("read_from_replicas", "load_balancing_strategy")
_BEHIND: Final = "by which a read would not see the write before it"
_UNKNOWN: Final = re.compile(r"unexpected keyword argument '([a-z][a-z_]{0,40})'").search


@dataclass(frozen=True, slots=True)
class Address:
    """How connections or, where routing is the driver's business, clients are made.

    Args:
        connection: makes one connection object of the driver, not yet connected; None when calls
            go through a client.
        client: makes a client; called once per event loop.
        shared: whether that client is the caller's, who closes it.
        cluster: whether keys are spread over nodes.
        release: closes what ``connection`` needed to find the server, on its event loop.
    """

    connection: Callable[[], Any] | None = None
    client: Callable[[], Any] | None = None
    shared: bool = False
    cluster: bool = False
    release: Callable[[], Any] | None = None


def _quiet(connect_timeout: float, timeout: float) -> dict[str, Any]:
    """Return the driver's options: limits, and nothing that repeats or announces by itself."""
    from redis.asyncio.connection import AbstractConnection  # noqa: PLC0415
    from redis.asyncio.retry import Retry  # noqa: PLC0415
    from redis.backoff import NoBackoff  # noqa: PLC0415

    options: dict[str, Any] = {
        # A repeat belongs to the Retry layer: below it, each would multiply the time limits.
        "retry": Retry(NoBackoff(), 0),
        "socket_connect_timeout": connect_timeout,
        "socket_timeout": timeout,
        **_ALWAYS,
    }
    # Commands with which the driver announces itself; older servers answer them with errors. Which
    # options turn them off differs between the driver's versions.
    known = inspect.signature(AbstractConnection.__init__).parameters
    if "driver_info" in known:
        options["driver_info"] = None
    elif "lib_name" in known:
        options |= {"lib_name": None, "lib_version": None}
    if "maint_notifications_config" in known:
        from redis.maint_notifications import MaintNotificationsConfig  # noqa: PLC0415

        options["maint_notifications_config"] = MaintNotificationsConfig(enabled=False)
    return options


def address_of_url(url: str, connect_timeout: float, timeout: float) -> Callable[[], Address]:
    """Return a maker of addresses, one per event loop; the URL is checked at once.

    Args:
        url: whole, as the driver takes it; query options are the driver's.
        connect_timeout: seconds to establish a connection.
        timeout: seconds for one reply.
    """
    try:
        scheme = urlsplit(url).scheme
    except ValueError:
        scheme = ""
    try:
        if scheme.endswith("+sentinel"):
            return _sentinel(url, scheme, _quiet(connect_timeout, timeout))
        if scheme.endswith("+cluster"):
            return _cluster(url, scheme, _quiet(connect_timeout, timeout))
        return _single(url, _quiet(connect_timeout, timeout))
    except ConfigError:
        raise
    except Exception as exc:  # noqa: BLE001  whatever the driver makes of a strange URL
        kind = type(exc).__name__
        # A password with an unescaped '?' makes options of its rest.
        named = isinstance(exc, TypeError) and "@" not in url.partition("?")[2]
        unknown = _UNKNOWN(str(exc)) if named else None
    if unknown:
        raise ConfigError(
            f"has a query option that the driver does not know: {unknown[1]}",
            option="url",
            suggestion=_nearest(unknown[1]),
            layer="RedisStore",
        )
    # The driver's text may show a part of the URL, so only its class is told; and raised out here,
    # since inside the handler the driver's error would go along as the context.
    raise ConfigError(
        f"cannot be read ({kind}); the forms are {_SCHEMES}, and query options are the driver's",
        option="url",
        layer="RedisStore",
    )


def _nearest(name: str) -> str | None:
    from redis.asyncio.connection import Connection, SSLConnection  # noqa: PLC0415

    known = {
        parameter
        for kind in (*Connection.__mro__, *SSLConnection.__mro__)
        for parameter in inspect.signature(kind).parameters
    }
    return nearest(name, sorted(known))


def _parse(url: str) -> dict[str, Any]:
    from redis.asyncio.connection import parse_url  # noqa: PLC0415

    return dict(parse_url(url))


def _single(url: str, quiet: dict[str, Any]) -> Callable[[], Address]:
    from redis.asyncio import ConnectionPool  # noqa: PLC0415

    given = _parse(url)
    if "path" not in given and "host" not in given and url.startswith("unix"):
        raise ValueError
    database = urlsplit(url).path.strip("/")
    if not url.startswith("unix") and database and not database.isdecimal():
        raise ConfigError(
            "names a database that is no number; write redis://host:port/0",
            option="url",
            layer="RedisStore",
        )
    pool = ConnectionPool.from_url(url, **quiet)
    pool.connection_kwargs.update(_ALWAYS)
    address = _of_pool(pool)
    assert address.connection is not None
    address.connection()  # an option that the driver does not know fails here
    return lambda: address


def _cluster(url: str, scheme: str, quiet: dict[str, Any]) -> Callable[[], Address]:
    from redis.asyncio.cluster import ClusterNode, RedisCluster  # noqa: PLC0415

    plain = scheme.removesuffix("+cluster")
    if plain not in ("redis", "rediss"):
        raise ValueError
    nodes, rest = _hosts(url.replace(scheme, plain, 1), 6379)
    given = _parse(rest)
    if given.pop("connection_class", None) is not None:
        given["ssl"] = True
    for name in ("host", "port", "db"):
        given.pop(name, None)
    _type_options(given)
    # Where a slot went the reply says; to look anew for it would cut off the calls under way.
    quiet |= {"reinitialize_steps": 0}
    # Places are counted above the driver, which refuses calls that find none.
    options = {**quiet, **given, **_ALWAYS}

    known_hints = inspect.signature(RedisCluster.initialize).parameters

    class Rooted(RedisCluster):
        """Looks for the cluster under the URL's names too, when nobody answers where it was last.

        Where nodes come back under other addresses, as in Kubernetes, those may all be gone.
        """

        hung: str | None = None
        """Name of the node at which a call ran into its time limit."""

        async def initialize(self, *args: Any, **hints: Any) -> RedisCluster:
            if "last_failed_node_name" in known_hints:
                hints["last_failed_node_name"] = hints.get("last_failed_node_name") or self.hung
            try:
                return await super().initialize(*args, **hints)
            except BaseException:
                manager = self.nodes_manager
                known = dict(manager.startup_nodes)
                for node in nodes:
                    root = ClusterNode(*node, **self.connection_kwargs)
                    known.setdefault(root.name, root)
                # One that does not answer costs a call its time limit: the next asks another first.
                manager.startup_nodes = dict(sample(list(known.items()), len(known)))
                raise

    def client() -> Any:
        return Rooted(startup_nodes=[ClusterNode(*node) for node in nodes], **options)

    client()
    return lambda: Address(client=client, cluster=True)


def _type_options(given: dict[str, Any]) -> None:
    """Give a cluster's options the types of which the driver knows nothing in a URL.

    Raises:
        ConfigError: one that needs an object, or that would have reads go behind writes.
        ValueError: no such value.
    """
    from redis.asyncio.connection import to_bool  # noqa: PLC0415

    if not to_bool(given.get("read_from_replicas")):
        given.pop("read_from_replicas", None)
    for name in ("require_full_coverage", "dynamic_startup_nodes"):
        if name in given:
            given[name] = to_bool(given[name])
    for name in ("reinitialize_steps", "cluster_error_retry_attempts"):
        if name in given:
            given[name] = int(given[name])
    behind = next((name for name in _FROM_REPLICAS if name in given), None)
    wrong = next((name for name in _OBJECTS if name in given), None)
    if behind:
        problem = f"{behind}, {_BEHIND}"
    elif wrong:
        problem = f"{wrong}, which a URL cannot hold; pass client="
    else:
        return
    raise ConfigError(f"has the query option {problem}", option="url", layer="RedisStore")


def _sentinel(url: str, scheme: str, quiet: dict[str, Any]) -> Callable[[], Address]:
    from redis.asyncio.connection import URL_QUERY_ARGUMENT_PARSERS  # noqa: PLC0415
    from redis.asyncio.sentinel import Sentinel  # noqa: PLC0415

    plain = scheme.removesuffix("+sentinel")
    if plain not in ("redis", "rediss"):
        raise ValueError
    service, _, database = urlsplit(url).path.strip("/").partition("/")
    if not service:
        raise ConfigError(
            "names no service; write redis+sentinel://host1,host2/service",
            option="url",
            layer="RedisStore",
        )
    sentinels, rest = _hosts(url.replace(scheme, plain, 1), _SENTINEL_PORT)
    given = _parse(rest)
    secure = given.pop("connection_class", None) is not None
    for name in ("host", "port"):
        given.pop(name, None)
    if database:
        given["db"] = int(database)
    own = {
        name.removeprefix("sentinel_"): given.pop(name)
        for name in list(given)
        if name.startswith("sentinel_")
    }
    # The driver makes numbers of those options only that it knows by these names.
    own = {name: URL_QUERY_ARGUMENT_PARSERS.get(name, str)(own[name]) for name in own}
    if "min_other_sentinels" in given:
        given["min_other_sentinels"] = int(given["min_other_sentinels"])
    options = {**quiet, **given, **_ALWAYS, **({"ssl": True} if secure else {})}
    shared = {name: value for name, value in given.items() if name.startswith(("ssl_", "socket_"))}
    sentinel_options = {**quiet, **shared, **own, **({"ssl": True} if secure else {})}

    class Careful(Sentinel):
        """Loses no Sentinel when several connections look for the primary at once.

        The driver swaps the one that answered with the first of its list, by a place from before
        the answer: the second of two that swap throws another one away, unclosed.
        """

        async def discover_master(self, service_name: str) -> Any:
            own = copy(self)
            own.sentinels = list(self.sentinels)
            found = await Sentinel.discover_master(own, service_name)
            first = own.sentinels[0]
            self.sentinels.sort(key=lambda each: each is not first)
            return found

    def make() -> Address:
        # Its clients hold connections, so each event loop has its own.
        manager: Any = Careful(sentinels, sentinel_kwargs=sentinel_options, **options)  # type: ignore[no-untyped-call]
        pool = manager.master_for(service).connection_pool

        async def release() -> None:
            # ``Sentinel.aclose`` came with redis-py 8.1.
            await asyncio.gather(
                *(each.aclose() for each in manager.sentinels), return_exceptions=True
            )

        context = _Context()
        return Address(
            connection=lambda: context.lend(_hold(pool.make_connection(), pool)), release=release
        )

    address = make()
    assert address.connection is not None
    address.connection()  # an option that the driver does not know fails here
    return make


def _hold(connection: Any, pool: Any) -> Any:
    # The connection knows its pool only by a weak reference.
    connection.layered_store_pool = pool
    return connection


class _Context:
    """The TLS context of connections that are made soon after one another.

    Making one reads all authorities that the system knows, and the event loop stands still for 20
    ms; while a server is away, connecting is tried many times a second. It does not stay for good,
    since certificates are replaced.
    """

    def __init__(self) -> None:
        self._lent: Any = None
        self._until = float("-inf")

    def lend(self, connection: Any) -> Any:
        """Return the connection, with the context of those before it."""
        own = getattr(connection, "ssl_context", None)
        if own is None:
            return connection
        now = SYSTEM_CLOCK.monotonic()
        if now >= self._until:
            self._lent, self._until = own, now + _CONTEXT_SECONDS
        connection.ssl_context = self._lent
        return connection


def _hosts(url: str, port: int) -> tuple[list[tuple[str, int]], str]:
    """Return the hosts of a URL that names several, and the URL with none of them."""
    head, _, rest = url.partition("://")
    cut = min((at for at in (rest.find("/"), rest.find("?")) if at >= 0), default=len(rest))
    user, at, hosts = rest[:cut].rpartition("@")
    found = []
    for host in hosts.split(","):
        parts = urlsplit(f"//{host}")
        if not parts.hostname:
            raise ValueError
        found.append((parts.hostname, parts.port or port))
    query = urlsplit(url).query
    return found, f"{head}://{user}{at}localhost" + (f"?{query}" if query else "")


def address_of_client(client: Any, connect_timeout: float) -> Address:
    """Return the address that a client passed in stands for.

    Connections of our own are made as its pool makes them. A client of another kind (a cluster's, a
    test double) is called instead.

    Raises:
        ConfigError: it is no client, it decodes replies, or it reads from replicas.
    """
    import redis  # noqa: PLC0415
    from redis.asyncio.cluster import RedisCluster  # noqa: PLC0415

    blocking = isinstance(client, redis.Redis | redis.RedisCluster)
    if blocking or not hasattr(client, "execute_command"):
        raise ConfigError(
            "must be a redis.asyncio client, such as redis.asyncio.Redis()",
            option="client",
            layer="RedisStore",
        )
    cluster = isinstance(client, RedisCluster)
    pool = getattr(client, "connection_pool", None)
    options = client.get_connection_kwargs() if cluster else getattr(pool, "connection_kwargs", {})
    if options.get("decode_responses"):
        raise ConfigError(
            "decodes replies to str, and records are bytes; build it with decode_responses=False",
            option="client",
            layer="RedisStore",
        )
    behind = next((name for name in _FROM_REPLICAS if getattr(client, name, None)), None)
    if cluster and behind:
        raise ConfigError(
            f"has {behind}, {_BEHIND}; build it without", option="client", layer="RedisStore"
        )
    kind = getattr(pool, "connection_class", None)
    if not cluster and kind is not None and kind.__module__.startswith("redis.asyncio."):
        return _of_pool(pool, quiet=_quiet(connect_timeout, connect_timeout))
    return Address(client=lambda: client, shared=True, cluster=cluster)


def _of_pool(pool: Any, quiet: dict[str, Any] | None = None) -> Address:
    kind, options = pool.connection_class, dict(pool.connection_kwargs)
    # The caller's limits stay; what repeats or announces by itself is turned off. So is version 3
    # of the protocol, in which the driver swallows the messages that stand between replies.
    for name, value in (quiet or {}).items():
        if name not in ("socket_connect_timeout", "socket_timeout"):
            options[name] = value
    for name in ("retry_on_timeout", "retry_on_error", "maint_notifications_pool_handler"):
        options.pop(name, None)
    context = _Context()
    return Address(connection=lambda: context.lend(_hold(kind(**options), pool)))
