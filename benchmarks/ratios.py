"""Row 12: how many reads a full cache still answers, and what an access costs."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import OrderedDict
from itertools import accumulate
from random import Random
from typing import TYPE_CHECKING, Any

from benchmarks.figures import Figure, Result, spread
from benchmarks.setting import Setting
from layered_store.eviction import S3FIFOCache

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["run", "traces"]

_KEYS = 20_000


def traces(length: int, keys: int = _KEYS, seed: int = 3) -> dict[str, list[int]]:
    """Return the accesses: zipf(0.99); with scans over one-time users; with shifting popularity."""
    random = Random(seed)
    weights = list(accumulate(1 / (rank**0.99) for rank in range(1, keys + 1)))

    def draw() -> int:
        return bisect_left(weights, random.random() * weights[-1])

    zipf = [draw() for _ in range(length)]
    scan: list[int] = []
    fresh = 10 * keys
    while len(scan) < length:
        scan += [draw() for _ in range(700)]
        scan += range(fresh, fresh + 300)
        fresh += 300
    half = list(accumulate(1 / (rank**0.99) for rank in range(1, keys // 2 + 1)))
    shift: list[int] = []
    for era in range(5):
        order = list(range(era * keys, era * keys + keys // 2))
        random.shuffle(order)
        for _ in range(length // 5):
            shift.append(order[bisect_left(half, random.random() * half[-1])])
    return {"zipf": zipf, "scan": scan[:length], "shift": shift}


def _s3(size: int) -> Callable[[int], bool]:
    cache = S3FIFOCache(size)

    def access(key: int) -> bool:
        try:
            cache[key]
        except KeyError:
            cache[key] = key
            return False
        return True

    return access


def _lru(size: int) -> Callable[[int], bool]:
    cache: OrderedDict[int, int] = OrderedDict()

    def access(key: int) -> bool:
        if key in cache:
            cache.move_to_end(key)
            return True
        cache[key] = key
        if len(cache) > size:
            cache.popitem(last=False)
        return False

    return access


def _theine(size: int) -> Callable[[int], bool]:
    from theine import Cache

    cache: Any = Cache(size)

    def access(key: int) -> bool:
        _, found = cache.get(str(key))
        if not found:
            cache.set(str(key), key)
        return found  # type: ignore[no-any-return]

    return access


async def run(setting: Setting) -> list[Result]:
    """Play every trace to every policy."""
    return await asyncio.to_thread(_run, setting)


def _run(setting: Setting) -> list[Result]:
    length = setting.some(400_000, 40_000)
    policies: dict[str, Any] = {"Cached's S3-FIFO": _s3, "LRU": _lru}
    try:
        import theine  # noqa: F401

        policies["theine (W-TinyLFU)"] = _theine
    except ImportError:
        pass
    found: dict[tuple[str, str, int], float] = {}
    seconds: dict[str, float] = {}
    rows = []
    for name, make in policies.items():
        row: list[Any] = [name]
        for trace, accesses in traces(length).items():
            for share in (1, 10):
                access = make(_KEYS * share // 100)
                begun = time.process_time()
                hits = sum(map(access, accesses))
                took = (time.process_time() - begun) / length
                found[name, trace, share] = 100 * hits / length
                row.append(f"{100 * hits / length:.1f} %")
                if (trace, share) == ("zipf", 10):
                    seconds[name] = took
        row.append(seconds[name] * 1e9)
        rows.append(row)
    own = "Cached's S3-FIFO"
    figures = []
    for trace in ("zipf", "scan", "shift"):
        for share in (1, 10):
            ours = found[own, trace, share]
            where = f"{trace}, {share} % capacity"
            above = spread([ours - found["LRU", trace, share]])
            figures.append(Figure(12, f"points above LRU, {where}", above, "points", None, 0))
            if "theine (W-TinyLFU)" in policies:
                behind = spread([found["theine (W-TinyLFU)", trace, share] - ours])
                figures.append(Figure(12, f"points behind theine, {where}", behind, "points", 1))
    if "theine (W-TinyLFU)" in seconds:
        times = spread([seconds["theine (W-TinyLFU)"] / seconds[own]])
        figures.append(Figure(12, "theine's time per access against it", times, at_least=3))
    columns = [
        "policy",
        *(f"{t} {s} %" for t in ("zipf", "scan", "shift") for s in (1, 10)),
        "ns per access",
    ]
    return [Result("Hit ratio: 20,000 users, zipf 0.99", figures, columns, rows)]
