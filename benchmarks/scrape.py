"""Row 13: what a scrape costs, and a call in the client's multiprocess mode."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.figures import Figure, Result, spread
from benchmarks.setting import Setting, snapshot, user

__all__ = ["run"]

_OPERATIONS = 5
_STACKS = 10


async def run(setting: Setting) -> list[Result]:
    """Measure scrapes here, hits in processes with and without the multiprocess mode."""
    rounds = setting.some(41, 3)
    ours, standard = await _stacks(), _standard()
    from prometheus_client import generate_latest

    times: dict[str, list[float]] = {"ours": [], "standard": []}
    for _ in range(rounds):
        for name, registry in (("ours", ours), ("standard", standard)):
            begun = time.process_time()
            generate_latest(registry)
            times[name].append((time.process_time() - begun) * 1e3)
    pairs = zip(times["ours"], times["standard"], strict=True)
    figures = [
        Figure(
            13,
            "scrape of 10 stacks, to standard metric objects",
            spread([own / theirs for own, theirs in pairs]),
            at_most=1,
        )
    ]
    hits: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(setting.some(5, 2)):
        for mode, found in hits.items():
            found.append(await asyncio.to_thread(_child, mode, setting.some(40_000, 2_000)))
    pairs = zip(hits["with"], hits["without"], strict=True)
    ratio = spread([multi / single for multi, single in pairs])
    figures.append(Figure(13, "a hit in multiprocess mode, to one without", ratio, at_most=1.15))
    rows = [[f"scrape, {name}", spread(found).middle, "ms"] for name, found in times.items()]
    rows += [
        [f"hit, {mode} multiprocess mode", spread(found).middle * 1e9, "ns"]
        for mode, found in hits.items()
    ]
    return [Result("Metrics", figures, ["what", "median", "unit"], rows)]


async def _stacks() -> Any:
    from prometheus_client import CollectorRegistry

    from layered_store import Cached, MemoryStore, Metrics

    registry = CollectorRegistry()
    for number in range(_STACKS):
        stack = Metrics(Cached(MemoryStore()), name=f"stack_{number}", registry=registry)
        await stack.upsert_latest(snapshot(user(1)))
        await stack.get_latest(user(1))
        await stack.get_latest_many([user(1)])
        await stack.get_history(user(1), 5)
        await stack.delete(user(1))
        registry.keep = [*getattr(registry, "keep", ()), stack]  # type: ignore[attr-defined]
    return registry


def _standard() -> Any:
    from prometheus_client import CollectorRegistry, Counter, Histogram

    from layered_store.metrics.catalogue import DURATION_BUCKETS

    registry = CollectorRegistry()
    counter = Counter("operations", "x", ["stack", "operation", "outcome"], registry=registry)
    timing = Histogram(
        "duration", "x", ["stack", "operation"], buckets=DURATION_BUCKETS, registry=registry
    )
    reads = Counter("reads", "x", ["stack", "layer", "result"], registry=registry)
    for stack in range(_STACKS):
        for operation in range(_OPERATIONS):
            counter.labels(str(stack), str(operation), "ok").inc()
            timing.labels(str(stack), str(operation)).observe(0.001)
        for layer in ("cached", "memory"):
            for result in ("hit", "miss", "negative_hit", "stale", "error"):
                reads.labels(str(stack), layer, result).inc()
    return registry


def _child(mode: str, calls: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ}
        environment.pop("PROMETHEUS_MULTIPROC_DIR", None)
        if mode == "with":
            environment["PROMETHEUS_MULTIPROC_DIR"] = folder
        command = [sys.executable, "-m", "benchmarks.scrape", str(calls)]
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, check=True, env=environment
        )
        return float(json.loads(done.stdout))


async def _hits(calls: int) -> float:
    from layered_store import Cached, MemoryStore, Metrics

    stack = Metrics(Cached(MemoryStore()), name="multi")
    await stack.upsert_latest(snapshot(user(1)))
    best = float("inf")
    for _ in range(7):
        begun = time.process_time()
        for _ in range(calls):
            await stack.get_latest("user-0000001")
        best = min(best, (time.process_time() - begun) / calls)
    return best


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_hits(int(sys.argv[1])))))
