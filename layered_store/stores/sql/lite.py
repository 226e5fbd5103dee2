"""SQLite's way: a whole operation runs in the connection's own thread, in one go.

aiosqlite gives each connection a thread and hops to it for each statement; here one hop carries a
whole batch of reads, or a whole transaction with many writes and one commit. The statements are
those of :mod:`layered_store.stores.sql.dialects`, compiled once.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

from sqlalchemy import event

from layered_store.stores.sql.database_file import DatabaseFile
from layered_store.stores.sql.lite_statements import LiteStatements
from layered_store.stores.sql.session import Session, no_counter
from layered_store.stores.sql.way import Way

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine

    from layered_store.clock import Clock
    from layered_store.stores.erasures import KnownErasures
    from layered_store.stores.sql.desks import Desk
    from layered_store.stores.sql.dialects import Statements
    from layered_store.stores.sql.session import Rules
    from layered_store.stores.sql.transactions import Write
    from layered_store.stores.sql.way import Attempt

__all__ = ["LiteWay"]

T = TypeVar("T")

_LOOK_MS: Final = 20

_MOST_PATIENCE: Final = 86_400.0
"""Seconds that a write waits for the writers of other processes at most."""


class LiteWay(Way):
    """Past SQLAlchemy, in aiosqlite's thread.

    One batch out: that thread and the event loop share the interpreter, so two would only be in
    each other's way; and SQLite admits one writer. What runs is the thread's: it ends by itself,
    cut off or not.

    Args:
        statements: those of the store's database.
        rules: what decides about a write.
        erasures: what is known of erasures.
        clock: source of time.
        timeout: seconds that one operation may take.
    """

    reads_out: ClassVar[int] = 1
    writes_out: ClassVar[int] = 1
    stoppable: ClassVar[bool] = False
    # No round trip to save, but a hop to the thread.
    joins_histories: ClassVar[bool] = True

    def __init__(
        self,
        statements: Statements,
        rules: Rules,
        erasures: KnownErasures,
        clock: Clock,
        timeout: float,
    ) -> None:
        super().__init__(statements, rules, erasures, clock)
        self._texts = LiteStatements(statements, rules)
        self._file = DatabaseFile()
        # A write that never began is told as such, before its time limit leaves that open.
        self._patience = min(0.9 * timeout, _MOST_PATIENCE)

    def watch(self, engine: AsyncEngine) -> None:
        event.listen(engine.sync_engine, "do_connect", lambda *_: self._file.check())

    def session(self) -> LiteSession:
        return LiteSession(
            None, self.statements, self.clock, texts=self._texts, patience=self._patience
        )

    async def operate(
        self, session: Session, work: Callable[[Session], Awaitable[T]], desk: Desk
    ) -> T:
        return await self._in_thread(desk, do, session, work)

    async def read_rows(
        self, session: Session, digests: list[bytes], desk: Desk
    ) -> Mapping[bytes, Any]:
        del session
        return await self._in_thread(desk, read_rows, self._texts, digests)

    async def write_at_once(
        self, session: Session, items: Sequence[Write], attempt: Attempt
    ) -> list[Any]:
        nothing: list[Any] = [None] * len(items)
        if self.rules.by_snapshot_time or not all(item.fresh for item in items):
            return nothing

        async def in_thread(desk: Desk) -> list[int] | None:
            follows = self.erasures.follows
            return await self._in_thread(desk, write_rows, session, items, self.rules, follows)

        return await attempt(in_thread) or nothing

    async def spoilt(self, session: Session, desk: Desk, exc: Exception, *, given: bool) -> bool:
        """Tell whether the connection is of no more use; its thread has rolled back."""
        del session, desk, given
        return not harmless(exc)

    async def _in_thread(self, desk: Desk, work: Callable[..., T], *args: Any) -> T:
        """Run ``work(connection, *args)`` in the thread of a connection to this store's file."""
        driver, file = desk.driver, self._file
        connection = driver._conn  # noqa: SLF001
        results: list[T] = []

        def run() -> None:
            if file.known:
                file.check()
            else:
                file.learn(connection)
            results.append(work(connection, *args))

        # aiosqlite logs what it runs, with all arguments, and asyncio in its debug mode what a slow
        # callback was called with: this way there is nothing to show.
        await driver._execute(run)  # noqa: SLF001
        return results[0]


@dataclass(slots=True)
class LiteSession(Session):
    """A session on the ``sqlite3`` connection itself, in its thread. None of its steps waits.

    Args:
        texts: the compiled statements.
        patience: seconds that a write may wait for the writers of other processes.
    """

    texts: LiteStatements = field(kw_only=True)
    patience: float = field(default=5.0, kw_only=True)

    async def begin(self) -> None:
        begin(self.connection, self.patience, self.clock)

    async def rows(self, statement: Any, values: dict[str, Any]) -> Sequence[Any]:
        text = self.texts.text(statement)
        cursor = self.connection.execute(*text.bind(values))
        return [text.make(row) for row in cursor]

    async def run(self, statement: Any, values: list[dict[str, Any]]) -> None:
        text = self.texts.text(statement)
        if values:
            bound = [text.bind(each) for each in values]
            self.connection.executemany(bound[0][0], [each for _, each in bound])

    async def command(self, command: str) -> None:
        self.connection.execute(command)

    async def trim(self, entries: list[dict[str, Any]], rules: Rules, now_us: int) -> None:
        del rules  # the sweep knows them
        added = [(e["position"], e["digest"], e["version"], e["previous"]) for e in entries]
        self.texts.sweep.trim(self.connection, added, now_us)


