"""Cached at its edges: loads taken over, cancelled or shared by batches, answers that are wrong."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cachetools
import pytest

from layered_store.call import current_call
from layered_store.coherence.contract import Notice
from layered_store.errors import (
    ClosedError,
    ConfigError,
    CorruptDataError,
    StoreError,
    UnavailableError,
)
from layered_store.explaining import Held
from layered_store.interface import Op
from layered_store.layers.cached import Cached
from layered_store.layers.prefixed import Prefixed
from layered_store.layers.ramp import Ramp
from layered_store.layers.retry import Retry
from layered_store.layers.write_through import WriteThrough
from layered_store.snapshot import StateSnapshot
from layered_store.stack import describe, find
from layered_store.stores.memory import MemoryStore
from layered_store.testing.clock import FakeClock, settle
from layered_store.testing.faults import Faults
from layered_store.testing.scripted import Gate, Scripted


def state(value: float = 0.5, user_id: str = "u-1") -> StateSnapshot:
    return StateSnapshot(user_id, 0, axes={"a": value})


OLD, NEW = state(0.1), state(0.2)
OTHER = state(0.3, "somebody-else")


class Slow(Cached):
    """One whose reads never take the hot path, as those of any subclass that changes them."""

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        return await super().get_latest(user_id)


class Told:
    """A channel, as far as a cache asks it."""

    def detach(self, cache: Cached) -> None:
        """Do nothing."""


def counted(cache: Cached) -> dict[str, float]:
    return {s.labels[0]: s.value for s in cache.samples() if s.metric == "reads" and s.value}


# Options


@pytest.mark.parametrize("option", ["clock", "random"])
def test_a_source_that_is_none_is_refused_by_name(option: str) -> None:
    """Of time and of chance."""
    arguments: Any = {option: 5}
    with pytest.raises(ConfigError) as caught:
        Cached(MemoryStore(), **arguments)
    assert (caught.value.option, caught.value.layer) == (option, "Cached")


def test_the_tiers_of_a_fallback_share_its_clock() -> None:
    """Else a test that moves time would move it for half of the stack."""
    clock = FakeClock()
    cache = Cached(MemoryStore(), fallback=MemoryStore(), clock=clock)
    assert find(cache, WriteThrough)[0].clock is clock


# Loads that change hands


async def test_a_load_that_was_taken_over_is_joined_like_any_other() -> None:
    """Whoever asks after its first caller went away gets what the second one loads."""
    gate, second = Gate(), Gate()
    inner = Scripted(gate, second)
    cache = Cached(inner)
    first, heir = (asyncio.create_task(cache.get_latest("u-1")) for _ in range(2))
    await gate.entered.wait()
    first.cancel()
    await second.entered.wait()
    later = [asyncio.create_task(cache.get_latest("u-1")) for _ in range(3)]
    await settle()
    heir.cancel()  # and once more: the next of them loads
    await settle()
    assert inner.calls == [Op.GET_LATEST] * 3
    assert await asyncio.gather(*later) == [None] * 3
    assert cache._flights == {}


async def test_a_waiting_call_that_nobody_finishes_ends_quietly() -> None:
    """A coroutine that is closed while it waits, as when an event loop is stopped."""
    gate = Gate()
    cache = Cached(Scripted(gate))
    task = asyncio.create_task(cache.get_latest("u-1"))
    await gate.entered.wait()
    left = Cached.get_latest(cache, "u-1")
    left.send(None)
    left.close()
    gate.open(NEW)
    assert await task == NEW


async def test_an_id_that_cannot_be_looked_up_is_the_callers_error() -> None:
    """A subclass of str that is valid otherwise."""

    class Unhashable(str):
        __hash__ = None  # type: ignore[assignment]

    with pytest.raises(TypeError, match="unhashable"):
        await Slow(MemoryStore()).get_latest(Unhashable("u-1"))


# Batches


async def test_a_batch_answers_up_to_the_ttl_and_asks_for_nothing_it_has() -> None:
    """Not at it; and a batch that has all asks below for nothing at all."""
    clock = FakeClock()
    inner = Scripted({"u-1": OLD}, {"u-1": NEW})
    cache = Cached(inner, ttl=10, clock=clock)
    await cache.get_latest_many(["u-1"])
    await clock.advance(9.9)
    assert await cache.get_latest_many(["u-1"]) == {"u-1": OLD}
    assert len(inner.calls) == 1
    await clock.advance(0.1)
    assert await cache.get_latest_many(["u-1"]) == {"u-1": NEW}


async def test_a_batch_counts_what_it_waited_for() -> None:
    """One found, one that failed and one that nobody waits for any more are three reads."""
    gates = [Gate() for _ in range(3)]
    cache = Cached(Scripted(*gates))
    singles = []
    for number, gate in enumerate(gates):
        singles.append(asyncio.create_task(cache.get_latest(f"u-{number}")))
        await gate.entered.wait()
    batch = asyncio.create_task(cache.get_latest_many([f"u-{n}" for n in range(3)]))
    await settle()
    gates[0].open(state(0.1, "u-0"))
    gates[1].open(UnavailableError("down"))
    with pytest.raises(UnavailableError):
        await batch
    with pytest.raises(UnavailableError):
        await singles[1]
    assert await singles[0] == state(0.1, "u-0")
    assert counted(cache) == {"miss": 2, "error": 3}
    gates[2].open(state(0.1, "u-2"))
    assert await singles[2] == state(0.1, "u-2")
    assert cache._flights == {}


async def test_a_record_that_cannot_be_read_is_left_out_of_a_batch_that_waits_for_it() -> None:
    """As by the store; who asked for it alone is told."""
    gate = Gate()
    cache = Cached(Scripted(gate, {"u-2": state(0.2, "u-2")}))
    single = asyncio.create_task(cache.get_latest("u-1"))
    await gate.entered.wait()
    batch = asyncio.create_task(cache.get_latest_many(["u-1", "u-2"]))
    await settle()
    gate.open(CorruptDataError("unreadable"))
    assert await batch == {"u-2": state(0.2, "u-2")}
    with pytest.raises(CorruptDataError):
        await single


def test_a_batch_is_not_kept_waiting_by_an_event_loop_that_was_stopped() -> None:
    """It loads what that loop was loading, and keeps it."""
    inner = Scripted()
    cache = Cached(inner)

    async def stopped() -> None:
        gate = Gate()
        inner.steps = [gate]
        cache_task = asyncio.ensure_future(cache.get_latest("u-1"))
        await gate.entered.wait()
        cache_task.get_loop().stop()
        await asyncio.sleep(0)

    loop = asyncio.new_event_loop()
    task = loop.create_task(stopped())
    loop.run_forever()
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    for left in asyncio.all_tasks(loop):
        left._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    assert "u-1" in cache._flights

    async def later() -> None:
        inner.steps = [{"u-1": NEW}]
        assert await cache.get_latest_many(["u-1"]) == {"u-1": NEW}
        assert await cache.get_latest("u-1") == NEW

    asyncio.run(later())
    assert inner.calls == [Op.GET_LATEST, Op.GET_LATEST_MANY]


def test_a_batch_on_another_event_loop_loads_for_itself() -> None:
    """What one thread's loop is loading can be awaited there only."""
    held, over = threading.Event(), threading.Event()
    inner = Scripted()
    cache = Cached(inner)

    async def first() -> StateSnapshot | None:
        gate = Gate()
        inner.steps = [gate, {"u-1": OLD}]
        task = asyncio.create_task(cache.get_latest("u-1"))
        await gate.entered.wait()
        held.set()
        await asyncio.to_thread(over.wait)
        gate.open(OLD)
        return await task

    with ThreadPoolExecutor(1) as threads:
        loading = threads.submit(asyncio.run, first())
        try:
            assert held.wait(10)
            found = asyncio.run(asyncio.wait_for(cache.get_latest_many(["u-1"]), 10))
        finally:
            over.set()
        assert found == {"u-1": OLD}
        assert loading.result(10) == OLD
    assert cache._flights == {}


