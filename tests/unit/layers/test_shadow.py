"""Shadow: callers notice nothing, differences are counted, erasures reach both."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from layered_store import (
    Cached,
    ConfigError,
    ErasureIncompleteError,
    HealthStatus,
    MemoryStore,
    Retry,
    Shadow,
    StateSnapshot,
    StateStore,
    UnavailableError,
    ValidationError,
    WriteThrough,
    describe,
    load_stack,
    replace,
    to_config,
)
from layered_store.coherence.contract import Authority, CacheTier
from layered_store.enumerable import Enumerable
from layered_store.sharing import place_of
from layered_store.stack import kind_of
from layered_store.testing import check_layer, check_store
from layered_store.testing.clock import FakeClock, settle
from layered_store.testing.explore import LoopClock, explore


class Mood(StateSnapshot):
    mood: str = ""


class Trial(MemoryStore):
    """A candidate that fails, hangs and counts as told."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.error: Exception | None = None
        self.gate: asyncio.Event | None = None
        self.calls: list[str] = []
        self.inside = 0
        self.most_inside = 0

    async def _enter(self, name: str) -> None:
        self.calls.append(name)
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        try:
            if self.gate is not None:
                await self.gate.wait()
            if self.error is not None:
                raise self.error
        finally:
            self.inside -= 1

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        await self._enter("get")
        return await super().get_latest(user_id)

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        await self._enter("upsert")
        await super().upsert_latest(snapshot)

    async def delete(self, user_id: str) -> None:
        await self._enter("delete")
        await super().delete(user_id)

    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        await self._enter("history")
        return await super().get_history(user_id, limit)


class Plain(StateStore):
    """A store without versions, whose answers to writes can be held back."""

    def __init__(self) -> None:
        self.kept: dict[str, StateSnapshot] = {}
        self.hold: dict[float, asyncio.Event] = {}

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        return self.kept.get(user_id)

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        self.kept[snapshot.user_id] = snapshot
        if (held := self.hold.get(snapshot.get_axis("a"))) is not None:
            await held.wait()

    async def delete(self, user_id: str) -> None:
        self.kept.pop(user_id, None)


def state(user_id: str = "u-1", value: float = 0.5, at: int = 5) -> StateSnapshot:
    return StateSnapshot(user_id, updated_at_unix_ms=at, axes={"a": value})


def seen(shadow: Shadow) -> dict[str, int]:
    return {result: count for result, count in shadow.differences.items() if count}


def mirrored(shadow: Shadow) -> dict[str, int]:
    return {outcome: count for outcome, count in shadow.mirrored.items() if count}


async def test_it_is_a_store_and_a_layer_like_any_other() -> None:
    """Every rule of stores and every law of layers holds."""
    report = await check_store(lambda: Shadow(MemoryStore(), candidate=MemoryStore()))
    assert report.ok, str(report)
    laws = await check_layer(
        lambda inner: Shadow(inner, candidate=MemoryStore(snapshot_type=inner.snapshot_type))
    )
    assert laws.ok, str(laws)


# Mirroring


async def test_writes_and_reads_are_mirrored_and_compared() -> None:
    """The candidate has what was written, history included, and its answers agree."""
    candidate = Trial()
    shadow = Shadow(MemoryStore(), candidate=candidate)
    for number in range(3):
        await shadow.upsert_latest(state(value=number / 10, at=number))
    await shadow.upsert_latest_many([state("u-2"), state("u-3", 0.1), state("u-3", 0.2)])
    await settle()
    assert mirrored(shadow) == {"ok": 6}
    assert await candidate.get_latest("u-1") == state(value=0.2, at=2)
    assert len(await candidate.get_history("u-1", 9)) == 3
    assert [s.get_axis("a") for s in await candidate.get_history("u-3", 9)] == [0.2, 0.1]
    assert await shadow.get_latest("u-1") == state(value=0.2, at=2)
    assert len(await shadow.get_latest_many(["u-2", "u-3", "nobody"])) == 2
    await settle()
    assert len(await shadow.get_history("u-1", 2)) == 2
    await settle()
    assert seen(shadow) == {"same": 5}