def begin(connection: sqlite3.Connection, patience: float, clock: Clock) -> None:
    """Start a write transaction, in the connection's thread.

    SQLite's own wait looks every 100 ms in the end, with no regard to who waits longest: beside
    busy writers it may miss every gap for seconds. Here it never gets beyond its first short waits.

    Args:
        connection: the connection.
        patience: seconds that the writers of other processes may keep this one waiting.
        clock: source of time.
    """
    (before,) = connection.execute("PRAGMA busy_timeout").fetchone()
    connection.execute(f"PRAGMA busy_timeout={_LOOK_MS}")
    end = clock.monotonic() + patience
    try:
        # Counted too: the wait is real, on whatever clock. On a busy machine each takes longer.
        for left in range(int(patience * 1000 / _LOOK_MS), -1, -1):
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as exc:
                over = not left or clock.monotonic() >= end
                if over or exc.sqlite_errorname != "SQLITE_BUSY":
                    raise
            else:
                return
    finally:
        connection.execute(f"PRAGMA busy_timeout={before}")


def harmless(exc: Exception) -> bool:
    """Tell whether a connection is as good as before: the file was locked, or had no room."""
    name = getattr(exc, "sqlite_errorname", None)
    return name is None or name.startswith(("SQLITE_BUSY", "SQLITE_FULL", "SQLITE_LOCKED"))


def finish(coroutine: Coroutine[Any, Any, T]) -> T:
    """Return what a coroutine returns that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    coroutine.close()
    raise RuntimeError("an operation on SQLite must not wait")


def do(
    connection: sqlite3.Connection, session: LiteSession, work: Callable[[Session], Awaitable[T]]
) -> T:
    """Run an operation on this connection, in its thread; leave no transaction open."""
    session.connection = connection
    try:
        return finish(work(session))  # type: ignore[arg-type]
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def read_rows(
    connection: sqlite3.Connection, texts: LiteStatements, digests: list[bytes]
) -> dict[bytes, tuple[Any, ...]]:
    """Return the rows of these users, each as digest, user id, version, payload."""
    if len(digests) == 1:
        row = connection.execute(texts.read, digests).fetchone()
        return {digests[0]: (digests[0], *row)} if row is not None else {}
    size = 1 << (len(digests) - 1).bit_length()
    marks = _marks(size)
    values = digests + digests[-1:] * (size - len(digests))
    rows = connection.execute(texts.read_many % marks, values).fetchall()
    return {row[0]: row for row in rows}


_lists: dict[int, str] = {}


def _marks(size: int) -> str:
    marks = _lists.get(size)
    if marks is None:
        marks = _lists[size] = ",".join("?" * size)
    return marks


def write_rows(
    connection: sqlite3.Connection,
    session: LiteSession,
    writes: Sequence[Write],
    rules: Rules,
    follows: Callable[[bytes, int, int], bool],
) -> list[int] | None:
    """Store new snapshots in one transaction; return their versions.

    None, with nothing stored, when any of them needs a closer look: it may have begun before an
    erasure.

    Args:
        connection: in its thread.
        session: notes that the commit was sent.
        writes: first attempts in their order; several may be of one user.
        rules: the store's options.
        follows: whether a write is known to have begun after this erasure.
    """
    texts, execute = session.texts, connection.execute
    begin(connection, session.patience, session.clock)
    try:
        digests = list({item.digest for item in writes})
        size = 1 << (len(digests) - 1).bit_length()
        values = digests + digests[-1:] * (size - len(digests))
        # By user: version, erased version, place of the newest entry.
        states = {
            digest: (version, erased, place)
            for digest, version, erased, place in execute(
                texts.states % _marks(size), values
            ).fetchall()
        }
        found = execute(texts.position).fetchone()
        if found is None:
            raise no_counter()
        place = found[0]
        now = session.clock.time()
        unknown = (int(now * 1e3) - 1, None, None)
        now_us = int(now * 1e6)
        shown = rules.history_limit != 0
        rows: dict[bytes, tuple[Any, ...]] = {}
        entries = []
        results = []
        revived = []
        hidden = []
        for item in writes:
            digest = item.digest
            version, erased, previous = states.get(digest, unknown)
            if erased is not None:
                if not follows(item.digest, erased, item.order):
                    execute("ROLLBACK")
                    return None
                revived.append((digest,))
            if not shown and previous is not None:
                hidden.append((previous,))
            version += 1
            place += 1
            states[digest] = (version, erased, place)
            entries.append(
                (place, digest, version, item.write_id, now_us, previous, item.payload)
            )
            rows[digest] = (digest, str(item.user_id), version, item.updated, place)
            results.append(version)
        connection.executemany(texts.append, entries)
        if hidden:
            connection.executemany(texts.hide, hidden)
        connection.executemany(texts.put, [row for _, row in sorted(rows.items())])
        if revived:
            connection.executemany(texts.revive, revived)
        texts.sweep.trim(connection, [(*e[:3], e[5]) for e in entries], now_us)
        execute(texts.advance, (place,))
        session.committing = True
        execute("COMMIT")
        session.committing = False
    except BaseException:
        if connection.in_transaction:
            execute("ROLLBACK")
        raise
    return results
