"""A lane: one connection on which many calls are under way at once.

redis-py establishes the connection (URL, TLS, login, database); then the lane takes over its
transport. Commands of one turn of the event loop leave in one write, its reads as one MGET; replies
come back in their order, and each call waits on a future of its own. A cancelled call leaves its
place in the queue, and its reply is dropped there: no caller can be given another's.
"""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import repeat
from typing import TYPE_CHECKING, Any, Final

import hiredis

from layered_store.stores.redis.failures import (
    ConnectionLostError,
    GarbageError,
    ReplyError,
    not_sent,
)
from layered_store.stores.redis.feed import MORE, new_reader, take_over
from layered_store.stores.redis.wire import pack_command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from layered_store.clock import Clock, TimerHandle

__all__ = ["Lane"]

_READS: Final = 256
"""Most keys that one command reads."""

_EARLY: Final = 32
"""How many reads do not wait for the end of the turn when the server has nothing else to do."""

_EARLY_BYTES: Final = 1024
"""As long a command does not either."""

_OUTDATED: Final = frozenset({"READONLY", "NOAUTH", "MASTERDOWN"})
"""After a failover the old primary is a replica, or wants another login."""


class _Reads:
    """Reads that leave as one command; stands among the futures that wait for replies."""

    __slots__ = ("_futures", "_keys")

    def __init__(self, keys: list[bytes], futures: list[asyncio.Future[Any]]) -> None:
        self._keys = keys
        self._futures = futures

    def pack(self) -> bytes:
        """Return the command; a key that several wait for is asked for once."""
        if len(self._keys) == 1:
            return pack_command(("GET",), self._keys)
        unique = list(dict.fromkeys(self._keys))
        return pack_command(("MGET",), unique)

    def items(self) -> Iterator[tuple[bytes, asyncio.Future[Any]]]:
        """Yield each key with who waits for it."""
        return zip(self._keys, self._futures, strict=True)

    def done(self) -> bool:
        return False

    def set_result(self, reply: Any) -> None:
        """Hand each reader its value, or all of them what went wrong.

        Raises:
            GarbageError: it does not fit the question; the readers were told as well.
        """
        keys = self._keys
        values: Any = None
        if len(keys) == 1:
            values = (reply,) if reply is None or type(reply) is bytes else None
        elif type(reply) is list:
            values = reply
            if len(reply) != len(keys):
                unique = dict.fromkeys(keys)
                held = dict(zip(unique, reply, strict=False))
                values = [held[key] for key in keys] if len(reply) == len(unique) else None
        strange = values is None and not isinstance(reply, Exception)
        if strange:
            reply = GarbageError()
        for future, value in zip(self._futures, values or repeat(reply), strict=False):
            try:
                future.set_result(value)
            except asyncio.InvalidStateError:
                pass  # its caller was cancelled
        if strange:
            raise reply


