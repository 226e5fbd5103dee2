"""Reading through the tier: the copy where it may be believed, else the authority's record."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from layered_store.coherence.outcomes import CALLER_ERRORS
from layered_store.coherence.together import together
from layered_store.errors import StoreError
from layered_store.running import running_loop
from layered_store.stats import Reads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from layered_store.coherence.contract import (
        Authority,
        CacheTier,
        Ticket,
        TierRead,
        Versioned,
    )
    from layered_store.coherence.guarded.backlog import Backlog
    from layered_store.coherence.guarded.reachability import Reachability
    from layered_store.coherence.guarded.seen import Seen
    from layered_store.coherence.guarded.startup import Startup
    from layered_store.snapshot import StateSnapshot

__all__ = ["GuardedReads"]


@dataclass(eq=False, repr=False)
class GuardedReads:
    """Reads of users; what the tier does not have it is given.

    Attributes:
        counts: how they ended.
    """

    tier: CacheTier
    authority: Authority
    startup: Startup
    reach: Reachability
    seen: Seen
    backlog: Backlog
    counts: Reads = field(default_factory=Reads, init=False)

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        try:
            if self.startup.steady is not running_loop():
                await self.startup.ready()
            read = None
            if self.reach.up:
                try:
                    read = await self.tier.read(user_id)
                except CALLER_ERRORS:
                    raise
                except StoreError as exc:
                    self.reach.failed(exc, "read")
            if read is None:
                return await self._from_authority(user_id, None, failed=True)
            if read.trusted:
                self.backlog.tier_trusted()
            found = read.found
            if found is None or not self.seen.believes(user_id, found.version):
                return await self._from_authority(user_id, read)
        except Exception as exc:
            self.counts.failed(exc)
            raise
        snapshot = found.snapshot
        if snapshot is None:
            self.counts.negative_hit += 1
        else:
            self.counts.hit += 1
        return snapshot

    async def _from_authority(
        self, user_id: str, read: TierRead | None, *, failed: bool = False
    ) -> StateSnapshot | None:
        """Read what the tier did not have, or failed on, and store it there."""
        ticket = None
        if read is not None:
            ticket = read.ticket
            if ticket is None and read.trusted and read.found is None:
                try:
                    ticket = await self.tier.ticket(user_id)
                except CALLER_ERRORS:
                    raise
                except StoreError as exc:
                    failed = True
                    self.reach.failed(exc, "read")
        seen = self.seen
        floor = seen.floor(user_id)
        record = await self.authority.read(user_id)
        seen.raise_floor(user_id, record.version)
        if ticket is not None:
            await self._fill(user_id, record, ticket)
        while record.version < (latest := seen.floor(user_id)) and latest > floor:
            # Another call has seen a later state meanwhile; this one must not be kept above.
            floor = latest
            record = await self.authority.read(user_id)
            seen.raise_floor(user_id, record.version)
        # The authority answered; the tier's failure to do so must not look like a miss.
        if failed:
            self.counts.error += 1
        else:
            self.counts.miss += 1
        return record.snapshot

    async def get_latest_many(self, user_ids: Sequence[str]) -> dict[str, StateSnapshot]:
        try:
            return await self._get_latest_many(user_ids)
        except Exception as exc:
            self.counts.failed(exc, len(user_ids))
            raise

    async def _get_latest_many(self, user_ids: Sequence[str]) -> dict[str, StateSnapshot]:
        await self.startup.ready()
        answers: dict[str, Versioned] = {}
        tickets: dict[str, Ticket] = {}
        failed = not self.reach.up
        if not failed:
            try:
                tickets = await self._ask_tier(user_ids, answers)
            except CALLER_ERRORS:
                raise
            except StoreError as exc:
                failed = True
                self.reach.failed(exc, "read")
        absent = sum(found.snapshot is None for found in answers.values())
        present = len(answers) - absent
        wanted = missing = [user_id for user_id in user_ids if user_id not in answers]
        while wanted:
            floors = {user_id: self.seen.floor(user_id) for user_id in user_ids}
            # What stands there and cannot be read is left out; asked for alone, it raises.
            records = await self.authority.read_many(wanted)
            answers.update(records)
            for user_id, record in records.items():
                self.seen.raise_floor(user_id, record.version)
            filled = [user_id for user_id in tickets if user_id in records]
            await together(
                self._fill(user_id, records[user_id], tickets.pop(user_id)) for user_id in filled
            )
            # Another call may have seen later states meanwhile; these must not be kept above.
            wanted = [
                user_id
                for user_id, record in answers.items()
                if record.version < (latest := self.seen.floor(user_id))
                and latest > floors[user_id]
            ]
        self.counts.hit += present
        self.counts.negative_hit += absent
        if failed:
            self.counts.error += len(missing)
        else:
            self.counts.miss += len(missing)
        return {
            user_id: snapshot
            for user_id in user_ids
            if user_id in answers and (snapshot := answers[user_id].snapshot) is not None
        }

    async def _ask_tier(
        self, user_ids: Sequence[str], answers: dict[str, Versioned]
    ) -> dict[str, Ticket]:
        """Add what the tier has to ``answers``; return tickets for what it may be given."""
        reads = await self.tier.read_many(user_ids)
        absent = []
        tickets = {}
        for user_id, read in reads.items():
            if read.trusted:
                self.backlog.tier_trusted()
            found = read.found
            if found is not None and self.seen.believes(user_id, found.version):
                answers[user_id] = found
            elif read.ticket is not None:
                tickets[user_id] = read.ticket
            elif read.trusted and found is None:
                absent.append(user_id)
        taken = await together(map(self.tier.ticket, absent), whatever_fails=False)
        for user_id, ticket in zip(absent, taken, strict=True):
            if ticket is not None:
                tickets[user_id] = ticket
        return tickets

    async def _fill(self, user_id: str, record: Versioned, ticket: Ticket) -> None:
        if record.snapshot is None or not self.reach.up:
            # Absent users are not stored: anybody can ask for any number of them. An erasure is
            # not either: other processes would not be told of it, and the repair, which tells them
            # of what it finds missing, would take it for told.
            return
        try:
            await self.tier.fill(user_id, record, ticket)
        except CALLER_ERRORS:
            if not self.startup.watch.closed:
                raise
        except StoreError as exc:
            self.reach.failed(exc, "write")

    async def stale(self, user_id: str, seconds: float) -> StateSnapshot | None:
        """Read a copy of a tier that was trusted until so long ago; see ``Invalidations.stale``."""
        if not self.reach.up:
            return None
        try:
            found = await self.tier.read_stale(user_id, seconds)
        except StoreError as exc:
            self.reach.failed(exc, "read")
            return None
        if found is None or found.snapshot is None or not self.seen.allows(user_id, found.version):
            return None
        self.counts.stale += 1
        return found.snapshot
