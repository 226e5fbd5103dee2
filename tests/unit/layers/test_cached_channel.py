"""Cached above a tier with an invalidation channel: what it does with leases and notices."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import cachetools
import pytest

from layered_store.call import current_call
from layered_store.coherence.contract import Invalidations, LeasedCache, Notice
from layered_store.errors import (
    CircuitOpenError,
    OverloadedError,
    StoreTimeoutError,
    UnavailableError,
    ValidationError,
)
from layered_store.explaining import Held
from layered_store.identity import digest_function
from layered_store.interface import Op
from layered_store.layers.cached import Cached
from layered_store.snapshot import StateSnapshot
from layered_store.testing.clock import FakeClock, settle
from layered_store.testing.scripted import Gate, Scripted

C = TypeVar("C")

OLD = StateSnapshot("u-1", 1, axes={"a": 0.1})
NEW = StateSnapshot("u-1", 2, axes={"a": 0.2})
DIGEST = digest_function()


class Channel(Invalidations):
    """A channel that the test speaks through."""

    def __init__(self) -> None:
        self.caches: list[LeasedCache] = []
        self.asked = 0
        self.asked_stale: list[float] = []
        self.old: StateSnapshot | None = None

    def attach(self, cache: LeasedCache) -> None:
        self.caches.append(cache)

    def detach(self, cache: LeasedCache) -> None:
        self.caches.remove(cache)

    async def ready(self) -> None:
        self.asked += 1

    @property
    def key_of(self) -> Callable[[str], bytes]:
        return DIGEST

    async def stale(self, user_id: str, seconds: float) -> StateSnapshot | None:
        self.asked_stale.append(seconds)
        return self.old

    def say(self, version: int, user_id: str = "u-1", *, erased: bool = False) -> None:
        for cache in self.caches:
            cache.invalidate(Notice(DIGEST(user_id), version, erased))

    def lease(self, until: float) -> None:
        for cache in self.caches:
            cache.lease(until)

    def hear(self, until: float) -> None:
        for cache in self.caches:
            cache.hear(until)

    def distrust(self) -> None:
        for cache in self.caches:
            cache.distrust()


class Tier(Scripted):
    """Offers the channel and gives each write a version."""

    def __init__(self, *steps: object) -> None:
        super().__init__(*steps)
        self.channel = Channel()
        self.version = 0

    def capability(self, kind: type[C]) -> C | None:
        if kind is Invalidations:
            return self.channel  # type: ignore[return-value]
        return super().capability(kind)

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        await super().upsert_latest(snapshot)
        self.version += 1
        current_call().version = self.version


def build(*steps: object, **options: Any) -> tuple[Cached, Tier, FakeClock]:
    tier, clock = Tier(*steps), FakeClock()
    cache = Cached(tier, clock=clock, **{"ttl": 600, **options})
    tier.channel.lease(clock.monotonic() + 100)
    tier.channel.hear(clock.monotonic() + 100)
    return cache, tier, clock


async def test_nothing_is_answered_without_a_lease() -> None:
    """Before the first one, and after it ran out, each read goes below; the entry stays."""
    tier, clock = Tier(OLD, OLD, OLD), FakeClock()
    cache = Cached(tier, ttl=600, clock=clock)
    await cache.get_latest("u-1")
    await cache.get_latest("u-1")
    assert len(tier.calls) == 2
    tier.channel.lease(clock.monotonic() + 1)
    await cache.get_latest("u-1")
    assert len(tier.calls) == 2
    await clock.advance(1)
    assert await cache.get_latest("u-1") == OLD
    assert len(tier.calls) == 3
    assert tier.channel.asked == 1


@pytest.mark.parametrize("erased", [False, True])
async def test_a_notice_takes_away_what_is_older(erased: bool) -> None:
    """What another process wrote or erased is not answered any more."""
    cache, tier, _ = build(OLD, NEW)
    assert await cache.get_latest("u-1") == OLD
    tier.channel.say(7, "u-2")
    assert await cache.get_latest("u-1") == OLD
    tier.channel.say(7, erased=erased)
    assert await cache.get_latest("u-1") == NEW
    assert len(tier.calls) == 2


async def test_case_37_a_notice_of_the_own_write_leaves_it() -> None:
    """It carries the version; that of a later write of another process does not pass for it."""
    cache, tier, _ = build(None, OLD)
    await cache.upsert_latest(NEW)
    tier.channel.say(1)
    assert await cache.get_latest("u-1") == NEW
    assert tier.calls == [Op.UPSERT_LATEST]
    tier.channel.say(2)
    assert await cache.get_latest("u-1") == OLD


async def test_case_33_a_notice_during_a_load_bars_it() -> None:
    """The answer under way may be older: its callers get it, nobody later does."""
    gate = Gate()
    cache, tier, _ = build(gate, NEW)
    load = asyncio.create_task(cache.get_latest("u-1"))
    await gate.entered.wait()
    tier.channel.say(2)
    gate.open(OLD)
    assert await load == OLD
    assert await cache.get_latest("u-1") == NEW


async def test_a_notice_during_a_write_bars_what_is_older() -> None:
    """A write that another process's overtook is not kept; one that is newer is."""
    for noticed, kept in ((1, True), (2, False)):
        gate = Gate()
        cache, tier, _ = build(gate, OLD)
        write = asyncio.create_task(cache.upsert_latest(NEW))
        await gate.entered.wait()
        tier.channel.say(noticed)
        gate.open()
        await write
        assert (await cache.get_latest("u-1") == NEW) is kept


