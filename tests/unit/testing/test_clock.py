"""FakeClock: time moves when told, and everything that is due happens in its order."""

from __future__ import annotations

import asyncio
import itertools
import math
from datetime import timedelta

import pytest

from layered_store.clock import Clock
from layered_store.testing import FakeClock


def test_is_a_clock() -> None:
    """It has what blocks ask of a clock, and stands still."""
    clock = FakeClock(start=10, wall=1_000)
    assert isinstance(clock, Clock)
    assert (clock.monotonic(), clock.time()) == (10, 1_000)
    clock.set(15)
    assert (clock.monotonic(), clock.time()) == (15, 1_005)
    assert repr(clock) == "FakeClock(15)"


async def test_order() -> None:
    """What falls due runs in the order of its time, then of its begin, at that very time."""
    clock = FakeClock(start=0)
    seen: list[tuple[str, float]] = []
    for name, seconds in (("b", 2), ("a", 1), ("c", 2), ("late", 5)):
        clock.call_later(seconds, lambda name=name: seen.append((name, clock.monotonic())))  # type: ignore[misc]
    gone = clock.call_later(1, lambda: seen.append(("never", 0)))
    gone.cancel()
    assert clock.pending == 4
    await clock.advance(3)
    assert seen == [("a", 1), ("b", 2), ("c", 2)]
    assert clock.monotonic() == 3
    assert clock.pending == 1


async def test_a_timedelta() -> None:
    """Is a step like any other."""
    clock = FakeClock(start=0)
    await clock.advance(timedelta(minutes=2))
    assert clock.monotonic() == 120


async def test_sleeps() -> None:
    """Sleepers wake at their time, also those that sleep again meanwhile."""
    clock = FakeClock(start=0)
    woke: list[float] = []

    async def sleeper() -> None:
        for _ in range(5):
            await clock.sleep(1)
            woke.append(clock.monotonic())

    task = asyncio.create_task(sleeper())
    await clock.advance(3.5)
    assert woke == [1, 2, 3]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert clock.pending == 0
    await clock.sleep(0)


async def test_timeout() -> None:
    """A block that takes longer ends with TimeoutError; a cancellation stays one."""
    clock = FakeClock()

    async def slow(limit: float | None) -> str:
        async with clock.timeout(limit):
            await clock.sleep(10)
        return "done"

    for limit, seconds, outcome in ((5, 5, TimeoutError), (None, 10, "done"), (20, 10, "done")):
        task = asyncio.create_task(slow(limit))
        await clock.advance(seconds)
        assert task.done()
        got = type(task.exception()) if task.exception() else task.result()
        assert got == outcome
    task = asyncio.create_task(slow(5))
    await clock.advance(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert clock.pending == 0


async def test_settles_long_chains() -> None:
    """Everything that can go on has gone on when ``advance`` returns, however long it takes."""
    clock = FakeClock()
    done = asyncio.Event()

    async def chain(left: int) -> None:
        if left:
            await asyncio.create_task(chain(left - 1))
        else:
            await clock.sleep(1)
        done.set()

    task = asyncio.create_task(chain(200))
    await clock.advance(1)
    assert task.done()
    assert done.is_set()


async def test_a_busy_task_does_not_hold_time() -> None:
    """A task that never waits cannot keep ``advance`` from returning."""
    clock = FakeClock()

    async def busy() -> None:
        for _ in itertools.count():
            await asyncio.sleep(0)

    task = asyncio.create_task(busy())
    await clock.advance(1)
    task.cancel()


@pytest.mark.parametrize("seconds", [-1, math.nan, math.inf])
async def test_time_does_not_go_back(seconds: float) -> None:
    """A negative step is a mistake of the test, and so is what is no number, or without end."""
    for odd in ("5s", None, float("nan")):
        with pytest.raises(ValueError, match="must be a finite number of at least 0"):
            await FakeClock().advance(odd)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not go back"):
        await FakeClock().advance(seconds)


async def test_a_step_never_takes_back_what_others_moved_meanwhile() -> None:
    """Whoever moves time further wins: another task, or what fell due."""
    clock = FakeClock(start=0)
    clock.call_later(1, lambda: clock.set(50))
    await clock.advance(2)
    assert clock.monotonic() == 50
