"""The parts of guarded copies, put together."""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING, Final

from layered_store.coherence.contract import Invalidations
from layered_store.coherence.guarded.backlog import Backlog
from layered_store.coherence.guarded.channel import Channel
from layered_store.coherence.guarded.erasing import GuardedErasures
from layered_store.coherence.guarded.leases import Leases
from layered_store.coherence.guarded.reachability import Reachability
from layered_store.coherence.guarded.reading import GuardedReads
from layered_store.coherence.guarded.repair import Repair
from layered_store.coherence.guarded.seen import Seen
from layered_store.coherence.guarded.startup import Startup
from layered_store.coherence.guarded.watch import Watch
from layered_store.coherence.guarded.writing import GuardedWrites

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable

    from layered_store.clock import Clock
    from layered_store.coherence.contract import Authority, CacheTier, LeasedCache
    from layered_store.interface import StateStore
    from layered_store.snapshot import StateSnapshot
    from layered_store.stats import Reads

__all__ = ["GuardedCopies"]

_alive: Final[weakref.WeakSet[GuardedCopies]] = weakref.WeakSet()


class GuardedCopies(Invalidations):
    """Reads, writes and erases users in an authority with copies in a tier.

    Args:
        tier: holds the copies.
        authority: holds the truth.
        clock: source of time.
        block: the store that offers the tier, for log events.
    """

    def __init__(
        self,
        tier: CacheTier,
        authority: Authority,
        clock: Clock,
        block: StateStore | None = None,
    ) -> None:
        self._tier = tier
        self._digest = authority.digest
        self._monotonic = clock.monotonic
        self._watch = watch = Watch(clock)
        self._seen = seen = Seen(clock, watch.repair_now)
        self._backlog = backlog = Backlog(authority.digest, clock)
        self._reach = reach = Reachability(tier, clock, watch.repair_now, block)
        self._leases = leases = Leases(clock, watch)
        self._repair = repair = Repair(tier, authority, clock, watch, reach, backlog, leases)
        self._channel = channel = Channel(tier, clock, watch, reach, backlog, leases)
        self._startup = startup = Startup(tier, clock, watch, reach, leases, repair, channel)
        self._reads = GuardedReads(tier, authority, startup, reach, seen, backlog)
        writes = GuardedWrites(tier, authority, clock, startup, reach, seen, backlog)
        erasures = GuardedErasures(
            tier, authority, clock, startup, watch, reach, seen, backlog, leases, repair
        )
        # The operations as they are: one frame less for each call.
        self.get_latest = self._reads.get_latest
        self.get_latest_many = self._reads.get_latest_many
        self.upsert_latest = writes.upsert_latest
        self.upsert_latest_many = writes.upsert_latest_many
        self.delete = erasures.delete
        _alive.add(self)

    # What may be told of them

    @property
    def reads(self) -> Reads:
        """How reads of the tier ended."""
        return self._reads.counts

    @property
    def failures(self) -> Counter[str]:
        """Steps on the tier that failed and that no caller was told of, by what was tried."""
        return self._reach.failures

    @property
    def repaired(self) -> int:
        """How many copies the repair found behind, or not told of, so far."""
        return self._repair.repaired

    @property
    def pending(self) -> int:
        """How many users' copies are known to be behind: of this process's writes, or found by
        the last repair pass.
        """
        return max(len(self._backlog), self._repair.behind)

    @property
    def channel_losses(self) -> int:
        """How often the channel was lost."""
        return self._channel.losses

    @property
    def channel_up(self) -> bool | None:
        """Whether the channel is known to work now; None while nobody listens to it."""
        return self._monotonic() < self._leases.heard if self._watch.listening else None

    @property
    def trouble(self) -> str:
        """What keeps the tier from being of full use, though it may answer a probe; or ''."""
        if not self._watch.kept:
            return ""
        if not self._reach.up:
            return "the cache tier is passed by: it refuses commands, or is too slow for them"
        if self._watch.leased and self.channel_up is False:
            return "the invalidation channel is away: caches above do not answer"
        if self._watch.leased and self.channel_up and self._monotonic() >= self._leases.until:
            return "the cache tier waits for its repair: caches above do not answer"
        return ""

    # Channel and leases (coherence.Invalidations)

    @property
    def has_channel(self) -> bool:
        """Whether the tier tells of other processes' writes."""
        return self._tier.has_channel

    def attach(self, cache: LeasedCache) -> None:
        self._leases.caches.append(cache)
        self._startup.look_again()

    def detach(self, cache: LeasedCache) -> None:
        if cache in self._leases.caches:
            self._leases.caches.remove(cache)

    async def ready(self) -> None:
        await self._startup.ready()

    @property
    def key_of(self) -> Callable[[str], bytes]:
        return self._digest

    async def stale(self, user_id: str, seconds: float) -> StateSnapshot | None:
        return await self._reads.stale(user_id, seconds)

    # The end, and a new beginning

    async def aclose(self) -> None:
        self._leases.distrust()
        if await self._watch.end():
            await self._channel.leave()

    def begin_anew(self) -> None:
        """In a child of ``os.fork``: be another than the parent, and hold nothing of its leases."""
        self._watch.begin_anew()
        self._seen.begin_anew()
        self._backlog.begin_anew()
        self._leases.begin_anew()
        self._channel.begin_anew()
        self._startup.look_again()


def _forked() -> None:
    for copies in list(_alive):
        copies.begin_anew()


if hasattr(os, "register_at_fork"):  # elsewhere than on Windows
    os.register_at_fork(after_in_child=_forked)