@pytest.mark.parametrize("meanwhile", ["nothing", "notice", "distrust"])
async def test_a_refused_write_leaves_what_is_still_believed(meanwhile: str) -> None:
    """Nothing happened here; whether something did elsewhere, the channel tells."""
    gate = Gate()
    cache, tier, _ = build(OLD, gate, NEW)
    await cache.get_latest("u-1")
    write = asyncio.create_task(cache.upsert_latest(NEW))
    await gate.entered.wait()
    if meanwhile == "notice":
        tier.channel.say(7)
    elif meanwhile == "distrust":
        tier.channel.distrust()
    gate.open(CircuitOpenError())
    with pytest.raises(CircuitOpenError):
        await write
    assert await cache.get_latest("u-1") == (OLD if meanwhile == "nothing" else NEW)
    assert set(cache._held.by_digest.values()) == {"u-1"}
    tier.channel.say(9)
    assert cache._entries.get("u-1") is None
    assert not cache._held.by_digest


async def test_case_41_a_notice_ends_an_absence() -> None:
    """A user whom another process wrote is not absent any more."""
    cache, tier, _ = build(None, NEW, negative_ttl=60)
    assert await cache.get_latest("u-1") is None
    assert await cache.get_latest("u-1") is None
    assert len(tier.calls) == 1
    tier.channel.say(1)
    assert await cache.get_latest("u-1") == NEW


async def test_distrust_takes_all_and_bars_what_is_under_way() -> None:
    """After a gap in the channel nothing from before it is answered or kept."""
    load_gate, write_gate = Gate(), Gate()
    cache, tier, _ = build(OLD, load_gate, write_gate, NEW, None, None)
    await cache.get_latest("u-1")
    load = asyncio.create_task(cache.get_latest("u-2"))
    await load_gate.entered.wait()
    write = asyncio.create_task(cache.upsert_latest(StateSnapshot("u-3", 1)))
    await write_gate.entered.wait()
    tier.channel.distrust()
    load_gate.open(StateSnapshot("u-2", 1))
    write_gate.open()
    await asyncio.gather(load, write)
    before = len(tier.calls)
    for user_id in ("u-1", "u-2", "u-3"):
        await cache.get_latest(user_id)
    assert len(tier.calls) == before + 3


async def test_case_44_no_old_answer_after_a_notice() -> None:
    """``stale_if_error`` never brings back what another process wrote over or erased."""
    for erased in (False, True):
        cache, tier, clock = build(OLD, UnavailableError(), ttl=10, stale_if_error=1000)
        await cache.get_latest("u-1")
        await clock.advance(11)
        tier.channel.say(2, erased=erased)
        with pytest.raises(UnavailableError):
            await cache.get_latest("u-1")


async def test_a_batch_is_not_kept_as_nobody_told_its_versions() -> None:
    """Each of its users is read again, and then kept."""
    cache, tier, _ = build(None, NEW)
    await cache.upsert_latest_many([NEW])
    assert await cache.get_latest("u-1") == NEW
    assert await cache.get_latest("u-1") == NEW
    assert tier.calls == [Op.UPSERT_LATEST_MANY, Op.GET_LATEST]


async def test_no_digest_is_kept_of_a_user_of_whom_nothing_is() -> None:
    """Absent users, failed loads and erased users leave nothing behind."""
    cache, tier, _ = build(None, UnavailableError(), OLD, None, max_entries=2)
    await cache.get_latest("u-1")
    with pytest.raises(UnavailableError):
        await cache.get_latest("u-1")
    await cache.get_latest("u-1")
    await cache.delete("u-1")
    assert not cache._held.by_digest
    tier.steps = [StateSnapshot(f"v-{index}", 1) for index in range(50)]
    for index in range(50):
        await cache.get_latest(f"v-{index}")
    assert len(cache._held.by_digest) == 2


