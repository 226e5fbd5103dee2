"""``layered-store erase``: remove everything about a user."""

from __future__ import annotations

import sys

import click

from layered_store.cli.common import fail, notices, run

__all__ = ["command"]


@click.command("erase")
@click.argument("stack")
@click.argument("user")
@click.option("--yes", is_flag=True, help="Do not ask; a pipe or script is never asked.")
def command(stack: str, user: str, *, yes: bool) -> None:
    """Remove everything about USER from every tier, history included.

    Exit 1 when a tier could not be reached: what is left there is erased before it answers again,
    and the command may be repeated. An absent user is fine.

    \b
    layered-store erase stack.toml u-1 --yes
    """
    if not yes and sys.stdin.isatty():
        try:
            sure = click.confirm("Erase this user, history included?")
        except click.Abort:  # Ctrl-C, or the end of the input
            fail("interrupted", code=130)
        if not sure:
            raise click.Abort
    run(stack, lambda store: store.delete(user))
    notices.print("erased")
