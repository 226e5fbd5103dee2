"""Redis servers that run the shipped Lua scripts, and the shipped store connected to them."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import hiredis
import lupa.lua51

from layered_store.stores.redis import RedisStore
from layered_store.stores.redis.failures import ConnectionLostError, ReplyError
from layered_store.stores.redis.wire import pack_command
from tests.simulation.clocks import WallClock
from tests.simulation.loop import Process
from tests.simulation.network import CutError, Network, Server

__all__ = ["ModelRedis", "Nodes", "RedisServer"]

_LUA = lupa.lua51.LuaRuntime(encoding=None, unpack_returned_tuples=True)
_COMPILED: dict[bytes, Any] = {}
_WRONG_TYPE = "WRONGTYPE wrong kind of value"


def _raw(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).encode()


class RedisServer(Server):
    """The server: what it holds, who listens, and what it was like before.

    Args:
        network: carries what it says to those who listen.
        clock: what TIME tells and what expires follows.
        number: of a cluster's nodes.
    """

    def __init__(self, network: Network, clock: WallClock, number: int = 0) -> None:
        super().__init__(f"redis{number or ''}")
        self._network = network
        self.clock = clock
        self.number = number
        # Key to (value, when it expires or None); a value is bytes, a dict or a list.
        self.data: dict[bytes, tuple[Any, float | None]] = {}
        self.scripts: set[bytes] = set()
        self.listeners: dict[bytes, list[Connection]] = {}
        self.connections: list[Connection] = []
        self.run = 1

    @property
    def run_id(self) -> str:
        """The run id, 40 hexadecimal digits."""
        return f"{self.number:08x}{self.run:032x}"

    # What happens to it

    def copy(self) -> dict[bytes, tuple[Any, float | None]]:
        """Return a dump."""
        return {
            key: (value.copy() if isinstance(value, dict | list) else value, until)
            for key, (value, until) in self.data.items()
        }

    def crash(self) -> None:
        """Die: connections break, scripts are gone."""
        self.mode = "refuse"
        self.run += 1
        self.scripts.clear()
        for connection in list(self.connections):
            connection.break_off()

    def start(self, dump: dict[bytes, tuple[Any, float | None]]) -> None:
        """Come up again from a dump."""
        self.data = dump
        self.mode = "up"

    def evict(self, key: bytes) -> None:
        """Drop one key, as a full server does."""
        self.data.pop(key, None)

    # Commands

    def execute(self, command: Sequence[Any]) -> Any:
        """Run one command; an error reply is returned as an exception."""
        name = _raw(command[0]).upper()
        if name in (b"EVALSHA", b"EVAL"):
            source = _raw(command[1])
            if name == b"EVAL":
                sha = hashlib.sha1(source, usedforsecurity=False).hexdigest().encode()
                self._load(sha, source)
                source = sha
            if source not in self.scripts:
                return ReplyError("NOSCRIPT No matching script")
            count = int(command[2])
            return self._script(source, command[3 : 3 + count], command[3 + count :])
        if name == b"SCRIPT":
            if _raw(command[1]).upper() == b"FLUSH":
                self.scripts.clear()
                return b"OK"
            source = _raw(command[2])
            sha = hashlib.sha1(source, usedforsecurity=False).hexdigest().encode()
            self._load(sha, source)
            return sha
        try:
            reply = self._command(name, [_raw(each) for each in command[1:]])
        except ReplyError as exc:
            return exc
        return reply["ok"] if isinstance(reply, dict) else reply

    def _load(self, sha: bytes, source: bytes) -> None:
        self.scripts.add(sha)
        if sha not in _COMPILED:
            _COMPILED[sha] = _LUA.compile(source)

    def _script(self, sha: bytes, keys: Sequence[Any], args: Sequence[Any]) -> Any:
        spaces = _LUA.globals()
        spaces[b"KEYS"] = _LUA.table(*(_raw(key) for key in keys))
        spaces[b"ARGV"] = _LUA.table(*(_raw(arg) for arg in args))
        spaces[b"redis"] = _LUA.table_from(
            {b"call": self._call, b"pcall": self._pcall, b"error_reply": _error_reply}
        )
        return _from_lua(_COMPILED[sha]())

    def _call(self, *command: Any) -> Any:
        return _to_lua(self._command(command[0].upper(), [_raw(each) for each in command[1:]]))

    def _pcall(self, *command: Any) -> Any:
        try:
            return self._call(*command)
        except ReplyError as exc:
            return _error_reply(exc.code.encode())

    def _get(self, key: bytes, kind: type) -> Any:
        found = self.data.get(key)
        if found is None:
            return None
        value, until = found
        if until is not None and until <= self.clock.time():
            del self.data[key]
            return None
        if not isinstance(value, kind):
            raise ReplyError(_WRONG_TYPE)
        return value

    def _hash(self, key: bytes) -> dict[bytes, bytes]:
        found = self._get(key, dict)
        if found is None:
            found = {}
            self.data[key] = (found, None)
        return found

    def _command(self, name: bytes, args: list[bytes]) -> Any:
        handler = _HANDLERS.get(name)
        if handler is None:
            raise ReplyError(f"ERR unknown command {name!r}")
        return handler(self, args)

    # The commands that scripts and stores use

    def _c_get(self, args: list[bytes]) -> Any:
        return self._get(args[0], bytes)

    def _c_mget(self, args: list[bytes]) -> Any:
        found = []
        for key in args:
            try:
                found.append(self._get(key, bytes))
            except ReplyError:
                found.append(None)
        return found

    def _c_set(self, args: list[bytes]) -> Any:
        until = None
        if len(args) > 2:
            assert args[2].upper() == b"PX", args
            until = self.clock.time() + int(args[3]) / 1000
            assert int(args[3]) > 0
        self.data[args[0]] = (args[1], until)
        return {"ok": b"OK"}

    def _c_del(self, args: list[bytes]) -> Any:
        return sum(self.data.pop(key, None) is not None for key in args)

    def _c_setrange(self, args: list[bytes]) -> Any:
        value = self._get(args[0], bytes)
        until = self.data[args[0]][1]
        at = int(args[1])
        value = value[:at] + args[2] + value[at + len(args[2]) :]
        self.data[args[0]] = (value, until)
        return len(value)

    def _c_pttl(self, args: list[bytes]) -> Any:
        if self._get(args[0], object) is None:
            return -2
        until = self.data[args[0]][1]
        return -1 if until is None else max(0, int((until - self.clock.time()) * 1000))

    def _c_pexpire(self, args: list[bytes]) -> Any:
        value = self._get(args[0], object)
        if value is None:
            return 0
        self.data[args[0]] = (value, self.clock.time() + int(args[1]) / 1000)
        return 1

    def _c_persist(self, args: list[bytes]) -> Any:
        value = self._get(args[0], object)
        if value is None:
            return 0
        self.data[args[0]] = (value, None)
        return 1

    def _c_type(self, args: list[bytes]) -> Any:
        value = self._get(args[0], object)
        names = {bytes: b"string", dict: b"hash", list: b"list"}
        return {"ok": b"none" if value is None else names[type(value)]}

    def _c_hset(self, args: list[bytes]) -> Any:
        held = self._hash(args[0])
        held.update(zip(args[1::2], args[2::2], strict=True))
        return 1

    def _c_hget(self, args: list[bytes]) -> Any:
        return (self._get(args[0], dict) or {}).get(args[1])

    def _c_hmget(self, args: list[bytes]) -> Any:
        held = self._get(args[0], dict) or {}
        return [held.get(field) for field in args[1:]]

    def _c_hgetall(self, args: list[bytes]) -> Any:
        held = self._get(args[0], dict) or {}
        return [each for pair in held.items() for each in pair]

    def _c_hlen(self, args: list[bytes]) -> Any:
        return len(self._get(args[0], dict) or {})

    def _c_hdel(self, args: list[bytes]) -> Any:
        held = self._get(args[0], dict) or {}
        return sum(held.pop(field, None) is not None for field in args[1:])

    def _c_lpush(self, args: list[bytes]) -> Any:
        found = self._get(args[0], list)
        if found is None:
            found = []
            self.data[args[0]] = (found, None)
        for value in args[1:]:
            found.insert(0, value)
        return len(found)

    def _c_ltrim(self, args: list[bytes]) -> Any:
        found = self._get(args[0], list)
        if found is not None:
            del found[int(args[2]) + 1 :]
        return {"ok": b"OK"}

    def _c_lrange(self, args: list[bytes]) -> Any:
        return (self._get(args[0], list) or [])[int(args[1]) : int(args[2]) + 1]

    def _c_time(self, _: list[bytes]) -> Any:
        whole, part = divmod(self.clock.time(), 1)
        return [b"%d" % whole, b"%d" % int(part * 1e6)]

    def _c_publish(self, args: list[bytes]) -> Any:
        listeners = list(self.listeners.get(args[0], ()))
        for connection in listeners:
            connection.push([b"message", args[0], args[1]])
        return len(listeners)

    def _c_spublish(self, args: list[bytes]) -> Any:
        listeners = list(self.listeners.get(args[0], ()))
        for connection in listeners:
            connection.push([b"smessage", args[0], args[1]])
        return len(listeners)

    def _c_info(self, _: list[bytes]) -> Any:
        return f"# Server\r\nredis_version:7.0.15\r\nrun_id:{self.run_id}\r\n".encode()

    def _c_ping(self, _: list[bytes]) -> Any:
        return {"ok": b"PONG"}


class Nodes:
    """The servers of one Redis, and which of them has which bucket of users.

    Args:
        network: between them and the processes.
        chance: decides how wrong their clocks are.
        count: 1, or the primaries of a cluster.
    """

    def __init__(self, network: Network, chance: random.Random, count: int = 1) -> None:
        self.servers = [RedisServer(network, WallClock(chance), n) for n in range(count)]
        self.owners = {f"{n:x}": server for n, server in enumerate(self.servers)}

    def of(self, key: bytes) -> RedisServer:
        """Return the server that has a key now."""
        return self.owners[key[key.index(b"{") + 1 : key.index(b"}")].decode()]

    def of_command(self, command: Sequence[Any]) -> RedisServer:
        """Return the server that a command belongs to."""
        name = _raw(command[0]).upper()
        at = 3 if name in (b"EVALSHA", b"EVAL") else 1
        return self.of(_raw(command[at])) if len(command) > at else self.servers[0]

    def move(self, bucket: str, to: RedisServer) -> None:
        """Hand a bucket to another server, with all its keys; those who listen are told."""
        old = self.owners[bucket]
        if old is to:
            return
        self.owners[bucket] = to
        ahead = to.clock.time() - old.clock.time()
        tag = b"{%s}:" % bucket.encode()
        for key in [key for key in old.data if tag in key]:
            value, until = old.data.pop(key)
            to.data[key] = (value, None if until is None else until + ahead)
        for channel in [channel for channel in old.listeners if tag in channel]:
            for connection in old.listeners.pop(channel):
                connection.push([b"sunsubscribe", channel, 0])


_HANDLERS: dict[bytes, Callable[[RedisServer, list[bytes]], Any]] = {
    name[3:].upper().encode(): method
    for name, method in vars(RedisServer).items()
    if name.startswith("_c_")
}


def _error_reply(text: bytes) -> Any:
    return _LUA.table_from({b"err": text})


def _to_lua(value: Any) -> Any:
    if value is None:
        return False
    if isinstance(value, list):
        return _LUA.table(*(_to_lua(each) for each in value))
    if isinstance(value, dict):
        return _LUA.table_from({key.encode(): each for key, each in value.items()})
    return value


def _from_lua(value: Any) -> Any:
    kind = lupa.lua51.lua_type(value)
    if kind == "table":
        if value[b"err"] is not None:
            return ReplyError(value[b"err"].decode())
        if value[b"ok"] is not None:
            return value[b"ok"]
        found = []
        index = 1
        while (each := value[index]) is not None:
            found.append(_from_lua(each))
            index += 1
        return found
    if value is False or value is None:
        return None
    if value is True:
        return 1
    return int(value) if isinstance(value, float) else value


def _wire(message: Any) -> bytes:
    if isinstance(message, ReplyError):
        return b"-%b\r\n" % message.code.encode()
    return pack_command(message)


class Connection:
    """A connection of its own, as the driver hands out; and its transport, once a feed has it."""

    def __init__(
        self, nodes: Nodes, server: RedisServer, network: Network, process: Process
    ) -> None:
        self._nodes = nodes
        self._server = server
        self._network = network
        self._process = process
        self._reader = SimpleNamespace(_buffer=b"")
        self._writer = SimpleNamespace(transport=self)
        self._protocol: asyncio.Protocol | None = None
        self._incoming: deque[Any] = deque()
        self._waiting: asyncio.Future[None] | None = None
        self._free_at = 0.0
        self._broken = False
        self._run = server.run
        # Nothing comes through and nobody is told.
        self.half_open = False
        server.connections.append(self)

    async def send_command(self, *command: Any) -> None:
        """Send a command; its reply is read in its turn."""
        if self._broken:
            raise ConnectionLostError
        name = _raw(command[0]).upper()

        def run() -> Any:
            if self._broken:
                raise CutError
            return self._server.execute(command)

        self._incoming.appendleft(await self._send(name, run))

    async def _send(self, name: bytes, run: Callable[[], Any]) -> Any:
        label = f"redis {name.decode().lower()}"
        try:
            async with asyncio.timeout(1.0):
                return await self._network.call(self._process, self._server, label, run)
        except (TimeoutError, CutError) as exc:
            self.break_off()
            raise ConnectionLostError from exc

    async def read_response(self, timeout: float | None = 1.0) -> Any:
        """Return the next reply or message; None when none came in time."""
        try:
            async with asyncio.timeout(timeout):
                while not self._incoming:
                    if self._broken:
                        raise ConnectionLostError
                    self._waiting = self._network.loop.create_future()
                    await self._waiting
        except TimeoutError:
            return None
        reply = self._incoming.popleft()
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def _subscribe(self, name: bytes, channel: bytes) -> None:
        def run() -> None:
            if self._broken:
                raise CutError
            if self._nodes.of(channel) is not self._server:
                self.push(ReplyError("MOVED to another node"))
                return
            self._server.listeners.setdefault(channel, []).append(self)
            self.push([name.lower(), channel, 1])

        with suppress(ConnectionLostError):
            await self._send(name, run)

    # The transport

    def set_protocol(self, protocol: asyncio.Protocol) -> None:
        """Tell this one from now on."""
        self._protocol = protocol

    def resume_reading(self) -> None:
        """Nothing was held back."""

    def is_closing(self) -> bool:
        """Whether it has ended."""
        return self._broken

    def write(self, data: bytes) -> None:
        """Send commands that subscribe, in their order."""
        reader = hiredis.Reader(notEnoughData=None)
        reader.feed(data)
        while command := reader.gets():
            self._network.loop.create_task(self._subscribe(*command))

    def abort(self) -> None:
        """End at once."""
        self.break_off()

    async def disconnect(self, *, nowait: bool = False) -> None:
        """Close."""
        del nowait
        self.break_off()

    def push(self, message: Any) -> None:
        """Have the server say something: in order, and some time later."""
        network, loop = self._network, self._network.loop
        delay = network.latency()
        if network.faults and network.chance.random() < network.faults:
            delay += network.slow()
        self._free_at = max(self._free_at, loop.time() + delay)

        def arrive() -> None:
            if self._broken or self.half_open or not self._process.alive:
                return
            if network.blocked(self._process, self._server) == "silent":
                # What was lost on the way keeps all that follows from arriving.
                self.half_open = True
                return
            if self._protocol is not None:
                with loop.inside(self._process):
                    self._protocol.data_received(_wire(message))

        with loop.inside(None):
            loop.call_at(self._free_at, arrive)

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            with self._network.loop.inside(self._process):
                self._waiting.set_result(None)

    def break_off(self) -> None:
        """End the connection, as seen from both sides."""
        if self._broken:
            return
        self._broken = True
        self._server.connections.remove(self)
        for listeners in self._server.listeners.values():
            if self in listeners:
                listeners.remove(self)
        self._wake()
        if self._protocol is not None:
            with self._network.loop.inside(self._process):
                self._network.loop.call_soon(self._protocol.connection_lost, None)

    @property
    def listens(self) -> bool:
        """Whether it is subscribed."""
        return any(self in each for each in self._server.listeners.values())


class _Link:
    def __init__(self, nodes: Nodes, network: Network, process: Process) -> None:
        self.loop = network.loop
        self._nodes = nodes
        self._network = network
        self._process = process

    def send_now(self, packed: bytes) -> None:
        del packed

    def read_now(self, key: bytes) -> None:
        del key

    async def call(self, command: Sequence[Any]) -> Any:
        names = _SCRIPT_NAMES.get(_raw(command[1])) if len(command) > 1 else None
        label = f"redis {names or _raw(command[0]).decode().lower()}"
        try:
            async with asyncio.timeout(0.5):
                # Whoever has the key when the command arrives: a cluster's nodes redirect.
                server = self._nodes.of_command(command)
                return await self._network.call(
                    self._process,
                    server,
                    label,
                    lambda: self._nodes.of_command(command).execute(command),
                )
        except TimeoutError as exc:
            return exc
        except CutError:
            return ConnectionLostError()

    async def call_all(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        return [await self.call(command) for command in commands]

    async def probe(self) -> Any:
        return await self.call(("PING",))

    async def connect(self, key: bytes) -> Any:
        server = self._nodes.of(key)
        reply = await self.call(("GET", key))
        if isinstance(reply, Exception):
            raise reply
        return Connection(self._nodes, server, self._network, self._process)

    async def owners(self, keys: Sequence[bytes]) -> list[str]:
        return [self._nodes.of(key).name for key in keys]

    async def aclose(self) -> None:
        return


_SCRIPT_NAMES: dict[bytes, str] = {}
"""What the log of a replay calls a script, by its digest."""


class ModelRedis(RedisStore):
    """The shipped store, whose link leads to the model.

    Args:
        nodes: the servers; a cluster's when there are several, each with one bucket at first.
        network: the way there.
        process: where the store is used.
        options: of :class:`RedisStore`.
    """

    def __init__(self, nodes: Nodes, network: Network, process: Process, **options: Any) -> None:
        self._model = _Link(nodes, network, process)
        scheme = "redis" if len(nodes.servers) == 1 else "redis+cluster"
        super().__init__(f"{scheme}://model:1", clock=process.clock, **options)
        # Fewer than the shipped 16, since each costs every ping and every pass a script.
        self._key_heads = {bucket: self._key_heads[bucket] for bucket in nodes.owners}
        self.buckets = tuple(nodes.owners)

    @property
    def name(self) -> str:
        return "RedisModel"

    def bucket_of(self, digest: bytes) -> str:
        return self.buckets[digest[0] % len(self.buckets)]

    def _link_here(self, operation: str) -> Any:
        del operation
        return self._model