@pytest.mark.parametrize(
    "cache", [cachetools.LRUCache(10), cachetools.TTLCache(10, 1e-9), cachetools.Cache(0)]
)
async def test_what_a_given_cache_gives_up_does_not_stay_behind(
    cache: cachetools.Cache[Any, Any],
) -> None:
    """It tells nobody whom it evicts; those whom it holds are found by a notice all the same."""
    cached, tier, _ = build(cache=cache)
    for number in range(1_000):
        await cached.upsert_latest(StateSnapshot(f"u-{number}"))
        assert len(cached._held.by_digest) <= 2 * len(cache) + 65
    for user_id in list(cache):
        tier.channel.say(10_000, user_id)
    assert not cache


@pytest.mark.parametrize("bad", ["", "a b", "\ud800", 5, ["u-1"]])
async def test_a_bad_id_is_refused_before_it_is_looked_for_in_the_channel(bad: Any) -> None:
    """With and without a lease; nothing of it is kept."""
    cache, tier, clock = build()
    for _ in range(2):
        for call in (cache.get_latest(bad), cache.get_latest_many(["u-2", bad])):
            with pytest.raises(ValidationError):
                await call
        await clock.advance(200)
    assert not tier.calls and not cache._flights and not cache._held.by_digest


async def test_invalidation_off_and_required() -> None:
    """Off: the channel is never asked, and entries answer for their TTL."""
    tier, clock = Tier(OLD, NEW), FakeClock()
    cache = Cached(tier, invalidation="off", clock=clock)
    await cache.get_latest("u-1")
    tier.channel.say(9)
    assert await cache.get_latest("u-1") == OLD
    assert (tier.channel.caches, tier.channel.asked) == ([], 0)
    assert Cached(tier, invalidation="required")._channel is tier.channel


async def test_closing_leaves_the_channel() -> None:
    """No notice reaches a closed cache."""
    cache, tier, _ = build(OLD)
    await cache.get_latest("u-1")
    await cache.aclose()
    assert tier.channel.caches == []


async def test_who_comes_late_without_a_lease_gets_no_older_answer() -> None:
    """A load that began in an earlier turn may have read before a write that the late one knows
    of: what it found is asked for once more, what it failed with is his too."""
    for error in (None, UnavailableError("down")):
        gate = Gate()
        cache, tier, clock = build(gate, NEW, NEW, ttl=10)
        await clock.advance(200)  # no lease
        first = asyncio.create_task(cache.get_latest("u-1"))
        await gate.entered.wait()
        late = [asyncio.create_task(cache.get_latest("u-1")) for _ in range(2)]
        await asyncio.sleep(0)
        assert len(tier.calls) == 1  # they wait
        if error is None:
            gate.open(OLD)
            assert await first == OLD
            assert await asyncio.gather(*late) == [NEW, NEW]
            assert len(tier.calls) == 2  # they share the next one
        else:
            gate.open(error)
            for task in (first, *late):
                with pytest.raises(UnavailableError):
                    await task
            assert len(tier.calls) == 1
        reads = {s.labels[0]: s.value for s in cache.samples() if s.metric == "reads" and s.value}
        assert reads == ({"miss": 3} if error is None else {"error": 3})
        waits = [s.value for s in cache.samples() if s.metric == "read_waits"]
        assert waits == ([3] if error is None else [2])
        assert cache._flights == {}


@pytest.mark.parametrize("many", [False, True])
async def test_without_a_lease_a_load_begins_when_none_can_join_it_any_more(*, many: bool) -> None:
    """A turn of the event loop may take long, and an erasure elsewhere return within it: who comes
    after that and joins must find what a load of its own would have."""
    cache, tier, clock = build(ttl=10)
    await clock.advance(200)  # no lease
    found: list[object] = []
    tier.states = {"u-1": OLD}

    class Prompt(Tier):
        async def get_latest(self, user_id: str) -> StateSnapshot | None:
            return tier.states.get(user_id)

        async def get_latest_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
            return dict(tier.states)

    cache.inner = Prompt()

    async def first() -> None:
        found.append(
            await (cache.get_latest_many(["u-1"]) if many else cache.get_latest("u-1"))
        )

    async def later() -> None:
        tier.states = {}  # erased by another process, whose delete has returned
        found.append(await cache.get_latest("u-1"))

    await asyncio.gather(first(), later())
    assert found == [{} if many else None, None]


async def test_who_comes_late_to_a_failure_may_get_an_old_answer() -> None:
    """By the channel, as the one who loaded: each asks for himself, what he has seen may differ."""
    gate = Gate()
    cache, tier, clock = build(gate, ttl=10, stale_if_error=100)
    await clock.advance(200)
    tier.channel.old = OLD
    first = asyncio.create_task(cache.get_latest("u-1"))
    await gate.entered.wait()
    late = asyncio.create_task(cache.get_latest("u-1"))
    await asyncio.sleep(0)
    gate.open(UnavailableError("down"))
    assert await asyncio.gather(first, late) == [OLD, OLD]
    reads = {s.labels[0]: s.value for s in cache.samples() if s.metric == "reads" and s.value}
    assert reads == {"stale": 2}
    assert set(tier.channel.asked_stale) == {100.0}


