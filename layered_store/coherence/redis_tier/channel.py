"""The invalidation channel of all buckets: pings go out, messages and echoes come back."""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

from layered_store.coherence.contract import Notice
from layered_store.coherence.redis_tier.connection import connected
from layered_store.coherence.redis_tier.messages import MOMENTS, Message, parse
from layered_store.coherence.together import together
from layered_store.errors import StoreError, UnavailableError
from layered_store.stores.redis.wire import pack_command

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from layered_store.coherence.redis_tier.buckets import Bucket
    from layered_store.coherence.redis_tier.loading import Scripts
    from layered_store.stores.redis.feed import Feed
    from layered_store.stores.redis.store import RedisStore

    Received = tuple[Bucket, bytes, Message]

__all__ = ["RedisChannel"]

_SILENCE_SECONDS: Final = 2.0
"""How long a channel may be silent: six echoes."""

_SAID: Final = 3
"""How many parts all has that a server says over a channel."""

_ECHOES: Final = 9
"""Of how many pings the echoes are awaited."""


class _Listener:
    """What one who listens has taken in.

    Args:
        count: how many buckets there are.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._loop = asyncio.get_running_loop()
        self._process = os.getpid()
        # By bucket and server run: each server of a cluster has a clock of its own.
        self.seen: dict[tuple[Bucket, bytes], int] = {}
        # By who pinged and the number of the ping: the buckets whose echo has come.
        self._echoes: dict[tuple[bytes, int], set[Bucket]] = {}

    @property
    def listens(self) -> bool:
        """Whether it can take in anything still: in a child of ``os.fork``, none from before."""
        return self._process == os.getpid() and not self._loop.is_closed()

    def echoed(self, bucket: Bucket, me: bytes, number: int) -> bool:
        """Note the echo of one bucket; tell whether all have come."""
        came = self._echoes.setdefault((me, number), set())
        came.add(bucket)
        for old in [each for each in self._echoes if each[0] == me and each[1] <= number - _ECHOES]:
            del self._echoes[old]
        return len(came) == self._count


class RedisChannel:
    """One channel per bucket, seen as one; a ping is echoed when every bucket's echo has come.

    Several may listen, each for caches of its own: two stacks over one store. What one of them has
    not taken in is not acknowledged.

    Args:
        store: where it is.
        buckets: of the store, by name.
        scripts: publish the echoes.
    """

    def __init__(
        self, store: RedisStore, buckets: Mapping[str, Bucket], scripts: Scripts
    ) -> None:
        self._store = store
        self._buckets = buckets
        self._scripts = scripts
        self._listeners: set[_Listener] = set()
        # Whose echoes are awaited: other processes number their pings likewise.
        self._pinging: set[bytes] = set()

    async def ping(self, me: str, seconds: float, number: int) -> float:
        """See :meth:`CacheTier.ping`; believed is only what every bucket's server vouches for."""
        if seconds > 0:
            self._pinging.add(me.encode())
        else:
            self._pinging.discard(me.encode())

        async def ping(bucket: Bucket) -> int:
            server = (await self._scripts.load(bucket)).server
            taken_in = (each.seen.get((bucket, server), 0) for each in self._listeners)
            seen = min(taken_in, default=0)
            keys = (bucket.register, bucket.guard)
            args = (me, int(seconds * 1000), seen, number, bucket.channel)
            return int(await self._scripts.run(bucket, "PING", keys, *args))

        return max(0, min(await together(map(ping, self._buckets.values())))) / 1000

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[AsyncIterator[Notice]]:
        """See :meth:`CacheTier.listen`."""
        received: asyncio.Queue[Received | StoreError] = asyncio.Queue()
        readers: list[asyncio.Task[None]] = []
        listener = _Listener(len(self._buckets))
        # Those whose event loop ended under them did not leave.
        self._listeners = {each for each in self._listeners if each.listens} | {listener}
        async with AsyncExitStack() as connections:
            try:
                for names in await self._store.group_buckets():
                    group = [self._buckets[name] for name in names]
                    opening = connected(self._store, group[0])
                    connection = await connections.enter_async_context(opening)
                    server = (await connection.server_run()).run_id.encode()
                    feed = connection.feed()
                    connections.callback(feed.close)
                    await self._subscribe(feed, group)
                    reading = self._receive(feed, server, group, received)
                    readers.append(asyncio.create_task(reading))
                yield self._notices(listener, received)
            finally:
                self._listeners.discard(listener)
                for reader in readers:
                    reader.cancel()
                await asyncio.gather(*readers, return_exceptions=True)

    async def _subscribe(self, feed: Feed, group: Sequence[Bucket]) -> None:
        """Subscribe to the channels of buckets of one server."""
        shard = "S" if self._store.is_cluster else ""
        commands = [(f"{shard}SUBSCRIBE", bucket.channel) for bucket in group]
        feed.send(b"".join(map(pack_command, commands)))
        done = f"{shard.lower()}subscribe".encode()
        left = len(group)
        while left:
            # Nobody relies on what the first of the channels tell before the last one stands.
            left -= sum(reply[0] == done for reply in await self._next(feed))

    async def _next(self, feed: Feed) -> list[Any]:
        """Return what a server says next: what it is, of which channel, and the rest."""
        try:
            # The echoes keep it busy: a silent channel is one that was lost.
            said = await feed.next(_SILENCE_SECONDS)
        except Exception as exc:
            raise self._store.refusal(exc, "command") from exc
        if not all(type(reply) is list and len(reply) == _SAID for reply in said):
            raise self._lost()
        return said

    async def _receive(
        self,
        feed: Feed,
        server: bytes,
        group: Sequence[Bucket],
        received: asyncio.Queue[Received | StoreError],
    ) -> None:
        """Pass on what one server says, until it is no longer the one who says it all."""
        buckets = {bucket.channel: bucket for bucket in group}
        kind = b"smessage" if self._store.is_cluster else b"message"
        try:
            while True:
                for reply in await self._next(feed):
                    if reply[0] != kind:
                        raise self._lost()  # the bucket went to another server
                    message = parse(reply[2])
                    if message is None:
                        continue
                    if message.server != server:
                        # Handed on by another server, so neither in order nor surely whole.
                        raise self._lost()
                    received.put_nowait((buckets[reply[1]], server, message))
        except StoreError as exc:
            received.put_nowait(exc)
        except Exception:  # noqa: BLE001  whatever it was: nobody reads on, who listens must know
            received.put_nowait(self._lost())

    async def _notices(
        self, listener: _Listener, received: asyncio.Queue[Received | StoreError]
    ) -> AsyncIterator[Notice]:
        while True:
            item = await received.get()
            if isinstance(item, StoreError):
                raise item
            bucket, server, message = item
            sent = message.sent / MOMENTS
            if not message.echo:
                yield Notice(message.body, message.number, message.erased, sent)
            elif message.body in self._pinging and listener.echoed(
                bucket, message.body, message.number
            ):
                yield Notice(b"", message.number, sent=sent, echo=message.body.decode())
            # Only now it was taken in. It may be earlier than before: clocks are set.
            listener.seen[bucket, server] = message.sent

    def _lost(self) -> UnavailableError:
        return UnavailableError("the invalidation channel was lost", layer=self._store.name)
