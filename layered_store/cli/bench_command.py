"""``layered-store bench``: how fast a stack answers."""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
from contextlib import nullcontext, suppress
from typing import Any, Final

import click
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from layered_store.cli.common import (
    NumberRange,
    json_option,
    moving,
    notices,
    progress,
    run,
    show_whole,
)
from layered_store.cli.workload import Mix, Workload
from layered_store.clock import SYSTEM_CLOCK
from layered_store.errors import ErasureIncompleteError
from layered_store.interface import StateStore

__all__ = ["command"]

_BATCH: Final = 500
_REFRESH_SECONDS: Final = 0.25


@click.command("bench")
@click.argument("stack", required=False)
@click.option("--seconds", type=NumberRange(0.1), default=10.0, help="How long to measure.")
@click.option(
    "--users",
    type=click.IntRange(1, 10_000_000),
    default=1_000,
    help="How many made-up users.",
)
@click.option(
    "--callers",
    type=click.IntRange(1, 10_000),
    default=32,
    help="Calls at the same time.",
)
@click.option(
    "--writes",
    type=NumberRange(0, 1),
    default=0.1,
    help="Share of calls that store a state.",
)
@click.option(
    "--histories",
    type=NumberRange(0, 1),
    default=0.0,
    help="Share of calls that read the last 10 states.",
)
@click.option(
    "--erasures",
    type=NumberRange(0, 1),
    default=0.0,
    help="Share of calls that erase a user.",
)
@click.option(
    "--zipf",
    type=NumberRange(0),
    default=0.99,
    help="How uneven: the n-th user gets 1/n**ZIPF times the calls of the first; 0 is even.",
)
@click.option(
    "--axes",
    type=click.IntRange(0, 1000),
    default=23,
    help="How many numbers a state has.",
)
@click.option("--seed", type=int, default=0, help="Seed of the random choices.")
@click.option("--keep", is_flag=True, help="Leave the made-up users in the store.")
@json_option
def command(
    stack: str | None,
    seconds: float,
    users: int,
    callers: int,
    writes: float,
    histories: float,
    erasures: float,
    zipf: float,
    axes: int,
    seed: int,
    *,
    keep: bool,
    as_json: bool,
) -> None:
    """Measure calls of made-up users through STACK: throughput, percentiles, hit ratios.

    The users (bench-RUN-0, bench-RUN-1, ... with a random RUN) are stored first, and erased in the
    end. What is not a write, a history or an erasure reads a user's latest state. Without STACK:
    the SQLite file layered_store.db in this directory, cached.

    \b
    layered-store bench stack.toml
    layered-store bench stack.toml --users 100000 --writes 0.05 --zipf 1.1
    layered-store bench redis://127.0.0.1:6379/0 --callers 256 --json
    """
    if writes + histories + erasures > 1:
        raise click.UsageError("--writes, --histories and --erasures add up to more than 1")
    mix = Mix(writes=writes, histories=histories, erasures=erasures)
    name = f"bench-{secrets.token_hex(4)}-"
    workload = Workload(name, users, mix, zipf=zipf, axes=axes, seed=seed)
    bench = _Bench(workload, seconds, callers, keep=keep)

    async def work(store: StateStore) -> None:
        task = asyncio.current_task()
        assert task is not None
        # Whoever ends it, as timeout(1) does, wants its users gone as well.
        with suppress(NotImplementedError):  # on Windows
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        await bench.run(store)

    try:
        run(stack, work, made=True)
    finally:
        # Also when it was interrupted: what was measured until then.
        if workload.calls:
            result = workload.result()
            if as_json:
                click.echo(json.dumps(result))
            else:
                show_whole(_view(result, bench.setting))
    if bench.owed:
        notices.print(
            f"{bench.owed} users are erased in the system of record only, because a tier could"
            " not be reached; it is cleaned before it answers for them again"
        )
    if keep:
        notices.print(f"the users {name}0 to {name}{users - 1} are left in the store")


