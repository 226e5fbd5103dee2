"""Erasing: the authority first, then the tier, then every cache that may hold the user."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from layered_store.coherence.contract import Notice
from layered_store.coherence.guarded.leases import LEASE_SECONDS
from layered_store.coherence.outcomes import CALLER_ERRORS, after_commit
from layered_store.errors import ErasureIncompleteError, StoreError

if TYPE_CHECKING:
    from layered_store.clock import Clock
    from layered_store.coherence.contract import Authority, CacheTier, Holders
    from layered_store.coherence.guarded.backlog import Backlog
    from layered_store.coherence.guarded.leases import Leases
    from layered_store.coherence.guarded.reachability import Reachability
    from layered_store.coherence.guarded.repair import Repair
    from layered_store.coherence.guarded.seen import Seen
    from layered_store.coherence.guarded.startup import Startup
    from layered_store.coherence.guarded.watch import Watch

__all__ = ["MARGIN_SECONDS", "GuardedErasures"]

MARGIN_SECONDS: Final = 0.02
"""How much longer than a lease an erasure waits: clocks of two hosts run up to 1 % apart."""

_POLL_SECONDS: Final = 0.02


@dataclass(eq=False, repr=False)
class GuardedErasures:
    """Erasures of users, which return when no tier and no process can show the user any more."""

    tier: CacheTier
    authority: Authority
    clock: Clock
    startup: Startup
    watch: Watch
    reach: Reachability
    seen: Seen
    backlog: Backlog
    leases: Leases
    repair: Repair

    async def delete(self, user_id: str) -> None:
        await self.startup.ready()
        try:
            version = await self.authority.erase(user_id, (self.tier.tier_name,))
        except BaseException as exc:
            self.seen.doubt((user_id,), exc)
            raise
        self.seen.raise_floor(user_id, version)
        digest = self.authority.digest(user_id)
        self.leases.tell(Notice(digest, version, erased=True))
        try:
            holders = await self.tier.bury(user_id, version, self.watch.me)
            self.backlog.discard(user_id)
            await self._wait_for_leases(user_id, holders)
        except asyncio.CancelledError:
            # The debt stands; the repair comes upon it, and need not wait for its time.
            self.backlog.add(user_id)
            self.watch.repair_now.set()
            raise
        except StoreError as exc:
            self.backlog.add(user_id)
            if not isinstance(exc, CALLER_ERRORS):
                self.reach.failed(exc, "erase")
            elif not self.watch.closed:
                raise after_commit(exc) from exc
            raise ErasureIncompleteError(
                "the user is erased in the system of record, but a cache tier could not be"
                " reached; it is cleaned before it answers for the user again; repeat the delete",
                pending=(self.tier.tier_name,),
                layer="WriteThrough",
                user_id=user_id,
            ) from exc
        try:
            await self.authority.settle(digest, version, self.tier.tier_name)
        except StoreError:
            # The user is gone everywhere; that nothing is owed any more is noted later.
            self.repair.look_for_debts()

    async def _wait_for_leases(self, user_id: str, holders: Holders) -> None:
        """Wait until no other process can answer from a lease that predates the erasure.

        A process that was given a lease after the erasure was published has received the message:
        its echo came behind it. Those before have run out when a lease's time has passed here, on
        a clock that nobody sets; who acknowledges the message is not waited for that long.
        """
        end = self.clock.monotonic() + LEASE_SECONDS + MARGIN_SECONDS
        buried = holders.now
        if holders.since < LEASE_SECONDS:
            # A register that is younger than a lease may not know all who hold one.
            await self.clock.sleep(LEASE_SECONDS - max(0.0, holders.since) + MARGIN_SECONDS)
        suspects = {name for name, (_, seen) in holders.others.items() if seen < buried}
        while suspects and (left := end - self.clock.monotonic()) > 0:
            await self.clock.sleep(min(left, _POLL_SECONDS))
            try:
                holders = await self.tier.holders(user_id, self.watch.me)
            except StoreError:
                await self.clock.sleep(max(0.0, end - self.clock.monotonic()))
                return
            # A moment later than now was acknowledged before the tier's clock was set back.
            acknowledged = {
                name for name, (_, seen) in holders.others.items() if buried <= seen <= holders.now
            }
            suspects -= acknowledged
