"""Desks: the connections of one event loop, each used by one operation at a time.

SQLAlchemy makes and ends the connections. Between operations they stay here, at hand: handing one
out through its pool costs more than a read does.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import weakref
from collections import deque
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from layered_store.clock import SYSTEM_CLOCK
from layered_store.errors import ClosedError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from layered_store.clock import Clock

__all__ = ["Desk", "Desks", "let_go_of_parents"]


_LET_GO_SECONDS: Final = 1.0

_RESTED_SECONDS: Final = 1.0
"""Only after so much idleness is a connection checked for whether the server has left."""


class Desk:
    """One connection.

    Args:
        connection: SQLAlchemy's, in AUTOCOMMIT mode.
        driver: the driver's own connection below it.
        engine: what made it.
        losses: how often connections had been distrusted when it was made.
    """

    __slots__ = ("connection", "driver", "engine", "idle_since", "losses", "user")

    def __init__(
        self, connection: AsyncConnection, driver: Any, engine: AsyncEngine, losses: int
    ) -> None:
        self.connection = connection
        self.driver = driver
        self.engine = engine
        self.losses = losses
        self.idle_since = 0.0
        # The task of the operation that has it.
        self.user: asyncio.Task[Any] | None = None


class Desks:
    """Hands out the connections of one engine; who finds none waits for the next.

    Args:
        engine: makes connections.
        size: most of them at once.
        keep: whether they stay here between operations; not those of an engine that others use.
        clock: source of time.
    """

    def __init__(
        self, engine: AsyncEngine, size: int, *, keep: bool, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        self.busy = 0
        self._losses = 0
        self._closed = False
        self._engine = engine
        self._size = size
        self._clock = clock
        self._keep = keep
        # Whoever was used last comes last, and is used first.
        self._idle: list[Desk] = []
        self._taken: set[Desk] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._waiting: deque[asyncio.Future[None]] = deque()
        _alive.add(self)

    async def take(self) -> Desk:
        """Return a connection; :meth:`give` it back."""
        while self.busy >= self._size:
            future = asyncio.get_running_loop().create_future()
            self._waiting.append(future)
            try:
                await future
            except BaseException:
                if future.done() and not future.cancelled():
                    self._next()
                raise
        self.busy += 1
        while self._idle:
            desk = self._idle.pop()
            rested = self._clock.monotonic() - desk.idle_since >= _RESTED_SECONDS
            if not (rested and _left(desk.driver)):
                return self._hand(desk)
            self._part_with(desk)
        connection: AsyncConnection | None = None
        try:
            engine, losses = self._engine, self._losses
            connection = await engine.connect()
            raw = await connection.get_raw_connection()
            return self._hand(Desk(connection, raw.driver_connection, engine, losses))
        except BaseException:
            self.busy -= 1
            self._next()
            if connection is not None:
                await connection.close()
            raise

    def _hand(self, desk: Desk) -> Desk:
        desk.user = asyncio.current_task()
        self._taken.add(desk)
        return desk

    def stop(self, task: asyncio.Task[Any]) -> None:
        """Cancel a task, and cut the connection that it has when its driver does not let go of it.

        Cancelled, psycopg asks the server to stop and waits until it says that it did: 10 s, older
        versions for ever, where a firewall or proxy forgot the connection.

        Source: https://github.com/psycopg/psycopg/issues/1371
        """
        task.cancel()
        if any(desk.user is task and hasattr(desk.driver, "pgconn") for desk in self._taken):
            self._clock.call_later(_LET_GO_SECONDS, partial(self._cut, task))

    def _cut(self, task: asyncio.Task[Any]) -> None:
        for desk in self._taken:
            if desk.user is task:
                with suppress(Exception):  # it was closed
                    line = socket.socket(fileno=desk.driver.pgconn.socket)
                    try:
                        line.shutdown(socket.SHUT_RDWR)
                    finally:
                        line.detach()

    async def give(self, desk: Desk, *, broken: bool = False) -> None:
        """Take a connection back; one that failed is not used again unless its pool says so."""
        connection = desk.connection
        try:
            # Of an engine that was replaced, or is closed by now.
            left = desk.engine is not self._engine or (self._closed and self._keep)
            left = left or (self._keep and desk.losses < self._losses)
            if broken or left or connection.invalidated or connection.closed:
                await self._end(connection)
            elif self._keep:
                desk.idle_since = self._clock.monotonic()
                self._idle.append(desk)
            else:
                await connection.close()
        finally:
            desk.user = None
            self._taken.discard(desk)
            self.busy -= 1
            self._next()

    def distrust(self, since: float = float("inf")) -> None:
        """End connections that idle, in tasks of their own; those in use when they are given back.

        What cost one operation its connection has likely cost the others theirs: a server that was
        restarted or became a replica, a firewall that forgot them. Each would fail one call more.

        Args:
            since: those that were used after this stay, as do those in use.
        """
        if since == float("inf"):
            self._losses += 1
        idle, self._idle = self._idle, []
        for desk in idle:
            if desk.idle_since > since:
                self._idle.append(desk)
                continue
            self._part_with(desk)

    def _part_with(self, desk: Desk) -> None:
        task = asyncio.get_running_loop().create_task(self._end(desk.connection))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def move(self, engine: AsyncEngine) -> None:
        """Make connections with another engine from now on; those in use end when given back."""
        self._engine = engine
        await self.release()

    async def _end(self, connection: AsyncConnection) -> None:
        with suppress(Exception):  # it failed before
            if not connection.closed and not connection.invalidated:
                await connection.invalidate()
        with suppress(Exception):
            await connection.close()

    def end(self) -> None:
        """From here on a connection ends when its operation does."""
        self._closed = True

    async def release(self) -> None:
        """End all that are idle, side by side: a server that hangs costs the wait for one.

        Given back to the engine's pool each would first be asked to roll back, with no time limit.
        """
        self.distrust()
        if self._ending:
            await asyncio.gather(*self._ending)

    def _next(self) -> None:
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(None)
                return

    def let_go(self, path: Path) -> None:
        """Close a parent's connections to an SQLite file."""
        url = self._engine.sync_engine.url
        if url.get_backend_name() != "sqlite" or not url.database:
            return
        if self.busy and Path(url.database).resolve() == path:
            raise ClosedError(
                "this process was forked during a call on the same SQLite file; fork"
                " between calls, or start new processes by 'spawn'"
            )
        for desk in self._idle:
            with suppress(Exception):
                desk.driver._conn.close()  # noqa: SLF001


