"""Leases of the caches above: given for pings that were answered and echoed, ended by doubt."""

from __future__ import annotations

import math

import pytest

from layered_store.coherence.contract import Notice
from layered_store.coherence.guarded.leases import LEASE_SECONDS, Leases
from layered_store.coherence.guarded.watch import Watch
from layered_store.testing.clock import FakeClock


class Cache:
    """What a cache above is told."""

    def __init__(self) -> None:
        self.leased = self.heard = -math.inf
        self.dropped = 0

    def invalidate(self, notice: Notice) -> None:
        pass

    def distrust(self) -> None:
        self.dropped += 1

    def lease(self, until: float) -> None:
        self.leased = until

    def hear(self, until: float) -> None:
        self.heard = until


class World:
    """The leases of one cache; the channel stands, no ping was sent yet."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.leases = Leases(self.clock, Watch(self.clock))
        self.cache = Cache()
        self.leases.caches.append(self.cache)
        self.leases.channel_stands()
        self.cache.dropped = 0


@pytest.mark.parametrize(
    ("trusted", "seconds"), [(2.0, LEASE_SECONDS), (LEASE_SECONDS / 2, LEASE_SECONDS / 2)]
)
@pytest.mark.parametrize("first", ["reply", "echo"])
async def test_a_lease_takes_a_reply_and_an_echo_and_lasts_from_the_sending(
    first: str, trusted: float, seconds: float
) -> None:
    """No longer than the tier is trusted; the echo alone says that no erasure was missed."""
    world = World()
    leases, cache, sent = world.leases, world.cache, world.clock.monotonic()
    leases.ping_sent(1)
    await world.clock.advance(0.2)
    if first == "reply":
        leases.ping_answered(1, trusted)
        assert (cache.leased, cache.heard) == (-math.inf, -math.inf)
        leases.ping_echoed(1)
    else:
        leases.ping_echoed(1)
        assert (cache.leased, cache.heard) == (-math.inf, sent + LEASE_SECONDS)
        leases.ping_answered(1, trusted)
    assert (cache.leased, cache.heard) == (sent + seconds, sent + LEASE_SECONDS)
    assert leases.until == cache.leased
    assert not cache.dropped


async def test_a_tier_that_is_not_trusted_gives_no_lease() -> None:
    """Though its echo came; nor does an echo of a ping that nobody here sent."""
    world = World()
    world.leases.ping_sent(1)
    world.leases.ping_answered(1, 0.0)
    world.leases.ping_echoed(1)
    world.leases.ping_answered(2, 2.0)
    world.leases.ping_echoed(2)
    assert world.cache.leased == world.leases.until == -math.inf


@pytest.mark.parametrize("doubt", ["channel_lost", "channel_stands", "distrust"])
async def test_where_messages_may_have_been_missed_caches_drop_all_and_answer_no_more(
    doubt: str,
) -> None:
    """Not under the lease, and not in place of an error."""
    world = World()
    world.leases.ping_sent(1)
    world.leases.ping_answered(1, 2.0)
    world.leases.ping_echoed(1)
    assert world.cache.leased > world.clock.monotonic()
    getattr(world.leases, doubt)()
    assert (world.cache.leased, world.cache.heard) == (-math.inf, -math.inf)
    assert world.cache.dropped == 1
    assert doubt != "channel_lost" or world.leases.until == -math.inf


async def test_pings_without_an_answer_are_forgotten() -> None:
    """However long the tier is away; late echoes of the last few still count."""
    world = World()
    for number in range(1, 101):
        world.leases.ping_sent(number)
    assert len(world.leases._pings) <= 5
    world.leases.ping_echoed(99)
    assert world.cache.heard == world.clock.monotonic() + LEASE_SECONDS
