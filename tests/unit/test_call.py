"""A write keeps its identity however often it is tried, and no other write takes it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from layered_store import Cached, MemoryStore, Retry, SQLStore, StateSnapshot, StateStore, Timeout
from layered_store.call import call_begins, current_call, new_id
from layered_store.clock import SYSTEM_CLOCK, SystemClock
from layered_store.errors import ValidationError
from layered_store.layer import Layer
from layered_store.testing.clock import FakeClock


def state(value: float, user_id: str = "u-1") -> StateSnapshot:
    return StateSnapshot(user_id, 0, axes={"a": value})


@pytest.mark.parametrize("wall", [0.0, 1e9])
@pytest.mark.parametrize(
    "build",
    [
        lambda fake: Cached(MemoryStore(), clock=fake),
        lambda fake: Cached(MemoryStore(clock=fake)),
        lambda fake: Retry(MemoryStore(), clock=fake),
        lambda fake: Retry(MemoryStore(clock=fake)),
        lambda fake: Cached(Retry(Timeout(MemoryStore(), seconds=1, clock=fake)), clock=fake),
        lambda fake: Cached(MemoryStore(clock=fake), fallback=MemoryStore()),
        lambda fake: Cached(MemoryStore(), fallback=MemoryStore(clock=fake), clock=fake),
    ],
)
async def test_writes_after_an_erasure_count_whatever_the_clocks_say(
    build: Callable[[FakeClock], StateStore], wall: float
) -> None:
    """Blocks with different clocks agree on what came first."""
    stack = build(FakeClock(start=wall))
    for value in (0.1, 0.2, 0.3):
        await stack.upsert_latest(state(value))
        await stack.delete("u-1")
        assert await stack.get_latest("u-1") is None
        await stack.upsert_latest(state(value))
        assert await stack.get_latest("u-1") == state(value)
    await stack.aclose()


@dataclass(eq=False, repr=False)
class Held(Layer):
    """Lets writes wait before they are sent."""

    gate: asyncio.Event = field(kw_only=True)

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        await self.gate.wait()
        await self.inner.upsert_latest(snapshot)


class OwnClock(SystemClock):
    """What an application may derive, to note its sleeps say."""


@pytest.mark.parametrize("clock", [SystemClock(), OwnClock()])
async def test_a_clock_that_ticks_like_the_systems_tells_when_a_write_began(
    clock: SystemClock, tmp_path: Path
) -> None:
    """A store with a system clock of its own, below a layer with the default one."""
    gate = asyncio.Event()
    url = f"sqlite+aiosqlite:///{tmp_path}/store.db"
    async with SQLStore(url) as other, Cached(Held(SQLStore(url, clock=clock), gate=gate)) as stack:
        write = asyncio.create_task(stack.upsert_latest(state(0.1)))
        await asyncio.sleep(0)
        await other.delete("u-1")
        gate.set()
        await write
        assert await other.get_latest("u-1") is None


async def test_a_write_that_began_before_an_erasure_is_dropped_though_no_clock_moved() -> None:
    """Held up above the backend while the user is erased, it does not bring the user back."""
    gate = asyncio.Event()
    fake = FakeClock()
    stack = Cached(Held(MemoryStore(clock=fake), gate=gate), clock=fake)
    late = asyncio.create_task(stack.upsert_latest(state(0.1)))
    await asyncio.sleep(0)
    await stack.delete("u-1")
    gate.set()
    await late
    assert await stack.get_latest("u-1") is None
    assert await stack.get_history("u-1", 9) == []


async def test_a_layer_may_store_more_than_it_was_called_with() -> None:
    """Different snapshots of one call are different writes; the same one is one write."""

    @dataclass(eq=False, repr=False)
    class Doubling(Layer):
        async def upsert_latest(self, snapshot: StateSnapshot) -> None:
            await self.inner.upsert_latest(state(0.1))
            await self.inner.upsert_latest(snapshot)
            await self.inner.upsert_latest(snapshot)

    store = Retry(Doubling(MemoryStore()))
    await store.upsert_latest(state(0.2))
    assert await store.get_history("u-1", 9) == [state(0.2), state(0.1)]


async def test_a_task_left_behind_begins_writes_of_its_own() -> None:
    """It inherits the context of the call that started it, but not its identity."""
    store = MemoryStore()
    left: list[asyncio.Task[None]] = []
    ended = asyncio.Event()

    async def worker() -> None:
        await ended.wait()
        for value in (0.1, 0.2, 0.1):
            await store.upsert_latest(state(value))

    with call_begins() as call:
        left.append(asyncio.create_task(worker()))
        await asyncio.sleep(0)
    assert call.ended
    await store.delete("u-1")
    ended.set()
    await asyncio.gather(*left)
    assert await store.get_history("u-1", 9) == [state(0.1), state(0.2), state(0.1)]


def test_the_beginning_on_another_clock() -> None:
    """The machine's clock is always noted; a clock of a test that was not asked tells nothing."""
    fake, other = FakeClock(start=5.0), FakeClock(start=7.0)
    before = SYSTEM_CLOCK.monotonic()
    with call_begins(fake) as call:
        fake.set(6.0)
        assert current_call() is call
        assert call.began(fake) == 5.0
        assert call.began(other) == 7.0
        assert before <= call.began(SYSTEM_CLOCK) <= SYSTEM_CLOCK.monotonic()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_makes_ids_of_its_own() -> None:
    """Two writes of one id would count as one, and the second be lost."""
    new_id()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.write(writing, b"".join(new_id() for _ in range(10)))
        os._exit(0)
    os.waitpid(child, 0)
    theirs = os.read(reading, 160)
    os.close(reading)
    os.close(writing)
    ours = {new_id() for _ in range(10)}
    assert len(ours) == 10
    assert ours.isdisjoint(theirs[at : at + 16] for at in range(0, 160, 16))
    assert len(theirs) == 160


async def test_each_layer_takes_a_snapshot_for_valid_that_the_one_above_found_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once per write, not once per layer; another snapshot is looked at all the same."""
    looked: list[StateSnapshot] = []
    validate = StateSnapshot.validate

    def noted(self: StateSnapshot) -> None:
        looked.append(self)
        validate(self)

    monkeypatch.setattr(StateSnapshot, "validate", noted)

    class Doubling(Layer):
        """Writes something else too."""

        async def upsert_latest(self, snapshot: StateSnapshot) -> None:
            await self.inner.upsert_latest(snapshot)
            await self.inner.upsert_latest(bad)

    bad = StateSnapshot("u-1", axes={"a": 2.0})
    good = state(0.5)
    await Cached(Retry(Cached(MemoryStore()))).upsert_latest(good)
    assert looked == [good]
    with pytest.raises(ValidationError):
        await Cached(Doubling(Cached(MemoryStore()))).upsert_latest(good)
    assert looked == [good, good, bad]
