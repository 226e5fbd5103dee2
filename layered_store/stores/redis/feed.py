"""A feed: one connection on which the server speaks without being asked.

As with a lane, redis-py establishes the connection and the feed takes over its transport. All that
has come by the time somebody looks is handed over at once: the driver takes ten times as long for
each message, and every process hears of every write of all.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import hiredis

from layered_store.stores.redis.failures import ConnectionLostError, GarbageError, ReplyError

if TYPE_CHECKING:
    from layered_store.clock import Clock

__all__ = ["MORE", "Feed", "new_reader", "take_over"]

_LOOKS: Final = 4
"""In how many parts a silence is waited for. A process that was stopped, or busy all the time,
finds the time of one over: the next hears what has come, and replies to what is asked now."""

MORE: Final = object()
"""What a reader gives when the next reply has not come whole."""


def new_reader() -> Any:
    """Return a parser of what a server says; error replies are objects of ours, as garbage is."""
    return hiredis.Reader(protocolError=GarbageError, replyError=ReplyError, notEnoughData=MORE)


def take_over(connection: Any, protocol: asyncio.Protocol) -> tuple[Any, bytes]:
    """Have a protocol of ours go on with an established connection of redis-py's.

    Args:
        connection: on which no reply is awaited.
        protocol: owns it from now on.

    Returns:
        The driver's stream writer, which closes the transport when it is collected, so it must
        stay; and what was read already.
    """
    writer = connection._writer  # noqa: SLF001
    early = bytes(connection._reader._buffer)  # noqa: SLF001
    # Nor may the driver's connection close it when that is collected.
    connection._writer = connection._reader = None  # noqa: SLF001
    writer.transport.set_protocol(protocol)
    writer.transport.resume_reading()
    return writer, early


class Feed(asyncio.Protocol):
    """What a server says, in the order in which it came.

    Args:
        connection: redis-py's connection, established; the feed owns it from now on.
        clock: source of time.
    """

    def __init__(self, connection: Any, clock: Clock) -> None:
        self._clock = clock
        self._said: list[Any] = []
        self._lost: Exception | None = None
        self._news = asyncio.Event()
        self._reader = new_reader()
        self._writer, early = take_over(connection, self)
        if self._writer.transport.is_closing():
            self._end(ConnectionLostError())
        elif early:
            self.data_received(early)

    def send(self, data: bytes) -> None:
        """Send packed commands; what they are answered with is heard like the rest."""
        self._writer.transport.write(data)

    async def next(self, seconds: float) -> list[Any]:
        """Return what the server said since the last look, at least one thing.

        Args:
            seconds: how long to wait for it.

        Raises:
            TimeoutError: it is silent for so long.
            ReplyError: it refused something.
            ConnectionLostError, GarbageError: it will say no more.
        """
        looks = _LOOKS
        while not self._said and self._lost is None:
            if not looks:
                raise TimeoutError
            looks -= 1
            self._news.clear()
            with suppress(TimeoutError):
                async with self._clock.timeout(seconds / _LOOKS):
                    await self._news.wait()
        said, self._said = self._said, []
        if not said and self._lost is not None:
            raise self._lost
        for each in said:
            if isinstance(each, ReplyError):
                raise each
        return said

    def close(self) -> None:
        """Close the connection now."""
        self._end(ConnectionLostError())

    def _end(self, cause: Exception) -> None:
        if self._lost is None:
            self._lost = cause
            self._writer.transport.abort()
            self._news.set()

    # What the event loop calls.

    def data_received(self, data: bytes) -> None:
        try:
            self._reader.feed(data)
            while (reply := self._reader.gets()) is not MORE:
                self._said.append(reply)
        except GarbageError:
            self._end(GarbageError())
        if self._said:
            self._news.set()

    def eof_received(self) -> None:
        self._end(ConnectionLostError())

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc or ConnectionLostError())
