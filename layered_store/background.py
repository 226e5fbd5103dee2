"""Background work: one job at a time for each user, a bounded number for all users together.

Each job is counted by how it ended, or as dropped when there was no room for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from layered_store.running import spawn

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Awaitable, Callable

    from layered_store.clock import Clock, TimerHandle

__all__ = ["Background", "Job", "Lane"]


@dataclass(slots=True)
class Job:
    """One thing to do.

    Args:
        work: does it and returns what it is counted as; nothing for an empty text.
        counts: where it is counted.
        compares: whether it is a comparison; one that waits for a user is enough.
    """

    work: Callable[[], Awaitable[str]]
    counts: Counter[str]
    compares: bool = False


@dataclass(eq=False, repr=False, slots=True)
class Lane:
    """What is done for one user, one thing after another.

    Attributes:
        jobs: what is still to be done.
        task: does them, while there are any.
        writing: writes of the user under way elsewhere.
        overlapped: whether two of them ever ran at the same time, so that nobody here knows which
            of them won.
        deletes: deletes of the user that began; one that overlaps a write decides about it.
        held: deletes that wait for their turn; nothing else begins meanwhile.
        wrote: writes that ended while a delete was held, so that it may not have erased them.
        compares: whether a comparison waits already.
    """

    loop: asyncio.AbstractEventLoop
    jobs: deque[Job] = field(default_factory=deque)
    task: asyncio.Task[None] | None = None
    writing: int = 0
    overlapped: bool = False
    deletes: int = 0
    held: int = 0
    wrote: int = 0
    compares: bool = False

    @property
    def idle(self) -> bool:
        return not (self.jobs or self.task or self.writing or self.held)


class Background:
    """The lanes of all users.

    Args:
        limit: seconds that one thing may take.
        most: how many may wait or run at once.
        clock: source of time.

    Attributes:
        lanes: by user; nothing is kept of the others.
        pending: how many things wait or run.
    """

    def __init__(self, limit: float, most: int, clock: Clock) -> None:
        self.lanes: dict[str, Lane] = {}
        self.pending = 0
        self._limit = limit
        self._most = most
        self._clock = clock
        self._timers: dict[TimerHandle, Job] = {}
        self._closed = False

    def lane(self, user_id: str) -> Lane:
        """Return a user's lane; give it to :meth:`tidy` at the end."""
        lane = self.lanes.get(user_id)
        if lane is not None and lane.loop.is_closed():
            # What that loop left behind will never run.
            self.pending -= lane.task is not None
            self.drop(lane)
            lane = None
        if lane is None:
            lane = self.lanes[user_id] = Lane(asyncio.get_running_loop())
        return lane

    def tidy(self, user_id: str, lane: Lane) -> None:
        """Forget a lane in which nothing is under way."""
        if lane.idle and self.lanes.get(user_id) is lane:
            del self.lanes[user_id]

    def add(self, user_id: str, job: Job) -> None:
        """Do something for a user after all that waits already."""
        lane = self.lane(user_id)
        here = lane.loop is asyncio.get_running_loop()
        if self.pending >= self._most or not here or self._closed:
            job.counts["dropped"] += 1
            self.tidy(user_id, lane)
            return
        self.pending += 1
        lane.compares = lane.compares or job.compares
        lane.jobs.append(job)
        self.start(user_id, lane)

    def add_later(self, user_id: str, job: Job) -> None:
        """Do something for a user when a call that began now has had its time."""
        if len(self._timers) >= self._most or self._closed:
            job.counts["dropped"] += 1
            return

        def due() -> None:
            del self._timers[timer]
            self.add(user_id, job)

        timer = self._clock.call_later(self._limit, due)
        self._timers[timer] = job

    def start(self, user_id: str, lane: Lane) -> None:
        """Have what waits for a user be done, unless that is under way or held; else tidy up."""
        if lane.jobs and lane.task is None and not lane.held and not self._closed:
            task = spawn(self._run(lane))  # on the lane's event loop: it is the running one
            if task.done():  # an eager one
                self._ended(user_id, lane, task)
                return
            lane.task = task
            # Not by the task: one that is cancelled as soon as it is made runs none of its code.
            task.add_done_callback(lambda ended: self._ended(user_id, lane, ended))
        else:
            self.tidy(user_id, lane)

    def start_there(self, user_id: str, lane: Lane) -> None:
        """Do as :meth:`start` does, from whatever event loop."""
        if lane.loop is asyncio.get_running_loop():
            self.start(user_id, lane)
        else:
            with contextlib.suppress(RuntimeError):  # it was closed
                lane.loop.call_soon_threadsafe(self.start, user_id, lane)

    def drop(self, lane: Lane) -> None:
        """Forget what waits, since the user is being erased; that is no loss and not counted."""
        self.pending -= len(lane.jobs)
        lane.jobs.clear()
        lane.compares = False

    def _lose(self, lane: Lane) -> None:
        """Forget what waits and will not be done."""
        for job in lane.jobs:
            job.counts["dropped"] += 1
        self.drop(lane)

    async def _run(self, lane: Lane) -> None:
        """Do what waits for one user, until nothing does or the user is being erased."""
        while lane.jobs and not lane.held:
            job = lane.jobs.popleft()
            if job.compares:
                lane.compares = False
            try:
                async with self._clock.timeout(self._limit):
                    result = await job.work()
            except Exception:  # noqa: BLE001  nothing of it may reach a caller
                result = "error"
            except asyncio.CancelledError:
                job.counts["dropped"] += 1
                raise
            finally:
                self.pending -= 1
            if result:
                job.counts[result] += 1

    def _ended(self, user_id: str, lane: Lane, task: asyncio.Task[None]) -> None:
        lane.task = None
        if task.cancelled():
            # The event loop ends: another task would be left behind on it.
            self._lose(lane)
        self.start(user_id, lane)

    async def aclose(self, patience: float) -> None:
        """Finish in ``patience`` seconds what is under way on this event loop; drop the rest."""
        self._closed = True
        for timer, job in self._timers.items():
            timer.cancel()
            job.counts["dropped"] += 1
        self._timers.clear()
        here = asyncio.get_running_loop()
        tasks = [
            lane.task
            for lane in self.lanes.values()
            if lane.task is not None and lane.loop is here
        ]
        if tasks:
            try:
                async with self._clock.timeout(patience):
                    await asyncio.wait(tasks)
            except TimeoutError:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        for lane in self.lanes.values():
            self._lose(lane)
        self.lanes.clear()