@pytest.mark.parametrize("closed", [False, True])
def test_a_refresh_on_another_event_loop_does_not_keep_from_closing(
    closed: bool,  # noqa: FBT001
) -> None:
    """It is cancelled where it runs, if that loop still does; the store below is closed."""
    clock = FakeClock()
    inner = MemoryStore()
    cache = Slow(inner, ttl=10, refresh_ahead=0.5, clock=clock)

    async def first() -> None:
        gate = Gate()
        await cache.upsert_latest(OLD)
        await clock.advance(6)
        inner.get_latest = lambda _: gate.pass_through()  # type: ignore[method-assign, assignment]
        assert await cache.get_latest("u-1") == OLD
        await gate.entered.wait()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(first())
    (refresh,) = cache._refreshes
    if closed:
        refresh._log_destroy_pending = False  # type: ignore[attr-defined]
        loop.close()
    asyncio.run(cache.aclose())
    if not closed:
        loop.run_until_complete(settle())
        assert refresh.cancelled()
        loop.close()
    with pytest.raises(ClosedError):
        asyncio.run(inner.upsert_latest(OLD))


async def test_a_load_begins_in_another_thread_while_the_channel_is_lost() -> None:
    """The channel still finds it: nothing that it told of meanwhile is kept."""
    cache = Cached(MemoryStore(), fallback=MemoryStore())
    cache._channel = Told()  # type: ignore[assignment]
    cache._held.follow(str.encode)
    loop = asyncio.get_running_loop()
    threads: list[threading.Thread] = []

    class Writing(dict[str, Any]):
        def __contains__(self, user_id: object) -> bool:
            if not threads:
                threads.append(threading.Thread(target=cache._takeoff, args=("u-2", loop)))
                threads[0].start()
                threads[0].join(0.2)  # it cannot end before, when one waits for the other
            return False

    cache._held.writing = Writing()
    cache._held.by_digest = {b"u-1": "u-1"}
    cache.distrust()
    threads[0].join()
    assert cache._held.by_digest == {b"u-2": "u-2"}
    cache.invalidate(Notice(b"u-2", 1))
    assert not cache._flights


