"""Late writes: one that meets an erasure of its user, and may have begun before it.

The script that stores a state stores nothing then and tells of the erasure. Here it is decided
which of the two began first; a write that began later goes out again and names the erasure that it
follows. What a message lost on its way in the network does not count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from layered_store.errors import UnavailableError
from layered_store.stores.erasures import Began
from layered_store.stores.redis.failures import GarbageError, translate
from layered_store.stores.redis.scripts import NOW, UPSERT

if TYPE_CHECKING:
    from layered_store.stores.erasures import KnownErasures
    from layered_store.stores.redis.store import RedisStore

__all__ = ["Write", "settle"]

_PROBES: Final = 3
_TRIES: Final = 8

_GUESS_US: Final = 5_000.0
"""Within such a round trip the order is guessed: a write of another process that began so shortly
before or after the erasure may count as either. Beyond it the write fails and says so."""


class Write(NamedTuple):
    """One state to store.

    Args:
        digest: of the user.
        body: the encoded snapshot.
        write_id: what a repeat is recognised by.
        started: when the caller began, on the store's clock.
        order: place of the beginning among the writes and erasures of this process.
        first: whether no earlier attempt of it can have been stored.
    """

    digest: bytes
    body: bytes
    write_id: bytes
    started: float
    order: int
    first: bool


async def settle(
    store: RedisStore, erasures: KnownErasures, write: Write, reply: Any, sent: float, op: str
) -> bool:
    """Return whether a write became the latest state, from the script's first reply.

    Args:
        store: where it is stored.
        erasures: what is known of the erasures on that server.
        write: what is stored.
        reply: of :data:`~layered_store.stores.redis.scripts.UPSERT`.
        sent: when that was sent, on the store's clock.
        op: for errors.

    Raises:
        UnavailableError: its order and that of an erasure cannot be told, and nothing was stored;
            or the script does not reply like that.
    """
    for _ in range(_TRIES):
        if reply in (0, 1):
            return bool(reply)
        if not isinstance(reply, list) or list(map(type, reply)) != [int] * 3:
            raise translate(GarbageError(), operation=op, layer=store.name, write=True)
        version, erased_at, now_us = reply
        began = Began()
        began.learn(sent, store.clock.monotonic(), now_us)
        if await _began_before(store, erasures, write, version, erased_at, began, op):
            return False
        sent = store.clock.monotonic()
        keys, args = store.upsert_parts(write, follows=version)
        reply = await store.run_script(UPSERT, keys, args, operation=op)
    raise UnavailableError(
        "the user was erased again whenever the write was tried", operation=op, layer=store.name
    )


async def _began_before(
    store: RedisStore,
    erasures: KnownErasures,
    write: Write,
    version: int,
    erased_at: int,
    began: Began,
    op: str,
) -> bool:
    async def now_us() -> int:
        keys = (store.key(write.digest),)
        reply = await store.run_script(NOW, keys, operation=op, write=False)
        if type(reply) is not int:
            raise translate(GarbageError(), operation=op, layer=store.name, write=False)
        return reply

    answer = await erasures.began_before(write, version, erased_at, began, now_us, _PROBES)
    if answer is None:
        answer = erasures.guess(write.started, erased_at, _GUESS_US)
    if answer is not None:
        return answer
    raise UnavailableError(
        "the write and an erasure of its user began too close together to tell their order;"
        " nothing was stored, call again",
        operation=op,
        layer=store.name,
    )
