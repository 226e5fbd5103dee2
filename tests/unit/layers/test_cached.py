"""Cached: every option, one load per user, and nothing kept that may be old."""

from __future__ import annotations

import asyncio
import contextvars
import random
import sys
import threading
from collections import Counter
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import cachetools
import pytest

from layered_store.errors import (
    CircuitOpenError,
    ClosedError,
    ConfigError,
    CorruptDataError,
    OverloadedError,
    StoreError,
    StoreTimeoutError,
    UnavailableError,
    ValidationError,
)
from layered_store.eviction import S3FIFOCache
from layered_store.interface import Op, StateStore
from layered_store.layers.cached import Cached
from layered_store.layers.write_through import WriteThrough
from layered_store.snapshot import StateSnapshot
from layered_store.stack import describe, find
from layered_store.stores.memory import MemoryStore
from layered_store.testing.clock import FakeClock, settle
from layered_store.testing.scripted import Gate, Scripted


def state(value: float = 0.5, user_id: str = "u-1") -> StateSnapshot:
    return StateSnapshot(user_id, 0, axes={"a": value})


OLD, NEW = state(0.1), state(0.2)


class Minimal(StateStore):
    """A third party's store: the two required methods, no history, no versions."""

    def __init__(self) -> None:
        self.states: dict[str, StateSnapshot] = {}
        self.reads: Counter[str] = Counter()

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        self.states[snapshot.user_id] = snapshot

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        self.reads[user_id] += 1
        await asyncio.sleep(0)
        return self.states.get(user_id)

    async def delete(self, user_id: str) -> None:
        self.states.pop(user_id, None)


def counted(cache: Cached, metric: str = "reads") -> dict[str, float]:
    return {
        ",".join(sample.labels): sample.value
        for sample in cache.samples()
        if sample.metric == metric and sample.value
    }


# Options


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("inner", None),
        ("inner", MemoryStore),
        ("fallback", "sqlite://"),
        ("fallback", MemoryStore),
        ("ttl", 0),
        ("ttl", -1),
        ("ttl", None),
        ("ttl", "60s"),
        ("ttl", float("nan")),
        ("ttl", float("inf")),
        ("ttl", True),
        ("max_entries", 0),
        ("max_entries", 1.5),
        ("max_entries", None),
        ("negative_ttl", -1),
        ("negative_ttl", None),
        ("stale_if_error", -0.1),
        ("stale_if_error", "1m"),
        ("refresh_ahead", 0),
        ("refresh_ahead", 1),
        ("refresh_ahead", 2),
        ("ttl_jitter", 1),
        ("ttl_jitter", -0.1),
        ("invalidation", "on"),
        ("invalidation", True),
        ("invalidation", "required"),
        ("cache", {}),
        ("cache", 5),
    ],
)
def test_a_wrong_option_is_refused_by_name(option: str, value: object) -> None:
    """Each wrong value is a ConfigError that names class and option and shows no value of text."""
    arguments: dict[str, Any] = {"inner": MemoryStore(), option: value}
    with pytest.raises(ConfigError, match=f"Cached.{option}") as caught:
        Cached(**arguments)
    assert caught.value.option == option
    assert "sqlite" not in str(caught.value)


def test_with_fallback_it_is_the_write_through_stack() -> None:
    """``fallback=`` is short for a ``WriteThrough`` in between."""
    tier, record = MemoryStore(), MemoryStore()
    short, long = Cached(tier, fallback=record), Cached(WriteThrough(tier, origin=record))
    assert repr(short) == repr(long)
    assert [str(block) for block in describe(short)] == [str(block) for block in describe(long)]
    assert find(short, WriteThrough)[0].origin is record


async def test_the_time_to_live_is_exact() -> None:
    """An entry answers up to its TTL and not at it; a timedelta is a duration too."""
    clock, inner = FakeClock(), Minimal()
    for ttl in (60, 60.0, timedelta(minutes=1)):
        cache = Cached(inner, ttl=ttl, clock=clock)
        inner.states["u-1"], inner.reads = OLD, Counter()
        assert await cache.get_latest("u-1") == OLD
        inner.states["u-1"] = NEW
        await clock.advance(59.999)
        assert await cache.get_latest("u-1") == OLD
        await clock.advance(0.001)
        assert await cache.get_latest("u-1") == NEW
        assert inner.reads["u-1"] == 2


async def test_absent_users_are_remembered_only_when_asked_for() -> None:
    """``negative_ttl`` is off by default; an upsert ends it at once, in bulk as well."""
    clock, inner = FakeClock(), Minimal()
    plain = Cached(inner, clock=clock)
    for _ in range(3):
        assert await plain.get_latest("u-1") is None
    assert inner.reads["u-1"] == 3
    cache = Cached(inner, negative_ttl=5, clock=clock)
    for _ in range(3):
        assert await cache.get_latest("u-1") is None
        assert await cache.get_latest_many(["u-1"]) == {}
    assert inner.reads["u-1"] == 4
    assert counted(cache) == {"miss": 1, "negative_hit": 5}
    await clock.advance(5)
    assert await cache.get_latest("u-1") is None
    assert inner.reads["u-1"] == 5
    await cache.upsert_latest(NEW)
    assert await cache.get_latest("u-1") == NEW
    await cache.delete("u-1")
    assert await cache.get_latest("u-1") is None
    await cache.upsert_latest_many([OLD, NEW])
    assert await cache.get_latest("u-1") == NEW


class Damaged(Minimal):
    """One user's record cannot be read: a batch leaves the user out, as a backend's does."""

    gate: asyncio.Event | None = None

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        found = await super().get_latest(user_id)
        if user_id == "u-bad":
            raise CorruptDataError("damaged")
        return found

    async def get_latest_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        self.reads["batch"] += 1
        if self.gate is not None:
            await self.gate.wait()
        return {key: self.states[key] for key in user_ids if key in self.states}


async def test_who_was_left_out_of_a_batch_is_not_absent_for_that() -> None:
    """The mark of a batch answers batches; asked for alone, a damaged record is told of."""
    inner = Damaged()
    cache = Cached(inner, negative_ttl=5)
    for _ in range(2):
        assert await cache.get_latest_many(["u-bad", "u-none"]) == {}
    assert inner.reads == {"batch": 1}
    assert counted(cache) == {"miss": 2, "negative_hit": 2}
    assert not (await cache.peek("u-bad")).answers
    for _ in range(2):
        with pytest.raises(CorruptDataError):
            await cache.get_latest("u-bad")
        assert await cache.get_latest("u-none") is None
    assert inner.reads == {"batch": 1, "u-bad": 2, "u-none": 1}
    peek = await cache.peek("u-none")
    assert peek.answers
    assert peek.version is None
    assert await cache.get_latest_many(["u-bad", "u-none"]) == {}
    assert inner.reads["batch"] == 1


