"""A Redis store as the shared cache tier of several processes.

Every script of the protocol begins with the run id of the server that it was loaded on.
A server that was restarted, restored or failed over to does not know that script (scripts are
neither saved nor replicated), answers NOSCRIPT, and cannot be mistaken for the one before.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from layered_store.codec import CodecError
from layered_store.coherence import scripts
from layered_store.coherence.contract import (
    CacheTier,
    Holders,
    Notice,
    Pass,
    Ticket,
    TierRead,
    Versioned,
)
from layered_store.coherence.tombstones import TOMBSTONE_SECONDS
from layered_store.errors import StoreError, UnavailableError
from layered_store.running import running_loop
from layered_store.stores.redis.failures import ConnectionLostError, GarbageError
from layered_store.stores.redis.record import (
    FILLED,
    HEADER_BYTES,
    MAGIC,
    MAX_VERSION,
    STATE,
    TOKEN,
    TOMBSTONE,
    pack,
    unpack,
)
from layered_store.stores.redis.scripts import RedisScript

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Iterable, Mapping, Sequence

    from layered_store.coherence.contract import Change
    from layered_store.identity import digest_function
    from layered_store.stores.redis.store import RedisStore

__all__ = ["RedisTier"]

T = TypeVar("T")

_TOKEN_MS: Final = 10_000
"""Life of a token: far longer than a load takes; one that is gone only costs a fill."""

_COPY_MS: Final = int(TOMBSTONE_SECONDS * 1000)
"""Life of a copy when the store has no ``ttl``: no longer than tombstones are kept."""

_STEP_SECONDS: Final = 1.0
"""How far the server's clock may be set forward: a lease that looks ended may run for so long."""

_LOCK_MS: Final = 750
"""How long one process repairs alone: three passes."""

_REPAIR_KEYS: Final = 500
"""How many copies one script repairs: about 1 ms of the server."""

_SILENCE_SECONDS: Final = 2.0
"""How long a channel may be silent: six echoes."""

_FORGETS_SINCE: Final = 7
"""Since this Redis scripts are known to the one server run that was given them."""

_SHARDED_SINCE: Final = 7
"""Since this Redis a cluster has channels that belong to a slot."""

_READ: Final = "return redis.call('MGET', unpack(KEYS))"
_NAMES: Final = ("READ", *(name for name in scripts.__all__ if name.isupper()))
_SOURCES: Final = {name: getattr(scripts, name, _READ) for name in _NAMES}


class _Bound:
    """The scripts as loaded on one run of one server."""

    __slots__ = ("server", "sha", "sources")

    def __init__(self, server: str, *, sharded: bool, forgets: bool) -> None:
        self.server = server.encode()
        self.sources = {
            name: RedisScript(
                scripts.source(_SOURCES[name], server, sharded=sharded, forgets=forgets)
            )
            for name in _NAMES
        }
        self.sha = {name: script.sha for name, script in self.sources.items()}


_BATCH: Final = 256
"""Most copies that one script reads."""

_EARLY: Final = 32
"""How many reads do not wait for the end of the turn when no others are under way."""

_STATES: Final = frozenset({STATE, FILLED})
_NO_IDS: Final = HEADER_BYTES + 1
"""Where the snapshot of a copy begins: copies hold no write ids."""


class _Batch:
    """Reads of one bucket that began in one turn of the event loop: they share a script."""

    __slots__ = ("futures", "keys")

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self.futures: list[asyncio.Future[Any]] = []

    def deliver(self, done: asyncio.Future[Any]) -> None:
        """Hand each read the guard and its copy, or what went wrong with all."""
        reply: Any = ConnectionLostError() if done.cancelled() else done.exception()
        if reply is None:
            reply = done.result()
        if isinstance(reply, list) and len(reply) == len(self.keys) + 1:
            guard = reply[0]
            results: list[Any] = [(guard, value) for value in reply[1:]]
        else:
            results = [reply if isinstance(reply, Exception) else GarbageError()] * len(self.keys)
        for future, result in zip(self.futures, results, strict=True):
            if not future.done():
                future.set_result(result)


class _Part(NamedTuple):
    """What one bucket told when a repair pass began."""

    began: int
    generation: bytes
    cursor: str
    number: int