async def test_a_batch_follows_the_channel_too() -> None:
    """Else a process that only reads batches would never have a lease."""
    tier = Tier()
    cache = Cached(tier, clock=FakeClock())
    await cache.get_latest_many(["u-1"])
    assert tier.channel.asked == 1
    await cache.get_latest_many(["u-1"])
    assert tier.channel.asked == 1
    write = Tier()
    await Cached(write, clock=FakeClock()).upsert_latest(NEW)
    assert write.channel.asked == 1


async def test_without_a_lease_a_batch_answers_nothing_itself() -> None:
    """As a single read; and what is distrusted is counted and forgotten, its digest too."""
    cache, tier, clock = build(None, {"u-1": NEW}, {"u-1": NEW}, ttl=600)
    await cache.upsert_latest(OLD)
    assert await cache.get_latest_many(["u-1"]) == {"u-1": OLD}
    await clock.advance(100)
    assert await cache.get_latest_many(["u-1"]) == {"u-1": NEW}
    tier.channel.lease(clock.monotonic() + 100)
    await cache.get_latest_many(["u-1"])
    held = len(cache._entries)
    tier.channel.distrust()
    removed = {s.labels: s.value for s in cache.samples() if s.metric == "invalidations"}
    assert removed.get(("distrust",), 0) == held
    assert len(cache._entries) == 0


# Loads that are shared, with and without a lease


def reads_of(cache: Cached) -> dict[str, float]:
    return {s.labels[0]: s.value for s in cache.samples() if s.metric == "reads" and s.value}


async def test_under_a_lease_whoever_comes_shares_the_load_under_way() -> None:
    """One by one or in a batch: the channel would have taken it away, were it old."""
    gate = Gate()
    cache, tier, _ = build(gate)
    first = asyncio.create_task(cache.get_latest("u-1"))
    await gate.entered.wait()
    await settle()
    second = asyncio.create_task(cache.get_latest("u-1"))
    batch = asyncio.create_task(cache.get_latest_many(["u-1"]))
    await settle()
    gate.open(OLD)
    assert await asyncio.gather(first, second) == [OLD, OLD]
    assert await batch == {"u-1": OLD}
    assert tier.calls == [Op.GET_LATEST]
    assert reads_of(cache) == {"miss": 3}


async def test_without_a_lease_a_load_is_shared_in_the_turn_in_which_it_began() -> None:
    """Nothing of it can have been read by then."""
    gate = Gate()
    cache, tier, clock = build(gate, ttl=10)
    await clock.advance(200)
    calls = asyncio.gather(*(cache.get_latest("u-1") for _ in range(5)))
    await settle()
    gate.open(OLD)
    assert await calls == [OLD] * 5
    assert tier.calls == [Op.GET_LATEST]
    assert reads_of(cache) == {"miss": 5}


async def test_a_lease_that_ends_now_lets_nobody_join() -> None:
    """At its very end an erasure elsewhere need not wait for this process any more."""
    gate = Gate()
    cache, tier, clock = build(gate, NEW)
    first = asyncio.create_task(cache.get_latest("u-1"))
    await gate.entered.wait()
    await clock.advance(100)
    second = asyncio.create_task(cache.get_latest("u-1"))
    await settle()
    gate.open(OLD)
    assert await asyncio.gather(first, second) == [OLD, NEW]
    assert len(tier.calls) == 2


async def test_without_a_lease_a_batch_loads_for_itself_and_disturbs_nobody() -> None:
    """The load that is under way goes on, and what it finds is kept as it would have been."""
    gate = Gate()
    cache, tier, clock = build(gate, {"u-1": OLD})
    await clock.advance(200)
    first = asyncio.create_task(cache.get_latest("u-1"))
    await gate.entered.wait()
    await settle()
    assert await cache.get_latest_many(["u-1"]) == {"u-1": OLD}
    assert not first.done()
    gate.open(OLD)
    assert await first == OLD
    tier.channel.lease(clock.monotonic() + 100)
    assert await cache.get_latest("u-1") == OLD
    assert tier.calls == [Op.GET_LATEST, Op.GET_LATEST_MANY]


async def test_of_two_loads_that_found_different_states_neither_is_kept() -> None:
    """The later answer was seen, and the earlier one must not be seen after it."""
    first_gate, second_gate = Gate(), Gate()
    cache, tier, clock = build(first_gate, second_gate, NEW)
    await clock.advance(200)
    first = asyncio.create_task(cache.get_latest("u-1"))
    await first_gate.entered.wait()
    batch = asyncio.create_task(cache.get_latest_many(["u-1"]))
    await second_gate.entered.wait()
    first_gate.open(OLD)
    assert await first == OLD
    second_gate.open({"u-1": NEW})
    assert await batch == {"u-1": NEW}
    assert len(cache._entries) == 0
    assert cache._held.by_digest == {}
    tier.channel.lease(clock.monotonic() + 100)
    assert await cache.get_latest("u-1") == NEW
    assert len(tier.calls) == 3


