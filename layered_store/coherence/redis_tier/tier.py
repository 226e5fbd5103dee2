"""The tier, and the steps of the protocol on one user."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from layered_store.call import new_id
from layered_store.codec import CodecError
from layered_store.coherence.contract import (
    CacheTier,
    Holders,
    Ticket,
    TierRead,
    Versioned,
)
from layered_store.coherence.redis_tier.batches import ReadBatches
from layered_store.coherence.redis_tier.buckets import buckets_of
from layered_store.coherence.redis_tier.channel import RedisChannel
from layered_store.coherence.redis_tier.loading import Scripts
from layered_store.coherence.redis_tier.messages import MOMENTS
from layered_store.coherence.redis_tier.passes import RepairPasses
from layered_store.coherence.together import together
from layered_store.coherence.tombstones import TOMBSTONE_SECONDS
from layered_store.errors import StoreError
from layered_store.stores.redis.failures import cause_of
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

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from layered_store.coherence.contract import Change, Notice, Pass
    from layered_store.coherence.redis_tier.buckets import Bucket
    from layered_store.identity import digest_function
    from layered_store.stores.redis.store import RedisStore

__all__ = ["RedisTier"]

_TOKEN_MS: Final = 10_000
"""Life of a token: far longer than a load takes; one that is gone only costs a fill."""

_NEW_TOKEN: Final = MAGIC + TOKEN + bytes(8)

_COPY_MS: Final = int(TOMBSTONE_SECONDS * 1000)
"""Life of a copy when the store has no ``ttl``: no longer than tombstones are kept."""

_STEP_SECONDS: Final = 1.0
"""How far the server's clock may be set forward: a lease that looks ended may run for so long."""

_STATES: Final = frozenset({STATE, FILLED})
_NO_IDS: Final = HEADER_BYTES + 1
"""Where the snapshot of a copy begins: copies hold no write ids."""


