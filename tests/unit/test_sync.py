"""The blocking facade."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from layered_store import sync
from layered_store.errors import (
    ClosedError,
    ConfigError,
    StoreTimeoutError,
    UnsupportedError,
    ValidationError,
)
from layered_store.interface import StateStore
from layered_store.layer import Layer
from layered_store.snapshot import StateSnapshot
from layered_store.stores.memory import MemoryStore
from layered_store.sync import SyncStore


class Hangs(MemoryStore):
    """Never answers a read, and says when one was cancelled."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.cancelled = threading.Event()
        self.begun = threading.Event()

    async def get_latest(self, user_id: str) -> StateSnapshot | None:  # noqa: ARG002
        import asyncio

        self.begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return None


def test_every_operation() -> None:
    """Each operation answers as the awaited one does."""
    with SyncStore(MemoryStore()) as store:
        first = StateSnapshot("u-1", axes={"a": 0.1})
        second = StateSnapshot("u-1", axes={"a": 0.2})
        store.upsert_latest(first)
        store.upsert_latest_many(iter([second, StateSnapshot("u-2")]))
        assert store.get_latest("u-1") == second
        assert store.get_history("u-1", 5) == [second, first]
        assert set(store.get_latest_many(iter(["u-1", "u-2", "u-3"]))) == {"u-1", "u-2"}
        store.delete("u-1")
        assert store.get_latest("u-1") is None
        assert store.health_check()
        assert store.health_report().name == "MemoryStore"


def test_errors_come_through() -> None:
    """What the stack raises is raised in the calling thread."""
    with SyncStore(MemoryStore()) as store, pytest.raises(ValidationError):
        store.get_latest("not an id")


def test_many_threads() -> None:
    """Calls of many threads at once all take effect."""
    with SyncStore(MemoryStore()) as store, ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: store.upsert_latest(StateSnapshot(f"u-{i % 7}")), range(300)))
        assert sum(len(store.get_history(f"u-{i}", 100)) for i in range(7)) == 300


def test_timeout_cancels_the_call_below() -> None:
    """After the limit the caller has its error and the stack's call is cancelled."""
    stack = Hangs()
    with SyncStore(stack, timeout=0.05) as store:
        with pytest.raises(StoreTimeoutError):
            store.get_latest("u-1")
        assert stack.cancelled.wait(5)


def test_close_ends_what_still_runs() -> None:
    """Closing while a call hangs ends that call with an error, and leaves no thread."""
    stack = Hangs()
    store = SyncStore(stack)
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(store.get_latest, "u-1")
        assert stack.begun.wait(5)
        store.close()
        with pytest.raises(ClosedError):
            hanging.result(5)
    assert not [t for t in threading.enumerate() if t.name == "layered_store-sync"]


class Stored(Hangs):
    """Takes every write and does not say so."""

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        await super().upsert_latest(snapshot)
        await self.get_latest(snapshot.user_id)

    async def upsert_latest_many(self, snapshots: Iterable[StateSnapshot]) -> None:
        for snapshot in snapshots:
            await self.upsert_latest(snapshot)

    async def delete(self, user_id: str) -> None:
        await super().delete(user_id)
        await self.get_latest(user_id)


@pytest.mark.parametrize(
    ("call", "unknown"),
    [
        (lambda store: store.upsert_latest(StateSnapshot("u-1")), True),
        (lambda store: store.upsert_latest_many([StateSnapshot("u-1")]), True),
        (lambda store: store.delete("u-1"), True),
        (lambda store: store.get_latest("u-1"), False),
    ],
)
def test_a_write_that_closing_cut_off_may_have_taken_effect(
    call: Callable[[SyncStore], object], *, unknown: bool
) -> None:
    """And says so; one that never began does not, nor does a read."""
    stack = Stored()
    store = SyncStore(stack)
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(call, store)
        assert stack.begun.wait(5)
        store.close()
        with pytest.raises(ClosedError) as caught:
            hanging.result(5)
    assert caught.value.outcome_unknown is unknown
    with pytest.raises(ClosedError) as caught:
        call(store)
    assert not caught.value.outcome_unknown


def test_closed_stays_closed() -> None:
    """After close, which may be repeated, every call is a ClosedError; the stack is closed too."""
    stack = MemoryStore()
    store = SyncStore(stack)
    store.close()
    store.close()
    with pytest.raises(ClosedError):
        store.get_latest("u-1")
    assert stack._closed


def test_refuses_its_own_loop() -> None:
    """A call from the loop that would have to answer it is refused instead of hanging."""

    class Inside(Layer):
        async def get_latest(self, user_id: str) -> StateSnapshot | None:
            return store.get_latest(user_id)

    store = SyncStore(Inside(MemoryStore()))
    with store, pytest.raises(UnsupportedError):
        store.get_latest("u-1")


@pytest.mark.parametrize("wrong", [None, MemoryStore, 5, "memory"])
def test_refuses_what_is_no_stack(wrong: object) -> None:
    """Anything but a store or a function is a ConfigError."""
    with pytest.raises(ConfigError):
        SyncStore(wrong)  # type: ignore[arg-type]


def test_exit_without_close_does_not_hang() -> None:
    """A process that forgets to close ends at once, and its stack is closed."""
    code = """
from layered_store.stores.memory import MemoryStore
from layered_store.sync import SyncStore
class Loud(MemoryStore):
    async def aclose(self):
        print("closed")
store = SyncStore(Loud())
store.get_latest("u-1")
"""
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert (done.stdout.strip(), done.stderr) == ("closed", "")


