"""Copies in a shared tier, kept in step with the system of record by many processes.

The argument for each step stands in ``docs/notes/0002-coherence.md``. In short: the system of
record numbers each user's writes. A copy is created only with a token that was taken before the
record was read or written and that every write removes; it is replaced only by a higher version of
the same generation; it is believed only under a stamp that a repair pass leaves after it has
replayed every change of the system of record; and an in-process cache answers only under a lease
that this process's own echo over the invalidation channel renews.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import threading
import weakref
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Final, TypeVar

from layered_store.call import current_call
from layered_store.coherence.contract import TRUST_SECONDS, Invalidations, Notice
from layered_store.coherence.local import QUARANTINE_SECONDS, not_happened
from layered_store.errors import (
    ClosedError,
    ErasureIncompleteError,
    RejectedError,
    StoreError,
    StoreTimeoutError,
    ValidationError,
)
from layered_store.events import log_event, log_warning
from layered_store.running import running_loop
from layered_store.stats import Reads

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence

    from layered_store.clock import Clock
    from layered_store.coherence.contract import (
        Authority,
        CacheTier,
        Change,
        Holders,
        LeasedCache,
        Ticket,
        TierRead,
        Versioned,
    )
    from layered_store.snapshot import StateSnapshot

__all__ = ["GuardedCopies"]

T = TypeVar("T")

REPAIR_SECONDS: Final = 0.25
"""Pause between repair passes."""

RUSH_SECONDS: Final = 0.05
"""Least time from one pass to the next, however many ask for one."""

LEASE_SECONDS: Final = 1.0
"""How long an in-process cache answers after its echo was sent."""

MARGIN_SECONDS: Final = 0.02
"""How much longer than a lease an erasure waits: clocks of two hosts run up to 1 % apart."""

PING_SECONDS: Final = 0.3
"""Pause between echoes: three may be lost before a lease runs out."""

FLOOR_SECONDS: Final = 30.0
"""How long a process remembers the versions it has seen; far longer than a repair takes."""

READY_SECONDS: Final = 1.0
"""How long the first call waits for the tier to be repaired before it goes on without."""

MAX_UNREPAIRED: Final = 100_000
"""How many users that are behind in the tier are counted; the repair does not depend on it."""

PAGE: Final = 500
"""How many changes are repaired at once."""

_NO_FLOOR: Final = (0, 0.0)
_POLL_SECONDS: Final = 0.02
_NOBODY: Final = "0"
_LEAVE_SECONDS: Final = 0.2
_CALLER_ERRORS = (ValidationError, ClosedError)

_alive: Final[weakref.WeakSet[GuardedCopies]] = weakref.WeakSet()
_parents: Final[list[asyncio.Task[None]]] = []


class GuardedCopies(Invalidations):
    """Reads, writes and erases users in an authority with copies in a tier.

    Args:
        tier: holds the copies.
        authority: holds the truth.
        clock: source of time.
    """

    def __init__(self, tier: CacheTier, authority: Authority, clock: Clock) -> None:
        self._tier = tier
        self._authority = authority
        self._clock = clock
        self._monotonic = clock.monotonic
        # Its name among those that share the tier.
        self._me = os.urandom(8).hex()
        _alive.add(self)
        # Whoever forgets what is old: event loops of several threads.
        self._lock = threading.Lock()
        self._caches: list[LeasedCache] = []
        # The highest version seen of each user: what the tier holds below it is not shown.
        self._floors: OrderedDict[str, tuple[int, float]] = OrderedDict()
        # Users of whom a write may still take effect, and until when.
        self._doubtful: OrderedDict[str, float] = OrderedDict()
        self._loop: asyncio.AbstractEventLoop | None = None
        # The event loop on which calls need not ask whether everything runs.
        self._steady: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._ready: asyncio.Event | None = None
        self._repair_now: asyncio.Event | None = None
        self._ping_now: asyncio.Event | None = None
        self._seen = 0.0
        # Pings that were sent: when, the trust that the reply told of, and whether the echo came.
        self._pings: dict[int, list[float]] = {}
        self._reachable = True
        self._failures = 0
        self._listening = self._repaired_once = self._leased_once = False
        self._registered = False
        self._closed = False
        self.reads = Reads()
        self.repaired = 0
        # Steps on the tier that failed and that no caller was told of, by what was tried.
        self.failures: Counter[str] = Counter()
        self.channel_losses = 0
        self._channel_lost = False
        # Whether the tier was lost since the last repair pass that was told of.
        self._was_away = False
        self._leased_until = float("-inf")
        # Users whose copies may be behind, by digest, and since when; the repair removes them.
        self._unrepaired: OrderedDict[bytes, float] = OrderedDict()
        # Erasures may be owed to the tier that no replay will come upon.
        self._look_for_debts = True
        self._behind = 0

    @property
    def pending(self) -> int:
        """How many users' copies are known to be behind: of this process's writes, or found by
        the last repair pass.
        """
        return max(len(self._unrepaired), self._behind)

    @property
    def channel_up(self) -> bool | None:
        """Whether the channel is known to work now; None while nobody listens to it."""
        if not self._listening or not self.has_channel:
            return None
        return self._clock.monotonic() < self._leased_until

    @property
    def trouble(self) -> str:
        """What keeps the tier from being of full use, though it may answer a probe; or ''."""
        if self._loop is None or self._loop.is_closed():
            return ""  # nobody keeps watch
        if not self._reachable:
            return "the cache tier is passed by: it refuses commands, or is too slow for them"
        if self._leased_once and self.channel_up is False:
            return "the invalidation channel is away: caches above do not answer"
        return ""

    @property
    def has_channel(self) -> bool:
        """Whether the tier tells of other processes' writes."""
        return self._tier.has_channel

    # Reading

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        try:
            if self._steady is not running_loop():
                await self._started()
            read = None
            if self._reachable:
                try:
                    read = await self._tier.read(user_id)
                except _CALLER_ERRORS:
                    raise
                except StoreError as exc:
                    self._trouble(exc, "read")
            if read is None:
                return await self._from_authority(user_id, None, failed=True)
            if read.trusted:
                self._note_trusted()
            found = read.found
            if found is None or not self._believed(user_id, found):
                return await self._from_authority(user_id, read)
        except Exception as exc:
            self.reads.failed(exc)
            raise
        if found.snapshot is None:
            self.reads.negative_hit += 1
        else:
            self.reads.hit += 1
        return found.snapshot

    async def _from_authority(
        self, user_id: str, read: TierRead | None, *, failed: bool = False
    ) -> StateSnapshot | None:
        """Read what the tier did not have, or failed on, and store it there."""
        ticket = None
        if read is not None:
            ticket = read.ticket
            if ticket is None and read.trusted and read.found is None:
                try:
                    ticket = await self._tier.ticket(user_id)
                except _CALLER_ERRORS:
                    raise
                except StoreError as exc:
                    failed = True
                    self._trouble(exc, "read")
        floor = self._floor(user_id)
        record = await self._authority.read(user_id)
        self._raise_floor(user_id, record.version)
        if ticket is not None:
            await self._fill(user_id, record, ticket)
        while record.version < (seen := self._floor(user_id)) and seen > floor:
            # Another call has seen a later state meanwhile; this one must not be kept above.
            floor = seen
            record = await self._authority.read(user_id)
            self._raise_floor(user_id, record.version)
        # The authority answered; the tier's failure to do so must not look like a miss.
        if failed:
            self.reads.error += 1
        else:
            self.reads.miss += 1
        return record.snapshot

    async def get_latest_many(self, user_ids: Sequence[str]) -> dict[str, StateSnapshot]:
        try:
            return await self._get_latest_many(user_ids)
        except Exception as exc:
            self.reads.failed(exc, len(user_ids))
            raise

    async def _get_latest_many(self, user_ids: Sequence[str]) -> dict[str, StateSnapshot]:
        await self._started()
        answers: dict[str, Versioned] = {}
        tickets: dict[str, Ticket] = {}
        failed = not self._reachable
        if not failed:
            try:
                tickets = await self._ask_tier(user_ids, answers)
            except _CALLER_ERRORS:
                raise
            except StoreError as exc:
                failed = True
                self._trouble(exc, "read")
        absent = sum(found.snapshot is None for found in answers.values())
        present = len(answers) - absent
        wanted = missing = [user_id for user_id in user_ids if user_id not in answers]
        while wanted:
            floors = {user_id: self._floor(user_id) for user_id in user_ids}
            # What stands there and cannot be read is left out; asked for alone, it raises.
            records = await self._authority.read_many(wanted)
            answers.update(records)
            for user_id, record in records.items():
                self._raise_floor(user_id, record.version)
            filled = [user_id for user_id in tickets if user_id in records]
            await _together(
                self._fill(user_id, records[user_id], tickets.pop(user_id)) for user_id in filled
            )
            # Another call may have seen later states meanwhile; these must not be kept above.
            wanted = [
                user_id
                for user_id, record in answers.items()
                if record.version < (seen := self._floor(user_id)) and seen > floors[user_id]
            ]
        self.reads.hit += present
        self.reads.negative_hit += absent
        if failed:
            self.reads.error += len(missing)
        else:
            self.reads.miss += len(missing)
        return {
            user_id: snapshot
            for user_id in user_ids
            if user_id in answers and (snapshot := answers[user_id].snapshot) is not None
        }

    async def _ask_tier(
        self, user_ids: Sequence[str], answers: dict[str, Versioned]
    ) -> dict[str, Ticket]:
        """Add what the tier has to ``answers``; return tickets for what it may be given."""
        reads = await self._tier.read_many(user_ids)
        absent = []
        tickets = {}
        for user_id, read in reads.items():
            if read.trusted:
                self._note_trusted()
            found = read.found
            if found is not None and self._believed(user_id, found):
                answers[user_id] = found
            elif read.ticket is not None:
                tickets[user_id] = read.ticket
            elif read.trusted and found is None:
                absent.append(user_id)
        taken = await _together(self._tier.ticket(user_id) for user_id in absent)
        for user_id, ticket in zip(absent, taken, strict=True):
            if ticket is not None:
                tickets[user_id] = ticket
        return tickets

    def _believed(self, user_id: str, found: Versioned) -> bool:
        """Tell whether a copy is not older than what this process has seen; note it as seen."""
        if found.version < self._floor(user_id):
            return False
        if self._doubtful and self._doubtful.get(user_id, 0.0) > self._clock.monotonic():
            return False
        self._raise_floor(user_id, found.version)
        return True

    def _doubt(self, user_ids: Iterable[str], exc: BaseException) -> None:
        """Pass the copies of these users by for a while: a write of theirs may have happened.

        Nor is it known when: until it must have ended, each read asks the authority.
        """
        if not_happened(exc):
            return
        now = self._clock.monotonic()
        with self._lock:
            for user_id in user_ids:
                self._doubtful[user_id] = now + QUARANTINE_SECONDS
                self._doubtful.move_to_end(user_id)
            while self._doubtful[first := next(iter(self._doubtful))] <= now:
                del self._doubtful[first]
        self._kick()  # the others follow with the next pass

    async def _fill(self, user_id: str, record: Versioned, ticket: Ticket) -> None:
        if record.snapshot is None or not self._reachable:
            # Absent users are not stored: anybody can ask for any number of them. An erasure is
            # not either: other processes would not be told of it, and the repair, which tells them
            # of what it finds missing, would take it for told.
            return
        try:
            await self._tier.fill(user_id, record, ticket)
        except _CALLER_ERRORS:
            raise
        except StoreError as exc:
            self._trouble(exc, "write")

    # Writing

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        await self._started()
        ticket = await self._ticket(snapshot.user_id)
        try:
            record = await self._authority.write(snapshot)
        except BaseException as exc:
            self._doubt((snapshot.user_id,), exc)
            raise
        await self._committed({snapshot.user_id: record}, {snapshot.user_id: ticket})
        # A reply may be so late that this process has seen a later state: then nothing is kept.
        seen = self._floor(snapshot.user_id)
        current_call(self._clock).version = record.version if record.version >= seen else 0

    async def upsert_latest_many(self, snapshots: Sequence[StateSnapshot]) -> None:
        await self._started()
        users = list(dict.fromkeys(snapshot.user_id for snapshot in snapshots))
        taken = await _together(self._ticket(user_id) for user_id in users)
        tickets = dict(zip(users, taken, strict=True))
        try:
            records = await self._authority.write_many(snapshots)
        except BaseException as exc:
            self._doubt(users, exc)
            raise
        await self._committed(records, tickets)

    async def _ticket(self, user_id: str) -> Ticket | None:
        if not self._reachable:
            return None
        try:
            ticket = await self._tier.ticket(user_id)
        except _CALLER_ERRORS:
            raise
        except StoreError as exc:
            self._trouble(exc, "write")
            return None
        if ticket is not None:
            self._note_trusted()
        return ticket

    async def _committed(
        self, records: Mapping[str, Versioned], tickets: Mapping[str, Ticket | None]
    ) -> None:
        """Raise the copies to what was committed; what cannot be is left to the repair."""
        for user_id, record in records.items():
            self._raise_floor(user_id, record.version)
        await _together(
            self._put(user_id, record, tickets.get(user_id)) for user_id, record in records.items()
        )

    async def _put(self, user_id: str, record: Versioned, ticket: Ticket | None) -> None:
        # Twice, since a lost connection is made anew at once and others wait for the message.
        for _ in range(2):
            if not self._reachable:
                self._note_behind(user_id)
                self._kick()
                return
            try:
                await self._tier.put(user_id, record, ticket)
            except _CALLER_ERRORS:
                raise
            except StoreError as exc:
                self._note_behind(user_id)
                self._trouble(exc, "write")
            except BaseException:
                # Cancelled after the commit: the copy is behind, and nobody else knows it.
                self._note_behind(user_id)
                self._kick()
                raise
            else:
                self._note_even(user_id)
                return

    # Erasing

    async def delete(self, user_id: str) -> None:
        await self._started()
        try:
            version = await self._authority.erase(user_id, (self._tier.tier_name,))
        except BaseException as exc:
            self._doubt((user_id,), exc)
            raise
        self._raise_floor(user_id, version)
        digest = self._authority.digest(user_id)
        self._tell(Notice(digest, version, erased=True))
        try:
            holders = await self._tier.bury(user_id, version, self._me)
            self._note_even(user_id)
            await self._wait_for_leases(user_id, holders)
        except _CALLER_ERRORS:
            raise
        except asyncio.CancelledError:
            # The debt stands; the repair comes upon it, and need not wait for its time.
            self._note_behind(user_id)
            self._kick()
            raise
        except StoreError as exc:
            self._note_behind(user_id)
            self._trouble(exc, "erase")
            raise ErasureIncompleteError(
                "the system of record has the user erased, a cache tier could not be reached; it"
                " is cleaned before it answers again; repeat the delete",
                pending=(self._tier.tier_name,),
                user_id=user_id,
            ) from exc
        try:
            await self._authority.settle(digest, version, self._tier.tier_name)
        except StoreError:
            # The user is gone everywhere; that nothing is owed any more is noted later.
            self._look_for_debts = True

    async def _wait_for_leases(self, user_id: str, holders: Holders) -> None:
        """Wait until no other process can answer from a lease that predates the erasure.

        A process that was given a lease after the erasure was published has received the message:
        its echo came behind it. Those before have run out when a lease's time has passed here, on
        a clock that nobody sets; who acknowledges the message is not waited for that long.
        """
        end = self._clock.monotonic() + LEASE_SECONDS + MARGIN_SECONDS
        buried = holders.now
        if holders.since < LEASE_SECONDS:
            # A register that is younger than a lease may not know all who hold one.
            await self._clock.sleep(LEASE_SECONDS - max(0.0, holders.since) + MARGIN_SECONDS)
        suspects = {name for name, (_, seen) in holders.others.items() if seen < buried}
        while suspects and (left := end - self._clock.monotonic()) > 0:
            await self._clock.sleep(min(left, _POLL_SECONDS))
            try:
                holders = await self._tier.holders(user_id, self._me)
            except StoreError:
                await self._clock.sleep(max(0.0, end - self._clock.monotonic()))
                return
            # A moment later than now was acknowledged before the tier's clock was set back.
            acknowledged = {
                name for name, (_, seen) in holders.others.items() if buried <= seen <= holders.now
            }
            suspects -= acknowledged

    # What is known to be behind in the tier

    def _note_behind(self, user_id: str) -> None:
        digest = self._authority.digest(user_id)
        with self._lock:
            self._unrepaired.pop(digest, None)
            self._unrepaired[digest] = self._clock.monotonic()
            if len(self._unrepaired) > MAX_UNREPAIRED:
                self._unrepaired.popitem(last=False)

    def _note_even(self, user_id: str) -> None:
        if self._unrepaired:
            with self._lock:
                self._unrepaired.pop(self._authority.digest(user_id), None)

    def _note_trusted(self) -> None:
        """Note that the tier is trusted: the pass behind it began at most so long ago, anywhere."""
        if self._unrepaired:
            self._note_repaired(self._clock.monotonic() - TRUST_SECONDS)

    def _note_repaired(self, since: float) -> None:
        """Forget what fell behind before ``since``: a pass that began then has repaired it."""
        with self._lock:
            while self._unrepaired and next(iter(self._unrepaired.values())) < since:
                self._unrepaired.popitem(last=False)

    # Floors: this process never shows less than it has seen

    def _floor(self, user_id: str) -> int:
        return self._floors.get(user_id, _NO_FLOOR)[0]

    def _raise_floor(self, user_id: str, version: int) -> None:
        now, floors = self._monotonic(), self._floors
        with self._lock:
            if version:
                known = floors.get(user_id, _NO_FLOOR)[0]
                floors[user_id] = (max(known, version), now + FLOOR_SECONDS)
                floors.move_to_end(user_id)
            else:
                floors.pop(user_id, None)
            while floors and floors[first := next(iter(floors))][1] <= now:
                del floors[first]

    # Channel and leases (coherence.Invalidations)

    @property
    def attach(self) -> Callable[[LeasedCache], None]:
        return self._attach

    @property
    def detach(self) -> Callable[[LeasedCache], None]:
        return self._detach

    def _attach(self, cache: LeasedCache) -> None:
        self._caches.append(cache)
        self._steady = None  # the next call begins to listen

    def _detach(self, cache: LeasedCache) -> None:
        if cache in self._caches:
            self._caches.remove(cache)

    @property
    def ready(self) -> Callable[[], Awaitable[None]]:
        return self._started

    @property
    def key_of(self) -> Callable[[str], bytes]:
        return self._authority.digest

    @property
    def stale(self) -> Callable[[str, float], Awaitable[StateSnapshot | None]]:
        return self._stale

    async def _stale(self, user_id: str, seconds: float) -> StateSnapshot | None:
        if not self._reachable:
            return None
        try:
            found = await self._tier.read_stale(user_id, seconds)
        except StoreError as exc:
            self._trouble(exc, "read")
            return None
        if found is None or found.snapshot is None or found.version < self._floor(user_id):
            return None
        self.reads.stale += 1
        return found.snapshot

    def _tell(self, notice: Notice) -> None:
        for cache in self._caches:
            cache.invalidate(notice)

    def _distrust(self) -> None:
        for cache in self._caches:
            cache.lease(float("-inf"))
            cache.hear(float("-inf"))
            cache.distrust()

    async def _listen(self) -> None:
        """Follow the channel for ever; whatever breaks it, distrust all and begin again."""
        pause = 0.05
        while True:
            pings: asyncio.Task[None] | None = None
            stood = False
            try:
                async with self._tier.listen() as notices:
                    # What was held before the subscription stood may have missed messages.
                    self._distrust()
                    self._pings.clear()
                    stood = True
                    if self._channel_lost:
                        self._channel_lost = False
                        log_event("channel_back", tier=self._tier.tier_name)
                    pings = self._spawn(self._ping_for_ever())
                    pause = 0.05
                    async for notice in notices:
                        self._receive(notice)
            except asyncio.CancelledError:
                stood = False  # the event loop ends, which is no loss of the channel
                raise
            except StoreError:
                pass
            except Exception as exc:  # noqa: BLE001  a third party's store: listening must go on
                log_warning("the invalidation channel failed: %s", type(exc).__name__)
            finally:
                self._distrust()
                self._leased_until = float("-inf")
                self._begun(leased=True)  # nobody waits for a channel that cannot be had
                if stood and not self._closed:
                    self._channel_lost = True
                    self.channel_losses += 1
                    log_event("channel_lost", tier=self._tier.tier_name)
                if pings is not None:
                    pings.cancel()
                    # Not awaited itself: its cancellation would look like our own, or hide it.
                    await asyncio.gather(pings, return_exceptions=True)
            await self._clock.sleep(pause)
            pause = min(1.0, pause * 2)

    def _receive(self, notice: Notice) -> None:
        assert self._ping_now is not None
        self._seen = max(self._seen, notice.sent)
        if notice.echo:
            if notice.echo == self._me:
                self._half(notice.version, echoed=True)
            return
        if not notice.digest:
            # A new generation: what changed before it is not told one by one.
            self._distrust()
            self._ping_now.set()
            return
        self._tell(notice)
        if notice.erased:
            # Somebody waits for us to have seen this.
            self._ping_now.set()

    async def _ping_for_ever(self) -> None:
        assert self._ping_now is not None
        number = 0
        while True:
            number += 1
            self._pings = {key: ping for key, ping in self._pings.items() if key >= number - 4}
            self._pings[number] = [self._clock.monotonic(), 0.0, 0.0]
            self._registered = True
            try:
                trusted = await self._tier.ping(self._me, LEASE_SECONDS, self._seen, number)
            except StoreError as exc:
                self._trouble(exc, "ping")
            else:
                self._well()
                self._half(number, trusted=trusted)
                if trusted:
                    self._note_trusted()
            await self._wait(self._ping_now, PING_SECONDS)

    def _half(self, number: int, *, trusted: float = 0.0, echoed: bool = False) -> None:
        """Note the reply or the echo of a ping; both together renew the lease.

        The echo shows that every message published before the ping was sent has been received;
        the reply tells for how long the tier, and so what was read from it, may be believed.
        """
        ping = self._pings.get(number)
        if ping is None:
            return
        ping[1] = ping[1] or trusted
        if echoed:
            ping[2] = 1.0
            for cache in self._caches:
                cache.hear(ping[0] + LEASE_SECONDS)
        if ping[1] and ping[2]:
            del self._pings[number]
            self._leased_until = ping[0] + min(LEASE_SECONDS, ping[1])
            for cache in self._caches:
                cache.lease(self._leased_until)
            self._begun(leased=True)

    # Repair

    async def _repair_for_ever(self) -> None:
        assert self._repair_now is not None
        while True:
            begun = self._clock.monotonic()
            try:
                await self._repair()
                self._well()
                if self._look_for_debts:
                    await self._pay_debts()
            except StoreError:
                self.failures["repair"] += 1
            except Exception as exc:  # noqa: BLE001  a third party's store: repair must go on
                self.failures["repair"] += 1
                log_warning("a repair pass of the cache tier failed: %s", type(exc).__name__)
            self._begun(repaired=True)
            await self._wait(self._repair_now, REPAIR_SECONDS)
            # While the tier is away each write asks for a pass; they share one.
            early = begun + RUSH_SECONDS - self._clock.monotonic()
            if early > 0:
                await self._clock.sleep(early)

    async def _repair(self) -> None:
        """Replay what changed in the authority, then stamp the tier as trusted."""
        started = self._clock.monotonic()
        head = await self._authority.head()
        begun = await self._tier.begin(self._me, head)
        if begun is None:
            return
        cursor = begun.cursor
        if begun.fresh:
            self._look_for_debts = True
        elif not await self._authority.covers(cursor):
            # Erasures since then may be forgotten: no copy of that time may count.
            self._look_for_debts = True
            await self._tier.renew(begun.generation, head)
            return
        repaired = self.repaired
        looking = self._look_for_debts
        owed: list[Change] = []
        while True:
            page = await self._authority.changes(cursor, PAGE)
            # The last page holds ordinary writes of just now, which are in the tier already.
            self._behind = len(page.items) if page.more else 0
            if page.items:
                self.repaired += len(await self._tier.repair(page.items))
                owed += [change for change in page.items if change.owed]
                # No replay comes upon them again, should this process not come to settle them.
                self._look_for_debts = self._look_for_debts or bool(owed)
            cursor = page.cursor
            # After each page, so that a long way back is gone once, whoever goes on with it.
            stamped = await self._tier.stamp(begun, cursor, 0.0 if page.more else TRUST_SECONDS)
            if not page.more or not stamped:
                break
        self._behind = 0
        if stamped:
            self._note_repaired(started)
            if self._ping_now is not None and self._leased_until <= self._clock.monotonic():
                self._ping_now.set()  # what the last ping was refused for is there now
        if self._was_away:
            self._was_away = False
            if self.repaired > repaired:
                users = self.repaired - repaired
                log_event("tier_repaired", tier=self._tier.tier_name, users=users)
        for change in owed:
            await self._authority.settle(change.digest, change.version, self._tier.tier_name)
        if owed:
            self._look_for_debts = looking

    async def _pay_debts(self) -> None:
        """Make up for erasures that a process began and did not finish, however long ago."""
        tier = self._tier.tier_name
        while owed := await self._authority.owing(tier, PAGE):
            await self._tier.repair(owed)
            for change in owed:
                await self._authority.settle(change.digest, change.version, tier)
        self._look_for_debts = False

    def _trouble(self, exc: StoreError, step: str) -> None:
        """Note that the tier did not answer.

        One that hangs, or failed twice running, is passed by until a ping or a repair pass reaches
        it again: it must not cost every call its time limit.
        """
        self.failures[step] += 1
        if isinstance(exc, RejectedError):
            return  # a breaker's refusal costs nothing, and it tries the tier again by itself
        self._failures += 1
        if (isinstance(exc, StoreTimeoutError) or self._failures > 1) and self._reachable:
            self._reachable = False
            self._was_away = True
            log_event("tier_lost", tier=self._tier.tier_name, reason=type(exc).__name__)
        self._kick()

    def _well(self) -> None:
        self._failures = 0
        if not self._reachable:
            self._reachable = True
            log_event("tier_back", tier=self._tier.tier_name)

    def _kick(self) -> None:
        """Have the next repair pass begin at once."""
        if self._repair_now is None or self._loop is None or self._loop.is_closed():
            return
        if self._loop is asyncio.get_running_loop():
            self._repair_now.set()
        else:
            self._loop.call_soon_threadsafe(self._repair_now.set)

    # Life

    async def _started(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is loop or self._closed:
            ready = self._ready
            if self._caches and not self._listening:
                self._follow()
            if ready is None or ready.is_set():
                self._steady = loop if self._loop is loop else None
                return
        else:
            if self._loop is not None and not self._loop.is_closed():
                return  # the loop that came first keeps watch for all
            self._distrust()
            self._loop = loop
            self._ready, self._repair_now, self._ping_now = (asyncio.Event() for _ in range(3))
            self._tasks = [self._spawn(self._repair_for_ever())]
            self._listening = self._repaired_once = self._leased_once = False
            if self._caches:
                self._follow()
            ready = self._ready
        try:
            # Through the layers around the tier: one that hangs costs their limit and no more.
            await self._tier.read(_NOBODY)
        except StoreError as exc:
            self._trouble(exc, "read")
        else:
            with contextlib.suppress(TimeoutError):
                async with self._clock.timeout(READY_SECONDS):
                    await ready.wait()
        ready.set()  # once is enough: a tier that is away must not cost every call a second

    def begin_anew(self) -> None:
        """In a child of ``os.fork``: be another than the parent, and hold nothing of its leases.

        Under one name, an erasure by one process would not wait for the lease of another.
        """
        self._me = os.urandom(8).hex()
        self._lock = threading.Lock()  # the parent's may be held by a thread that is not here
        self._registered = False
        self._loop = self._steady = None
        # They would speak on the parent's connections, at the latest when they are collected.
        _parents.extend(self._tasks)
        self._tasks = []
        self._leased_until = float("-inf")
        for cache in self._caches:
            cache.lease(float("-inf"))
            cache.hear(float("-inf"))

    def _begun(self, *, repaired: bool = False, leased: bool = False) -> None:
        """Let the first callers go on when a pass was made and, where caches follow, a lease."""
        self._repaired_once = self._repaired_once or repaired
        self._leased_once = self._leased_once or leased
        following = self._listening and self._tier.has_channel
        if self._ready is not None and self._repaired_once and (self._leased_once or not following):
            self._ready.set()

    def _follow(self) -> None:
        self._listening = True
        if self._tier.has_channel and not self._closed:
            self._tasks.append(self._spawn(self._listen()))

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(work, context=contextvars.Context())

    async def _wait(self, event: asyncio.Event, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with self._clock.timeout(seconds):
                await event.wait()
        event.clear()

    async def aclose(self) -> None:
        self._closed = True
        self._distrust()
        tasks, self._tasks = self._tasks, []
        loop = self._loop
        if loop is not None and loop is not asyncio.get_running_loop():
            with contextlib.suppress(RuntimeError):  # it was closed
                for task in tasks:
                    loop.call_soon_threadsafe(task.cancel)
            return
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._registered:
            # Nothing is held any more: whoever erases need not wait for this process.
            with contextlib.suppress(StoreError, TimeoutError):
                async with self._clock.timeout(_LEAVE_SECONDS):
                    await self._tier.ping(self._me, -LEASE_SECONDS, self._seen, 0)
            self._registered = False


async def _together(work: Iterable[Coroutine[None, None, T]]) -> list[T]:
    """Do all at once, so that they share round trips; a single one without a task of its own."""
    coroutines = list(work)
    if len(coroutines) == 1:
        return [await coroutines[0]]
    results = await asyncio.gather(*coroutines, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results  # type: ignore[return-value]


def _forked() -> None:
    for copies in list(_alive):
        copies.begin_anew()


if hasattr(os, "register_at_fork"):  # elsewhere than on Windows
    os.register_at_fork(after_in_child=_forked)
