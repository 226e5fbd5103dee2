"""``layered-store erase``: remove everything about a user."""

from __future__ import annotations

import click

from layered_store.cli.common import notices, run

__all__ = ["command"]


@click.command("erase")
@click.argument("stack")
@click.argument("user")
@click.option("--yes", is_flag=True, help="Do not ask.")
def command(stack: str, user: str, *, yes: bool) -> None:
    """Remove everything about USER from every tier, history included."""
    if not yes:
        click.confirm("Erase this user, history included?", abort=True)
    run(stack, lambda store: store.delete(user))
    notices.print("erased")
