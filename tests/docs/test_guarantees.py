"""The table of failure cases names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs/guarantees.md").read_text())


def test_the_table_is_read() -> None:
    """A table that is not found would pass every other test."""
    assert len(NAMED) > 25


@pytest.mark.parametrize(("path", "name"), NAMED, ids=lambda value: str(value))
def test_a_named_test_exists(path: str, name: str) -> None:
    """Each failure case that applies has a test, under the name that the table gives."""
    assert re.search(rf"^(async )?def {name}\(", (ROOT / path).read_text(), re.MULTILINE)
