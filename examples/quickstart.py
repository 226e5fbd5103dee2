"""A whole stack on an SQLite file: compose it, write, read, look at it.

Run it with ``python examples/quickstart.py``; it leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import tempfile
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


def count(registry: CollectorRegistry, result: str) -> int:
    labels = {"stack": "user_state", "layer": "1.cached", "result": result}
    return int(registry.get_sample_value("layered_store_reads_total", labels) or 0)


async def main(folder: Path) -> None:
    registry = CollectorRegistry()
    stack = Metrics(
        Cached(Retry(SQLStore(f"sqlite+aiosqlite:///{folder}/state.db")), ttl=60),
        name="user_state",
        registry=registry,
    )
    heading("The stack, outermost first")
    print(describe(stack))

    async with stack:
        heading("Three users written, then one of them twice more")
        for user_id, axes in USERS.items():
            await stack.upsert_latest(StateSnapshot(user_id=user_id, axes=axes))
        for warmth in (0.8, 0.9):
            await stack.upsert_latest(StateSnapshot(user_id="ada", axes={"warmth": warmth}))
        for older in await stack.get_history("ada", 3):
            print(f"ada, newest first: warmth {older.get_axis('warmth')}")

        heading("Reads, and which tier answered")
        for user_id in ("ada", "ada", "grace", "nobody"):
            hits = count(registry, "hit")
            state = await stack.get_latest(user_id)
            tier = "in-process cache" if count(registry, "hit") > hits else "database"
            axes = dict(state.axes) if state else "no such user"
            print(f"{user_id:<7} {axes!s:<40} {tier}")

        heading("Erased: gone from every tier")
        await stack.delete("ada")
        print(f"ada: {await stack.get_latest('ada')}, {await stack.get_history('ada', 10)}")

        heading("Health")
        print_health(await stack.health_report())

        heading("Metrics")
        for family in registry.collect():
            for sample in family.samples:
                if sample.name.endswith("_total") and sample.value:
                    labels = ", ".join(
                        value for key, value in sample.labels.items() if key != "stack"
                    )
                    print(f"{sample.name:<42} {sample.value:>5.0f}  {labels}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(Path(folder)))
