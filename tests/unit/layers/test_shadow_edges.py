"""Shadow where calls overlap: what the candidate is given, when, and what is counted."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
from typing import Any

import pytest

from layered_store import (
    ConfigError,
    ErasureIncompleteError,
    HealthStatus,
    MemoryStore,
    Shadow,
    StateSnapshot,
    StateStore,
    UnavailableError,
    ValidationError,
    WriteThrough,
)
from layered_store.call import current_call
from layered_store.coherence.contract import Authority
from layered_store.health import HealthReport
from layered_store.testing.clock import FakeClock, settle


def state(value: float = 0.5, user_id: str = "u-1", at: int = 5) -> StateSnapshot:
    return StateSnapshot(user_id, updated_at_unix_ms=at, axes={"a": value})


OLD, NEW = state(0.1, at=1), state(0.2, at=2)


class Simple(StateStore):
    """A store without versions: it keeps whatever comes last.

    Each call is noted. It waits for ``gate`` where one stands, before it acts or, with ``late``,
    after.
    """

    late = False

    def __init__(self) -> None:
        self.kept: dict[str, StateSnapshot] = {}
        self.gate: asyncio.Event | None = None
        self.error: Exception | None = None
        self.calls: list[str] = []
        self.inside = self.most_inside = 0

    async def _pause(self) -> None:
        if self.gate is not None:
            await self.gate.wait()

    async def _enter(self, name: str) -> None:
        self.calls.append(name)
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        try:
            if not self.late:
                await self._pause()
            if self.error is not None:
                raise self.error
        finally:
            self.inside -= 1

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        await self._enter("get")
        return self.kept.get(user_id)

    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        await self._enter("history")
        return [self.kept[user_id]][:limit] if user_id in self.kept else []

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        await self._enter("upsert")
        self.kept[snapshot.user_id] = snapshot
        if self.late:
            await self._pause()

    async def delete(self, user_id: str) -> None:
        await self._enter("delete")
        self.kept.pop(user_id, None)


class Late(Simple):
    """Writes act at once; their answers wait for the gate."""

    late = True


def seen(shadow: Shadow) -> dict[str, int]:
    return {result: count for result, count in shadow.differences.items() if count}


def mirrored(shadow: Shadow) -> dict[str, int]:
    return {outcome: count for outcome, count in shadow.mirrored.items() if count}


# One thing after another


async def test_a_refused_write_lets_nothing_run_at_the_same_time() -> None:
    """The candidate's calls of a user stay in one line, whatever becomes of writes meanwhile."""
    inner, candidate = Simple(), Simple()
    candidate.gate = asyncio.Event()
    shadow = Shadow(inner, candidate=candidate)
    await shadow.upsert_latest(OLD)
    await settle()
    inner.error = ValidationError("refused")
    with pytest.raises(ValidationError):
        await shadow.upsert_latest(state(0.9))
    inner.error = None
    await shadow.upsert_latest(NEW)
    await settle()
    candidate.gate.set()
    await settle()
    assert candidate.most_inside == 1
    assert candidate.kept["u-1"] == NEW
    assert shadow._background.lanes == {}


async def test_writes_that_overlap_no_more_are_mirrored_as_they_are() -> None:
    """Only those whose order nobody knows cost a look at what ``inner`` holds."""
    inner, candidate = Late(), Simple()
    shadow = Shadow(inner, candidate=candidate)
    gate = inner.gate = asyncio.Event()
    both = [asyncio.create_task(shadow.upsert_latest(each)) for each in (OLD, NEW)]
    await settle()
    candidate.gate = asyncio.Event()  # what they leave for the candidate waits there
    gate.set()
    await asyncio.gather(*both)
    await settle()
    await shadow.upsert_latest(state(0.3))
    candidate.gate.set()
    await settle()
    assert inner.calls.count("get") == 2
    assert candidate.kept == inner.kept


async def test_while_a_user_is_erased_the_candidate_is_left_alone() -> None:
    """What is written meanwhile waits, and then the candidate is given what ``inner`` holds."""
    inner, candidate = Simple(), Simple()
    shadow = Shadow(inner, candidate=candidate)
    gate = inner.gate = asyncio.Event()
    erasing = asyncio.create_task(shadow.delete("u-1"))
    await settle()
    inner.gate = None
    await shadow.upsert_latest(NEW)
    await settle()
    assert candidate.calls == []
    assert shadow._background.lanes["u-1"].task is None
    gate.set()
    await erasing
    await settle()
    assert inner.kept == {}
    assert candidate.kept == {}
    assert shadow._background.lanes == {}


