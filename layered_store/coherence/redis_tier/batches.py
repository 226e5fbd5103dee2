"""Reads of copies that begin in one turn of the event loop share one script call."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

from layered_store.errors import StoreError
from layered_store.running import running_loop
from layered_store.stores.redis.failures import ConnectionLostError, GarbageError

if TYPE_CHECKING:
    import asyncio

    from layered_store.coherence.redis_tier.buckets import Bucket
    from layered_store.coherence.redis_tier.loading import LoadedScripts
    from layered_store.stores.redis.store import RedisStore

__all__ = ["ReadBatches"]

_MOST: Final = 256
"""Most copies that one script reads."""

_EARLY: Final = 32
"""How many reads do not wait for the end of the turn when no others are under way."""


class _Batch:
    """Reads of one bucket that began in one turn."""

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


class ReadBatches:
    """Gathers reads and sends them.

    Args:
        store: whose connections carry them.
    """

    def __init__(self, store: RedisStore) -> None:
        self._store = store
        self._open: dict[tuple[asyncio.AbstractEventLoop, Bucket, LoadedScripts], _Batch] = {}
        self._out: set[_Batch] = set()

    def read(self, bucket: Bucket, loaded: LoadedScripts, key: bytes) -> asyncio.Future[Any]:
        """Have a copy read with the others of this turn.

        The result is the guard and what stands under the key, or an exception object.
        """
        loop = running_loop()
        place = (loop, bucket, loaded)
        batch = self._open.get(place)
        if batch is None:
            batch = self._open[place] = _Batch()
            loop.call_soon(self._send, place)
        future = loop.create_future()
        batch.keys.append(key)
        batch.futures.append(future)
        count = len(batch.keys)
        if count == _MOST or (count == _EARLY and not self._out):
            self._send(place)
        return future

    def _send(self, place: tuple[asyncio.AbstractEventLoop, Bucket, LoadedScripts]) -> None:
        batch = self._open.pop(place, None)
        if batch is None or all(future.done() for future in batch.futures):
            return
        loop, bucket, loaded = place
        args = ("EVALSHA", loaded.sha["READ"], len(batch.keys) + 1, bucket.guard)
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
