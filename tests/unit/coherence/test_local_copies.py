"""Copies in a tier without versions: what each step does when the tier or the caller is wrong."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from layered_store.call import Call, call_continues
from layered_store.coherence.local import LocalCopies
from layered_store.coherence.outcomes import QUARANTINE_SECONDS
from layered_store.errors import (
    ClosedError,
    StoreError,
    StoreTimeoutError,
    UnavailableError,
    UnsupportedError,
)
from layered_store.interface import Op
from layered_store.layers.retry import Retry
from layered_store.layers.write_through import WriteThrough
from layered_store.snapshot import StateSnapshot
from layered_store.stores.memory import MemoryStore
from layered_store.testing.clock import FakeClock
from layered_store.testing.recorded import Recorded

STATE = StateSnapshot("u-1", 1)


async def fill(copies: LocalCopies) -> None:
    await copies.fill("u-1", STATE, copies.watch("u-1"))


async def write(copies: LocalCopies, state: StateSnapshot | None) -> None:
    with await copies.begin("u-1", Op.UPSERT_LATEST):
        await copies.put("u-1", state)


STEPS: dict[str, Callable[[LocalCopies], Coroutine[Any, Any, object]]] = {
    "read": lambda copies: copies.read("u-1"),
    "read many": lambda copies: copies.read_many(["u-1"]),
    "fill": fill,
    "write": lambda copies: write(copies, STATE),
    "removal": lambda copies: write(copies, None),
    "erasure": lambda copies: copies.bury("u-1"),
}


@pytest.mark.parametrize("step", STEPS)
async def test_a_closed_tier_is_told_and_leaves_nothing_under_way(step: str) -> None:
    """It is a mistake of the program's and no outage of the tier."""
    tier = MemoryStore()
    copies = LocalCopies(tier, FakeClock())
    await tier.aclose()
    other = copies.watch("u-1")  # somebody else reads meanwhile
    with pytest.raises(ClosedError) as told:
        await STEPS[step](copies)
    committed = step in ("write", "removal", "erasure")
    assert told.value.outcome_unknown == committed, "a caller must not take it for refused"
    assert not copies.failures["read"] and not copies.failures["erase"]
    async with asyncio.timeout(5):
        with await copies.begin("u-1", Op.UPSERT_LATEST):
            pass  # nobody holds the user's turn
    copies.unwatch(other)


async def test_a_write_that_left_nothing_removes_the_copy() -> None:
    """As when the origin holds an erasure that came later."""
    tier = MemoryStore()
    copies = LocalCopies(tier, FakeClock())
    await write(copies, STATE)
    assert (await copies.read("u-1")).snapshot == STATE
    await write(copies, None)
    assert await tier.get_latest("u-1") is None
    found = await copies.read("u-1")
    assert found.snapshot is None and found.fillable


async def test_one_user_from_two_event_loops_is_refused_while_a_write_is_under_way() -> None:
    """Turns are kept by one loop; the error says what to do instead."""
    copies = LocalCopies(MemoryStore(), FakeClock())
    user = await copies.begin("u-1", Op.UPSERT_LATEST)
    errors: list[BaseException] = []

    def elsewhere() -> None:
        try:
            asyncio.run(write(copies, STATE))
        except UnsupportedError as exc:
            errors.append(exc)

    async def other_thread() -> None:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        await asyncio.to_thread(thread.join)

    await other_thread()
    (error,) = errors
    assert "use one stack per loop" in str(error)
    user.end()
    await other_thread()
    assert len(errors) == 1
    assert (await copies.read("u-1")).snapshot == STATE


async def test_users_whom_another_event_loop_reads_are_read_and_left_to_it() -> None:
    """It fills the tier; and whoever is read together with them can be written afterwards."""
    tier, origin = MemoryStore(), MemoryStore()
    other, mine = StateSnapshot("u-1", 1), StateSnapshot("u-2", 1)
    await origin.upsert_latest_many([other, mine])
    store = WriteThrough(tier, origin=origin)
    store._authority = store._guard = None  # as if they had no versions
    reading = store._copies.watch("u-1")
    found: list[object] = []

    async def read() -> None:
        found.append(await store.get_latest("u-1"))
        found.append(await store.get_latest_many(["u-2", "u-1"]))

    await asyncio.to_thread(asyncio.run, read())
    assert found == [other, {"u-2": mine, "u-1": other}]
    assert await tier.get_latest("u-1") is None
    assert await tier.get_latest("u-2") == mine
    await store.upsert_latest(mine)
    store._copies.unwatch(reading)
    assert store._copies._turns.users == {}