@pytest.mark.parametrize("cancelled", [False, True])
async def test_who_waits_for_a_batch_that_left_the_user_out_asks_alone(cancelled: bool) -> None:
    """The first asks for all who wait, another batch among them; nothing is left behind."""
    inner = Damaged()
    inner.gate = asyncio.Event()
    cache = Cached(inner)
    batch = asyncio.create_task(cache.get_latest_many(["u-bad", "u-none"]))
    await asyncio.sleep(0)
    alone = [asyncio.create_task(cache.get_latest("u-bad")) for _ in range(3)]
    other = asyncio.create_task(cache.get_latest_many(["u-bad", "u-1"]))
    await asyncio.sleep(0)
    if cancelled:
        for task in alone:
            task.cancel()
    inner.gate.set()
    results = await asyncio.gather(*alone, return_exceptions=True)
    wanted = asyncio.CancelledError if cancelled else CorruptDataError
    assert [type(result) for result in results] == [wanted] * 3
    assert await batch == {}
    assert await other == {}
    assert inner.reads["u-bad"] == (0 if cancelled else 1)
    assert cache._flights == {}


async def test_jitter_spreads_expiry_and_never_lengthens_it() -> None:
    """Entries stored together expire apart, within the share, from the random given."""
    clock = FakeClock()
    cache = Cached(MemoryStore(), ttl=100, ttl_jitter=0.5, clock=clock, random=random.Random(1))
    users = [f"u-{index}" for index in range(200)]
    await cache.upsert_latest_many([state(user_id=user) for user in users])
    deadlines = [entry.deadline - clock.monotonic() for entry in cache._entries.values()]
    assert all(50 < left <= 100 for left in deadlines)
    assert len(set(deadlines)) == 200
    assert 70 < sum(deadlines) / 200 < 80


@pytest.mark.parametrize("error", [UnavailableError(), StoreTimeoutError(), CircuitOpenError()])
async def test_an_old_entry_answers_while_the_store_is_unavailable(error: StoreError) -> None:
    """Up to ``stale_if_error`` past the TTL, counted as stale; then the error is told."""
    clock = FakeClock()
    inner = Scripted(OLD, error, error, {}, NEW)
    cache = Cached(inner, ttl=10, stale_if_error=30, clock=clock)
    assert await cache.get_latest("u-1") == OLD
    await clock.advance(39.9)
    assert await cache.get_latest("u-1") == OLD
    assert counted(cache) == {"miss": 1, "stale": 1}
    await clock.advance(0.1)
    with pytest.raises(type(error)):
        await cache.get_latest("u-1")
    assert counted(cache) == {"miss": 1, "stale": 1, "error": 1}


@pytest.mark.parametrize("error", [CorruptDataError(), ValidationError(), ZeroDivisionError()])
async def test_an_answer_of_the_store_is_never_replaced_by_an_old_entry(error: Exception) -> None:
    """Only unavailability is: corruption or a bug below is told."""
    clock = FakeClock()
    cache = Cached(Scripted(OLD, error), ttl=10, stale_if_error=30, clock=clock)
    await cache.get_latest("u-1")
    await clock.advance(11)
    with pytest.raises(type(error)):
        await cache.get_latest("u-1")


@pytest.mark.parametrize("write", ["upsert", "upsert_many", "delete", "failed upsert"])
async def test_an_old_entry_never_answers_after_a_write(write: str) -> None:
    """Whether the write succeeded or not: what was cached before is gone."""
    clock = FakeClock()
    down = UnavailableError()
    inner = Scripted(OLD, down if write == "failed upsert" else None, down, down)
    cache = Cached(inner, ttl=10, stale_if_error=1000, clock=clock)
    assert await cache.get_latest("u-1") == OLD
    if write == "upsert":
        await cache.upsert_latest(NEW)
    elif write == "upsert_many":
        await cache.upsert_latest_many([NEW])
    elif write == "delete":
        await cache.delete("u-1")
    else:
        with pytest.raises(UnavailableError):
            await cache.upsert_latest(NEW)
    await clock.advance(11)
    if write.startswith("upsert"):
        assert await cache.get_latest("u-1") == NEW
    else:
        with pytest.raises(UnavailableError):
            await cache.get_latest("u-1")


async def test_a_hit_late_in_the_life_of_an_entry_starts_one_refresh() -> None:
    """Past ``refresh_ahead`` of the TTL hits go on at once, and one load runs behind them."""
    clock, gate = FakeClock(), Gate()
    inner = Scripted(OLD, gate)
    cache = Cached(inner, ttl=100, refresh_ahead=0.8, clock=clock)
    await cache.get_latest("u-1")
    await clock.advance(79)
    assert await cache.get_latest("u-1") == OLD
    assert inner.calls == [Op.GET_LATEST]
    await clock.advance(1)
    for _ in range(5):
        assert await cache.get_latest("u-1") == OLD
    await settle()
    assert inner.calls == [Op.GET_LATEST] * 2
    gate.open(NEW)
    await settle()
    assert await cache.get_latest("u-1") == NEW
    await clock.advance(79)
    assert await cache.get_latest("u-1") == NEW
    assert len(inner.calls) == 2
    assert counted(cache) == {"miss": 1, "hit": 8}


async def test_a_refresh_that_fails_is_silent_until_the_entry_ends() -> None:
    """The entry answers until its deadline; then the caller sees the error."""
    clock = FakeClock()
    inner = Scripted(OLD, UnavailableError(), UnavailableError())
    cache = Cached(inner, ttl=100, refresh_ahead=0.5, clock=clock)
    await cache.get_latest("u-1")
    await clock.advance(60)
    for _ in range(3):
        assert await cache.get_latest("u-1") == OLD
        await settle()
    assert len(inner.calls) == 2
    await clock.advance(40)
    with pytest.raises(UnavailableError):
        await cache.get_latest("u-1")


async def test_a_refresh_that_failed_is_tried_again_before_the_entry_ends() -> None:
    """Each time after half of what is left: one error that passes costs nobody a full miss."""
    clock = FakeClock()
    inner = Scripted(OLD, UnavailableError(), UnavailableError(), NEW)
    cache = Cached(inner, ttl=100, refresh_ahead=0.5, clock=clock)
    await cache.get_latest("u-1")
    for seconds, loads in ((60, 2), (19, 2), (2, 3), (8, 3), (3, 4)):
        await clock.advance(seconds)
        assert await cache.get_latest("u-1") == OLD
        await settle()
        assert len(inner.calls) == loads, seconds
    await clock.advance(20)  # beyond the first entry's end
    assert await cache.get_latest("u-1") == NEW
    assert len(inner.calls) == 4


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("error", [CircuitOpenError, OverloadedError, ValidationError])
async def test_a_write_that_was_refused_leaves_what_was_kept(
    error: type[StoreError], many: bool
) -> None:
    """Nothing happened. In an outage, users who are written would else lose their old answers."""
    clock = FakeClock()
    inner = Scripted(OLD, error("refused below"), UnavailableError())
    cache = Cached(inner, ttl=10, stale_if_error=30, clock=clock)
    await cache.get_latest("u-1")
    await clock.advance(5)
    with pytest.raises(error):
        await (cache.upsert_latest_many([NEW]) if many else cache.upsert_latest(NEW))
    assert await cache.get_latest("u-1") == OLD
    assert counted(cache) == {"hit": 1, "miss": 1}
    await clock.advance(5)  # it lives no longer than it would have
    assert await cache.get_latest("u-1") == OLD
    assert counted(cache) == {"hit": 1, "miss": 1, "stale": 1}