class _Bench:
    """One measurement: fill, measure, clean up."""

    def __init__(self, workload: Workload, seconds: float, callers: int, *, keep: bool) -> None:
        self._workload = workload
        self._seconds = seconds
        self._callers = callers
        self._keep = keep
        self.owed = 0
        mix = workload.mix
        parts = [f"{mix.writes:.0%} writes"]
        parts += [f"{mix.histories:.0%} histories"] if mix.histories else []
        parts += [f"{mix.erasures:.0%} erasures"] if mix.erasures else []
        self.setting = (
            f"{callers} callers, {workload.users:,} users, zipf {workload.zipf:g},"
            f" {', '.join(parts)}"
        )

    async def run(self, store: StateStore) -> None:
        workload = self._workload
        try:
            await self._all(
                "storing users",
                lambda batch: store.upsert_latest_many(
                    [workload.snapshot(store, user) for user in batch]
                ),
            )
            await self._measure(store)
        finally:
            if not self._keep:
                await self._all("erasing users", lambda batch: self._erase(store, batch))

    async def _erase(self, store: StateStore, batch: list[str]) -> None:
        """Erase users; those of whom a tier still has to hear are counted."""
        for result in await asyncio.gather(*map(store.delete, batch), return_exceptions=True):
            if isinstance(result, ErasureIncompleteError):
                self.owed += 1
            elif isinstance(result, BaseException):
                raise result

    async def _all(self, title: str, work: Any) -> None:
        """Do something for all users, in batches."""
        total = self._workload.users
        with progress("users") as bar:
            task = bar.add_task(title, total=total)
            for first in range(0, total, _BATCH):
                batch = [self._workload.user(n) for n in range(first, min(total, first + _BATCH))]
                await work(batch)
                bar.update(task, advance=len(batch))

    async def _measure(self, store: StateStore) -> None:
        workload = self._workload
        now = SYSTEM_CLOCK.monotonic
        end = workload.begin(store, now) + self._seconds
        shown = moving()
        live = Live(console=notices, auto_refresh=False, transient=True)
        with live if shown else nullcontext():
            callers = [
                asyncio.create_task(workload.call_until(store, end)) for _ in range(self._callers)
            ]
            try:
                while not all(caller.done() for caller in callers):
                    await asyncio.wait(callers, timeout=_REFRESH_SECONDS)
                    workload.note_time(store)
                    if shown:
                        left = max(0.0, end - now())
                        live.update(
                            _view(workload.result(), f"{self.setting}, {left:.0f} s left"),
                            refresh=True,
                        )
                await asyncio.gather(*callers)
            finally:
                for caller in callers:
                    caller.cancel()
                workload.note_time(store)


def _view(result: dict[str, Any], setting: str) -> Group:
    calls = Table(
        title=setting,
        title_justify="left",
        title_style="bold",
        # All figures of a long run fit in 80 columns, and are folded in less: a cut one misleads.
        pad_edge=False,
        collapse_padding=True,
    )
    calls.add_column("operation", no_wrap=True, min_width=len("upsert_latest"))
    for heading in ("calls", "per second", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms", "max ms"):
        calls.add_column(heading, justify="right", overflow="fold")
    for operation, figures in result["operations"].items():
        times = [figures[f"p{p}_ms"] for p in ("50", "90", "99", "99.9")] + [figures["max_ms"]]
        calls.add_row(
            operation,
            f"{figures['calls']:,}",
            f"{figures['per_second']:,.0f}",
            *(_milliseconds(value) for value in times),
        )
    total = sum(figures["calls"] for figures in result["operations"].values())
    seconds = result["seconds"] or 1e-9
    lines = [Text(f"{total:,} calls in {result['seconds']:.1f} s: {total / seconds:,.0f} a second")]
    if result["errors"]:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in result["error_kinds"].items())
        lines.append(Text(f"{result['errors']:,} errors: {kinds}", style="red"))
    if result["hit_ratio"]:
        tiers = ", ".join(f"{name} {ratio:.1%}" for name, ratio in result["hit_ratio"].items())
        lines.append(Text(f"hit ratio: {tiers}"))
    return Group(calls, *lines)


def _milliseconds(value: float) -> str:
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 1 else f"{value:,.2f}"