async def test_a_change_that_began_in_doubt_is_not_believed_though_it_ends_after_it() -> None:
    """The write that was not answered may have come in between, to the origin or to the tier."""
    clock = FakeClock()
    copies = LocalCopies(MemoryStore(clock=clock), clock)
    for state in (STATE, None):
        copies.doubt("u-1", quarantine=True)
        assert copies.watch("u-1") is None  # nothing read now may be stored
        await clock.advance(QUARANTINE_SECONDS - 1.0)
        with await copies.begin("u-1", Op.UPSERT_LATEST):
            await clock.advance(2.0)
            await copies.put("u-1", state)
        assert not copies.usable("u-1")
        assert (await copies.read("u-1")).fillable
        await fill(copies)
        assert (await copies.read("u-1")).snapshot == STATE
        assert copies._turns.users == {}


class Unsure(MemoryStore):
    """A tier whose first write fails, and arrives when the test says so."""

    def __init__(self, error: StoreError) -> None:
        super().__init__()
        self.error: StoreError | None = error
        self.late: StateSnapshot | None = None

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        if self.error is not None:
            error, self.error, self.late = self.error, None, snapshot
            raise error
        # Without the write's id: a tier that cannot tell a repeat.
        with call_continues(Call(os.urandom(16), 0.0)):
            await super().upsert_latest(snapshot)


@pytest.mark.parametrize(
    ("error", "believed"),
    [
        (UnavailableError("cut off", outcome_unknown=True), False),
        (StoreTimeoutError("too late"), False),
        (UnavailableError("refused"), True),
    ],
    ids=["cut off", "too late", "refused"],
)
async def test_what_a_repeat_left_unsure_is_not_believed_for_a_while(
    error: StoreError, believed: bool
) -> None:
    """A first attempt that may arrive late would put what is old over what is new."""
    clock = FakeClock()
    tier = Unsure(error)
    origin = MemoryStore(clock=clock)
    retrying = Retry(tier, base_delay=0, max_delay=0, clock=clock)
    stack = WriteThrough(retrying, origin=origin, clock=clock)
    old, new = StateSnapshot("u-1", 1), StateSnapshot("u-1", 2)
    await stack.upsert_latest(old)
    await stack.upsert_latest(new)
    assert tier.late == old
    await tier.upsert_latest(tier.late)
    assert (await stack.get_latest("u-1") == old) is believed
    if not believed:
        # What is read after it can no longer arrive is a copy again.
        await clock.advance(QUARANTINE_SECONDS)
        assert await stack.get_latest("u-1") == new
        assert await tier.get_latest("u-1") == new
    await stack.aclose()


@pytest.mark.parametrize("batch", [False, True])
async def test_what_lands_in_the_tier_after_an_erasure_is_removed_by_the_next_reader(
    batch: bool,
) -> None:
    """It was never shown, must not be after a restart either, and nothing waits for repair."""
    clock = FakeClock()
    tier = Unsure(StoreTimeoutError("too late"))
    stack = WriteThrough(tier, origin=MemoryStore(clock=clock), clock=clock)

    async def read() -> object:
        if batch:
            return (await stack.get_latest_many(["u-1"])).get("u-1")
        return await stack.get_latest("u-1")

    await stack.upsert_latest(StateSnapshot("u-1", 1))
    await stack.delete("u-1")
    assert tier.late is not None
    await tier.upsert_latest(tier.late)
    assert await read() is None
    assert await tier.get_latest("u-1") == tier.late  # more may still come
    await clock.advance(QUARANTINE_SECONDS)
    assert await read() is None
    assert await tier.get_latest("u-1") is None
    assert stack._copies.pending == 0


async def test_an_absent_user_costs_a_sound_tier_nothing() -> None:
    """A reader removes only what is in doubt."""
    tier = Recorded(MemoryStore())
    stack = WriteThrough(tier, origin=MemoryStore())
    assert await stack.get_latest("u-1") is None
    assert tier.operations == ["get_latest"]
