"""A built stack on another clock."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from layered_store import (
    Cached,
    ConfigError,
    Fallback,
    Layer,
    MemoryStore,
    Retry,
    StateSnapshot,
    StateStore,
    Timeout,
    WriteThrough,
    describe,
    find,
    load_stack,
)
from layered_store.stack import walk
from layered_store.testing import FakeClock, Faults, on_clock


def test_every_block_is_on_the_clock() -> None:
    """Order and options stay; the old stack keeps its own clock."""
    clock = FakeClock()
    old = Cached(WriteThrough(MemoryStore(), origin=Retry(MemoryStore(), attempts=7)), ttl=5)
    new = on_clock(old, clock)
    assert repr(new) == repr(old)
    assert all(getattr(place.store, "clock", clock) is clock for place in walk(new))
    assert not any(getattr(place.store, "clock", None) is clock for place in walk(old))
    assert find(new, Retry)[0].attempts == 7


def test_what_is_on_it_already_stays() -> None:
    """Stores that the test swapped in are the same objects, wherever they stand."""
    clock = FakeClock()
    swapped = Faults(MemoryStore(clock=clock), clock=clock)
    stack = on_clock(Cached(Layer(Timeout(swapped, seconds=1))), clock)
    assert find(stack, Faults) == [swapped]
    assert on_clock(stack, clock) is stack


async def test_time_moves_when_told() -> None:
    """The rebuilt stack expires by the new clock."""
    clock = FakeClock()
    truth = MemoryStore(clock=clock)
    stack = on_clock(Cached(truth, ttl=60), clock)
    await stack.upsert_latest(StateSnapshot("u-1", updated_at_unix_ms=1))
    await truth.upsert_latest(StateSnapshot("u-1", updated_at_unix_ms=2))
    assert (await stack.get_latest("u-1")).updated_at_unix_ms == 1  # type: ignore[union-attr]
    await clock.advance(61)
    assert (await stack.get_latest("u-1")).updated_at_unix_ms == 2  # type: ignore[union-attr]


def test_ids_of_the_config_stay() -> None:
    """Blocks keep the ids that replace() finds them by."""
    table = {"use": "cached", "id": "l1", "inner": {"use": "memory", "id": "truth"}}
    stack = on_clock(load_stack(table), FakeClock())
    assert [block.id for block in describe(stack)] == ["l1", "truth"]


def test_refuses() -> None:
    """What is no clock or no stack, and layers that cannot be built again."""

    class Odd(StateStore):
        def __init__(self, inner: StateStore) -> None:
            self.inner = inner

        async def get_latest(self, user_id: str) -> StateSnapshot | None: ...
        async def upsert_latest(self, snapshot: StateSnapshot) -> None: ...

    with pytest.raises(ConfigError, match="clock"):
        on_clock(MemoryStore(), 3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="stack"):
        on_clock(None, FakeClock())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Odd again, which is no dataclass"):
        on_clock(Odd(MemoryStore()), FakeClock())


@dataclasses.dataclass
class Counting(Layer):
    """A layer with a field that is not an argument."""

    calls: int = dataclasses.field(default=0, init=False)
    clock: Any = None


def test_a_store_that_stands_in_two_places_stays_one() -> None:
    """It is built again once; and what a layer counts by itself begins anew."""
    both = MemoryStore()
    old = Counting(Fallback(both, secondary=both), clock=FakeClock())
    old.calls = 7
    clock = FakeClock()
    new = on_clock(old, clock)
    assert isinstance(new, Counting) and new.clock is clock and new.calls == 0
    first, second = find(new, MemoryStore)
    assert first is second and first is not both
