"""The one event loop of a process that keeps watch over a tier, and what runs there."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from functools import partial
from typing import TYPE_CHECKING, Final

from layered_store.running import Ending, spawn

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from layered_store.clock import Clock

__all__ = ["Signal", "Watch"]

_AGAIN_SECONDS: Final = 0.2

_LAPSE_SECONDS: Final = 1.0
"""How long nothing begins anew after others cancelled what ran: an event loop that is about to end
has its tasks cancelled too, and whoever tidies up there would leave new ones behind."""

# Tasks of the process that this one was forked from.
_parents: Final[list[asyncio.Task[None]]] = []


class Signal:
    """Has a task that waits go on at once; tasks of any event loop may set it.

    Args:
        clock: source of time.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event: asyncio.Event | None = None

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """From here on, the task that waits is one of this event loop."""
        self._loop, self._event = loop, asyncio.Event()

    def end(self) -> None:
        """From here on, nobody waits."""
        self._loop = self._event = None

    def set(self) -> None:
        """Have the next wait, or the one under way, end at once."""
        loop, event = self._loop, self._event
        if loop is None or event is None or loop.is_closed():
            return
        if loop is asyncio.get_running_loop():
            event.set()
        else:
            loop.call_soon_threadsafe(event.set)

    async def wait(self, seconds: float) -> None:
        """Wait until it is set, or for so long."""
        event = self._event
        assert event is not None
        with contextlib.suppress(TimeoutError):
            async with self._clock.timeout(seconds):
                await event.wait()
        event.clear()


class Watch:
    """Who this process is among those that share a tier, and its event loop that keeps watch.

    Args:
        clock: source of time.

    Attributes:
        me: the name of this process among those that share the tier.
        loop: the event loop that came first and keeps watch for all; None before.
        closed: whether nothing is to begin any more.
        listening: whether caches above wait for leases.
        repaired: whether a repair pass was made since this event loop keeps watch.
        leased: whether a lease was given since then, or cannot be had.
        ready: what the first callers wait for.
        repair_now: has the next repair pass begin at once.
        ping_now: has the next ping be sent at once.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.me = os.urandom(8).hex()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.closed = False
        self.listening = self.repaired = self.leased = False
        self.ready: asyncio.Event | None = None
        self.repair_now = Signal(clock)
        self.ping_now = Signal(clock)
        self._tasks: list[asyncio.Task[None]] = []
        # Event loops of several threads may come first.
        self._beginning = threading.Lock()
        self._ending = Ending()
        self._lapsed_at: float | None = None

    @property
    def lapsed(self) -> bool:
        """Whether others ended what ran here, as by cancelling all tasks of the event loop."""
        return self._lapsed_at is not None

    @property
    def resumes(self) -> bool:
        """Whether that is so long ago that the event loop goes on, and all may begin anew."""
        lapsed_at = self._lapsed_at
        return lapsed_at is not None and self._clock.monotonic() >= lapsed_at + _LAPSE_SECONDS

    @property
    def kept(self) -> bool:
        """Whether anybody keeps watch now."""
        return self.loop is not None and not self.loop.is_closed()

    def begin(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Keep watch on this event loop, the running one, from now on; False: another one does."""
        with self._beginning:
            if self.kept and self.loop is not loop:
                return False
            if self.loop is loop:  # again: what others left running
                for task in self._tasks:
                    task.cancel()
            self._tasks = []
            self._lapsed_at = None
            self.listening = self.repaired = self.leased = False
            self.ready = asyncio.Event()
            self.repair_now.begin(loop)
            self.ping_now.begin(loop)
            self.loop = loop
            return True

    def keep(self, work: Coroutine[None, None, None], lapsed: Callable[[], None]) -> None:
        """Run something until the watch ends.

        Args:
            work: what.
            lapsed: called when others end it before.
        """
        task = spawn(work)
        self._tasks.append(task)
        task.add_done_callback(partial(self._ended, lapsed))

    def _ended(self, lapsed: Callable[[], None], task: asyncio.Task[None]) -> None:
        if task in self._tasks and not self.closed:
            self._lapsed_at = self._clock.monotonic()
            lapsed()

    def note(self, *, repaired: bool = False, leased: bool = False) -> None:
        """Let the first callers go on when a pass was made and, where caches follow, a lease."""
        self.repaired = self.repaired or repaired
        self.leased = self.leased or leased
        if self.ready is not None and self.repaired and (self.leased or not self.listening):
            self.ready.set()

    async def end(self) -> bool:
        """End what runs; tell whether it has ended: on another event loop it does so later."""
        self.closed = True
        tasks, self._tasks = self._tasks, []
        loop = self.loop
        if loop is not None and loop is not asyncio.get_running_loop():
            with contextlib.suppress(RuntimeError):  # it was closed
                for task in tasks:
                    loop.call_soon_threadsafe(task.cancel)
            return False
        if tasks:
            # Whoever closes may be cancelled; what was cancelled once may go on all the same.
            self._ending.begin(self._end_all(tasks))
        await self._ending.wait()
        return True

    async def _end_all(self, tasks: list[asyncio.Task[None]]) -> None:
        # Again, as long as any goes on: drivers lose a cancellation now and then.
        while left := [task for task in tasks if not task.done()]:
            for task in left:
                task.cancel()
            with contextlib.suppress(TimeoutError):
                async with self._clock.timeout(_AGAIN_SECONDS):
                    await asyncio.wait(left)
        await asyncio.gather(*tasks, return_exceptions=True)

    def begin_anew(self) -> None:
        """In a child of ``os.fork``: be another than the parent, and leave its tasks alone.

        Under one name, an erasure by one process would not wait for the lease of another.
        """
        self.me = os.urandom(8).hex()
        self.loop = None
        self._beginning = threading.Lock()  # it may be held by a thread that is not here
        self.repair_now.end()
        self.ping_now.end()
        # They would speak on the parent's connections, at the latest when they are collected.
        _parents.extend(self._tasks)
        self._tasks = []
