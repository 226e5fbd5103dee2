"""SQLStore: the store's operations, time limits and lifecycle."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

from layered_store.call import current_call, next_order
from layered_store.checks import check_limit, check_snapshot, check_snapshots
from layered_store.clock import SYSTEM_CLOCK, Clock
from layered_store.codec import CodecError, SnapshotCodec
from layered_store.coherence.contract import ABSENT, Change, Changes, Versioned
from layered_store.enumerable import Enumerable, UserPage
from layered_store.errors import (
    ConfigError,
    CorruptDataError,
    StoreError,
    ValidationError,
)
from layered_store.explaining import Held, Peek
from layered_store.health import SharedProbe
from layered_store.identity import PrivateStr, check_user_id, digest_function
from layered_store.interface import Op
from layered_store.masking import mask_url
from layered_store.options import (
    Seconds,
    check_a,
    check_choice,
    check_count,
    check_seconds,
    check_snapshot_type,
)
from layered_store.snapshot import StateSnapshot
from layered_store.stats import Reads, Sample
from layered_store.stores.erasures import KnownErasures
from layered_store.stores.of_record import StoreOfRecord, outdone
from layered_store.stores.presence import Presence
from layered_store.stores.sql.changelog import ChangeLog

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine

    from layered_store.call import Call
    from layered_store.health import HealthReport
    from layered_store.stores.sql.access import Access
    from layered_store.stores.sql.batching import Batcher
    from layered_store.stores.sql.transactions import Write

__all__ = ["SQLStore"]

_TABLE_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}").fullmatch
_BATCHED_ROWS: Final = 200  # a longer history does not share its round trip with others
_MAX_INT: Final = 2**53
_BULK: Final = 1_000

# Asked for with each call: an enum looks its members up through its class's class.
_GET, _PUT = Op.GET_LATEST, Op.UPSERT_LATEST


@dataclass(eq=False, repr=False)
class SQLStore(StoreOfRecord, Enumerable):
    """Keeps states in a database: SQLite, PostgreSQL, MariaDB or MySQL.

    A full system of record: a write is acknowledged when it is committed, versions and erasures
    are kept, and a write that ``Retry`` repeats is stored once. Calls that wait at the same time
    share a round trip and a commit; a lone call goes out at once, and a failing call does not make
    others fail. Opens itself on first use, with separate connections for each event loop. Tables:
    one row per user in ``latest_table``, one per write in ``history_table``, and a counter beside
    them (not on PostgreSQL's path).

    Args:
        url: a SQLAlchemy URL, such as ``sqlite+aiosqlite:///states.db``,
            ``postgresql+asyncpg://user@host/db``, ``mysql+aiomysql://user@host/db``; a URL without
            a driver gets the async one. ``sqlite://`` alone is a database in memory.
        engine: a SQLAlchemy ``AsyncEngine`` instead; it stays the caller's and is not closed.
        history_limit: how many states per user ``get_history`` can give; None keeps all, 0 none.
        history_max_age: seconds after which a state leaves the history; None keeps it.
        order: which write is the latest: ``"arrival"`` at the database, or ``"snapshot_time"``,
            where a snapshot older than the stored one is ignored (and counted).
        latest_table: name of the table of latest states.
        history_table: name of the table of histories.
        create_tables: on first use, create missing tables and bring those of an earlier release up
            to date; when False, tables are never changed.
        snapshot_type: the class of the snapshots it keeps.
        digest_key: key of the digests that stand for users, as in all blocks that share data.
        timeout: seconds that one operation may take, the wait for others included; of a bulk call,
            each thousand users.
        probe_seconds: seconds that a health probe may take.
        pool_size: most connections per event loop; callers beyond it wait for one.
        clock: source of time.

    Raises:
        ConfigError: an option is out of range, the URL has a query option that its driver does not
            know, or not exactly one of ``url`` and ``engine``; from
            the first operation, the tables are of a version that this release does not know.
        CorruptDataError: a user's row cannot be read back or is another user's. In a batch read
            the other users are returned and this one is left out; asked for alone, it raises.
        UnavailableError: see :class:`StateStore`; ``outcome_unknown`` is set when the commit of a
            write had been sent.

    Cancellation:
        The caller leaves at once. A statement that is under way, and that nobody else waits for,
        is cut off and its connection thrown away, within 2 s, in a task that ``aclose`` waits for;
        SQLite's cannot be cut off, so it runs to its end there. A write that was cancelled may have
        been committed.
    """

    url: Any = field(default=None, metadata={"mask": mask_url})
    engine: AsyncEngine | None = field(default=None, kw_only=True, repr=False)
    history_limit: int | None = field(default=100, kw_only=True)
    history_max_age: Seconds | None = field(default=None, kw_only=True)
    order: Literal["arrival", "snapshot_time"] = field(default="arrival", kw_only=True)
    latest_table: str = field(default="layered_store_latest", kw_only=True)
    history_table: str = field(default="layered_store_history", kw_only=True)
    create_tables: bool = field(default=True, kw_only=True)
    snapshot_type: type[StateSnapshot] = field(default=StateSnapshot, kw_only=True)
    digest_key: bytes | str = field(default=b"", kw_only=True, repr=False)
    timeout: Seconds = field(default=5.0, kw_only=True)
    probe_seconds: Seconds = field(default=1.0, kw_only=True)
    pool_size: int = field(default=10, kw_only=True)
    clock: Clock = field(default=SYSTEM_CLOCK, kw_only=True, repr=False)

    kind: ClassVar[str] = "sql"

    def __post_init__(self) -> None:
        check_a(self.clock, Clock, "clock", self)
        check_count(self.history_limit, "history_limit", self, minimum=0, optional=True)
        age = check_seconds(self.history_max_age, "history_max_age", self, optional=True)
        check_choice(self.order, "order", self, ("arrival", "snapshot_time"))
        check_choice(self.create_tables, "create_tables", self, (True, False))
        check_snapshot_type(self.snapshot_type, self)
        check_count(self.pool_size, "pool_size", self, minimum=1, maximum=1_000)
        self._timeout = check_seconds(self.timeout, "timeout", self)
        self._probe_limit = check_seconds(self.probe_seconds, "probe_seconds", self)
        self._digest = digest_function(self.digest_key, self.name)
        self._digest_of = self._digest.__call__  # found once: Python looks for it at each call
        for option in ("latest_table", "history_table"):
            name = getattr(self, option)
            if not isinstance(name, str) or not _TABLE_NAME(name):
                raise ConfigError(
                    "must be 1 to 40 of letters, digits and '_', not beginning with a digit",
                    option=option,
                    layer=self.name,
                )
        if self.latest_table.lower() == self.history_table.lower():
            raise ConfigError(
                "must differ from latest_table", option="history_table", layer=self.name
            )
        if (self.url is None) == (self.engine is None):
            raise ConfigError("pass either url or engine", option="url", layer=self.name)
        max_age_us = None if age is None else int(min(_MAX_INT, age * 1e6))
        self._max_age_us = _MAX_INT if max_age_us is None else max_age_us
        self._access = self._connect_to(max_age_us)
        self._statements = self._access.statements
        self._log = ChangeLog(self._access, self._erasures, self.name)
        self._codec = SnapshotCodec(self.snapshot_type)
        self._probe = SharedProbe(self.name, self._probe_limit, self.clock)
        self._corrupt = 0
        self._reads = Reads()

    def _connect_to(self, max_age_us: int | None) -> Access:
        # Imported here, so that importing the package imports no SQLAlchemy.
        from layered_store.stores.sql import engines  # noqa: PLC0415
        from layered_store.stores.sql.access import Access  # noqa: PLC0415
        from layered_store.stores.sql.batching import own_error  # noqa: PLC0415
        from layered_store.stores.sql.session import Rules  # noqa: PLC0415
        from layered_store.stores.sql.transactions import (  # noqa: PLC0415
            Erasure,
            Settlement,
            Write,
        )

        if self.engine is None:
            address = engines.parse_url(self.url, self.name)
        elif hasattr(self.engine, "sync_engine"):
            address = self.engine.sync_engine.url
        else:
            raise ConfigError(
                "must be an AsyncEngine, from create_async_engine",
                option="engine",
                layer=self.name,
            )
        self._erasures = KnownErasures(self.clock)
        self._own_error, self._new_write, self._new_erasure = own_error, Write, Erasure
        self._new_settlement = Settlement
        return Access(
            self.engine,
            address,
            self.latest_table,
            self.history_table,
            create_tables=self.create_tables,
            rules=Rules(self.history_limit, max_age_us, self.order == "snapshot_time"),
            erasures=self._erasures,
            timeout=self._timeout,
            pool_size=self.pool_size,
            clock=self.clock,
            name=self.name,
            presence=Presence(self, self.clock),
        )

    @property
    def digest(self) -> digest_function:
        return self._digest

    @property
    def metadata(self) -> Any:
        """The tables as SQLAlchemy ``MetaData``, for migrations of one's own."""
        return self._access.tables.metadata

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        check_user_id(user_id, _GET, self)
        # As ``_read`` does; written out, since by far most calls pass here.
        try:
            if self._closed:
                self._check_open(_GET)
            reads = self._access.home(_GET).reads
            try:
                row = await reads.submit(self._digest_of(user_id))
            except asyncio.CancelledError:
                reads.left()
                raise
            if row is None:
                snapshot = None
            elif isinstance(row, Exception):
                raise self._own_error(row, _GET, self.name)
            else:
                snapshot = self._snapshot(user_id, row, _GET)
        except Exception as exc:
            self._reads.failed(exc)
            raise
        if snapshot is None:
            self._reads.miss += 1
        else:
            self._reads.hit += 1
        return snapshot

    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        check_user_id(user_id, Op.GET_HISTORY, self)
        check_limit(limit, self)
        self._check_open(Op.GET_HISTORY)
        rows = min(limit, _MAX_INT if self.history_limit is None else self.history_limit)
        if rows == 0:
            return []
        digest, age = self._digest(user_id), self._max_age_us
        histories = self._access.home(Op.GET_HISTORY).histories
        if histories is not None and rows <= _BATCHED_ROWS:
            found = (await self._all(histories, [(digest, rows, age)]))[0]
            if isinstance(found, Exception):
                raise self._own_error(found, Op.GET_HISTORY, self.name)
            return [self._decode(user_id, payload, Op.GET_HISTORY) for payload in found]
        values = {"at_digest": digest, "max_rows": rows, "max_age_us": age}
        kept = await self._access.rows(Op.GET_HISTORY, self._statements.history, values)
        return [self._decode(user_id, row.payload, Op.GET_HISTORY) for row in kept]

    async def open(self) -> None:
        self._check_open("open")
        await self._access.rows("open", self._statements.horizon, {})

    async def peek(self, user_id: str) -> Peek:
        """Tell what the row of a user holds."""
        self._check_open("peek")
        row = await self._one(self._access.home("peek").reads, self._digest(user_id), "peek")
        if row is None:
            return Peek(Held.ABSENT)
        _, owner, version, payload = row
        if payload is None:
            return Peek(Held.ERASED, version=version)
        if owner != user_id:
            return Peek(Held.UNKNOWN, note="the record belongs to another user")
        try:
            state = self._codec.decode(_to_bytes(payload), user_id)
        except CodecError as exc:
            return Peek(Held.UNKNOWN, version=version, answers=False, note=exc.message)
        return Peek(Held.STATE, state.updated_at_unix_ms, version=version)

    async def health_report(self) -> HealthReport:
        return await self._probe.run(self._ask)

    async def _ask(self) -> bool:
        self._check_open("health_check")
        # A real read of the real table: a server may answer and the table be gone.
        await self._access.rows("health_check", self._statements.read, {"at_digest": bytes(16)})
        return True

    def samples(self) -> Iterable[Sample]:
        yield from self._reads.samples()
        yield Sample("stale_writes", self._access.too_old)
        yield Sample("corrupt_records", self._corrupt)

    async def aclose(self) -> None:
        self._closed = True
        await self._access.aclose()

    # What a system of record offers to a cache tier in front of it.

    async def read(self, user_id: str) -> Versioned:
        return await self._read(user_id, Op.GET_LATEST)

    async def read_many(self, user_ids: Sequence[str]) -> Mapping[str, Versioned]:
        """Return the committed records of several users.

        A user whose row is corrupt is left out (and counted), so that the others can be served;
        asked for alone, it raises.
        """
        for user_id in user_ids:
            check_user_id(user_id, Op.GET_LATEST_MANY, self)
        if len(user_ids) == 1:
            try:
                return {user_ids[0]: await self._read(user_ids[0], Op.GET_LATEST_MANY)}
            except CorruptDataError:
                return {}
        wanted = list(dict.fromkeys(user_ids))
        try:
            self._check_open(Op.GET_LATEST_MANY)
            records = await self._records(wanted)
        except Exception as exc:
            self._reads.failed(exc, len(wanted))
            raise
        for record in records.values():
            self._reads.found(record.snapshot)
        self._reads.error += len(wanted) - len(records)
        return records

    async def _records(self, wanted: Sequence[str]) -> Mapping[str, Versioned]:
        reads = self._access.home(Op.GET_LATEST_MANY).reads
        rows = await self._all(reads, [self._digest(user_id) for user_id in wanted])
        records = {}
        for user_id, row in zip(wanted, rows, strict=True):
            if isinstance(row, Exception):
                raise self._own_error(row, Op.GET_LATEST_MANY, self.name)
            try:
                records[user_id] = (
                    ABSENT if row is None else self._record(user_id, row, Op.GET_LATEST_MANY)
                )
            except CorruptDataError:
                continue
        return records

    async def write(self, snapshot: StateSnapshot) -> Versioned:
        check_snapshot(snapshot, self.snapshot_type, block=self)
        self._check_open(_PUT)
        call = current_call(self.clock)
        item = self._prepare(snapshot, call.id_of(snapshot), call, fresh=call.first_attempt())
        writes = self._access.home(_PUT).writes
        try:  # as ``_one`` does; written out, since each write comes by here
            row = await writes.submit(item)
        except asyncio.CancelledError:
            writes.left()
            raise
        record = self._after(snapshot, item, row, _PUT)
        call.superseded = record.snapshot is not snapshot
        return record

    async def write_many(self, snapshots: Sequence[StateSnapshot]) -> Mapping[str, Versioned]:
        check_snapshots(snapshots, self.snapshot_type, self)
        self._check_open(Op.UPSERT_LATEST_MANY)
        call = current_call(self.clock)
        fresh = call.first_attempt()
        items = [
            self._prepare(snapshot, call.part(index), call, fresh=fresh)
            for index, snapshot in enumerate(snapshots)
        ]
        writes = self._access.home(Op.UPSERT_LATEST_MANY).writes
        rows = await self._all(writes, items)
        failed = [row for row in rows if isinstance(row, Exception)]
        if failed:
            # Repeating the call is safe. That some are stored, or may be, is not hidden.
            worst = max(failed, key=lambda error: getattr(error, "outcome_unknown", False))
            told = self._own_error(worst, Op.UPSERT_LATEST_MANY, self.name)
            if len(failed) < len(rows) and isinstance(told, StoreError):
                told.outcome_unknown = True
            raise told
        records = {}
        for snapshot, item, row in zip(snapshots, items, rows, strict=True):
            records[snapshot.user_id] = self._after(snapshot, item, row, Op.UPSERT_LATEST_MANY)
        if outdone(snapshots, records):
            call.superseded = True
        return records

    async def erase(self, user_id: str, tiers: Sequence[str] = ()) -> int:
        check_user_id(user_id, Op.DELETE, self)
        self._check_open(Op.DELETE)
        digest = self._digest(user_id)
        call = current_call(self.clock)
        erasure = self._new_erasure(digest, tiers, call.write_id, call.first_attempt())
        writes = self._access.home(Op.DELETE).writes
        version, anew = await self._one(writes, erasure, Op.DELETE)
        if anew:
            self._erasures.made(digest, version, next_order())
        else:
            call.superseded = True
        return version  # type: ignore[no-any-return]

    async def settle(self, digest: bytes, version: int, tier: str) -> None:
        self._check_open("settle")
        settlement = self._new_settlement(digest, version, tier)
        await self._one(self._access.home("settle").writes, settlement, "settle")

    async def debts(self, user_id: str) -> Sequence[str]:
        check_user_id(user_id, "debts", self)
        self._check_open("debts")
        values = {"at_digest": self._digest(user_id)}
        found = await self._access.rows("debts", self._statements.debts, values)
        return tuple(json.loads(found[0].debts or "[]")) if found else ()

    async def owing(self, tier: str, limit: int) -> Sequence[Change]:
        self._check_open("owing")
        pattern = re.sub(r"([/%_])", r"/\1", json.dumps(tier))
        values = {"tier_pattern": f"%{pattern}%", "max_rows": limit}
        rows = await self._access.rows("owing", self._statements.owing, values)
        return [Change(bytes(row.digest), row.version, erased=True, owed=True) for row in rows]

    async def head(self) -> str:
        self._check_open("head")
        return await self._log.head()

    async def changes(self, cursor: str, limit: int) -> Changes:
        self._check_open("changes")
        return await self._log.changes(cursor, limit)

    async def covers(self, cursor: str) -> bool:
        self._check_open("covers")
        return await self._log.covers(cursor)

    async def users(self, cursor: str, limit: int) -> UserPage:
        self._check_open("users")
        try:
            # By digest, the primary key: a page costs the same wherever it begins.
            values = {"after_digest": bytes.fromhex(cursor), "max_rows": limit}
        except ValueError:
            raise ValidationError(
                "is not one of this store's", field="cursor", operation="users", layer=self.name
            ) from None
        rows = await self._access.rows("users", self._statements.users, values)
        end = bytes(rows[-1].digest).hex() if len(rows) == limit else None
        return UserPage([row.user_id for row in rows], end)

    # How operations go out.

    async def _read(self, user_id: str, op: Op) -> Versioned:
        check_user_id(user_id, op, self)
        try:
            self._check_open(op)
            row = await self._one(self._access.home(op).reads, self._digest(user_id), op)
            record = ABSENT if row is None else self._record(user_id, row, op)
        except Exception as exc:
            self._reads.failed(exc)
            raise
        self._reads.found(record.snapshot)
        return record

    async def _one(self, batcher: Batcher, item: Any, operation: str) -> Any:
        """Return the result of one call."""
        try:
            result = await batcher.submit(item)
        except asyncio.CancelledError:
            batcher.left()
            raise
        if isinstance(result, Exception):
            raise self._own_error(result, operation, self.name)
        return result

    async def _all(self, batcher: Batcher, items: Iterable[Any]) -> list[Any]:
        """Return the results of several calls, or exception objects, when all are there.

        Each thousand of them has the time limit of its own.
        """
        results: list[Any] = []
        left = iter(items)
        while some := list(islice(left, _BULK)):
            futures = [batcher.submit(item) for item in some]
            try:
                results += [await future for future in futures]
            except asyncio.CancelledError:
                for future in futures:
                    future.cancel()
                batcher.left()
                raise
        return results

    # Rows and snapshots.

    def _prepare(
        self, snapshot: StateSnapshot, write_id: bytes, call: Call, *, fresh: bool
    ) -> Write:
        return self._new_write(
            self._digest_of(snapshot.user_id),
            PrivateStr(snapshot.user_id),
            self._codec.encode(snapshot),
            write_id,
            call.began(self.clock),
            call.order,
            snapshot.updated_at_unix_ms,
            fresh,
        )

    def _after(self, snapshot: StateSnapshot, item: Write, row: Any, op: Op) -> Versioned:
        """Return what a write left: itself, or what won over it."""
        if type(row) is int:
            return Versioned(row, snapshot)
        if isinstance(row, Exception):
            raise self._own_error(row, op, self.name)
        if row.payload is item.payload:
            return Versioned(row.version, snapshot)
        return self._record(snapshot.user_id, (None, row.user_id, row.version, row.payload), op)

    def _record(self, user_id: str, row: tuple[Any, ...], op: Op) -> Versioned:
        """Return the record in a row of digest, user id, version and payload."""
        return Versioned(row[2], self._snapshot(user_id, row, op))

    def _snapshot(self, user_id: str, row: Any, op: Op) -> StateSnapshot | None:
        payload = row[3]
        if payload is None:
            if row[1] is not None:
                raise self._corruption("the record holds no state", user_id, op)
            return None
        if row[1] != user_id:
            raise self._corruption("the record belongs to another user", user_id, op)
        return self._decode(user_id, payload, op)

    def _decode(self, user_id: str, payload: bytes, op: Op) -> StateSnapshot:
        if type(payload) is not bytes:
            payload = _to_bytes(payload)
        try:
            return self._codec.decode(payload, user_id)
        except CodecError as exc:
            raise self._corruption(exc.message, user_id, op) from None

    def _corruption(self, message: str, user_id: str, op: Op) -> CorruptDataError:
        self._corrupt += 1
        return CorruptDataError(message, operation=op, layer=self.name, user_id=user_id)


def _to_bytes(payload: Any) -> bytes:
    """Return a state's bytes; empty for another type of value, which SQLite keeps in any column."""
    return bytes(payload) if isinstance(payload, bytes | bytearray | memoryview) else b""