async def test_a_write_around_a_whole_erasure_does_not_bring_the_user_back() -> None:
    """Its answer came after the erasure was over; what it wrote was erased all the same."""
    inner, candidate = Late(), Simple()
    shadow = Shadow(inner, candidate=candidate)
    inner.gate = asyncio.Event()
    writing = asyncio.create_task(shadow.upsert_latest(OLD))
    await settle()
    await shadow.delete("u-1")
    inner.gate.set()
    await writing
    await settle()
    assert inner.kept == {}
    assert candidate.kept == {}
    assert shadow._background.lanes == {}


@pytest.mark.parametrize("held", [None, NEW])
async def test_of_a_write_that_lost_in_inner_the_candidate_gets_the_winner(
    held: StateSnapshot | None,
) -> None:
    """Not what was written: a newer state, or nobody when the user was erased meanwhile."""

    class Losing(Simple):
        async def upsert_latest(self, snapshot: StateSnapshot) -> None:
            current_call().superseded = True
            if held is not None:
                self.kept[snapshot.user_id] = held

    candidate = Simple()
    shadow = Shadow(Losing(), candidate=candidate)
    await shadow.upsert_latest(OLD)
    await settle()
    assert candidate.kept == ({} if held is None else {"u-1": NEW})
    assert OLD not in candidate.kept.values()
    assert mirrored(shadow) == {"ok": 1}


async def test_both_states_of_a_user_in_one_batch_reach_the_candidates_history() -> None:
    """Each is a write of its own there as well."""
    candidate = MemoryStore()
    shadow = Shadow(MemoryStore(), candidate=candidate)
    await shadow.upsert_latest_many([OLD, NEW])
    await settle()
    assert await candidate.get_history("u-1", 9) == [NEW, OLD]


async def test_an_erasure_at_the_candidate_wins_over_a_write_that_began_before() -> None:
    """Another process erased while the mirrored write waited; it must not bring the user back."""
    inner, candidate = MemoryStore(), MemoryStore()
    shadow = Shadow(inner, candidate=candidate)
    await shadow.upsert_latest(OLD)
    await inner.delete("u-1")
    await candidate.delete("u-1")
    await settle()
    assert mirrored(shadow) == {"ok": 1}
    assert await candidate.get_latest("u-1") is None


async def test_a_write_between_the_two_parts_of_an_erasure_reaches_the_candidate() -> None:
    """It began after ``inner`` had erased, before the candidate had, and was stored after both."""

    class Slow(MemoryStore):
        async def delete(self, user_id: str) -> None:
            await gate.wait()
            await super().delete(user_id)

    gate = asyncio.Event()
    inner, candidate = MemoryStore(), Slow()
    shadow = Shadow(inner, candidate=candidate)
    stack = WriteThrough(MemoryStore(), origin=shadow)
    erasing = asyncio.create_task(stack.delete("u-1"))
    await settle()
    writing = asyncio.create_task(stack.upsert_latest(NEW))  # waits for its turn
    await settle()
    gate.set()
    await asyncio.gather(erasing, writing)
    await settle()
    assert await inner.get_latest("u-1") == NEW
    assert await candidate.get_latest("u-1") == NEW
    assert mirrored(shadow) == {"ok": 1}


async def test_an_erasure_at_the_candidate_wins_over_a_copy_that_was_looked_up_before() -> None:
    """A copy counts as begun before ``inner`` was asked."""
    clock = FakeClock()

    class Erased(MemoryStore):
        async def get_latest(self, user_id: str) -> StateSnapshot | None:
            await candidate.delete(user_id)
            return OLD

        async def upsert_latest(self, snapshot: StateSnapshot) -> None:  # noqa: ARG002
            raise UnavailableError("cut off", outcome_unknown=True)

    candidate = MemoryStore()
    shadow = Shadow(Erased(), candidate=candidate, clock=clock)
    with pytest.raises(UnavailableError):
        await shadow.upsert_latest(OLD)
    await clock.advance(1)
    assert mirrored(shadow) == {"ok": 1}
    assert await candidate.get_latest("u-1") is None


