"""Writing: the authority commits, then the copies are raised to what it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from layered_store.call import current_call
from layered_store.coherence.outcomes import CALLER_ERRORS, after_commit
from layered_store.coherence.together import together
from layered_store.errors import StoreError
from layered_store.running import running_loop

if TYPE_CHECKING:
    from collections.abc import Sequence

    from layered_store.clock import Clock
    from layered_store.coherence.contract import Authority, CacheTier, Ticket, Versioned
    from layered_store.coherence.guarded.backlog import Backlog
    from layered_store.coherence.guarded.reachability import Reachability
    from layered_store.coherence.guarded.seen import Seen
    from layered_store.coherence.guarded.startup import Startup
    from layered_store.snapshot import StateSnapshot

__all__ = ["GuardedWrites"]


@dataclass(eq=False, repr=False)
class GuardedWrites:
    """Writes of users, acknowledged when the authority has them, whatever the tier does."""

    tier: CacheTier
    authority: Authority
    clock: Clock
    startup: Startup
    reach: Reachability
    seen: Seen
    backlog: Backlog

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        if self.startup.steady is not running_loop():
            await self.startup.ready()
        user_id = snapshot.user_id
        ticket = await self._ticket(user_id)
        try:
            record = await self.authority.write(snapshot)
        except BaseException as exc:
            self.seen.doubt((user_id,), exc)
            raise
        self.seen.raise_floor(user_id, record.version)
        await self._put(user_id, record, ticket)
        # A reply may be so late that this process has seen a later state: then nothing is kept.
        seen = self.seen.floor(user_id)
        current_call(self.clock).version = record.version if record.version >= seen else 0

    async def upsert_latest_many(self, snapshots: Sequence[StateSnapshot]) -> None:
        await self.startup.ready()
        users = list(dict.fromkeys(snapshot.user_id for snapshot in snapshots))
        taken = await together(self._ticket(user_id) for user_id in users)
        tickets = dict(zip(users, taken, strict=True))
        try:
            records = await self.authority.write_many(snapshots)
        except BaseException as exc:
            self.seen.doubt(users, exc)
            raise
        for user_id, record in records.items():
            self.seen.raise_floor(user_id, record.version)
        await together(
            self._put(user_id, record, tickets.get(user_id)) for user_id, record in records.items()
        )

    async def _ticket(self, user_id: str) -> Ticket | None:
        if not self.reach.up:
            return None
        try:
            ticket = await self.tier.ticket(user_id)
        except CALLER_ERRORS:
            raise
        except StoreError as exc:
            self.reach.failed(exc, "write")
            return None
        if ticket is not None:
            self.backlog.tier_trusted()
        return ticket

    async def _put(self, user_id: str, record: Versioned, ticket: Ticket | None) -> None:
        """Raise a copy to what was committed; what cannot be is left to the repair."""
        # Twice, since a lost connection is made anew at once and others wait for the message.
        for _ in range(2):
            if not self.reach.up:
                self._left_behind(user_id)
                return
            try:
                await self.tier.put(user_id, record, ticket)
            except CALLER_ERRORS as exc:
                self.backlog.add(user_id)
                if not self.startup.watch.closed:
                    raise after_commit(exc) from exc
                return  # the stack was closed in the midst of this call, which is acknowledged
            except StoreError as exc:
                self.backlog.add(user_id)
                self.reach.failed(exc, "write")
            except BaseException:
                # Cancelled after the commit: the copy is behind, and nobody else knows it.
                self._left_behind(user_id)
                raise
            else:
                self.backlog.discard(user_id)
                return

    def _left_behind(self, user_id: str) -> None:
        self.backlog.add(user_id)
        self.reach.repair_now.set()