async def test_each_kind_of_difference_is_counted() -> None:
    """missing, extra, older, newer, value, history, error."""
    inner, candidate = MemoryStore(), Trial()
    shadow = Shadow(inner, candidate=candidate)
    cases: list[tuple[str, StateSnapshot | None, StateSnapshot | None]] = [
        ("missing", state("u-1"), None),
        ("extra", None, state("u-2")),
        ("older", state("u-3", at=9), state("u-3", at=8)),
        ("newer", state("u-4", at=8), state("u-4", at=9)),
        ("value", state("u-5", 0.1), state("u-5", 0.2)),
    ]
    for number, (kind, ours, theirs) in enumerate(cases, 1):
        for store, snapshot in ((inner, ours), (candidate, theirs)):
            if snapshot is not None:
                await store.upsert_latest(snapshot)
        assert await shadow.get_latest(f"u-{number}") == ours
        await settle()
        assert seen(shadow)[kind] == 1
    await shadow.get_history("u-5", 9)
    await settle()
    assert seen(shadow)["history"] == 1
    candidate.error = RuntimeError("boom")
    assert await shadow.get_latest("u-1") == state("u-1")
    await settle()
    assert seen(shadow)["error"] == 1
    assert sum(seen(shadow).values()) == 7


async def test_a_history_is_compared_as_far_as_both_have_it() -> None:
    """A candidate that began later has a shorter one, which is no difference; none at all is."""
    inner, candidate = MemoryStore(), Trial()
    shadow = Shadow(inner, candidate=candidate)
    await inner.upsert_latest(state(value=0.1))
    await shadow.get_history("u-1", 9)
    await settle()
    assert seen(shadow) == {"history": 1}
    await shadow.upsert_latest(state(value=0.2))
    await settle()
    await shadow.get_history("u-1", 9)
    await settle()
    assert seen(shadow) == {"history": 1, "same": 1}


async def test_a_user_who_was_written_meanwhile_is_no_difference() -> None:
    """The second look finds another answer, so the first told nothing."""
    inner, candidate = MemoryStore(), Trial()
    shadow = Shadow(inner, candidate=candidate)
    await inner.upsert_latest(state(value=0.1))
    candidate.gate = asyncio.Event()
    await shadow.get_latest("u-1")
    await settle()
    await inner.upsert_latest(state(value=0.2))  # by another process
    candidate.gate.set()
    await settle()
    assert seen(shadow) == {}
    assert candidate.calls == ["get"]


# Callers notice nothing


async def test_a_candidate_that_hangs_costs_nobody_anything() -> None:
    """Calls end as they would without it; what hangs is cut off after the time limit."""
    clock = FakeClock()
    candidate = Trial()
    candidate.gate = asyncio.Event()
    shadow = Shadow(MemoryStore(), candidate=candidate, timeout=2, clock=clock)
    await shadow.upsert_latest(state())
    assert await shadow.get_latest("u-1") == state()
    await settle()
    assert candidate.inside == 1
    await clock.advance(1.9)
    assert candidate.inside == 1
    await clock.advance(2.3)
    assert candidate.inside == 0
    assert mirrored(shadow) == {"error": 1}
    assert seen(shadow) == {"error": 1}


@pytest.mark.parametrize("error", [UnavailableError("down"), RuntimeError("bug")])
async def test_errors_of_the_candidate_reach_nobody(error: Exception) -> None:
    """They are counted and nothing else."""
    candidate = Trial()
    candidate.error = error
    shadow = Shadow(MemoryStore(), candidate=candidate)
    await shadow.upsert_latest(state())
    await shadow.upsert_latest_many([state("u-2")])
    assert await shadow.get_latest("u-1") == state()
    await settle()
    assert mirrored(shadow) == {"error": 2}
    assert seen(shadow) == {"error": 1}