async def test_a_copy_of_nobody_writes_nothing() -> None:
    """When ``inner`` holds no such user, the candidate is not written to; that is no failure."""
    clock = FakeClock()
    inner, candidate = Simple(), Simple()
    candidate.kept["u-1"] = OLD
    inner.error = UnavailableError("cut off", outcome_unknown=True)
    shadow = Shadow(inner, candidate=candidate, clock=clock)
    with pytest.raises(UnavailableError):
        await shadow.upsert_latest(NEW)
    inner.error = None
    await clock.advance(1)
    assert mirrored(shadow) == {"ok": 1}
    assert "upsert" not in candidate.calls


# What is compared


async def test_outside_the_share_nothing_is_compared() -> None:
    """Neither alone nor in a batch."""
    candidate = Simple()
    shadow = Shadow(Simple(), candidate=candidate, share=0.0)
    await shadow.get_latest("u-1")
    await shadow.get_latest_many(["u-1", "u-2"])
    await settle()
    assert candidate.calls == []
    assert seen(shadow) == {}


async def test_what_a_write_under_way_left_in_inner_is_no_difference() -> None:
    """The candidate gets it when the write is answered; until then it has the one before."""
    inner, candidate = Late(), Simple()
    shadow = Shadow(inner, candidate=candidate)
    await shadow.upsert_latest(OLD)
    await settle()
    inner.gate = asyncio.Event()
    writing = asyncio.create_task(shadow.upsert_latest(NEW))
    await settle()
    assert await shadow.get_latest("u-1") == NEW
    await settle()
    assert await shadow.get_history("u-1", 5) == [NEW]
    await settle()
    assert seen(shadow) == {}
    inner.gate.set()
    await writing
    await shadow.get_latest("u-1")
    await settle()
    assert seen(shadow) == {"same": 1}


async def test_a_history_that_grew_meanwhile_is_no_difference() -> None:
    """Another process wrote to ``inner`` between the two looks."""
    inner, candidate = Simple(), Simple()
    shadow = Shadow(inner, candidate=candidate)
    inner.kept["u-1"], candidate.kept["u-1"] = OLD, state(0.7)
    candidate.gate = asyncio.Event()
    await shadow.get_history("u-1", 5)
    await settle()
    inner.kept["u-1"] = NEW
    candidate.gate.set()
    await settle()
    assert seen(shadow) == {}
    await shadow.get_history("u-1", 5)
    await settle()
    assert seen(shadow) == {"history": 1}


async def test_a_write_in_between_does_not_make_a_second_comparison_wait() -> None:
    """One waits at most, whether a write was put behind it or before it."""
    candidate = Simple()
    first = candidate.gate = asyncio.Event()
    shadow = Shadow(Simple(), candidate=candidate)
    await shadow.upsert_latest(OLD)
    await settle()
    await shadow.upsert_latest(NEW)
    await shadow.get_latest("u-1")  # waits behind the write
    await shadow.upsert_latest(state(0.3))
    await shadow.get_latest("u-1")
    assert shadow._background.pending == 4
    second = candidate.gate = asyncio.Event()
    first.set()
    await settle()  # the second write runs now, the comparison waits still
    await shadow.get_latest("u-1")
    assert shadow._background.pending == 3
    candidate.gate = None
    second.set()
    await settle()
    assert candidate.calls == ["upsert", "upsert", "get", "upsert"]


# Erasures


@pytest.mark.parametrize(("share", "copied"), [(0.0, False), (1.0, True)])
async def test_only_an_erasure_that_failed_is_followed_by_a_copy(
    share: float, copied: bool
) -> None:
    """And only for users who are mirrored; one that succeeded leaves nothing to do."""
    clock = FakeClock()
    inner, candidate = Simple(), Simple()
    shadow = Shadow(inner, candidate=candidate, share=share, clock=clock)
    await shadow.delete("u-1")
    assert clock.pending == 0
    inner.error = UnavailableError("down")
    with pytest.raises(UnavailableError):
        await shadow.delete("u-1")
    inner.error = None
    assert clock.pending == copied
    await clock.advance(1)
    assert mirrored(shadow) == ({"ok": 1} if copied else {})


