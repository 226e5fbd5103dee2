"""The linter's page: what it calls wrong is found, what it calls right is not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from blocks import ROOT, blocks

from layered_store.config import lint
from layered_store.config.lint import RULES
from layered_store.interface import StateStore

PAGE = ROOT / "docs" / "lint.md"
HEADING = re.compile(r"^## (LS\d{3}) .* \((error|warning|note)\)$", re.MULTILINE)


@pytest.fixture(scope="module")
def sections() -> dict[str, dict[str, Any]]:
    """What each rule's example defines, run in the page's order."""
    headings = [
        (number, match[1])
        for number, line in enumerate(PAGE.read_text().splitlines(), 1)
        if (match := HEADING.match(line))
    ]
    names: dict[str, Any] = {}
    found: dict[str, dict[str, Any]] = {}
    for block in blocks(PAGE):
        if block.language != "python":
            continue
        names.pop("max_staleness", None)
        exec(compile(block.code, PAGE.name, "exec"), names)  # noqa: S102
        rule = next((rule for line, rule in reversed(headings) if line < block.line), None)
        if rule is not None:
            found[rule] = dict(names)
    return found


def test_every_rule_has_a_section() -> None:
    """Each rule is on the page once, in order, under its severity."""
    found = HEADING.findall(PAGE.read_text())
    assert found == [(rule, RULES[rule].severity.value) for rule in sorted(RULES)]


def test_every_rule_has_a_test_that_shows_the_harm() -> None:
    """No rule warns of something that nobody saw."""
    tests = "".join(path.read_text() for path in Path(ROOT, "tests").rglob("test_lint_harm*.py"))
    assert [rule for rule in RULES if f"def test_{rule.lower()}_" not in tests] == []


def _found(stacks: Any, names: dict[str, Any]) -> set[str]:
    first, *others = (stacks,) if isinstance(stacks, StateStore) else stacks
    findings = lint(first, *others, max_staleness=names.get("max_staleness"))
    return {finding.rule for finding in findings}


@pytest.mark.parametrize("rule", sorted(RULES))
def test_wrong_is_found_and_right_is_not(rule: str, sections: dict[str, dict[str, Any]]) -> None:
    """The rule speaks of the wrong stack, and of the right one neither it nor a worse one does."""
    names = sections[rule]
    assert rule in _found(names["wrong"], names)
    right = _found(names["right"], names)
    assert rule not in right
    assert not {each for each in right if RULES[each].severity.value == "error"}
