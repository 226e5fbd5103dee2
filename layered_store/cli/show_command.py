"""``layered-store show``: what a stack is made of."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from layered_store.cli.common import build, guarded, json_option
from layered_store.stack import Block, describe

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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
    for line in _drawn(blocks):
        click.echo(line)


def _drawn(blocks: Sequence[Block]) -> Iterator[str]:
    """Yield the lines of the tree; whole, since a remark that is cut off may mislead."""
    open_branches: list[bool] = []
    for index, block in enumerate(blocks):
        later = (after.depth for after in blocks[index + 1 :])
        more = next((depth for depth in later if depth <= block.depth), -1) == block.depth
        open_branches[block.depth :] = [more]
        guides = "".join("│   " if branch else "    " for branch in open_branches[1:-1])
        branch = ("├── " if more else "└── ") if block.depth else ""
        yield f"{guides}{branch}{str(block).strip()}"


def _plain(value: object) -> str:
    return value.__name__ if isinstance(value, type) else f"<{type(value).__name__}>"