async def test_an_erasure_that_the_candidate_left_unfinished_names_its_tiers() -> None:
    """The candidate may be a stack of its own."""
    candidate = Simple()
    candidate.error = ErasureIncompleteError("left", pending=("new redis",))
    with pytest.raises(ErasureIncompleteError) as caught:
        await Shadow(Simple(), candidate=candidate).delete("u-1")
    assert caught.value.pending == ("new redis",)
    candidate.error = ErasureIncompleteError("left", pending=())
    with pytest.raises(ErasureIncompleteError) as caught:
        await Shadow(Simple(), candidate=candidate).delete("u-1")
    assert caught.value.pending == ("Simple",)


# Whose call it is


async def test_the_candidates_calls_are_nobodys() -> None:
    """They run in a context of their own: what a caller had set there must not show."""
    mark: contextvars.ContextVar[str] = contextvars.ContextVar("mark", default="nobody's")
    found = []

    class Looking(MemoryStore):
        async def upsert_latest(self, snapshot: StateSnapshot) -> None:
            found.append(mark.get())
            await super().upsert_latest(snapshot)

    shadow = Shadow(MemoryStore(), candidate=Looking())
    mark.set("a caller's")
    await shadow.upsert_latest(OLD)
    await settle()
    assert found == ["nobody's"]


def test_a_user_whose_calls_run_on_another_event_loop() -> None:
    """Nothing is mirrored from here meanwhile, and a delete says that the candidate is left."""
    candidate = Simple()
    shadow = Shadow(Simple(), candidate=candidate)
    running, over = threading.Event(), threading.Event()

    async def busy() -> None:
        candidate.gate = asyncio.Event()
        await shadow.upsert_latest(OLD)
        await settle()
        running.set()
        await asyncio.to_thread(over.wait)
        candidate.gate.set()
        await settle()

    async def elsewhere() -> None:
        await shadow.upsert_latest(NEW)
        assert mirrored(shadow) == {"dropped": 1}
        with pytest.raises(ErasureIncompleteError) as caught:
            await shadow.delete("u-1")
        assert caught.value.pending == ("Simple",)
        assert candidate.calls == ["upsert"]
        for timer in shadow._background._timers:
            timer.cancel()  # of this loop, which ends here
        shadow._background._timers.clear()

    other = threading.Thread(target=lambda: asyncio.run(busy()))
    other.start()
    try:
        assert running.wait(10)
        asyncio.run(elsewhere())
    finally:
        over.set()
        other.join()
    assert mirrored(shadow)["ok"] == 1


def test_what_a_closed_event_loop_left_counts_no_more() -> None:
    """One that was stopped in the middle: the user is mirrored again from the next loop."""
    candidate = Simple()
    shadow = Shadow(Simple(), candidate=candidate)

    async def hang() -> None:
        candidate.gate = asyncio.Event()
        for value in (0.1, 0.2):
            await shadow.upsert_latest(state(value))
        await settle()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(hang())
    for task in asyncio.all_tasks(loop):
        task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    assert shadow._background.pending == 2

    async def go_on() -> None:
        candidate.gate = None
        await shadow.upsert_latest(state(0.9))
        await settle()

    asyncio.run(go_on())
    assert candidate.kept["u-1"] == state(0.9)
    assert mirrored(shadow) == {"ok": 1}
    assert shadow._background.pending == 0


# Ends


async def test_what_ends_after_the_layer_was_closed_starts_nothing() -> None:
    """A read and a write that were under way: counted as dropped, no timer, no task, no lane."""
    clock = FakeClock()
    inner, candidate = Simple(), Simple()
    inner.gate = asyncio.Event()
    shadow = Shadow(inner, candidate=candidate, clock=clock)
    reading = asyncio.create_task(shadow.get_latest("u-1"))
    writing = asyncio.create_task(shadow.upsert_latest(OLD))
    await settle()
    await shadow.aclose()
    before = asyncio.all_tasks()
    inner.gate.set()
    await asyncio.gather(reading, writing)
    assert mirrored(shadow) == {"dropped": 1}
    assert seen(shadow) == {"dropped": 1}
    assert (shadow._background.lanes, shadow._background.pending, clock.pending) == ({}, 0, 0)
    assert asyncio.all_tasks() <= before
    assert candidate.calls == []