async def test_a_batch_hears_of_what_changes_meanwhile_like_a_single_read() -> None:
    """A notice bars what is being loaded; what was loaded has no version to outlive one."""
    gate = Gate()
    cache, tier, _ = build(gate, {"u-1": OLD}, NEW)
    batch = asyncio.create_task(cache.get_latest_many(["u-1"]))
    await gate.entered.wait()
    tier.channel.say(1)
    gate.open({"u-1": OLD})
    assert await batch == {"u-1": OLD}
    assert await cache.get_latest_many(["u-1"]) == {"u-1": OLD}
    assert len(tier.calls) == 2
    tier.channel.say(1)
    assert await cache.get_latest("u-1") == NEW


async def test_a_load_that_goes_wrong_leaves_no_digest() -> None:
    """Failed, cancelled, or with another user's state."""
    stranger = StateSnapshot("somebody-else", 1)
    cache, _, _ = build(UnavailableError("down"), {"u-1": stranger})
    with pytest.raises(UnavailableError):
        await cache.get_latest("u-1")
    assert cache._held.by_digest == {}
    assert await cache.get_latest_many(["u-1"]) == {}
    assert cache._held.by_digest == {}
    gate = Gate()
    cache, _, _ = build(gate)
    task = asyncio.create_task(cache.get_latest("u-1"))
    await gate.entered.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert cache._held.by_digest == {}


async def test_a_refresh_is_not_due_while_the_user_is_being_loaded() -> None:
    """Without a lease the entry stays and a read goes below; with a new one it is a hit again."""
    gate = Gate()
    cache, tier, clock = build(OLD, gate, refresh_ahead=0.1)
    await cache.get_latest("u-1")
    await clock.advance(100)
    load = asyncio.create_task(cache.get_latest("u-1"))
    await gate.entered.wait()
    tier.channel.lease(clock.monotonic() + 100)
    assert await cache.get_latest("u-1") == OLD
    await settle()
    assert len(tier.calls) == 2
    gate.open(NEW)
    assert await load == NEW


# Old answers


async def test_the_tier_is_asked_for_an_old_state_only_when_it_may_answer() -> None:
    """Not when that was not asked for, nor while a write is under way or may still land, nor for a
    load that was overtaken."""
    down = UnavailableError("down")
    gate = Gate()
    cache, tier, clock = build(gate)
    tier.channel.old = OLD
    await clock.advance(200)
    first = asyncio.create_task(cache.get_latest("u-1"))
    await gate.entered.wait()
    late = asyncio.create_task(cache.get_latest("u-1"))
    await settle()
    gate.open(down)
    for task in (first, late):
        with pytest.raises(UnavailableError):
            await task
    gate, lost = Gate(), UnavailableError("cut off", outcome_unknown=True)
    cache, asked, clock = build(gate, down, down, down, stale_if_error=100)
    asked.channel.old = OLD
    write = asyncio.create_task(cache.upsert_latest(NEW))
    await gate.entered.wait()
    with pytest.raises(UnavailableError):
        await cache.get_latest("u-1")
    gate.open(lost)
    with pytest.raises(UnavailableError):
        await write
    with pytest.raises(UnavailableError):
        await cache.get_latest("u-1")
    assert (tier.channel.asked_stale, asked.channel.asked_stale) == ([], [])
    await clock.advance(5)
    assert await cache.get_latest("u-1") == OLD
    gate = Gate()
    cache, tier, _ = build(gate, None, stale_if_error=100)
    tier.channel.old = OLD
    load = asyncio.create_task(cache.get_latest("u-1"))
    await gate.entered.wait()
    await cache.upsert_latest(NEW)
    gate.open(down)
    with pytest.raises(UnavailableError):
        await load
    assert tier.channel.asked_stale == []


async def test_an_old_entry_answers_only_while_no_erasure_can_have_been_missed() -> None:
    """Up to the moment until which the channel was heard, and not at it; an absence never does."""
    down = UnavailableError("down")
    cache, _, clock = build(OLD, down, down, ttl=10, stale_if_error=1000)
    await cache.get_latest("u-1")
    await clock.advance(99.9)
    assert await cache.get_latest("u-1") == OLD
    await clock.advance(0.1)
    with pytest.raises(UnavailableError):
        await cache.get_latest("u-1")
    cache, tier, clock = build(None, down, ttl=10, negative_ttl=10, stale_if_error=1000)
    await cache.get_latest("u-1")
    await clock.advance(20)
    tier.channel.old = OLD
    assert await cache.get_latest("u-1") == OLD