async def test_errors_of_inner_are_the_callers_and_nothing_is_mirrored() -> None:
    """A write that inner refused is not stored at the candidate."""

    class Down(MemoryStore):
        async def upsert_latest(self, snapshot: StateSnapshot) -> None:
            raise ValidationError("refused")

        async def get_latest(self, user_id: str) -> StateSnapshot | None:
            raise UnavailableError("down")

    candidate = Trial()
    shadow = Shadow(Down(), candidate=candidate)
    with pytest.raises(ValidationError):
        await shadow.upsert_latest(state())
    with pytest.raises(UnavailableError):
        await shadow.get_latest("u-1")
    await settle()
    assert candidate.calls == []
    assert mirrored(shadow) == {}
    assert shadow._background.lanes == {}


async def test_the_background_is_bounded_and_what_is_too_much_is_counted() -> None:
    """At most max_pending calls wait or run; the rest is dropped, and the count says so."""
    candidate = Trial()
    candidate.gate = asyncio.Event()
    shadow = Shadow(MemoryStore(), candidate=candidate, max_pending=3)
    for number in range(10):
        await shadow.upsert_latest(state(f"u-{number}"))
    await settle()
    assert candidate.most_inside == 3
    assert mirrored(shadow) == {"dropped": 7}
    assert len(shadow._background.lanes) == 3
    for number in range(10):
        await shadow.get_latest(f"u-{number}")
    assert seen(shadow) == {"dropped": 10}
    candidate.gate.set()
    await settle()
    assert mirrored(shadow) == {"dropped": 7, "ok": 3}
    assert shadow._background.lanes == {}


async def test_one_comparison_of_a_user_waits_at_a_time() -> None:
    """A user who is read a thousand times is compared as often as the candidate can."""
    candidate = Trial()
    candidate.gate = asyncio.Event()
    shadow = Shadow(MemoryStore(), candidate=candidate)
    for _ in range(50):
        await shadow.get_latest("u-1")
    await settle()
    for _ in range(50):
        await shadow.get_latest("u-1")
    candidate.gate.set()
    await settle()
    assert candidate.calls == ["get", "get"]
    assert seen(shadow) == {"same": 2}


async def test_the_share_is_of_the_same_users_each_time() -> None:
    """About as many as asked for, and those in a smaller share are in a larger one."""
    candidates = {}
    for share in (0.0, 0.2, 0.5, 1.0):
        candidate = candidates[share] = Trial()
        shadow = Shadow(MemoryStore(), candidate=candidate, share=share, max_pending=10_000)
        await shadow.upsert_latest_many([state(f"u-{n}") for n in range(500)])
        await shadow.aclose()
    found = {share: set(each._users) for share, each in candidates.items()}
    assert found[0.0] == set()
    assert 70 <= len(found[0.2]) <= 130
    assert found[0.2] < found[0.5] < found[1.0]
    assert len(found[1.0]) == 500
    other = {f"u-{n}" for n in range(500) if place_of(f"u-{n}", "other") < 0.2}
    assert other != found[0.2]


# Order


async def test_writes_of_a_user_reach_the_candidate_in_their_order() -> None:
    """Also when the candidate is slow."""
    candidate = Trial()
    candidate.gate = asyncio.Event()
    shadow = Shadow(MemoryStore(), candidate=candidate)
    for number in range(5):
        await shadow.upsert_latest(state(value=number / 10))
    candidate.gate.set()
    await settle()
    found = [s.get_axis("a") for s in await candidate.get_history("u-1", 9)]
    assert found == [0.4, 0.3, 0.2, 0.1, 0.0]


async def test_writes_at_the_same_time_leave_both_with_the_same_winner() -> None:
    """Answers may come in another order than commits: the candidate gets what inner holds."""
    inner, candidate = Plain(), Trial()
    inner.hold[0.1] = asyncio.Event()
    shadow = Shadow(inner, candidate=candidate)
    first = asyncio.create_task(shadow.upsert_latest(state(value=0.1)))
    await settle()
    await shadow.upsert_latest(state(value=0.2))
    inner.hold[0.1].set()
    await first
    await settle()
    assert inner.kept["u-1"] == state(value=0.2)
    assert await candidate.get_latest("u-1") == state(value=0.2)


