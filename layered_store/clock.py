"""Time: the only module that reads the real clock.

Everything that waits, expires or measures takes a :class:`Clock`, so that tests and simulations
move time by hand (:class:`layered_store.testing.FakeClock`).
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager
    from typing import Any

__all__ = ["SYSTEM_CLOCK", "Clock", "SystemClock", "TimerHandle"]


class TimerHandle(Protocol):
    """A scheduled callback that can be called off."""

    def cancel(self) -> None:
        """Call the timer off; harmless when it already ran."""
        ...


@runtime_checkable
class Clock(Protocol):
    """Where layers and backends get their time from.

    ``monotonic`` is a plain attribute holding a function where possible: the hot path calls it
    once per hit.
    """

    @property
    def monotonic(self) -> Callable[[], float]:
        """A function that returns seconds that never go backwards; the zero point is arbitrary."""
        ...

    def time(self) -> float:
        """Return the wall clock in seconds since 1970."""
        ...

    def sleep(self, seconds: float) -> Awaitable[None]:
        """Wait so many seconds; 0 lets other tasks run once."""
        ...

    def timeout(self, seconds: float | None) -> AbstractAsyncContextManager[Any]:
        """Raise TimeoutError from the block when it takes longer; None means no limit."""
        ...

    def call_later(self, seconds: float, callback: Callable[[], object]) -> TimerHandle:
        """Run ``callback`` on the running event loop after so many seconds."""
        ...


class SystemClock:
    """The machine's clock and the running event loop's timers."""

    __slots__ = ()

    monotonic = staticmethod(time.monotonic)

    def time(self) -> float:
        return time.time()

    def sleep(self, seconds: float) -> Awaitable[None]:
        return asyncio.sleep(seconds)

    def timeout(self, seconds: float | None) -> AbstractAsyncContextManager[Any]:
        return asyncio.timeout(seconds)

    def call_later(self, seconds: float, callback: Callable[[], object]) -> TimerHandle:
        # In a context of its own: timers that follow each other would keep the first caller's.
        context = contextvars.Context()
        return asyncio.get_running_loop().call_later(seconds, callback, context=context)

    def __repr__(self) -> str:
        return "SystemClock()"


SYSTEM_CLOCK: Final[Clock] = SystemClock()
"""The clock that every block uses unless another is given."""