class Lane(asyncio.Protocol):
    """One connection's calls under way, in the order they were sent.

    A failure is the *result* of the futures and not their exception: a future whose caller was
    cancelled just then would else complain that nobody looked.

    Args:
        connection: redis-py's connection, established; the lane owns it from now on.
        clock: source of time.
        limit: seconds that one reply may take; then the connection is given up, and reads that
            came in the second half of that time are left in ``returned``.
        changed: called when replies have come or the lane has ended.
    """

    def __init__(
        self, connection: Any, clock: Clock, limit: float, changed: Callable[[Lane], None]
    ) -> None:
        self.open = True
        # Whether the server refused in a way that another connection may not.
        self.outdated = False
        self.pending: deque[asyncio.Future[Any] | _Reads] = deque()
        # Reads that had hardly begun when the lane was given up: another lane may answer them.
        self.returned: list[tuple[bytes, asyncio.Future[Any]]] = []
        self._clock = clock
        self._limit = limit
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._create_future = self._loop.create_future
        # Reads of this turn: the keys, and who waits for them.
        self._keys: list[bytes] = []
        self._readers: list[asyncio.Future[Any]] = []
        self._buffer: list[bytes] = []
        self._unsent = 0
        self._scheduled = False
        self._paused = False
        self._timer: TimerHandle | None = None
        # How many replies came, and until when those up to a number must have come.
        self._answered = 0
        self._deadlines: deque[tuple[int, float]] = deque()
        self._gone = self._loop.create_future()
        self._idle: asyncio.Future[None] | None = None
        self._reader = new_reader()
        self._writer, early = take_over(connection, self)
        self._transport: asyncio.Transport = self._writer.transport
        if self._transport.is_closing():
            self._end(ConnectionLostError())
        elif early:
            self.data_received(early)

    def send(self, data: bytes) -> asyncio.Future[Any]:
        """Queue a packed command; the future's result is the reply or an exception object."""
        future = self._create_future()
        if not self._scheduled:
            self._schedule()
        idle = not self.pending
        self.pending.append(future)
        self._buffer.append(data)
        self._unsent += 1
        if idle and len(data) >= _EARLY_BYTES:
            self._leave()
        return future

    def read(self, key: bytes) -> asyncio.Future[Any]:
        """Read a key with the others of this turn; the result is as that of :meth:`send`."""
        future = self._create_future()
        self.put_read(future, key)
        return future

    def put_read(self, future: asyncio.Future[Any], key: bytes) -> None:
        """Read a key for whom this future waits."""
        if not self._scheduled:
            self._schedule()
        self._keys.append(key)
        self._readers.append(future)
        if len(self._keys) == _EARLY and not self.pending:
            self._leave()  # the server works while the rest of the turn is still running

    def put(self, futures: Sequence[asyncio.Future[Any]], data: bytes) -> None:
        """Queue packed commands that leave together, whose replies these futures wait for."""
        if not self._scheduled:
            self._schedule()
        self.pending.extend(futures)
        self._buffer.append(data)
        self._unsent += len(futures)

    @property
    def idle(self) -> bool:
        """Whether every call has its reply."""
        return not (self.pending or self._keys)

    async def drain(self) -> None:
        """Wait until every call under way has its reply."""
        if self.open and not self.idle:
            if self._idle is None or self._idle.done():
                self._idle = self._loop.create_future()
            await asyncio.wait([self._idle])

    async def aclose(self) -> None:
        """Close the connection and wait until it is."""
        self.close()
        if not self._gone.done():
            await asyncio.wait([self._gone])

    def close(self) -> None:
        """Close the connection now; calls under way fail."""
        self._end(ConnectionLostError())

    def _schedule(self) -> None:
        self._scheduled = True
        self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """End a turn of the event loop: what was queued in it leaves."""
        self._scheduled = False
        self._leave()

    def _leave(self) -> None:
        """Send what is queued, with one deadline."""
        if not self.open:
            self._fail(ConnectionLostError())
            return
        if self._keys:
            self._pack_reads()
        self._forget_deadlines()
        deadline = self._clock.monotonic() + self._limit
        self._deadlines.append((self._answered + len(self.pending), deadline))
        if self._timer is None:
            self._timer = self._clock.call_later(self._limit, self._watch)
        if not self._paused:
            self._write()

    def _pack_reads(self) -> None:
        keys, readers = self._keys, self._readers
        self._keys, self._readers = [], []
        for at in range(0, len(keys), _READS):
            reads = _Reads(keys[at : at + _READS], readers[at : at + _READS])
            self.pending.append(reads)
            self._buffer.append(reads.pack())
            self._unsent += 1

    def _write(self) -> None:
        if self._buffer:
            data = self._buffer[0] if len(self._buffer) == 1 else b"".join(self._buffer)
            self._buffer.clear()
            self._unsent = 0
            self._transport.write(data)

    def _watch(self) -> None:
        """Give the connection up when the oldest call waits too long."""
        self._timer = None
        if not self.pending or not self.open:
            return
        self._forget_deadlines()
        # What is still to leave in this turn has no deadline yet.
        left = (
            self._deadlines[0][1] - self._clock.monotonic() if self._deadlines else self._limit
        )
        if left > 0:
            self._timer = self._clock.call_later(left, self._watch)
            return
        # When this process was too busy to look, the reply may be here, unread: two more turns of
        # the loop read it.
        self._loop.call_soon(self._loop.call_soon, self._expire, self.pending[0])

    def _forget_deadlines(self) -> None:
        while self._deadlines and self._deadlines[0][0] <= self._answered:
            self._deadlines.popleft()

    def _expire(self, oldest: object) -> None:
        if self.pending and self.pending[0] is oldest:
            self._end(TimeoutError())
        elif self.pending and self._timer is None:
            self._watch()

    def _end(self, cause: Exception) -> None:
        if not self.open:
            return
        self.open = False
        if self._timer is not None:
            self._timer.cancel()
        self._transport.abort()
        self._fail(cause)
        self._changed(self)

    def _fail(self, cause: Exception) -> None:
        sent = len(self.pending) - self._unsent
        self._unsent = 0
        pending, self.pending = self.pending, deque()
        self._buffer.clear()
        young = self._first_young(cause, len(pending))
        for index, future in enumerate(pending):
            if index >= young and type(future) is _Reads:
                self.returned += future.items()
            elif not future.done():
                future.set_result(cause if index < sent else not_sent(cause))
        keys, self._keys = self._keys, []
        readers, self._readers = self._readers, []
        if type(cause) is TimeoutError:
            self.returned += zip(keys, readers, strict=True)
        else:
            for reader in readers:
                if not reader.done():
                    reader.set_result(not_sent(cause))
        self._rest()

    def _first_young(self, cause: Exception, count: int) -> int:
        """Return from which of the pending calls on less than half of the limit is over."""
        if type(cause) is not TimeoutError:
            return count
        half = self._clock.monotonic() + self._limit / 2
        old = [number for number, deadline in self._deadlines if deadline <= half]
        return max(0, old[-1] - self._answered) if old else 0

    def _rest(self) -> None:
        """Tell whoever waits for it that nothing is under way."""
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    # What the event loop calls.

    def data_received(self, data: bytes) -> None:
        gets, pending = self._reader.gets, self.pending
        take, before = pending.popleft, len(pending)
        try:
            self._reader.feed(data)
            while (reply := gets()) is not MORE:
                if type(reply) is not bytes:
                    if type(reply) is hiredis.PushNotification:
                        continue
                    if type(reply) is ReplyError and reply.code in _OUTDATED:
                        self.outdated = True
                try:
                    take().set_result(reply)
                except asyncio.InvalidStateError:
                    pass  # its caller was cancelled
        except (GarbageError, IndexError):
            # No reply of Redis, or one that nobody asked for, or that answers something else: the
            # two sides no longer agree on what answers what.
            self._end(GarbageError())
            return
        self._answered += before - len(pending)
        if not pending and not self._keys:
            self._rest()
        self._changed(self)

    def eof_received(self) -> None:
        self._end(ConnectionLostError())

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc or ConnectionLostError())
        self._gone.set_result(None)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._write()