@pytest.mark.parametrize("error", [UnavailableError, StoreTimeoutError])
async def test_a_write_that_may_have_happened_leaves_nothing(error: type[StoreError]) -> None:
    """The next read asks the store."""
    cache = Cached(Scripted(OLD, error(), NEW), stale_if_error=30, clock=FakeClock())
    await cache.get_latest("u-1")
    with pytest.raises(error):
        await cache.upsert_latest(NEW)
    assert await cache.get_latest("u-1") == NEW


async def test_a_delete_that_was_refused_leaves_nothing() -> None:
    """Who is to be erased is not shown from memory."""
    clock = FakeClock()
    cache = Cached(
        Scripted(OLD, CircuitOpenError(), UnavailableError()), stale_if_error=30, clock=clock
    )
    await cache.get_latest("u-1")
    with pytest.raises(CircuitOpenError):
        await cache.delete("u-1")
    with pytest.raises(UnavailableError):
        await cache.get_latest("u-1")


@pytest.mark.parametrize("meanwhile", ["load", "load under way", "write", "close"])
async def test_what_a_refused_write_leaves_is_not_older_than_what_was_seen(meanwhile: str) -> None:
    """Somebody else's write may have been read while it waited, or be about to be."""
    refused, loading = Gate(), Gate()
    between = {"load": [NEW], "load under way": [loading], "write": [None], "close": []}[meanwhile]
    cache = Cached(Scripted(OLD, refused, *between, NEW), clock=FakeClock())
    await cache.get_latest("u-1")
    write = asyncio.create_task(cache.upsert_latest(state(0.3)))
    await settle()
    reading = None
    if meanwhile == "write":
        await cache.upsert_latest(NEW)
    elif meanwhile == "close":
        cache._held.close()
    else:
        reading = asyncio.create_task(cache.get_latest("u-1"))
        await settle()
    refused.open(CircuitOpenError())
    with pytest.raises(CircuitOpenError):
        await write
    loading.open(NEW)
    if reading is not None:
        assert await reading == NEW
    assert await cache.get_latest("u-1") == NEW
    assert not cache._held.writing


async def test_a_refused_write_leaves_nobody_whom_a_batch_saw_absent() -> None:
    """Also when whoever loads after the batch learns nothing."""
    refused, batch = Gate(), Gate()
    inner = Scripted(OLD, refused, batch, UnavailableError(), None)
    cache = Cached(inner, clock=FakeClock())
    await cache.get_latest("u-1")
    write = asyncio.create_task(cache.upsert_latest(state(0.3)))
    await settle()
    many = asyncio.create_task(cache.get_latest_many(["u-1"]))
    await settle()
    alone = asyncio.create_task(cache.get_latest("u-1"))
    await settle()
    batch.open({})
    assert await many == {}
    with pytest.raises(UnavailableError):
        await alone
    refused.open(CircuitOpenError())
    with pytest.raises(CircuitOpenError):
        await write
    assert await cache.get_latest("u-1") is None


async def test_a_refused_write_leaves_nothing_older_than_a_load_that_it_met() -> None:
    """Whoever loads sees what it finds, after the write too; nobody sees less afterwards."""
    clock, loading = FakeClock(), Gate()
    inner = Scripted(OLD, loading, CircuitOpenError(), UnavailableError())
    cache = Cached(inner, ttl=10, stale_if_error=60, clock=clock)
    await cache.get_latest("u-1")
    await clock.advance(15)
    load = asyncio.create_task(cache.get_latest("u-1"))
    await loading.entered.wait()
    with pytest.raises(CircuitOpenError):
        await cache.upsert_latest(state(0.3))
    loading.open(NEW)
    assert await load == NEW
    with pytest.raises(UnavailableError):
        await cache.get_latest("u-1")


async def test_a_refresh_never_lands_after_a_write() -> None:
    """A background load that began before a write or delete leaves nothing."""
    clock, gate = FakeClock(), Gate()
    cache = Cached(Scripted(OLD, gate), ttl=100, refresh_ahead=0.5, clock=clock)
    await cache.get_latest("u-1")
    await clock.advance(60)
    await cache.get_latest("u-1")
    await gate.entered.wait()
    await cache.upsert_latest(NEW)
    gate.open(OLD)
    await settle()
    assert await cache.get_latest("u-1") == NEW
    await cache.aclose()


async def test_closing_ends_refreshes() -> None:
    """No task is left when ``aclose`` returned."""
    clock, gate = FakeClock(), Gate()
    cache = Cached(Scripted(OLD, gate), ttl=100, refresh_ahead=0.5, clock=clock)
    await cache.get_latest("u-1")
    await clock.advance(60)
    await cache.get_latest("u-1")
    await gate.entered.wait()
    await cache.aclose()
    assert gate.cancelled
    with pytest.raises(ClosedError, match="Cached.get_latest"):
        await cache.get_latest("u-1")
    await cache.aclose()


# Bounds


async def test_the_store_is_closed_when_refreshes_have_ended_and_not_before() -> None:
    """One that was cancelled may still have something to tidy up there."""
    steps: list[str] = []

    class Tidy(Minimal):
        async def get_latest(self, user_id: str) -> StateSnapshot | None:
            try:
                return await super().get_latest(user_id)
            finally:
                await settle()
                steps.append("read")

        async def aclose(self) -> None:
            steps.append("close")

    clock = FakeClock()
    cache = Cached(Tidy(), ttl=100, refresh_ahead=0.5, clock=clock)
    await cache.upsert_latest(OLD)
    await clock.advance(60)
    assert await cache.get_latest("u-1") == OLD
    await asyncio.sleep(0)
    await cache.aclose()
    assert steps == ["read", "close"]


async def test_memory_is_bounded_by_max_entries() -> None:
    """However many users come, at most so many are kept, and evictions are counted."""
    cache = Cached(Minimal(), max_entries=10, negative_ttl=60, clock=FakeClock())
    for index in range(1000):
        user = f"u-{index % 500}"
        if index % 3:
            await cache.upsert_latest(state(user_id=user))
        await cache.get_latest(user)
    assert counted(cache, "cache_entries")[""] == 10
    assert counted(cache, "cache_evictions")["size"] >= 490
    assert len(cache._held.s3._small) + len(cache._held.s3._main) <= 2 * 10 + 64
    assert len(cache._held.s3._ghosts) <= 10


