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