# Answers that are not the user's


async def test_what_is_no_state_of_the_user_is_never_kept() -> None:
    """Alone it is an error; of a batch it is left out, and whoever waits for it alone is told."""
    cache = Cached(Scripted(OTHER, NEW))
    with pytest.raises(CorruptDataError):
        await cache.get_latest("u-1")
    assert await cache.get_latest("u-1") == NEW
    gate = Gate()
    cache = Cached(Scripted(gate, NEW))
    batch = asyncio.create_task(cache.get_latest_many(["u-1", "u-2"]))
    await gate.entered.wait()
    single = asyncio.create_task(cache.get_latest("u-1"))
    await settle()
    gate.open({"u-1": OTHER, "u-2": state(0.2, "u-2")})
    assert await batch == {"u-2": state(0.2, "u-2")}
    with pytest.raises(CorruptDataError) as caught:
        await single
    assert (caught.value.user_id, caught.value.operation) == ("u-1", Op.GET_LATEST)
    assert cache._flights == {}
    assert await cache.get_latest("u-1") == NEW


# Hits that do not take the hot path


async def test_a_hit_counts_for_the_eviction_whichever_way_it_takes() -> None:
    """Up to 3 times; entries of a given cache are that cache's business."""
    cache = Slow(MemoryStore())
    await cache.upsert_latest(OLD)
    entry = cache._entries["u-1"]
    for expected in (1, 2, 3, 3):
        await cache.get_latest("u-1")
        assert entry.freq == expected
    given = Slow(MemoryStore(), cache=cachetools.LRUCache(10))
    await given.upsert_latest(OLD)
    await given.get_latest("u-1")
    entry = given._entries.get("u-1")
    assert entry is not None
    assert entry.freq == 0


async def test_a_refresh_is_due_once_and_not_before_its_time() -> None:
    """Hits before it start none, hits while it runs start no second one, none is left behind."""
    clock = FakeClock()
    gate = Gate()
    inner = Scripted(OLD, gate, NEW)
    cache = Slow(inner, ttl=10, refresh_ahead=0.5, clock=clock)
    await cache.get_latest("u-1")
    await clock.advance(4.9)
    await cache.get_latest("u-1")
    await settle()
    assert len(inner.calls) == 1
    await clock.advance(0.1)
    for _ in range(3):
        assert await cache.get_latest("u-1") == OLD
        await settle()
    assert len(inner.calls) == 2
    gate.open(NEW)
    await settle()
    assert cache._refreshes == set()
    assert await cache.get_latest("u-1") == NEW
    assert len(inner.calls) == 2


async def test_a_refresh_that_finds_nobody_ends_the_entry() -> None:
    """The user was erased elsewhere; one that comes back with another user's state ends nothing."""
    for found, after in ((None, None), (OTHER, OLD)):
        clock = FakeClock()
        cache = Slow(Scripted(OLD, found, None), ttl=10, refresh_ahead=0.5, clock=clock)
        await cache.get_latest("u-1")
        await clock.advance(5)
        assert await cache.get_latest("u-1") == OLD
        await settle()
        assert await cache.get_latest("u-1") == after


