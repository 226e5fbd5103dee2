"""A day of traffic, in virtual time, leaves nothing behind that grows."""

from __future__ import annotations

import asyncio
import gc
from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING

import pytest
from prometheus_client import CollectorRegistry

from layered_store.coherence.guarded.seen import Seen
from layered_store.coherence.guarded.watch import Signal
from layered_store.errors import StoreError, UnavailableError
from layered_store.layers.cached import Cached
from layered_store.layers.fallback import Fallback
from layered_store.layers.metrics import Metrics
from layered_store.layers.retry import Retry
from layered_store.snapshot import StateSnapshot
from layered_store.stores.erasures import KnownErasures
from layered_store.stores.memory import MemoryStore
from layered_store.testing import Faults
from layered_store.testing.clock import FakeClock

if TYPE_CHECKING:
    from collections.abc import Callable

    from layered_store.interface import StateStore

HOURS = 24
USERS = 2_000
ENTRIES = 300


async def some_minutes(stack: StateStore, random: Random) -> None:
    """Let some users come by, several at once, some of them cancelled."""

    async def visit() -> None:
        user_id = f"user-{random.randrange(USERS)}"
        try:
            match random.randrange(10):
                case 0:
                    await stack.delete(user_id)
                case 1 | 2 | 3:
                    await stack.upsert_latest(StateSnapshot(user_id, updated_at_unix_ms=1))
                case _:
                    await stack.get_latest(user_id)
        except StoreError:
            pass

    visits = [asyncio.create_task(visit()) for _ in range(12)]
    for visit_ in random.sample(visits, 2):
        await asyncio.sleep(0)
        visit_.cancel()
    await asyncio.gather(*visits, return_exceptions=True)


async def test_a_day_of_traffic_leaves_no_growth() -> None:
    """After the first hours, no more objects are alive than before, whatever happened.

    Reads, writes, erasures, errors, cancellations and expiry, over more users than fit.
    """
    random = Random(5)
    clock = FakeClock()
    backend = MemoryStore(history_limit=2, clock=clock)
    for number in range(USERS):  # all are known from the start: the backend may keep them
        await backend.upsert_latest(StateSnapshot(f"user-{number}", updated_at_unix_ms=1))
    cached = Cached(
        Retry(
            Faults(backend, seed=3, error=0.05, error_after=0.05, clock=clock),
            attempts=1,
            clock=clock,
        ),
        max_entries=ENTRIES,
        ttl=300,
        negative_ttl=30,
        clock=clock,
    )
    stack = Metrics(cached, name="day", registry=CollectorRegistry(), clock=clock)
    alive = []
    for hour in range(HOURS):
        for _ in range(20):
            await some_minutes(stack, random)
            await clock.advance(180)
        if hour in (HOURS // 3, HOURS - 1):
            gc.collect()
            alive.append(len(gc.get_objects()))
    assert len(cached._entries) <= ENTRIES
    assert not cached._flights
    assert not cached._held.writing
    assert len(cached._held.quarantine) <= 12
    s3 = cached._held.s3
    assert s3 is not None
    assert len(s3._small) + len(s3._main) <= 2 * ENTRIES + 64
    assert len(s3._ghosts) <= ENTRIES
    assert alive[1] <= alive[0] * 1.03
    await stack.aclose()


def test_known_erasures_are_forgotten() -> None:
    """What a process remembers of its erasures is bounded by number, and by time."""
    clock = FakeClock()
    known = KnownErasures(clock, seconds=30, most=100)
    for number in range(1_000):
        known.made(number.to_bytes(16, "big"), number, number)
    assert len(known._known) <= 101


async def test_known_erasures_go_with_time() -> None:
    """Old ones make room as new ones come."""
    clock = FakeClock()
    known = KnownErasures(clock, seconds=30, most=1_000)
    for number in range(100):
        known.made(number.to_bytes(16, "big"), number, number)
    await clock.advance(60)
    for number in range(100, 200):
        known.made(number.to_bytes(16, "big"), number, number)
    assert len(known._known) == 100


async def test_who_was_in_doubt_is_forgotten_though_nothing_fails_any_more() -> None:
    """An outage leaves thousands of writes of unknown outcome; they are in doubt for 5 s each."""
    clock = FakeClock()
    seen = Seen(clock, Signal(clock))
    cut_off = UnavailableError("cut off", outcome_unknown=True)
    seen.doubt([f"user-{number}" for number in range(1_000)], cut_off)
    await clock.advance(4)
    seen.raise_floor("somebody", 1)
    assert not seen.believes("user-0", 1)
    assert len(seen._doubtful) == 1_000
    await clock.advance(1)
    seen.raise_floor("somebody", 2)
    assert not seen._doubtful
    assert seen.believes("user-0", 1)


class Down(MemoryStore):
    """One that cannot be reached."""

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        raise UnavailableError("down")

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        raise UnavailableError("down")


@pytest.mark.parametrize(
    "layer",
    [
        lambda store: Retry(store, base_delay=0.0, budget=None),
        lambda store: Cached(store, stale_if_error=60.0),
        lambda store: Fallback(store, secondary=Down()),
    ],
)
async def test_a_call_that_failed_is_gone_with_its_error(
    layer: Callable[[StateStore], StateStore],
) -> None:
    """Not only when the collector runs: an outage must not fill the memory with what it held."""
    stack = layer(Down())
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            with suppress(StoreError):
                await stack.get_latest("u-1")
            with suppress(StoreError):
                await stack.upsert_latest(StateSnapshot("u-1"))
        assert gc.collect() == 0
    finally:
        gc.enable()
