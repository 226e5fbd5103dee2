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
import logging
import os
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Final

from layered_store.call import current_call
from layered_store.coherence.contract import Invalidations, Notice
from layered_store.errors import (
    ClosedError,
    ErasureIncompleteError,
    RejectedError,
    StoreError,
    StoreTimeoutError,
    ValidationError,
)
from layered_store.events import log_event
from layered_store.stats import Reads

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence

    from layered_store.clock import Clock
    from layered_store.coherence.contract import (
        Authority,
        CacheTier,
        Holders,
        LeasedCache,
        Ticket,
        Versioned,
    )
    from layered_store.snapshot import StateSnapshot

__all__ = ["GuardedCopies"]

_log = logging.getLogger("layered_store")

REPAIR_SECONDS: Final = 0.25
"""Pause between repair passes."""

TRUST_SECONDS: Final = 2.0
"""How long a tier is believed after a repair pass began."""

LEASE_SECONDS: Final = 1.0
"""How long an in-process cache answers after its echo was sent."""

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

_POLL_SECONDS: Final = 0.02
_CALLER_ERRORS = (ValidationError, ClosedError)


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
        self._me = os.urandom(8).hex()
        self._caches: list[LeasedCache] = []
        # The highest version seen of each user: what the tier holds below it is not shown.
        self._floors: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._loop: asyncio.AbstractEventLoop | None = None
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
        self._closed = False
        self.reads = Reads()
        self.repaired = 0
        # Steps on the tier that failed and that no caller was told of, by what was tried.
        self.failures: Counter[str] = Counter()
        self.channel_losses = 0
        self._channel_lost = False
        self._leased_until = float("-inf")
        # Users whose copies may be behind, by digest, and since when; the repair removes them.
        self._unrepaired: OrderedDict[bytes, float] = OrderedDict()
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
    def has_channel(self) -> bool:
        """Whether the tier tells of other processes' writes."""
        return self._tier.has_channel

    # Reading

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        try:
            return await self._get_latest(user_id)
        except Exception as exc:
            self.reads.failed(exc)
            raise

    async def _get_latest(self, user_id: str) -> StateSnapshot | None:
        await self._started()
        ticket = None
        failed = not self._reachable
        if not failed:
            try:
                read = await self._tier.read(user_id)
                if (found := read.found) is not None and found.version >= self._floor(user_id):
                    if found.snapshot is None:
                        self.reads.negative_hit += 1
                    else:
                        self.reads.hit += 1
                    return found.snapshot
                ticket = read.ticket
                if ticket is None and read.trusted and read.found is None:
                    ticket = await self._tier.ticket(user_id)
            except _CALLER_ERRORS:
                raise
            except StoreError as exc:
                failed = True
                self._trouble(exc, "read")
        record = await self._authority.read(user_id)
        self._raise_floor(user_id, record.version)
        if ticket is not None:
            await self._fill(user_id, record, ticket)
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
                for user_id, read in (await self._tier.read_many(user_ids)).items():
                    found = read.found
                    if found is not None and found.version >= self._floor(user_id):
                        answers[user_id] = found
                    elif read.trusted and found is None:
                        ticket = read.ticket or await self._tier.ticket(user_id)
                        if ticket is not None:
                            tickets[user_id] = ticket
            except _CALLER_ERRORS:
                raise
            except StoreError as exc:
                failed = True
                self._trouble(exc, "read")
        absent = sum(found.snapshot is None for found in answers.values())
        present = len(answers) - absent
        missing = [user_id for user_id in user_ids if user_id not in answers]
        if missing:
            records = await self._authority.read_many(missing)
            for user_id in missing:
                if user_id not in records:
                    continue  # what stands there cannot be read; asked for alone, it raises
                record = answers[user_id] = records[user_id]
                self._raise_floor(user_id, record.version)
                if user_id in tickets:
                    await self._fill(user_id, record, tickets[user_id])
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

    async def _fill(self, user_id: str, record: Versioned, ticket: Ticket) -> None:
        if record.version == 0 or not self._reachable:
            return  # absent users are not stored: anybody can ask for any number of them
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
        record = await self._authority.write(snapshot)
        current_call(self._clock).version = record.version
        await self._committed({snapshot.user_id: record}, {snapshot.user_id: ticket})

    async def upsert_latest_many(self, snapshots: Sequence[StateSnapshot]) -> None:
        await self._started()
        users = list(dict.fromkeys(snapshot.user_id for snapshot in snapshots))
        tickets = {user_id: await self._ticket(user_id) for user_id in users}
        await self._committed(await self._authority.write_many(snapshots), tickets)

    async def _ticket(self, user_id: str) -> Ticket | None:
        if not self._reachable:
            return None
        try:
            return await self._tier.ticket(user_id)
        except _CALLER_ERRORS:
            raise
        except StoreError as exc:
            self._trouble(exc, "write")
            return None

    async def _committed(
        self, records: Mapping[str, Versioned], tickets: Mapping[str, Ticket | None]
    ) -> None:
        """Raise the copies to what was committed; what cannot be is left to the repair."""
        for user_id, record in records.items():
            self._raise_floor(user_id, record.version)
        for user_id, record in records.items():
            # Twice, since a lost connection is made anew at once and others wait for the message.
            for _ in range(2):
                if not self._reachable:
                    self._note_behind(user_id)
                    self._kick()
                    break
                try:
                    await self._tier.put(user_id, record, tickets.get(user_id))
                    self._note_even(user_id)
                    break
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

    # Erasing

    async def delete(self, user_id: str) -> None:
        await self._started()
        version = await self._authority.erase(user_id, (self._tier.tier_name,))
        self._raise_floor(user_id, version)
        digest = self._authority.digest(user_id)
        self._tell(Notice(digest, version, erased=True))
        try:
            holders = await self._tier.bury(user_id, version, self._me)
            self._note_even(user_id)
            await self._wait_for_leases(user_id, holders)
        except _CALLER_ERRORS:
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
        await self._authority.settle(digest, version, self._tier.tier_name)

    async def _wait_for_leases(self, user_id: str, holders: Holders) -> None:
        """Wait until no other process can answer from a lease that predates the erasure."""
        buried = holders.now
        give_up = self._clock.monotonic() + LEASE_SECONDS + TRUST_SECONDS
        # A register that is younger than a lease may not know all who hold one.
        blind_until = buried + max(0.0, LEASE_SECONDS - holders.since)
        suspects = {name: until for name, (until, seen) in holders.others.items() if seen < buried}
        while suspects or holders.now < blind_until:
            if self._clock.monotonic() > give_up:
                return  # every lease that predates the erasure has run out by now
            await self._clock.sleep(_POLL_SECONDS)
            holders = await self._tier.holders(user_id, self._me)
            for name, until in list(suspects.items()):
                seen = holders.others.get(name, (0.0, 0.0))[1]
                if seen >= buried or until <= holders.now:
                    del suspects[name]

    # What is known to be behind in the tier

    def _note_behind(self, user_id: str) -> None:
        digest = self._authority.digest(user_id)
        self._unrepaired.pop(digest, None)
        self._unrepaired[digest] = self._clock.monotonic()
        if len(self._unrepaired) > MAX_UNREPAIRED:
            self._unrepaired.popitem(last=False)

    def _note_even(self, user_id: str) -> None:
        if self._unrepaired:
            self._unrepaired.pop(self._authority.digest(user_id), None)

    def _note_repaired(self, since: float) -> None:
        """Forget what fell behind before ``since``: a pass that began then has repaired it."""
        while self._unrepaired and next(iter(self._unrepaired.values())) < since:
            self._unrepaired.popitem(last=False)

    # Floors: this process never shows less than it has seen

    def _floor(self, user_id: str) -> int:
        return self._floors.get(user_id, (0, 0.0))[0]

    def _raise_floor(self, user_id: str, version: int) -> None:
        now = self._clock.monotonic()
        known = self._floors.pop(user_id, (0, 0.0))[0]
        if version:
            self._floors[user_id] = (max(known, version), now + FLOOR_SECONDS)
        while self._floors:
            first = next(iter(self._floors))
            if self._floors[first][1] > now:
                break
            del self._floors[first]

    # Channel and leases (coherence.Invalidations)

    @property
    def attach(self) -> Callable[[LeasedCache], None]:
        return self._caches.append

    @property
    def detach(self) -> Callable[[LeasedCache], None]:
        return self._detach

    def _detach(self, cache: LeasedCache) -> None:
        if cache in self._caches:
            self._caches.remove(cache)

    @property
    def ready(self) -> Callable[[], Awaitable[None]]:
        return self._started

    @property
    def key_of(self) -> Callable[[str], bytes]:
        return self._authority.digest

    def _tell(self, notice: Notice) -> None:
        for cache in self._caches:
            cache.invalidate(notice)

    def _distrust(self) -> None:
        for cache in self._caches:
            cache.lease(float("-inf"))
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
            except StoreError:
                pass
            except Exception as exc:  # noqa: BLE001  a third party's store: listening must go on
                _log.warning("the invalidation channel failed: %s", type(exc).__name__)
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
                    with contextlib.suppress(asyncio.CancelledError, StoreError):
                        await pings
            await self._clock.sleep(pause)
            pause = min(1.0, pause * 2)

    def _receive(self, notice: Notice) -> None:
        self._seen = max(self._seen, notice.sent)
        if notice.echo:
            if notice.echo == self._me:
                self._half(notice.version, echoed=True)
            return
        if not notice.digest:
            self._distrust()
            return
        self._tell(notice)
        if notice.erased and self._ping_now is not None:
            # Somebody waits for us to have seen this.
            self._ping_now.set()

    async def _ping_for_ever(self) -> None:
        assert self._ping_now is not None
        number = 0
        while True:
            number += 1
            self._pings = {key: ping for key, ping in self._pings.items() if key >= number - 4}
            self._pings[number] = [self._clock.monotonic(), 0.0, 0.0]
            try:
                trusted = await self._tier.ping(self._me, LEASE_SECONDS, self._seen, number)
            except StoreError as exc:
                self._trouble(exc, "ping")
            else:
                self._well()
                self._half(number, trusted=trusted)
                if trusted:
                    # The pass behind this trust began at most so long ago, maybe elsewhere.
                    self._note_repaired(self._clock.monotonic() - TRUST_SECONDS)
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
        ping[2] = ping[2] or float(echoed)
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
            try:
                await self._repair()
                self._well()
            except StoreError:
                self.failures["repair"] += 1
            except Exception as exc:  # noqa: BLE001  a third party's store: repair must go on
                self.failures["repair"] += 1
                _log.warning("a repair pass of the cache tier failed: %s", type(exc).__name__)
            self._begun(repaired=True)
            await self._wait(self._repair_now, REPAIR_SECONDS)

    async def _repair(self) -> None:
        """Replay what changed in the authority, then stamp the tier as trusted."""
        started = self._clock.monotonic()
        head = await self._authority.head()
        begun = await self._tier.begin(self._me, head, TRUST_SECONDS)
        if begun is None:
            return
        cursor = begun.cursor
        if not await self._authority.covers(cursor):
            # Erasures since then may be forgotten: no copy of that time may count.
            await self._tier.renew(begun.generation, head)
            return
        more = True
        repaired = self.repaired
        while more:
            page = await self._authority.changes(cursor, PAGE)
            # The last page holds ordinary writes of just now, which are in the tier already.
            self._behind = len(page.items) if page.more else 0
            if page.items:
                acted = await self._tier.repair(page.items)
                self.repaired += len(acted)
                for change in acted:
                    if change.erased:
                        await self._authority.settle(
                            change.digest, change.version, self._tier.tier_name
                        )
            cursor, more = page.cursor, page.more
        self._behind = 0
        await self._tier.stamp(begun, cursor, TRUST_SECONDS)
        self._note_repaired(started)
        if self._ping_now is not None and self._leased_until <= self._clock.monotonic():
            self._ping_now.set()  # what the last ping was refused for is there now
        if self.repaired > repaired:
            log_event("tier_repaired", tier=self._tier.tier_name, users=self.repaired - repaired)

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
            log_event("tier_lost", tier=self._tier.tier_name, reason=type(exc).__name__)
        self._kick()

    def _well(self) -> None:
        self._failures = 0
        if not self._reachable:
            self._reachable = True
            log_event("tier_back", tier=self._tier.tier_name)

    def _kick(self) -> None:
        if self._repair_now is not None:
            self._repair_now.set()

    # Life

    async def _started(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is loop or self._closed:
            ready = self._ready
            if self._caches and not self._listening:
                self._follow()
            if ready is None or ready.is_set():
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
        with contextlib.suppress(TimeoutError):
            async with self._clock.timeout(READY_SECONDS):
                await ready.wait()
        ready.set()  # once is enough: a tier that is away must not cost every call a second

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
        if self._loop is not asyncio.get_running_loop():
            return
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
