"""``layered-store get``: a user's latest state."""

from __future__ import annotations

import sys

import click

from layered_store.cli.common import console, json_option, notices, run

__all__ = ["command"]


@click.command("get")
@click.argument("stack")
@click.argument("user")
@json_option
def command(stack: str, user: str, *, as_json: bool) -> None:
    """Print the latest state of USER as JSON; exit 1 when there is none.

    One line in a pipe and with --json, else laid out for reading.

    \b
    layered-store get stack.toml u-1
    """
    snapshot = run(stack, lambda store: store.get_latest(user))
    if snapshot is None:
        notices.print("there is no state of this user")
        sys.exit(1)
    text = snapshot.to_json().decode()
    if as_json or not console.is_terminal:
        click.echo(text)
    else:
        console.print_json(text, ensure_ascii=False)
