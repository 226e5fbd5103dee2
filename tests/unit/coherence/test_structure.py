"""The packages of the coherence protocol are read from their first module to their last."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

PACKAGES = ("layered_store.coherence.guarded", "layered_store.coherence.redis_tier")


def order_of(package: str) -> list[str]:
    """Return the modules of a package in the order in which its docstring names them."""
    text = importlib.import_module(package).__doc__ or ""
    lines = re.findall(r"^\* (.*?):", text, re.MULTILINE)
    return [name for line in lines for name in re.findall(r"``(\w+)``", line)]


def known_to(package: str, module: str) -> set[str]:
    """Return the modules of the package that one of them imports, for types alone included."""
    path = importlib.import_module(f"{package}.{module}").__file__
    assert path is not None
    found = set()
    for node in ast.walk(ast.parse(Path(path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            if node.module == package:
                found |= {alias.name for alias in node.names}
            elif node.module.startswith(f"{package}."):
                found.add(node.module.removeprefix(f"{package}."))
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_is_named(package: str) -> None:
    """So that a reader finds what each is for, and none that is gone."""
    path = importlib.import_module(package).__file__
    assert path is not None
    modules = {each.stem for each in Path(path).parent.glob("*.py")} - {"__init__"}
    assert set(order_of(package)) == modules


@pytest.mark.parametrize("package", PACKAGES)
def test_each_module_knows_earlier_ones_only(package: str) -> None:
    """Dependencies go one way; who reads on meets nothing that is not explained yet."""
    order = order_of(package)
    for at, module in enumerate(order):
        assert known_to(package, module) <= set(order[:at]), module
