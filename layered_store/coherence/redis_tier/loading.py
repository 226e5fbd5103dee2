"""The scripts as they are loaded on each run of each server, and how they are called."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from layered_store.coherence.redis_tier import scripts
from layered_store.coherence.redis_tier.connection import connected
from layered_store.errors import UnavailableError
from layered_store.running import cancel_all, spawn
from layered_store.stores.redis.failures import ConnectionLostError, GarbageError, cause_of
from layered_store.stores.redis.scripts import RedisScript

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from layered_store.coherence.redis_tier.buckets import Bucket
    from layered_store.coherence.redis_tier.connection import ServerRun
    from layered_store.errors import StoreError
    from layered_store.stores.redis.store import RedisStore

__all__ = ["LoadedScripts", "Scripts"]

_FORGETS_SINCE: Final = 7
"""Since this Redis scripts are known to the one server run that was given them."""

_SHARDED_SINCE: Final = 7
"""Since this Redis a cluster has channels that belong to a slot."""


def _is_number(reply: Any) -> bool:
    return type(reply) is int


def _are_numbers(reply: Any) -> bool:
    return type(reply) is list and all(map(_is_number, reply))


def _is_value(reply: Any) -> bool:
    return reply is None or type(reply) is bytes


def _is_ticket(reply: Any) -> bool:
    match reply:
        case [] | [bytes(), bytes()]:
            return True
    return False


def _is_pass(reply: Any) -> bool:
    match reply:
        case []:
            return True
        case [bytes() as now, bytes(), bytes(), int()]:
            return now.isdigit()
    return False


def _is_register(reply: Any) -> bool:
    match reply:
        case [bytes() as now, bytes() as born, list() as leases]:
            whole = len(leases) % 2 == 0 and all(type(part) is bytes for part in leases)
            return whole and now.isdigit() and born.isdigit()
    return False


_REPLIES: Final[dict[str, Callable[[Any], bool]]] = {
    "CLEAR": _is_number,
    "TICKET": _is_ticket,
    "FILL": _is_number,
    "PUT": _is_number,
    "BURY": _is_register,
    "HOLDERS": _is_register,
    "BEGIN": _is_pass,
    "RENEW": _is_number,
    "REPAIR": _are_numbers,
    "STAMP": _is_number,
    "STALE": _is_value,
    "PING": _is_number,
}
"""By name, whether this can be what a script replied."""

_WRITES: Final = frozenset({"PUT", "BURY"})
"""Scripts of which it matters to the caller whether they took effect."""


class LoadedScripts:
    """The scripts on one run of one server.

    Attributes:
        server: its run id.
        scripts: by name.
        sha: how each is called, by name.
    """

    __slots__ = ("scripts", "server", "sha")

    def __init__(self, run: ServerRun, *, sharded: bool) -> None:
        self.server = run.run_id.encode()
        forgets = run.major >= _FORGETS_SINCE
        self.scripts = {
            name: RedisScript(scripts.source(body, run.run_id, sharded=sharded, forgets=forgets))
            for name, body in scripts.SCRIPTS.items()
        }
        self.sha = {name: script.sha for name, script in self.scripts.items()}


class Scripts:
    """Calls the scripts on the servers of a store, loading them once per server run.

    Args:
        store: where they run.

    Attributes:
        loaded: by bucket; what is not there, or not any more, is loaded by :meth:`load`.
    """

    def __init__(self, store: RedisStore) -> None:
        self._store = store
        self._loading: dict[Bucket, asyncio.Task[LoadedScripts]] = {}
        self.loaded: dict[Bucket, LoadedScripts] = {}

    async def run(self, bucket: Bucket, name: str, keys: Sequence[bytes], *args: Any) -> Any:
        """Run a script and return its reply."""
        loaded = self.loaded.get(bucket) or await self.load(bucket)
        reply = await self._store.begin(("EVALSHA", loaded.sha[name], len(keys), *keys, *args))
        if _REPLIES[name](reply):
            return reply
        if not isinstance(reply, Exception):
            reply = GarbageError()  # no Redis says that to this question
        raise self.refused(loaded, reply, write=name in _WRITES) from cause_of(reply)

    def refused(
        self, loaded: LoadedScripts, reply: Exception, *, write: bool = False
    ) -> StoreError:
        """Return the error to raise, after forgetting scripts that the server does not know.

        Args:
            loaded: the scripts that were called.
            reply: what came back.
            write: whether it matters to the caller if they took effect.
        """
        if getattr(reply, "code", "") != "NOSCRIPT":
            return self._store.refusal(reply, "command", write=write)
        # Another server run, or its scripts were flushed: then all its buckets' are gone.
        for each in [each for each, other in self.loaded.items() if other is loaded]:
            del self.loaded[each]
        return UnavailableError(
            "the server of the cache tier changed; it is repaired before it is believed",
            operation="command",
            layer=self._store.name,
        )

    async def load(self, bucket: Bucket) -> LoadedScripts:
        """Load the scripts on the server that answers for a bucket now."""
        loaded = self.loaded.get(bucket)
        if loaded is not None:
            return loaded
        loop = asyncio.get_running_loop()
        task = self._loading.get(bucket)
        if task is None or task.get_loop() is not loop:
            # A task of its own: it serves all who wait, and a caller may be cancelled.
            task = spawn(self._load(bucket))
            self._loading[bucket] = task
            task.add_done_callback(lambda done: self._ended(bucket, done))
        await asyncio.wait((task,))
        if task.cancelled():
            raise self._store.refusal(ConnectionLostError(), "command")
        return task.result()

    async def aclose(self) -> None:
        """Cut off what is being loaded."""
        await cancel_all(self._loading.values())

    def _ended(self, bucket: Bucket, task: asyncio.Task[LoadedScripts]) -> None:
        if self._loading.get(bucket) is task:
            del self._loading[bucket]
        if not task.cancelled():
            task.exception()  # seen: whoever waited for it may be gone

    async def _load(self, bucket: Bucket) -> LoadedScripts:
        # One connection, so that the id and the scripts belong to the same run.
        async with connected(self._store, bucket) as connection:
            run = await connection.server_run()
            known = run.run_id.encode()
            loaded = next((each for each in self.loaded.values() if each.server == known), None)
            if loaded is None:
                sharded = self._store.is_cluster
                if sharded and run.major < _SHARDED_SINCE:
                    raise UnavailableError(
                        "a cluster as a shared cache tier needs Redis 7 (sharded channels)",
                        operation="command",
                        layer=self._store.name,
                        retryable=False,
                    )
                loaded = LoadedScripts(run, sharded=sharded)
                for script in loaded.scripts.values():
                    await connection.ask("SCRIPT", "LOAD", script.source)
        self.loaded[bucket] = loaded
        return loaded
