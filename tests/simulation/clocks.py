"""Clocks that disagree: each process and each server has its own, and somebody may set it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from layered_store.testing.explore import LoopClock

__all__ = ["DRIFT", "ProcessClock", "WallClock"]

_TRUE = LoopClock()

DRIFT = 0.0001
"""How far a clock's rate may be from true time: a crystal's."""


class WallClock:
    """What a host takes for the time: off by a constant, too fast or slow, and set now and then.

    Args:
        chance: decides how wrong it is.
    """

    def __init__(self, chance: random.Random) -> None:
        self.ahead = chance.choice((0.0, 0.0, 1.0, 60.0)) * (chance.random() - 0.5)
        self.rate = 1.0 + DRIFT * (2.0 * chance.random() - 1.0)

    def time(self) -> float:
        """Return the seconds since 1970, as this host has them."""
        return _TRUE.time() + (self.rate - 1.0) * _TRUE.monotonic() + self.ahead

    def set(self, seconds: float) -> None:
        """Set it forward, or back."""
        self.ahead += seconds


class ProcessClock:
    """The clock of one process, as :class:`layered_store.clock.Clock` has it.

    Args:
        chance: decides how wrong it is.
    """

    def __init__(self, chance: random.Random) -> None:
        self.wall = WallClock(chance)
        self._rate = 1.0 + DRIFT * (2.0 * chance.random() - 1.0)
        self._zero = 1_000.0 * chance.random()

    @property
    def monotonic(self) -> Callable[[], float]:
        """A function that returns seconds since some moment of its own."""
        return self._monotonic

    def _monotonic(self) -> float:
        return self._zero + self._rate * _TRUE.monotonic()

    def time(self) -> float:
        """Return the wall clock."""
        return self.wall.time()

    def sleep(self, seconds: float) -> Awaitable[None]:
        """Wait so long by this clock."""
        return asyncio.sleep(seconds / self._rate)

    def timeout(self, seconds: float | None) -> AbstractAsyncContextManager[Any]:
        """Limit a block by this clock."""
        return asyncio.timeout(None if seconds is None else seconds / self._rate)

    def call_later(self, seconds: float, callback: Callable[[], object]) -> asyncio.TimerHandle:
        """Run a callback after so long by this clock."""
        return asyncio.get_running_loop().call_later(seconds / self._rate, callback)