async def test_nothing_is_kept_per_user_when_nothing_is_in_flight() -> None:
    """Locks, loads, quarantines: gone, also after failures and cancellations."""
    clock = FakeClock()
    down = UnavailableError()
    cache = Cached(Scripted(*[down, asyncio.CancelledError()] * 20), max_entries=4, clock=clock)
    for index in range(20):
        for call in (
            cache.get_latest(f"u-{index}"),
            cache.upsert_latest(state(user_id=f"u-{index}")),
            cache.delete(f"u-{index}"),
            cache.get_latest_many([f"u-{index}", f"v-{index}"]),
        ):
            try:
                await call
            except (UnavailableError, asyncio.CancelledError):
                pass
    assert not cache._flights
    assert not cache._held.writing
    assert not cache._held.by_digest
    await clock.advance(3600)
    with pytest.raises(UnavailableError):
        await Cached(Scripted(down), clock=clock).upsert_latest(NEW)
    cache._held.write_begins("w-1")
    cache._held.write_failed("w-1", down)
    assert list(cache._held.quarantine) == ["w-1"]
    await clock.advance(6)
    await cache.get_latest("w-2")
    assert not cache._held.quarantine


async def test_expired_entries_make_room_before_live_ones_are_given_up() -> None:
    """What stands at the head of the queues and has expired goes first, counted as such."""
    clock = FakeClock()
    cache = Cached(Minimal(), ttl=10, max_entries=100, clock=clock)
    for index in range(50):
        await cache.upsert_latest(state(user_id=f"u-{index}"))
    await clock.advance(11)
    for index in range(50):
        await cache.upsert_latest(state(user_id=f"v-{index}"))
    assert counted(cache, "cache_entries")[""] == 50
    assert counted(cache, "cache_evictions") == {"expired": 50}


@pytest.mark.parametrize(
    "given",
    [
        cachetools.LRUCache(3),
        cachetools.TTLCache(3, 1000),
        cachetools.LFUCache(3),
        cachetools.FIFOCache(3),
        cachetools.RRCache(3),
        cachetools.TLRUCache(3, lambda key, value, now: now + 1000),
        S3FIFOCache(3),
    ],
    ids=lambda cache: type(cache).__name__,
)
async def test_any_cachetools_cache_keeps_the_entries(given: cachetools.Cache[Any, Any]) -> None:
    """The same answers, TTL and invalidation; the size is the given cache's."""
    clock, inner = FakeClock(), Minimal()
    cache = Cached(inner, cache=given, ttl=10, clock=clock)
    for index in range(5):
        await cache.upsert_latest(state(index / 10, f"u-{index}"))
        assert await cache.get_latest(f"u-{index}") == state(index / 10, f"u-{index}")
    assert inner.reads.total() == 0
    assert len(given) <= 3
    assert len(await cache.get_latest_many([f"u-{index}" for index in range(5)])) == 5
    await cache.upsert_latest(NEW)
    inner.states["u-1"] = OLD
    assert await cache.get_latest("u-1") == NEW
    await clock.advance(10)
    assert await cache.get_latest("u-1") == OLD
    await cache.delete("u-1")
    assert await cache.get_latest("u-1") is None


async def test_a_given_cache_is_its_own() -> None:
    """One that holds something, or that another cache uses, is refused: states would mix up. A
    cache that is closed leaves it empty.
    """
    given: Any = cachetools.LRUCache(3)
    given["u-1"] = "something else"
    with pytest.raises(ConfigError, match="must be empty"):
        Cached(Minimal(), cache=given)
    given.clear()
    first = Cached(Minimal(), cache=given)
    with pytest.raises(ConfigError, match=r"Cached.cache: must be empty and no other Cached's"):
        Cached(Minimal(), cache=given)
    await first.upsert_latest(NEW)
    await first.aclose()
    assert not given
    Cached(Minimal(), cache=given)


@pytest.mark.parametrize("steps", [0, 1, 2])
async def test_a_refresh_that_others_cancel_leaves_no_load_to_wait_for(steps: int) -> None:
    """Not even in the turn in which it was made: who joined it loads, and so do later callers."""
    clock, gate = FakeClock(), Gate()
    cache = Cached(Scripted(OLD, gate, NEW), ttl=100, refresh_ahead=0.5, clock=clock)
    await cache.get_latest("u-1")
    await clock.advance(60)
    assert await cache.get_latest("u-1") == OLD
    (refresh,) = cache._refreshes
    joined = []
    if steps:
        await clock.advance(60)
        joined.append(asyncio.create_task(cache.get_latest("u-1")))
    for _ in range(steps):
        await asyncio.sleep(0)
    refresh.cancel()
    await settle()
    assert not cache._refreshes
    gate.open(NEW)
    assert await asyncio.gather(*joined) == [NEW] * len(joined)
    await clock.advance(60)
    assert await asyncio.wait_for(cache.get_latest("u-1"), 1) == NEW
    await settle()  # it may have begun the next refresh
    assert not cache._flights


@pytest.mark.parametrize("noted", [False, True], ids=["alone", "beside others"])
@pytest.mark.parametrize("way", ["write", "read", "batch"])
async def test_what_began_in_doubt_is_not_kept_though_it_ends_after_it(
    way: str, noted: bool
) -> None:
    """The write that was not answered may have come in between; others may have noted the end."""
    clock, gate = FakeClock(), Gate()
    inner = Scripted(StoreTimeoutError("no answer"), gate, *([None] if noted else []), OLD)
    cache = Cached(inner, ttl=100, clock=clock)
    with pytest.raises(StoreTimeoutError):
        await cache.upsert_latest(OLD)
    await clock.advance(4)
    calls: dict[str, Any] = {
        "write": lambda: cache.upsert_latest(NEW),
        "read": lambda: cache.get_latest("u-1"),
        "batch": lambda: cache.get_latest_many(["u-1"]),
    }
    task = asyncio.create_task(calls[way]())
    await gate.entered.wait()
    await clock.advance(2)
    if noted:
        assert await cache.get_latest("u-2") is None
    gate.open({"u-1": NEW} if way == "batch" else NEW)
    await task
    for _ in range(2):
        assert await cache.get_latest("u-1") == OLD
    assert len(inner.calls) == 3 + noted
    assert not cache._held.quarantine


async def test_the_end_of_a_doubt_takes_out_the_load_that_began_in_it() -> None:
    """Whoever comes then loads anew, whatever the old load finds."""
    clock, gate, other = FakeClock(), Gate(), Gate()
    inner = Scripted(StoreTimeoutError("no answer"), gate, other, OLD)
    cache = Cached(inner, ttl=100, clock=clock)
    with pytest.raises(StoreTimeoutError):
        await cache.upsert_latest(OLD)
    first = asyncio.create_task(cache.get_latest("u-1"))
    await gate.entered.wait()
    await clock.advance(5.1)
    another = asyncio.create_task(cache.get_latest("u-2"))
    await other.entered.wait()
    assert await cache.get_latest("u-1") == OLD
    gate.open(NEW)
    other.open()
    assert await first == NEW
    await another
    assert await cache.get_latest("u-1") == OLD
    assert len(inner.calls) == 4