async def test_a_write_of_unknown_outcome_is_looked_up_later() -> None:
    """After it had its time, the candidate is given what inner holds."""

    class LosesReply(MemoryStore):
        async def upsert_latest(self, snapshot: StateSnapshot) -> None:
            await super().upsert_latest(snapshot)
            raise UnavailableError("the reply was lost", outcome_unknown=True)

    clock = FakeClock()
    candidate = Trial()
    shadow = Shadow(LosesReply(), candidate=candidate, clock=clock)
    with pytest.raises(UnavailableError):
        await shadow.upsert_latest(state())
    await settle()
    assert candidate.calls == []
    await clock.advance(1)
    assert await candidate.get_latest("u-1") == state()


async def test_a_repeated_attempt_is_mirrored_once() -> None:
    """The write keeps its identity at the candidate."""

    class LosesReply(MemoryStore):
        lost = False

        async def write(self, snapshot: StateSnapshot) -> Any:
            record = await super().write(snapshot)
            if not self.lost:
                self.lost = True
                raise UnavailableError("the reply was lost", outcome_unknown=True)
            return record

    clock = FakeClock()
    candidate = Trial()
    stack = Retry(Shadow(LosesReply(), candidate=candidate, clock=clock), base_delay=0.0)
    await stack.upsert_latest(state())
    await clock.advance(2)
    assert len(await candidate.get_history("u-1", 9)) == 1


# Erasing


async def test_a_delete_reaches_both_for_every_user() -> None:
    """Whatever the share is now: the candidate may hold the user from before."""
    inner, candidate = MemoryStore(), Trial()
    for store in (inner, candidate):
        await store.upsert_latest(state())
    shadow = Shadow(inner, candidate=candidate, share=0.0)
    await shadow.delete("u-1")
    assert await inner.get_latest("u-1") is None
    assert await candidate.get_latest("u-1") is None
    assert await candidate.get_history("u-1", 9) == []


@pytest.mark.parametrize("error", [UnavailableError("down"), RuntimeError("bug")])
async def test_a_delete_that_missed_the_candidate_says_so(error: Exception) -> None:
    """The user is erased in inner; pending names the candidate; repeating finishes."""
    inner, candidate = MemoryStore(), Trial()
    shadow = Shadow(inner, candidate=candidate)
    await shadow.upsert_latest(state())
    await settle()
    candidate.error = error
    with pytest.raises(ErasureIncompleteError) as caught:
        await shadow.delete("u-1")
    assert caught.value.pending == ("Trial",)
    assert caught.value.retryable
    assert "u-1" not in str(caught.value)
    assert await inner.get_latest("u-1") is None
    candidate.error = None
    await shadow.delete("u-1")
    assert await candidate.get_latest("u-1") is None


async def test_a_delete_waits_for_a_hanging_candidate_so_long_and_no_longer() -> None:
    """The time limit holds for erasures too, and then they are incomplete."""
    clock = FakeClock()
    candidate = Trial()
    candidate.gate = asyncio.Event()
    shadow = Shadow(MemoryStore(), candidate=candidate, timeout=1, clock=clock)
    await shadow.upsert_latest(state())
    task = asyncio.create_task(shadow.delete("u-1"))
    await clock.advance(2.5)
    with pytest.raises(ErasureIncompleteError):
        await task


async def test_an_error_of_inner_is_told_as_it_is() -> None:
    """The candidate erases all the same; what inner still holds is mirrored again later."""

    class Down(MemoryStore):
        down = True

        async def delete(self, user_id: str) -> None:
            if self.down:
                raise UnavailableError("down")
            await super().delete(user_id)

    clock = FakeClock()
    inner, candidate = Down(), Trial()
    shadow = Shadow(inner, candidate=candidate, clock=clock)
    await shadow.upsert_latest(state())
    await settle()
    with pytest.raises(UnavailableError):
        await shadow.delete("u-1")
    assert await candidate.get_latest("u-1") is None
    await clock.advance(1)
    assert await candidate.get_latest("u-1") == state()
    candidate.error = UnavailableError("down")
    inner.down = False
    with pytest.raises(ErasureIncompleteError):
        await shadow.delete("u-1")


