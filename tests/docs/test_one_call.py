"""docs/one-call.md names places in the code that exist."""

from __future__ import annotations

import importlib
import re

import pytest
from blocks import ROOT

PAGE = (ROOT / "docs" / "one-call.md").read_text()
PLACES = sorted(set(re.findall(r"`([\w/]+\.py)`:\s+`([\w.]+)`", PAGE)))


def test_the_page_names_places() -> None:
    """The pattern of this test finds them."""
    assert len(PLACES) > 25


@pytest.mark.parametrize(("file", "name"), PLACES)
def test_the_place_exists(file: str, name: str) -> None:
    """The file is there and has the name."""
    module = "layered_store." + file.removesuffix(".py").replace("/", ".")
    value = importlib.import_module(module)
    for part in name.split("."):
        value = getattr(value, part)
    first = name.split(".")[0]
    assert f"class {first}" in (path := ROOT / "layered_store" / file).read_text() or (
        f"def {first}" in path.read_text()
    )
