"""Rows 1 and 2: a hit in the process, through a stack and through a deeper one."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry

from benchmarks.figures import Figure, Result
from benchmarks.rounds import compare, micro
from benchmarks.setting import Setting, snapshot, user
from layered_store import (
    Bulkhead,
    Cached,
    CircuitBreaker,
    MemoryStore,
    Metrics,
    RedisStore,
    Retry,
    StateStore,
    Timeout,
    load_stack,
)

__all__ = ["run"]

LIMIT = "limit: async def around dict.get"


class Nested(Cached):
    """The same cache with the fusing refused: what hits cost when every layer is awaited."""

    async def get_latest(self, user_id: str) -> Any:
        return await super().get_latest(user_id)


async def run(setting: Setting) -> list[Result]:
    """Measure hits."""
    users = [user(n) for n in range(1000)]
    keys = [setting.random.choice(users) for _ in range(setting.some(5_000, 1_000))]
    url = setting.redis_url
    stacks: dict[str, StateStore] = {
        "Metrics(Cached(Retry(RedisStore)))": _metrics(Cached(Retry(RedisStore(url)))),
        "the same, from a config file": load_stack(_config(url)),
        "the same, time_hits='all'": _metrics(Cached(Retry(RedisStore(url))), time_hits="all"),
        "the same, nothing fused": _metrics(Nested(Retry(RedisStore(url)))),
        "Cached(MemoryStore)": Cached(MemoryStore()),
        "5 more layers above it": _metrics(
            Timeout(
                Retry(Bulkhead(CircuitBreaker(Cached(MemoryStore())), max_in_flight=64)), seconds=1
            )
        ),
        "Metrics(Cached(MemoryStore))": _metrics(Cached(MemoryStore())),
    }
    table = {user_id: snapshot(user_id) for user_id in users}

    async def limit(user_id: str) -> Any:
        return table.get(user_id)

    contenders = {LIMIT: micro(limit, keys)}
    for name, stack in stacks.items():
        await stack.upsert_latest_many(table.values())
        for user_id in users:
            # Read once: with a config file or many layers alike, from here on it is in the cache.
            assert await stack.get_latest(user_id) == table[user_id]
        contenders[name] = micro(stack.get_latest, keys)
    peers = await _peers(table, url)
    for name, (get, _) in peers.items():
        assert await get(users[0]) is not None, name
        contenders[name] = micro(get, keys[: max(300, len(keys) // 10)])
    costs = await compare(contenders, setting.some(41, 2))
    for stack in stacks.values():
        await stack.aclose()
    for _, close in peers.values():
        await close()

    first, configured, timed, _, bare, deep, shallow = stacks
    ours = costs.ratio(first, LIMIT)
    figures = [
        Figure(1, "hit through Metrics(Cached(Retry(RedisStore)))", ours, at_most=2.3),
        Figure(1, "... built from a config file", costs.ratio(configured, LIMIT), at_most=2.3),
        Figure(1, "... with every hit timed", costs.ratio(timed, LIMIT), at_most=4),
    ]
    if "async-lru alru_cache(ttl)" in peers:
        figures.append(
            Figure(1, "bare async-lru against it", costs.ratio("async-lru alru_cache(ttl)", first))
        )
    added = costs.difference(deep, shallow, LIMIT)
    each = type(added)(added.middle / 4, added.low / 4, added.high / 4)
    what = "one more layer on a hit, as a share of the limit"
    figures.append(Figure(2, what, each, at_most=0.05))
    rows = [
        [name, costs.wall(name) * 1e9, str(costs.ratio(name, LIMIT))]
        for name in sorted(contenders, key=costs.wall)
    ]
    assert bare in stacks
    return [Result("A hit in the process", figures, ["contender", "ns", "x limit"], rows)]


def _metrics(inner: StateStore, **options: Any) -> Metrics:
    return Metrics(inner, name="bench", registry=CollectorRegistry(), **options)


def _config(url: str) -> dict[str, Any]:
    layers = [{"use": "metrics", "name": "configured"}, {"use": "cached"}, {"use": "retry"}]
    return {"store": {"use": "redis", "url": url, "prefix": "c:", "layers": layers}}


async def _peers(table: dict[str, Any], url: str) -> dict[str, tuple[Any, Any]]:
    """Return how each peer gets a value that it has cached, and how it is closed."""
    found: dict[str, tuple[Any, Any]] = {}

    async def nothing() -> None:
        pass

    try:
        from async_lru import alru_cache

        @alru_cache(maxsize=10_000, ttl=600)
        async def cached(user_id: str) -> Any:
            return table.get(user_id)

        for user_id in table:
            await cached(user_id)
        found["async-lru alru_cache(ttl)"] = (cached, cached.cache_close)
    except ImportError:
        pass
    try:
        from datetime import timedelta

        from theine import Memoize

        @Memoize(10_000, timedelta(seconds=600))
        async def remembered(user_id: str) -> Any:
            return table.get(user_id)

        @remembered.key
        def _(user_id: str) -> str:
            return user_id

        for user_id in table:
            await remembered(user_id)
        found["theine Memoize"] = (remembered, nothing)
    except ImportError:
        pass
    try:
        from aiocache import SimpleMemoryCache

        memory = SimpleMemoryCache()
        for user_id, value in table.items():
            await memory.set(user_id, value, ttl=600)
        found["aiocache SimpleMemoryCache"] = (memory.get, memory.close)
    except ImportError:
        pass
    try:
        from cashews import Cache

        cashews = Cache()
        cashews.setup("mem://?size=10000")
        for user_id, value in table.items():
            await cashews.set(user_id, value, expire=600)
        found["cashews mem"] = (cashews.get, cashews.close)
    except ImportError:
        pass
    try:
        from key_value.aio.stores.memory import MemoryStore as KeyValueStore
        from key_value.aio.wrappers.retry import RetryWrapper
        from key_value.aio.wrappers.statistics import StatisticsWrapper

        store = StatisticsWrapper(RetryWrapper(KeyValueStore()))
        for user_id in table:
            await store.put(user_id, {"axes": {"a": 0.5}}, ttl=600)
        found["py-key-value Statistics(Retry(Memory))"] = (store.get, nothing)
    except ImportError:
        pass
    try:
        import cachetools

        ttl: Any = cachetools.TTLCache(10_000, 600)
        ttl.update(table)

        async def usual(user_id: str) -> Any:
            return ttl.get(user_id)

        found["async def around cachetools.TTLCache.get"] = (usual, nothing)
    except ImportError:
        pass
    return found
