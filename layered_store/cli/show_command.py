"""``layered-store show``: what a stack is made of."""

from __future__ import annotations

import json
from dataclasses import asdict

import click
from rich.tree import Tree

from layered_store.cli.common import build, console, guarded, json_option
from layered_store.stack import Block, describe

__all__ = ["command"]


@click.command("show")
@click.argument("stack", required=False)
@json_option
def command(stack: str | None, *, as_json: bool) -> None:
    """Print the blocks of STACK, outermost first; opens no connection."""
    blocks = guarded(lambda: describe(build(stack, quiet=True)))
    if as_json:
        click.echo(json.dumps([asdict(block) for block in blocks], default=_plain, indent=2))
        return
    trees: list[Tree] = []
    for block in blocks:
        label = _label(block)
        node = trees[block.depth - 1].add(label) if block.depth else Tree(label)
        trees[block.depth :] = [node]
    console.print(trees[0])


def _label(block: Block) -> str:
    from rich.markup import escape

    return escape(str(block).strip())


def _plain(value: object) -> str:
    return value.__name__ if isinstance(value, type) else f"<{type(value).__name__}>"
