"""An event loop of several simulated processes: each can be stopped, resumed and killed."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import heapq
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from layered_store.testing.explore import Schedule, _ExploringLoop, _Handle
from tests.simulation.clocks import ProcessClock

__all__ = ["Process", "SimLoop"]


class Process:
    """One process of the fleet: what runs in it goes on only while it is alive and not stopped.

    Args:
        loop: the loop.
        name: told in logs.
        clock: the only one that what runs in it reads.
    """

    def __init__(self, loop: SimLoop, name: str, clock: ProcessClock) -> None:
        self.loop = loop
        self.name = name
        self.clock = clock
        self.alive = True
        self.stopped = False
        self.held: list[_Handle] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.numbers = 0

    def spawn(self, work: Coroutine[Any, Any, Any], name: str | None = None) -> asyncio.Task[Any]:
        """Run a coroutine in this process."""
        with self.loop.inside(self):
            return self.loop.create_task(work, name=name, context=contextvars.Context())

    def stop(self) -> None:
        """SIGSTOP."""
        self.stopped = True

    def resume(self) -> None:
        """SIGCONT."""
        self.stopped = False
        self.loop._ready += self.held
        self.held = []

    def kill(self) -> None:
        """SIGKILL: nothing of it runs any more, no cleanup either."""
        self.alive = False
        self.held = []
        for task in self.tasks:
            if not task.done():
                task._log_destroy_pending = False

    def running(self) -> list[asyncio.Task[Any]]:
        """Return its tasks that are not done."""
        return [task for task in self.tasks if not task.done()]

    def __repr__(self) -> str:
        return self.name


class _Task(asyncio.Task[Any]):
    process: Process | None = None


class _Owned(_Handle):
    __slots__ = ("process",)


class SimLoop(_ExploringLoop):
    """Runs one schedule; see :class:`layered_store.testing.explore.Schedule`."""

    def __init__(self, schedule: Schedule, max_steps: int, *, traced: bool) -> None:
        self.unheard: list[tuple[Schedule, dict[str, Any]]] = []
        super().__init__(schedule, max_steps, self.unheard)
        self.current: Process | None = None
        self.steps = 0
        self.traced = traced

    @contextlib.contextmanager
    def inside(self, process: Process | None) -> Iterator[None]:
        """Let what is scheduled in the block belong to a process; None is the world outside."""
        before, self.current = self.current, process
        try:
            yield
        finally:
            self.current = before

    def call_soon(
        self,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> _Handle:
        handle = _Owned(callback, args, context, self._now)
        owner = getattr(callback, "__self__", None)
        handle.process = owner.process if type(owner) is _Task else self.current
        self._ready.append(handle)
        return handle

    def call_at(
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> _Handle:
        handle = _Owned(callback, args, context, when)
        handle.process = self.current
        heapq.heappush(self._timers, (when, next(self._order), handle))
        return handle

    def create_task(
        self,
        coro: Coroutine[Any, Any, Any],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
        **kwargs: Any,
    ) -> asyncio.Task[Any]:
        process = self.current
        if process is not None:
            process.numbers += 1
            name = f"{process.name}.{name or process.numbers}"
        else:
            name = name or f"world-{next(self._names)}"
        # Its first step is scheduled by its construction, which does not know its process yet.
        task = _Task(coro, loop=self, name=name, context=context, **kwargs)
        task.process = self._ready[-1].process = process  # type: ignore[attr-defined]
        if process is not None:
            process.tasks.append(task)
            if len(process.tasks) > 512:
                process.tasks = process.running()
        else:
            self._tasks.append(task)
        return task

    def _run_until(self, task: asyncio.Task[Any]) -> None:
        ready, chance, wandering, traced = self._ready, self._chance, self._wandering, self.traced
        random = chance.random
        while not task.done():
            if not ready and not self._jump():
                raise AssertionError("all tasks wait for one another")
            size = len(ready)
            place = int(random() * size) if size > 1 and wandering and random() < wandering else 0
            handle: Any = ready.pop(place)
            callback = handle.callback
            if callback is None:
                continue
            process = handle.process
            if process is not None:
                if not process.alive:
                    continue
                if process.stopped:
                    process.held.append(handle)
                    continue
            self.steps += 1
            if self.steps > self._max_steps:
                raise AssertionError(f"not at an end after {self._max_steps} steps")
            if traced:
                owner = getattr(callback, "__self__", None)
                name = owner.get_name() if isinstance(owner, asyncio.Task) else repr(callback)
                self._trace.append((self._now, name))  # type: ignore[arg-type]
            self.current = process
            try:
                handle.context.run(callback, *handle.args)
            except Exception as exc:
                self.call_exception_handler({"message": "in a callback", "exception": exc})
            finally:
                self.current = None
            handle.cancel()

    def bury(self, process: Process) -> None:
        """Close what a dead process left half done, so that nothing is said of it later."""
        for task in process.running():
            task._log_destroy_pending = False
            coroutine: Any = task.get_coro()
            for _ in range(99):  # some go on waiting while they are closed
                try:
                    coroutine.close()
                except BaseException:  # noqa: S112
                    continue
                break
        process.tasks.clear()
