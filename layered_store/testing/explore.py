"""Running one scenario under many orders of its tasks, in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import heapq
import inspect
import itertools
import random as _random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from layered_store.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
    from contextlib import AbstractAsyncContextManager

__all__ = ["Explored", "LoopClock", "Schedule", "ScheduleError", "Step", "explore"]

_WALL: Final = 1_700_000_000.0
_SHOWN_STEPS: Final = 30
_END: Final = "end of the schedule"
_LAST_STEPS: Final = 10_000
"""How many steps the tasks that a scenario left have to end, once they are cancelled."""
_FOREIGN: Final = (
    "a thread called into the event loop of explore, which takes nothing from other threads, as"
    " their order could not be repeated; use stores in memory, and asyncio.to_thread for work"
)
_WANDERING: Final = (0.0, 0.1, 0.3, 1.0, 1.0)
"""How often a schedule leaves the order of arrival. Bugs of few steps show best when all is
shuffled, those of many steps when the order is almost the usual one."""


def _loop_time() -> float:
    return asyncio.get_running_loop().time()


class LoopClock:
    """The time of the running event loop: virtual inside :func:`explore`, real elsewhere.

    Pass it as ``clock=`` to every block of a scenario.
    """

    __slots__ = ()

    monotonic = staticmethod(_loop_time)

    def time(self) -> float:
        return _WALL + _loop_time()

    def sleep(self, seconds: float) -> Awaitable[None]:
        return asyncio.sleep(seconds)

    def timeout(self, seconds: float | None) -> AbstractAsyncContextManager[Any]:
        return asyncio.timeout(seconds)

    def call_later(self, seconds: float, callback: Callable[[], object]) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(seconds, callback)

    def __repr__(self) -> str:
        return "LoopClock()"


class Step(NamedTuple):
    """One step of a schedule.

    Args:
        time: virtual time, in seconds since the schedule began.
        task: the task's name, or the callback's.
    """

    time: float
    task: str


@dataclass(slots=True)
class Schedule:
    """One order of the tasks, as its scenario sees it.

    Args:
        seed: repeats it: ``explore(scenario, replay=seed)``.
        random: for the scenario's own choices, so that they repeat too.
        clock: the schedule's virtual time.
        trace: the steps taken so far.
    """

    seed: int
    random: _random.Random
    clock: LoopClock = field(default_factory=LoopClock)
    trace: list[Step] = field(default_factory=list)


class Explored(NamedTuple):
    """What an exploration without failure did.

    Args:
        schedules: how many schedules ran.
        steps: how many steps they took in all.
    """

    schedules: int
    steps: int


class ScheduleError(AssertionError):
    """A scenario failed under one schedule; the failure itself is its ``__cause__``.

    Args:
        message: what went wrong.
        seed: repeats the schedule: ``explore(scenario, replay=seed)``.
        trace: which task ran at which step.
    """

    def __init__(self, message: str, *, seed: int, trace: list[Step]) -> None:
        super().__init__(message)
        self.message = message
        self.seed = seed
        self.trace = trace

    def __str__(self) -> str:
        first = max(0, len(self.trace) - _SHOWN_STEPS)
        lines = "".join(
            f"\n  {number:5d}  {step.time:10.6f} s  {step.task}"
            for number, step in enumerate(self.trace[first:], first + 1)
        )
        skipped = "\n  ..." if first else ""
        return (
            f"{self.message}\nrepeat it with explore(scenario, replay={self.seed})"
            f"\nsteps (number, time, task):{skipped}{lines}"
        )


def explore(
    scenario: Callable[..., Coroutine[Any, Any, object]],
    *,
    schedules: int = 1_000,
    seed: int = 0,
    replay: int | None = None,
    max_steps: int = 1_000_000,
) -> Explored:
    """Run ``scenario`` under many interleavings of its tasks; raise for the first that fails.

    Each schedule has an event loop of its own without I/O. Which of the tasks that could go on
    does so is drawn from the schedule's seed; when all wait, time jumps to the next timer. A
    schedule fails when the scenario raises, when all tasks wait for one another, when it does not
    end, or when an exception reaches nobody. The same seed gives the same run, as long as the
    scenario takes time from :class:`LoopClock`, chance from ``schedule.random``, and no order from
    a set. May be called from inside a running event loop, which stands still meanwhile.

    Example::

        async def scenario(schedule: Schedule) -> None:
            stack = Cached(MemoryStore(clock=schedule.clock), clock=schedule.clock)
            await asyncio.gather(stack.upsert_latest(state), stack.delete("u-1"))
            ...

        explore(scenario, schedules=1_000, seed=1)

    Args:
        scenario: a coroutine function without arguments, or with one: the :class:`Schedule`.
        schedules: how many schedules to run; their seeds count up from ``seed``.
        seed: the first schedule's seed.
        replay: run only the schedule with this seed.
        max_steps: a schedule with more steps counts as one that does not end.

    Raises:
        ScheduleError: with the seed and the steps of the schedule that failed.
        ConfigError: ``schedules`` or ``max_steps`` is below 1, or a seed is no int.
    """
    for option, value in (("schedules", schedules), ("max_steps", max_steps)):
        if type(value) is not int or value < 1:
            raise ConfigError("must be an int of at least 1", option=option, layer="explore")
    for option, value in (("seed", seed), ("replay", seed if replay is None else replay)):
        if type(value) is not int:
            raise ConfigError("must be an int", option=option, layer="explore")
    seeds = range(seed, seed + schedules) if replay is None else range(replay, replay + 1)
    if asyncio._get_running_loop() is None:  # noqa: SLF001  public, for loops to use
        return _explore(scenario, seeds, max_steps)
    # A thread runs one loop at a time.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(
            contextvars.copy_context().run, _explore, scenario, seeds, max_steps
        ).result()


def _explore(
    scenario: Callable[..., Coroutine[Any, Any, object]], seeds: range, max_steps: int
) -> Explored:
    takes_schedule = bool(inspect.signature(scenario).parameters)
    steps = 0
    unheard: list[tuple[Schedule, dict[str, Any]]] = []
    for seed in seeds:
        schedule = Schedule(seed, _random.Random(f"scenario {seed}"))  # noqa: S311
        loop = _ExploringLoop(schedule, max_steps, unheard)  # type: ignore[abstract]
        try:
            loop.run(scenario(schedule) if takes_schedule else scenario())
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as exc:
            # Also a cancellation that reached the scenario, and pytest.fail().
            text = str(exc)
            if isinstance(exc, NotImplementedError) and not text:
                text = (
                    "explore has no network, files or processes; use stores in memory (its event"
                    f" loop has no {_raised_in(exc)})"
                )
            if loop.foreign:
                text += f"\n{_FOREIGN}"
            message = f"schedule {seed} failed: {type(exc).__name__}: {text}"
            raise ScheduleError(message, seed=seed, trace=schedule.trace) from exc
        steps += len(schedule.trace)
        _check_heard(unheard)
    # What was left in a cycle is reported only when the cycle is collected.
    gc.collect()
    _check_heard(unheard)
    return Explored(len(seeds), steps)


def _raised_in(exc: BaseException) -> str:
    """Return the name of the function that raised."""
    trace = exc.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "such method" if trace is None else f"{trace.tb_frame.f_code.co_name}()"


def _check_heard(unheard: list[tuple[Schedule, dict[str, Any]]]) -> None:
    if unheard:
        schedule, context = unheard[0]
        exc = context.get("exception")
        raise ScheduleError(
            f"schedule {schedule.seed} failed: {context.get('message')}: {exc!r}",
            seed=schedule.seed,
            trace=schedule.trace,
        ) from exc


class _Handle:
    """A callback that waits for its turn or its time."""

    __slots__ = ("_when", "args", "callback", "context")

    def __init__(
        self,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: contextvars.Context | None,
        when: float,
    ) -> None:
        self.callback: Callable[..., object] | None = callback
        self.args = args
        self.context = contextvars.copy_context() if context is None else context
        self._when = when

    def cancel(self) -> None:
        self.callback = None
        self.args = ()

    def cancelled(self) -> bool:
        return self.callback is None

    def when(self) -> float:
        return self._when


class _ExploringLoop(asyncio.AbstractEventLoop):
    """An event loop without I/O whose next step is drawn by chance.

    Any callback that is ready may come next. A task has at most one ready at a time, so each
    task's own order is kept.

    Args:
        schedule: whose seed decides, and which notes the steps.
        max_steps: how many steps it may take.
        unheard: where exceptions that reach nobody are put.
    """

    def __init__(
        self, schedule: Schedule, max_steps: int, unheard: list[tuple[Schedule, dict[str, Any]]]
    ) -> None:
        self._schedule = schedule
        self._trace = schedule.trace
        self._max_steps = max_steps
        self._unheard = unheard
        self._chance = _random.Random(schedule.seed)  # noqa: S311
        self._wandering = self._chance.choice(_WANDERING)
        self._now = 0.0
        self._ready: list[_Handle] = []
        self._timers: list[tuple[float, int, _Handle]] = []
        self._order = itertools.count()
        self._names = itertools.count(1)
        self._closed = False
        self._tasks: list[asyncio.Task[Any]] = []
        self._thread = threading.get_ident()
        self.foreign = False
        """Whether another thread called into this loop."""

    def run(self, main: Coroutine[Any, Any, object]) -> None:
        """Run ``main``, then cancel what it left running, as ``asyncio.run`` does."""
        hooks = sys.get_asyncgen_hooks()
        asyncio._set_running_loop(self)  # noqa: SLF001  public, for loops to use
        sys.set_asyncgen_hooks(finalizer=self._finalize)
        try:
            task = self.create_task(main, name="scenario")
            try:
                self._run_until(task)
            finally:
                steps = len(self._trace)
                self._max_steps = steps + _LAST_STEPS
                stubborn = self._end_the_rest()
                del self._trace[steps:]  # the last step to be shown is the one that failed
            task.result()
            if stubborn:
                raise AssertionError(
                    f"left running, and does not end when it is cancelled: {', '.join(stubborn)}"
                )
        finally:
            sys.set_asyncgen_hooks(*hooks)
            asyncio._set_running_loop(None)  # noqa: SLF001
            self._closed = True
            self._ready.clear()
            self._timers.clear()

    def _run_until(self, task: asyncio.Task[Any]) -> None:
        ready, trace, chance, wandering = self._ready, self._trace, self._chance, self._wandering
        while not task.done():
            if not ready and not self._jump():
                waiting = sorted(t.get_name() for t in self._tasks if not t.done())
                raise AssertionError(f"all tasks wait for one another: {', '.join(waiting)}")
            size = len(ready)
            place = 0
            if size > 1 and wandering and chance.random() < wandering:
                place = int(chance.random() * size)
            handle = ready.pop(place)
            callback = handle.callback
            if callback is None:
                continue
            if len(trace) >= self._max_steps:
                raise AssertionError(f"not at an end after {self._max_steps} steps")
            trace.append(Step(self._now, _name(callback)))
            try:
                handle.context.run(callback, *handle.args)
            except Exception as exc:  # noqa: BLE001  as every event loop does
                self.call_exception_handler(
                    {"message": f"exception in callback {_name(callback)}", "exception": exc}
                )
            # A timer's callback must not live on with its handle.
            handle.cancel()

    def _jump(self) -> bool:
        """Move time to the next timer and make all that are due then ready."""
        timers = self._timers
        while timers and timers[0][2].callback is None:
            heapq.heappop(timers)
        if not timers:
            return False
        self._now = max(self._now, timers[0][0])
        while timers and timers[0][0] <= self._now:
            self._ready.append(heapq.heappop(timers)[2])
        return True

    def _end_the_rest(self) -> list[str]:
        """Cancel what is left; return the names of the tasks that run on all the same."""
        for _ in range(3):  # a task may start another one while it is cancelled
            left = [task for task in self._tasks if not task.done()]
            if not left:
                break
            for task in left:
                task.cancel()
            gathered: asyncio.Task[Any] = self.create_task(_all_done(left), name=_END)
            with contextlib.suppress(AssertionError):
                self._run_until(gathered)
            for task in (*left, gathered):
                if task.done() and not task.cancelled():
                    task.exception()
        stubborn: list[Any] = [task for task in self._tasks if not task.done()]
        for task in stubborn:
            # Told here; asyncio would say it once more when they are collected.
            task._log_destroy_pending = False  # noqa: SLF001
            with contextlib.suppress(RuntimeError):  # of one that ignores this too
                task.get_coro().close()
        self._tasks.clear()
        return [task.get_name() for task in stubborn if task.get_name() != _END]

    def _finalize(self, generator: AsyncGenerator[Any, Any]) -> None:
        if not self._closed:
            self.create_task(generator.aclose())

    # What asyncio needs of a loop

    def time(self) -> float:
        return self._now

    def call_soon(  # type: ignore[override]
        self,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> _Handle:
        handle = _Handle(callback, args, context, self._now)
        self._ready.append(handle)
        return handle

    def call_soon_threadsafe(  # type: ignore[override]
        self,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> _Handle:
        if threading.get_ident() != self._thread:
            self.foreign = True
            raise RuntimeError(_FOREIGN)
        return self.call_soon(callback, *args, context=context)

    def call_later(  # type: ignore[override]
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> _Handle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> _Handle:
        handle = _Handle(callback, args, context, when)
        heapq.heappush(self._timers, (when, next(self._order), handle))
        return handle

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        """Run ``func`` as a step of its own: a thread's order could not be repeated."""
        del executor
        future = self.create_future()

        def call() -> None:
            if future.cancelled():
                return
            try:
                future.set_result(func(*args))
            except Exception as exc:  # noqa: BLE001  belongs to whoever awaits
                future.set_exception(exc)

        self.call_soon(call)
        return future

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(  # type: ignore[override]
        self,
        coro: Coroutine[Any, Any, Any],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
        **kwargs: Any,
    ) -> asyncio.Task[Any]:
        # asyncio numbers tasks through the whole process; a trace must repeat.
        name = f"task-{next(self._names)}" if name is None else name
        task: asyncio.Task[Any] = asyncio.Task(
            coro, loop=self, name=name, context=context, **kwargs
        )
        self._tasks.append(task)
        if len(self._tasks) > 256 and not len(self._tasks) % 256:  # noqa: PLR2004
            self._tasks = [known for known in self._tasks if not known.done()]
        return task

    def get_task_factory(self) -> None:
        return None

    def get_debug(self) -> bool:
        return False

    def set_debug(self, enabled: bool) -> None:  # noqa: FBT001  as asyncio has it
        """Do nothing: there is no debug mode."""

    def get_exception_handler(self) -> None:
        return None

    def is_running(self) -> bool:
        return not self._closed

    def is_closed(self) -> bool:
        return self._closed

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self._unheard.append((self._schedule, context))

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        self.call_exception_handler(context)


async def _all_done(tasks: list[asyncio.Task[Any]]) -> None:
    await asyncio.wait(tasks)


def _name(callback: Callable[..., object]) -> str:
    owner = getattr(callback, "__self__", None)
    if isinstance(owner, asyncio.Task):
        return owner.get_name()
    return getattr(callback, "__qualname__", None) or type(callback).__name__
