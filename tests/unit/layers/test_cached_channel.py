"""Cached above a tier with an invalidation channel: what it does with leases and notices."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest

from layered_store.call import current_call
from layered_store.coherence.contract import Invalidations, LeasedCache, Notice
from layered_store.errors import UnavailableError
from layered_store.identity import digest_function
from layered_store.interface import Op
from layered_store.layers.cached import Cached
from layered_store.snapshot import StateSnapshot
from layered_store.testing.clock import FakeClock
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

    @property
    def attach(self) -> Callable[[LeasedCache], None]:
        return self.caches.append

    @property
    def detach(self) -> Callable[[LeasedCache], None]:
        return self.caches.remove

    @property
    def ready(self) -> Callable[[], Awaitable[None]]:
        return self._ready

    async def _ready(self) -> None:
        self.asked += 1

    @property
    def key_of(self) -> Callable[[str], bytes]:
        return DIGEST

    @property
    def stale(self) -> Callable[[str, float], Awaitable[StateSnapshot | None]]:
        return self._stale

    async def _stale(self, user_id: str, seconds: float) -> StateSnapshot | None:
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
    assert not cache._by_digest
    tier.steps = [StateSnapshot(f"v-{index}", 1) for index in range(50)]
    for index in range(50):
        await cache.get_latest(f"v-{index}")
    assert len(cache._by_digest) == 2


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
            assert len(tier.calls) == 3  # the first of them was over when the second began
        else:
            gate.open(error)
            for task in (first, *late):
                with pytest.raises(UnavailableError):
                    await task
            assert len(tier.calls) == 1
        reads = {s.labels[0]: s.value for s in cache.samples() if s.metric == "reads" and s.value}
        assert reads == ({"miss": 3} if error is None else {"error": 3})
        waits = [s.value for s in cache.samples() if s.metric == "read_waits"]
        assert waits == [2]
        assert cache._flights == {}


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
