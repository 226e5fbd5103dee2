"""Calls that were left behind when their event loop was closed end when the collector finds them.

That may be in the midst of another call of the same thread, which holds a lock just then.
"""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import weakref
from collections.abc import Callable
from typing import Any

import cachetools
import pytest

from layered_store import Cached, MemoryStore, StateSnapshot, StateStore
from layered_store.coherence.guarded.backlog import Backlog
from layered_store.coherence.guarded.seen import Seen
from layered_store.coherence.guarded.watch import Signal
from layered_store.identity import digest_function
from layered_store.testing import FakeClock


class Hanging(MemoryStore):
    """One whose calls for one user never end."""

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        if snapshot.user_id == "left-behind":
            await asyncio.get_running_loop().create_future()
        await super().upsert_latest(snapshot)

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        if user_id == "left-behind":
            await asyncio.get_running_loop().create_future()
        return await super().get_latest(user_id)


class Collecting(random.Random):
    """A source of chance in whose midst the collector runs."""

    def random(self) -> float:
        gc.collect()
        return 0.5


class CollectingCache(cachetools.LRUCache[Any, Any]):
    """A cache in whose midst the collector runs."""

    def __setitem__(self, key: object, value: object) -> None:
        gc.collect()
        super().__setitem__(key, value)


def ends(work: Callable[[], object]) -> bool:
    """Tell whether it ends, in a thread that is let go of when it does not."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(10.0)
    return not thread.is_alive()


def leave_behind(store: StateStore, call: Callable[[], Any]) -> weakref.ref[object]:
    """Begin a call on an event loop that is closed under it, for the collector to find."""
    loop = asyncio.new_event_loop()

    async def begin() -> weakref.ref[object]:
        task = loop.create_task(call())
        left: Any = task
        left._log_destroy_pending = False  # it is meant to be
        await asyncio.sleep(0)
        return weakref.ref(task)

    try:
        return loop.run_until_complete(begin())
    finally:
        loop.close()


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_a_call_left_behind_may_end_in_the_midst_of_another(*, reads: bool, given: bool) -> None:
    """The cache goes on, and keeps nothing of the call that was left behind."""
    store = Cached(
        Hanging(),
        ttl_jitter=0.5,
        random=Collecting(),
        cache=CollectingCache(10) if given else None,
    )
    call = (
        (lambda: store.get_latest("left-behind"))
        if reads
        else (lambda: store.upsert_latest(StateSnapshot("left-behind", 0)))
    )
    gc.disable()
    try:
        left = leave_behind(store, call)
        assert left() is not None
        assert ends(lambda: asyncio.run(store.upsert_latest(StateSnapshot("u-1", 0))))
        assert left() is None
    finally:
        gc.enable()
    assert not store._held.writing
    assert not store._held.flights
    assert asyncio.run(store.get_latest("u-1")) == StateSnapshot("u-1", 0)


def test_what_a_process_has_seen_is_noted_in_the_midst_of_a_note() -> None:
    """A write that was left behind puts its user in doubt while another one's floor is raised."""
    clock = FakeClock()
    seen = Seen(clock, Signal(clock))

    class Name(str):
        __slots__ = ()

        def __hash__(self) -> int:
            seen.doubt(["left-behind"], GeneratorExit())
            return super().__hash__()

    assert ends(lambda: seen.raise_floor(Name("u-1"), 1))
    assert seen.floor("u-1") == 1
    assert not seen.believes("left-behind", 1)


def test_who_is_behind_is_noted_in_the_midst_of_a_note() -> None:
    """A write that was left behind is counted while another one's copy is put right."""

    class Digest(digest_function):
        def __call__(self, user_id: str) -> bytes:
            if user_id == "u-1":
                backlog.add("left-behind")
            return super().__call__(user_id)

    backlog = Backlog(Digest(b"k" * 32), FakeClock())
    backlog.add("u-2")
    assert ends(lambda: backlog.discard("u-1"))
    assert len(backlog) == 2