class RedisTier(CacheTier):
    """See :class:`CacheTier`; one guard, register and repair record per bucket of the store.

    In a cluster each bucket keeps its own: nodes are lost and come back one by one. A pass replays
    from the oldest cursor of all buckets, a lease takes the echo of every bucket.

    Args:
        store: where the copies are kept, under the keys of its records.
    """

    def __init__(self, store: RedisStore) -> None:
        self._store = store
        self._bound: dict[str, _Bound] = {}
        self._binding: dict[str, asyncio.Task[_Bound]] = {}
        self._parts: dict[str, _Part] = {}
        self._began = 0.0
        self._batches: dict[tuple[asyncio.AbstractEventLoop, str, _Bound], _Batch] = {}
        self._out: set[_Batch] = set()
        # By bucket and server run: up to where its messages were taken in, on that server's clock.
        self._seen: dict[tuple[str, bytes], int] = {}
        # By number of a ping: the buckets whose echo has come.
        self._echoes: dict[int, set[str]] = {}

    @property
    def digest(self) -> digest_function:
        return self._store.digest

    @property
    def tier_name(self) -> str:
        return self._store.name

    @property
    def has_channel(self) -> bool:
        return True

    # Reading and filling

    async def read(self, user_id: str) -> TierRead:
        digest, bucket = self._place(user_id)
        reads = self._store.reads
        try:
            bound = self._bound.get(bucket) or await self._bind(bucket)
            reply = await self._begin(bucket, bound, self._store.key(digest))
            if isinstance(reply, StoreError):
                raise reply.fresh()  # each of those who read together has an error of its own
            if isinstance(reply, Exception):
                raise self._refused(
                    bound, self._store.refusal(reply, "command"), reply
                ) from reply
            read = self._read(user_id, bound.server, *reply)
        except Exception as exc:
            reads.failed(exc)
            raise
        if read.found is None:
            reads.miss += 1
        elif read.found.snapshot is None:
            reads.negative_hit += 1
        else:
            reads.hit += 1
        return read

    async def read_many(self, user_ids: Sequence[str]) -> Mapping[str, TierRead]:
        # Calls of one turn of the loop share a round trip, so each is simply made.
        reads = await asyncio.gather(
            *(self.read(user_id) for user_id in user_ids), return_exceptions=True
        )
        for read in reads:
            if isinstance(read, BaseException):
                raise read
        return dict(zip(user_ids, reads, strict=True))  # type: ignore[arg-type]

    def _begin(self, bucket: str, bound: _Bound, key: bytes) -> asyncio.Future[Any]:
        """Have a copy read with the others of this turn; the result is an exception or a pair."""
        loop = running_loop()
        batch = self._batches.get((loop, bucket, bound))
        if batch is None:
            batch = self._batches[loop, bucket, bound] = _Batch()
            loop.call_soon(self._send, loop, bucket, bound)
        future = loop.create_future()
        batch.keys.append(key)
        batch.futures.append(future)
        count = len(batch.keys)
        if count == _BATCH or (count == _EARLY and not self._out):
            self._send(loop, bucket, bound)
        return future

    def _send(self, loop: asyncio.AbstractEventLoop, bucket: str, bound: _Bound) -> None:
        batch = self._batches.pop((loop, bucket, bound), None)
        if batch is None or all(future.done() for future in batch.futures):
            return
        args = ("EVALSHA", bound.sha["READ"], len(batch.keys) + 1, self._guard(bucket))
        try:
            reply = self._store.begin(args, batch.keys)
        except StoreError as exc:  # it was closed meanwhile
            reply = loop.create_future()
            reply.set_result(exc)
        self._out.add(batch)
        reply.add_done_callback(partial(self._arrived, batch))

    def _arrived(self, batch: _Batch, reply: asyncio.Future[Any]) -> None:
        self._out.discard(batch)
        batch.deliver(reply)

    def _read(self, user_id: str, server: bytes, guard: Any, value: Any) -> TierRead:
        if guard is None or guard[16:] != server:
            return TierRead()
        if (
            value is not None
            and value[:3] == MAGIC
            and value[3:4] in _STATES
            and value[12:_NO_IDS] == guard[:16] + b"\x00"
            and (version := int.from_bytes(value[4:12], "big")) <= MAX_VERSION
        ):
            try:
                snapshot = self._store.codec.decode(value[_NO_IDS:], user_id)
            except CodecError:
                self._store.note_corrupt()
                return TierRead(trusted=True)
            return TierRead(Versioned(version, snapshot), trusted=True)
        record = unpack(value)
        if record is None and value is not None:
            self._store.note_corrupt()
        if record is None or record.generation != guard[:16] or record.kind != TOMBSTONE:
            return TierRead(trusted=True)
        return TierRead(Versioned(record.version, None), trusted=True)

    async def read_stale(self, user_id: str, seconds: float) -> Versioned | None:
        digest, bucket = self._place(user_id)
        keys = (self._store.key(digest), self._repair(bucket))
        record = unpack(await self._run(bucket, "STALE", keys, int(seconds * 1000)))
        if record is None or record.kind not in (STATE, FILLED):
            return None
        try:
            snapshot = self._store.codec.decode(record.body, user_id)
        except CodecError:
            self._store.note_corrupt()
            return None
        self._store.reads.stale += 1
        return Versioned(record.version, snapshot)

    async def ticket(self, user_id: str) -> Ticket | None:
        digest, bucket = self._place(user_id)
        token = MAGIC + TOKEN + bytes(8) + os.urandom(16)
        keys = (self._store.key(digest), self._guard(bucket))
        reply = await self._run(bucket, "TICKET", keys, token, _TOKEN_MS)
        return Ticket(reply[0], reply[1]) if reply else None

    async def fill(self, user_id: str, record: Versioned, ticket: Ticket) -> None:
        if not ticket.token:
            return
        digest, bucket = self._place(user_id)
        keys = (self._store.key(digest), self._guard(bucket))
        value = self._value(FILLED, record, ticket.generation)
        await self._run(bucket, "FILL", keys, ticket.token, ticket.generation, value, self._life)

    # Writing and erasing

    async def put(self, user_id: str, record: Versioned, ticket: Ticket | None) -> None:
        digest, bucket = self._place(user_id)
        keys = (self._store.key(digest), self._guard(bucket))
        token, generation = ticket or Ticket(b"", bytes(16))
        await self._run(
            bucket,
            "PUT",
            keys,
            record.version,
            token,
            generation,
            self._value(STATE, record, generation),
            self._life,
            self._channel(bucket),
            int(record.snapshot is None),
            digest,
        )

    async def bury(self, user_id: str, version: int, me: str) -> Holders:
        digest, bucket = self._place(user_id)
        tombstone = pack(TOMBSTONE, version)
        reply = await self._run(
            bucket,
            "BURY",
            (self._store.key(digest), self._guard(bucket), self._register(bucket)),
            version,
            tombstone[:12],
            tombstone[28:],
            self._life,
            self._channel(bucket),
            digest,
        )
        return _holders(reply, me)

    async def holders(self, user_id: str, me: str) -> Holders:
        _, bucket = self._place(user_id)
        return _holders(await self._run(bucket, "HOLDERS", (self._register(bucket),)), me)

    # Repair

    async def begin(self, me: str, head: str) -> Pass | None:
        self._parts = {}
        self._began = self._store.clock.monotonic()
        parts: dict[str, _Part] = {}

        async def ask(bucket: str) -> bool:
            keys = (self._guard(bucket), self._repair(bucket), self._lock(bucket))
            args = (me, head, _LOCK_MS, _new_generation(), self._channel(bucket))
            reply = await self._run(bucket, "BEGIN", keys, *args)
            if reply:
                began, generation, cursor, number = reply
                parts[bucket] = _Part(int(began), generation, cursor.decode(), number)
            return bool(reply)

        first, *others = self._store.buckets
        # Who holds the first bucket's lock repairs them all.
        if not await ask(first) or not all(await _together(map(ask, others))):
            return None
        # A new generation begins at the head; of the others the oldest cursor counts, and the
        # number of the pass that left it tells which that is.
        known = [part for part in parts.values() if part.number]
        oldest = min(known or parts.values(), key=lambda part: part.number)
        self._parts = {bucket: parts[bucket] for bucket in self._store.buckets}
        generation = b"".join(part.generation for part in self._parts.values())
        began = min(part.began for part in self._parts.values()) / 1000
        return Pass(began, generation, oldest.cursor, not known, me)

    async def renew(self, generation: bytes, head: str) -> None:
        old = [generation[at : at + 16] for at in range(0, len(generation), 16)]
        number = self._next_number()

        async def renew(bucket: str, before: bytes) -> None:
            keys = (self._guard(bucket), self._repair(bucket))
            args = (before, _new_generation(), head, number, self._channel(bucket))
            await self._run(bucket, "RENEW", keys, *args)

        await _together(map(renew, self._store.buckets, old))

    async def repair(self, changes: Sequence[Change]) -> Sequence[Change]:
        by_bucket: dict[str, list[Change]] = {}
        for change in changes:
            by_bucket.setdefault(self._store.bucket_of(change.digest), []).append(change)

        async def repair(bucket: str, group: list[Change]) -> list[Change]:
            args: list[Any] = [self._channel(bucket)]
            for change in group:
                args += [change.version, int(change.erased), change.digest]
            keys = [self._store.key(change.digest) for change in group]
            return [group[index] for index in await self._run(bucket, "REPAIR", keys, *args)]

        # Scripts of bounded length: a server does nothing else meanwhile.
        groups = [
            (bucket, group[at : at + _REPAIR_KEYS])
            for bucket, group in by_bucket.items()
            for at in range(0, len(group), _REPAIR_KEYS)
        ]
        acted = await _together(repair(*group) for group in groups)
        return [change for group in acted for change in group]

    async def stamp(self, begun: Pass, cursor: str, seconds: float) -> bool:
        number = self._next_number()
        # On our own clock too, since those of the servers may have been set back meanwhile.
        left = max(0.0, seconds - (self._store.clock.monotonic() - self._began))

        async def stamp(bucket: str, part: _Part) -> bool:
            keys = (self._guard(bucket), self._repair(bucket), self._lock(bucket))
            # Each on the clock of its own server.
            until = part.began + int(seconds * 1000)
            reply = await self._run(
                bucket,
                "STAMP",
                keys,
                begun.owner,
                part.generation,
                cursor,
                until,
                number,
                int(left * 1000),
                _LOCK_MS,
                part.number,
            )
            return bool(reply)

        stamped = all(await _together(stamp(*item) for item in self._parts.items()))
        # Each cursor has a number of its own: a bucket that loses its newest must not look like
        # one that has it.
        self._parts = {key: part._replace(number=number) for key, part in self._parts.items()}
        return stamped

    def _next_number(self) -> int:
        return max((part.number for part in self._parts.values()), default=0) + 1

    # Channel

    async def ping(self, me: str, seconds: float, seen: float, number: int) -> float:
        # What was seen is kept here by bucket: in a cluster each server has a clock of its own.
        del seen

        async def ping(bucket: str) -> int:
            server = (await self._bind(bucket)).server
            keys = (self._register(bucket), self._guard(bucket))
            reply = await self._run(
                bucket,
                "PING",
                keys,
                me,
                int(seconds * 1000),
                self._seen.get((bucket, server), 0),
                number,
                self._channel(bucket),
            )
            return int(reply)

        # Believed is only what every bucket's server vouches for.
        return max(0, min(await _together(map(ping, self._store.buckets)))) / 1000

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[AsyncIterator[Notice]]:
        messages: asyncio.Queue[tuple[str, bytes, _Message] | StoreError] = asyncio.Queue()
        readers: list[asyncio.Task[None]] = []
        self._seen.clear()
        self._echoes.clear()
        async with AsyncExitStack() as connections:
            try:
                for group in await self._store.group_buckets():
                    connection = await self._store.new_connection(group[0])
                    connections.push_async_callback(connection.disconnect, nowait=True)
                    server = await self._subscribe(connection, group)
                    reading = self._read_channel(connection, server, group, messages)
                    readers.append(asyncio.create_task(reading))
                yield self._notices(messages)
            finally:
                for reader in readers:
                    reader.cancel()
                await asyncio.gather(*readers, return_exceptions=True)

    async def _subscribe(self, connection: Any, group: Sequence[str]) -> bytes:
        """Subscribe to the channels of buckets of one server; return its run."""
        server, _ = _server(await self._ask(connection, "INFO", "server"))
        command = "SSUBSCRIBE" if self._store.is_cluster else "SUBSCRIBE"
        for bucket in group:
            await self._ask(connection, command, self._channel(bucket))
        return server.encode()

    async def _read_channel(
        self,
        connection: Any,
        server: bytes,
        group: Sequence[str],
        messages: asyncio.Queue[tuple[str, bytes, _Message] | StoreError],
    ) -> None:
        """Pass on what one server says, until it is no longer the one who says it all."""
        buckets = {self._channel(bucket): bucket for bucket in group}
        kind = b"smessage" if self._store.is_cluster else b"message"
        try:
            while True:
                # The echoes keep it busy: a silent channel is one that was lost.
                reply = await self._guarded(connection.read_response(timeout=_SILENCE_SECONDS))
                if reply is None or bytes(reply[0]) != kind:
                    raise self._lost()  # silent, or the bucket went to another server
                message = _parse(bytes(reply[2]))
                if message is None:
                    continue
                if message.server != server:
                    # Handed on by another server, so neither in order nor surely whole.
                    raise self._lost()
                messages.put_nowait((buckets[bytes(reply[1])], server, message))
        except StoreError as exc:
            messages.put_nowait(exc)

    async def _notices(
        self, messages: asyncio.Queue[tuple[str, bytes, _Message] | StoreError]
    ) -> AsyncIterator[Notice]:
        while True:
            item = await messages.get()
            if isinstance(item, StoreError):
                raise item
            bucket, server, message = item
            sent = message.sent / 1000
            if message.echo:
                if self._echoed(bucket, message.number):
                    yield Notice(b"", message.number, sent=sent, echo=message.body.decode())
            else:
                yield Notice(message.body, message.number, message.erased, sent)
            # Only now it was taken in. It may be earlier than before: clocks are set.
            self._seen[bucket, server] = message.sent

    def _echoed(self, bucket: str, number: int) -> bool:
        """Note the echo of one bucket; tell whether all have come."""
        came = self._echoes.setdefault(number, set())
        came.add(bucket)
        for old in [each for each in self._echoes if each < number - 8]:
            del self._echoes[old]
        return len(came) == len(self._store.buckets)

    def _lost(self) -> UnavailableError:
        return UnavailableError("the invalidation channel was lost", layer=self._store.name)

    # How scripts are run

    async def _run(self, bucket: str, name: str, keys: Sequence[bytes], *args: Any) -> Any:
        bound = self._bound.get(bucket) or await self._bind(bucket)
        write = name in ("PUT", "BURY")
        try:
            return await self._store.command(
                "EVALSHA", bound.sha[name], len(keys), *keys, *args, write=write
            )
        except StoreError as exc:
            refused = self._refused(bound, exc, exc.__cause__)
            if refused is exc:
                raise
            raise refused from exc

    def _refused(
        self, bound: _Bound, error: StoreError, cause: BaseException | None
    ) -> StoreError:
        """Return the error to raise, after forgetting scripts that the server does not know."""
        if getattr(cause, "code", "") != "NOSCRIPT":
            return error
        # Another server run, or its scripts were flushed: then all its buckets' are gone.
        for each in [each for each, other in self._bound.items() if other is bound]:
            del self._bound[each]
        return UnavailableError(
            "the server of the cache tier changed; it is repaired before it is believed",
            layer=self._store.name,
        )

    async def _bind(self, bucket: str) -> _Bound:
        """Load the scripts on the server that answers for a bucket now, once per server run."""
        bound = self._bound.get(bucket)
        if bound is not None:
            return bound
        loop = asyncio.get_running_loop()
        task = self._binding.get(bucket)
        if task is None or task.get_loop() is not loop:
            # A task of its own: it serves all who wait, and a caller may be cancelled.
            task = loop.create_task(self._load(bucket), context=contextvars.Context())
            self._binding[bucket] = task
            task.add_done_callback(lambda done: self._loaded(bucket, done))
        return await asyncio.shield(task)

    def _loaded(self, bucket: str, task: asyncio.Task[_Bound]) -> None:
        if self._binding.get(bucket) is task:
            del self._binding[bucket]
        if not task.cancelled():
            task.exception()  # seen: whoever waited for it may be gone

    async def _load(self, bucket: str) -> _Bound:
        connection = await self._store.new_connection(bucket)
        try:
            # One connection, so that the id and the scripts belong to the same run.
            server, version = _server(await self._ask(connection, "INFO", "server"))
            known = server.encode()
            bound = next((each for each in self._bound.values() if each.server == known), None)
            if bound is None:
                major = version[0]
                sharded = self._store.is_cluster
                if sharded and major < _SHARDED_SINCE:
                    raise UnavailableError(
                        "a cluster as a shared cache tier needs Redis 7 (sharded channels)",
                        layer=self._store.name,
                        retryable=False,
                    )
                bound = _Bound(server, sharded=sharded, forgets=major >= _FORGETS_SINCE)
                for script in bound.sources.values():
                    await self._ask(connection, "SCRIPT", "LOAD", script.source)
        finally:
            await connection.disconnect(nowait=True)
        self._bound[bucket] = bound
        return bound

    async def _ask(self, connection: Any, *command: Any) -> Any:
        """Send a command on a connection of our own and return its reply."""
        await self._guarded(connection.send_command(*command))
        return await self._guarded(connection.read_response())

    async def _guarded(self, work: Any) -> Any:
        """Await a step of the driver, turning its errors into ours."""
        try:
            return await work
        except Exception as exc:
            raise self._store.refusal(exc, "command") from exc

    # Names

    def _place(self, user_id: str) -> tuple[bytes, str]:
        digest = self._store.digest(user_id)
        return digest, self._store.bucket_of(digest)

    def _value(self, kind: bytes, record: Versioned, generation: bytes) -> bytes:
        if record.snapshot is None:
            return pack(TOMBSTONE, record.version, generation=generation)
        body = self._store.codec.encode(record.snapshot)
        return pack(kind, record.version, body, generation=generation)

    @property
    def _life(self) -> int:
        ttl = self._store.ttl_ms
        return min(ttl, _COPY_MS) if ttl else _COPY_MS

    def _guard(self, bucket: str) -> bytes:
        return self._store.bucket_key(bucket, "guard")

    def _register(self, bucket: str) -> bytes:
        return self._store.bucket_key(bucket, "leases")

    def _repair(self, bucket: str) -> bytes:
        return self._store.bucket_key(bucket, "repair")

    def _lock(self, bucket: str) -> bytes:
        return self._store.bucket_key(bucket, "repairer")

    def _channel(self, bucket: str) -> bytes:
        return self._store.bucket_key(bucket, "channel")