async def test_a_refresh_that_is_cancelled_hands_over_to_whoever_waits() -> None:
    """A caller who missed after the entry's end had joined it."""
    clock = FakeClock()
    gate = Gate()
    cache = Cached(Scripted(OLD, gate, NEW), ttl=10, refresh_ahead=0.5, clock=clock)
    await cache.get_latest("u-1")
    await clock.advance(6)
    await cache.get_latest("u-1")
    await gate.entered.wait()
    await clock.advance(5)
    caller = asyncio.create_task(cache.get_latest("u-1"))
    await settle()
    (refresh,) = cache._refreshes
    refresh.cancel()
    assert await caller == NEW
    assert refresh.cancelled()
    assert cache._flights == {}


# Old answers


async def test_each_old_answer_is_counted_as_one() -> None:
    """Of the caller who loaded and of those who waited with him, one by one or in a batch."""
    clock = FakeClock()
    gate = Gate()
    cache = Cached(Scripted(OLD, gate), ttl=10, stale_if_error=30, clock=clock)
    await cache.get_latest("u-1")
    await clock.advance(20)
    singles = [asyncio.create_task(cache.get_latest("u-1")) for _ in range(2)]
    await gate.entered.wait()
    batch = asyncio.create_task(cache.get_latest_many(["u-1"]))
    await settle()
    gate.open(UnavailableError("down"))
    assert await asyncio.gather(*singles) == [OLD, OLD]
    assert await batch == {"u-1": OLD}
    assert counted(cache) == {"miss": 1, "stale": 3}


# Writes


async def test_of_a_batch_that_lost_nothing_is_cached() -> None:
    """An erasure or a newer state won in the store: what was written is not the latest."""

    class Losing(Scripted):
        async def upsert_latest_many(self, snapshots: Iterable[StateSnapshot]) -> None:
            current_call().superseded = True
            await super().upsert_latest_many(snapshots)

    cache = Cached(Losing(None, NEW))
    await cache.upsert_latest_many([OLD])
    assert await cache.get_latest("u-1") == NEW


async def test_the_random_given_decides_the_jitter() -> None:
    """So that a test can know it."""

    class Always(random.Random):
        def random(self) -> float:
            return 0.5

    clock = FakeClock()
    cache = Cached(MemoryStore(), ttl=100, ttl_jitter=0.4, clock=clock, random=Always())
    await cache.upsert_latest(OLD)
    assert cache._entries["u-1"].deadline - clock.monotonic() == pytest.approx(80)


# What is taken out, and what is counted


@pytest.mark.parametrize("given", [None, cachetools.LRUCache], ids=["own", "given"])
async def test_what_writes_take_away_is_counted(given: Any) -> None:
    """Once for each entry that was there, whatever keeps them."""
    cache = Cached(MemoryStore(), cache=None if given is None else given(10))

    def removed() -> float:
        return sum(
            s.value
            for s in cache.samples()
            if (s.metric, s.labels) == ("invalidations", ("write",))
        )

    await cache.upsert_latest(OLD)
    assert removed() == 0
    await cache.upsert_latest(NEW)
    await cache.delete("u-1")
    assert removed() == 2
    await cache.delete("u-1")
    assert removed() == 2


async def test_a_user_who_was_found_absent_has_no_old_answer_any_more() -> None:
    """The store has said so; an outage afterwards must not bring the user back."""
    clock = FakeClock()
    inner = Scripted(OLD, None, UnavailableError("down"))
    cache = Cached(inner, ttl=10, stale_if_error=100, clock=clock)
    await cache.get_latest("u-1")
    await clock.advance(11)
    assert await cache.get_latest("u-1") is None
    with pytest.raises(UnavailableError):
        await cache.get_latest("u-1")


async def test_a_state_too_large_for_a_given_cache_ends_the_smaller_one() -> None:
    """A refresh found it: the next read must not give the one before."""
    clock = FakeClock()
    large = StateSnapshot("u-1", 1, axes={f"axis_{n}": 0.5 for n in range(50)})
    given: Any = cachetools.LRUCache(10, getsizeof=lambda entry: len(entry.value.axes))
    cache = Cached(Scripted(OLD, large, large), ttl=10, refresh_ahead=0.5, cache=given, clock=clock)
    await cache.get_latest("u-1")
    await clock.advance(6)
    assert await cache.get_latest("u-1") == OLD
    await settle()
    assert len(given) == 0
    assert await cache.get_latest("u-1") == large