async def test_a_delete_that_ends_while_the_layer_closes_starts_nothing() -> None:
    """Closing waits for what runs at the candidate; what a delete held up is not begun then."""
    candidate = Simple()
    shadow = Shadow(Simple(), candidate=candidate, clock=FakeClock())
    running = candidate.gate = asyncio.Event()
    await shadow.upsert_latest(OLD)
    await settle()
    erasing = candidate.gate = asyncio.Event()
    deleting = asyncio.create_task(shadow.delete("u-2"))
    await settle()
    await shadow.upsert_latest(state(user_id="u-2"))
    closing = asyncio.create_task(shadow.aclose())
    await settle()
    candidate.gate = asyncio.Event()  # what would begin now does not end
    erasing.set()
    await deleting
    running.set()
    await closing
    assert mirrored(shadow)["ok"] == 1
    assert candidate.calls == ["upsert", "delete"]
    assert (shadow._background.lanes, shadow._background.pending) == ({}, 0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_write_of_unknown_outcome_after_closing_waits_for_nothing() -> None:
    """Nobody is there to copy later; it is counted."""
    clock = FakeClock()
    inner = Simple()
    inner.gate = asyncio.Event()
    shadow = Shadow(inner, candidate=Simple(), clock=clock)
    writing = asyncio.create_task(shadow.upsert_latest(OLD))
    await settle()
    await shadow.aclose()
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert mirrored(shadow) == {"dropped": 1}
    assert clock.pending == 0


async def test_closing_leaves_no_count_of_what_waited() -> None:
    """What hangs is cut off after ``drain_seconds`` and what waits behind it is not begun."""
    clock = FakeClock()
    candidate = Simple()
    candidate.gate = asyncio.Event()
    shadow = Shadow(Simple(), candidate=candidate, timeout=60, drain_seconds=1, clock=clock)
    for value in (0.1, 0.2, 0.3):
        await shadow.upsert_latest(state(value))
    before = asyncio.all_tasks()
    closing = asyncio.create_task(shadow.aclose())
    await clock.advance(1)
    await closing
    assert candidate.calls == ["upsert"]
    assert mirrored(shadow) == {"dropped": 3}
    assert (shadow._background.lanes, shadow._background.pending) == ({}, 0)
    assert asyncio.all_tasks() < before


async def test_what_was_done_before_the_end_is_counted_once() -> None:
    """Of three writes one was made, one is cut off, one is not begun."""
    clock = FakeClock()
    candidate = Simple()
    shadow = Shadow(Simple(), candidate=candidate, timeout=60, drain_seconds=1, clock=clock)
    first = candidate.gate = asyncio.Event()
    for value in (0.1, 0.2, 0.3):
        await shadow.upsert_latest(state(value))
    await settle()
    candidate.gate = asyncio.Event()
    first.set()
    closing = asyncio.create_task(shadow.aclose())
    await clock.advance(1)
    await closing
    assert mirrored(shadow) == {"ok": 1, "dropped": 2}
    assert candidate.calls == ["upsert", "upsert"]


def test_closing_does_not_wait_for_another_event_loop() -> None:
    """Nor fail because something runs there; what waits there is not begun."""
    candidate = Simple()
    shadow = Shadow(Simple(), candidate=candidate)
    running, over = threading.Event(), threading.Event()

    async def busy() -> None:
        candidate.gate = asyncio.Event()
        await shadow.upsert_latest(OLD)
        await shadow.upsert_latest(NEW)
        await settle()
        running.set()
        await asyncio.to_thread(over.wait)
        candidate.gate.set()
        await settle()

    other = threading.Thread(target=lambda: asyncio.run(busy()))
    other.start()
    try:
        assert running.wait(10)
        asyncio.run(shadow.aclose())
    finally:
        over.set()
        other.join()
    assert mirrored(shadow) == {"ok": 1, "dropped": 1}


async def test_a_candidate_that_hangs_does_not_keep_the_stack_from_opening() -> None:
    """After the time limit it serves without."""
    clock = FakeClock()

    class Hanging(MemoryStore):
        async def open(self) -> None:
            await clock.sleep(1000)

    shadow = Shadow(MemoryStore(), candidate=Hanging(), timeout=2, clock=clock)
    opening = asyncio.create_task(shadow.open())
    await clock.advance(1.9)
    assert not opening.done()
    await clock.advance(0.2)
    await opening


async def test_a_degraded_inner_says_so_itself() -> None:
    """The candidate's message is not put over it."""

    class Degraded(MemoryStore):
        async def health_report(self) -> HealthReport:
            return HealthReport("MemoryStore", HealthStatus.DEGRADED, 0.0, "slow")

    class Down(MemoryStore):
        async def health_check(self) -> bool:
            return False

    report = await Shadow(Degraded(), candidate=Down()).health_report()
    assert (report.status, report.message) == (HealthStatus.DEGRADED, "")
    assert [child.message for child in report.children][0] == "slow"


# Arguments


async def test_its_authority_refuses_what_is_none() -> None:
    """Before anything is mirrored or erased."""
    candidate = Simple()
    shadow = Shadow(MemoryStore(), candidate=candidate)
    authority: Any = shadow.capability(Authority)
    for wrong in (authority.write("u-1"), authority.write_many(["u-1"]), authority.erase("")):
        with pytest.raises(ValidationError):
            await wrong
    assert candidate.calls == []
    assert shadow._background.lanes == {}


def test_options_at_their_bounds_and_what_names_them() -> None:
    """``drain_seconds`` may be 0; two classes of snapshots are refused in the layer's name."""

    class Mood(StateSnapshot):
        mood: str = ""

    assert Shadow(MemoryStore(), candidate=MemoryStore(), drain_seconds=0)._drain == 0
    with pytest.raises(ConfigError) as caught:
        Shadow(MemoryStore(), candidate=MemoryStore(snapshot_type=Mood))
    assert caught.value.layer == "Shadow"


@pytest.mark.parametrize("begun", [False, True])
def test_an_event_loop_that_ends_leaves_nothing_of_the_background(
    caplog: pytest.LogCaptureFixture, *, begun: bool
) -> None:
    """Nobody closed the layer: what runs is cut off, what waits is dropped, all of it counted."""
    gc.collect()  # what other tests left behind says so now
    caplog.clear()

    class Hangs(MemoryStore):
        async def upsert_latest(self, snapshot: StateSnapshot) -> None:
            await asyncio.Event().wait()

    store = Shadow(MemoryStore(), candidate=Hangs())

    async def main() -> None:
        for number in range(3):
            await store.upsert_latest(StateSnapshot("u-1", number))
        if begun:
            await asyncio.sleep(0)

    asyncio.run(main())
    gc.collect()
    assert not caplog.records, "such as: task was destroyed but it is pending"
    assert store._background.lanes == {}
    assert store._background.pending == 0
    assert store.mirrored == {"ok": 0, "error": 0, "dropped": 3}


async def test_an_erasure_from_another_event_loop_takes_nothing_from_the_candidate() -> None:
    """It says that the candidate may hold the user; what is mirrored here goes on."""
    entered, over = threading.Event(), threading.Event()

    class Held(MemoryStore):
        async def erase(self, user_id: str, tiers: Any = ()) -> int:
            version = await super().erase(user_id, tiers)
            entered.set()
            over.wait()
            return version

    candidate = Simple()
    candidate.gate = asyncio.Event()
    shadow = Shadow(Held(), candidate=candidate)
    await shadow.upsert_latest(OLD)
    await settle()

    def elsewhere() -> None:
        with pytest.raises(ErasureIncompleteError) as caught:
            asyncio.run(shadow.delete("u-1"))
        assert caught.value.pending == ("Simple",)

    erasing = asyncio.create_task(asyncio.to_thread(elsewhere))
    await asyncio.to_thread(entered.wait)
    candidate.gate.set()
    await shadow.upsert_latest(NEW)
    await settle()
    over.set()
    await erasing
    await settle()
    assert await shadow.get_latest("u-1") == NEW
    assert candidate.kept == {"u-1": NEW}
    assert shadow.mirrored == {"ok": 2, "error": 0, "dropped": 0}
    await settle()
    assert not shadow._background.lanes
    await shadow.delete("u-1")
    assert candidate.kept == {}
