"""A whole stack on an SQLite file: compose it, write, read, look at it.

Run it with ``python examples/quickstart.py``; it needs no server and leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

from prometheus_client import CollectorRegistry

from layered_store import (
    Cached,
    HealthReport,
    Metrics,
    Retry,
    SQLStore,
    StateSnapshot,
    describe,
)

USERS = {
    "ada": {"warmth": 0.7, "cognitive_load": 0.2},
    "grace": {"warmth": 0.4, "formality": 0.9},
    "linus": {"verbosity_preference": 0.1},
}


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


def print_health(report: HealthReport, depth: int = 0) -> None:
    mark = {"healthy": "+", "degraded": "~", "unhealthy": "!"}[report.status.value]
    reason = f": {report.message}" if report.message else ""
    print(f"{'  ' * depth}{mark} {report.name}  {report.status.value}{reason}")
    for child in report.children:
        print_health(child, depth + 1)


def compose(folder: Path, registry: CollectorRegistry) -> Metrics:
    """Return a stack: an in-process cache over a database that is tried up to three times."""
    return Metrics(
        Cached(Retry(SQLStore(f"sqlite+aiosqlite:///{folder}/states.db")), ttl=60),
        name="user_state",
        registry=registry,
    )


async def read(stack: Metrics, user_id: str, registry: CollectorRegistry) -> None:
    """Read a user and tell which tier answered, by the counter of cache hits."""
    labels = {"stack": "user_state", "layer": "1.cached", "result": "hit"}

    def hits() -> float:
        return registry.get_sample_value("layered_store_reads_total", labels) or 0

    before, begun = hits(), time.perf_counter()
    state = await stack.get_latest(user_id)
    took = (time.perf_counter() - begun) * 1000
    tier = "in-process cache" if hits() > before else "database"
    axes = dict(state.axes) if state else "no such user"
    print(f"{user_id:<7} {axes!s:<38} {tier:<17} {took:7.3f} ms")


async def main(folder: Path) -> None:
    registry = CollectorRegistry()
    stack = compose(folder, registry)
    heading("The stack, outermost first")
    print(describe(stack))

    heading("Three users are written, one of them twice more")
    async with stack:
        for user_id, axes in USERS.items():
            await stack.upsert_latest(StateSnapshot(user_id=user_id, axes=axes))
        for warmth in (0.8, 0.9):
            await stack.upsert_latest(StateSnapshot(user_id="ada", axes={"warmth": warmth}))
        history = await stack.get_history("ada", 10)
        print("ada, newest first:", [dict(state.axes) for state in history])

    heading("Closed and opened again: the cache is empty, the database is not")
    stack = compose(folder, registry)
    async with stack:
        for user_id in ("ada", "ada", "grace", "grace", "nobody"):
            await read(stack, user_id, registry)

        heading("Erased: gone from every tier, history included")
        await stack.delete("ada")
        await read(stack, "ada", registry)
        print("history of ada:", await stack.get_history("ada", 10))

        heading("Health")
        print_health(await stack.health_report())

        heading("Metrics, as Prometheus would scrape them (counters above 0)")
        for family in registry.collect():
            for sample in family.samples:
                if sample.name.endswith("_total") and sample.value:
                    labels = ", ".join(f'{key}="{text}"' for key, text in sample.labels.items())
                    print(f"{sample.name}{{{labels}}} {sample.value:.0f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(Path(folder)))
