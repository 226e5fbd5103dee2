"""The checks of calls that come at once, are cancelled, or keep others waiting."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from layered_store.clock import SYSTEM_CLOCK
from layered_store.testing.report import Broken, expect
from layered_store.testing.store_suite import NOW_MS, SOON_SECONDS, in_time

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from layered_store.interface import StateStore
    from layered_store.testing.store_suite import Suite

__all__ = ["at_once", "cancelled", "lets_others_run"]

_SOON_TRIES: Final = 20
_CANCELLED: Final = 160
_HELD_UP_SECONDS: Final = 0.05


async def at_once(suite: Suite) -> None:
    """Writes at the same time leave one winner, and everybody reads their own."""
    store = suite.store
    user_id = suite.user("at-once")
    # Of one moment, since a store may go by the snapshots' own time.
    written = [suite.snapshot(user_id, number, updated_at_unix_ms=NOW_MS) for number in range(12)]
    mixed_up = (
        "of several users read at the same time one got another's state; keep what belongs to a"
        " call in that call, not on the store"
    )

    async def own(number: int) -> None:
        mine = suite.snapshot(suite.user(f"own-{number}"), number)
        await store.upsert_latest(mine)
        got = await store.get_latest(mine.user_id)
        expect(got is None or got.user_id == mine.user_id, mixed_up)
        expect(got == mine, "a state that was written is not what its writer reads next")

    await asyncio.gather(*map(store.upsert_latest, written), *map(own, range(12)))
    ids = [user_id, *(f"check-{suite.run}-own-{number}" for number in range(12))]
    found = await asyncio.gather(*map(store.get_latest, ids))
    expect([state and state.user_id for state in found] == ids, mixed_up)
    latest = await store.get_latest(user_id)
    expect(latest in written, "after writes at the same time the latest state is none of them")
    if suite.history:
        newest = await store.get_history(user_id, 1)
        expect(newest == [latest], "the latest state is not the newest of the history")
        one_by_one = (await suite.write("one-by-one", len(written)))[0].user_id
        kept = await store.get_history(user_id, len(written))
        full = len(await store.get_history(one_by_one, len(written)))
        differing = [state for number, state in enumerate(kept) if state not in kept[:number]]
        expect(
            len(differing) == len(kept) == full,
            f"of {len(written)} writes at the same time the history holds {len(differing)}, of as"
            f" many one by one {full}; no write may undo another's entry",
        )
    reads = await asyncio.gather(*(store.get_latest(user_id) for _ in range(20)))
    expect(all(read == latest for read in reads), "readers at the same time see different states")
    others = ids[1:]
    batches = await asyncio.gather(*(store.get_latest_many([other]) for other in others))
    expect([[*batch] for batch in batches] == [[other] for other in others], mixed_up)
    if suite.history:
        kept_of = await asyncio.gather(*(store.get_history(other, 1) for other in others))
        expect([kept[0].user_id for kept in kept_of if kept] == others, mixed_up)
    if suite.can_delete:
        await asyncio.gather(*map(store.delete, others[::2]))
        left = await store.get_latest_many(others)
        expect(
            left.keys() == {*others[1::2]},
            f"of {len(others)} users {len(others[::2])} were deleted at the same time, and"
            f" {len(left)} are left; keep what belongs to a call in that call, not on the store",
        )


async def cancelled(suite: Suite) -> None:
    """A cancelled call ends, and the store works on."""
    store, user_id = suite.store, suite.user("cancelled")
    for turns in range(4):
        state = suite.snapshot(user_id, turns)
        calls: list[Callable[[], Awaitable[object]]] = [
            partial(store.upsert_latest, state),
            partial(store.upsert_latest_many, [state]),
            partial(store.get_latest, user_id),
            partial(store.get_latest_many, [user_id]),
            partial(suite.history_of, user_id, 5),
        ]
        if suite.can_delete:
            calls.append(partial(store.delete, suite.user("cancelled-delete")))
        for call in calls:
            await _cut_off(call, turns)
            if suite.history:
                await _newest_is_latest(store, user_id)
    # As many as empty a pool of connections, if each keeps one.
    for number in range(_CANCELLED):
        await _cut_off(partial(store.get_latest, user_id), 1 + number % 3)
    wrote = suite.snapshot(user_id, 99)
    after = f"after {_CANCELLED} cancelled calls the next one"
    await in_time(store.upsert_latest(wrote), after, "give back in `finally` what a call took")
    got = await store.get_latest(user_id)
    expect(got == wrote, "after cancelled calls a write is not what is read next")


async def _newest_is_latest(store: StateStore, user_id: str) -> None:
    for _ in range(_SOON_TRIES):
        newest = await store.get_history(user_id, 1)
        latest = await store.get_latest(user_id)
        if newest == ([] if latest is None else [latest]):
            return
        await asyncio.sleep(SOON_SECONDS / _SOON_TRIES / 5)  # what was sent may arrive later
    raise Broken(
        "after a cancelled write the newest of the history is not the latest state; write both in"
        " one step, or none"
    )


async def _cut_off(call: Callable[[], Awaitable[object]], turns: int) -> None:
    """Begin a call and cancel it after so many turns of the event loop."""
    task: asyncio.Future[Any] = asyncio.ensure_future(call())
    for _ in range(turns):
        await asyncio.sleep(0)
    asked = task.cancel()
    done, _ = await asyncio.wait({task}, timeout=SOON_SECONDS)
    expect(
        done,
        f"a cancelled call did not end within {SOON_SECONDS:g} s; let CancelledError through, and"
        " give back in `finally` what the call took",
    )
    if not task.cancelled():
        task.result()
        expect(not asked, "a cancelled call returned normally; let CancelledError through")


async def lets_others_run(suite: Suite) -> None:
    """Others go on while a call waits."""
    state = (await suite.write("others"))[0]
    for name, call in (
        ("upsert_latest", partial(suite.store.upsert_latest, state)),
        ("get_latest", partial(suite.store.get_latest, state.user_id)),
    ):
        # Several times, since the machine may hold up anybody now and then.
        for _ in range(5):
            held_up = await _longest_turn(call())
            if held_up < _HELD_UP_SECONDS:
                break
        else:
            raise Broken(
                f"{name}() held up the event loop for {held_up:.2f} s each time; await what takes"
                " time, or do it in a thread (asyncio.to_thread)"
            )


async def _longest_turn(call: Awaitable[object]) -> float:
    task = asyncio.ensure_future(call)
    longest, before = 0.0, SYSTEM_CLOCK.monotonic()
    while not task.done():
        await asyncio.sleep(0)
        now = SYSTEM_CLOCK.monotonic()
        longest, before = max(longest, now - before), now
    await task
    return longest
