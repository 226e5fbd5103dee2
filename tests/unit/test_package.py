"""The package: public names, what importing it costs, types."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import layered_store

ROOT = Path(layered_store.__file__).parent
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(layered_store.__path__, "layered_store.")
    if "__main__" not in module.name
)

# What each of these may be without, at import.
HEAVY = (
    "redis",
    "sqlalchemy",
    "aiosqlite",
    "asyncpg",
    "prometheus_client",
    "cachetools",
    "click",
    "rich",
    "starlette",
    "uvicorn",
    "opentelemetry",
    "pytest",
    "hypothesis",
)


def loaded_by(code: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter has after ``code``."""
    program = f"import sys\nsys.path.insert(0, {str(ROOT.parent)!r})\n{code}\nprint(*sys.modules)"
    done = subprocess.run(  # noqa: S603
        # A free-threaded build says that hiredis has it use the lock after all.
        [sys.executable, "-I", "-W", "error", "-W", "ignore:The global", "-c", program],
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.partition(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(
    "code",
    [
        "import layered_store",
        "from layered_store import StateStore, StateSnapshot, Layer, MemoryStore, UnavailableError",
        "from layered_store import Retry, Timeout, CircuitBreaker, Fallback, WriteThrough",
        "from layered_store import SyncStore, describe, find, replace",
        "import layered_store.testing\nfrom layered_store.testing import *",
    ],
)
def test_imports_no_driver(code: str) -> None:
    """Nobody pays for a block that is not used."""
    assert not loaded_by(code).intersection(HEAVY)


@pytest.mark.parametrize(
    ("code", "comes"),
    [
        ("from layered_store import Cached", {"cachetools"}),
        ("from layered_store import RedisStore", {"redis"}),
        ("from layered_store import SQLStore", {"sqlalchemy"}),
        ("from layered_store import load_stack, to_config, lint", set()),
    ],
)
def test_a_driver_comes_with_its_block(code: str, comes: set[str]) -> None:
    """And no other one comes along."""
    assert loaded_by(code).intersection(HEAVY) <= comes


@pytest.mark.parametrize("name", MODULES)
def test_all_matches_the_module(name: str) -> None:
    """``__all__`` lists names that are there, each once; a module with a public name has one."""
    if name.startswith(("layered_store.cli", "layered_store.service")):
        pytest.importorskip("click")
        pytest.importorskip("starlette")
    if name.endswith("tracing"):
        pytest.importorskip("opentelemetry")
    module = importlib.import_module(name)
    public = getattr(module, "__all__", None)
    if public is None:
        assert not list(own_names(module)), "public names without __all__"
        return
    assert len(set(public)) == len(public)
    for each in public:
        assert hasattr(module, each), each


def own_names(module: ModuleType) -> list[str]:
    """Public functions and classes that a module defines itself."""
    source = Path(module.__file__ or "").read_text()
    return [
        node.name
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
    ]


def test_public_names() -> None:
    """Every promised name is importable from the package, and ``dir`` shows it."""
    for name in layered_store.__all__:
        value = getattr(layered_store, name)
        home = importlib.import_module(value.__module__)
        assert name in home.__all__, f"{name} is public, and {home.__name__}.__all__ is without it"
    assert set(dir(layered_store)) >= set(layered_store.__all__)
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    assert layered_store.__version__ == project["version"]
    with pytest.raises(AttributeError, match="no attribute 'Cache'"):
        _ = layered_store.Cache  # type: ignore[attr-defined]


def test_typed() -> None:
    """Type checkers are told to look here."""
    assert (ROOT / "py.typed").exists()


def test_public_use_is_typed() -> None:
    """The programs in tests/typing, which nobody runs, pass mypy --strict."""
    folder = Path(__file__).parents[1] / "typing"
    done = subprocess.run(  # noqa: S603
        [
            *(sys.executable, "-m", "mypy", "--strict", "--no-error-summary"),
            *("--cache-dir", str(ROOT.parent / ".mypy_cache" / "typing")),
            *("--config-file", str(ROOT.parent / "pyproject.toml"), str(folder)),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
