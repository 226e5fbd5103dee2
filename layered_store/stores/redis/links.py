"""Links: how calls of one event loop reach Redis, over lanes or through a client."""

from __future__ import annotations

import asyncio
import contextvars
import weakref
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from layered_store.errors import ClosedError
from layered_store.stores.redis.failures import ConnectionLostError, ReplyError, not_sent
from layered_store.stores.redis.wire import pack_command

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence

    from layered_store.clock import Clock, TimerHandle
    from layered_store.stores.redis.address import Address
    from layered_store.stores.redis.lane import Lane
    from layered_store.stores.redis.wire import Command

__all__ = ["ClientLink", "LaneLink", "Limits"]

T = TypeVar("T")

_PENDING: Final = 1024
"""Calls under way on one lane; more would only wait in the server's input buffer instead."""
_STOP_SECONDS: Final = 0.25
"""How long a call through a client may take to end when it is cut off."""
_BATCH: Final = 256
"""Commands of one call that leave together."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a link takes from its store's options; see there."""

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
            # A context of its own: it serves whoever waits, not the first caller alone.
            self._connecting = self.loop.create_task(
                self._open_lane(), context=contextvars.Context()
            )
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


async def _close_client_with_loop(link: weakref.ref[ClientLink]) -> AsyncGenerator[None, None]:
    """Close the client when the event loop ends, as above; or earlier, when this is closed."""
    try:
        yield
    finally:
        owner = link()
        if owner is not None and owner.loop is asyncio.get_running_loop():
            await owner.close_client()


class ClientLink:
    """Calls of one event loop through a client of the driver: a cluster's, or one passed in.

    A failure is returned as an exception object.

    Args:
        address: makes the client.
        limits: the store's limits; calls of one node beyond ``max_connections`` wait.
    """

    def __init__(self, address: Address, limits: Limits) -> None:
        self.loop = asyncio.get_running_loop()
        assert address.client is not None
        self._client = address.client()
        self._shared = address.shared
        self._limits = limits
        # By name of a node: one that hangs must not take the places of those that do not.
        self._places: dict[str, asyncio.Semaphore] = {}
        self._running: set[asyncio.Task[Any]] = set()
        self._guard: AsyncGenerator[None, None] | None = None
        self._closed = False

    async def connect(self, key: bytes) -> Any:
        """Return a connection of the driver to the server that has this key."""
        client = self._client
        await self._begin()
        if not hasattr(client, "get_node_from_key"):
            connection = client.connection_pool.make_connection()
        else:
            await self._apart(client.initialize())
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
        await self._begin()
        if not hasattr(client, "get_node_from_key"):
            return [""] * len(keys)
        self._look_anew()
        async with self._limits.clock.timeout(self._limits.connect_timeout + self._limits.timeout):
            await self._apart(client.initialize())
        return [str(client.get_node_from_key(key.decode()).name) for key in keys]

    def _look_anew(self) -> None:
        """Have the driver ask who has which keys before the next call, as its own errors do."""
        if hasattr(self._client, "get_node_from_key"):
            self._client._initialize = True  # noqa: SLF001

    def _ask_last(self, command: Command) -> None:
        """Have the driver ask others before the node that a command hung at: all calls wait for
        the answer.
        """
        hung = self._node_of(command)
        if hung:
            manager = self._client.nodes_manager
            manager.startup_nodes = _last(manager.startup_nodes, hung)
            manager.nodes_cache = _last(manager.nodes_cache, hung)
            if not self._shared:
                self._client.hung = hung

    def _node_of(self, command: Command) -> str:
        """Return the name of the node that has a command's key; empty as long as none is known."""
        key = command[3 if command[0] in ("EVAL", "EVALSHA") else 1] if len(command) > 1 else None
        if isinstance(key, bytes) and hasattr(self._client, "get_node_from_key"):
            with suppress(Exception):  # the driver knows no nodes yet
                return str(self._client.get_node_from_key(key.decode()).name)
        return ""

    def send_now(self, packed: bytes) -> None:
        """Return None: a client takes no packed commands."""

    def read_now(self, key: bytes) -> None:
        """Return None: a client reads no keys together."""

    async def call(self, command: Command) -> Any:
        """Send one command and return its reply."""
        limits, node = self._limits, self._node_of(command)
        places = self._places.get(node)
        if places is None:
            places = self._places[node] = asyncio.Semaphore(limits.max_connections)
        try:
            async with limits.clock.timeout(limits.connect_timeout + limits.timeout):
                await places.acquire()
        except TimeoutError as exc:
            return not_sent(exc)
        if self._closed:
            places.release()
            return not_sent(ClosedError("this store was closed; build a new one"))
        return await self._send(command, places.release)

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
        """Have the driver send a command; only when that has ended its place is free."""
        try:
            return await self._apart(self._execute(command), ended)
        except ConnectionLostError as exc:
            return exc

    async def _apart(
        self, work: Coroutine[Any, Any, T], ended: Callable[[], object] | None = None
    ) -> T:
        """Do a step of the driver in a task of its own.

        The driver's clients now and then swallow a cancellation. Here the caller leaves at once,
        and what was begun ends by itself.
        """
        task = self.loop.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._over)
        if ended is not None:
            task.add_done_callback(lambda _: ended())
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError:
            task.cancel()
            raise
        if task.cancelled():
            raise ConnectionLostError
        return task.result()

    def _over(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # seen: its caller may be gone

    async def _begin(self) -> None:
        """See to it that a client of our own is closed when the event loop ends."""
        if self._guard is None and not self._shared:
            self._guard = _close_client_with_loop(weakref.ref(self))
            await anext(self._guard)

    async def _execute(self, command: Command) -> Any:
        await self._begin()
        try:
            async with self._limits.clock.timeout(self._limits.timeout):
                return await self._client.execute_command(*command)
        except Exception as exc:  # noqa: BLE001  the store translates it
            if type(exc).__name__ == "NoScriptError":
                return ReplyError("NOSCRIPT")
            if isinstance(exc, TimeoutError):
                # The driver was cut off and learned nothing: another may have these keys by now.
                self._ask_last(command)
                self._look_anew()
            return exc

    async def aclose(self) -> None:
        """Close what the link opened, after the calls under way."""
        self._closed = True
        for seconds in (self._limits.timeout, _STOP_SECONDS):
            if self._running:
                with suppress(TimeoutError):
                    async with self._limits.clock.timeout(seconds):
                        await asyncio.wait(set(self._running))
            # One that went on would connect anew, and nobody would close that.
            for task in self._running:
                task.cancel()
        if self._guard is not None:
            await self._guard.aclose()
        elif not self._shared:
            await self.close_client()

    def abandon(self) -> None:
        """Close from another event loop, as far as this one still runs."""
        if not self._shared:
            with suppress(RuntimeError):  # it was closed
                self.loop.call_soon_threadsafe(self._begin_to_close)

    def _begin_to_close(self) -> None:
        task = self.loop.create_task(self.close_client())
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def close_client(self) -> None:
        """Close the client, whether or not calls are under way."""
        if hasattr(self._client, "get_node_from_key"):
            # Told to look anew, it would take itself for closed already.
            self._client._initialize = False  # noqa: SLF001
        await self._client.aclose()


def _last(nodes: dict[str, Any], name: str) -> dict[str, Any]:
    return dict(sorted(nodes.items(), key=lambda item: item[0] == name))


def _fail(waiting: _Waiting, cause: Exception) -> None:
    for future in waiting.futures:
        if not future.done():
            future.set_result(not_sent(cause))
