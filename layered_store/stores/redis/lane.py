"""A lane: one connection on which many calls are under way at once.

redis-py establishes the connection (URL, TLS, login, database); then the lane takes over its
transport. Commands of one turn of the event loop leave in one write, replies come back in their
order, and each call waits on a future of its own. A cancelled call leaves its place in the queue,
and its reply is dropped there: no caller can be given another's.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Final

import hiredis

from layered_store.stores.redis.failures import (
    ConnectionLostError,
    GarbageError,
    NotSentError,
    ReplyError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from layered_store.clock import Clock, TimerHandle

__all__ = ["Lane"]

_MORE: Final = object()


class Lane(asyncio.Protocol):
    """One connection's calls under way, in the order they were sent.

    A failure is the *result* of the futures and not their exception: a future whose caller was
    cancelled just then would else complain that nobody looked.

    Args:
        connection: redis-py's connection, established; the lane owns it from now on.
        clock: source of time.
        limit: seconds that one reply may take; then the connection is given up.
        changed: called when replies have come or the lane has ended.
    """

    def __init__(
        self, connection: Any, clock: Clock, limit: float, changed: Callable[[Lane], None]
    ) -> None:
        self.open = True
        self.pending: deque[tuple[asyncio.Future[Any], float]] = deque()
        self.scripts: set[bytes] = set()
        self._clock = clock
        self._limit = limit
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._buffer: list[bytes] = []
        self._unsent = 0
        self._deadline = 0.0
        self._scheduled = False
        self._paused = False
        self._timer: TimerHandle | None = None
        self._gone = self._loop.create_future()
        self._reader = hiredis.Reader(
            protocolError=GarbageError, replyError=ReplyError, notEnoughData=_MORE
        )
        # The driver's stream writer closes the transport when it is collected, so it stays.
        self._writer = connection._writer  # noqa: SLF001
        early = bytes(connection._reader._buffer)  # noqa: SLF001
        # Nor may the driver's connection close it when that is collected.
        connection._writer = connection._reader = None  # noqa: SLF001
        self._transport: asyncio.Transport = self._writer.transport
        self._transport.set_protocol(self)
        self._transport.resume_reading()
        if self._transport.is_closing():
            self._end(ConnectionLostError())
        elif early:
            self.data_received(early)

    def send(self, data: bytes) -> asyncio.Future[Any]:
        """Queue a packed command; the future's result is the reply or an exception object."""
        future = self._loop.create_future()
        if not self.open:
            future.set_result(_not_sent(ConnectionLostError()))
            return future
        if not self._scheduled:
            # What one turn of the event loop sends also has one deadline.
            self._scheduled = True
            self._deadline = self._clock.monotonic() + self._limit
            self._loop.call_soon(self._flush)
        self.pending.append((future, self._deadline))
        self._buffer.append(data)
        self._unsent += 1
        if self._timer is None:
            self._timer = self._clock.call_later(self._limit, self._watch)
        return future

    def send_all(self, commands: Iterable[bytes]) -> list[asyncio.Future[Any]]:
        """Queue several commands that leave together."""
        return [self.send(command) for command in commands]

    async def drain(self) -> None:
        """Wait until every call under way has its reply."""
        while self.open and self.pending:
            await asyncio.wait([self.pending[-1][0]])

    async def aclose(self) -> None:
        """Close the connection and wait until it is."""
        self.close()
        if not self._gone.done():
            await asyncio.wait([self._gone])

    def close(self) -> None:
        """Close the connection now; calls under way fail."""
        self._end(ConnectionLostError())

    def _flush(self) -> None:
        self._scheduled = False
        if self._paused or not self._buffer:
            return
        data = self._buffer[0] if len(self._buffer) == 1 else b"".join(self._buffer)
        self._buffer.clear()
        self._unsent = 0
        self._transport.write(data)

    def _watch(self) -> None:
        """Give the connection up when the oldest call waits too long."""
        self._timer = None
        if not self.pending or not self.open:
            return
        left = self.pending[0][1] - self._clock.monotonic()
        if left > 0:
            self._timer = self._clock.call_later(left, self._watch)
            return
        # When this process was too busy to look, the reply may be here, unread: two more turns of
        # the loop read it.
        self._loop.call_soon(self._loop.call_soon, self._expire, self.pending[0][0])

    def _expire(self, oldest: asyncio.Future[Any]) -> None:
        if self.pending and self.pending[0][0] is oldest:
            self._end(TimeoutError())
        elif self.pending and self._timer is None:
            self._watch()

    def _end(self, cause: Exception) -> None:
        if not self.open:
            return
        self.open = False
        if self._timer is not None:
            self._timer.cancel()
        sent = len(self.pending) - self._unsent
        pending, self.pending = self.pending, deque()
        self._buffer.clear()
        self._transport.abort()
        for index, (future, _) in enumerate(pending):
            if not future.done():
                future.set_result(cause if index < sent else _not_sent(cause))
        self._changed(self)

    # What the event loop calls.

    def data_received(self, data: bytes) -> None:
        gets = self._reader.gets
        take = self.pending.popleft
        try:
            self._reader.feed(data)
            while (reply := gets()) is not _MORE:
                if type(reply) is hiredis.PushNotification:
                    continue
                future = take()[0]
                if not future.done():
                    future.set_result(reply)
        except (GarbageError, IndexError):
            # No reply of Redis, or one that nobody asked for: the two sides no longer agree on what
            # answers what.
            self._end(GarbageError())
            return
        self._changed(self)

    def eof_received(self) -> None:
        self._end(ConnectionLostError())

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc or ConnectionLostError())
        if not self._gone.done():
            self._gone.set_result(None)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._flush()


def _not_sent(cause: Exception) -> NotSentError:
    error = NotSentError()
    error.__cause__ = cause
    return error
