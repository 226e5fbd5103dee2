"""How operations reach the database: event loops, connections, batches, time limits, errors."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from layered_store.coherence.tombstones import LATEST_SECONDS, too_late
from layered_store.errors import ClosedError, StoreError, StoreTimeoutError
from layered_store.running import Ending, running_loop
from layered_store.stores.sql import engines, transactions, versions
from layered_store.stores.sql.batching import Batch, Batcher, Reads, Writes, one_by_one
from layered_store.stores.sql.desks import Desk, Desks
from layered_store.stores.sql.dialects import Statements
from layered_store.stores.sql.failures import statement_lost, translate
from layered_store.stores.sql.lite import LiteWay
from layered_store.stores.sql.postgres import PostgresWay
from layered_store.stores.sql.schema import build_tables
from layered_store.stores.sql.transactions import Erasure, Settlement, Write
from layered_store.stores.sql.way import Way

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine

    from layered_store.clock import Clock
    from layered_store.stores.erasures import KnownErasures
    from layered_store.stores.presence import Presence
    from layered_store.stores.sql.session import Rules, Session

__all__ = ["Access"]

B = TypeVar("B", bound=Batcher)
T = TypeVar("T")

_STOP_SECONDS: Final = 0.5
"""How long a driver may take, when a store is closed, to have a server stop what it does."""

_PURGE_ROWS: Final = 128
_PURGE_SOON, _PURGE_LATER = 64, 1024
"""After how many writes to look for old tombstones again: while there are more, and when not."""


class Access:
    """The connections of one store.

    Args:
        given: the caller's engine, or None.
        address: the URL of the database.
        latest_table: see the store; so are the others below.
        history_table: name of the table of histories.
        create_tables: create missing tables on first use.
        rules: what decides about a write.
        erasures: what is known of erasures.
        timeout: seconds that one operation may take.
        pool_size: most connections per event loop.
        clock: source of time.
        name: the store's name, for errors.
        presence: logs whether the database answers.
    """

    def __init__(
        self,
        given: AsyncEngine | None,
        address: Any,
        latest_table: str,
        history_table: str,
        *,
        create_tables: bool,
        rules: Rules,
        erasures: KnownErasures,
        timeout: float,
        pool_size: int,
        clock: Clock,
        name: str,
        presence: Presence,
    ) -> None:
        option = "url" if given is None else "engine"
        family = engines.family_of(address.get_backend_name(), option, name)
        # Shares the caller's pool; only statements of ours commit by themselves.
        self._given = (
            None if given is None else given.execution_options(isolation_level="AUTOCOMMIT")
        )
        self._address = address
        self._one_connection = engines.in_memory(address)
        self.tables = build_tables(latest_table, history_table, family)
        self.statements = Statements(self.tables, family)
        if family == "sqlite":
            self.way: Way = LiteWay(self.statements, rules, erasures, clock, timeout)
        elif address.get_driver_name() == "asyncpg":
            self.way = PostgresWay(self.statements, rules, erasures, clock)
        else:
            self.way = Way(self.statements, rules, erasures, clock)
        self._create_tables = create_tables
        self._rules = rules
        self._erasures = erasures
        self._timeout = timeout
        self._pool_size = pool_size
        self._clock = clock
        self._name = name
        self._presence = presence
        # Until a pooler in transaction mode shows that prepared statements do not last.
        self._prepares = address.query.get("prepared_statement_cache_size") != "0"
        self._until_purge = _PURGE_SOON
        self.too_old = 0
        self.homes: dict[asyncio.AbstractEventLoop, engines.Home] = {}
        # Whoever adds or removes homes: event loops of several threads.
        self._lock = threading.Lock()
        self._ending = Ending()

    def home(self, operation: str) -> engines.Home:
        """Return what is kept for the running event loop, made on first use.

        Args:
            operation: what it is for, for the error.
        """
        loop = running_loop()
        home = self.homes.get(loop)
        if home is not None:
            return home
        with self._lock:
            if self.homes and (self._given is not None or self._one_connection):
                self._refuse_loop(operation)
            engines.forget_dead(self.homes)
            home = self.homes[loop] = self._new_home(loop)
        return home

    def _new_home(self, loop: asyncio.AbstractEventLoop) -> engines.Home:
        engine = self._given
        if engine is None:
            engine = self._build()
        size = 1 if self._one_connection else self._pool_size
        way = self.way
        desks = Desks(engine, size, keep=self._given is None, clock=self._clock)
        home = engines.Home(loop, engine, desks)

        def batcher(kind: type[B], run: Callable[..., Awaitable[Sequence[Any]]], out: int) -> B:
            return kind(
                partial(run, home), way.concerns_one, self._clock, self._timeout,
                out=out, stoppable=way.stoppable, stop=desks.stop,
                expired=partial(self._expired, desks),
            )  # fmt: skip

        home.reads = batcher(Reads, self._read_batch, way.reads_out)
        home.writes = batcher(Writes, self._write_batch, way.writes_out)
        home.writes.one_each = way.one_each
        if way.joins_histories:
            home.histories = batcher(Reads, self._history_batch, way.reads_out)
        return home

    def _build(self) -> AsyncEngine:
        engine = engines.build_engine(
            self._address, size=self._pool_size, wait=self._timeout, prepares=self._prepares
        )
        self.way.watch(engine)
        return engine

    def _refuse_loop(self, operation: str) -> None:
        remedy = (
            "build the engine and the store in the loop that uses them, or pass url="
            if self._given is not None
            else "use a file, or one event loop"
        )
        raise ClosedError(
            f"this store's connections belong to another event loop; {remedy}",
            operation=operation,
            layer=self._name,
        )

    async def aclose(self) -> None:
        """Finish what is under way in this event loop, close what was opened."""
        loop = asyncio.get_running_loop()
        with self._lock:
            homes = list(self.homes.values())
            self.homes.clear()
        for home in homes:
            if home.loop is loop:
                self._ending.begin(self._close(home))
            else:
                self._close_elsewhere(home)
        await self._ending.wait()

    def _close_elsewhere(self, home: engines.Home) -> None:
        """Have another event loop close what is its own, as far as it still runs."""
        try:
            home.loop.call_soon_threadsafe(lambda: self._ending.begin(self._close(home)))
        except RuntimeError:  # it was closed
            if self._given is None:
                engines.drop(home.engine)

    async def _close(self, home: engines.Home) -> None:
        try:
            async with self._clock.timeout(self._timeout):
                for batcher in home.batchers():
                    await batcher.drain()
                while home.running:
                    await asyncio.wait(set(home.running))
        except TimeoutError:
            pass
        for batcher in home.batchers():
            batcher.close()
        home.desks.end()
        if self.way.stoppable:
            await self._cut_off(home)
        if home.closer is not None:
            await home.closer.aclose()  # which has a time limit
            return
        await home.desks.release()
        if self._given is None:
            await home.engine.dispose()

    async def _cut_off(self, home: engines.Home) -> None:
        """End what the server did not answer, and what the drivers do to have it stop."""
        for last in (False, True):
            tasks = home.tasks()
            if not tasks:
                return
            for task in tasks if last else home.running:
                task.cancel()
            with suppress(TimeoutError):
                async with self._clock.timeout(_STOP_SECONDS):
                    await asyncio.wait(tasks)

    # Batches

    async def _read_batch(self, home: engines.Home, batch: Batch) -> list[Any]:
        session = batch.goes_on_in(self.way.session())
        digests = list({digest for digest, _ in batch.entries})
        rows = await self._attempt(home, session, partial(self.way.read_rows, session, digests))
        return [rows.get(digest) for digest, _ in batch.entries]

    async def _history_batch(self, home: engines.Home, batch: Batch) -> list[Any]:
        """Return for each entry (digest, most rows, oldest age) the payloads, newest first."""
        session = batch.goes_on_in(self.way.session())
        entries = [what for what, _ in batch.entries]
        age_us = entries[0][2]
        longest: dict[bytes, int] = {}
        for digest, rows, _ in entries:
            longest[digest] = max(rows, longest.get(digest, 0))
        work = partial(self.way.read_histories, session, longest, age_us)
        found = await self._attempt(home, session, work)
        return [found.get(digest, [])[:rows] for digest, rows, _ in entries]

    async def _write_batch(self, home: engines.Home, batch: Batch) -> Sequence[Any]:
        items = [what for what, _ in batch.entries]
        if type(items[0]) is Erasure:
            return await self._in_transaction(home, batch, transactions.erase, items)
        if type(items[0]) is Settlement:
            return await self._in_transaction(home, batch, transactions.settle, items)
        results: list[Any]
        oldest = self._clock.monotonic() - LATEST_SECONDS
        if any(item.started < oldest for item in items):
            results = [too_late() if item.started < oldest else None for item in items]
        else:
            session = batch.goes_on_in(self.way.session())
            attempt = partial(self._attempt, home, session, writes=True)
            results = await self.way.write_at_once(session, items, attempt)
        left = [index for index, result in enumerate(results) if result is None]
        if left:
            rows = await self._write_carefully(home, batch, [items[index] for index in left])
            for index, row in zip(left, rows, strict=True):
                results[index] = row
        self._until_purge -= len(items)
        if self._until_purge <= 0:
            self._until_purge = _PURGE_LATER
            if await self._purge(home) >= _PURGE_ROWS:
                self._until_purge = _PURGE_SOON
        return results

    async def _write_carefully(
        self, home: engines.Home, batch: Batch, items: list[Write]
    ) -> Sequence[Any]:
        """Store with a look at each row first; an exception object stands for what failed."""

        async def write(some: list[Write]) -> list[Any]:
            found = await self._in_transaction(
                home, batch, transactions.write, some, self._rules, self._erasures
            )
            rows, too_old = found
            self.too_old += too_old
            return rows

        try:
            return await write(items)
        except Exception as exc:  # noqa: BLE001  handed to those who wait
            return await one_by_one(items, write, exc, self.way.concerns_one)

    async def _in_transaction(
        self, home: engines.Home, batch: Batch, work: Callable[..., Awaitable[T]], *args: Any
    ) -> T:
        session = batch.goes_on_in(self.way.session())
        return await self._attempt(
            home, session, partial(self.way.operate, session, lambda s: work(s, *args)), writes=True
        )

    async def _purge(self, home: engines.Home) -> int:
        """Forget some tombstones past their time; return how many there were."""

        async def work(session: Session) -> int:
            now_us = (await session.rows(self.statements.now, session.timed({})))[0][0]
            values = {"due": now_us, "max_rows": _PURGE_ROWS}
            due = await session.rows(self.statements.purgeable, values)
            for row in due:
                place = {"at_digest": bytes(row.digest), "due": now_us}
                steps = [self.statements.purge, self.statements.purge_history]
                for step in reversed(steps) if self.statements.chained else steps:
                    await session.run(step, [place])
            return len(due)

        session = self.way.session()
        try:
            return await self._attempt(
                home, session, partial(self.way.operate, session, work), writes=True
            )
        except StoreError:
            return 0  # the writes it came with are committed; later ones try again

    # Single operations

    async def rows(self, op: str, statement: Any, values: dict[str, Any]) -> Sequence[Any]:
        """Return all rows that one statement gives."""

        async def work(session: Session) -> Sequence[Any]:
            return await session.rows(statement, session.timed(values))

        return await self.run(op, work)

    async def run(self, op: str, work: Callable[[Session], Awaitable[T]]) -> T:
        """Do ``work``, no write of a caller, on a connection within the time limit.

        It runs in a task of its own, so that the caller can leave at once: throwing away a
        connection that hangs takes the drivers seconds.
        """
        home = self.home(op)
        session = self.way.session()
        task = home.loop.create_task(
            self._attempt(home, session, partial(self.way.operate, session, work))
        )
        home.running.add(task)
        task.add_done_callback(lambda done: _finished(home, done))
        begun = self._clock.monotonic()
        try:
            async with self._clock.timeout(self._timeout):
                await asyncio.wait((task,))
        except TimeoutError:
            error = self._expired(home.desks, begun)
            self._abandon(home, task)
            raise error.placed(op, self._name) from None
        except asyncio.CancelledError:
            self._abandon(home, task)
            raise
        try:
            return task.result()
        except StoreError as exc:
            exc.operation = op
            raise

    def _expired(self, desks: Desks, begun: float) -> StoreTimeoutError:
        """Note that what began then got no answer in time."""
        if self.way.stoppable:
            desks.distrust(begun)
        error = StoreTimeoutError(f"no answer within {self._timeout:g} s")
        self._presence.failed(error)
        return error

    def _abandon(self, home: engines.Home, task: asyncio.Task[Any]) -> None:
        """Leave a task behind."""
        # Not cancelled on SQLite: its thread goes on whatever we do, and SQLAlchemy would throw the
        # connection away, which for a database in memory is the database.
        if self.way.stoppable:
            home.desks.stop(task)

    async def _attempt(
        self,
        home: engines.Home,
        session: Session,
        work: Callable[[Desk], Awaitable[T]],
        *,
        writes: bool = False,
    ) -> T:
        """Do ``work``; do it again without prepared statements where those do not last."""
        for _ in range(3):
            engine = home.engine
            try:
                return await self._once(home, session, work, writes=writes)
            except StoreError as exc:
                # The statement never ran, COMMIT included: nothing took effect.
                if self._given is not None or not statement_lost(exc):
                    raise
            session.open = session.committing = False
            await self._do_without_statements(home, engine)
        return await self._once(home, session, work, writes=writes)

    async def _do_without_statements(self, home: engines.Home, engine: AsyncEngine) -> None:
        """Replace a loop's engine by one that prepares nothing, for all callers at once."""
        async with home.opening:
            self._prepares = False
            if home.engine is not engine:
                return
            closer, home.engine = home.closer, self._build()
            await home.desks.move(home.engine)
            home.closer = await engines.close_with_loop(home)
        if closer is not None:
            await closer.aclose()
        await engine.dispose()

    async def _once(
        self,
        home: engines.Home,
        session: Session,
        work: Callable[[Desk], Awaitable[T]],
        *,
        writes: bool = False,
    ) -> T:
        """Do ``work`` with a connection; leave no transaction open on it; raise our errors."""
        lock = home.writing if writes and self.way.writes_out == 1 else None
        if lock is not None:
            await lock.acquire()
        try:
            desk = await home.desks.take()
            broken = not self._one_connection
            try:
                if not home.ready:
                    await self._make_ready(home, desk)
                result = await work(desk)
                broken = False
                if self._presence.doubtful:
                    self._presence.answered()
            except Exception as exc:
                broken = not self._one_connection and await self.way.spoilt(
                    session, desk, exc, given=self._given is not None
                )
                if broken or desk.connection.invalidated:
                    home.desks.distrust()
                raise
            finally:
                await home.desks.give(desk, broken=broken)
            return result
        except Exception as exc:
            error = translate(
                exc,
                operation="",
                layer=self._name,
                outcome_unknown=writes and session.sent,
            )
            if not (self.way.concerns_one(error) or statement_lost(error)):
                self._presence.failed(error)
            if error is exc:
                raise
            raise error from exc
        finally:
            if lock is not None:
                lock.release()

    async def _make_ready(self, home: engines.Home, desk: Desk) -> None:
        async with home.opening:
            if home.ready:
                return
            if self._given is None and home.closer is None:
                home.closer = await engines.close_with_loop(home)
            if self._create_tables:
                try:
                    await self.statements.create(desk.connection)
                except Exception:
                    with suppress(Exception):  # it may not have begun, or be lost
                        await desk.connection.exec_driver_sql("ROLLBACK")
                    raise
            else:
                await versions.check(desk.connection, self.statements)
            home.ready = True


def _finished(home: engines.Home, task: asyncio.Task[Any]) -> None:
    home.running.discard(task)
    if not task.cancelled():
        task.exception()  # seen: its caller may be gone
