"""``layered-store check``: whether a stack can serve."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import Final

import click
from rich.text import Text
from rich.tree import Tree

from layered_store.cli.common import (
    NumberRange,
    build,
    console,
    fail,
    guarded,
    json_option,
    show_whole,
)
from layered_store.clock import SYSTEM_CLOCK
from layered_store.health import HealthReport, HealthStatus

__all__ = ["command"]

_LOOKS: Final = {
    HealthStatus.HEALTHY: ("✓", "green"),
    HealthStatus.DEGRADED: ("!", "yellow"),
    HealthStatus.UNHEALTHY: ("✗", "red"),
}
_MEANS: Final = {
    HealthStatus.HEALTHY: "healthy: everything works",
    HealthStatus.DEGRADED: "degraded: it serves, but a part of it does not work",
    HealthStatus.UNHEALTHY: "unhealthy: it cannot serve",
}
_CLOSING_SECONDS: Final = 3.0


@click.command("check")
@click.argument("stack", required=False)
@click.option(
    "--timeout",
    type=NumberRange(0, min_open=True),
    default=10.0,
    help="Seconds after which a stack that does not answer counts as unhealthy.",
)
@json_option
def command(stack: str | None, timeout: float, *, as_json: bool) -> None:
    """Open STACK, probe every backend and print the health tree.

    The exit code is 1 when the stack is unhealthy, that is, cannot serve. It is 0 when the stack is
    degraded, such as when Redis is down in front of a database. Without STACK: the SQLite file
    layered_store.db in this directory.

    \b
    layered-store check stack.toml
    layered-store check postgresql+asyncpg://app@127.0.0.1/app --json
    """
    report = guarded(lambda: asyncio.run(_check(stack, timeout)))
    if report is None:
        fail(f"no answer within {timeout:g} s")
    if as_json:
        click.echo(report.to_json())
    else:
        show_whole(_tree(report))
        sign, colour = _LOOKS[report.status]
        console.print(Text(f"{sign} {_MEANS[report.status]}", style=colour))
    sys.exit(1 if report.status is HealthStatus.UNHEALTHY else 0)


async def _check(stack: str | None, timeout: float) -> HealthReport | None:
    # Not opened first: what cannot be opened has a place in the tree as well.
    store = build(stack)
    report = None
    with contextlib.suppress(TimeoutError):
        async with SYSTEM_CLOCK.timeout(timeout):
            report = await store.health_report()
    with contextlib.suppress(Exception):  # it was asked for its health, not for a clean end
        async with SYSTEM_CLOCK.timeout(_CLOSING_SECONDS):
            await store.aclose()
    return report


def _tree(report: HealthReport, parent: Tree | None = None) -> Tree:
    sign, colour = _LOOKS[report.status]
    label = Text.assemble(
        (f"{sign} ", colour), (report.name, "bold"), " ", (str(report.status), colour)
    )
    if not report.children:
        label.append(f"  {report.latency_ms:.1f} ms", style="dim")
    if report.message:
        label.append(f"\n  {report.message}", style=colour)
    node = Tree(label) if parent is None else parent.add(label)
    for child in report.children:
        _tree(child, node)
    return node
