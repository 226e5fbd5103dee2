"""Faults planted in the shipped code, to show that a run finds what it is there to find."""

from __future__ import annotations

from typing import Any

from layered_store import Cached, SQLStore
from layered_store.coherence.guarded.erasing import GuardedErasures
from layered_store.coherence.guarded.seen import Seen
from layered_store.coherence.redis_tier import RedisTier


def _no_erasure_wait() -> None:
    async def at_once(self: Any, *args: Any) -> None:
        pass

    GuardedErasures._wait_for_leases = at_once  # type: ignore[method-assign]


def _no_lease() -> None:
    """An in-process cache that answers with whatever it holds, as most libraries' do."""
    lease = Cached.lease

    def for_ever(self: Any, until: float) -> None:
        lease(self, float("inf"))

    Cached.lease = for_ever  # type: ignore[method-assign]
    Cached.distrust = lambda self: None  # type: ignore[method-assign]


def _no_stamp() -> None:
    """A cache tier that is believed whatever became of its server."""
    read = RedisTier._read

    def believe(self: Any, user_id: str, server: bytes, guard: Any, value: Any) -> Any:
        if value is not None and len(value) > 28:
            guard = value[12:28] + server
        return read(self, user_id, server, guard, value)

    RedisTier._read = believe  # type: ignore[method-assign]
    Seen.floor = lambda self, user_id: 0  # type: ignore[assignment,method-assign]
    Seen.believes = lambda self, user_id, version: True  # type: ignore[assignment,method-assign]


def _doubled() -> None:
    """A repeated write that counts twice: each attempt is a write of its own."""
    import os

    from layered_store.call import Call

    Call.id_of = lambda self, snapshot: os.urandom(16)  # type: ignore[method-assign]


def _lost_write() -> None:
    """A write that is acknowledged and not made, once in a while."""
    write = SQLStore.write
    calls = 0

    async def sometimes(self: Any, snapshot: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 20 == 0:
            return await self.read(snapshot.user_id)
        return await write(self, snapshot)

    SQLStore.write = sometimes  # type: ignore[method-assign]


PLANTED = {
    "no erasure wait": _no_erasure_wait,
    "no lease": _no_lease,
    "no stamp": _no_stamp,
    "doubled": _doubled,
    "lost write": _lost_write,
}


def plant(name: str) -> None:
    """Plant a fault for the rest of this process's life."""
    PLANTED[name]()
