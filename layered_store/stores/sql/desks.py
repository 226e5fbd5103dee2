"""Desks: the connections of one event loop, each used by one operation at a time.

SQLAlchemy makes and ends the connections. Between operations they stay here, at hand: handing one
out through its pool costs more than a read does.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

__all__ = ["Desk", "Desks"]


class Desk:
    """One connection.

    Args:
        connection: SQLAlchemy's, in AUTOCOMMIT mode.
        driver: the driver's own connection below it.
        engine: what made it.
    """

    __slots__ = ("connection", "driver", "engine")

    def __init__(self, connection: AsyncConnection, driver: Any, engine: AsyncEngine) -> None:
        self.connection = connection
        self.driver = driver
        self.engine = engine


class Desks:
    """Hands out the connections of one engine; who finds none waits for the next.

    Args:
        engine: makes connections.
        size: most of them at once.
        keep: whether they stay here between operations; not those of an engine that others use.
    """

    def __init__(self, engine: AsyncEngine, size: int, *, keep: bool) -> None:
        self.busy = 0
        self._closed = False
        self._engine = engine
        self._size = size
        self._keep = keep
        self._idle: list[Desk] = []
        self._waiting: deque[asyncio.Future[None]] = deque()

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
        if self._idle:
            return self._idle.pop()
        connection: AsyncConnection | None = None
        try:
            engine = self._engine
            connection = await engine.connect()
            raw = await connection.get_raw_connection()
            return Desk(connection, raw.driver_connection, engine)
        except BaseException:
            self.busy -= 1
            self._next()
            if connection is not None:
                await connection.close()
            raise

    async def give(self, desk: Desk, *, broken: bool = False) -> None:
        """Take a connection back; one that failed is not used again unless its pool says so."""
        connection = desk.connection
        try:
            # Of an engine that was replaced, or is closed by now.
            left = desk.engine is not self._engine or (self._closed and self._keep)
            if broken or left or connection.invalidated or connection.closed:
                await self._end(connection)
            elif self._keep:
                self._idle.append(desk)
            else:
                await connection.close()
        finally:
            self.busy -= 1
            self._next()

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

    async def aclose(self) -> None:
        """Give all back to the engine; those in use end when their operation does."""
        self._closed = True
        await self.release()

    async def release(self) -> None:
        """Give all that are idle back to the engine."""
        idle, self._idle = self._idle, []
        for desk in idle:
            with suppress(Exception):
                await desk.connection.close()

    def _next(self) -> None:
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(None)
                return