class Holding(Channel):
    """One whose old answers take their time."""

    def __init__(self) -> None:
        super().__init__()
        self.gate: Gate | None = None

    async def stale(self, user_id: str, seconds: float) -> StateSnapshot | None:
        if self.gate is not None:
            await self.gate.pass_through()
        return await super().stale(user_id, seconds)


def build_holding(*steps: object, **options: Any) -> tuple[Cached, Tier, Gate]:
    """Return a cache whose channel holds back the old answer ``OLD``."""
    tier, clock = Tier(*steps), FakeClock()
    tier.channel = channel = Holding()
    gate = channel.gate = Gate()
    channel.old = OLD
    cache = Cached(tier, clock=clock, **{"ttl": 600, "stale_if_error": 100, **options})
    channel.lease(clock.monotonic() + 100)
    channel.hear(clock.monotonic() + 100)
    return cache, tier, gate


async def test_an_old_state_that_a_write_overtook_is_not_answered() -> None:
    """The tier gave it while the write was made."""
    cache, tier, gate = build_holding(UnavailableError("down"), None)
    load = asyncio.create_task(cache.get_latest("u-1"))
    await gate.entered.wait()
    await cache.upsert_latest(NEW)
    gate.open()
    with pytest.raises(UnavailableError):
        await load
    assert await cache.get_latest("u-1") == NEW
    assert tier.calls == [Op.GET_LATEST, Op.UPSERT_LATEST]


@pytest.mark.parametrize("form", ["single", "batch", "refresh"])
async def test_who_is_cancelled_while_an_old_state_is_looked_for_hands_over(form: str) -> None:
    """The next one loads; nothing of the load is left."""
    down = UnavailableError("down")
    steps: list[object] = [down, NEW]
    options: dict[str, Any] = {}
    if form == "refresh":
        steps, options = [OLD, *steps], {"refresh_ahead": 0.1, "ttl": 50}
    cache, tier, gate = build_holding(*steps, **options)
    if form == "refresh":
        clock: Any = cache.clock
        await cache.get_latest("u-1")
        await clock.advance(40)
        tier.channel.hear(clock.monotonic())  # so that its own entry is no old answer
        await cache.get_latest("u-1")
        (task,) = cache._refreshes
        await gate.entered.wait()
        await clock.advance(20)
    else:
        call = cache.get_latest("u-1") if form == "single" else cache.get_latest_many(["u-1"])
        task = asyncio.ensure_future(call)  # type: ignore[arg-type]
        await gate.entered.wait()
    heir = asyncio.create_task(cache.get_latest("u-1"))
    await settle()
    task.cancel()
    assert await heir == NEW
    assert task.cancelled()
    assert cache._flights == {}
    assert tier.calls[-1] is Op.GET_LATEST


async def test_after_an_erasure_the_tier_is_asked_again() -> None:
    """Nobody told its version here, so the absence cannot be kept."""
    cache, tier, _ = build(None, None, negative_ttl=60)
    await cache.delete("u-1")
    assert await cache.get_latest("u-1") is None
    assert tier.calls == [Op.DELETE, Op.GET_LATEST]


async def test_no_digest_outlives_what_it_was_kept_for() -> None:
    """An absence that is not remembered, and an entry that expired and was swept."""
    cache, _, clock = build(None, OLD, StateSnapshot("u-2", 1), ttl=10)
    await cache.get_latest("u-1")
    assert cache._held.by_digest == {}
    await cache.get_latest("u-1")
    await clock.advance(10)
    await cache.get_latest("u-2")
    assert list(cache._held.by_digest.values()) == ["u-2"]


async def test_no_digest_stays_behind_of_a_load_that_outlived_a_doubt() -> None:
    """It began while a write could still take effect, and so is taken out when that is over."""
    gate = Gate()
    cache, _, clock = build(StoreTimeoutError("no answer"), gate, StateSnapshot("u-2", 1))
    with pytest.raises(StoreTimeoutError):
        await cache.upsert_latest(NEW)
    loading = asyncio.create_task(cache.get_latest("u-1"))
    await gate.entered.wait()
    await clock.advance(5)
    await cache.get_latest("u-2")
    gate.open(OLD)
    assert await loading == OLD
    assert list(cache._held.by_digest.values()) == ["u-2"]


async def test_what_the_channel_takes_away_is_counted_apart() -> None:
    """From what this process's own writes do."""
    cache, tier, _ = build(OLD)
    await cache.get_latest("u-1")
    tier.channel.say(5)
    tier.channel.say(6)
    removed = {s.labels: s.value for s in cache.samples() if s.metric == "invalidations"}
    assert removed == {("channel",): 1}


