"""``layered-store check``: whether a stack can serve."""

from __future__ import annotations

import sys

import click
from rich.markup import escape
from rich.tree import Tree

from layered_store.cli.common import console, json_option, run
from layered_store.health import HealthReport, HealthStatus

__all__ = ["command"]

_COLOURS = {
    HealthStatus.HEALTHY: "green",
    HealthStatus.DEGRADED: "yellow",
    HealthStatus.UNHEALTHY: "red",
}


@click.command("check")
@click.argument("stack", required=False)
@json_option
def command(stack: str | None, *, as_json: bool) -> None:
    """Open STACK, probe every backend and print the health tree; exit 1 when unhealthy."""
    report = run(stack, lambda store: store.health_report())
    if as_json:
        click.echo(report.to_json())
    else:
        console.print(_tree(report))
    sys.exit(1 if report.status is HealthStatus.UNHEALTHY else 0)


def _tree(report: HealthReport, parent: Tree | None = None) -> Tree:
    colour = _COLOURS[report.status]
    message = f"  {escape(report.message)}" if report.message else ""
    label = (
        f"{escape(report.name)} [{colour}]{report.status}[/{colour}]"
        f" {report.latency_ms:.1f} ms{message}"
    )
    node = Tree(label) if parent is None else parent.add(label)
    for child in report.children:
        _tree(child, node)
    return node
