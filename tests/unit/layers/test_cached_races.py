"""Stacks of one process under many interleavings: each user behaves like one variable.

The stores below take their time before and after they act, fail before and after they took effect,
and callers are cancelled at any moment.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest

from layered_store.errors import StoreError, UnavailableError
from layered_store.interface import StateStore
from layered_store.layers.cached import Cached
from layered_store.layers.retry import Retry
from layered_store.layers.write_through import WriteThrough
from layered_store.snapshot import StateSnapshot
from layered_store.stores.memory import MemoryStore
from layered_store.testing.explore import LoopClock, Schedule, explore

CLOCK = LoopClock()
SCHEDULES = 400


@dataclass
class Slow(StateStore):
    """A store of two methods and delete, whose calls are seen to act at some moment in between."""

    chance: random.Random
    faults: float = 0.0
    states: dict[str, StateSnapshot] = field(default_factory=dict)

    async def _pause(self) -> None:
        for _ in range(self.chance.choice((0, 0, 1, 3))):
            await asyncio.sleep(0)
        if self.chance.random() < 0.2:
            await asyncio.sleep(self.chance.random())

    async def _fail(self) -> None:
        if self.chance.random() < self.faults:
            raise UnavailableError("seeded")

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        await self._pause()
        await self._fail()
        self.states[snapshot.user_id] = snapshot
        await self._pause()
        await self._fail()

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        await self._pause()
        await self._fail()
        found = self.states.get(user_id)
        await self._pause()
        return found

    async def delete(self, user_id: str) -> None:
        await self._pause()
        await self._fail()
        self.states.pop(user_id, None)
        await self._pause()
        await self._fail()


@dataclass
class Register:
    """What one user's state may be: the last write that ended, or one that is not known to have.

    The check is that of a register with writes of unknown outcome: a read may give the state of
    the last write that ended before the read began, of one that overlaps it, or of an earlier one
    whose outcome was never told.
    """

    moment: int = 0
    # Each write: value, begun, ended (None: never told).
    writes: list[list[float | int | None]] = field(default_factory=lambda: [[None, 0, 0]])

    def tick(self) -> int:
        self.moment += 1
        return self.moment

    def allowed(self, begun: int) -> set[float | int | None]:
        """Return the values that a read that began then and ends now may give."""
        told = [write for write in self.writes if write[2] is not None and write[2] < begun]
        # A write that ended is overwritten by one that began after its end and ended before the
        # read began; those of unknown outcome may land at any time.
        final = [
            write
            for write in told
            if not any(other[1] > write[2] for other in told if other is not write)
        ]
        others = [write for write in self.writes if write[2] is None or write[2] >= begun]
        return {write[0] for write in (*final, *others)}


async def work(stack: StateStore, schedule: Schedule, *, cancels: bool) -> None:
    """Let four tasks read, write, delete and give up, and check what they see."""
    register = Register()
    values = iter(range(1, 1000))
    chance = schedule.random

    async def write(value: float | None, call: Callable[[], object]) -> None:
        entry: list[float | int | None] = [value, register.tick(), None]
        register.writes.append(entry)
        try:
            await call()  # type: ignore[misc]
        except StoreError:
            return
        entry[2] = register.tick()

    async def step() -> None:
        kind = chance.random()
        if kind < 0.5:
            begun = register.tick()
            try:
                found = await stack.get_latest("u-1")
            except StoreError:
                return
            seen = None if found is None else found.updated_at_unix_ms
            assert seen in register.allowed(begun), f"{seen} not in {register.allowed(begun)}"
        elif kind < 0.6:
            begun = register.tick()
            try:
                many = await stack.get_latest_many(["u-1", "u-2"])
            except StoreError:
                return
            state = many.get("u-1")
            seen = None if state is None else state.updated_at_unix_ms
            assert seen in register.allowed(begun), f"{seen} not in {register.allowed(begun)}"
        elif kind < 0.85:
            value = next(values)
            await write(value, lambda: stack.upsert_latest(StateSnapshot("u-1", value)))
        elif kind < 0.9:
            value = next(values)
            batch = [StateSnapshot("u-2", 0), StateSnapshot("u-1", value)]
            await write(value, lambda: stack.upsert_latest_many(batch))
        else:
            await write(None, lambda: stack.delete("u-1"))

    async def actor() -> None:
        for _ in range(8):
            task = asyncio.ensure_future(step())
            if cancels and chance.random() < 0.15:
                await asyncio.sleep(chance.choice((0, 0, 0.05)))
                task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                pass
            if chance.random() < 0.2:
                await asyncio.sleep(chance.random())

    await asyncio.gather(*(actor() for _ in range(4)))
    for _ in range(2):
        begun = register.tick()
        try:
            found = await stack.get_latest("u-1")
        except StoreError:
            continue
        seen = None if found is None else found.updated_at_unix_ms
        assert seen in register.allowed(begun)
    await asyncio.sleep(60)  # refreshes end
    for cache in (stack, *stack.children().values()):
        if isinstance(cache, Cached):
            assert not cache._flights
            assert not cache._held.writing
            assert not cache._held.by_digest
        if isinstance(cache, WriteThrough) and cache._guard is None:
            assert not cache._copies._turns.users
    await stack.aclose()


def stacks(schedule: Schedule, faults: float) -> dict[str, Callable[[], StateStore]]:
    chance = schedule.random

    def slow(share: float = 1.0) -> Slow:
        return Slow(random.Random(chance.random()), faults * share)

    jitter = random.Random(chance.random())
    return {
        "cached": lambda: Cached(slow(), ttl=0.5, negative_ttl=0.2, clock=CLOCK),
        "refreshing": lambda: Cached(
            slow(), ttl=0.6, refresh_ahead=0.3, ttl_jitter=0.3, random=jitter, clock=CLOCK
        ),
        "small": lambda: Cached(slow(), ttl=5, max_entries=1, negative_ttl=5, clock=CLOCK),
        "twice": lambda: Cached(Cached(slow(), ttl=0.4, clock=CLOCK), ttl=0.2, clock=CLOCK),
        "write_through": lambda: WriteThrough(slow(), origin=slow(0.2), clock=CLOCK),
        "three tiers": lambda: Cached(
            slow(), fallback=slow(0.2), ttl=0.5, negative_ttl=0.2, clock=CLOCK
        ),
        "over a record": lambda: Cached(
            slow(), fallback=Held(MemoryStore(clock=CLOCK), slow(0.2)), ttl=0.5, clock=CLOCK
        ),
        "retried": lambda: Cached(
            Retry(Held(MemoryStore(clock=CLOCK), slow()), clock=CLOCK, random=jitter),
            ttl=0.5,
            negative_ttl=0.5,
            clock=CLOCK,
        ),
    }


@dataclass(eq=False, repr=False)
class Held(StateStore):
    """A memory store with the pauses and faults of a slow one."""

    record: MemoryStore
    pace: Slow

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        await self.pace._pause()
        await self.pace._fail()
        await self.record.upsert_latest(snapshot)
        await self.pace._pause()
        await self.pace._fail()

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        await self.pace._pause()
        await self.pace._fail()
        found = await self.record.get_latest(user_id)
        await self.pace._pause()
        return found

    async def get_latest_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        await self.pace._pause()
        return await self.record.get_latest_many(user_ids)

    async def delete(self, user_id: str) -> None:
        await self.pace._pause()
        await self.pace._fail()
        await self.record.delete(user_id)
        await self.pace._pause()
        await self.pace._fail()


NAMES = tuple(stacks(Schedule(0, random.Random(0)), 0.0))


@pytest.mark.parametrize("faults", [0.0, 0.2], ids=["healthy", "faulty"])
@pytest.mark.parametrize("cancels", [False, True], ids=["", "cancelled"])
@pytest.mark.parametrize("name", NAMES)
def test_each_user_behaves_like_one_variable(name: str, cancels: bool, faults: float) -> None:
    """Whatever overlaps, fails or is cancelled: no read gives what was overwritten."""

    async def scenario(schedule: Schedule) -> None:
        await work(stacks(schedule, faults)[name](), schedule, cancels=cancels)

    explored = explore(scenario, schedules=SCHEDULES // 4)
    assert explored.schedules == SCHEDULES // 4
    assert explored.steps > 100 * explored.schedules


class _Naive(Cached):
    """What glue does: fill when the load is done, set when the write is done."""

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        entry = self._entries.get(user_id)
        if entry is not None:
            return entry.value  # type: ignore[no-any-return]
        found = await self.inner.get_latest(user_id)
        self._held.keep(user_id, found)
        return found

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        await self.inner.upsert_latest(snapshot)
        self._held.keep(snapshot.user_id, snapshot)

    async def delete(self, user_id: str) -> None:
        await self.inner.delete(user_id)
        self._held.remove(user_id)


def test_the_check_finds_what_glue_does() -> None:
    """A cache that fills without care is caught, so the check bites."""

    async def scenario(schedule: Schedule) -> None:
        slow = Slow(random.Random(schedule.random.random()))
        await work(_Naive(slow, ttl=100, clock=CLOCK), schedule, cancels=False)

    with pytest.raises(AssertionError, match="not in"):
        explore(scenario, schedules=100)