class _Message(NamedTuple):
    """One message as a script publishes it: ``kind|sent|number|erased|server|body``."""

    echo: bool
    sent: int
    number: int
    erased: bool
    server: bytes
    body: bytes


def _parse(data: bytes) -> _Message | None:
    parts = data.split(b"|", 5)
    if len(parts) != 6 or parts[0] not in (b"i", b"p"):  # noqa: PLR2004
        return None
    kind, sent, number, erased, server, body = parts
    try:
        return _Message(kind == b"p", int(sent), int(number), erased == b"1", server, body)
    except ValueError:
        return None


async def _together(work: Iterable[Awaitable[T]]) -> list[T]:
    """Await all, then raise the first failure: nothing is left running behind it."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results  # type: ignore[return-value]


def _server(info: Any) -> tuple[str, tuple[int, ...]]:
    """Return the run id and the version that INFO tells."""
    text = info.decode() if isinstance(info, bytes | bytearray) else str(info)
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    try:
        version = tuple(int(part) for part in fields["redis_version"].split("."))
        return fields["run_id"], version
    except (KeyError, ValueError):
        raise UnavailableError(
            "the server does not tell its run id; INFO must be allowed"
        ) from None


def _holders(reply: Any, me: str) -> Holders:
    now, born, pairs = float(reply[0]) / 1000, float(reply[1]) / 1000, reply[2]
    others = {}
    for name, value in zip(pairs[::2], pairs[1::2], strict=True):
        until, bar, seen = value.partition(b"|")
        if not (bar and until.isdigit() and seen.isdigit()) or name == me.encode():
            continue  # not a lease, or our own
        if float(until) / 1000 > now - _STEP_SECONDS:
            others[name.decode()] = (float(until) / 1000, float(seen) / 1000)
    return Holders(now, now - born, others)


def _new_generation() -> bytes:
    # Not two zeros in front: that is how a record tells that no tier wrote it.
    return b"\x01" + os.urandom(16)[1:]
