"""Links: how calls of one event loop reach Redis, over lanes or through a client."""

from __future__ import annotations

import asyncio
import contextvars
import weakref
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from layered_store.errors import ClosedError
from layered_store.stores.redis.failures import ConnectionLostError, NotSentError, ReplyError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from layered_store.clock import Clock
    from layered_store.stores.redis.address import Address
    from layered_store.stores.redis.lane import Lane

__all__ = ["ClientLink", "Command", "LaneLink", "Limits", "pack_command"]

Command = tuple[bytes | str | int, ...]

_PENDING: Final = 1024
"""Calls under way on one lane; more would only wait in the server's input buffer instead."""
_BATCH: Final = 256
"""Commands of one call that leave together."""


def pack_command(args: Sequence[bytes | str | int]) -> bytes:
    """Return a command in Redis' wire form."""
    parts = [b"*%d\r\n" % len(args)]
    for arg in args:
        raw = arg if isinstance(arg, bytes) else str(arg).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(raw), raw))
    return b"".join(parts)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a link takes from its store's options; see there."""

    connect_timeout: float
    timeout: float
    max_connections: int
    clock: Clock


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
        self._connecting: asyncio.Task[Exception | None] | None = None
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._closed = False
        self._guard: AsyncGenerator[None, None] | None = None

    def ready(self) -> Lane | None:
        """Return a lane that has a place, or None."""
        for lane in self._lanes:
            if len(lane.pending) < _PENDING and lane.open:
                return lane
        return None

    def send_now(self, packed: bytes) -> asyncio.Future[Any] | None:
        """Queue a packed command, or return None when there is no place on a lane now."""
        for lane in self._lanes:
            if len(lane.pending) < _PENDING and lane.open:
                return lane.send(packed)
        return None

    async def call(self, command: Command) -> Any:
        """Send one command and return its reply."""
        lane = self.ready() or await self.acquire()
        if isinstance(lane, Exception):
            return lane
        reply = await lane.send(pack_command(command))
        if type(reply) is ReplyError:
            self._look_at(lane, reply)
        return reply

    async def call_all(self, commands: Sequence[Command]) -> list[Any]:
        """Send several commands in their order and return their replies."""
        replies: list[Any] = []
        for start in range(0, len(commands), _BATCH):
            lane = self.ready() or await self.acquire()
            batch = commands[start : start + _BATCH]
            if isinstance(lane, Exception):
                replies += [lane] * len(batch)
                continue
            futures = lane.send_all(map(pack_command, batch))
            try:
                replies += [await future for future in futures]
            except asyncio.CancelledError:
                for future in futures:
                    future.cancel()
                raise
            for reply in replies[start:]:
                if type(reply) is ReplyError:
                    self._look_at(lane, reply)
        return replies

    async def probe(self) -> Any:
        """Send PING, also when all places are taken."""
        lane = next((lane for lane in self._lanes if lane.open), None)
        if lane is None:
            found = await self.acquire()
            if isinstance(found, Exception):
                return found
            lane = found
        return await lane.send(b"*1\r\n$4\r\nPING\r\n")

    async def acquire(self) -> Lane | Exception:
        """Return a lane with a place, connecting or waiting when there is none."""
        try:
            async with self._limits.clock.timeout(
                self._limits.connect_timeout + self._limits.timeout
            ):
                while True:
                    if self._closed:
                        return _not_sent(ClosedError("this store was closed; build a new one"))
                    lane = self.ready()
                    if lane is not None:
                        return lane
                    if len(self._lanes) < self._limits.max_connections:
                        failure = await asyncio.shield(self._connect())
                        if failure is not None:
                            return _not_sent(failure)
                    else:
                        await self._place()
        except TimeoutError as exc:
            return _not_sent(exc)

    async def connect(self, key: bytes) -> Any:  # noqa: ARG002  one server has all keys
        """Return a connection of the driver to the server that has this key."""
        return await self._establish()

    async def owners(self, keys: Sequence[bytes]) -> list[str]:
        """Return names of the servers that have these keys: one server has all."""
        return [""] * len(keys)

    async def aclose(self) -> None:
        """Close what the link opened, after the calls under way."""
        self._closed = True
        task = self._connecting
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        lanes = list(self._lanes)
        if lanes:
            try:
                async with self._limits.clock.timeout(self._limits.timeout):
                    for lane in lanes:
                        await lane.drain()
            except TimeoutError:
                pass
        for lane in lanes:
            await lane.aclose()
        self._wake()
        if self._guard is not None:
            guard, self._guard = self._guard, None
            await guard.aclose()
        if self._address.release is not None:
            await self._address.release()

    def abandon(self) -> None:
        """Close from another event loop, as far as this one still runs."""
        self._closed = True
        if self.loop.is_closed():
            return
        try:
            self.loop.call_soon_threadsafe(self._close_now)
        except RuntimeError:  # it was closed just now
            pass

    def _close_now(self) -> None:
        for lane in list(self._lanes):
            lane.close()

    def _connect(self) -> asyncio.Task[Exception | None]:
        """Return the task that connects; there is one at a time, and others wait for it."""
        task = self._connecting
        # One that has ended is of no use, also before its callback has run: its lane may be lost
        # again, and who asks it once more would never let the event loop go on.
        if task is None or task.done():
            # A context of its own: it serves whoever waits, not the first caller alone.
            task = self.loop.create_task(self._open_lane(), context=contextvars.Context())
            task.add_done_callback(self._connected)
            self._connecting = task
        return task

    def _connected(self, task: asyncio.Task[Exception | None]) -> None:
        if self._connecting is task:
            self._connecting = None
        self._wake()

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

    async def _place(self) -> None:
        """Wait until a lane may have a place."""
        waiter = self.loop.create_future()
        self._waiting.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self._wake()  # the place that was offered goes to another
            raise

    def _changed(self, lane: Lane) -> None:
        if not lane.open and lane in self._lanes:
            self._lanes.remove(lane)
        if self._waiting:
            self._wake()

    def _wake(self) -> None:
        free = sum(_PENDING - len(lane.pending) for lane in self._lanes if lane.open)
        if len(self._lanes) < self._limits.max_connections:
            free = len(self._waiting)
        while free > 0 and self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                free -= 1

    def _look_at(self, lane: Lane, reply: ReplyError) -> None:
        # After a failover the old primary is a replica, or wants another login: ask anew.
        if reply.code in ("READONLY", "NOAUTH", "MASTERDOWN"):
            if lane in self._lanes:
                self._lanes.remove(lane)
            task = self.loop.create_task(_retire(lane))
            _retiring.add(task)
            task.add_done_callback(_retiring.discard)


