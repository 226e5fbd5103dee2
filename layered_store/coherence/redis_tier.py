"""A Redis store as the shared cache tier of several processes.

Every script of the protocol ends with the run id of the server that it was loaded on, as a comment.
A server that was restarted, restored or failed over to does not know that script (scripts are
neither saved nor replicated), answers NOSCRIPT, and cannot be mistaken for the one before.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

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
from layered_store.errors import StoreError, UnavailableError
from layered_store.stores.redis.record import (
    FILLED,
    MAGIC,
    STATE,
    TOKEN,
    TOMBSTONE,
    pack,
    unpack,
)
from layered_store.stores.redis.scripts import RedisScript

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from layered_store.coherence.contract import Change
    from layered_store.identity import digest_function
    from layered_store.stores.redis.store import RedisStore

__all__ = ["RedisTier"]

_TOKEN_MS: Final = 10_000
"""Life of a token: far longer than a load takes; one that is gone only costs a fill."""

_COPY_MS: Final = 7 * 86_400_000
"""Life of a copy when the store has no ``ttl``: no longer than tombstones are kept."""

_LOCK_MS: Final = 750
"""How long one process repairs alone: three passes."""

_READ: Final = "return redis.call('MGET', KEYS[1], KEYS[2])"
_NAMES: Final = ("READ", *scripts.__all__)
_SOURCES: Final = {name: getattr(scripts, name, _READ) for name in _NAMES}


class _Bound:
    """The scripts as loaded on one run of one server."""

    __slots__ = ("server", "sha")

    def __init__(self, server: bytes) -> None:
        self.server = server
        self.sha = {name: self.script(name).sha for name in _NAMES}

    def script(self, name: str) -> RedisScript:
        return RedisScript(f"{_SOURCES[name]}\n-- {self.server.decode()}")


class RedisTier(CacheTier):
    """See :class:`CacheTier`; one guard, register and repair record per bucket of the store.

    Args:
        store: where the copies are kept, under the keys of its records.
    """

    def __init__(self, store: RedisStore) -> None:
        self._store = store
        self._bound: dict[str, _Bound] = {}
        self._binding: dict[str, asyncio.Lock] = {}

    @property
    def digest(self) -> digest_function:
        return self._store.digest

    @property
    def tier_name(self) -> str:
        return self._store.name

    @property
    def has_channel(self) -> bool:
        # In a cluster a message may overtake the echo on its way between the nodes.
        return not self._store.is_cluster

    # Reading and filling

    async def read(self, user_id: str) -> TierRead:
        digest, bucket = self._place(user_id)
        reads = self._store.reads
        try:
            server = (await self._bind(bucket)).server
            keys = (self._guard(bucket), self._store.key(digest))
            read = self._read(user_id, server, await self._run(bucket, "READ", keys))
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

    def _read(self, user_id: str, server: bytes, reply: Any) -> TierRead:
        guard, value = reply
        if guard is None or guard[16:] != server:
            return TierRead()
        record = unpack(value)
        if record is None and value is not None:
            self._store.note_corrupt()
        if record is None or record.generation != guard[:16] or record.kind == TOKEN:
            return TierRead(trusted=True)
        if record.kind == TOMBSTONE:
            return TierRead(Versioned(record.version, None), trusted=True)
        try:
            snapshot = self._store.codec.decode(record.body, user_id)
        except CodecError:
            self._store.note_corrupt()
            return TierRead(trusted=True)
        return TierRead(Versioned(record.version, snapshot), trusted=True)

    async def ticket(self, user_id: str) -> Ticket | None:
        digest, bucket = self._place(user_id)
        token = MAGIC + TOKEN + bytes(8) + os.urandom(16)
        keys = (self._store.key(digest), self._guard(bucket))
        server = (await self._bind(bucket)).server
        reply = await self._run(bucket, "TICKET", keys, server, token, _TOKEN_MS)
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

    async def begin(self, me: str, head: str, seconds: float) -> Pass | None:
        passes: list[Pass] = []
        for bucket in self._store.buckets:
            keys = (self._guard(bucket), self._repair(bucket), self._lock(bucket))
            reply = await self._run(bucket, "BEGIN", keys, me, head, _LOCK_MS, os.urandom(16))
            if not reply:
                return None
            began, generation, cursor, fresh = reply
            passes.append(Pass(int(began) / 1000, generation, cursor.decode(), bool(fresh), me))
        # Buckets are stamped together; one that was lost begins at the head like all the others.
        if len({(each.generation, each.cursor) for each in passes}) > 1:
            generation = os.urandom(16)
            for bucket, each in zip(self._store.buckets, passes, strict=True):
                await self._renew(bucket, each.generation, generation, head)
            return None
        return min(passes)

    async def renew(self, generation: bytes, head: str) -> None:
        new = os.urandom(16)
        for bucket in self._store.buckets:
            await self._renew(bucket, generation, new, head)

    async def _renew(self, bucket: str, old: bytes, new: bytes, head: str) -> None:
        keys = (self._guard(bucket), self._repair(bucket))
        await self._run(bucket, "RENEW", keys, old, new, head)

    async def repair(self, changes: Sequence[Change]) -> Sequence[Change]:
        by_bucket: dict[str, list[Change]] = {}
        for change in changes:
            by_bucket.setdefault(self._store.bucket_of(change.digest), []).append(change)
        acted: list[Change] = []
        for bucket, group in by_bucket.items():
            args: list[Any] = [self._channel(bucket)]
            for change in group:
                args += [change.version, int(change.erased), change.digest]
            keys = [self._store.key(change.digest) for change in group]
            acted += [group[index] for index in await self._run(bucket, "REPAIR", keys, *args)]
        return acted

    async def stamp(self, begun: Pass, cursor: str, seconds: float) -> bool:
        stamped = True
        until = int((begun.began + seconds) * 1000)
        for bucket in self._store.buckets:
            keys = (self._guard(bucket), self._repair(bucket), self._lock(bucket))
            server = (await self._bind(bucket)).server
            reply = await self._run(
                bucket, "STAMP", keys, begun.owner, begun.generation, cursor, server, until
            )
            stamped = stamped and bool(reply)
        return stamped

    # Channel

    async def ping(self, me: str, seconds: float, seen: float, number: int) -> float:
        left = float("inf")
        for bucket in self._store.buckets:
            server = (await self._bind(bucket)).server
            keys = (self._register(bucket), self._guard(bucket))
            reply = await self._run(
                bucket,
                "PING",
                keys,
                me,
                int(seconds * 1000),
                int(seen * 1000),
                number,
                self._channel(bucket),
                server,
            )
            left = min(left, max(0, reply) / 1000)
        return left

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[AsyncIterator[Notice]]:
        bucket = self._store.buckets[0]
        connection = await self._store.new_connection(bucket)
        try:
            await self._guarded(connection.send_command("SUBSCRIBE", self._channel(bucket)))
            await self._guarded(connection.read_response(timeout=self._store.timeout))
            yield self._notices(connection)
        finally:
            await connection.disconnect(nowait=True)

    async def _notices(self, connection: Any) -> AsyncIterator[Notice]:
        while True:
            # The echoes keep it busy; a silent channel is one that was lost.
            message = await self._guarded(connection.read_response(timeout=None))
            if message is None or len(message) < 3 or bytes(message[0]) != b"message":  # noqa: PLR2004
                continue
            notice = _notice(message[2])
            if notice is not None:
                yield notice

    # How scripts are run

    async def _run(self, bucket: str, name: str, keys: Sequence[bytes], *args: Any) -> Any:
        bound = self._bound.get(bucket) or await self._bind(bucket)
        write = name in ("PUT", "BURY")
        try:
            return await self._store.command(
                "EVALSHA", bound.sha[name], len(keys), *keys, *args, write=write
            )
        except StoreError as exc:
            if getattr(exc.__cause__, "code", "") != "NOSCRIPT":
                raise
            if self._bound.get(bucket) is bound:
                del self._bound[bucket]
            raise UnavailableError(
                "the server of the cache tier changed; it is repaired before it is believed",
                layer=self._store.name,
            ) from exc

    async def _bind(self, bucket: str) -> _Bound:
        """Load the scripts on the server that answers for a bucket now, once per server run."""
        bound = self._bound.get(bucket)
        if bound is not None:
            return bound
        connection = await self._store.new_connection(bucket)
        try:
            # One connection, so that the id and the scripts belong to the same run.
            await self._guarded(connection.send_command("INFO", "server"))
            info = await self._guarded(connection.read_response())
            bound = _Bound(_run_id(info))
            for name in _NAMES:
                await self._guarded(
                    connection.send_command("SCRIPT", "LOAD", bound.script(name).source)
                )
                await self._guarded(connection.read_response())
        finally:
            await connection.disconnect(nowait=True)
        self._bound[bucket] = bound
        return bound

    async def _guarded(self, work: Any) -> Any:
        """Await a step of the driver, turning its errors into ours."""
        try:
            return await work
        except StoreError:
            raise
        except Exception as exc:
            raise UnavailableError(
                "the connection to the cache tier was lost", layer=self._store.name
            ) from exc

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


def _run_id(info: Any) -> bytes:
    text = bytes(info) if isinstance(info, bytes | bytearray) else str(info).encode()
    for line in text.splitlines():
        if line.startswith(b"run_id:"):
            return line[7:].strip()
    raise UnavailableError("the server does not tell its run id; INFO must be allowed")


def _holders(reply: Any, me: str) -> Holders:
    now, born, pairs = float(reply[0]) / 1000, float(reply[1]) / 1000, reply[2]
    others = {}
    for name, value in zip(pairs[::2], pairs[1::2], strict=True):
        if name in (b"born", me.encode()):
            continue
        until, seen = (float(part) / 1000 for part in value.split(b"|"))
        if until > now:
            others[name.decode()] = (until, seen)
    return Holders(now, now - born, others)


def _notice(message: bytes) -> Notice | None:
    kind, _, rest = bytes(message).partition(b"|")
    parts = rest.split(b"|", 3)
    if kind not in (b"i", b"p") or len(parts) != 4:  # noqa: PLR2004
        return None
    sent, number, erased, body = parts
    if kind == b"p":
        return Notice(b"", int(number), sent=float(sent) / 1000, echo=body.decode())
    return Notice(body, int(number), erased == b"1", float(sent) / 1000)
