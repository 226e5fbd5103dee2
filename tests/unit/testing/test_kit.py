"""The kit as a package: what it exports, and what importing it costs."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import layered_store.testing as kit
from layered_store import ConfigError

NAMES = {
    "FakeClock",
    "Faults",
    "Recorded",
    "Scripted",
    "check_layer",
    "check_store",
    "explore",
    "record",
}


def test_exports() -> None:
    """Every promised name is there, a callable, and stays so when its module is imported."""
    assert set(kit.__all__) >= NAMES
    for name in kit.__all__:
        assert callable(getattr(kit, name)), name
    importlib.import_module("layered_store.testing.explore")
    assert kit.explore is importlib.import_module("layered_store.testing.explore").explore
    assert set(dir(kit)) >= set(kit.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Recordd'"):
        _ = kit.Recordd  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("option", "value"),
    [("schedules", 0), ("schedules", 1.5), ("max_steps", 0), ("seed", "x"), ("replay", 1.0)],
)
def test_explore_refuses_to_run_nothing(option: str, value: object) -> None:
    """A test that would pass because no schedule was run is refused by name."""

    async def scenario() -> None:
        """Nothing is wrong with it."""

    with pytest.raises(ConfigError, match=f"explore.{option}: must be an int"):
        kit.explore(scenario, **{option: value})  # type: ignore[arg-type]


def test_no_pytest() -> None:
    """The kit works where pytest is not installed."""
    code = """
import sys, asyncio
sys.modules["pytest"] = None
from layered_store import MemoryStore, Cached
from layered_store.testing import *
assert asyncio.run(check_store(MemoryStore))
assert asyncio.run(check_layer(Cached))
for name in ("redis", "sqlalchemy", "prometheus_client"):
    assert name not in sys.modules, name
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)  # noqa: S603