async def test_a_load_under_a_write_is_joined_by_nobody_once_another_saw_the_write() -> None:
    """Whoever asks after the new state was answered is not answered with the old one."""
    before, writing, during = Gate(), Gate(), Gate()
    cache = Cached(Scripted(before, writing, during, NEW, NEW))
    first = asyncio.create_task(cache.get_latest("u-1"))
    await before.entered.wait()
    write = asyncio.create_task(cache.upsert_latest(NEW))
    await writing.entered.wait()
    second = asyncio.create_task(cache.get_latest("u-1"))
    await during.entered.wait()  # it has read the old state, and is on its way back
    before.open(NEW)
    assert await first == NEW
    third = asyncio.create_task(cache.get_latest("u-1"))
    await settle()
    during.open(OLD)
    assert await second == OLD
    assert await third == NEW
    writing.open()
    await write
    assert await cache.get_latest("u-1") == NEW
    assert not cache._flights


async def test_a_cache_that_is_too_small_for_an_entry_keeps_none() -> None:
    """A given cache may weigh its entries; what does not fit is read from below each time."""
    given: Any = cachetools.LRUCache(1, getsizeof=lambda entry: 2)
    inner = Minimal()
    cache = Cached(inner, cache=given)
    await cache.upsert_latest(NEW)
    assert await cache.get_latest("u-1") == NEW
    assert inner.reads["u-1"] == 1


# One load per user


@pytest.mark.parametrize("count", [2, 100, 10_000])
async def test_concurrent_misses_of_one_user_are_one_read(count: int) -> None:
    """All get the answer, all but one are counted as having waited."""
    gate = Gate()
    inner = Scripted(gate)
    cache = Cached(inner)
    tasks = [asyncio.create_task(cache.get_latest("u-1")) for _ in range(count)]
    await gate.entered.wait()
    await asyncio.sleep(0)
    gate.open(NEW)
    assert await asyncio.gather(*tasks) == [NEW] * count
    assert inner.calls == [Op.GET_LATEST]
    assert counted(cache, "read_waits") == {"": count - 1}
    assert counted(cache) == {"miss": count}


async def test_a_lone_miss_creates_no_task() -> None:
    """The caller loads itself."""
    tasks: list[int] = []

    class Counting(Minimal):
        async def get_latest(self, user_id: str) -> StateSnapshot | None:
            tasks.append(len(asyncio.all_tasks()))
            return await super().get_latest(user_id)

    before = len(asyncio.all_tasks())
    await Cached(Counting()).get_latest("u-1")
    assert tasks == [before]


@pytest.mark.parametrize("which", ["leader", "follower", "all followers", "leader and follower"])
async def test_a_cancelled_caller_harms_nobody(which: str) -> None:
    """The others are served; at most one more load is made when the one that loads goes away."""
    gate, second = Gate(), Gate()
    inner = Scripted(gate, second)
    cache = Cached(inner)
    tasks = [asyncio.create_task(cache.get_latest("u-1")) for _ in range(10)]
    await gate.entered.wait()
    await asyncio.sleep(0)
    gone = {
        "leader": tasks[:1],
        "follower": tasks[4:5],
        "all followers": tasks[1:],
        "leader and follower": tasks[:2],
    }[which]
    for task in gone:
        task.cancel()
    await settle()
    gate.open(NEW)
    second.open(NEW)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for task, result in zip(tasks, results, strict=True):
        assert isinstance(result, asyncio.CancelledError) if task in gone else result == NEW
    assert len(inner.calls) == (2 if "leader" in which else 1)
    assert gate.cancelled == ("leader" in which)
    assert not cache._flights


async def test_when_nobody_waits_any_more_the_load_stops() -> None:
    """The read below is cancelled with its last caller, and a later caller begins anew."""
    first = Gate()
    inner = Scripted(first, NEW)
    cache = Cached(inner)
    tasks = [asyncio.create_task(cache.get_latest("u-1")) for _ in range(5)]
    await first.entered.wait()
    for task in reversed(tasks):
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert first.cancelled
    assert await cache.get_latest("u-1") == NEW
    assert len(inner.calls) == 2


async def test_cancelled_just_when_made_the_one_that_loads() -> None:
    """Leader and its successor are cancelled in one turn of the loop: the third loads."""
    gate, second, third = Gate(), Gate(), Gate()
    cache = Cached(Scripted(gate, second, third))
    tasks = [asyncio.create_task(cache.get_latest("u-1")) for _ in range(3)]
    await gate.entered.wait()
    await asyncio.sleep(0)
    tasks[0].cancel()
    await asyncio.sleep(0)
    tasks[1].cancel()
    for each in (gate, second, third):
        each.open(NEW)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert results[2] == NEW
    assert not cache._flights


async def test_an_error_reaches_every_waiter_once_and_is_not_cached() -> None:
    """Each gets an error of its own with the same cause; the next caller asks again."""
    gate = Gate()
    inner = Scripted(gate, NEW)
    cache = Cached(inner)
    tasks = [asyncio.create_task(cache.get_latest("u-1")) for _ in range(50)]
    await gate.entered.wait()
    await asyncio.sleep(0)
    error = UnavailableError("down", operation="get_latest", layer="X")
    error.__cause__ = OSError("refused")
    gate.open(error)
    results: list[Any] = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(result) for result in results} == {UnavailableError}
    assert len({id(result) for result in results}) == 50
    assert {str(result) for result in results} == {"X.get_latest: down"}
    assert {id(result.__cause__) for result in results} == {id(error.__cause__)}
    assert counted(cache) == {"error": 50}
    assert await cache.get_latest("u-1") == NEW
    assert len(inner.calls) == 2


async def test_an_error_class_that_cannot_be_built_again_reaches_all() -> None:
    """A third party's exception, of which each gets his own: a shared one would collect the frames
    of all, and each log line show them.
    """

    class Odd(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__(f"{one} {two}")

    gate = Gate()
    cache = Cached(Scripted(gate))
    tasks = [asyncio.create_task(cache.get_latest("u-1")) for _ in range(3)]
    await gate.entered.wait()
    await asyncio.sleep(0)
    gate.open(Odd(1, 2))
    results: list[Any] = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(result) for result in results} == {Odd}
    assert len({id(result) for result in results}) == 3
    assert {str(result) for result in results} == {"1 2"}


@pytest.mark.parametrize("bad", ["", "a b", "a" * 257, "\x00", 5, None, ["u-1"], {}, "u\n", "é/"])
async def test_a_bad_id_is_refused_before_anything_is_asked(bad: Any) -> None:
    """Again and again, alone and in bulk: no load is left behind that a later caller waits for."""
    inner = Scripted()
    cache = Cached(inner)
    for _ in range(2):
        for call in (cache.get_latest(bad), cache.get_latest_many(["u-2", bad]), cache.delete(bad)):
            with pytest.raises(ValidationError):
                await asyncio.wait_for(call, 1)
    assert inner.calls == []
    assert not cache._flights


