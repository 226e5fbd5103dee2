"""``layered-store history``: a user's states, newest first."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

import click
from rich.table import Table

from layered_store.cli.common import console, json_option, notices, run, show_whole
from layered_store.snapshot import StateSnapshot

__all__ = ["command"]

_WIDE: Final = 76
"""Columns of a terminal that has room for a moment, a source and a confidence, and for axes."""


@click.command("history")
@click.argument("stack")
@click.argument("user")
@click.option("--limit", type=click.IntRange(0), default=20, help="How many states.")
@json_option
def command(stack: str, user: str, limit: int, *, as_json: bool) -> None:
    """Print the states of USER, newest first."""
    snapshots = run(stack, lambda store: store.get_history(user, limit))
    if as_json:
        click.echo(f"[{','.join(snapshot.to_json().decode() for snapshot in snapshots)}]")
        return
    if not snapshots:
        notices.print("there is no state of this user")
        return
    table = Table()
    # Of what goes on below, the axes come first; in a narrow terminal there would be none left.
    whole = not console.is_terminal or console.width >= _WIDE
    for heading in ("observed", "source", "confidence"):
        table.add_column(heading, no_wrap=whole, overflow="fold")
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
