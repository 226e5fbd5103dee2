"""An application may have every task begin in the turn in which it is made (Python 3.12)."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from layered_store import Cached, HealthStatus, MemoryStore, Shadow, StateSnapshot
from layered_store.testing import check_layer, check_store

if sys.version_info < (3, 12):
    pytest.skip("eager tasks are new in Python 3.12", allow_module_level=True)


def eagerly(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run it on an event loop whose tasks begin at once."""
    with asyncio.Runner() as runner:
        runner.get_loop().set_task_factory(asyncio.eager_task_factory)
        runner.run(scenario())


def test_a_candidate_that_never_waits_gets_every_write() -> None:
    """What follows a write may be at its end before the write's own call goes on."""

    async def scenario() -> None:
        inner, candidate = MemoryStore(), MemoryStore()
        async with Shadow(inner, candidate=candidate) as store:
            for number in range(3):
                await store.upsert_latest(StateSnapshot("u-1", number))
                assert await candidate.get_latest("u-1") == StateSnapshot("u-1", number)
                assert await store.get_latest("u-1") == StateSnapshot("u-1", number)
            await store.delete("u-1")
            assert await candidate.get_latest("u-1") is None
            assert store._background.lanes == {}
            assert store._background.pending == 0

    eagerly(scenario)


def test_a_probe_that_never_waits_is_not_the_answer_of_the_next() -> None:
    """Only a probe that is under way is shared."""

    class Moody(MemoryStore):
        healthy = True

        async def health_check(self) -> bool:
            return self.healthy

    async def scenario() -> None:
        store = Moody()
        assert (await store.health_report()).status is HealthStatus.HEALTHY
        store.healthy = False
        assert (await store.health_report()).status is HealthStatus.UNHEALTHY
        store.healthy = True
        assert (await store.health_report()).status is HealthStatus.HEALTHY

    eagerly(scenario)


def test_a_refresh_that_never_waits_renews_the_entry() -> None:
    """The hit that starts it still gets what was kept; the next one gets what it found."""

    async def scenario() -> None:
        inner = MemoryStore()
        async with Cached(inner, ttl=60, refresh_ahead=1e-9) as store:
            await store.upsert_latest(StateSnapshot("u-1", 1))
            await inner.upsert_latest(StateSnapshot("u-1", 2))
            assert await store.get_latest("u-1") == StateSnapshot("u-1", 1)
            assert await store.get_latest("u-1") == StateSnapshot("u-1", 2)
            await asyncio.sleep(0)
            assert not store._refreshes

    eagerly(scenario)


def test_the_laws_hold() -> None:
    """Of a store, and of a layer."""

    async def scenario() -> None:
        for report in (
            await check_store(lambda: Shadow(MemoryStore(), candidate=MemoryStore())),
            await check_store(lambda: Cached(MemoryStore())),
            await check_layer(lambda inner: Shadow(inner, candidate=MemoryStore())),
            await check_layer(Cached),
        ):
            assert report.ok, str(report)

    eagerly(scenario)
