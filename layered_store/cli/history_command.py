"""``layered-store history``: a user's states, newest first."""

from __future__ import annotations

from datetime import UTC, datetime

import click
from rich.table import Table

from layered_store.cli.common import json_option, run, show_whole
from layered_store.snapshot import StateSnapshot

__all__ = ["command"]


@click.command("history")
@click.argument("stack")
@click.argument("user")
@click.option("--limit", type=click.IntRange(0), default=20, show_default=True, help="How many.")
@json_option
def command(stack: str, user: str, limit: int, *, as_json: bool) -> None:
    """Print the states of USER, newest first."""
    snapshots = run(stack, lambda store: store.get_history(user, limit))
    if as_json:
        click.echo(f"[{','.join(snapshot.to_json().decode() for snapshot in snapshots)}]")
        return
    table = Table()
    for heading in ("observed", "source", "confidence"):
        table.add_column(heading, no_wrap=True)  # the axes give way, going on below
    table.add_column("axes", overflow="fold")
    for snapshot in snapshots:
        axes = ", ".join(f"{name}={value:g}" for name, value in snapshot.axes.items())
        table.add_row(_moment(snapshot), str(snapshot.source), f"{snapshot.confidence:g}", axes)
    show_whole(table)


def _moment(snapshot: StateSnapshot) -> str:
    try:
        moment = datetime.fromtimestamp(snapshot.updated_at_unix_ms / 1000, UTC)
    except (ValueError, OverflowError, OSError):
        return f"{snapshot.updated_at_unix_ms} ms"
    return moment.isoformat(timespec="milliseconds")
