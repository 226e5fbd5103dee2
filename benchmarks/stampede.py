"""Row 7: 10,000 callers of one cold user."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from benchmarks.figures import Figure, Result, spread
from benchmarks.rounds import Cost, compare
from benchmarks.setting import Setting, snapshot
from layered_store import Cached, StateSnapshot, StateStore

__all__ = ["run"]

_LOAD_SECONDS = 0.05


class Slow(StateStore):
    """A backend whose reads take 50 ms; counts them."""

    def __init__(self) -> None:
        self.loads = 0

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        self.loads += 1
        await asyncio.sleep(_LOAD_SECONDS)
        return snapshot(user_id)

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        raise NotImplementedError


async def run(setting: Setting) -> list[Result]:
    """Measure what a caller costs beyond the load itself."""
    callers = setting.some(10_000, 2_000)
    loads: dict[str, int] = {}

    async def floor() -> Cost:
        task = asyncio.ensure_future(Slow().get_latest("u"))

        async def wait() -> Any:
            return await task

        return await _crowd(wait, callers)

    async def ours() -> Cost:
        backend = Slow()
        cached = Cached(backend)
        cost = await _crowd(lambda: cached.get_latest("u"), callers)
        loads["Cached"] = max(backend.loads, loads.get("Cached", 0))
        return cost

    contenders: dict[str, Any] = {"floor: tasks awaiting one task": floor, "Cached": ours}
    try:
        from async_lru import alru_cache

        async def lru() -> Cost:
            backend = Slow()
            cached = alru_cache(maxsize=100)(backend.get_latest)
            cost = await _crowd(lambda: cached("u"), callers)
            loads["async-lru"] = max(backend.loads, loads.get("async-lru", 0))
            return cost

        contenders["async-lru"] = lru
    except ImportError:
        pass
    try:
        from cashews import Cache

        async def cashews() -> Cost:
            backend = Slow()
            cache = Cache()
            cache.setup("mem://")

            @cache(ttl="10m", key="{user_id}", lock=True)
            async def get(user_id: str) -> Any:
                return await backend.get_latest(user_id)

            cost = await _crowd(lambda: get(user_id="u"), callers)
            loads["cashews lock"] = max(backend.loads, loads.get("cashews lock", 0))
            await cache.close()
            return cost

        contenders["cashews lock"] = cashews
    except ImportError:
        pass
    costs = await compare(contenders, setting.rounds)
    figures = [
        Figure(7, "loads for all callers", spread([float(loads["Cached"])]), "loads", 1),
        Figure(
            7,
            f"{callers:,} callers of one cold user, to the floor",
            costs.ratio("Cached", "floor: tasks awaiting one task"),
            at_most=1.15,
        ),
    ]
    rows = [[name, costs.wall(name) * 1e6, loads.get(name, 1)] for name in contenders]
    return [Result("Stampede", figures, ["contender", "µs a caller", "loads"], rows)]


async def _crowd(call: Any, callers: int) -> Cost:
    wall, cpu = time.perf_counter(), time.process_time()
    tasks = [asyncio.ensure_future(call()) for _ in range(callers)]
    await asyncio.gather(*tasks)
    cpu = time.process_time() - cpu
    # The CPU time: the wall also holds the load, and whoever else is on the machine.
    return Cost(cpu / callers, (time.perf_counter() - wall) / callers)
