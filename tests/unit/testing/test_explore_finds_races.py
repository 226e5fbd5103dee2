"""explore finds, within 200 schedules, the races of the caches that people write first."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from layered_store import Cached, Layer, MemoryStore, StateSnapshot, StateStore
from layered_store.testing import LoopClock, Schedule, ScheduleError, explore

SCHEDULES = 200


def state(number: int) -> StateSnapshot:
    return StateSnapshot("u-1", updated_at_unix_ms=number)


class Slow(Layer):
    """A store on the other side of a network: each call takes a step there and one back."""

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        await asyncio.sleep(0)
        found = await self.inner.get_latest(user_id)
        await asyncio.sleep(0)
        return found

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        await asyncio.sleep(0)
        await self.inner.upsert_latest(snapshot)
        await asyncio.sleep(0)

    async def delete(self, user_id: str) -> None:
        await asyncio.sleep(0)
        await self.inner.delete(user_id)
        await asyncio.sleep(0)


class FillsLate(Layer):
    """Keeps what it read, whatever was written meanwhile."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.kept: dict[str, StateSnapshot | None] = {}

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        if user_id not in self.kept:
            self.kept[user_id] = await self.inner.get_latest(user_id)
        return self.kept[user_id]

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        await self.inner.upsert_latest(snapshot)
        self.kept[snapshot.user_id] = snapshot

    async def delete(self, user_id: str) -> None:
        self.kept.pop(user_id, None)
        await self.inner.delete(user_id)


class WritesCacheFirst(FillsLate):
    """Shows a write before the store has it."""

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        self.kept[snapshot.user_id] = snapshot
        await self.inner.upsert_latest(snapshot)


class LeaderTakesAll(FillsLate):
    """One load for all, awaited by the caller that began it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.loads: dict[str, asyncio.Future[StateSnapshot | None]] = {}

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        load = self.loads.get(user_id)
        if load is not None:
            return await load
        load = self.loads[user_id] = asyncio.get_running_loop().create_future()
        try:
            found = await self.inner.get_latest(user_id)
            load.set_result(found)
            return found
        except asyncio.CancelledError:
            load.cancel()
            raise
        finally:
            del self.loads[user_id]


class LeaderForgetsFollowers(LeaderTakesAll):
    """One load for all; when its caller goes away, nobody tells the others."""

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        load = self.loads.get(user_id)
        if load is not None:
            return await load
        load = self.loads[user_id] = asyncio.get_running_loop().create_future()
        try:
            found = await self.inner.get_latest(user_id)
        except asyncio.CancelledError:
            del self.loads[user_id]
            raise
        del self.loads[user_id]
        load.set_result(found)
        return found


def below(schedule: Schedule) -> Slow:
    return Slow(MemoryStore(clock=schedule.clock))


Build = Callable[[StateStore], StateStore]


def stale_fill(build: Build) -> Callable[[Schedule], Awaitable[None]]:
    async def scenario(schedule: Schedule) -> None:
        stack = build(below(schedule))
        await stack.upsert_latest(state(1))
        getattr(stack, "kept", {}).clear()
        await asyncio.gather(stack.get_latest("u-1"), stack.upsert_latest(state(2)))
        assert await stack.get_latest("u-1") == state(2), "an older state came back"

    return scenario


def delete_during_fill(build: Build) -> Callable[[Schedule], Awaitable[None]]:
    async def scenario(schedule: Schedule) -> None:
        stack = build(below(schedule))
        await stack.inner.upsert_latest(state(1))  # type: ignore[attr-defined]
        await asyncio.gather(stack.get_latest("u-1"), stack.delete("u-1"))
        assert await stack.get_latest("u-1") is None, "a deleted user came back"

    return scenario


def two_writers(build: Build) -> Callable[[Schedule], Awaitable[None]]:
    async def scenario(schedule: Schedule) -> None:
        inner = below(schedule)
        stack = build(inner)
        await asyncio.gather(stack.upsert_latest(state(1)), stack.upsert_latest(state(2)))
        kept = await stack.get_latest("u-1")
        assert kept == await inner.get_latest("u-1"), "cache and store disagree for good"

    return scenario


def write_during_delete(build: Build) -> Callable[[Schedule], Awaitable[None]]:
    async def scenario(schedule: Schedule) -> None:
        inner = below(schedule)
        stack = build(inner)
        await stack.upsert_latest(state(1))
        await asyncio.gather(stack.delete("u-1"), stack.get_latest("u-1"))
        assert await stack.get_latest("u-1") == await inner.get_latest("u-1"), "deleted, yet shown"

    return scenario


def cancelled_leader(build: Build) -> Callable[[Schedule], Awaitable[None]]:
    async def scenario(schedule: Schedule) -> None:
        stack = build(below(schedule))
        await stack.inner.upsert_latest(state(1))  # type: ignore[attr-defined]
        readers = [asyncio.create_task(stack.get_latest("u-1")) for _ in range(2)]
        await asyncio.sleep(0)
        readers[0].cancel()
        assert await readers[1] == state(1)

    return scenario


def failed_write(build: Build) -> Callable[[Schedule], Awaitable[None]]:
    async def scenario(schedule: Schedule) -> None:
        inner = below(schedule)
        stack = build(inner)
        writing = asyncio.create_task(stack.upsert_latest(state(1)))
        await asyncio.sleep(0)
        writing.cancel()
        await asyncio.wait([writing])
        assert await stack.get_latest("u-1") == await inner.get_latest("u-1"), "shown, never stored"

    return scenario


SCENARIOS = {
    "stale fill after a write": (stale_fill, FillsLate),
    "delete during a fill": (delete_during_fill, FillsLate),
    "read during a delete": (write_during_delete, FillsLate),
    "lost update": (two_writers, WritesCacheFirst),
    "cancelled leader cancels followers": (cancelled_leader, LeaderTakesAll),
    "cancelled leader leaves followers": (cancelled_leader, LeaderForgetsFollowers),
    "cancelled write is shown": (failed_write, WritesCacheFirst),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_race_is_found(name: str) -> None:
    """The race shows within 200 schedules, and its seed shows it again."""
    scenario, naive = SCENARIOS[name]
    with pytest.raises(ScheduleError) as found:
        explore(scenario(naive), schedules=SCHEDULES)
    with pytest.raises(ScheduleError) as again:
        explore(scenario(naive), replay=found.value.seed)
    assert again.value.trace == found.value.trace


@pytest.mark.parametrize("name", SCENARIOS)
def test_cached_has_none_of_them(name: str) -> None:
    """The same schedules find nothing in Cached."""
    scenario, _ = SCENARIOS[name]
    build: Build = lambda inner: Cached(inner, clock=LoopClock())  # noqa: E731
    assert explore(scenario(build), schedules=SCHEDULES).schedules == SCHEDULES