async def test_an_incomplete_erasure_below_names_all_that_is_pending() -> None:
    """What inner could not reach and the candidate, outermost first."""

    class Partly(MemoryStore):
        async def delete(self, user_id: str) -> None:
            raise ErasureIncompleteError(pending=["RedisStore"])

    candidate = Trial()
    shadow = Shadow(Partly(), candidate=Retry(candidate, attempts=1))
    with pytest.raises(ErasureIncompleteError) as caught:
        await shadow.delete("u-1")
    assert caught.value.pending == ("RedisStore",)
    candidate.error = UnavailableError("down")
    with pytest.raises(ErasureIncompleteError) as caught:
        await shadow.delete("u-1")
    assert caught.value.pending == ("RedisStore", "Trial")


async def test_what_waits_for_the_candidate_does_not_bring_a_user_back() -> None:
    """Writes mirrored before the erasure are dropped, the one under way is waited for."""
    inner, candidate = MemoryStore(), Plain()
    held = candidate.hold[0.1] = asyncio.Event()
    shadow = Shadow(inner, candidate=candidate)
    for value in (0.1, 0.2, 0.3):
        await shadow.upsert_latest(state(value=value))
    await settle()
    task = asyncio.create_task(shadow.delete("u-1"))
    await settle()
    assert not task.done()
    held.set()
    await task
    await settle()
    assert candidate.kept == {}
    assert shadow._background.lanes == {}
    await shadow.upsert_latest(state(value=0.4))
    await settle()
    assert candidate.kept["u-1"] == state(value=0.4)


async def test_a_write_that_an_erasure_overtook_does_not_bring_the_user_back() -> None:
    """When the two overlap, the candidate is given what inner holds in the end."""
    inner, candidate = MemoryStore(), Plain()
    gate = asyncio.Event()

    class Slow(MemoryStore):
        async def upsert_latest(self, snapshot: StateSnapshot) -> None:
            await gate.wait()
            await super().upsert_latest(snapshot)

    inner = Slow()
    shadow = Shadow(inner, candidate=candidate)
    task = asyncio.create_task(shadow.upsert_latest(state()))
    await settle()
    await shadow.delete("u-1")
    gate.set()
    await task
    await settle()
    assert await inner.get_latest("u-1") is None
    assert candidate.kept == {}


async def test_a_write_within_an_erasure_that_ends_first_does_not_bring_the_user_back() -> None:
    """The write began second and lost in inner; its caller hears of it last."""
    erasing, writing = asyncio.Event(), asyncio.Event()

    class Slow(MemoryStore):
        async def upsert_latest(self, snapshot: StateSnapshot) -> None:
            await super().upsert_latest(snapshot)
            await writing.wait()

        async def delete(self, user_id: str) -> None:
            await erasing.wait()
            await super().delete(user_id)

    inner, candidate = Slow(), Plain()
    shadow = Shadow(inner, candidate=candidate)
    delete = asyncio.create_task(shadow.delete("u-1"))
    await settle()
    write = asyncio.create_task(shadow.upsert_latest(state()))
    await settle()
    erasing.set()
    await delete
    writing.set()
    await write
    await settle()
    assert await inner.get_latest("u-1") is None
    assert candidate.kept == {}


@pytest.mark.parametrize("deletes", [1, 2])
async def test_a_write_that_stands_behind_an_erasure_under_way_reaches_the_candidate(
    deletes: int,
) -> None:
    """What inner took after the erasure had its effect there is no longer waiting from before."""
    gate = asyncio.Event()

    class Slow(MemoryStore):
        async def delete(self, user_id: str) -> None:
            await super().delete(user_id)
            await gate.wait()

    inner, candidate = Slow(), MemoryStore()
    shadow = Shadow(inner, candidate=candidate)
    tasks = [asyncio.create_task(shadow.delete("u-1")) for _ in range(deletes)]
    await settle()
    await shadow.upsert_latest(state())
    await settle()
    assert await candidate.get_latest("u-1") is None
    gate.set()
    await asyncio.gather(*tasks)
    await settle()
    assert await inner.get_latest("u-1") == state()
    assert await candidate.get_latest("u-1") == state()
    assert shadow._background.lanes == {}


