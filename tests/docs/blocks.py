"""The fenced blocks of a page, and what its comments say about running them.

A comment stands alone, right above its block; readers do not see it:

* ``<!-- not run: REASON -->``: the block below cannot run here.
* ``<!-- prints -->``: the ``text`` block below is what the block before it printed; ``...`` stands
  for anything.
* ``<!-- background: PORT -->``: the shell block below runs on until the page ends; the next block
  waits for the port.
* ``<!-- setup`` and Python code up to ``-->``: runs, and readers do not see it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

_FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<info>[^`\n]*)$")
_COMMENT = re.compile(r"^<!-- (?P<name>not run|prints|background)(?:: (?P<text>.+))? -->$")
_TITLE = re.compile(r'title="([^"]+)"')


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Args:
        line: where its code begins, from 1.
        language: first word of the fence, ``""`` for none.
        title: name of the file that the block is, or None.
        code: the text inside.
        comment: ``"not run"``, ``"prints"``, ``"background"`` or None.
        text: what the comment says.
        hidden: whether readers do not see it.
    """

    line: int
    language: str
    title: str | None
    code: str
    comment: str | None = None
    text: str | None = None
    hidden: bool = False


def pages() -> list[Path]:
    """Every page whose blocks are run: README, CONTRIBUTING and all of docs/."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page in their order."""
    found: list[Block] = []
    comment: tuple[str | None, str | None] = (None, None)
    lines = iter(enumerate(page.read_text().splitlines(), 1))
    for number, line in lines:
        if line.strip() == "<!-- setup":
            code = _until(lines, lambda text: text.strip() == "-->")
            found.append(Block(number + 1, "python", None, code, hidden=True))
        elif match := _COMMENT.match(line.strip()):
            comment = (match["name"], match["text"])
        elif match := _FENCE.match(line):
            indent, ticks, info = match["indent"], match["ticks"], match["info"].strip()
            code = _until(lines, lambda text, ticks=ticks: text.strip() == ticks, len(indent))
            title = _TITLE.search(info)
            language = info.split()[0] if info else ""
            found.append(Block(number + 1, language, title[1] if title else None, code, *comment))
            comment = (None, None)
        elif line.strip() and comment[0]:
            raise ValueError(f"{page.name}:{number}: a comment with no block below it")
    return found


def _until(lines, ends, indent: int = 0) -> str:
    taken = []
    for _, line in lines:
        if ends(line):
            break
        taken.append(line[indent:] if not line[:indent].strip() else line)
    return "\n".join(taken) + "\n"
