"""The checks of a store's life: first calls, closing, event loops, identity."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, Final

from layered_store.errors import ClosedError, RejectedError, StoreError, UnsupportedError
from layered_store.interface import StateStore
from layered_store.testing.report import Broken, Unneeded, expect, left_since
from layered_store.testing.store_suite import SOON_SECONDS, Suite, in_time

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

__all__ = ["LIFE_CHECKS"]


async def _closes(store: StateStore, second: StateStore) -> None:
    """It opens on first use, closes twice, leaves no task and refuses calls afterwards."""
    del second
    before = asyncio.all_tasks()
    state = Suite(store).snapshot(f"check-{os.urandom(5).hex()}")
    arguments: dict[str, tuple[Any, ...]] = {
        "delete": (state.user_id,),
        "upsert_latest": (state,),
        "upsert_latest_many": ([state],),
        "get_latest": (state.user_id,),
        "get_latest_many": ([state.user_id],),
        "get_history": (state.user_id, 1),
    }
    for name, given in arguments.items():
        try:
            await getattr(store, name)(*given)
        except (UnsupportedError, RejectedError):
            pass  # it cannot, or does not let anybody
    await in_time(store.health_report(), "health_report()")
    await asyncio.gather(store.aclose(), store.aclose())
    await store.aclose()
    for _ in range(20):
        await asyncio.sleep(0)
    left = await left_since(before)
    expect(not left, f"aclose() left {len(left)} tasks running; cancel and await them")
    for name, given in arguments.items():
        await _refuses_closed(store, name, *given)


async def _refuses_closed(store: StateStore, name: str, *arguments: object) -> None:
    """Fail if a call to a closed store does anything but refuse.

    One whose ``aclose`` is the one that StateStore provides has nothing to close, and need not
    know; nor must a history or a delete that it does not have.
    """
    try:
        async with asyncio.timeout(SOON_SECONDS):
            got = await getattr(store, name)(*arguments)
    except ClosedError:
        return
    except (UnsupportedError, RejectedError):
        if name not in ("get_latest", "get_latest_many"):
            return
        raise
    except Exception as exc:
        message = f"{name}() after aclose() {_what_it_did(exc)}; raise ClosedError"
        raise Broken(message) from exc
    if _closes_something(store) and (name != "get_history" or got):
        raise Broken(f"{name}() after aclose() did not raise ClosedError")


def _closes_something(store: StateStore) -> bool:
    return type(store).aclose is not StateStore.aclose


def _what_it_did(exc: Exception) -> str:
    if isinstance(exc, TimeoutError) and not isinstance(exc, StoreError):
        return f"did not end within {SOON_SECONDS:g} s"
    return f"raised {type(exc).__name__}"


async def _context(store: StateStore, second: StateStore) -> None:
    """``async with`` gives the store itself and closes it."""
    async with store as entered:
        expect(entered is store, "`async with` gives another object than the store")
        await store.open()
        well = await in_time(store.health_check(), "health_check()")
        expect(well is True, "it is not healthy once it was opened")
        suite = Suite(store)
        state = suite.snapshot(suite.user("context"))
        try:
            await store.upsert_latest(state)
        except (UnsupportedError, RejectedError):
            pass
        else:
            await store.open()
            got = await store.get_latest(state.user_id)
            expect(got == state, "open() of a store in use lost what it held")
        await suite.clean_up()
    await _refuses_closed(store, "get_latest", state.user_id)
    try:
        async with second:
            raise _Marker
    except _Marker:
        pass
    else:
        raise Broken("`async with` swallowed an error; let __aexit__ return None")


async def _closes_under_calls(store: StateStore, second: StateStore) -> None:
    """Calls that are under way when it is closed end, with their result or a StoreError."""
    del second
    suite = Suite(store)
    states = [suite.snapshot(suite.user(f"under-way-{number}"), number) for number in range(4)]
    try:
        await store.upsert_latest(states[0])
    except (UnsupportedError, RejectedError):
        raise Unneeded("it refuses writes") from None
    calls: list[asyncio.Future[Any]] = []
    for _ in range(3):  # so some have just begun and others are further on
        calls += [asyncio.ensure_future(store.get_latest(state.user_id)) for state in states]
        calls += [asyncio.ensure_future(store.upsert_latest(state)) for state in states]
        await asyncio.sleep(0)
    await store.aclose()
    _, hung = await asyncio.wait(calls, timeout=SOON_SECONDS)
    for call in hung:
        call.cancel()
    expect(
        not hung,
        f"{len(hung)} calls that were under way when it was closed did not end within"
        f" {SOON_SECONDS:g} s; let aclose() wait for them, or end them with ClosedError",
    )
    for call in calls:
        exc = asyncio.CancelledError() if call.cancelled() else call.exception()
        expect(
            exc is None or isinstance(exc, StoreError),
            f"a call that was under way when it was closed raised {type(exc).__name__}; let"
            " aclose() wait for it, or end it with ClosedError",
        )


class _Marker(Exception):  # noqa: N818
    """Raised inside ``async with``, to see it come out."""


async def _first_calls(store: StateStore, second: StateStore) -> None:
    """It opens itself on first use, also when several calls come at once."""
    del second
    suite = Suite(store)
    states = [suite.snapshot(suite.user(f"first-{number}"), number) for number in range(4)]
    try:
        await asyncio.gather(*map(store.upsert_latest, states))
    except (UnsupportedError, RejectedError):
        raise Unneeded("it refuses writes") from None
    for state in states:
        got = await store.get_latest(state.user_id)
        expect(got == state, "of several first writes at the same time one was lost")
    suite.can_delete = type(store).delete is not StateStore.delete
    await suite.clean_up()


async def _other_loop(store: StateStore, second: StateStore) -> None:
    """On another event loop it works as well, or refuses with a StoreError that says so."""
    del second
    suite = Suite(store)
    states = [suite.snapshot(suite.user(f"loop-{number}"), number) for number in range(3)]

    async def use() -> bool:
        async with asyncio.timeout(SOON_SECONDS):
            for state in states:
                await store.upsert_latest(state)
            return [await store.get_latest(state.user_id) for state in states] == states

    try:
        expect(await use(), "what was written is not what is read")
    except (UnsupportedError, RejectedError):
        raise Unneeded("it refuses writes") from None
    try:
        there = await asyncio.to_thread(_run, use)
    except StoreError:
        there = True
    except Exception as exc:
        raise Broken(
            f"a call from a second event loop {_what_it_did(exc)}; work there as well, or raise a"
            " StoreError that names the store and says to build one for each loop"
        ) from exc
    if there is None:
        raise Unneeded("this event loop has no threads")
    expect(there, "what was written on a second event loop is not what is read there")
    expect(await use(), "after calls from a second event loop the first is not served")
    suite.can_delete = type(store).delete is not StateStore.delete
    await suite.clean_up()


def _run(use: Callable[[], Coroutine[Any, Any, bool]]) -> bool | None:
    """Run it on an event loop of its own; None where the work for threads is done on this one."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(use())
    return None


async def _identity(store: StateStore, second: StateStore) -> None:
    """A store is equal to itself alone, can be hashed and printed."""
    if store is second:
        raise Unneeded("the factory returns one object every time")
    same = store == store  # noqa: PLR0124
    expect(same and store != second, "two stores are equal; build dataclasses with eq=False")
    try:
        hash(store)
    except TypeError as exc:
        raise Broken("it cannot be hashed; build dataclasses with eq=False") from exc
    expect(isinstance(repr(store), str), "it has no repr")


LIFE_CHECKS: Final = (
    _closes,
    _closes_under_calls,
    _context,
    _first_calls,
    _other_loop,
    _identity,
)
