"""Fixtures for pytest, asked for by ``pytest_plugins = ["layered_store.testing.plugin"]``.

========================  =======================================================================
``fake_clock``            a :class:`FakeClock`, one for the test
``memory_store``          an empty :class:`MemoryStore` on that clock
``faults``                ``faults(inner, error=0.1)``: :class:`Faults` on that clock and seed
``recorded``              ``recorded(inner)``: :class:`Recorded`
``store_seed``            the seed of the run: ``--store-seed``, 0 unless given
========================  =======================================================================

None of them needs an async plugin. No store, layer or driver is imported before a test asks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from layered_store.interface import StateStore
    from layered_store.stores.memory import MemoryStore
    from layered_store.testing.clock import FakeClock
    from layered_store.testing.faults import Faults
    from layered_store.testing.recorded import Recorded

__all__ = [
    "fake_clock",
    "faults",
    "memory_store",
    "pytest_addoption",
    "pytest_report_header",
    "recorded",
    "store_seed",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that repeats a run of injected faults."""
    parser.getgroup("layered_store").addoption(
        "--store-seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the faults that layered_store injects (default 0)",
    )


def pytest_report_header(config: pytest.Config) -> str:
    """Say how to repeat this run."""
    return f"layered_store: --store-seed={config.getoption('--store-seed')}"


@pytest.fixture
def store_seed(request: pytest.FixtureRequest) -> int:
    """The seed of injected faults in this run."""
    seed: int = request.config.getoption("--store-seed")
    return seed


@pytest.fixture
def fake_clock() -> FakeClock:
    """A clock that stands still until the test advances it."""
    from layered_store.testing.clock import FakeClock  # noqa: PLC0415

    return FakeClock()


@pytest.fixture
def memory_store(fake_clock: FakeClock) -> MemoryStore:
    """An empty store in memory, on the test's clock."""
    from layered_store.stores.memory import MemoryStore  # noqa: PLC0415

    return MemoryStore(clock=fake_clock)


@pytest.fixture
def faults(fake_clock: FakeClock, store_seed: int) -> Callable[..., Faults]:
    """Wrap a store so that it can fail: ``faults(inner, error=0.1)``, on the test's clock."""
    from layered_store.testing.faults import Faults  # noqa: PLC0415

    def build(inner: StateStore, **options: Any) -> Faults:
        return Faults(inner, **{"clock": fake_clock, "seed": store_seed, **options})

    return build


@pytest.fixture
def recorded() -> Callable[[StateStore], Recorded]:
    """Wrap a store so that its calls are noted: ``recorded(inner).calls``."""
    from layered_store.testing.recorded import Recorded  # noqa: PLC0415

    return Recorded
