"""The backend that keeps states in Redis.

Keys are ``prefix{bucket}:s:digest``: all keys of one user share a hash tag, so that a script may
touch several of them in a cluster too. There is one bucket (``0``) on one server and 16 in a
cluster, chosen by the digest. ``s`` is the record of :mod:`layered_store.stores.redis.record`,
``h`` the list of earlier ones, newest first.

For modules that keep more in the same Redis:

* ``digest(user_id)``, ``bucket_of(digest)``, ``key(digest, kind)``, ``bucket_key(bucket, name)``
  and ``buckets`` name keys;
* ``await run_script(script, keys, args)`` runs a :class:`RedisScript` and returns its reply as
  bytes, ints, lists and None; it is sent whole when the server does not know it;
* ``await command(*args)`` sends any one command;
* ``await group_buckets()`` tells which buckets one server answers for;
* ``await new_connection(bucket)`` gives a connection of the driver of one's own, for subscriptions.

All of them keep the time limits and raise this library's errors.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar, cast

from layered_store.call import current_call, next_order
from layered_store.checks import check_limit, check_snapshot, check_snapshots, check_user_ids
from layered_store.clock import SYSTEM_CLOCK, Clock
from layered_store.codec import CodecError, SnapshotCodec
from layered_store.enumerable import Enumerable, UserPage
from layered_store.errors import ClosedError, ConfigError, StoreError, UnsupportedError
from layered_store.explaining import Held, Peek
from layered_store.health import HealthReport, SharedProbe
from layered_store.identity import check_user_id, digest_function
from layered_store.interface import Op, StateStore, changes
from layered_store.masking import mask_url
from layered_store.options import (
    Seconds,
    check_a,
    check_count,
    check_seconds,
    check_snapshot_type,
    is_utf8,
)
from layered_store.running import Ending, running_loop
from layered_store.snapshot import StateSnapshot
from layered_store.stats import Reads, Sample
from layered_store.stores.erasures import KnownErasures
from layered_store.stores.redis.client_link import ClientLink
from layered_store.stores.redis.failures import GarbageError, ReplyError, cause_of, translate
from layered_store.stores.redis.late import Write, settle
from layered_store.stores.redis.links import LaneLink, Limits
from layered_store.stores.redis.record import (
    FILLED,
    MAGIC,
    STATE,
    TOKEN,
    TOMBSTONE,
    unpack,
)
from layered_store.stores.redis.scripts import ERASE, UPSERT, RedisScript
from layered_store.stores.redis.wire import pack_command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from layered_store.call import Call
    from layered_store.coherence.redis_tier import RedisTier
    from layered_store.stores.redis.address import Address
    from layered_store.stores.redis.wire import Command

__all__ = ["RedisStore"]

C = TypeVar("C")

_TOMBSTONE_MS: Final = 7 * 86_400_000
_MOST: Final = 2**53
"""Milliseconds of a TTL and states of a history: larger numbers are not exact in Lua."""
_CLUSTER_BUCKETS: Final = 16
_MGET_KEYS: Final = 256
_STATE_HEAD: Final = MAGIC + STATE



@dataclass(eq=False, repr=False)
class RedisStore(StateStore, Enumerable):
    """Keeps states in Redis: one server, Sentinel or a cluster.

    Calls of one turn of the event loop share one round trip. Nothing is repeated behind the
    caller's back: put ``Retry`` above. Whatever stands under a user's key that is no record of that
    user is a miss, is counted (:attr:`corrupt_records`) and is replaced by the next upsert.

    A crash of Redis may lose acknowledged writes, depending on its persistence settings. Put a
    ``SQLStore`` behind it where that matters: ``Cached(RedisStore(url), fallback=SQLStore(url))``.

    Args:
        url: ``redis://``, ``rediss://``, ``unix://``, ``redis+cluster://host1,host2``,
            ``redis+sentinel://host1,host2/service`` (and the ``rediss+`` forms). The whole
            URL is passed to the driver, so its query options (TLS, database, user) work.
            ``sentinel_username`` and ``sentinel_password`` there log in to the Sentinels.
        client: a ``redis.asyncio`` client instead of a URL. It stays the caller's; connections are
            made as its pool makes them.
        prefix: what all keys begin with; no braces.
        ttl: seconds after its last write until a user is forgotten, history included; None: never.
        history_limit: how many states per user ``get_history`` can give; 0 keeps none.
        snapshot_type: the class of the snapshots it keeps.
        digest_key: secret for the users' digests in keys, 0 to 64 bytes; the same for all who share
            data. With none, known user ids can be recognised in a dump.
        connect_timeout: seconds to establish a connection. A call that comes in the second half of
            an attempt that others wait for has the next one too: 1.5 times this at most.
        timeout: seconds one reply may take. Then the connection is given up; reads that came in the
            second half of that time go out once more over another.
        max_connections: connections per event loop and server. One carries a thousand calls at
            once; more calls than all can carry wait for a place.
        probe_seconds: time limit of a health probe.
        clock: source of time.

    Raises:
        ConfigError: an option is out of range, or neither or both of ``url`` and ``client`` are
        given.
        UnavailableError: from any operation when Redis cannot be reached, is loading, full, or a
            replica; ``retryable`` is False when it refuses the login.
        StoreTimeoutError: from any operation after ``timeout`` (or ``connect_timeout``).

    Cancellation:
        A cancelled call ends at once; its connection goes on and its reply is dropped. A cancelled
        write may take effect; a write that is repeated by a layer above takes effect once.
    """

    url: str | None = field(
        default=None, metadata={"mask": lambda url: None if url is None else mask_url(url)}
    )
    client: Any = field(default=None, kw_only=True, repr=False)
    prefix: str = field(default="layered_store:", kw_only=True)
    ttl: Seconds | None = field(default=None, kw_only=True)
    history_limit: int = field(default=0, kw_only=True)
    snapshot_type: type[StateSnapshot] = field(default=StateSnapshot, kw_only=True)
    digest_key: bytes | str = field(default=b"", kw_only=True, repr=False)
    connect_timeout: Seconds = field(default=1.0, kw_only=True)
    timeout: Seconds = field(default=1.0, kw_only=True)
    max_connections: int = field(default=4, kw_only=True)
    probe_seconds: Seconds = field(default=1.0, kw_only=True)
    clock: Clock = field(default=SYSTEM_CLOCK, kw_only=True, repr=False)

    kind: ClassVar[str] = "redis"

    def __post_init__(self) -> None:
        check_a(self.clock, Clock, "clock", self)
        ttl = check_seconds(self.ttl, "ttl", self, optional=True)
        self._ttl_ms = 0 if ttl is None else max(1, int(min(ttl * 1000, _MOST)))
        check_count(self.history_limit, "history_limit", self, minimum=0)
        check_count(self.max_connections, "max_connections", self)
        check_snapshot_type(self.snapshot_type, self)
        self._limits = Limits(
            check_seconds(self.connect_timeout, "connect_timeout", self),
            check_seconds(self.timeout, "timeout", self),
            self.max_connections,
            self.clock,
        )
        probe_seconds = check_seconds(self.probe_seconds, "probe_seconds", self)
        self._probe = SharedProbe(self.name, probe_seconds, self.clock)
        self.digest = digest_function(self.digest_key, self.name)
        self._address = self._find_address()
        self._cluster = self._address_is_cluster()
        prefix = self._checked_prefix()
        self._key_heads = {
            f"{n:x}": f"{prefix}{{{n:x}}}:".encode()
            for n in range(_CLUSTER_BUCKETS if self._cluster else 1)
        }
        self.buckets = tuple(self._key_heads)
        self._erasures = {bucket: KnownErasures(self.clock) for bucket in self.buckets}
        self._state_head = self._key_heads["0"] + b"s:"
        self._codec = SnapshotCodec(self.snapshot_type)
        self._link: LaneLink | ClientLink | None = None
        self._tier: weakref.ref[RedisTier] | None = None
        self._links: dict[asyncio.AbstractEventLoop, LaneLink | ClientLink] = {}
        self._lock = threading.Lock()
        self._ending = Ending()
        self._closed = False
        self.reads = Reads()
        self._corrupt = 0

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        check_snapshot(snapshot, self.snapshot_type, block=self)
        call = current_call(self.clock)
        write = self._write(snapshot, call.id_of(snapshot), call, first=call.first_attempt())
        sent = self.clock.monotonic()
        command = self._upsert(write)
        reply = await self._call(command, Op.UPSERT_LATEST, write=True, script=UPSERT)
        if reply != 1 and not await self._settle(write, reply, sent, Op.UPSERT_LATEST):
            call.superseded = True

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        check_user_id(user_id, Op.GET_LATEST, self)
        try:
            link = self._link
            if link is None or link.loop is not running_loop():
                link = self._link_here(Op.GET_LATEST)
            future = link.read_now(self._state_head + self.digest.hexadecimal(user_id))
            if future is not None:
                reply = await future
            else:
                reply = await link.call(("GET", self.key(self.digest(user_id))))
            if type(reply) is bytes or reply is None:
                snapshot = self._read(reply, user_id)
                self.reads.found(snapshot)
                return snapshot
            if isinstance(reply, Exception) and not _is_foreign(reply):
                raise translate(
                    reply, operation=Op.GET_LATEST, layer=self.name, write=False
                ) from cause_of(reply)
        except Exception as exc:
            self.reads.failed(exc)
            raise
        self._corrupt += 1
        self.reads.miss += 1
        return None

    async def delete(self, user_id: str) -> None:
        check_user_id(user_id, Op.DELETE, self)
        digest = self.digest(user_id)
        call = current_call(self.clock)
        command: Command = (
            "EVALSHA", ERASE.sha, 2, self.key(digest), self.key(digest, "h"), _TOMBSTONE_MS,
            call.write_id,
        )  # fmt: skip
        version = await self._call(command, Op.DELETE, write=True, script=ERASE, kind=int)
        if version:
            self._erasures_of(digest).made(digest, version, next_order())
        else:
            call.superseded = True

    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        check_user_id(user_id, Op.GET_HISTORY, self)
        check_limit(limit, self)
        count = min(limit, self.history_limit)
        if not count:
            self._link_here(Op.GET_HISTORY)
            return []
        key = self.key(self.digest(user_id), "h")
        link = self._link_here(Op.GET_HISTORY)
        reply = await link.call(("LRANGE", key, 0, count - 1))
        if _is_foreign(reply):
            self._corrupt += 1
            return []
        entries = self._checked(reply, Op.GET_HISTORY, write=False, kind=list)
        found = (self._decode(entry, user_id) for entry in entries)
        return [snapshot for snapshot in found if snapshot is not None]

    async def get_latest_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        by_bucket: dict[str, list[tuple[str, bytes]]] = {}
        for user_id in check_user_ids(user_ids, self):
            digest = self.digest(user_id)
            place = by_bucket.setdefault(self.bucket_of(digest), [])
            place.append((user_id, self.key(digest)))
        # In a cluster one MGET may only name keys of one slot.
        pages = [
            users[at : at + _MGET_KEYS]
            for users in by_bucket.values()
            for at in range(0, len(users), _MGET_KEYS)
        ]
        asked = sum(map(len, pages))
        try:
            found = await self._read_pages(pages)
        except Exception as exc:
            self.reads.failed(exc, asked)
            raise
        self.reads.hit += len(found)
        self.reads.miss += asked - len(found)
        return found

    async def _read_pages(
        self, pages: Sequence[Sequence[tuple[str, bytes]]]
    ) -> dict[str, StateSnapshot]:
        link = self._link_here(Op.GET_LATEST_MANY)
        replies = await link.call_all([("MGET", *(key for _, key in page)) for page in pages])
        found = {}
        for page, reply in zip(pages, replies, strict=True):
            values = self._checked(
                reply, Op.GET_LATEST_MANY, write=False, kind=list, length=len(page)
            )
            for (user_id, _), value in zip(page, values, strict=True):
                snapshot = self._read(value, user_id)
                if snapshot is not None:
                    found[user_id] = snapshot
        return found

    async def upsert_latest_many(self, snapshots: Iterable[StateSnapshot]) -> None:
        batch = check_snapshots(snapshots, self.snapshot_type, self)
        link = self._link_here(Op.UPSERT_LATEST_MANY)
        if not batch:
            return
        call = current_call(self.clock)
        first = call.first_attempt()
        writes = [
            self._write(snapshot, call.part(index), call, first=first)
            for index, snapshot in enumerate(batch)
        ]
        sent = self.clock.monotonic()
        commands = [self._upsert(write) for write in writes]
        # The first goes alone, so that the script is known and the rest keep their order.
        replies = [await self._send(link, commands[0], UPSERT)]
        if not isinstance(replies[0], Exception):
            replies += await link.call_all(commands[1:])
        for index, reply in enumerate(replies):
            if isinstance(reply, ReplyError) and reply.code == "NOSCRIPT":
                replies[index] = await self._send(link, commands[index], UPSERT)
        failed = [reply for reply in replies if isinstance(reply, Exception)]
        if failed:
            operation, layer = Op.UPSERT_LATEST_MANY, self.name
            error = translate(failed[0], operation=operation, layer=layer, write=True)
            # Repeating the call is safe. That some are stored is not hidden; where all failed, the
            # first did, and no other was sent.
            if len(failed) < len(replies):
                error.outcome_unknown = True
            raise error from cause_of(failed[0])
        last = {write.digest: index for index, write in enumerate(writes)}
        for index, write in enumerate(writes):
            latest = last[write.digest]
            if replies[latest] == 1:
                continue  # an earlier one that is not stored would come on top of it
            try:
                stored = await self._settle(write, replies[index], sent, Op.UPSERT_LATEST_MANY)
            except StoreError as exc:
                exc.outcome_unknown |= len(batch) > 1
                raise
            if not stored:
                call.superseded |= index == latest

    async def users(self, cursor: str, limit: int) -> UserPage:
        from layered_store.stores.redis.listing import list_users  # noqa: PLC0415

        if self._cluster:
            raise UnsupportedError(
                "the users of a cluster cannot be listed; list them at the system of record",
                operation="users",
                layer=self.name,
            )
        return await list_users(self, self._state_head, cursor, limit)

    async def peek(self, user_id: str) -> Peek:
        """Tell what stands under a user's key; as a copy, whether its tier is trusted now."""
        digest = self.digest(user_id)
        key, guard_key = self.key(digest), self.bucket_key(self.bucket_of(digest), "guard")
        value = await self.command("GET", key, operation="peek", write=False)
        left = await self.command("PTTL", key, operation="peek", write=False)
        record = unpack(value)
        time_left = left / 1000 if left > 0 else None
        if record is None:
            note = "" if value is None else "what stands there is no record"
            return Peek(Held.ABSENT, time_left=time_left, note=note)
        answers = True
        if record.shared:
            guard = await self.command("GET", guard_key, operation="peek", write=False)
            answers = guard is not None and guard[:16] == record.generation
        note = "" if answers else "not trusted before the next repair pass"
        if record.kind == TOKEN:
            return Peek(Held.ABSENT, time_left=time_left, note="a reader is about to fill it")
        if record.kind == TOMBSTONE and record.shared and record.body != digest:
            return Peek(Held.ABSENT, time_left=time_left, note="of another user's erasure")
        if record.kind == TOMBSTONE:
            return Peek(Held.ERASED, None, time_left, record.version, answers, note)
        try:
            state = self._codec.decode(record.body, user_id)
        except CodecError as exc:
            return Peek(Held.ABSENT, time_left=time_left, note=exc.message)
        return Peek(
            Held.STATE, state.updated_at_unix_ms, time_left, record.version, answers, note
        )

    async def health_report(self) -> HealthReport:
        return await self._probe.run(self._ping)

    async def open(self) -> None:
        await self._call(("PING",), "open", write=False)

    async def aclose(self) -> None:
        with self._lock:
            self._closed = True
            self._link = None
            links = list(self._links.items())
            self._links.clear()
        tier = self._tier() if self._tier is not None else None
        if tier is not None:
            self._ending.begin(tier.aclose())
        here = asyncio.get_running_loop()
        for loop, link in links:
            if loop is here:
                self._ending.begin(link.aclose())
            else:
                link.abandon()
        await self._ending.wait()

    def samples(self) -> Iterable[Sample]:
        yield from self.reads.samples()
        yield Sample("corrupt_records", self._corrupt)

    # What other modules that keep something in the same Redis use; ``reads`` counts theirs too.

    @property
    def corrupt_records(self) -> int:
        """How many reads met something that is no record of the user asked for."""
        return self._corrupt

    def note_corrupt(self) -> None:
        """Count one more of them."""
        self._corrupt += 1

    @property
    def is_cluster(self) -> bool:
        """Whether users are spread over the nodes of a cluster."""
        return self._cluster

    @property
    def codec(self) -> SnapshotCodec[StateSnapshot]:
        """What turns snapshots into bytes and back."""
        return self._codec

    @property
    def ttl_ms(self) -> int:
        """Life of a record in milliseconds; 0 for ever."""
        return self._ttl_ms

    def capability(self, kind: type[C]) -> C | None:
        from layered_store.coherence.contract import CacheTier  # noqa: PLC0415
        from layered_store.coherence.redis_tier import RedisTier  # noqa: PLC0415

        if kind is CacheTier:
            if any(changes(self, op, RedisStore) for op in CacheTier.operations.values()):
                return None  # the tier would go past it
            # One for all who ask, so that whoever watches it sees every call; held by its users.
            tier = self._tier() if self._tier is not None else None
            if tier is None:
                tier = RedisTier(self)
                self._tier = weakref.ref(tier)
            return cast("C", tier)
        if kind is Enumerable and self._cluster:
            return None  # their keys are spread over the nodes
        return super().capability(kind)

    def bucket_of(self, digest: bytes) -> str:
        """Return the hash tag that all keys of this user share."""
        return f"{digest[0] & 15:x}" if self._cluster else "0"

    def key(self, digest: bytes, kind: str = "s") -> bytes:
        """Return the key of a user's ``kind`` of data (``s`` record, ``h`` history)."""
        if kind == "s" and not self._cluster:
            return self._state_head + digest.hex().encode()
        return self._key_heads[self.bucket_of(digest)] + f"{kind}:{digest.hex()}".encode()

    def bucket_key(self, bucket: str, name: str) -> bytes:
        """Return a key that belongs to a bucket, such as its guard."""
        return self._key_heads[bucket] + name.encode()

    async def run_script(
        self,
        script: RedisScript,
        keys: Sequence[bytes],
        args: Sequence[bytes | str | int] = (),
        *,
        operation: str = "run_script",
        write: bool = True,
    ) -> Any:
        """Run a script and return its reply: bytes, int, list of these, or None.

        Args:
            script: what to run.
            keys: all keys it touches; in a cluster of one bucket, and at least one.
            args: its arguments; binary safe.
            operation: for errors.
            write: whether it may change something: errors then tell when that is unknown.
        """
        command: Command = ("EVALSHA", script.sha, len(keys), *keys, *args)
        return await self._call(command, operation, write=write, script=script)

    async def command(
        self, *args: bytes | str | int, operation: str = "command", write: bool = True
    ) -> Any:
        """Send one command and return its reply; see :meth:`run_script`."""
        return await self._call(args, operation, write=write)

    def begin(
        self, args: Sequence[bytes | str | int], keys: Sequence[bytes] = ()
    ) -> asyncio.Future[Any]:
        """Send one command; the future's result is the reply or an exception object.

        Args:
            args: its name and first arguments.
            keys: more arguments, all of one length: keys of users' records.
        """
        link = self._link_here("command")
        future = link.send_now(pack_command(args, keys))
        return future or link.loop.create_task(link.call((*args, *keys)))

    def refusal(self, reply: Exception, operation: str, *, write: bool = False) -> StoreError:
        """Return what such a result means; raise it ``from`` that."""
        return translate(reply, operation=operation, layer=self.name, write=write)

    async def new_connection(self, bucket: str = "0") -> Any:
        """Return a new ``redis.asyncio`` connection, established; the caller disconnects it."""
        link = self._link_here("new_connection")
        try:
            async with self.clock.timeout(self._limits.connect_timeout):
                connection = await link.connect(self.bucket_key(bucket, "id"))
        except Exception as exc:
            raise translate(exc, operation="new_connection", layer=self.name, write=False) from exc
        return connection

    async def group_buckets(self) -> list[list[str]]:
        """Return the buckets grouped by the server that answers for them now."""
        link = self._link_here("group_buckets")
        try:
            owners = await link.owners([self.bucket_key(bucket, "id") for bucket in self.buckets])
        except Exception as exc:
            raise translate(exc, operation="group_buckets", layer=self.name, write=False) from exc
        groups: dict[str, list[str]] = {}
        for bucket, owner in zip(self.buckets, owners, strict=True):
            groups.setdefault(owner, []).append(bucket)
        return list(groups.values())

    # How a call goes out and what its reply means.

    def _write(
        self, snapshot: StateSnapshot, write_id: bytes, call: Call, *, first: bool
    ) -> Write:
        digest, body = self.digest(snapshot.user_id), self._codec.encode(snapshot)
        return Write(digest, body, write_id, call.began(self.clock), call.order, first)

    def _upsert(self, write: Write) -> Command:
        known = self._erasures_of(write.digest).known_before(write.digest, write.order)
        keys, args = self.upsert_parts(write, follows=known or 0)
        return ("EVALSHA", UPSERT.sha, len(keys), *keys, *args)

    def upsert_parts(
        self, write: Write, *, follows: int
    ) -> tuple[tuple[bytes, bytes], tuple[bytes | int, ...]]:
        """Return keys and arguments of the script that stores a state.

        Args:
            write: what to store.
            follows: version of the last erasure known to come before it; 0: none.
        """
        digest = write.digest
        earliest = self._erasures_of(digest).earliest(write.started)
        return (self.key(digest), self.key(digest, "h")), (
            write.write_id, write.body, int(not write.first), earliest, follows,
            _TOMBSTONE_MS, self._ttl_ms, min(self.history_limit, _MOST),
        )  # fmt: skip

    def _erasures_of(self, digest: bytes) -> KnownErasures:
        # Each node of a cluster has a clock of its own.
        return self._erasures[self.bucket_of(digest)]

    async def _settle(self, write: Write, reply: Any, sent: float, operation: str) -> bool:
        return await settle(self, self._erasures_of(write.digest), write, reply, sent, operation)

    async def _call(
        self,
        command: Command,
        operation: str,
        *,
        write: bool,
        script: RedisScript | None = None,
        kind: type | None = None,
    ) -> Any:
        reply = await self._send(self._link_here(operation), command, script)
        return self._checked(reply, operation, write=write, kind=kind)

    async def _send(
        self, link: LaneLink | ClientLink, command: Command, script: RedisScript | None
    ) -> Any:
        reply = await link.call(command)
        if script is not None and isinstance(reply, ReplyError) and reply.code == "NOSCRIPT":
            reply = await link.call(("EVAL", script.source, *command[2:]))
        return reply

    def _checked(
        self,
        reply: Any,
        operation: str,
        *,
        write: bool,
        kind: type | None = None,
        length: int | None = None,
    ) -> Any:
        if not isinstance(reply, Exception) and not (
            (kind is None or type(reply) is kind) and (length is None or len(reply) == length)
        ):
            reply = GarbageError()
        if isinstance(reply, Exception):
            error = translate(reply, operation=operation, layer=self.name, write=write)
            raise error from cause_of(reply)
        return reply

    def _read(self, data: Any, user_id: str) -> StateSnapshot | None:
        return None if data is None else self._decode(data, user_id)

    def _decode(self, data: Any, user_id: str) -> StateSnapshot | None:
        try:
            if data[:4] == _STATE_HEAD:  # by far the most; a truncated one has no snapshot
                return self._codec.decode(data[29 + 16 * data[28] :], user_id)
            record = unpack(data)
            if record is not None:
                return self._codec.decode(record.body, user_id) if record.kind == FILLED else None
        except (CodecError, IndexError, TypeError):
            pass
        self._corrupt += 1
        return None

    async def _ping(self) -> bool:
        self._checked(await self._link_here("health_check").probe(), "health_check", write=False)
        return True

    def _link_here(self, operation: str) -> LaneLink | ClientLink:
        """Return the link of the running event loop, making it on first use."""
        link = self._link
        loop = running_loop()
        if link is not None and link.loop is loop:
            return link
        with self._lock:
            if self._closed:
                raise ClosedError(
                    "this store was closed; build a new one", operation=operation, layer=self.name
                )
            link = self._links.get(loop)
            if link is None:
                for other in [other for other in self._links if other.is_closed()]:
                    del self._links[other]
                address = self._address()
                kind = ClientLink if address.connection is None else LaneLink
                link = self._links[loop] = kind(address, self._limits)
            self._link = link
        return link

    def _find_address(self) -> Callable[[], Address]:
        from layered_store.stores.redis import address  # noqa: PLC0415  imports the driver

        if (self.url is None) == (self.client is None):
            raise ConfigError(
                "give either a URL, such as redis://127.0.0.1:6379/0, or client=",
                option="url",
                layer=self.name,
            )
        limits = self._limits
        if self.client is not None:
            given = address.address_of_client(self.client, limits.connect_timeout)
            return lambda: given
        if not isinstance(self.url, str):
            raise ConfigError("must be a str", option="url", layer=self.name)
        return address.address_of_url(self.url, limits.connect_timeout, limits.timeout)

    @property
    def driver_retries(self) -> int:
        """How often the driver repeats a call by itself: 0 except for a client that was passed in
        and is called instead of its connections (a cluster's).
        """
        if self.client is None or self._address().connection is not None:
            return 0
        retry = getattr(self.client, "retry", None)
        count = getattr(retry, "get_retries", None)
        return max(0, int(count())) if callable(count) else 0

    def _address_is_cluster(self) -> bool:
        if self.url is not None:
            return self.url.partition("://")[0].endswith("+cluster")
        return self._address().cluster

    def _checked_prefix(self) -> str:
        prefix = self.prefix
        if not is_utf8(prefix) or "{" in prefix or "}" in prefix:
            raise ConfigError(
                "must be a UTF-8 str without '{' and '}', which choose a cluster's slot",
                option="prefix",
                layer=self.name,
            )
        return prefix


def _is_foreign(reply: Any) -> bool:
    """Tell whether the key holds another type of Redis, such as a list."""
    if isinstance(reply, ReplyError):
        return reply.code == "WRONGTYPE"
    return isinstance(reply, Exception) and str(reply).startswith("WRONGTYPE")