async def test_a_cache_above_a_cache_hears_of_the_same() -> None:
    """A notice takes the user from both."""
    cache, tier, clock = build(OLD, NEW)
    outer = Cached(cache, ttl=600, clock=clock)
    tier.channel.lease(clock.monotonic() + 100)
    assert len(tier.channel.caches) == 2
    assert await outer.get_latest("u-1") == OLD
    tier.channel.say(5)
    assert await outer.get_latest("u-1") == NEW


async def test_it_tells_what_it_holds_and_whether_that_answers() -> None:
    """With the version of a write, and without a lease that it does not answer."""
    cache, tier, clock = build(None, OLD, ttl=50)
    absent = await cache.peek("u-1")
    assert (absent.held, absent.answers) == (Held.ABSENT, False)
    await cache.upsert_latest(NEW)
    found = await cache.peek("u-1")
    assert (found.held, found.version, found.answers, found.note) == (Held.STATE, 1, True, "")
    assert found.updated_at_unix_ms == NEW.updated_at_unix_ms
    await cache.get_latest("u-1")
    tier.channel.lease(clock.monotonic())
    found = await cache.peek("u-1")
    assert not found.answers
    assert found.note == "no lease: the tier waits for its repair"
    tier.channel.hear(clock.monotonic())
    assert (await cache.peek("u-1")).note == "no lease: the invalidation channel is away"
    tier.channel.lease(clock.monotonic() + 100)
    tier.channel.say(2)
    await cache.get_latest("u-1")
    found = await cache.peek("u-1")
    assert (found.version, found.answers) == (None, True)
    await clock.advance(50)
    found = await cache.peek("u-1")
    assert (found.answers, found.note) == (False, "expired")
    assert cache.staleness == (0.0, "")
    assert "show at once" in cache.notes()[0]


async def test_who_came_late_and_went_away_is_not_in_the_way_of_the_others() -> None:
    """The load ends for those who are left as if he had never come."""
    gate = Gate()
    cache, tier, clock = build(gate, NEW)
    await clock.advance(200)
    first = asyncio.create_task(cache.get_latest("u-1"))
    await gate.entered.wait()
    late = [asyncio.create_task(cache.get_latest("u-1")) for _ in range(2)]
    await settle()
    late[0].cancel()
    await settle()
    gate.open(OLD)
    assert await first == OLD
    assert await late[1] == NEW
    assert late[0].cancelled()
    assert len(tier.calls) == 2


async def test_no_old_state_is_asked_for_when_the_channel_took_the_load_away() -> None:
    """It could not be answered: something newer is known to be there."""
    gate = Gate()
    cache, tier, _ = build(gate, stale_if_error=100)
    tier.channel.old = OLD
    load = asyncio.create_task(cache.get_latest("u-1"))
    await gate.entered.wait()
    tier.channel.say(2)
    gate.open(UnavailableError("down"))
    with pytest.raises(UnavailableError):
        await load
    assert tier.channel.asked_stale == []


async def test_before_the_channel_was_heard_no_old_entry_answers() -> None:
    """An erasure may have been missed since the process began."""
    clock = FakeClock()
    tier = Tier(OLD, UnavailableError("down"))
    cache = Cached(tier, ttl=10, stale_if_error=100, clock=clock)
    await cache.get_latest("u-1")
    await clock.advance(11)
    with pytest.raises(UnavailableError):
        await cache.get_latest("u-1")


async def test_what_was_kept_ends_when_an_overtaken_load_found_something_else() -> None:
    """Its caller has seen the other state; nobody knows which of the two is newer."""
    gate = Gate()
    cache, tier, _ = build(gate, NEW, NEW)
    load = asyncio.create_task(cache.get_latest("u-1"))
    await gate.entered.wait()
    tier.channel.say(2)
    assert await cache.get_latest("u-1") == NEW
    gate.open(OLD)
    assert await load == OLD
    assert len(cache._entries) == 0
    assert await cache.get_latest("u-1") == NEW
    assert len(tier.calls) == 3


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("stale", [0.0, 5.0])
async def test_a_user_read_again_after_the_ttl_is_still_told_of(
    *, given: bool, stale: float
) -> None:
    """What takes the place of an expired entry is found by the notices that come after."""
    cache, tier, clock = build(
        OLD,
        OLD,
        NEW,
        ttl=10,
        stale_if_error=stale,
        cache=cachetools.LRUCache(10) if given else None,
    )
    assert await cache.get_latest("u-1") == OLD
    await clock.advance(10 + stale)
    assert await cache.get_latest("u-1") == OLD
    assert await cache.get_latest("u-1") == OLD, "from memory"
    tier.channel.say(7)
    assert await cache.get_latest("u-1") == NEW