async def test_only_what_can_answer_no_more_is_swept() -> None:
    """At the moment past which not even an outage would bring it back, and nothing beside it."""
    clock = FakeClock()
    cache = Slow(MemoryStore(), ttl=10, stale_if_error=5, max_entries=3, clock=clock)
    await cache.upsert_latest(state(user_id="first"))
    await cache.get_latest("first")  # so that it is kept longer than the next
    await cache.upsert_latest(state(user_id="second"))
    await clock.advance(4)
    for user_id in ("third", "fourth"):
        await cache.upsert_latest(state(user_id=user_id))
    assert set(cache._entries) == {"first", "third", "fourth"}
    await clock.advance(11)
    await cache.upsert_latest(state(user_id="fifth"))
    assert set(cache._entries) == {"third", "fourth", "fifth"}
    evicted = {s.labels: s.value for s in cache.samples() if s.metric == "cache_evictions"}
    assert evicted == {("size",): 1, ("expired",): 1}


async def test_doubts_about_writes_are_forgotten_as_they_end() -> None:
    """Also those that began before another one of the same user."""
    clock = FakeClock()
    lost = UnavailableError("cut off", outcome_unknown=True)
    cache = Cached(Scripted(lost, lost, lost, NEW, None), clock=clock)
    for user_id, pause in (("u-1", 1), ("u-2", 2), ("u-1", 4)):
        with pytest.raises(UnavailableError):
            await cache.upsert_latest(state(user_id=user_id))
        await clock.advance(pause)
    await cache.get_latest("u-1")
    assert list(cache._held.quarantine) == ["u-1"]
    assert len(cache._entries) == 0
    await clock.advance(1)
    await cache.get_latest("u-1")
    assert cache._held.quarantine == {}


# What it tells of itself


async def test_it_tells_how_long_an_entry_answers() -> None:
    """Up to its very end; afterwards what it is kept for."""
    clock = FakeClock()
    for stale, note in ((0, "expired"), (30, "kept for stale_if_error")):
        cache = Cached(MemoryStore(), ttl=10, negative_ttl=10, stale_if_error=stale, clock=clock)
        await cache.upsert_latest(OLD)
        await cache.get_latest("nobody")
        await clock.advance(9.5)
        found = await cache.peek("u-1")
        assert (found.answers, found.note, found.version) == (True, "", None)
        assert (await cache.peek("nobody")).held is Held.ABSENT
        await clock.advance(0.5)
        found = await cache.peek("u-1")
        assert (found.answers, found.note) == (False, note)
        assert not [s for s in cache.samples() if s.metric == "cache_evictions"]
        assert cache.staleness == (10, "")


@pytest.mark.parametrize("kind", [UnavailableError, ValueError])
async def test_what_is_noted_on_ones_own_error_is_not_on_that_of_others(
    kind: type[Exception],
) -> None:
    """Whoever loaded has it first: what is noted there is not handed on with it."""
    gate = Gate()
    store = Cached(Scripted(gate))
    error = kind("down")
    error.add_note("as it was raised")

    async def call(number: int) -> list[str]:
        try:
            await store.get_latest("u-1")
        except kind as exc:
            exc.add_note(f"request {number}")
            await settle()
            return exc.__notes__
        raise AssertionError

    tasks = [asyncio.create_task(call(number)) for number in range(3)]
    await gate.entered.wait()
    await settle()
    gate.open(error)
    first, *others = await asyncio.gather(*tasks)
    assert first == ["as it was raised", "request 0"]
    if kind is UnavailableError:
        expected = [["as it was raised", f"request {number}"] for number in (1, 2)]
        assert others == expected
    else:
        assert [notes[-1] for notes in others] == ["request 1", "request 2"]
        assert "request 1" not in others[1]


async def test_each_caller_is_told_its_user() -> None:
    """Also where a layer above the cache knows users by other ids."""

    class Corrupt(MemoryStore):
        async def get_latest(self, user_id: str) -> StateSnapshot | None:
            await settle()
            raise CorruptDataError("none", user_id=user_id)

    store = Prefixed(Cached(Corrupt()), prefix="tenant-")
    calls = [store.get_latest("u-1") for _ in range(3)]
    errors = await asyncio.gather(*calls, return_exceptions=True)
    assert [error.user_id for error in errors if isinstance(error, StoreError)] == ["u-1"] * 3