async def test_comparisons_go_on_after_an_erasure() -> None:
    """One that waited is dropped with all that waited, and the next is made."""
    candidate = Trial()
    shadow = Shadow(MemoryStore(), candidate=candidate)
    candidate.gate = asyncio.Event()
    await shadow.upsert_latest(state())
    await settle()
    await shadow.get_latest("u-1")
    erasing = asyncio.create_task(shadow.delete("u-1"))
    await settle()
    await shadow.get_latest("u-1")
    candidate.gate.set()
    await erasing
    await settle()
    assert seen(shadow) == {"same": 1}
    await shadow.get_latest("u-1")
    await settle()
    assert seen(shadow) == {"same": 2}
    assert shadow._background.pending == 0


async def test_a_cancelled_delete_leaves_nothing_held() -> None:
    """Cancellation passes at once; later calls of the user are mirrored as before."""
    clock = FakeClock()
    candidate = Trial()
    shadow = Shadow(MemoryStore(), candidate=candidate, clock=clock)
    await shadow.upsert_latest(state())
    await settle()
    candidate.gate = asyncio.Event()
    task = asyncio.create_task(shadow.delete("u-1"))
    await settle()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    candidate.gate.set()
    await shadow.upsert_latest(state(value=0.9))
    await clock.advance(1)
    assert await candidate.get_latest("u-1") == state(value=0.9)
    assert shadow._background.lanes == {}


async def test_erasures_are_final_under_every_interleaving() -> None:
    """Readers, writers and erasers in any order: in the end both stores hold the same."""

    async def scenario() -> None:
        clock = LoopClock()
        inner, candidate = MemoryStore(clock=clock), MemoryStore(clock=clock)
        shadow = Shadow(inner, candidate=candidate, clock=clock)

        async def write(value: float) -> None:
            await asyncio.sleep(0)
            await shadow.upsert_latest(state(value=value))

        async def erase() -> None:
            await asyncio.sleep(0)
            await shadow.delete("u-1")
            if await inner.get_latest("u-1") is None:
                assert await candidate.get_latest("u-1") is None

        async def read() -> None:
            await shadow.get_latest("u-1")

        await asyncio.gather(write(0.1), read(), erase(), write(0.2), read(), erase(), write(0.3))
        await clock.sleep(2)
        assert await candidate.get_latest("u-1") == await inner.get_latest("u-1")
        assert not {"value", "extra", "missing"} & set(seen(shadow))
        assert shadow._background.lanes == {}
        await shadow.aclose()

    found = await asyncio.to_thread(explore, scenario, schedules=150, seed=5)
    assert found


# Ends


async def test_closing_drains_what_waits() -> None:
    """What was acknowledged reaches the candidate; then both are closed, and twice is fine."""
    inner, candidate = MemoryStore(), Trial()
    shadow = Shadow(inner, candidate=candidate)
    await shadow.upsert_latest_many([state(f"u-{n}") for n in range(20)])
    await shadow.aclose()
    await shadow.aclose()
    assert mirrored(shadow) == {"ok": 20}
    assert inner._closed
    assert candidate._closed


async def test_an_erasure_under_way_reaches_both_before_they_are_closed() -> None:
    """The candidate would hold the user for good otherwise."""
    inner, candidate = Trial(), MemoryStore()
    shadow = Shadow(inner, candidate=candidate)
    inner.gate = asyncio.Event()
    erasure = asyncio.create_task(shadow.delete("u-1"))
    await settle()
    closing = asyncio.create_task(shadow.aclose())
    await settle()
    assert not closing.done()
    inner.gate.set()
    await erasure
    await closing
    assert candidate._closed


async def test_closing_does_not_wait_for_ever() -> None:
    """A candidate that hangs is left after drain_seconds, what it missed is counted, no task
    stays."""
    clock = FakeClock()
    candidate = Trial()
    candidate.gate = asyncio.Event()
    shadow = Shadow(MemoryStore(), candidate=candidate, timeout=60, drain_seconds=1, clock=clock)
    before = asyncio.all_tasks()
    for value in (0.1, 0.2):
        await shadow.upsert_latest(state(value=value))
    closing = asyncio.create_task(shadow.aclose())
    await clock.advance(1)
    await closing
    assert mirrored(shadow) == {"dropped": 2}
    assert asyncio.all_tasks() == before