@pytest.mark.parametrize("read", [False, True])
async def test_a_notice_finds_whoever_is_about_to_be_kept(*, read: bool) -> None:
    """It may come on the event loop of another thread, between any two steps of this one."""
    cache, _, clock = build(OLD, OLD if read else None, ttl=10)
    await cache.get_latest("u-1")
    found: list[str | None] = []

    class Index(dict[bytes, str]):
        def pop(self, key: bytes, default: Any = None) -> Any:
            found.append(super().get(key))
            return super().pop(key, default)

    cache._held.by_digest = Index(cache._held.by_digest)
    await clock.advance(11)
    await (cache.get_latest("u-1") if read else cache.upsert_latest(NEW))
    assert not found
    assert cache._held.by_digest == {DIGEST("u-1"): "u-1"}


@pytest.mark.parametrize("way", ["read", "batch", "write"])
async def test_a_notice_that_comes_in_another_thread_as_something_is_kept_takes_it_away(
    way: str,
) -> None:
    """It waits until that is there, and so cannot miss it."""

    class Meeting(FakeClock):
        """Lets another thread go on when this one reads the time."""

        other: threading.Thread | None = None

        def monotonic(self) -> float:
            other, self.other = self.other, None
            if other is not None:
                other.start()
                other.join(0.05)
            return super().monotonic()

    gate, clock = Gate(), Meeting()
    tier = Tier(gate, NEW)
    cache = Cached(tier, clock=clock, ttl=600)
    tier.channel.lease(clock.monotonic() + 100)
    calls: dict[str, Callable[[], Any]] = {
        "read": lambda: cache.get_latest("u-1"),
        "batch": lambda: cache.get_latest_many(["u-1"]),
        "write": lambda: cache.upsert_latest(OLD),
    }
    call = asyncio.create_task(calls[way]())
    await gate.entered.wait()
    clock.other = told = threading.Thread(target=tier.channel.say, args=(9,))
    gate.open({"u-1": OLD} if way == "batch" else OLD)
    await call
    await asyncio.to_thread(told.join)
    assert await cache.get_latest("u-1") == NEW


class Moody(Tier):
    """Takes its time, and fails now and then."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.chance = chance
        self.states: dict[str, StateSnapshot] = {}

    async def _pause(self) -> None:
        for _ in range(self.chance.choice((0, 0, 1, 2, 5))):
            await asyncio.sleep(0)
        if self.chance.random() < 0.15:
            errors = UnavailableError("down"), OverloadedError("full")
            raise self.chance.choice(errors)

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        await self._pause()
        found = self.states.get(user_id)
        await self._pause()
        return found

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        await self._pause()
        self.states[snapshot.user_id] = snapshot
        self.version += 1
        current_call().version = self.version
        await self._pause()

    async def delete(self, user_id: str) -> None:
        await self._pause()
        self.states.pop(user_id, None)
        await self._pause()


@pytest.mark.parametrize("given", [False, True])
async def test_notices_find_all_that_is_held_loaded_or_written(*, given: bool) -> None:
    """After any course of events; and nobody else is kept in mind."""
    users = [f"u-{number}" for number in range(5)]
    for seed in range(60):
        chance, clock = random.Random(seed), FakeClock()
        tier = Moody(chance)
        cache = Cached(
            tier,
            ttl=chance.choice((1, 3, 10)),
            negative_ttl=chance.choice((0, 2)),
            stale_if_error=chance.choice((0, 2)),
            refresh_ahead=chance.choice((None, 0.5)),
            max_entries=chance.choice((2, 3, 10)),
            cache=cachetools.LRUCache(3) if given else None,
            clock=clock,
        )
        held, calls = cache._held, []
        for step in range(80):
            user = chance.choice(users)
            tier.channel.lease(clock.monotonic() + 5)
            match chance.randrange(11):
                case 0 | 1 | 2 | 3:
                    calls.append(asyncio.ensure_future(cache.get_latest(user)))
                case 4:
                    several = cache.get_latest_many(chance.sample(users, 3))
                    calls.append(asyncio.ensure_future(several))  # type: ignore[arg-type]
                case 5:
                    writing = cache.upsert_latest(StateSnapshot(user, step))
                    calls.append(asyncio.ensure_future(writing))  # type: ignore[arg-type]
                case 6:
                    calls.append(asyncio.ensure_future(cache.delete(user)))  # type: ignore[arg-type]
                case 7:
                    await clock.advance(chance.choice((0.4, 1, 3, 6)))
                case 8:
                    tier.channel.say(tier.version + chance.randrange(2), user)
                case 9 if chance.random() < 0.2:
                    tier.channel.distrust()
                case 10 if calls:
                    chance.choice(calls).cancel()
            for _ in range(chance.randrange(3)):
                await asyncio.sleep(0)
            there = {user for user in users if held.look(user) is not None}
            there |= held.flights.keys() | held.writing.keys()
            found = {user for user in users if held.by_digest.get(DIGEST(user)) == user}
            assert there <= found, f"seed {seed}, step {step}"
            assert given or found == there, f"seed {seed}, step {step}"
        await asyncio.gather(*calls, return_exceptions=True)
        await cache.aclose()
