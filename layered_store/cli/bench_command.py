"""``layered-store bench``: how fast a stack answers."""

from __future__ import annotations

import asyncio
import json
import random
from bisect import bisect_left
from collections import defaultdict
from itertools import accumulate
from typing import Any

import click
from rich.live import Live
from rich.table import Table

from layered_store.cli.common import console, json_option, notices, run
from layered_store.clock import SYSTEM_CLOCK
from layered_store.errors import StoreError
from layered_store.interface import StateStore
from layered_store.snapshot import StateSnapshot
from layered_store.stack import walk

__all__ = ["command"]

_PERCENTILES = (50.0, 90.0, 99.0, 99.9)
_KEPT = 200_000


@click.command("bench")
@click.argument("stack", required=False)
@click.option("--seconds", type=click.FloatRange(0.1), default=10.0, show_default=True)
@click.option("--users", type=click.IntRange(1, 10_000_000), default=1_000, show_default=True)
@click.option("--callers", type=click.IntRange(1, 10_000), default=32, show_default=True)
@click.option(
    "--writes", type=click.FloatRange(0, 1), default=0.1, show_default=True, help="Share."
)
@click.option(
    "--zipf", type=click.FloatRange(0), default=0.99, show_default=True, help="Skew; 0: none."
)
@click.option("--axes", type=click.IntRange(0, 1000), default=23, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--keep", is_flag=True, help="Leave the bench users (bench-N) in the store.")
@json_option
def command(stack: str | None, *, as_json: bool, **options: Any) -> None:
    """Measure reads and writes of made-up users (bench-0, bench-1, ...) through STACK.

    The users are erased in the end.
    """
    bench = _Bench(**options)
    run(stack, bench.run)
    result = bench.result()
    if as_json:
        click.echo(json.dumps(result))
    else:
        console.print(_table(result))


class _Bench:
    """One measurement."""

    def __init__(
        self,
        *,
        seconds: float,
        users: int,
        callers: int,
        writes: float,
        zipf: float,
        axes: int,
        seed: int,
        keep: bool,
    ) -> None:
        self._seconds, self._users, self._callers = seconds, users, callers
        self._writes, self._keep = writes, keep
        self._random = random.Random(seed)
        self._axes = {f"axis_{i}": self._random.random() for i in range(axes)}
        self._weights = list(accumulate((rank + 1) ** -zipf for rank in range(users)))
        self._times: dict[str, list[float]] = defaultdict(list)
        self._calls: dict[str, int] = defaultdict(int)
        self._errors = 0
        self._elapsed = 0.0
        self._tiers: dict[str, dict[str, float]] = {}

    async def run(self, store: StateStore) -> None:
        await self._each(store, lambda user: store.upsert_latest(self._snapshot(user)))
        before = _reads(store)
        now = SYSTEM_CLOCK.monotonic
        start = now()
        with Live(console=notices, refresh_per_second=4, transient=True) as live:
            callers = [
                asyncio.create_task(self._caller(store, start + self._seconds))
                for _ in range(self._callers)
            ]
            while not all(caller.done() for caller in callers):
                await asyncio.wait(callers, timeout=0.25)
                self._elapsed = now() - start
                if notices.is_terminal:
                    live.update(_table(self.result()))
            await asyncio.gather(*callers)
        self._elapsed = now() - start
        for name, after in _reads(store).items():
            then = before.get(name, {})
            self._tiers[name] = {key: value - then.get(key, 0) for key, value in after.items()}
        if not self._keep:
            await self._each(store, store.delete)

    async def _each(self, store: StateStore, work: Any) -> None:
        users = iter(range(self._users))

        async def worker() -> None:
            for user in users:
                await work(f"bench-{user}")

        await asyncio.gather(*(worker() for _ in range(self._callers)))

    async def _caller(self, store: StateStore, end: float) -> None:
        now = SYSTEM_CLOCK.monotonic
        began = now()
        turns = 0
        while began < end:
            user = f"bench-{bisect_left(self._weights, self._random.random() * self._weights[-1])}"
            write = self._random.random() < self._writes
            operation = "upsert_latest" if write else "get_latest"
            snapshot = self._snapshot(user) if write else None
            began = now()
            try:
                if snapshot is not None:
                    await store.upsert_latest(snapshot)
                else:
                    await store.get_latest(user)
            except StoreError:
                self._errors += 1
            self._note(operation, now() - began)
            turns += 1
            if turns % 64 == 0:
                await asyncio.sleep(0)  # hits never wait, and the other callers want their turn

    def _note(self, operation: str, seconds: float) -> None:
        self._calls[operation] += 1
        times = self._times[operation]
        if len(times) < _KEPT:
            times.append(seconds)
        elif (place := self._random.randrange(self._calls[operation])) < _KEPT:
            times[place] = seconds  # reservoir sampling: every call is as likely to be kept

    def _snapshot(self, user: str) -> StateSnapshot:
        return StateSnapshot(user, axes=self._axes)

    def result(self) -> dict[str, Any]:
        """Return the figures so far."""
        elapsed = self._elapsed or 1e-9
        operations = {}
        for operation, calls in self._calls.items():
            times = sorted(self._times[operation])
            figures = {f"p{p:g}_ms": _at(times, p) for p in _PERCENTILES}
            operations[operation] = {
                "calls": calls,
                "per_second": round(calls / elapsed, 1),
                **figures,
                "max_ms": _at(times, 100.0),
            }
        ratios = {}
        for name, counts in self._tiers.items():
            total = sum(counts.values())
            if total:
                ratios[name] = round(counts.get("hit", 0) / total, 4)
        return {
            "seconds": round(elapsed, 3),
            "errors": self._errors,
            "operations": operations,
            "hit_ratio": ratios,
        }


def _at(times: list[float], percent: float) -> float:
    return round(times[min(len(times) - 1, int(len(times) * percent / 100))] * 1000, 4)


def _reads(store: StateStore) -> dict[str, dict[str, float]]:
    """Return what each tier counted of its reads, by its label."""
    found: dict[str, dict[str, float]] = {}
    for place in walk(store):
        for sample in place.store.samples():
            if sample.metric == "reads":
                tier = found.setdefault(place.label, defaultdict(float))
                tier[sample.labels[-1]] += sample.value
    return found


def _table(result: dict[str, Any]) -> Table:
    ratios = ", ".join(f"{name} {ratio:.1%}" for name, ratio in result["hit_ratio"].items())
    caption = f"{result['seconds']} s, {result['errors']} errors" + (
        f", hits: {ratios}" if ratios else ""
    )
    table = Table(
        "operation", "calls", "per s", "p50 ms", "p90", "p99", "p99.9", "max", caption=caption
    )
    for operation, figures in result["operations"].items():
        table.add_row(operation, *(f"{value:,}" for value in figures.values()))
    return table
