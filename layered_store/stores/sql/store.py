"""SQLStore: the store's operations, time limits and lifecycle."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, TypeVar

from layered_store.call import current_call, next_order
from layered_store.clock import SYSTEM_CLOCK, Clock
from layered_store.codec import CodecError, SnapshotCodec
from layered_store.coherence.contract import ABSENT, Authority, Change, Changes, Versioned
from layered_store.enumerable import Enumerable, UserPage
from layered_store.errors import (
    ClosedError,
    ConfigError,
    CorruptDataError,
    StoreError,
    StoreTimeoutError,
    ValidationError,
)
from layered_store.health import HealthStatus, SharedProbe
from layered_store.identity import PrivateStr, check_user_id, digest_function
from layered_store.interface import (
    Op,
    StateStore,
    check_limit,
    check_snapshot,
    check_user_ids,
    listed,
)
from layered_store.options import (
    Seconds,
    check_choice,
    check_count,
    check_seconds,
    check_snapshot_type,
)
from layered_store.snapshot import StateSnapshot
from layered_store.stack import mask_url
from layered_store.stats import Reads, Sample

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine

    from layered_store.call import Call
    from layered_store.health import HealthReport
    from layered_store.stores.sql.engines import Home
    from layered_store.stores.sql.transactions import Row, Session, Write

__all__ = ["SQLStore"]

T = TypeVar("T")

_TABLE_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}").fullmatch
_CHUNK: Final = 500
_OWN_ERASURE_SECONDS: Final = 30.0
_OWN_ERASURES: Final = 100_000
_PURGE_EVERY: Final = 64
_PURGE_ROWS: Final = 128
_COVERED_US: Final = (7 * 86_400 - 3_600) * 1_000_000
_MAX_INT: Final = 2**53
_CURSOR: Final = re.compile(r"(\d{1,19})\.([0-9a-f]{0,32})\.(\d{1,19})").fullmatch


@dataclass(eq=False, repr=False)
class SQLStore(StateStore, Authority, Enumerable):
    """Keeps states in a database: SQLite, PostgreSQL, MariaDB or MySQL.

    A full system of record: a write is acknowledged when it is committed, versions and erasures
    are kept, a repeated write counts once. Opens itself on first use, with connections of its own
    for each event loop. Tables: one row per user in ``latest_table``, one per write in
    ``history_table``, and a counter beside them (not on PostgreSQL's path).

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
            to date; without it they are only looked at.
        snapshot_type: the class of the snapshots it keeps.
        digest_key: key of the digests that stand for users, as in all blocks that share data.
        timeout: seconds that one operation may take.
        probe_seconds: seconds that a health probe may take.
        pool_size: most connections per event loop; callers beyond it wait for one.
        clock: source of time.

    Raises:
        ConfigError: an option is out of range, or not exactly one of ``url`` and ``engine``; from
            the first operation, the tables are of a version that this release does not know.
        CorruptDataError: a user's row cannot be read back or is another user's. In a batch read
            the other users are returned and this one is left out; asked for alone, it raises.
        UnavailableError: see :class:`StateStore`; ``outcome_unknown`` is set when the commit of a
            write had been sent.

    Cancellation:
        The caller leaves at once. A statement that is under way is cut off and its connection
        thrown away, within 2 s, in a task that ``aclose`` waits for; SQLite's cannot be cut
        off, so it runs to its end there. A write that was cancelled may have been committed.
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
        check_count(self.history_limit, "history_limit", self, minimum=0, optional=True)
        age = check_seconds(self.history_max_age, "history_max_age", self, optional=True)
        check_choice(self.order, "order", self, ("arrival", "snapshot_time"))
        check_choice(self.create_tables, "create_tables", self, (True, False))
        check_snapshot_type(self.snapshot_type, self)
        check_count(self.pool_size, "pool_size", self, minimum=1, maximum=1_000)
        self._timeout = check_seconds(self.timeout, "timeout", self)
        self._probe_limit = check_seconds(self.probe_seconds, "probe_seconds", self)
        self._digest = digest_function(self.digest_key)
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
        self._connect_to()
        max_age_us = None if age is None else min(_MAX_INT, int(age * 1e6))
        self._rules = _rules(self.history_limit, max_age_us, self.order == "snapshot_time")
        self._codec = SnapshotCodec(self.snapshot_type)
        self._homes: dict[asyncio.AbstractEventLoop, Home] = {}
        # Erasures of this process by digest: the version, when the call returned, and its order.
        self._own_erasures: dict[bytes, tuple[int, float, int]] = {}
        self._probe = SharedProbe(self.name, self._probe_limit, self.clock)
        self._writes = 0
        self._too_old = 0
        self._corrupt = 0
        self._reads = Reads()
        self._closed = False

    def _connect_to(self) -> None:
        # Imported here, so that importing the package imports no SQLAlchemy.
        from layered_store.stores.sql import engines  # noqa: PLC0415
        from layered_store.stores.sql.dialects import Statements  # noqa: PLC0415
        from layered_store.stores.sql.schema import build_tables  # noqa: PLC0415

        self._given: AsyncEngine | None = None
        if self.engine is not None:
            if not hasattr(self.engine, "sync_engine"):
                raise ConfigError(
                    "must be an AsyncEngine, from create_async_engine",
                    option="engine",
                    layer=self.name,
                )
            self._address = self.engine.sync_engine.url
            dialect = self.engine.dialect.name
            # Shares the caller's pool; only statements of ours commit by themselves.
            self._given = self.engine.execution_options(isolation_level="AUTOCOMMIT")
        else:
            self._address = engines.parse_url(self.url, self.name)
            dialect = self._address.get_backend_name()
        family = engines.family_of(dialect, "engine" if self.engine else "url", self.name)
        self._one_connection = engines.in_memory(self._address)
        self._tables = build_tables(self.latest_table, self.history_table)
        self._statements = Statements(self._tables, family)
        # A running SQLite statement is a thread's: it ends by itself, cut off or not.
        self._cannot_stop = family == "sqlite"

    @property
    def digest(self) -> digest_function:
        return self._digest

    @property
    def metadata(self) -> Any:
        """The tables as SQLAlchemy ``MetaData``, for migrations of one's own."""
        return self._tables.metadata

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        await self.write(snapshot)

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        return (await self._read(user_id, Op.GET_LATEST)).snapshot

    async def delete(self, user_id: str) -> None:
        await self.erase(user_id)

    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        check_user_id(user_id, Op.GET_HISTORY)
        check_limit(limit)
        self._check_open(Op.GET_HISTORY)
        rows = min(limit, _MAX_INT if self.history_limit is None else self.history_limit)
        if rows == 0:
            return []
        age = self._rules.max_age_us
        values = {
            "at_digest": self._digest(user_id),
            "max_rows": rows,
            "max_age_us": _MAX_INT if age is None else age,
        }

        async def work(session: Session) -> Sequence[Any]:
            return await session.rows(self._statements.history, session.timed(values))

        found = await self._run(Op.GET_HISTORY, work)
        return [self._decode(user_id, row.payload, Op.GET_HISTORY) for row in found]

    async def get_latest_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        records = await self.read_many(check_user_ids(user_ids))
        return {
            user_id: record.snapshot
            for user_id, record in records.items()
            if record.snapshot is not None
        }

    async def upsert_latest_many(self, snapshots: Iterable[StateSnapshot]) -> None:
        await self.write_many(listed(snapshots, "snapshots", Op.UPSERT_LATEST_MANY))

    async def open(self) -> None:
        self._check_open("open")

        async def work(session: Session) -> None:
            await session.rows(self._statements.horizon, session.timed({}))

        await self._run("open", work)

    async def health_check(self) -> bool:
        return (await self.health_report()).status is not HealthStatus.UNHEALTHY

    async def health_report(self) -> HealthReport:
        return await self._probe.run(self._ask)

    async def _ask(self) -> bool:
        self._check_open("health_check")

        async def work(session: Session) -> None:
            # A real read of the real table: a server may answer and the table be gone.
            await session.rows(self._statements.read, {"at_digest": bytes(16)})

        await self._run("health_check", work)
        return True

    def samples(self) -> Iterable[Sample]:
        yield from self._reads.samples()
        yield Sample("stale_writes", self._too_old)
        yield Sample("corrupt_records", self._corrupt)

    async def aclose(self) -> None:
        from layered_store.stores.sql.engines import drop  # noqa: PLC0415

        self._closed = True
        loop = asyncio.get_running_loop()
        for home in [self._homes.pop(each) for each in list(self._homes)]:
            if home.loop is not loop:
                if self._given is None:
                    drop(home.engine)
                continue
            if home.running:
                await asyncio.wait(home.running, timeout=self._timeout)
            if home.closer is not None:
                await home.closer.aclose()
            elif self._given is None:
                await home.engine.dispose()

    # What a system of record offers to a cache tier in front of it.

    async def read(self, user_id: str) -> Versioned:
        return await self._read(user_id, Op.GET_LATEST)

    async def read_many(self, user_ids: Sequence[str]) -> Mapping[str, Versioned]:
        """Return the committed records of several users.

        A user whose row is corrupt is left out (and counted), so that the others can be served;
        asked for alone, it raises.
        """
        for user_id in user_ids:
            check_user_id(user_id, Op.GET_LATEST_MANY)
        if len(user_ids) == 1:
            return {user_ids[0]: await self._read(user_ids[0], Op.GET_LATEST_MANY)}
        wanted = {self._digest(user_id): user_id for user_id in user_ids}
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

    async def _records(self, wanted: Mapping[bytes, str]) -> Mapping[str, Versioned]:
        from layered_store.stores.sql.transactions import padded  # noqa: PLC0415

        records = dict.fromkeys(wanted.values(), ABSENT)
        for digests in batched(wanted, _CHUNK):
            values = {"digests": padded(digests)}

            async def work(session: Session, values: dict[str, Any] = values) -> Sequence[Any]:
                return await session.rows(self._statements.read_many, values)

            for row in await self._run(Op.GET_LATEST_MANY, work):
                user_id = wanted[bytes(row.digest)]
                try:
                    records[user_id] = self._record(user_id, row, Op.GET_LATEST_MANY)
                except CorruptDataError:
                    del records[user_id]
        return records

    async def write(self, snapshot: StateSnapshot) -> Versioned:
        check_snapshot(snapshot, self.snapshot_type)
        self._check_open(Op.UPSERT_LATEST)
        call = current_call(self.clock)
        item = self._prepare(snapshot, call.id_of(snapshot), call)
        row = (await self._write([item], Op.UPSERT_LATEST))[0]
        record = self._after(snapshot, item, row)
        call.superseded = record.snapshot is not snapshot
        return record

    async def write_many(self, snapshots: Sequence[StateSnapshot]) -> Mapping[str, Versioned]:
        for snapshot in snapshots:
            check_snapshot(snapshot, self.snapshot_type, Op.UPSERT_LATEST_MANY)
        self._check_open(Op.UPSERT_LATEST_MANY)
        call = current_call(self.clock)
        items = [
            self._prepare(snapshot, call.part(index), call)
            for index, snapshot in enumerate(snapshots)
        ]
        records = {}
        for chunk in batched(zip(snapshots, items, strict=True), _CHUNK):
            rows = await self._write([item for _, item in chunk], Op.UPSERT_LATEST_MANY)
            for (snapshot, item), row in zip(chunk, rows, strict=True):
                records[snapshot.user_id] = self._after(snapshot, item, row)
        last = {snapshot.user_id: snapshot for snapshot in snapshots}
        if any(records[user_id].snapshot is not snapshot for user_id, snapshot in last.items()):
            call.superseded = True
        return records

    async def erase(self, user_id: str, tiers: Sequence[str] = ()) -> int:
        from layered_store.stores.sql import transactions  # noqa: PLC0415

        check_user_id(user_id, Op.DELETE)
        self._check_open(Op.DELETE)
        digest = self._digest(user_id)

        async def work(session: Session) -> int:
            return await transactions.erase(session, digest, tiers)

        version = await self._run(Op.DELETE, work, writes=True)
        self._remember(digest, version)
        return version

    async def settle(self, digest: bytes, version: int, tier: str) -> None:
        from layered_store.stores.sql import transactions  # noqa: PLC0415

        self._check_open("settle")

        async def work(session: Session) -> None:
            await transactions.settle(session, digest, version, tier)

        await self._run("settle", work, writes=True)

    async def debts(self, user_id: str) -> Sequence[str]:
        check_user_id(user_id, "debts")
        self._check_open("debts")
        values = {"at_digest": self._digest(user_id)}

        async def work(session: Session) -> Sequence[Any]:
            return await session.rows(self._statements.debts, values)

        found = await self._run("debts", work)
        return tuple(json.loads(found[0].debts or "[]")) if found else ()

    async def head(self) -> str:
        self._check_open("head")
        horizon, now_us = await self._run("head", self._horizon)
        return f"{horizon - 1}.{'f' * 32}.{now_us}"

    async def changes(self, cursor: str, limit: int) -> Changes:
        self._check_open("changes")
        position, after, issued = _read_cursor(cursor)

        async def work(session: Session) -> tuple[int, int, Sequence[Any]]:
            # First the horizon: all below it is committed, so the second statement sees it.
            horizon, now_us = await self._horizon(session)
            values = {
                "after_position": position,
                "after_digest": after,
                "horizon": horizon,
                "max_rows": limit + 1,
            }
            return horizon, now_us, await session.rows(self._statements.changes, values)

        horizon, now_us, rows = await self._run("changes", work)
        more = len(rows) > limit
        items = [
            Change(bytes(row.digest), row.version, row.user_id is None) for row in rows[:limit]
        ]
        if not more:
            last = max(horizon - 1, position)
            return Changes(items, f"{last}.{'f' * 32}.{now_us}", more=False)
        # The time stays that of the first page: what it left out may be as old as that.
        end = rows[limit - 1] if limit else None
        place = f"{end.position}.{bytes(end.digest).hex()}" if end else f"{position}.{after.hex()}"
        return Changes(items, f"{place}.{issued}", more=True)

    async def covers(self, cursor: str) -> bool:
        self._check_open("covers")
        position, _, issued = _read_cursor(cursor)
        horizon, now_us = await self._run("covers", self._horizon)
        # A position from the future is another database's, or this one was restored.
        return position < horizon and now_us - issued < _COVERED_US

    async def users(self, cursor: str, limit: int) -> UserPage:
        self._check_open("users")
        # By digest, the primary key: a page costs the same wherever it begins.
        values = {"after_digest": bytes.fromhex(cursor), "max_rows": limit}

        async def work(session: Session) -> Sequence[Any]:
            return await session.rows(self._statements.users, values)

        rows = await self._run("users", work)
        end = bytes(rows[-1].digest).hex() if len(rows) == limit else None
        return UserPage([row.user_id for row in rows], end)

    # One operation: a connection, a time limit, our errors.

    async def _read(self, user_id: str, op: Op) -> Versioned:
        check_user_id(user_id, op)
        values = {"at_digest": self._digest(user_id)}

        async def work(session: Session) -> Sequence[Any]:
            return await session.rows(self._statements.read, values)

        try:
            self._check_open(op)
            found = await self._run(op, work)
            record = self._record(user_id, found[0], op) if found else ABSENT
        except Exception as exc:
            self._reads.failed(exc)
            raise
        self._reads.found(record.snapshot)
        return record

    async def _write(self, items: list[Write], op: Op) -> list[Row]:
        from layered_store.stores.sql import transactions  # noqa: PLC0415

        async def work(session: Session) -> tuple[list[Row], int]:
            return await transactions.write(session, items, self._rules, self._knows)

        rows, too_old = await self._run(op, work, writes=True)
        self._too_old += too_old
        before, self._writes = self._writes, self._writes + len(items)
        if before // _PURGE_EVERY != self._writes // _PURGE_EVERY:
            await self._purge()
        return rows

    async def _purge(self) -> None:
        """Forget tombstones past their time, a few with every so many writes."""

        async def work(session: Session) -> None:
            now_us = (await session.rows(self._statements.now, session.timed({})))[0][0]
            values = {"due": now_us, "max_rows": _PURGE_ROWS}
            for row in await session.rows(self._statements.purgeable, values):
                await session.run(
                    self._statements.purge, [{"at_digest": bytes(row.digest), "due": now_us}]
                )

        try:
            await self._run(Op.UPSERT_LATEST, work, writes=True)
        except StoreError:
            return  # the write it came with is committed; the next one tries again

    async def _horizon(self, session: Session) -> tuple[int, int]:
        found = (await session.rows(self._statements.horizon, session.timed({})))[0]
        if found.horizon is None:
            raise StoreError(
                "the counter table is empty; let create_tables=True fill it", layer=self.name
            )
        return found.horizon, found.now_us

    async def _run(
        self, op: str, work: Callable[[Session], Awaitable[T]], *, writes: bool = False
    ) -> T:
        """Do ``work`` on a connection within the time limit.

        It runs in a task of its own, so that the caller can leave at once: throwing away a
        connection that hangs takes the drivers seconds.
        """
        from layered_store.stores.sql.transactions import Session as NewSession  # noqa: PLC0415

        home = self._home()
        session: Session = NewSession(None, self._statements, self.clock)
        task = home.loop.create_task(self._attempt(home, session, op, work, writes=writes))
        home.running.add(task)
        task.add_done_callback(lambda done: _finished(home, done))
        try:
            async with self.clock.timeout(self._timeout):
                await asyncio.wait((task,))
        except TimeoutError:
            unknown = self._abandon(task, session, writes=writes)
            raise StoreTimeoutError(
                f"no answer within {self._timeout:g} s",
                operation=op,
                layer=self.name,
                outcome_unknown=unknown,
            ) from None
        except asyncio.CancelledError:
            self._abandon(task, session, writes=writes)
            raise
        return task.result()

    def _abandon(self, task: asyncio.Task[Any], session: Session, *, writes: bool) -> bool:
        """Leave a task behind; return whether what it writes may still be committed."""
        if self._cannot_stop:
            # Not cancelled: its thread goes on whatever we do, and SQLAlchemy would throw the
            # connection away, which for a database in memory is the database.
            return writes
        task.cancel()
        return writes and session.committing

    async def _attempt(
        self,
        home: Home,
        session: Session,
        op: str,
        work: Callable[[Session], Awaitable[T]],
        *,
        writes: bool,
    ) -> T:
        from layered_store.stores.sql.failures import translate  # noqa: PLC0415

        locks = []
        if writes and self._cannot_stop:
            locks.append(home.writing)
        if self._one_connection:
            locks.append(home.alone)
        taken: list[asyncio.Lock] = []
        try:
            for lock in locks:
                await lock.acquire()
                taken.append(lock)
            async with home.engine.connect() as connection:
                session.connection = connection
                try:
                    if not home.ready:
                        await self._make_ready(home, session)
                    return await work(session)
                except BaseException:
                    await self._clean(session)
                    raise
        except Exception as exc:
            error = translate(
                exc,
                operation=op,
                layer=self.name,
                outcome_unknown=writes and session.committing,
            )
            if error is exc:
                raise
            raise error from exc
        finally:
            for lock in taken:
                lock.release()

    async def _clean(self, session: Session) -> None:
        """Leave no transaction open on a connection that goes back to the pool."""
        if not session.open:
            return
        connection = session.connection
        try:
            await session.connection.exec_driver_sql("ROLLBACK")
        except Exception:  # noqa: BLE001  it failed before; this connection is of no use
            if not self._one_connection and not connection.closed:
                await connection.invalidate()

    async def _make_ready(self, home: Home, session: Session) -> None:
        from layered_store.stores.sql import versions  # noqa: PLC0415
        from layered_store.stores.sql.engines import close_with_loop  # noqa: PLC0415

        async with home.opening:
            if home.ready:
                return
            if self._given is None and home.closer is None:
                home.closer = await close_with_loop(home.engine)
            if self.create_tables:
                session.open = True
                await self._statements.create(session.connection)
                session.open = False
            else:
                await versions.check(session.connection, self._statements)
            home.ready = True

    def _home(self) -> Home:
        from layered_store.stores.sql import engines  # noqa: PLC0415

        loop = asyncio.get_running_loop()
        home = self._homes.get(loop)
        if home is not None:
            return home
        if self._homes and (self._given is not None or self._one_connection):
            remedy = (
                "build the engine and the store in the loop that uses them, or pass url="
                if self._given is not None
                else "use a file, or one event loop"
            )
            raise ClosedError(
                f"this store's connections belong to another event loop; {remedy}",
                layer=self.name,
            )
        return engines.locate(self._homes, self._build)

    def _build(self) -> AsyncEngine:
        from layered_store.stores.sql import engines  # noqa: PLC0415

        if self._given is not None:
            return self._given
        return engines.build_engine(self._address, size=self.pool_size, wait=self._timeout)

    # Rows and snapshots.

    def _prepare(self, snapshot: StateSnapshot, write_id: bytes, call: Call) -> Write:
        from layered_store.stores.sql.transactions import Write as NewWrite  # noqa: PLC0415

        return NewWrite(
            self._digest(snapshot.user_id),
            PrivateStr(snapshot.user_id),
            self._codec.encode(snapshot),
            write_id,
            call.began(self.clock),
            call.order,
            snapshot.updated_at_unix_ms,
        )

    def _after(self, snapshot: StateSnapshot, item: Write, row: Row) -> Versioned:
        """Return what a write left: itself, or what won over it."""
        if row.payload is item.payload:
            return Versioned(row.version, snapshot)
        return self._record(snapshot.user_id, row, Op.UPSERT_LATEST)

    def _record(self, user_id: str, row: Any, op: Op) -> Versioned:
        if row.payload is None:
            return Versioned(row.version, None)
        if row.user_id != user_id:
            raise self._corruption("the record belongs to another user", user_id, op)
        return Versioned(row.version, self._decode(user_id, row.payload, op))

    def _decode(self, user_id: str, payload: bytes, op: Op) -> StateSnapshot:
        try:
            return self._codec.decode(bytes(payload), user_id)
        except CodecError as exc:
            raise self._corruption(exc.message, user_id, op) from None

    def _corruption(self, message: str, user_id: str, op: Op) -> CorruptDataError:
        self._corrupt += 1
        return CorruptDataError(message, operation=op, layer=self.name, user_id=user_id)

    # Erasures of this process: their order to its own writes is known without the database.

    def _remember(self, digest: bytes, version: int) -> None:
        now = self.clock.monotonic()
        erasures = self._own_erasures
        erasures.pop(digest, None)
        erasures[digest] = (version, now, next_order())
        for oldest in list(erasures)[:2]:
            if len(erasures) > _OWN_ERASURES or erasures[oldest][1] < now - _OWN_ERASURE_SECONDS:
                del erasures[oldest]

    def _knows(self, row: Row, item: Write) -> bool | None:
        """Tell whether a write began before an erasure of this process; None: not its own."""
        own = self._own_erasures.get(item.digest)
        if own is None or own[0] != row.erased_version:
            return None
        return item.order < own[2]

    def _check_open(self, operation: str) -> None:
        if self._closed:
            raise ClosedError(
                "this store was closed; build a new one", operation=operation, layer=self.name
            )


def batched(values: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the values in lists of at most ``size``."""
    left = iter(values)
    while chunk := list(islice(left, size)):
        yield chunk


def _finished(home: Home, task: asyncio.Task[Any]) -> None:
    home.running.discard(task)
    if not task.cancelled():
        task.exception()  # seen: its caller may be gone


def _rules(limit: int | None, max_age_us: int | None, by_time: bool) -> Any:  # noqa: FBT001
    from layered_store.stores.sql.transactions import Rules  # noqa: PLC0415

    return Rules(limit, max_age_us, by_time)


def _read_cursor(cursor: str) -> tuple[int, bytes, int]:
    found = _CURSOR(cursor) if isinstance(cursor, str) else None
    if found is None:
        raise ValidationError("is not one of this store's", field="cursor")
    return int(found[1]), bytes.fromhex(found[2]), int(found[3])
