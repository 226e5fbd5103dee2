"""``layered-store erase``: remove everything about a user."""

from __future__ import annotations

import sys

import click

from layered_store.cli.common import fail, notices, run

__all__ = ["command"]


@click.command("erase")
@click.argument("stack")
@click.argument("user")
@click.option(
    "--yes", is_flag=True, help="Do not ask first. Without a terminal, the command never asks."
)
def command(stack: str, user: str, *, yes: bool) -> None:
    """Remove everything about USER from every tier, history included.

    The exit code is 1 when a tier could not be reached. That tier is cleaned before it answers for
    USER again; repeat the command until it succeeds. It is no error when there is no such user.

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
