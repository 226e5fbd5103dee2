"""The first screen keeps what it promises, and no page leads nowhere."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
from blocks import ROOT, blocks, pages

import layered_store

README = ROOT / "README.md"


def test_the_first_example_is_short_and_prints_its_stack() -> None:
    """At most 15 lines, complete, and what it prints stands below (another test runs it)."""
    example, printed = blocks(README)[:2]
    assert example.language == "python"
    assert len(example.code.strip().splitlines()) <= 15
    assert printed.comment == "prints"
    assert printed.code.startswith("Metrics(")


def test_the_two_commands_are_single_lines() -> None:
    """Each is pasted whole into a shell; the main build takes them from here."""
    commands = [block.code.strip() for block in blocks(README) if block.language == "sh"]
    quick, tests = [command for command in commands if command.startswith("python3 -m venv")]
    for command in (quick, tests):
        assert "\n" not in command
    assert quick.endswith("examples/quickstart.py")
    assert tests.endswith("pytest -q")


def test_every_block_stands_in_the_table() -> None:
    """README names every store and layer that the package has, with a link to its page."""
    text = README.read_text()
    for name in layered_store.__all__:
        value = getattr(layered_store, name)
        bases = (layered_store.Layer, layered_store.AroundLayer, layered_store.StateStore)
        if not isinstance(value, type) or value in bases:
            continue
        if issubclass(value, layered_store.StateStore):
            assert re.search(rf"\[`{name}`\]\(docs/\w+/\w+\.md\)", text), name


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link of a page ends at a file of the repository."""
    for target in re.findall(
        r"\]\(([^)#\s]+)[^)]*\)", re.sub(r"(?s)```.*?```", "", page.read_text())
    ):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_named_tests_exist(page: Path) -> None:
    """Where a page names a test as the proof of something, the test is there."""
    for file, name in re.findall(r"(tests/[\w/]+\.py)::(test_\w+)", page.read_text()):
        assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"


def test_the_reference_has_every_public_name() -> None:
    """Each name that users import has an entry on a page of the API reference."""
    sys.path.insert(0, str(ROOT / "docs" / "assets"))
    try:
        reference = importlib.import_module("reference")
    finally:
        sys.path.pop(0)
    documented = {
        place
        for page in (ROOT / "docs" / "reference").glob("*.md")
        for place in reference.entries(page.read_text())
    }
    names = reference.public_names()
    assert len(names) > 60
    assert not {name: place for name, place in names.items() if place not in documented}
