"""``layered-store get``: a user's latest state."""

from __future__ import annotations

import click

from layered_store.cli.common import notices, run

__all__ = ["command"]


@click.command("get")
@click.argument("stack")
@click.argument("user")
def command(stack: str, user: str) -> None:
    """Print the latest state of USER as JSON; exit 1 when there is none."""
    snapshot = run(stack, lambda store: store.get_latest(user))
    if snapshot is None:
        notices.print("there is no state of this user")
        raise SystemExit(1)
    click.echo(snapshot.to_json().decode())