async def test_an_error_whose_copy_is_another_is_not_copied_that_way() -> None:
    """To another class, or with other words: who waits must get what was raised."""

    class Changing(Exception):
        def __reduce__(self) -> Any:
            return ValueError, self.args

    class Rewording(Exception):
        def __reduce__(self) -> Any:
            return Rewording, ("other words",)

    for kind in (Changing, Rewording):
        gate = Gate()
        cache = Cached(Scripted(gate))
        tasks = [asyncio.create_task(cache.get_latest("u-1")) for _ in range(3)]
        await gate.entered.wait()
        await settle()
        error = kind("words")
        gate.open(error)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {(type(result), result.args) for result in results} == {(kind, ("words",))}


async def test_what_a_batch_found_is_as_good_as_what_a_single_read_found() -> None:
    """For who waits with it and for who comes later, by whichever way."""
    gate = Gate()
    inner = Scripted(gate)
    cache = Slow(inner)
    batch = asyncio.create_task(cache.get_latest_many(["u-1"]))
    await gate.entered.wait()
    single = asyncio.create_task(cache.get_latest("u-1"))
    await settle()
    gate.open({"u-1": NEW})
    assert await batch == {"u-1": NEW}
    assert await single == NEW
    assert await cache.get_latest("u-1") == NEW
    assert inner.calls == [Op.GET_LATEST_MANY]


async def test_a_user_whom_a_batch_left_out_is_absent_for_batches_only() -> None:
    """A record that cannot be read is left out too, and who asks for it alone is told."""
    clock = FakeClock()
    inner = Scripted({}, CorruptDataError("unreadable"))
    cache = Cached(inner, negative_ttl=10, clock=clock)
    for _ in range(2):
        assert await cache.get_latest_many(["u-1"]) == {}
    assert inner.calls == [Op.GET_LATEST_MANY]
    found = await cache.peek("u-1")
    assert (found.held, found.answers, found.version) == (Held.ABSENT, False, None)
    assert found.note == "left out of a batch: answers batches only"
    await clock.advance(10)
    assert (await cache.peek("u-1")).note == "expired"
    with pytest.raises(CorruptDataError):
        await cache.get_latest("u-1")
    absent = Cached(Scripted(None), negative_ttl=10, clock=clock)
    await absent.get_latest("u-1")
    assert (await absent.peek("u-1")).note == ""


async def test_a_repeated_erasure_leaves_no_mark_over_what_was_written_since() -> None:
    """The store spares that, since the first attempt took effect; so readers must find it."""
    clock = FakeClock()
    database = Faults(MemoryStore(clock=clock), clock=clock)
    database.fail(fault="error_after", operations=["delete"])
    late = random.Random(0)  # the repeat comes after 17 s
    cache = Cached(database, negative_ttl=60, clock=clock)
    stack = Retry(cache, base_delay=20, max_delay=20, time_limit=None, random=late, clock=clock)
    erasing = asyncio.create_task(stack.delete("u-1"))
    await settle()
    await stack.upsert_latest(NEW)
    await clock.advance(17)
    await erasing
    assert await stack.get_latest("u-1") == NEW
    await stack.delete("u-1")
    assert await stack.get_latest("u-1") is None
    assert counted(cache) == {"miss": 1, "negative_hit": 1}


async def test_the_bound_that_describe_tells_holds_for_users_taken_for_absent() -> None:
    """They are remembered for longer than a state here; another process then writes one."""
    clock, database = FakeClock(), MemoryStore()
    stack = Cached(database, ttl=5, negative_ttl=60, clock=clock)
    assert await stack.get_latest("u-1") is None
    await database.upsert_latest(StateSnapshot("u-1"))
    await clock.advance(59)
    assert await stack.get_latest("u-1") is None
    assert "after 60 s at the latest" in str(describe(stack))
    await clock.advance(1)
    assert await stack.get_latest("u-1") is not None


def test_the_bound_that_describe_tells_counts_a_cache_in_a_ramp() -> None:
    """And says that there is none where the way of the share has none."""
    cache = {"use": "cached", "ttl": 5}
    stack = Cached(Ramp(MemoryStore(), layer=cache, share=0.1), ttl=10)
    assert "after 15 s at the latest" in str(describe(stack))
    unbound = WriteThrough(MemoryStore(), origin=MemoryStore())
    for ramp in (Ramp(MemoryStore(), alternative=unbound), Ramp(unbound, alternative=unbound)):
        assert str(describe(Cached(ramp))).count("the cache tier has no versions") == 1
