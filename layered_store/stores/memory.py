"""The backend that keeps everything in this process."""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple

from layered_store.call import current_call, next_order
from layered_store.checks import check_limit, check_snapshot, check_snapshots
from layered_store.clock import SYSTEM_CLOCK, Clock
from layered_store.coherence.contract import ABSENT, Change, Changes, Versioned
from layered_store.coherence.tombstones import TOMBSTONE_SECONDS, too_late
from layered_store.enumerable import Enumerable, UserPage
from layered_store.explaining import Held, Peek
from layered_store.identity import check_user_id, digest_function
from layered_store.interface import Op
from layered_store.options import check_a, check_count, check_snapshot_type
from layered_store.snapshot import StateSnapshot
from layered_store.stats import Reads, Sample
from layered_store.stores.of_record import StoreOfRecord, outdone

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["MemoryStore"]

_SWEEP_PER_WRITE: Final = 2
_WRITE_IDS: Final = 64
_ERASE_IDS: Final = 16


@dataclass(eq=False, repr=False)
class MemoryStore(StoreOfRecord, Enumerable):
    """Keeps states in a dict of this process; they are gone when it ends.

    Safe from several threads and event loops. For tests, small tools and as the end of a stack
    that needs no durability. It is a full system of record: versions, erasure, change log.

    Args:
        history_limit: how many states per user ``get_history`` can give; None keeps all, 0 none.
        snapshot_type: the class of the snapshots it keeps.
        clock: source of time; tells when tombstones may be forgotten (after 7 days).

    Raises:
        ConfigError: an option is out of range.
        UnavailableError: from an upsert that began so long ago that an erasure since then may be
            forgotten; not ``retryable``, nothing was stored.
    """

    history_limit: int | None = field(default=100, kw_only=True)
    snapshot_type: type[StateSnapshot] = field(default=StateSnapshot, kw_only=True)
    clock: Clock = field(default=SYSTEM_CLOCK, kw_only=True, repr=False)

    kind: ClassVar[str] = "memory"
    digest: ClassVar[digest_function] = digest_function()

    def __post_init__(self) -> None:
        check_count(self.history_limit, "history_limit", self, minimum=0, optional=True)
        check_snapshot_type(self.snapshot_type, self)
        check_a(self.clock, Clock, "clock", self)
        self._users: dict[str, _Row] = {}
        # Users by the position of their last change: the change log, each user once.
        self._log: OrderedDict[str, int] = OrderedDict()
        self._position = 0
        # What is gone with this process must not be taken for known by a tier that outlives it.
        self._run = os.urandom(8).hex()
        # Erased users whose erasure is owed to some tier, by digest.
        self._owing: dict[bytes, str] = {}
        # The users in order, and the position they were sorted at: sorted once a listing.
        self._listed: tuple[int, list[str]] = (0, [])
        self._tombstones: deque[tuple[float, str]] = deque()
        # The last of the erasures that are forgotten: what began before it may be too late, what is
        # written after it has a higher version, and who knows no more than it must start over.
        self._forgotten = _Forgotten()
        self._lock = threading.Lock()
        self._reads = Reads()

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        check_user_id(user_id, Op.GET_LATEST, self)
        self._check_open(Op.GET_LATEST)
        row = self._users.get(user_id)
        snapshot = None if row is None else row.snapshot
        self._reads.found(snapshot)
        return snapshot

    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        check_user_id(user_id, Op.GET_HISTORY, self)
        check_limit(limit, self)
        self._check_open(Op.GET_HISTORY)
        with self._lock:
            row = self._users.get(user_id)
            return [] if row is None else list(islice(row.history, min(limit, len(row.history))))

    def samples(self) -> Iterable[Sample]:
        yield from self._reads.samples()

    async def health_check(self) -> bool:
        return not self._closed

    async def peek(self, user_id: str) -> Peek:
        """Tell what is kept of a user."""
        self._check_open("peek")
        with self._lock:
            row = self._users.get(user_id)
            if row is None:
                return Peek(Held.ABSENT)
            state, version = row.snapshot, row.version
        if state is None:
            return Peek(Held.ERASED, version=version)
        return Peek(Held.STATE, state.updated_at_unix_ms, version=version)

    async def open(self) -> None:
        self._check_open("open")

    async def aclose(self) -> None:
        self._closed = True

    # What a system of record offers to a cache tier in front of it.

    async def read(self, user_id: str) -> Versioned:
        return (await self.read_many([user_id]))[user_id]

    async def read_many(self, user_ids: Sequence[str]) -> Mapping[str, Versioned]:
        for user_id in user_ids:
            check_user_id(user_id, Op.GET_LATEST_MANY, self)
        self._check_open(Op.GET_LATEST_MANY)
        with self._lock:
            rows = {user_id: self._users.get(user_id) for user_id in user_ids}
            for row in rows.values():
                self._reads.found(None if row is None else row.snapshot)
            return {
                user_id: ABSENT if row is None else Versioned(row.version, row.snapshot)
                for user_id, row in rows.items()
            }

    async def write(self, snapshot: StateSnapshot) -> Versioned:
        check_snapshot(snapshot, self.snapshot_type, block=self)
        self._check_open(Op.UPSERT_LATEST)
        call = current_call(self.clock)
        with self._lock:
            record = self._write(snapshot, call.order, call.id_of(snapshot))
        if record.snapshot is not snapshot:
            call.superseded = True
        return record

    async def write_many(self, snapshots: Sequence[StateSnapshot]) -> Mapping[str, Versioned]:
        check_snapshots(snapshots, self.snapshot_type, self)
        self._check_open(Op.UPSERT_LATEST_MANY)
        call = current_call(self.clock)
        with self._lock:
            records = {
                snapshot.user_id: self._write(snapshot, call.order, call.part(index))
                for index, snapshot in enumerate(snapshots)
            }
        if outdone(snapshots, records):
            call.superseded = True
        return records

    async def erase(self, user_id: str, tiers: Sequence[str] = ()) -> int:
        check_user_id(user_id, Op.DELETE, self)
        self._check_open(Op.DELETE)
        call = current_call(self.clock)
        with self._lock:
            row = self._users.get(user_id)
            if row is None:
                row = self._users[user_id] = _Row(self._forgotten.version)
            if call.write_id in row.erase_ids:
                call.superseded = True
                return row.erased_version  # a repeat must not erase what was written since
            row.erase_ids.append(call.write_id)
            row.version += 1
            row.snapshot = None
            row.history.clear()
            row.write_ids.clear()
            row.erased_at = self.clock.monotonic()
            row.erased_order = next_order()
            row.erased_version = row.version
            row.debts |= set(tiers)
            if row.debts:
                self._owing[self.digest(user_id)] = user_id
            self._tombstones.append((row.erased_at, user_id))
            self._note(user_id)
            self._sweep(row.erased_at)
            return row.version

    async def settle(self, digest: bytes, version: int, tier: str) -> None:
        with self._lock:
            user_id = self._owing.get(digest)
            row = None if user_id is None else self._users.get(user_id)
            if row is None:
                self._owing.pop(digest, None)
            elif row.erased_version <= version:
                row.debts.discard(tier)
                if not row.debts:
                    del self._owing[digest]

    async def debts(self, user_id: str) -> Sequence[str]:
        with self._lock:
            row = self._users.get(user_id)
            return () if row is None else sorted(row.debts)

    async def owing(self, tier: str, limit: int) -> Sequence[Change]:
        self._check_open(Op.GET_LATEST_MANY)
        with self._lock:
            owed = (
                Change(digest, row.version, row.snapshot is None, owed=True)
                for digest, user_id in self._owing.items()
                if (row := self._users.get(user_id)) is not None and tier in row.debts
            )
            return list(islice(owed, limit))

    async def head(self) -> str:
        return f"{self._run}.{self._position}"

    async def changes(self, cursor: str, limit: int) -> Changes:
        self._check_open(Op.GET_LATEST_MANY)
        after = self._read_cursor(cursor)
        if after is None:
            after = 0  # another store's, or of an earlier run
        items: list[Change] = []
        with self._lock:
            newest_first = []
            for user_id in reversed(self._log):
                position = self._log[user_id]
                if position <= after:
                    break
                newest_first.append((position, user_id))
            for position, user_id in islice(reversed(newest_first), limit):
                row = self._users.get(user_id)
                if row is not None:
                    erased, owed = row.snapshot is None, bool(row.debts)
                    items.append(Change(self.digest(user_id), row.version, erased, owed))
                after = position
            more = len(newest_first) > limit
            return Changes(items, f"{self._run}.{after if more else self._position}", more)

    async def covers(self, cursor: str) -> bool:
        after = self._read_cursor(cursor)
        return after is not None and self._forgotten.position <= after <= self._position

    def _read_cursor(self, cursor: str) -> int | None:
        run, _, position = cursor.partition(".")
        return int(position) if run == self._run and position.isdecimal() else None

    async def users(self, cursor: str, limit: int) -> UserPage:
        self._check_open(Op.GET_LATEST_MANY)
        with self._lock:
            if self._listed[0] != self._position:
                there = (user for user, row in self._users.items() if row.snapshot is not None)
                self._listed = (self._position, sorted(there))
            listed = self._listed[1]
        start = bisect_right(listed, cursor)
        page = listed[start : start + limit]
        return UserPage(page, page[-1] if start + limit < len(listed) else None)

    def _write(self, snapshot: StateSnapshot, order: int, write_id: bytes) -> Versioned:
        user_id = snapshot.user_id
        row = self._users.get(user_id)
        if row is None:
            if order < self._forgotten.order:
                raise too_late(Op.UPSERT_LATEST, self.name)
            row = self._users[user_id] = _Row(self._forgotten.version)
        if order < row.erased_order or write_id in row.write_ids:
            return Versioned(row.version, row.snapshot)
        row.version += 1
        row.snapshot = snapshot
        row.write_ids.append(write_id)
        if self.history_limit != 0:
            row.history.appendleft(snapshot)
            if self.history_limit is not None and len(row.history) > self.history_limit:
                row.history.pop()
        self._note(user_id)
        self._sweep(self.clock.monotonic())
        return Versioned(row.version, snapshot)

    def _note(self, user_id: str) -> None:
        self._position += 1
        self._log[user_id] = self._position
        self._log.move_to_end(user_id)

    def _sweep(self, now: float) -> None:
        """Forget old tombstones, a few with every write, so that no call pays for many."""
        for _ in range(_SWEEP_PER_WRITE):
            if not self._tombstones or self._tombstones[0][0] > now - TOMBSTONE_SECONDS:
                return
            erased_at, user_id = self._tombstones.popleft()
            row = self._users.get(user_id)
            if row is None or row.snapshot is not None or row.erased_at > erased_at:
                continue
            if row.debts:
                # Copies may stand in a tier that was away for so long: kept until they are gone.
                row.erased_at = now
                self._tombstones.append((now, user_id))
                continue
            del self._users[user_id]
            before = self._forgotten
            self._forgotten = _Forgotten(
                max(before.order, row.erased_order),
                max(before.version, row.version),
                max(before.position, self._log.pop(user_id, 0)),
            )


class _Forgotten(NamedTuple):
    """How far the erasures reached whose tombstones are gone.

    Args:
        order: the last one's place among the writes and erasures of this process.
        version: the highest version of them.
        position: the last one's place in the change log.
    """

    order: int = 0
    version: int = 0
    position: int = 0


@dataclass(eq=False, repr=False, slots=True)
class _Row:
    version: int
    snapshot: StateSnapshot | None = None
    history: deque[StateSnapshot] = field(default_factory=deque)
    write_ids: deque[bytes] = field(default_factory=lambda: deque(maxlen=_WRITE_IDS))
    erased_at: float = float("-inf")
    erased_order: int = 0
    erased_version: int = 0
    erase_ids: deque[bytes] = field(default_factory=lambda: deque(maxlen=_ERASE_IDS))
    debts: set[str] = field(default_factory=set)