_retiring: set[asyncio.Task[None]] = set()


async def _retire(lane: Lane) -> None:
    try:
        await lane.drain()
    finally:
        lane.close()


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


class ClientLink:
    """Calls of one event loop through a client of the driver: a cluster's, or one passed in.

    A failure is returned as an exception object.

    Args:
        address: makes the client.
        limits: the store's limits; calls beyond ``max_connections`` wait.
    """

    def __init__(self, address: Address, limits: Limits) -> None:
        self.loop = asyncio.get_running_loop()
        assert address.client is not None
        self._client = address.client()
        self._shared = address.shared
        self._limits = limits
        self._places = asyncio.Semaphore(limits.max_connections)
        self._running: set[asyncio.Task[Any]] = set()

    async def connect(self, key: bytes) -> Any:
        """Return a connection of the driver to the server that has this key."""
        client = self._client
        if not hasattr(client, "get_node_from_key"):
            connection = client.connection_pool.make_connection()
        else:
            await client.initialize()
            node = client.get_node_from_key(key.decode())
            # Of a passed-in client too: messages must come in the order of the replies.
            options = {**node.connection_kwargs, "protocol": 2}
            connection = node.connection_class(**options)
        try:
            await connection.connect()
        except BaseException:
            connection._close()  # noqa: SLF001
            self._look_anew()
            raise
        return connection

    async def owners(self, keys: Sequence[bytes]) -> list[str]:
        """Return names of the servers that have these keys, looked up anew."""
        client = self._client
        if not hasattr(client, "get_node_from_key"):
            return [""] * len(keys)
        self._look_anew()
        async with self._limits.clock.timeout(self._limits.connect_timeout + self._limits.timeout):
            await client.initialize()
        return [str(client.get_node_from_key(key.decode()).name) for key in keys]

    def _look_anew(self) -> None:
        """Have the driver ask who has which keys before the next call, as its own errors do."""
        if hasattr(self._client, "get_node_from_key"):
            self._client._initialize = True  # noqa: SLF001

    def send_now(self, packed: bytes) -> None:
        """Return None: a client takes no packed commands."""

    async def call(self, command: Command) -> Any:
        """Send one command and return its reply."""
        limits = self._limits
        try:
            async with limits.clock.timeout(limits.connect_timeout + limits.timeout):
                await self._places.acquire()
        except TimeoutError as exc:
            return _not_sent(exc)
        return await self._send(command, self._places.release)

    async def call_all(self, commands: Sequence[Command]) -> list[Any]:
        """Send several commands, those of one key in their order, and return their replies."""
        chains: dict[object, list[int]] = {}
        for index, command in enumerate(commands):
            chains.setdefault(command[3] if len(command) > 3 else None, []).append(index)  # noqa: PLR2004
        replies: list[Any] = [None] * len(commands)

        async def run(indexes: list[int]) -> None:
            for index in indexes:
                replies[index] = await self.call(commands[index])

        await asyncio.gather(*map(run, chains.values()))
        return replies

    async def probe(self) -> Any:
        """Send PING, also when all places are taken."""
        return await self._send(("PING",))

    async def _send(self, command: Command, ended: Callable[[], object] | None = None) -> Any:
        """Have the driver send a command, in a task of its own.

        The driver's clients now and then swallow a cancellation. Here the caller leaves at once,
        and what was begun ends by itself; only then its place is free.
        """
        task = self.loop.create_task(self._execute(command))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        if ended is not None:
            task.add_done_callback(lambda _: ended())
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError:
            task.cancel()
            raise
        return task.result()

    async def _execute(self, command: Command) -> Any:
        try:
            async with self._limits.clock.timeout(self._limits.timeout):
                return await self._client.execute_command(*command)
        except Exception as exc:  # noqa: BLE001  the store translates it
            if type(exc).__name__ == "NoScriptError":
                return ReplyError("NOSCRIPT")
            return exc

    async def aclose(self) -> None:
        """Close what the link opened, after the calls under way."""
        try:
            async with self._limits.clock.timeout(self._limits.timeout):
                for _ in range(self._limits.max_connections):
                    await self._places.acquire()
        except TimeoutError:
            pass
        if not self._shared:
            await self._client.aclose()

    def abandon(self) -> None:
        """Close from another event loop, as far as this one still runs."""
        if self._shared or self.loop.is_closed():
            return
        try:
            self.loop.call_soon_threadsafe(lambda: self.loop.create_task(self._client.aclose()))
        except RuntimeError:
            pass


def _not_sent(cause: Exception) -> NotSentError:
    error = NotSentError()
    error.__cause__ = cause
    return error