@pytest.mark.parametrize("axes", [{"a": 2.0}, {"A": 0.5}, {"a": float("nan")}, {"a": True}])
async def test_a_bad_snapshot_is_refused_and_what_is_cached_stays(axes: dict[str, Any]) -> None:
    """Nothing is stored anywhere, and nothing was lost."""
    inner = Scripted(OLD)
    cache = Cached(inner)
    await cache.get_latest("u-1")
    for call in (
        cache.upsert_latest(StateSnapshot("u-1", axes=axes)),
        cache.upsert_latest_many([NEW, StateSnapshot("u-1", axes=axes)]),
        cache.upsert_latest("u-1"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValidationError):
            await call
    assert await cache.get_latest("u-1") == OLD
    assert inner.calls == [Op.GET_LATEST]


# Bulk reads


async def test_a_bulk_read_asks_below_only_for_what_is_missing() -> None:
    """Hits answer here, others share loads that run already, absent users are left out."""
    gate = Gate()
    inner = Scripted()
    cache = Cached(inner)
    await cache.upsert_latest(state(0.1, "u-1"))
    inner.calls.clear()
    inner.steps[:] = [gate, {"u-3": state(0.3, "u-3")}]
    lone = asyncio.create_task(cache.get_latest("u-2"))
    await gate.entered.wait()
    many = asyncio.create_task(
        cache.get_latest_many(user for user in ("u-1", "u-2", "u-3", "u-4", "u-3"))
    )
    await settle()
    gate.open(state(0.2, "u-2"))
    assert await many == {f"u-{n}": state(n / 10, f"u-{n}") for n in (1, 2, 3)}
    assert await lone == state(0.2, "u-2")
    assert inner.calls == [Op.GET_LATEST, Op.GET_LATEST_MANY]
    assert await cache.get_latest("u-3") == state(0.3, "u-3")
    assert len(inner.calls) == 2


async def test_single_readers_join_a_bulk_read_and_outlive_it() -> None:
    """When the bulk read is cancelled, one of those who wait loads for the others."""
    gate = Gate()
    inner = Scripted(gate, {}, NEW)
    cache = Cached(inner)
    many = asyncio.create_task(cache.get_latest_many(["u-1", "u-2"]))
    await gate.entered.wait()
    singles = [asyncio.create_task(cache.get_latest("u-1")) for _ in range(3)]
    other = asyncio.create_task(cache.get_latest_many(["u-1", "u-3"]))
    await settle()
    many.cancel()
    assert await asyncio.gather(*singles) == [NEW] * 3
    assert (await other)["u-1"] == NEW
    assert not cache._flights


async def test_a_bulk_read_fills_and_fails_like_single_ones() -> None:
    """One failure fails the call, is not cached, and reaches those who joined."""
    gate = Gate()
    inner = Scripted(gate, {"u-1": NEW})
    cache = Cached(inner)
    many = asyncio.create_task(cache.get_latest_many(["u-1", "u-2"]))
    await gate.entered.wait()
    single = asyncio.create_task(cache.get_latest("u-1"))
    await settle()
    gate.open(UnavailableError())
    for task in (many, single):
        with pytest.raises(UnavailableError):
            await task
    assert await cache.get_latest_many(["u-1"]) == {"u-1": NEW}


async def test_stale_answers_in_bulk() -> None:
    """When all are held the old entries answer; when one is not the error is told."""
    clock = FakeClock()
    cache = Cached(
        Scripted(None, UnavailableError(), UnavailableError()),
        ttl=10, stale_if_error=60, clock=clock,
    )  # fmt: skip
    await cache.upsert_latest(NEW)
    await clock.advance(11)
    assert await cache.get_latest_many(["u-1"]) == {"u-1": NEW}
    with pytest.raises(UnavailableError):
        await cache.get_latest_many(["u-1", "u-2"])
    assert counted(cache)["stale"] == 1


# Races, one by one; test_cached_races.py explores their interleavings


@pytest.mark.parametrize("write", ["upsert", "upsert_many", "delete"])
async def test_a_load_that_began_before_a_write_leaves_nothing(write: str) -> None:
    """Its own callers get what it read; nobody after the write does."""
    gate = Gate()
    inner = Scripted(gate)
    cache = Cached(inner)
    early = asyncio.create_task(cache.get_latest("u-1"))
    await gate.entered.wait()
    if write == "delete":
        await cache.delete("u-1")
    else:
        await (cache.upsert_latest(NEW) if write == "upsert" else cache.upsert_latest_many([NEW]))
    expected = None if write == "delete" else NEW
    inner.steps.append(expected)
    late = await cache.get_latest("u-1")
    gate.open(OLD)
    assert await early == OLD
    assert late == expected
    inner.steps.append(expected)
    assert await cache.get_latest("u-1") == expected


@pytest.mark.parametrize("write", ["upsert", "delete"])
async def test_a_load_during_a_write_leaves_nothing(write: str) -> None:
    """Begun after the write began and ended before it: what it read may be old."""
    gate = Gate()
    inner = Scripted(OLD, gate, OLD)
    cache = Cached(inner)
    await cache.get_latest("u-1")
    call = cache.delete("u-1") if write == "delete" else cache.upsert_latest(NEW)
    writing = asyncio.create_task(call)
    await gate.entered.wait()
    assert await cache.get_latest("u-1") == OLD
    gate.open()
    await writing
    inner.steps.append(None)
    assert await cache.get_latest("u-1") == (NEW if write == "upsert" else None)


async def test_overlapping_upserts_leave_nothing_cached() -> None:
    """Who won is known below alone, so the next reader asks there."""
    first, second = Gate(), Gate()
    inner = Scripted(first, second, OLD)
    cache = Cached(inner)
    one = asyncio.create_task(cache.upsert_latest(OLD))
    await first.entered.wait()
    two = asyncio.create_task(cache.upsert_latest(NEW))
    await second.entered.wait()
    second.open()
    await two
    first.open()
    await one
    assert await cache.get_latest("u-1") == OLD
    assert inner.calls[-1] is Op.GET_LATEST


@pytest.mark.parametrize("end", ["fails", "is cancelled"])
async def test_a_write_that_may_have_happened_leaves_nothing_cached(end: str) -> None:
    """And for a while nothing is: it may still take effect behind a reader's back."""
    clock, gate = FakeClock(), Gate()
    inner = Scripted(OLD, gate, OLD, NEW, NEW)
    cache = Cached(inner, clock=clock)
    await cache.get_latest("u-1")
    write = asyncio.create_task(cache.upsert_latest(NEW))
    await gate.entered.wait()
    if end == "fails":
        gate.open(StoreTimeoutError(outcome_unknown=True))
        with pytest.raises(StoreTimeoutError):
            await write
    else:
        write.cancel()
        with pytest.raises(asyncio.CancelledError):
            await write
    assert await cache.get_latest("u-1") == OLD
    assert await cache.get_latest("u-1") == NEW
    await clock.advance(5)
    assert await cache.get_latest("u-1") == NEW
    assert await cache.get_latest("u-1") == NEW
    assert inner.calls.count(Op.GET_LATEST) == 4


async def test_a_write_that_was_refused_bars_nothing() -> None:
    """A refusal took no effect, so the next load is kept."""
    inner = Scripted(OverloadedError(), OLD)
    cache = Cached(inner)
    with pytest.raises(OverloadedError):
        await cache.upsert_latest(NEW)
    assert await cache.get_latest("u-1") == OLD
    assert await cache.get_latest("u-1") == OLD
    assert inner.calls == [Op.UPSERT_LATEST, Op.GET_LATEST]


async def test_what_was_written_is_answered_without_a_read() -> None:
    """A lone write knows the state afterwards; of a batch the user's last snapshot counts."""
    inner = Minimal()
    cache = Cached(inner)
    await cache.upsert_latest(NEW)
    assert await cache.get_latest("u-1") is NEW
    await cache.upsert_latest_many([NEW, state(0.7, "u-2"), OLD])
    assert await cache.get_latest_many(["u-1", "u-2"]) == {"u-1": OLD, "u-2": state(0.7, "u-2")}
    assert not inner.reads


async def test_an_older_snapshot_that_lost_is_not_cached() -> None:
    """``order="snapshot_time"`` below: the cache shows what the store kept."""
    from layered_store.stores.sql import SQLStore

    async with Cached(SQLStore("sqlite://", order="snapshot_time")) as cache:
        newer, older = StateSnapshot("u-1", 2), StateSnapshot("u-1", 1)
        await cache.upsert_latest(newer)
        await cache.upsert_latest(older)
        assert await cache.get_latest("u-1") == newer


async def test_a_shared_load_runs_in_nobodys_name_but_its_callers() -> None:
    """A refresh sees no caller's context; a lone load sees its own caller's."""
    who: contextvars.ContextVar[str] = contextvars.ContextVar("who", default="nobody")
    seen: list[str] = []

    class Watching(Minimal):
        async def get_latest(self, user_id: str) -> StateSnapshot | None:
            seen.append(who.get())
            return NEW

    clock = FakeClock()
    cache = Cached(Watching(), ttl=10, refresh_ahead=0.5, clock=clock)
    who.set("caller")
    await cache.get_latest("u-1")
    await clock.advance(6)
    await cache.get_latest("u-1")
    await settle()
    assert seen == ["caller", "nobody"]
    await cache.aclose()


# The rest of the store


async def test_history_and_health_pass_through() -> None:
    """They are the inner store's, not a default's."""
    cache = Cached(MemoryStore())
    await cache.upsert_latest_many([OLD, NEW])
    assert await cache.get_history("u-1", 9) == [NEW, OLD]
    assert await cache.health_check()
    down = Cached(Scripted(healthy=False))
    assert not await down.health_check()
    assert (await down.health_report()).children[0].name == "Scripted"


async def test_a_reader_cannot_change_what_another_sees() -> None:
    """What is handed out is immutable all the way down, also when the caller's dict changes."""
    axes = {"a": 0.1}
    cache = Cached(Minimal())
    await cache.upsert_latest(StateSnapshot("u-1", 0, axes=axes))
    axes["a"] = 0.9
    seen = await cache.get_latest("u-1")
    assert seen is not None
    with pytest.raises(TypeError):
        seen.axes["a"] = 0.9  # type: ignore[index]
    with pytest.raises(AttributeError):
        seen.confidence = 0.1  # type: ignore[misc]
    assert await cache.get_latest("u-1") == OLD


def test_two_event_loops_share_the_cache_and_never_each_others_loads() -> None:
    """One loop after another works, and each loads for itself while the other is loading."""
    inner = Minimal()
    cache = Cached(inner)
    asyncio.run(cache.upsert_latest(NEW))
    assert asyncio.run(cache.get_latest("u-1")) == NEW

    async def interrupted() -> None:
        task = asyncio.create_task(cache.get_latest("u-2"))
        await asyncio.sleep(0)
        assert "u-2" in cache._flights
        asyncio.get_running_loop().call_soon(task.cancel)

    asyncio.run(interrupted())

    async def all_of(users: Iterable[str]) -> list[StateSnapshot | None]:
        return await asyncio.gather(*map(cache.get_latest, users))

    assert asyncio.run(all_of(["u-1", "u-2", "u-2"])) == [NEW, None, None]


def test_event_loops_of_several_threads_share_one_cache() -> None:
    """Reads, writes and deletes from four threads, switched as often as can be: none fails, no
    load or writer is left, and what is cached is what the store holds."""

    class Yielding(MemoryStore):
        async def get_latest(self, user_id: str) -> StateSnapshot | None:
            found = await super().get_latest(user_id)
            await asyncio.sleep(0)
            return found

        async def upsert_latest(self, snapshot: StateSnapshot) -> None:
            await asyncio.sleep(0)
            await super().upsert_latest(snapshot)
            await asyncio.sleep(0)

    users = ("u-0", "u-1", "u-2")
    inner = Yielding()
    cache = Cached(inner, negative_ttl=60, max_entries=2)
    failures: list[BaseException] = []

    async def work(chance: random.Random) -> None:
        for _ in range(150):
            user, kind = chance.choice(users), chance.random()
            if kind < 0.6:
                await cache.get_latest(user)
            elif kind < 0.8:
                await cache.upsert_latest(StateSnapshot(user, chance.randrange(10**9)))
            elif kind < 0.9:
                await cache.delete(user)
            else:
                await cache.get_latest_many(users)

    async def many(seed: int) -> None:
        await asyncio.gather(*(work(random.Random(10 * seed + index)) for index in range(8)))

    def body(seed: int) -> None:
        try:
            asyncio.run(many(seed))
        except BaseException as exc:
            failures.append(exc)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for round_ in range(5):
            threads = [threading.Thread(target=body, args=(4 * round_ + n,)) for n in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
                assert not thread.is_alive()
    finally:
        sys.setswitchinterval(interval)
    assert not failures
    assert not cache._flights
    assert not cache._held.writing

    async def compare() -> None:
        for user in users:
            assert await cache.get_latest(user) == await inner.get_latest(user)

    asyncio.run(compare())


GIVEN: list[Any] = [
    lambda: cachetools.TTLCache(50, 0.0005),
    lambda: cachetools.TLRUCache(50, lambda key, value, now: now + 0.0005),
    lambda: cachetools.LFUCache(50),
]


@pytest.mark.parametrize("given", GIVEN, ids=["TTLCache", "TLRUCache", "LFUCache"])
def test_a_given_cache_may_be_scraped_and_shared_by_event_loops(given: Any) -> None:
    """They have no locks, and finding or counting entries changes them; no call or scrape fails."""
    cache = Cached(MemoryStore(), cache=given(), negative_ttl=60)
    failures: list[BaseException] = []
    working = threading.Event()

    async def work(chance: random.Random) -> None:
        for _ in range(10_000):
            user = f"u-{chance.randrange(90)}"
            if chance.random() < 0.5:
                await cache.get_latest(user)
            elif chance.random() < 0.8:
                await cache.upsert_latest(state(0.5, user))
            else:
                await cache.delete(user)

    def scrape() -> None:
        while not working.is_set():
            list(cache.samples())

    def body(run: Any) -> None:
        try:
            run()
        except BaseException as exc:
            failures.append(exc)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        scraper = threading.Thread(target=body, args=(scrape,))
        workers = [
            threading.Thread(
                target=body, args=(lambda seed=seed: asyncio.run(work(random.Random(seed))),)
            )
            for seed in range(3)
        ]
        for thread in (scraper, *workers):
            thread.start()
        for thread in workers:
            thread.join(60)
        working.set()
        scraper.join(60)
    finally:
        working.set()
        sys.setswitchinterval(interval)
    assert not failures


def test_a_load_of_an_event_loop_that_was_stopped_is_no_obstacle() -> None:
    """A loop that was closed in mid-load leaves a load that nobody ends; the next one replaces
    it."""
    cache = Cached(Scripted(Stuck(), NEW))
    loop = asyncio.new_event_loop()
    task = loop.create_task(cache.get_latest("u-1"))
    loop.run_until_complete(asyncio.sleep(0))
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    assert asyncio.run(cache.get_latest("u-1")) == NEW
    assert asyncio.run(cache.get_latest("u-1")) == NEW


class Stuck(Gate):
    """A gate that needs no event loop to be built, and never opens."""

    def __init__(self) -> None:
        self.cancelled = False

    async def pass_through(self) -> Any:
        await asyncio.get_running_loop().create_future()


STATE = StateSnapshot("u-1", 1, axes={"warmth": 0.5})


class OddError(Exception):
    """An error of a third party's store."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text, number)
        self.number = number


class StubbornError(Exception):
    """One that cannot be made again from its arguments."""

    def __init__(self, text: str) -> None:
        super().__init__(text, "and more")


class ForbiddenError(Exception):
    """One that cannot be copied."""

    def __copy__(self) -> ForbiddenError:
        raise RuntimeError


class LoneError(Exception):
    """One of which there is one only."""

    def __new__(cls, text: str) -> LoneError:
        return super().__new__(cls, text)

    def __copy__(self) -> LoneError:
        raise RuntimeError


class ChangedError(OSError):
    """One that a copy would tell less of."""

    def __init__(self, path: str) -> None:
        super().__init__(5, "no", path)


@pytest.mark.parametrize(
    ("error", "own"),
    [
        (UnavailableError("down"), True),
        (OddError("odd", 5), True),
        (StubbornError("no"), True),
        (ForbiddenError("no"), True),
        (LoneError("no"), False),
        (ChangedError("no"), False),
    ],
)
async def test_each_who_waits_gets_an_error_of_his_own(error: Exception, own: bool) -> None:
    """Of the same class with the same contents, caused by the first; where that cannot be made,
    the first one itself."""
    gate = Gate()
    cache = Cached(Scripted(gate))
    tasks = [asyncio.create_task(cache.get_latest("u-1")) for _ in range(3)]
    await gate.entered.wait()
    gate.open(error)
    found = [await _error_of(task) for task in tasks]
    assert found[0] is error
    for each in found[1:]:
        assert type(each) is type(error)
        assert each.args == error.args
        assert (each is not error) is own
        if isinstance(each, OddError):
            assert each.number == 5
            assert each.__cause__ is error


async def _error_of(task: asyncio.Task[Any]) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011, B017
        await task
    return caught.value


async def test_cancelled_loads_of_a_batch_leave_nothing_behind() -> None:
    """Whoever joined one of them loads for himself."""
    gate = Gate()
    inner = Scripted(gate, STATE)
    cache = Cached(inner)
    batch = asyncio.create_task(cache.get_latest_many(["u-1", "u-2"]))
    await gate.entered.wait()
    joined = asyncio.create_task(cache.get_latest("u-1"))
    await settle()
    batch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await batch
    assert await joined == STATE
    assert cache._flights == {}
    assert len(inner.calls) == 2


async def test_reads_are_counted_whatever_their_form() -> None:
    """Misses, hits, errors and waits of single reads and of batches."""

    def counted() -> dict[str, float]:
        named = {"reads": "", "read_waits": "waits"}
        return {
            named[s.metric] or s.labels[0]: s.value
            for s in cache.samples()
            if s.metric in named and s.value
        }

    gate = Gate()
    two = StateSnapshot("u-2", 1)
    cache = Cached(
        Scripted(STATE, {"u-2": two}, UnavailableError("down"), gate, UnavailableError("down"))
    )
    await cache.get_latest("u-1")
    assert counted() == {"miss": 1}
    assert list(await cache.get_latest_many(["u-1", "u-2", "u-2", "u-3"])) == ["u-1", "u-2"]
    assert counted() == {"miss": 3, "hit": 1}
    with pytest.raises(UnavailableError):
        await cache.get_latest_many(["u-4", "u-5"])
    assert counted() == {"miss": 3, "hit": 1, "error": 2}
    first = asyncio.create_task(cache.get_latest("u-6"))
    await gate.entered.wait()
    batch = asyncio.create_task(cache.get_latest_many(["u-1", "u-6"]))
    await settle()
    assert counted() == {"miss": 3, "hit": 2, "error": 2, "waits": 1}
    gate.open(StateSnapshot("u-6", 1))
    await first
    assert set(await batch) == {"u-1", "u-6"}
    assert counted() == {"miss": 5, "hit": 2, "error": 2, "waits": 1}


async def test_of_equal_doubts_the_last_one_counts() -> None:
    """A write of unknown outcome bars its user for 5 s from the last one on, and is forgotten."""
    clock = FakeClock()
    inner = Scripted(
        UnavailableError("down"),
        UnavailableError("down"),
        STATE,
        STATE,
        STATE,
        UnavailableError("down"),
    )
    cache = Cached(inner, clock=clock)
    for seconds in (3, 3):
        with pytest.raises(UnavailableError):
            await cache.upsert_latest(STATE)
        await clock.advance(seconds)
    await cache.get_latest("u-1")
    await cache.get_latest("u-1")
    assert len(inner.calls) == 4  # not kept: 3 s since the second
    await clock.advance(2)
    await cache.get_latest("u-1")
    await cache.get_latest("u-1")
    assert len(inner.calls) == 5
    with pytest.raises(UnavailableError):
        await cache.upsert_latest(StateSnapshot("u-2", 1))
    assert list(cache._held.quarantine) == ["u-2"]
