"""All stacks in README, docs and examples are ones that the linter has nothing against.

TOML blocks are loaded; from Python code, every outermost call of a block's class is built, with
stand-ins for the names that only the page's reader has.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blocks import ROOT, blocks, pages

import layered_store
from layered_store.config import Severity, lint
from layered_store.config.loader import load_unchecked
from layered_store.interface import StateStore
from layered_store.testing import faults
from layered_store.testing.clock import FakeClock

ON_PURPOSE = {"docs/lint.md"}
"""Pages that are about what is wrong; tested by ``test_lint_page.py``."""

MEANT = {"LS022", "LS028"}
"""Rules about blocks for tests, which pages use to be short and to run anywhere."""

NAMES: dict[str, Any] = {
    name: getattr(layered_store, name) for name in layered_store.__all__ if name[0].isalpha()
} | {
    "Faults": faults.Faults,
    "clock": FakeClock(),
    "url": "redis://127.0.0.1:6379/0",
    "REDIS": "redis://127.0.0.1:6379/0",
    "redis_url": "redis://127.0.0.1:6379/0",
    "database_url": "sqlite+aiosqlite:///states.db",
    "DATABASE": "sqlite+aiosqlite:///states.db",
    "redis": layered_store.RedisStore("redis://127.0.0.1:6379/0"),
    "sql": layered_store.SQLStore("sqlite+aiosqlite:///states.db"),
}
BLOCKS = {
    name
    for name, value in NAMES.items()
    if isinstance(value, type) and issubclass(value, StateStore)
}


def tables() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every whole stack in TOML, on pages and in files."""
    for page in pages():
        for block in blocks(page):
            if block.language == "toml" and block.comment != "not run":
                table = tomllib.loads(block.code)
                if "store" in table:
                    yield f"{name_of(page)}:{block.line}", table
    for folder in ("examples", "docs", "grafana"):
        for path in (ROOT / folder).rglob("*.toml"):
            if path.name == "ruff.toml":
                continue
            yield name_of(path), tomllib.loads(path.read_text())


def code() -> Iterator[tuple[str, str]]:
    """All Python code of pages and examples."""
    for page in pages():
        if name_of(page) not in ON_PURPOSE:
            for block in blocks(page):
                if block.language == "python" and block.comment != "not run":
                    yield f"{name_of(page)}:{block.line}", block.code
    for path in (ROOT / "examples").rglob("*.py"):
        yield name_of(path), path.read_text()


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


class Stacks(ast.NodeVisitor):
    """The outermost calls of block classes that are not handed to ``lint`` itself."""

    def __init__(self) -> None:
        self.found: list[ast.Call] = []
        self.known: dict[str, ast.expr] = {}

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            if isinstance(target, ast.Name):
                self.known[target.id] = node.value
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = getattr(node.func, "id", None)
        if name in BLOCKS:
            self.found.append(node)
        elif name != "lint":
            self.generic_visit(node)


def stacks(text: str) -> Iterator[tuple[int, StateStore]]:
    """What the code builds, as far as it can be built here."""
    visitor = Stacks()
    visitor.visit(ast.parse(text))
    for node in visitor.found:
        names = dict(NAMES)
        for name, value in visitor.known.items():
            try:
                names[name] = eval(compile(ast.Expression(value), "page", "eval"), names)  # noqa: S307
            except Exception:  # noqa: BLE001, S112  needs what only the page's reader has
                continue
        try:
            built = eval(compile(ast.Expression(node), "page", "eval"), names)  # noqa: S307
        except Exception:  # noqa: BLE001, S112
            continue
        # A part of a stack that is put together in steps is judged where it is whole.
        yield node.lineno, built


def objections(stack: StateStore, allowed: Any = ()) -> list[str]:
    return [
        str(finding)
        for finding in lint(stack)
        if finding.severity is not Severity.NOTE and finding.rule not in {*MEANT, *allowed}
    ]


@pytest.mark.parametrize(
    ("place", "table"), list(tables()), ids=lambda v: v if type(v) is str else ""
)
def test_config_files(place: str, table: dict[str, Any]) -> None:
    """A stack in TOML has no error and no warning that it does not allow with a reason."""
    names = re.findall(r"\$\{(\w+)\}", str(table))
    environ = {name: NAMES["url" if "REDIS" in name else "database_url"] for name in names}
    stack, policy = load_unchecked(table, environ=environ)
    assert objections(stack, policy.allow) == [], place


def test_code() -> None:
    """A stack in Python has neither; most of those on the pages can be built here."""
    built = wanted = 0
    wrong = {}
    for place, text in code():
        try:
            visitor = Stacks()
            visitor.visit(ast.parse(text))
        except SyntaxError:
            continue  # the part of a program
        wanted += len(visitor.found)
        for line, stack in stacks(text):
            built += 1
            page = (ROOT / place.partition(":")[0]).read_text()
            # A page that says itself what its stack is not good for names the rule.
            found = [each for each in objections(stack) if each.split()[0] not in page]
            if found:
                wrong[f"{place}+{line}"] = found
    assert wrong == {}
    assert wanted >= 50
    assert built > 0.7 * wanted, (built, wanted)