async def test_open_and_health_are_those_of_inner() -> None:
    """A candidate that is down neither keeps the stack from opening nor makes it unhealthy."""

    class Down(MemoryStore):
        async def open(self) -> None:
            raise UnavailableError("down")

        async def health_check(self) -> bool:
            return False

    async with Shadow(MemoryStore(), candidate=Down()) as shadow:
        report = await shadow.health_report()
        assert report.status is HealthStatus.DEGRADED
        assert "candidate is down" in report.message
        assert await shadow.health_check()
    opened = []

    class Opening(MemoryStore):
        async def open(self) -> None:
            opened.append(self)

    async with Shadow(MemoryStore(), candidate=Opening()) as shadow:
        assert opened == [shadow.candidate]
        assert (await shadow.health_report()).status is HealthStatus.HEALTHY
    down = Shadow(Down(), candidate=MemoryStore())
    assert (await down.health_report()).status is HealthStatus.UNHEALTHY
    with pytest.raises(UnavailableError):
        await down.open()


# In a stack


async def test_it_stands_at_the_origin_of_a_write_through() -> None:
    """Versions pass, and what passes as a versioned read, write or erasure is mirrored too."""
    old, new, tier = MemoryStore(), Trial(), MemoryStore()
    shadow = Shadow(old, candidate=new)
    stack = Cached(WriteThrough(tier, origin=shadow))
    await stack.upsert_latest(state())
    await stack.upsert_latest_many([state("u-2"), state("u-3")])
    await settle()
    assert await new.get_latest("u-1") == state()
    assert await new.get_latest("u-3") == state("u-3")
    authority = shadow.capability(Authority)
    assert authority is not None
    assert (await authority.read("u-1")) == await old.read("u-1")
    await settle()
    assert seen(shadow) == {"same": 1}
    await authority.read_many(["u-1", "u-2"])
    await settle()
    assert seen(shadow) == {"same": 3}
    await stack.delete("u-1")
    assert await new.get_latest("u-1") is None
    new.error = UnavailableError("down")
    with pytest.raises(ErasureIncompleteError):
        await authority.erase("u-2", ("tier",))
    assert await old.get_latest("u-2") is None
    assert await old.debts("u-2") == ["tier"]
    assert shadow.capability(CacheTier) is None
    assert shadow.capability(Shadow) is shadow
    assert shadow.capability(Enumerable) is not None


async def test_its_figures_are_samples() -> None:
    """What differences and mirrored give, metrics export."""
    shadow = Shadow(MemoryStore(), candidate=Trial())
    await shadow.upsert_latest(state())
    await settle()
    found = {(s.metric, s.labels): s.value for s in shadow.samples()}
    assert found["shadow_writes", ("ok",)] == 1
    assert found["shadow_comparisons", ("missing",)] == 0
    assert found["shadow_pending", ()] == 0


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"share": 1.1}, "share"),
        ({"share": -0.1}, "share"),
        ({"timeout": 0}, "timeout"),
        ({"max_pending": 0}, "max_pending"),
        ({"drain_seconds": -1}, "drain_seconds"),
        ({"salt": 5}, "salt"),
        ({"salt": "x" * 65}, "salt"),
        ({"salt": "\udcff"}, "salt"),
        ({"clock": None}, "clock"),
        ({"candidate": None}, "candidate"),
        ({"candidate": MemoryStore(snapshot_type=Mood)}, "snapshot_type"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], option: str) -> None:
    """The error names the option."""
    with pytest.raises(ConfigError) as caught:
        Shadow(MemoryStore(), **{"candidate": MemoryStore(), **options})
    assert caught.value.option == option


