"""The pytest plugin, as a user's project asks for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = """
import pytest

pytest_plugins = ["layered_store.testing.plugin"]

from layered_store import Cached, StateSnapshot, UnavailableError
from layered_store.testing import record

import asyncio


def test_outage(fake_clock, memory_store, faults, recorded):
    async def body():
        below = faults(recorded(memory_store))
        stack = Cached(below, ttl=60, clock=fake_clock)
        await stack.upsert_latest(StateSnapshot("u-1"))
        with below.outage():
            assert (await stack.get_latest("u-1")).user_id == "u-1"
            await fake_clock.advance(61)
            with pytest.raises(UnavailableError):
                await stack.get_latest("u-1")
        assert below.inner.operations == ["upsert_latest"]
        assert below.seed == 7
        async with record(stack) as path:
            await stack.get_latest("u-1")
        assert path == ["cached miss, memory hit"]

    asyncio.run(body())


def test_fixtures_are_fresh(memory_store, fake_clock, store_seed):
    async def body():
        assert await memory_store.get_latest("u-1") is None

    asyncio.run(body())
    assert memory_store.clock is fake_clock
    assert store_seed == 7
"""

LAZY = """
import sys
import layered_store.testing.plugin
assert "layered_store.testing.faults" not in sys.modules
assert "layered_store.stores.memory" not in sys.modules
"""


def test_fixtures(tmp_path: Path) -> None:
    """The fixtures work without any other plugin, and the seed is taken from the command line."""
    (tmp_path / "test_app.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--store-seed=7"]
    # The option is known only when the plugin is loaded early; a conftest is the usual place.
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["layered_store.testing.plugin"]\n')
    done = subprocess.run(  # noqa: S603
        [*command, "-p", "no:asyncio", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_plugin_is_lazy() -> None:
    """Loading the plugin loads neither stores nor layers."""
    subprocess.run([sys.executable, "-c", LAZY], check=True)  # noqa: S603