class RedisTier(CacheTier):
    """See :class:`CacheTier`; one guard, register and repair record per bucket of the store.

    A lease takes the echo of every bucket.

    Args:
        store: where the copies are kept, under the keys of its records.
    """

    def __init__(self, store: RedisStore) -> None:
        self._store = store
        self._buckets = buckets_of(store)
        self._scripts = Scripts(store)
        self._batches = ReadBatches(store)
        self._passes = RepairPasses(store, self._buckets, self._scripts)
        self._channel = RedisChannel(store, self._buckets, self._scripts)

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
            loaded = self._scripts.loaded.get(bucket) or await self._scripts.load(bucket)
            reply = await self._batches.read(bucket, loaded, self._store.key(digest))
            if isinstance(reply, StoreError):
                raise reply.fresh()  # each of those who read together has an error of its own
            if isinstance(reply, Exception):
                raise self._scripts.refused(loaded, reply) from cause_of(reply)
            read = self._read(user_id, digest, loaded.server, *reply)
            if read is None:
                self._store.note_corrupt()
                await self._scripts.run(bucket, "CLEAR", (self._store.key(digest),), reply[1])
                read = TierRead(trusted=True)
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
        reads = await together(map(self.read, user_ids), whatever_fails=False)
        return dict(zip(user_ids, reads, strict=True))

    def _read(
        self, user_id: str, digest: bytes, server: bytes, guard: Any, value: Any
    ) -> TierRead | None:
        """Return what a guard and a value under a record's key mean.

        None when the guard holds and the value is not a record of this user: it has to be removed,
        or no reader could store one.
        """
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
                return None
            return TierRead(Versioned(version, snapshot), trusted=True)
        if value is None:
            return TierRead(trusted=True)
        record = unpack(value)
        if record is None:
            return None
        if record.kind == TOKEN or record.generation != guard[:16]:
            return TierRead(trusted=True)
        if record.kind != TOMBSTONE or record.body != digest:
            return None
        return TierRead(Versioned(record.version, None), trusted=True)

    async def read_stale(self, user_id: str, seconds: float) -> Versioned | None:
        digest, bucket = self._place(user_id)
        keys = (self._store.key(digest), bucket.repair)
        record = unpack(await self._scripts.run(bucket, "STALE", keys, int(seconds * 1000)))
        if record is None or record.kind not in _STATES:
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
        token = _NEW_TOKEN + new_id()
        keys = (self._store.key(digest), bucket.guard)
        reply = await self._scripts.run(bucket, "TICKET", keys, token, _TOKEN_MS)
        return Ticket(reply[0], reply[1]) if reply else None

    async def fill(self, user_id: str, record: Versioned, ticket: Ticket) -> None:
        token, generation = ticket
        if not token:
            return
        digest, bucket = self._place(user_id)
        keys = (self._store.key(digest), bucket.guard)
        value = self._value(FILLED, digest, record, generation)
        await self._scripts.run(bucket, "FILL", keys, token, generation, value, self._life)

    # Writing and erasing

    async def put(self, user_id: str, record: Versioned, ticket: Ticket | None) -> None:
        digest, bucket = self._place(user_id)
        keys = (self._store.key(digest), bucket.guard)
        token, generation = ticket or Ticket(b"", bytes(16))
        await self._scripts.run(
            bucket,
            "PUT",
            keys,
            record.version,
            token,
            generation,
            self._value(STATE, digest, record, generation),
            self._life,
            bucket.channel,
            int(record.snapshot is None),
            digest,
        )

    async def bury(self, user_id: str, version: int, me: str) -> Holders:
        digest, bucket = self._place(user_id)
        tombstone = pack(TOMBSTONE, version, digest)
        reply = await self._scripts.run(
            bucket,
            "BURY",
            (self._store.key(digest), bucket.guard, bucket.register),
            version,
            tombstone[:12],
            tombstone[28:],
            self._life,
            bucket.channel,
            digest,
        )
        return _holders(reply, me)

    async def holders(self, user_id: str, me: str) -> Holders:
        _, bucket = self._place(user_id)
        return _holders(await self._scripts.run(bucket, "HOLDERS", (bucket.register,)), me)

    # Repair and channel, of all users

    async def begin(self, me: str, head: str) -> Pass | None:
        return await self._passes.begin(me, head)

    async def renew(self, generation: bytes, head: str) -> None:
        await self._passes.renew(generation, head)

    async def repair(self, changes: Sequence[Change]) -> Sequence[Change]:
        return await self._passes.repair(changes)

    async def stamp(self, begun: Pass, cursor: str, seconds: float) -> bool:
        return await self._passes.stamp(begun, cursor, seconds)

    async def ping(self, me: str, seconds: float, seen: float, number: int) -> float:
        del seen  # the channel knows it, by bucket
        return await self._channel.ping(me, seconds, number)

    def listen(self) -> AbstractAsyncContextManager[AsyncIterator[Notice]]:
        return self._channel.listen()

    async def aclose(self) -> None:
        """End what it does by itself; the store does so when it is closed."""
        await self._scripts.aclose()

    # Keys and values

    def _place(self, user_id: str) -> tuple[bytes, Bucket]:
        digest = self._store.digest(user_id)
        return digest, self._buckets[self._store.bucket_of(digest)]

    def _value(
        self, kind: bytes, digest: bytes, record: Versioned, generation: bytes
    ) -> bytes:
        if record.snapshot is None:
            return pack(TOMBSTONE, record.version, digest, generation=generation)
        body = self._store.codec.encode(record.snapshot)
        return pack(kind, record.version, body, generation=generation)

    @property
    def _life(self) -> int:
        ttl = self._store.ttl_ms
        return min(ttl, _COPY_MS) if ttl else _COPY_MS


def _holders(reply: Any, me: str) -> Holders:
    now, born, pairs = float(reply[0]) / MOMENTS, float(reply[1]) / 1000, reply[2]
    others = {}
    for name, value in zip(pairs[::2], pairs[1::2], strict=True):
        until, bar, seen = value.partition(b"|")
        if not (bar and until.isdigit() and seen.isdigit()) or name == me.encode():
            continue  # not a lease, or our own
        if float(until) / 1000 > now - _STEP_SECONDS:
            others[name.decode()] = (float(until) / 1000, float(seen) / MOMENTS)
    return Holders(now, now - born, others)
