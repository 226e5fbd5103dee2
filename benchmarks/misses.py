"""Rows 3 to 6: misses, from nowhere, from Redis, with many callers, in a burst."""

from __future__ import annotations

import asyncio
import gc
import time
from typing import Any

import redis.asyncio
from prometheus_client import CollectorRegistry

from benchmarks.figures import Figure, Result, spread
from benchmarks.rounds import compare, load, micro
from benchmarks.setting import Setting, encoded, snapshot, user
from layered_store import Cached, Metrics, RedisStore, Retry, StateSnapshot, StateStore
from layered_store.codec import SnapshotCodec

__all__ = ["run"]

_USERS = 20_000


async def run(setting: Setting) -> list[Result]:
    """Measure all four rows."""
    return [await _lone(setting), await _redis(setting), await _burst(setting)]


class Nowhere(StateStore):
    """A backend that answers at once with bytes that it decodes, and keeps nothing."""

    def __init__(self, data: dict[str, bytes]) -> None:
        self._data = data
        self._decode = SnapshotCodec(StateSnapshot).decode

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        return self._decode(self._data[user_id], user_id)

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        pass


async def _lone(setting: Setting) -> Result:
    users = [user(n) for n in range(_USERS)]
    backend = Nowhere({user_id: encoded(user_id) for user_id in users})
    stack = Metrics(
        Cached(Retry(backend), max_entries=1_000), name="bench", registry=CollectorRegistry()
    )
    keys = users[: setting.some(_USERS, 2_000)]
    names = ("fetch and decode", "through Metrics(Cached(Retry()))")
    contenders = {
        names[0]: micro(backend.get_latest, keys),
        names[1]: micro(stack.get_latest, keys),
    }
    costs = await compare(contenders, setting.some(21, 2))
    tasks: list[Any] = []
    loop = asyncio.get_running_loop()
    loop.set_task_factory(lambda loop, coro, **kw: tasks.append(coro) or asyncio.Task(
        coro, loop=loop, **kw
    ))  # fmt: skip
    for user_id in users[:100]:
        await stack.get_latest(user_id)
    loop.set_task_factory(None)
    own = costs.difference(names[1], names[0])
    micros = type(own)(own.middle * 1e6, own.low * 1e6, own.high * 1e6)
    figures = [
        Figure(3, "a lone miss: the layers' own cost, including the caching", micros, "µs", 1.5),
        Figure(3, "tasks created by 100 lone misses", spread([len(tasks)]), "tasks", 0),
    ]
    written = [snapshot(user_id) for user_id in keys]
    writes = {
        names[0]: micro(backend.upsert_latest, written),
        names[1]: micro(stack.upsert_latest, written),
    }
    written_costs = await compare(writes, setting.some(21, 2))
    own = written_costs.difference(names[1], names[0])
    micros = type(own)(own.middle * 1e6, own.low * 1e6, own.high * 1e6)
    figures.append(Figure(3, "a lone write: the layers' own cost", micros, "µs"))
    rows = [[name, costs.wall(name) * 1e6] for name in names]
    rows.append(["a write through Metrics(Cached(Retry()))", written_costs.wall(names[1]) * 1e6])
    await stack.aclose()
    return Result("A lone miss, nothing behind it", figures, ["contender", "µs"], rows)


