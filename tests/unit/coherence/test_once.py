"""What is repeated takes effect once, and debts are found again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from layered_store.call import _current, call_begins
from layered_store.errors import UnavailableError
from layered_store.interface import StateStore
from layered_store.layer import Layer
from layered_store.layers.cached import Cached
from layered_store.layers.ramp import Ramp
from layered_store.layers.retry import Retry
from layered_store.layers.shadow import Shadow
from layered_store.layers.write_through import WriteThrough
from layered_store.sharing import place_of
from layered_store.snapshot import StateSnapshot
from layered_store.stack import describe
from layered_store.stores.memory import MemoryStore
from layered_store.testing.clock import FakeClock, settle
from layered_store.testing.faults import Faults

WRITTEN = StateSnapshot("u-1", 7)


async def test_a_repeated_erasure_spares_what_was_written_since() -> None:
    """The first attempt took effect, so the write in between came after the erasure."""
    store = MemoryStore()
    await store.upsert_latest(StateSnapshot("u-1", 1))
    with call_begins() as call:
        await store.delete("u-1")
    call.ended = False
    await store.upsert_latest(WRITTEN)
    # The reply of the first attempt was lost; this is the second of the same call.
    token = _current.set(call)
    try:
        await store.delete("u-1")
    finally:
        _current.reset(token)
    assert await store.get_latest("u-1") == WRITTEN
    await store.delete("u-1")
    assert await store.get_latest("u-1") is None


async def test_retry_erases_once() -> None:
    """All attempts of one delete are one erasure: it leaves one tombstone."""
    store = MemoryStore()
    await store.upsert_latest(StateSnapshot("u-1", 1))
    attempts = 0

    class Flaky(MemoryStore):
        async def delete(self, user_id: str) -> None:
            nonlocal attempts
            attempts += 1
            await store.delete(user_id)
            if attempts == 1:
                raise UnavailableError("the reply was lost")

    clock = FakeClock()
    await Retry(Flaky(), attempts=2, base_delay=0.0, max_delay=0.0, clock=clock).delete("u-1")
    assert attempts == 2
    assert (await store.read("u-1")).version == 2


async def test_owing_names_what_is_owed() -> None:
    """Debts are found by tier, and no longer once settled; a new erasure owes anew."""
    store = MemoryStore()
    version = await store.erase("u-1", ("redis",))
    await store.erase("u-2", ("other",))
    (owed,) = await store.owing("redis", 10)
    assert (owed.digest, owed.version, owed.erased, owed.owed) == (
        store.digest("u-1"),
        version,
        True,
        True,
    )
    await store.settle(owed.digest, version - 1, "redis")
    assert await store.owing("redis", 10)
    await store.settle(owed.digest, version, "redis")
    assert not await store.owing("redis", 10)
    await store.erase("u-1", ("redis",))
    assert await store.owing("redis", 10)


async def test_a_cursor_of_another_run_is_not_covered() -> None:
    """A store in memory starts anew with its process: no cursor of before may be believed."""
    before, after = MemoryStore(), MemoryStore()
    await before.upsert_latest(StateSnapshot("u-1"))
    cursor = await before.head()
    await after.upsert_latest(StateSnapshot("u-1"))
    assert await before.covers(cursor)
    assert not await after.covers(cursor)


def test_describe_sums_up_the_staleness() -> None:
    """Caches without a channel add up; a tier without versions has no bound."""
    stack = Cached(Cached(MemoryStore(), ttl=30), ttl=5)
    assert describe(stack)[0].notes == ("other processes' writes show after 35 s at the latest",)
    unbounded = Cached(WriteThrough(MemoryStore(), origin=MemoryStore()), stale_if_error=9)
    (note,) = describe(unbounded)[0].notes
    assert note.startswith("other processes' writes may not show: the cache tier has no versions")
    assert note.endswith("up to 9 s older while inner is unavailable")


class Most(random.Random):
    """Draws the upper end."""

    def uniform(self, a: float, b: float) -> float:  # noqa: ARG002
        return b


class WithoutIds(StateStore):
    """A store from elsewhere: each erasure erases, repeated or not."""

    def __init__(self) -> None:
        self.states: dict[str, StateSnapshot] = {}

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        self.states[snapshot.user_id] = snapshot

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        return self.states.get(user_id)

    async def delete(self, user_id: str) -> None:
        self.states.pop(user_id, None)


@pytest.mark.parametrize(
    "pair",
    [
        lambda first, second: WriteThrough(second, origin=first),
        lambda first, second: Ramp(first, alternative=second, share=1.0),
        lambda first, second: Shadow(first, candidate=second),
    ],
)
async def test_a_repeated_erasure_leaves_nothing_in_a_second_store_that_would_spare_it(
    pair: Callable[[StateStore, StateStore], StateStore],
) -> None:
    """What was written between the attempts, the first store erases: so must the second."""
    clock, kept = FakeClock(), MemoryStore()
    second = Faults(kept, clock=clock)
    stack = Retry(pair(WithoutIds(), second), base_delay=1, clock=clock)
    await stack.upsert_latest(StateSnapshot("u-1", 1))
    await settle()
    second.fail(1, fault="error_after", operations=["delete"])
    erasing = asyncio.create_task(stack.delete("u-1"))
    await settle()
    await stack.upsert_latest(WRITTEN)
    await settle()
    assert await kept.get_latest("u-1") == WRITTEN
    await clock.advance(10)
    await erasing
    assert await stack.get_latest("u-1") is None
    assert await kept.get_latest("u-1") is None
    await stack.aclose()


async def test_a_ramp_reads_what_was_written_last_where_its_other_store_knows_a_repeat() -> None:
    """It takes the write for an old one, and inner does not: then inner is right."""
    clock = FakeClock()
    other = Faults(MemoryStore(), clock=clock)
    ramp = Ramp(WithoutIds(), alternative=other, share=1.0, clock=clock)

    stack = Retry(ramp, base_delay=6, max_delay=6, random=Most(), clock=clock)
    other.fail(1, fault="error_after", operations=["upsert_latest"])
    writing = asyncio.create_task(stack.upsert_latest(WRITTEN))
    await settle()
    await stack.upsert_latest(StateSnapshot("u-1", 8))
    await clock.advance(6)
    await writing
    assert await stack.get_latest("u-1") == WRITTEN
    await stack.upsert_latest(StateSnapshot("u-1", 9))
    assert ramp.behind == 0


async def test_a_batch_that_a_ramp_divides_otherwise_the_next_time_is_stored_once() -> None:
    """The share changed between the attempts: each state keeps its id."""
    clock, database = FakeClock(), MemoryStore()
    users = sorted((f"u-{n}" for n in range(50)), key=place_of)
    batch = [StateSnapshot(user_id, 1) for user_id in (users[-1], users[0], users[-1], users[1])]
    below = Faults(database, delay=0.1, clock=clock)
    ramp = Ramp(below, layer=Layer, share=0.5, clock=clock)
    below.fail(1, fault="slow")  # the part outside the share
    below.fail(1, fault="error_after")  # the one in it: the reply is lost
    stack = Retry(ramp, base_delay=6, max_delay=6, random=Most(), clock=clock)
    writing = asyncio.create_task(stack.upsert_latest_many(batch))
    await clock.advance(2)
    assert len(await database.get_history(users[0], 9)) == 1
    ramp.share = 1.0
    await clock.advance(10)
    await writing
    lengths = [len(await database.get_history(user_id, 9)) for user_id in users[:2] + users[-1:]]
    assert lengths == [1, 1, 2]
