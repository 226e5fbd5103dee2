"""The page of failure cases names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/failure_cases.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE)))
ROWS = re.findall(r"^\| (\d+) \|(.*)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_a_named_test_exists(path: str, name: str) -> None:
    """A test that is renamed or taken away is missed here."""
    tree = ast.parse((ROOT / path).read_text())
    functions = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert not name or name in functions


def test_each_case_has_a_test() -> None:
    """Every row names at least one, and no number comes twice."""
    numbers = [int(number) for number, _ in ROWS]
    assert numbers == sorted(set(numbers))
    assert set(range(1, 75)) - set(numbers) == {45, 46, 47}
    assert all("::test_" in row for _, row in ROWS)