async def _redis(setting: Setting) -> Result:
    url = setting.redis_url
    users = [user(n) for n in range(_USERS)]
    store = RedisStore(url)
    await store.upsert_latest_many(map(snapshot, users))
    stack = Metrics(
        Cached(Retry(store), max_entries=100), name="bench", registry=CollectorRegistry()
    )
    client = redis.asyncio.Redis(
        connection_pool=redis.asyncio.ConnectionPool.from_url(url, max_connections=1_000)
    )
    raw_keys = {user_id: f"raw:{user_id}" for user_id in users}
    async with client.pipeline(transaction=False) as pipe:
        for user_id in users:
            pipe.set(raw_keys[user_id], encoded(user_id))
        await pipe.execute()

    async def raw(user_id: str) -> Any:
        return await client.get(raw_keys[user_id])

    peers: dict[str, Any] = {"redis-py GET": raw}
    closing = [client.aclose]
    try:
        import coredis

        core = coredis.Redis.from_url(url)
        await core.__aenter__()
        closing.append(lambda: core.__aexit__(None, None, None))

        async def coredis_get(user_id: str) -> Any:
            return await core.get(raw_keys[user_id])

        assert await coredis_get(users[0])
        peers["coredis GET"] = coredis_get
    except ImportError:
        pass
    ours = "Metrics(Cached(Retry(RedisStore)))"
    assert await raw(users[0])
    assert await stack.get_latest(users[0]) == snapshot(users[0])
    result = Result(
        "Misses from Redis, decoded, through the whole stack",
        columns=["callers", "contender", "/s", "x redis-py", "CPU of redis-py's"],
    )
    for callers in (1, 16, 64, 256):
        calls = setting.some(400 if callers == 1 else 4_000, 200 if callers == 1 else 1_500)
        keys = setting.random.sample(users, calls)
        contenders = {name: load(get, keys, callers) for name, get in peers.items()}
        contenders[ours] = load(stack.get_latest, keys, callers)
        hits_before = _hits(stack)
        costs = await compare(contenders, setting.some(9, 2))
        assert _hits(stack) - hits_before < calls  # misses they are
        for name in contenders:
            cells = [costs.faster(name, "redis-py GET"), costs.cpu_ratio(name, "redis-py GET")]
            result.rows.append([callers, name, 1 / costs.wall(name), *map(str, cells)])
        goal = {1: (4, 0.9), 64: (5, 4), 256: (5, 8)}.get(callers)
        if goal:
            what = f"misses from Redis, {callers} caller{'s' * (callers > 1)}, to redis-py"
            times = costs.faster(ours, "redis-py GET")
            result.figures.append(Figure(goal[0], what, times, at_least=goal[1]))
        if callers >= 64:
            share = costs.cpu_ratio(ours, "redis-py GET")
            what = f"... {callers} callers, CPU per call"
            result.figures.append(Figure(5, what, share, at_most=0.25))
    await stack.aclose()
    for close in closing:
        await close()
    return result


def _hits(stack: Metrics) -> float:
    (cached,) = (block for block in stack.children().values())
    return sum(s.value for s in cached.samples() if s.metric == "reads" and s.labels == ("hit",))


async def _burst(setting: Setting) -> Result:
    """1,000 callers at once, each of a user of his own, on what a constructor gives by itself."""
    url = setting.redis_url
    count = 1_000
    users = [user(n) for n in range(count)]
    store = RedisStore(url)
    await store.upsert_latest_many(map(snapshot, users))
    await store.aclose()

    async def ours() -> tuple[Any, Any]:
        stack = Cached(RedisStore(url))
        return stack.get_latest, stack.aclose

    async def redis_py() -> tuple[Any, Any]:
        client = redis.asyncio.Redis.from_url(url)
        return (lambda user_id: client.get(f"raw:{user_id}")), client.aclose

    makers: dict[str, Any] = {"Cached(RedisStore)": ours, "redis-py": redis_py}
    try:
        import coredis

        async def core() -> tuple[Any, Any]:
            client = coredis.Redis.from_url(url)
            await client.__aenter__()
            return (
                lambda user_id: client.get(f"raw:{user_id}")
            ), lambda: client.__aexit__(None, None, None)

        makers["coredis"] = core
    except ImportError:
        pass
    try:
        from cashews import Cache

        async def cashews() -> tuple[Any, Any]:
            cache = Cache()
            cache.setup(url)
            return cache.get, cache.close

        makers["cashews redis"] = cashews
    except ImportError:
        pass
    try:
        from aiocache import RedisCache

        async def aiocache() -> tuple[Any, Any]:
            cache = RedisCache(endpoint="127.0.0.1", port=int(url.rsplit(":", 1)[1][:-2]))
            return cache.get, cache.close

        makers["aiocache RedisCache"] = aiocache
    except ImportError:
        pass
    walls: dict[str, list[float]] = {name: [] for name in makers}
    errors: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(setting.some(7, 2)):
        for name, make in makers.items():
            get, close = await make()
            gc.collect()  # what the one before left is not this one's; its own is
            begun = time.perf_counter()
            found = await asyncio.gather(*map(get, users), return_exceptions=True)
            walls[name].append((time.perf_counter() - begun) * 1e3)
            errors[name].append(sum(isinstance(each, BaseException) for each in found))
            await close()
    name = "Cached(RedisStore)"
    survivors = [each for each in makers if each != name and not any(errors[each])]
    figures = [Figure(6, "burst of 1,000 misses: errors", spread(errors[name]), "errors", 0)]
    if survivors:
        best = min(survivors, key=lambda each: spread(walls[each]).middle)
        pairs = zip(walls[best], walls[name], strict=True)
        times = spread([theirs / own for theirs, own in pairs])
        figures.append(Figure(6, f"... to the best survivor ({best})", times, at_least=15))
    rows = [[each, str(spread(walls[each])), spread(errors[each]).middle] for each in makers]
    columns = ["contender", "ms", "errors"]
    return Result("Burst of 1,000 on default settings", figures, columns, rows)
