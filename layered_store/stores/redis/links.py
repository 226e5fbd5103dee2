"""How calls of one event loop reach one Redis server: over lanes."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from layered_store.errors import ClosedError
from layered_store.running import spawn
from layered_store.stores.redis.failures import ConnectionLostError, not_sent
from layered_store.stores.redis.wire import pack_command

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Sequence

    from layered_store.clock import Clock, TimerHandle
    from layered_store.stores.redis.address import Address
    from layered_store.stores.redis.lane import Lane
    from layered_store.stores.redis.wire import Command

__all__ = ["LaneLink", "Limits"]

_PENDING: Final = 1024
"""Calls under way on one lane; more would only wait in the server's input buffer instead."""
_BATCH: Final = 256
"""Commands of one call that leave together."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The options of the store that a link needs; see :class:`RedisStore`."""

    connect_timeout: float
    timeout: float
    max_connections: int
    clock: Clock


@dataclass(slots=True)
class _Waiting:
    """Commands that wait for a place on a lane, to leave together; or the read of a key."""

    futures: list[asyncio.Future[Any]]
    data: bytes
    deadline: float
    key: bytes | None = None


class LaneLink:
    """Lanes of one event loop to one server. A failure is returned as an exception object.

    One lane carries everything; another is opened only while all have their fill of calls, up to
    ``max_connections``. Further calls wait for a place, as long as one reply may take.

    Args:
        address: makes connections.
        limits: the store's limits.
    """

    def __init__(self, address: Address, limits: Limits) -> None:
        self.loop = asyncio.get_running_loop()
        self._address = address
        self._limits = limits
        self._lanes: list[Lane] = []
        # Lanes that are given no more calls, until those under way have their replies.
        self._retiring: set[Lane] = set()
        self._connecting: asyncio.Task[Exception | None] | None = None
        self._waiting: deque[_Waiting] = deque()
        self._timer: TimerHandle | None = None
        self._closed = False
        self._guard: AsyncGenerator[None, None] | None = None

    def send_now(self, packed: bytes) -> asyncio.Future[Any]:
        """Queue a packed command; the future's result is the reply or an exception object."""
        for lane in self._lanes:
            if len(lane.pending) < _PENDING:
                return lane.send(packed)
        return self._wait(packed, 1)[0]

    def read_now(self, key: bytes) -> asyncio.Future[Any]:
        """Read a key with the others of this turn; see :meth:`send_now`."""
        for lane in self._lanes:
            if len(lane.pending) < _PENDING:
                return lane.read(key)
        return self._wait(b"", 1, key)[0]

    async def call(self, command: Command) -> Any:
        """Send one command and return its reply."""
        return await self.send_now(pack_command(command))

    async def call_all(self, commands: Sequence[Command]) -> list[Any]:
        """Send several commands in their order and return their replies."""
        replies: list[Any] = []
        for start in range(0, len(commands), _BATCH):
            batch = commands[start : start + _BATCH]
            futures = self._send_all(b"".join(map(pack_command, batch)), len(batch))
            try:
                replies += [await future for future in futures]
            except asyncio.CancelledError:
                for future in futures:
                    future.cancel()
                raise
        return replies

    async def probe(self) -> Any:
        """Send PING, also when all places are taken."""
        ping = b"*1\r\n$4\r\nPING\r\n"
        return await (self._lanes[0].send(ping) if self._lanes else self.send_now(ping))

    def _send_all(self, data: bytes, count: int) -> list[asyncio.Future[Any]]:
        """Queue packed commands on one lane, so that they keep their order."""
        lane = self._ready()
        if lane is None:
            return self._wait(data, count)
        futures = [self.loop.create_future() for _ in range(count)]
        lane.put(futures, data)
        return futures

    def _ready(self) -> Lane | None:
        for lane in self._lanes:
            if len(lane.pending) < _PENDING:
                return lane
        return None

    # Waiting for a place

    def _wait(
        self, data: bytes, count: int, key: bytes | None = None
    ) -> list[asyncio.Future[Any]]:
        """Queue commands until a lane has a place, connecting when it can be had that way."""
        futures = [self.loop.create_future() for _ in range(count)]
        waiting = _Waiting(futures, data, self._deadline(), key)
        if self._closed:
            _fail(waiting, ClosedError("this store was closed; build a new one"))
            return futures
        self._queue((waiting,))
        return futures

    def _deadline(self) -> float:
        """Return until when whoever begins to wait now waits for a place."""
        limits = self._limits
        return limits.clock.monotonic() + limits.connect_timeout + limits.timeout

    def _queue(self, waiting: Iterable[_Waiting]) -> None:
        limits = self._limits
        self._waiting.extend(waiting)
        if self._timer is None:
            left = self._waiting[0].deadline - limits.clock.monotonic()
            self._timer = limits.clock.call_later(left, self._watch)
        self._connect()

    def _watch(self) -> None:
        """Give up what waited too long."""
        self._timer = None
        now = self._limits.clock.monotonic()
        while self._waiting and self._waiting[0].deadline <= now:
            _fail(self._waiting.popleft(), TimeoutError())
        if self._waiting:
            left = self._waiting[0].deadline - now
            self._timer = self._limits.clock.call_later(left, self._watch)

    def _advance(self) -> None:
        """Give free places to those who wait longest."""
        while self._waiting and (lane := self._ready()) is not None:
            waiting = self._waiting.popleft()
            if waiting.key is not None:
                if not waiting.futures[0].done():
                    lane.put_read(waiting.futures[0], waiting.key)
            elif not all(future.done() for future in waiting.futures):
                lane.put(waiting.futures, waiting.data)
        if self._waiting:
            self._connect()

    def _give_up(self, cause: Exception) -> None:
        """Fail all who wait."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting:
            _fail(self._waiting.popleft(), cause)

    def _changed(self, lane: Lane) -> None:
        """Take note that replies have come or the lane has ended."""
        if (lane.outdated or not lane.open) and lane in self._lanes:
            self._lanes.remove(lane)
            self._retiring.add(lane)
        if lane in self._retiring:
            if not lane.open:
                self._retiring.discard(lane)
            elif lane.idle:
                lane.close()
        if lane.returned:
            returned, lane.returned = lane.returned, []
            self._read_again(returned)
        if self._waiting:
            self._advance()

    def _read_again(self, reads: list[tuple[bytes, asyncio.Future[Any]]]) -> None:
        """Have another lane answer what a hung one had hardly begun."""
        deadline = self._deadline()
        waiting = [_Waiting([future], b"", deadline, key) for key, future in reads]
        if not self._closed:
            self._queue(waiting)
            return
        for each in waiting:
            _fail(each, TimeoutError())

    async def connect(self, key: bytes) -> Any:  # noqa: ARG002  one server has all keys
        """Return a connection of the driver to the server that has this key."""
        return await self._establish()

    async def owners(self, keys: Sequence[bytes]) -> list[str]:
        """Return names of the servers that have these keys: one server has all."""
        return [""] * len(keys)

    async def aclose(self) -> None:
        """Close what the link opened, after the calls under way."""
        self._closed = True
        self._give_up(ClosedError("this store was closed; build a new one"))
        task = self._connecting
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        lanes = [*self._lanes, *self._retiring]
        if lanes:
            try:
                async with self._limits.clock.timeout(self._limits.timeout):
                    # Again, since a call may go on: with a script that the server did not know.
                    while any(lane.open and not lane.idle for lane in lanes):
                        for lane in lanes:
                            await lane.drain()
            except TimeoutError:
                pass
        for lane in lanes:
            await lane.aclose()
        if self._guard is not None:
            guard, self._guard = self._guard, None
            await guard.aclose()
        if self._address.release is not None:
            await self._address.release()

    def abandon(self) -> None:
        """Close from another event loop, as far as this one still runs."""
        self._closed = True
        with suppress(RuntimeError):  # it was closed
            self.loop.call_soon_threadsafe(self._close_now)

    def _close_now(self) -> None:
        self._give_up(ConnectionLostError())
        for lane in [*self._lanes, *self._retiring]:
            lane.close()

    # Connecting

    def _connect(self) -> None:
        """Begin to open one more lane, unless that is under way or there may be no more."""
        if (
            self._connecting is None
            and len(self._lanes) < self._limits.max_connections
            and not self._closed
        ):
            self._connecting = spawn(self._open_lane())
            self._connecting.add_done_callback(self._connected)

    def _connected(self, task: asyncio.Task[Exception | None]) -> None:
        self._connecting = None
        failure = ConnectionLostError() if task.cancelled() else task.result()
        if failure is None:
            self._advance()
        elif not self._lanes:
            late = self._came_late() if isinstance(failure, TimeoutError) else deque()
            self._give_up(failure)
            if late:
                self._queue(late)
        # Else those who wait get a place as soon as others have their replies.

    def _came_late(self) -> deque[_Waiting]:
        """Take out those who came in the second half of an attempt: the next one is theirs too.

        The server may well have come back since the attempt began.
        """
        limits = self._limits
        half = limits.clock.monotonic() + limits.timeout + limits.connect_timeout / 2
        late: deque[_Waiting] = deque()
        while self._waiting and self._waiting[-1].deadline > half:
            late.appendleft(self._waiting.pop())
        return late

    async def _open_lane(self) -> Exception | None:
        from layered_store.stores.redis.lane import Lane  # noqa: PLC0415

        limits = self._limits
        try:
            connection = await self._establish()
        except Exception as exc:  # noqa: BLE001  handed to whoever waits
            return exc
        if self._guard is None:
            self._guard = _close_with_loop(weakref.ref(self))
            await anext(self._guard)
        if self._closed:
            connection._close()  # noqa: SLF001
            return ConnectionLostError()
        lane = Lane(connection, limits.clock, limits.timeout, self._changed)
        if not lane.open:
            return ConnectionLostError()
        self._lanes.append(lane)
        self._advance()  # at once: should the server drop it now, that is their answer
        return None

    async def _establish(self) -> Any:
        assert self._address.connection is not None
        connection = self._address.connection()
        try:
            async with self._limits.clock.timeout(self._limits.connect_timeout):
                await connection.connect()
        except BaseException:
            connection._close()  # noqa: SLF001  at once, without a task that might be cancelled
            raise
        return connection


async def _close_with_loop(link: weakref.ref[LaneLink]) -> AsyncGenerator[None, None]:
    """Close the lanes when the event loop ends: ``asyncio.run`` finishes what is suspended here."""
    try:
        yield
    finally:
        owner = link()
        if owner is not None and owner.loop is asyncio.get_running_loop():
            owner._close_now()  # noqa: SLF001
            # One turn, in which the event loop closes the sockets.
            await owner._limits.clock.sleep(0)  # noqa: SLF001


def _fail(waiting: _Waiting, cause: Exception) -> None:
    for future in waiting.futures:
        if not future.done():
            future.set_result(not_sent(cause))
