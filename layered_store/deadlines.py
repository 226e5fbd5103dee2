"""Time limits of calls, with one timer for all calls of an event loop."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layered_store.clock import Clock, TimerHandle

__all__ = ["Deadlines", "Limited"]


class Limited:
    """A call with a deadline: its task is cancelled when that comes.

    Attributes:
        expired: whether it came.
    """

    __slots__ = ("_alone", "_before", "_task", "expired")

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self.expired = False
        self._task = task
        self._before = task.cancelling()
        self._alone: bool | None = None

    def expire(self) -> None:
        """Cancel the task."""
        self.expired = True
        self._task.cancel()

    def take_back(self) -> bool:
        """Take the cancellation back, once; tell whether nobody else cancelled the task."""
        if self._alone is None:
            self._alone = self._task.uncancel() <= self._before
        return self._alone


class Deadlines:
    """The calls of one event loop, each of which may take the same time.

    They expire in the order in which they began, so one timer serves all: when it fires, it is set
    for the oldest that is left. ``asyncio.timeout`` sets and cancels a timer for each call, which
    is most of what it costs. A task is cancelled in the same way as there.

    Args:
        loop: the event loop.
        seconds: how long each may take.
        clock: source of time.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float, clock: Clock) -> None:
        self._loop = loop
        self._seconds = seconds
        self._clock = clock
        self._monotonic = clock.monotonic
        # Until when, in the order of the calls.
        self._calls: OrderedDict[Limited, float] = OrderedDict()
        self._timer: TimerHandle | None = None

    def begin(self) -> Limited:
        """Give the call of the running task its time; end with :meth:`end`."""
        task = asyncio.current_task(self._loop)
        if task is None:
            raise RuntimeError("a call with a time limit needs a task, which can be cancelled")
        call = Limited(task)
        self._calls[call] = self._monotonic() + self._seconds
        if self._timer is None:
            self._timer = self._clock.call_later(self._seconds, self._watch)
        return call

    def end(self, call: Limited) -> bool:
        """End what :meth:`begin` began; tell whether the deadline alone cancelled the task."""
        if call.expired:
            return call.take_back()
        # The timer stays, for the next call: it costs more than the rest.
        self._calls.pop(call, None)
        return False

    def _watch(self) -> None:
        self._timer = None
        while self._calls:
            call, until = next(iter(self._calls.items()))
            left = until - self._monotonic()
            if left > 0:
                self._timer = self._clock.call_later(left, self._watch)
                return
            self._calls.pop(call, None)
            call.expire()
