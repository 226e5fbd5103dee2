"""A clock that stands still until it is told to move."""

from __future__ import annotations

import asyncio
import heapq
import math
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    from layered_store.options import Seconds

__all__ = ["FakeClock"]


class FakeClock:
    """Time that moves when told: pass it as ``clock=`` and call :meth:`advance`.

    Everything that the layers wait for (sleeps, timeouts, timers) waits for this clock. Example::

        clock = FakeClock()
        stack = Cached(MemoryStore(), ttl=60, clock=clock)
        await stack.get_latest("u-1")
        await clock.advance(61)          # the entry is expired now

    Args:
        start: the first reading of ``monotonic()``, in seconds.
        wall: the first reading of ``time()``, in seconds since 1970.
    """

    def __init__(self, start: float = 1_000.0, wall: float = 1_700_000_000.0) -> None:
        self._now = start
        self._wall = wall - start
        self._timers: list[tuple[float, int, _Timer]] = []
        self._order = count()

    def monotonic(self) -> float:
        return self._now

    def time(self) -> float:
        return self._wall + self._now

    def sleep(self, seconds: float) -> Awaitable[None]:
        return self._sleep(seconds)

    async def _sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        done = asyncio.get_running_loop().create_future()
        timer = self.call_later(seconds, partial(_wake, done))
        try:
            await done
        finally:
            timer.cancel()

    def timeout(self, seconds: float | None) -> AbstractAsyncContextManager[Any]:
        return self._timeout(seconds)

    @asynccontextmanager
    async def _timeout(self, seconds: float | None) -> AsyncIterator[asyncio.Timeout]:
        async with asyncio.timeout(None) as limit:
            if seconds is None:
                yield limit
                return
            timer = self.call_later(seconds, lambda: limit.reschedule(-1.0))
            try:
                yield limit
            finally:
                timer.cancel()

    def call_later(self, seconds: float, callback: Callable[[], object]) -> _Timer:
        timer = _Timer(callback)
        heapq.heappush(self._timers, (self._now + max(0.0, seconds), next(self._order), timer))
        return timer

    @property
    def pending(self) -> int:
        """How many timers wait for time to move."""
        return sum(1 for _, _, timer in self._timers if timer.callback is not None)

    async def advance(self, seconds: Seconds) -> None:
        """Move time forward, running what falls due in its order, and let all tasks settle.

        Args:
            seconds: how far, also as a timedelta; 0 only lets tasks settle.

        Raises:
            ValueError: ``seconds`` is negative, infinite or no number: time does not go back, and
                nothing comes after its end.
        """
        if isinstance(seconds, timedelta):
            seconds = seconds.total_seconds()
        if not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
            raise ValueError("seconds must be a finite number of at least 0; time does not go back")
        await settle()
        end = self._now + seconds
        while self._timers and self._timers[0][0] <= end:
            when, _, timer = heapq.heappop(self._timers)
            if timer.callback is None:
                continue
            self._now = max(self._now, when)
            callback, timer.callback = timer.callback, None
            callback()
            await settle()
        # Another task may have moved it further meanwhile.
        self._now = max(self._now, end)
        await settle()

    def set(self, now: float) -> None:
        """Set ``monotonic()`` at once, without running anything."""
        self._now = now

    def __repr__(self) -> str:
        return f"FakeClock({self._now:g})"


class _Timer:
    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None


_SETTLE_TURNS = 20
_BLIND_TURNS = 1_000
_MOST_TURNS = 10_000


async def settle() -> None:
    """Let other tasks run until they wait for something outside, as far as can be told."""
    # What is ready to run next; uvloop does not tell, and a turn of it takes a microsecond.
    ready = getattr(asyncio.get_running_loop(), "_ready", None)
    least = _SETTLE_TURNS if ready is not None else _BLIND_TURNS
    for turn in range(_MOST_TURNS):
        await asyncio.sleep(0)
        if turn >= least and not ready:
            return


def _wake(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)