def test_it_comes_from_a_config_file_and_can_be_swapped() -> None:
    """Options in, options out; each of the two can be replaced."""
    config = {
        "store": {
            "use": "shadow",
            "share": 0.25,
            "inner": {"use": "memory"},
            "candidate": {"use": "memory", "history_limit": 5},
        }
    }
    stack = load_stack(config)
    assert to_config(stack) == config
    assert [block.path for block in describe(stack)] == ["", "inner", "candidate"]
    assert isinstance(stack, Shadow)
    new = MemoryStore(history_limit=7)
    swapped = replace(stack, stack.candidate, new)
    assert isinstance(swapped, Shadow)
    assert swapped.candidate is new
    assert swapped.share == 0.25
    assert kind_of(swapped) == "shadow"


def test_a_loop_that_ended_leaves_no_user_stuck() -> None:
    """What one event loop left behind does not keep the next one from mirroring."""
    candidate = Trial()
    shadow = Shadow(MemoryStore(), candidate=candidate)

    async def hang() -> None:
        candidate.gate = asyncio.Event()
        await shadow.upsert_latest(state())
        await settle()

    async def go_on() -> None:
        candidate.gate = None
        await shadow.upsert_latest(state(value=0.9))
        await settle()

    asyncio.run(hang())
    asyncio.run(go_on())
    assert mirrored(shadow)["ok"] == 1
    assert shadow._background.pending == 0


async def test_an_unfinished_delete_says_all_that_is_left() -> None:
    """The tiers inside a side by their own names, with the user and the layer as attributes."""
    inner, candidate = Trial(), Trial()
    inner.error = ErasureIncompleteError("left", pending=("redis", "l1"))
    candidate.error = UnavailableError("down")
    shadow = Shadow(inner, candidate=candidate)
    with pytest.raises(ErasureIncompleteError) as caught:
        await shadow.delete("u-1")
    assert caught.value.pending == ("redis", "l1", "Trial")
    assert (caught.value.layer, caught.value.user_id) == ("Shadow", "u-1")
    assert shadow._background.lanes == {}


async def test_both_down_is_down() -> None:
    """The candidate's own state never makes the report better."""

    class Down(Trial):
        async def health_check(self) -> bool:
            return False

    assert (await Shadow(Down(), candidate=Down()).health_report()).status is (
        HealthStatus.UNHEALTHY
    )


async def test_writes_that_failed_are_copied_later_within_bounds() -> None:
    """At most ``max_pending`` wait for their time, more are dropped; closing drops those too."""
    clock = FakeClock()
    inner, candidate = Trial(), Trial()
    shadow = Shadow(inner, candidate=candidate, timeout=1, max_pending=2, clock=clock)
    inner.error = UnavailableError("cut off", outcome_unknown=True)
    for number in range(3):
        with pytest.raises(UnavailableError):
            await shadow.upsert_latest(state(f"u-{number}"))
    assert mirrored(shadow) == {"dropped": 1}
    inner.error = None
    await MemoryStore.upsert_latest(inner, state("u-0"))
    await clock.advance(1)
    await settle()
    assert not shadow._background._timers
    assert await MemoryStore.get_latest(candidate, "u-0") == state("u-0")
    assert await MemoryStore.get_latest(candidate, "u-1") is None
    assert mirrored(shadow) == {"dropped": 1, "ok": 2}
    inner.error = UnavailableError("cut off", outcome_unknown=True)
    with pytest.raises(UnavailableError):
        await shadow.upsert_latest(state("u-3"))
    await shadow.aclose()
    assert mirrored(shadow) == {"dropped": 2, "ok": 2}
    assert clock.pending == 0


async def test_an_empty_history_is_compared_with_nothing() -> None:
    """The candidate may know only of what was written since; nor is it asked outside the share."""
    candidate = Trial()
    shadow = Shadow(MemoryStore(), candidate=candidate)
    assert await shadow.get_history("u-1", 5) == []
    await settle()
    assert candidate.calls == []
    inner = MemoryStore()
    await inner.upsert_latest(state())
    outside = Shadow(inner, candidate=candidate, share=0.0, drain_seconds=0)
    assert await outside.get_history("u-1", 5) == [state()]
    await settle()
    assert candidate.calls == []
    await outside.delete("u-1")
    assert candidate.calls == ["delete"]  # erasures reach everybody's copy
