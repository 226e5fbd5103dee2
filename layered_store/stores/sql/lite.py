"""SQLite's way: a whole operation runs in the connection's own thread, in one go.

aiosqlite gives each connection a thread and hops to it for each statement; here one hop carries a
whole batch of reads, or a whole transaction with many writes and one commit. The statements are
those of :mod:`layered_store.stores.sql.dialects`, compiled once.
"""

from __future__ import annotations

import os
import sqlite3
from collections import namedtuple
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

from sqlalchemy.dialects import sqlite

from layered_store.errors import UnavailableError
from layered_store.stores.sql.session import Session, no_counter
from layered_store.stores.sql.sweep import Sweep

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence

    from layered_store.clock import Clock
    from layered_store.stores.sql.dialects import Statements
    from layered_store.stores.sql.session import Rules
    from layered_store.stores.sql.transactions import Write

__all__ = [
    "DatabaseFile",
    "LiteSession",
    "LiteStatements",
    "in_thread",
    "read_rows",
    "write_rows",
]

T = TypeVar("T")

_NAMED: Final = sqlite.dialect(paramstyle="named")
_LOOK_MS: Final = 20


class _Text:
    """A statement as text; those with lists of values have one text for each length."""

    def __init__(self, statement: Any, columns: Sequence[str] | None = None) -> None:
        compiled = statement.compile(dialect=_NAMED, column_keys=columns)
        self._compiled = compiled
        self._expands = "POSTCOMPILE" in compiled.string
        self._texts: dict[tuple[int, ...], str] = {}
        self._fixed = dict(compiled.params)
        names = [str(column[0]) for column in getattr(compiled, "_result_columns", ())]
        self.make: Any = tuple
        if names:
            make_class: Any = namedtuple  # noqa: PYI024  the names are known at run time
            self.make = make_class("row", names)._make

    def bind(self, values: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Return the text and the values by name."""
        if not self._expands:
            fixed = self._fixed
            known = {name: values.get(name, fixed[name]) for name in fixed}
            return self._compiled.string, known
        lists = {name: value for name, value in values.items() if isinstance(value, list)}
        shape = tuple(map(len, lists.values()))
        text = self._texts.get(shape)
        if text is None:
            state = self._compiled.construct_expanded_state(values)
            text = self._texts[shape] = state.statement
        flat = {name: values.get(name, value) for name, value in self._fixed.items()}
        for name, several in lists.items():
            del flat[name]
            flat.update({f"{name}_{n}": value for n, value in enumerate(several, 1)})
        return text, flat


class LiteStatements:
    """The texts of a store's statements for SQLite.

    Args:
        statements: what to compile.
        rules: the store's options.
    """

    def __init__(self, statements: Statements, rules: Rules) -> None:
        self._statements = statements
        self._texts: dict[int, tuple[Any, _Text]] = {}
        quote = _NAMED.identifier_preparer.quote
        tables = statements.tables
        latest, history = quote(tables.latest.name), quote(tables.history.name)
        counter = quote(tables.counter.name)
        self.sweep = Sweep(latest, history, rules)
        newest = f"{latest} l LEFT JOIN {history} h ON h.position = l.position"
        columns = "l.user_id, l.version, h.payload"
        self.read = f"SELECT {columns} FROM {newest} WHERE l.digest = ?"
        self.read_many = f"SELECT l.digest, {columns} FROM {newest} WHERE l.digest IN (%s)"
        self.states = (
            f"SELECT digest, version, erased_version, position FROM {latest} WHERE digest IN (%s)"
        )
        self.advance = f"UPDATE {counter} SET position = ? WHERE id = 1"
        self.position = f"SELECT position FROM {counter} WHERE id = 1"
        self.append = (
            f"INSERT INTO {history}"
            " (position, digest, version, write_id, recorded_at, previous, payload)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)"
        )
        self.put = (
            f"INSERT INTO {latest} (digest, user_id, version, updated_at_unix_ms, position)"
            " VALUES (?, ?, ?, ?, ?)"
            " ON CONFLICT (digest) DO UPDATE SET user_id = excluded.user_id,"
            " version = excluded.version, updated_at_unix_ms = excluded.updated_at_unix_ms,"
            " position = excluded.position"
        )
        # Only of a user who was erased: setting it costs a page of its index.
        self.revive = f"UPDATE {latest} SET purge_at = NULL WHERE digest = ?"
        self.hide = f"UPDATE {history} SET payload = NULL WHERE position = ?"

    def text(self, statement: Any) -> _Text:
        """Return a statement's text, compiled on first use."""
        known = self._texts.get(id(statement))
        if known is not None:
            return known[1]
        columns = None
        if statement is self._statements.append:
            columns = [column.name for column in self._statements.tables.history.c]
        text = _Text(statement, columns)
        # The statement stays too, so that no other has its id.
        self._texts[id(statement)] = (statement, text)
        return text


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


class DatabaseFile:
    """The file that a store began with: its path may come to name another one, or none.

    SQLite goes on with a file that was replaced or deleted, and in WAL mode does not notice: what
    it acknowledges then is lost with the last connection. Nor may another file be opened instead:
    the old one's log stands beside it still, and would be replayed into it.
    """

    __slots__ = ("_known", "_path")

    def __init__(self) -> None:
        self._path: str | None = None
        self._known: tuple[int, int] | None = None

    @property
    def known(self) -> bool:
        """Whether a connection was opened already."""
        return self._path is not None

    def learn(self, connection: sqlite3.Connection) -> None:
        """Take note of the file that a connection was opened to; none if it is in memory."""
        _, _, path = connection.execute("PRAGMA database_list").fetchone()
        self._known = _identity(path)
        self._path = path

    def check(self) -> None:
        """Look whether it is still there, once it is known.

        Raises:
            UnavailableError: it is not.
        """
        if self._path and _identity(self._path) != self._known:
            raise UnavailableError(
                "the database file was moved, replaced or deleted while it was open; put it back,"
                " or build a new store",
                retryable=False,
            )


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


async def in_thread(driver: Any, file: DatabaseFile, work: Callable[..., T], *args: Any) -> T:
    """Run ``work(connection, *args)`` in the thread of an aiosqlite connection to this file."""
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
