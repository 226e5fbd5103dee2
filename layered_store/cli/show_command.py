"""``layered-store show``: what a stack is made of."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click
from rich.text import Text

from layered_store.cli.common import build, console, guarded, json_option
from layered_store.stack import Block, describe

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["command"]


@click.command("show")
@click.argument("stack", required=False)
@json_option
def command(stack: str | None, *, as_json: bool) -> None:
    """Print the blocks of STACK, outermost first, as a tree; opens no connection.

    Options that have their default value are left out, and secrets are masked. The remark after #
    shows the block's id and what a caller should know, such as how old an answer may be. Without
    STACK: the SQLite file layered_store.db in this directory, cached, with metrics.
    """
    blocks = guarded(lambda: describe(build(stack, quiet=True, made=True)))
    if as_json:
        click.echo(json.dumps([asdict(block) for block in blocks], default=_plain, indent=2))
        return
    for line in _drawn(blocks):
        # Whole, since a remark that is cut off may mislead.
        console.print(line, overflow="ignore", crop=False)


def _drawn(blocks: Sequence[Block]) -> Iterator[Text]:
    """Yield the lines of the tree."""
    open_branches: list[bool] = []
    for index, block in enumerate(blocks):
        later = (after.depth for after in blocks[index + 1 :])
        more = next((depth for depth in later if depth <= block.depth), -1) == block.depth
        open_branches[block.depth :] = [more]
        guides = "".join("│   " if branch else "    " for branch in open_branches[1:-1])
        branch = ("├── " if more else "└── ") if block.depth else ""
        text = dataclasses.replace(block, depth=0, notes=())
        role, colon, expression = str(text).partition(": ") if _has_role(block) else ("", "", text)
        name, bracket, rest = str(expression).partition("(")
        line = Text.assemble(
            (guides + branch, "dim"), role + colon, (name, "bold"), bracket + rest
        )
        notes = [*([f"id {block.id!r}"] if block.id else []), *block.notes]
        line.append("".join(f"  # {note}" for note in notes), style="dim")
        yield line


def _has_role(block: Block) -> bool:
    return block.path.rpartition(".")[2] not in ("", "inner")


def _plain(value: object) -> str:
    return value.__name__ if isinstance(value, type) else f"<{type(value).__name__}>"