FORK = """
import os, sys
from layered_store.errors import ClosedError
from layered_store.stores.memory import MemoryStore
from layered_store.sync import SyncStore
given = {given}
store = SyncStore(given)
if {used}:
    store.get_latest("u-1")
pid = os.fork()
if pid == 0:
    try:
        store.get_latest("u-1")
        code = 10
    except ClosedError:
        code = 20
    store.close()
    sys.exit(code)
store.get_latest("u-1")
_, status = os.waitpid(pid, 0)
print(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize(
    ("given", "used", "answer"),
    [
        ("MemoryStore", False, None),
        ("lambda: MemoryStore()", True, "10"),
        ("MemoryStore()", True, "20"),
        ("MemoryStore()", False, "10"),
    ],
)
def test_fork(given: str, used: bool, answer: str | None) -> None:  # noqa: FBT001
    """A forked child builds its own stack from a function, or is told; neither side hangs."""
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", FORK.format(given=given, used=used)],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    if answer is None:
        assert "ConfigError" in done.stderr
    else:
        assert done.stdout.strip() == answer


def test_repr_names_the_stack() -> None:
    """Its repr shows what it wraps."""
    store: StateStore = MemoryStore()
    assert repr(SyncStore(store)) == "SyncStore(MemoryStore())"


def test_function_that_returns_something_else() -> None:
    """What the function returns is checked with the first call, a coroutine included."""

    async def build() -> MemoryStore:
        return MemoryStore()

    for odd, name in (
        (lambda: None, "NoneType"),
        (lambda: MemoryStore, "ABCMeta"),
        (build, "corou"),
    ):
        store = SyncStore(odd)  # type: ignore[arg-type]
        with pytest.raises(
            ConfigError, match=f"SyncStore.stack: must return a StateStore, not {name}"
        ):
            store.get_latest("u-1")
        store.close()


def test_close_on_its_own_loop() -> None:
    """Closing from inside a call would wait for itself, so it is refused."""

    class Closes(MemoryStore):
        async def get_latest(self, user_id: str) -> StateSnapshot | None:
            store.close()
            return await super().get_latest(user_id)

    store = SyncStore(Closes())
    with pytest.raises(UnsupportedError, match="close it elsewhere"):
        store.get_latest("u-1")
    store.close()


def test_a_call_that_comes_when_the_store_has_just_been_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is told as every later one, also when it had seen the store open."""
    store = SyncStore(MemoryStore())
    store.upsert_latest(StateSnapshot("u-1"))
    ask = threading.get_ident

    def slowly() -> int:
        monkeypatch.undo()
        store.close()
        return ask()

    monkeypatch.setattr("layered_store.sync.threading.get_ident", slowly)
    with pytest.raises(ClosedError):
        store.get_latest("u-1")


def test_an_answer_at_the_last_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that ends in the very moment in which the time runs out gives its answer."""
    import concurrent.futures

    with SyncStore(MemoryStore(), timeout=5) as store:
        store.upsert_latest(StateSnapshot("u-1"))
        wait = concurrent.futures.Future.result

        def late(self: concurrent.futures.Future[object], timeout: float | None = None) -> object:
            wait(self, None)
            if timeout is not None:
                raise TimeoutError
            return wait(self, timeout)

        monkeypatch.setattr(concurrent.futures.Future, "result", late)
        assert store.get_latest("u-1") is not None
        monkeypatch.undo()


def test_a_lone_id_is_no_batch() -> None:
    """The same checks as on an awaited store."""
    with SyncStore(MemoryStore()) as store:
        for bad in ("u-1", None, 7):
            with pytest.raises(ValidationError, match="user_ids must be a list"):
                store.get_latest_many(bad)  # type: ignore[arg-type]


class Reluctant(MemoryStore):
    """Does not close, by hanging or by failing."""

    fails = False
    cancelled = False

    async def aclose(self) -> None:
        import asyncio

        if self.fails:
            raise OSError("lost")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise


def threads() -> int:
    return sum(thread.name == "layered_store-sync" for thread in threading.enumerate())


def test_a_stack_that_does_not_close_holds_up_the_end_of_the_process_for_a_while_only() -> None:
    """The thread ends all the same, and closing again finds nothing to do."""
    before = threads()
    stack = Reluctant()
    store = SyncStore(stack)
    store.upsert_latest(StateSnapshot("u-1"))
    runner = store._runner
    assert runner is not None
    runner.close(0.05)
    assert threads() == before
    assert runner.loop.is_closed() and stack.cancelled
    runner.close(0.05)


def test_a_stack_that_fails_to_close_says_so_and_leaves_no_thread() -> None:
    """A time limit of its own too, which is none of the caller's."""

    class Late(MemoryStore):
        async def aclose(self) -> None:
            raise StoreTimeoutError("late")

    before = threads()
    store = SyncStore(Late())
    store.upsert_latest(StateSnapshot("u-1"))
    with pytest.raises(StoreTimeoutError):
        store.close()
    assert threads() == before


def test_what_fails_at_the_end_of_the_process_keeps_no_other_from_closing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every stack that nobody closed is tried; those of the parent of a fork are left alone."""
    runners: weakref.WeakSet[Any] = weakref.WeakSet()
    monkeypatch.setattr(sync, "_runners", runners)
    stacks = [Reluctant(), MemoryStore(), MemoryStore()]
    stacks[0].fails = True  # type: ignore[attr-defined]
    stores = [SyncStore(stack) for stack in stacks]
    for store in stores:
        store.upsert_latest(StateSnapshot("u-1"))
    assert len(runners) == 3
    parents = stores[2]._runner
    assert parents is not None
    parents.pid += 1
    sync._close_all()
    assert stacks[1]._closed and not stacks[2]._closed
    assert list(runners) == [parents]
    parents.pid -= 1
    sync._close_all()
    assert stacks[2]._closed
