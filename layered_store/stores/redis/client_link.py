"""How calls of one event loop reach Redis through a client of the driver."""

from __future__ import annotations

import asyncio
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar

from layered_store.errors import ClosedError
from layered_store.stores.redis.failures import ConnectionLostError, ReplyError, not_sent

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence

    from layered_store.stores.redis.address import Address
    from layered_store.stores.redis.links import Limits
    from layered_store.stores.redis.wire import Command

__all__ = ["ClientLink"]

T = TypeVar("T")

_MOVING_SECONDS: Final = 0.01
"""How long to wait for a slot that is just between two nodes."""

_STOP_SECONDS: Final = 0.25
"""How long a call through a client may take to end when it is cut off."""


async def _close_client_with_loop(link: weakref.ref[ClientLink]) -> AsyncGenerator[None, None]:
    """Close the client when the event loop ends, as lanes are; or earlier, when this is closed."""
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
                return await self._execute_wherever(command)
        except Exception as exc:  # noqa: BLE001  the store translates it
            if type(exc).__name__ == "NoScriptError":
                return ReplyError("NOSCRIPT")
            if isinstance(exc, TimeoutError):
                # The driver was cut off and learned nothing: another may have these keys by now.
                self._ask_last(command)
                self._look_anew()
            return exc

    async def _execute_wherever(self, command: Command) -> Any:
        """Send a command again while the nodes send it to and fro, which did nothing yet.

        A slot that moves is for a moment nobody's: each of two nodes names the other, and the
        driver gives up after 16 of them.
        """
        while True:
            try:
                return await self._client.execute_command(*command)
            except Exception as exc:
                if type(exc).__name__ != "ClusterError" or "TTL exhausted" not in str(exc):
                    raise
            self._look_anew()
            await self._limits.clock.sleep(_MOVING_SECONDS)

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
