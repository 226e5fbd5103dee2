"""explore's event loop: what asyncio needs of one, in an order that repeats."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from layered_store import MemoryStore, UnavailableError
from layered_store.testing import (
    Faults,
    LoopClock,
    Schedule,
    ScheduleError,
    check_store,
    explore,
)


async def test_it_may_be_called_from_a_running_loop() -> None:
    """Which stands still meanwhile; context variables are those of the caller."""
    seen = []

    async def scenario() -> None:
        seen.append(asyncio.get_running_loop())

    assert explore(scenario, schedules=3).schedules == 3
    assert asyncio.get_running_loop() not in seen


def test_time_is_virtual_and_its_clock_says_so() -> None:
    """A day passes at once, on both readings of the clock."""

    async def scenario(schedule: Schedule) -> None:
        clock = schedule.clock
        wall, now = clock.time(), clock.monotonic()
        await clock.sleep(86_400)
        assert clock.time() - wall == clock.monotonic() - now == 86_400
        assert repr(clock) == repr(LoopClock()) == "LoopClock()"

    explore(scenario, schedules=2)


def test_a_scenario_that_does_not_end_fails() -> None:
    """After ``max_steps``, with the seed."""

    async def scenario() -> None:
        while True:  # noqa: ASYNC110
            await asyncio.sleep(0)

    with pytest.raises(ScheduleError, match="not at an end after 50 steps") as caught:
        explore(scenario, schedules=1, seed=7, max_steps=50)
    assert caught.value.seed == 7
    assert len(caught.value.trace) == 50


def test_an_exception_that_reaches_nobody_fails_the_schedule() -> None:
    """Of a callback, and of a task that nobody awaits."""

    def breaks() -> None:
        raise RuntimeError("in a callback")

    async def callback() -> None:
        asyncio.get_running_loop().call_soon(breaks)
        await asyncio.sleep(1)

    async def fails() -> None:
        raise RuntimeError("in a task")

    async def task() -> None:
        asyncio.ensure_future(fails())  # noqa: RUF006
        await asyncio.sleep(1)

    async def told() -> None:
        asyncio.get_running_loop().default_exception_handler({"message": "by hand"})

    for scenario, words in ((callback, "in a callback"), (task, "in a task"), (told, "by hand")):
        with pytest.raises(ScheduleError, match=words) as caught:
            explore(scenario, schedules=3, seed=4)
        assert caught.value.seed == 4


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_whoever_ends_the_program_ends_it(error: type[BaseException]) -> None:
    """Ctrl-C is no finding."""

    async def scenario() -> None:
        raise error

    with pytest.raises(error):
        explore(scenario, schedules=1)


def test_work_for_a_thread_is_a_step_like_any_other() -> None:
    """Its result and its error reach whoever awaits; one who left gets neither."""
    ran: list[int] = []

    def work(number: int) -> int:
        ran.append(number)
        return 10 // number

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        assert loop.is_running()
        assert loop.get_task_factory() is None
        assert await loop.run_in_executor(None, work, 5) == 2
        with pytest.raises(ZeroDivisionError):
            await loop.run_in_executor(None, work, 0)
        loop.run_in_executor(None, work, 1).cancel()
        await asyncio.sleep(1)

    explore(scenario, schedules=1)
    assert ran == [5, 0]


def test_a_timer_can_be_looked_at_and_cancelled() -> None:
    """As of any event loop."""
    rung: list[str] = []

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        timer = loop.call_later(2, rung.append, "late")
        assert timer.when() == begun + 2
        assert not timer.cancelled()
        timer.cancel()
        assert timer.cancelled()
        await asyncio.sleep(5)

    explore(scenario, schedules=2)
    assert rung == []


def test_generators_left_behind_and_tasks_of_tasks_end_with_the_schedule() -> None:
    """A generator that nobody finished is closed; a task that starts another while it is
    cancelled is ended as well."""
    closed: list[str] = []

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
        finally:
            closed.append("generator")

    async def last() -> None:
        try:
            await asyncio.sleep(1e9)
        finally:
            closed.append("last")

    async def stubborn(tasks: list[Any]) -> None:
        try:
            await asyncio.sleep(1e9)
        finally:
            tasks.append(asyncio.ensure_future(last()))

    async def scenario() -> None:
        tasks: list[Any] = []
        tasks.append(asyncio.ensure_future(stubborn(tasks)))
        async for number in numbers():
            assert number == 1
            break
        await asyncio.sleep(1)

    explore(scenario, schedules=1)
    assert "generator" in closed


def test_what_its_loop_cannot_do_is_told() -> None:
    """A scenario that connects is told why it cannot, and not an empty NotImplementedError."""

    async def connects() -> None:
        await asyncio.open_connection("127.0.0.1", 1)

    with pytest.raises(ScheduleError, match=r"explore has no network, .*create_connection\(\)"):
        explore(connects, schedules=1)


def test_faults_in_a_scenario() -> None:
    """Calls that hang go on when the outage ends: their loop is woken as by a thread."""

    async def scenario(schedule: Schedule) -> None:
        store = Faults(MemoryStore(clock=schedule.clock), clock=schedule.clock)
        with store.outage("hang"):
            reading = asyncio.ensure_future(store.get_latest("u-1"))
            await schedule.clock.sleep(1)
        with pytest.raises(UnavailableError):
            await reading

    assert explore(scenario, schedules=20).schedules == 20


def test_another_thread_is_told_apart() -> None:
    """Its order could not be repeated, so the schedule fails and says why."""

    async def scenario() -> None:
        loop, woken = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with pytest.raises(RuntimeError, match="takes nothing from other threads"):
                loop.call_soon_threadsafe(woken.set)

        thread = threading.Thread(target=wake)
        thread.start()
        thread.join()
        await woken.wait()

    with pytest.raises(ScheduleError, match="a thread called into the event loop of explore"):
        explore(scenario, schedules=1)


def test_a_task_that_ignores_its_end_is_named() -> None:
    """It would live on for ever; nothing is printed when it is collected."""

    async def stubborn() -> None:
        while True:
            try:
                await asyncio.sleep(1e9)
            except asyncio.CancelledError:
                continue

    async def scenario() -> None:
        asyncio.create_task(stubborn(), name="poller")  # noqa: RUF006
        await asyncio.sleep(0)

    with pytest.raises(ScheduleError, match="does not end when it is cancelled: poller\n"):
        explore(scenario, schedules=1)


def test_the_conformance_suite_in_a_scenario() -> None:
    """What needs a second event loop in a thread is left out there."""

    async def scenario() -> None:
        report = await check_store(MemoryStore)
        assert report.ok, str(report)

    explore(scenario, schedules=2)