def _left(driver: Any) -> bool:
    """Tell whether the server has left a connection that idled, as far as is known without asking.

    Servers and proxies end what idles (``wait_timeout``, ``idle_session_timeout``): the end stands
    there to be read, and nothing else does where no answer is awaited.

    Source: ``connCheck`` of https://github.com/go-sql-driver/mysql
    """
    writer = getattr(driver, "_writer", None)
    transport = getattr(driver, "_transport", None) if writer is None else writer.transport
    try:
        if transport is not None:
            if transport.is_closing():
                return True
            line = transport.get_extra_info("socket").fileno()
        elif hasattr(driver, "pgconn"):
            line = driver.pgconn.socket
        else:
            return False
        look = select.poll()
        look.register(line, select.POLLIN)
        return bool(look.poll(0))
    except Exception:  # noqa: BLE001  it was closed, or cannot be looked at: then it is tried
        return False


_alive: Final[weakref.WeakSet[Desks]] = weakref.WeakSet()
_parents: Final[list[Desks]] = []


def let_go_of_parents(database: str) -> None:
    """In a child of ``os.fork``: close the parent's connections to an SQLite file, to open it anew.

    While they are open here, SQLite takes the parent's locks for this process's own: the parent
    then removes a log that the child still writes to, and what was written is lost.

    Source: https://www.sqlite.org/howtocorrupt.html, section 2.6

    Raises:
        ClosedError: one was in use at that moment, and cannot be closed.
    """
    if _parents:
        path = Path(database).resolve()
        for desks in _parents:
            desks.let_go(path)


def _forked() -> None:
    # Kept: whatever else is collected with them would speak on the parent's connections.
    _parents.extend(_alive)
    _alive.clear()


if hasattr(os, "register_at_fork"):  # elsewhere than on Windows
    os.register_at_fork(after_in_child=_forked)
