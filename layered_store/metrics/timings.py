"""How long operations took, counted so that no figure ever falls."""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from itertools import accumulate
from math import inf
from typing import TYPE_CHECKING, Final, Self

from layered_store.metrics.catalogue import DURATION_BUCKETS, OUTCOMES

if TYPE_CHECKING:
    from layered_store.hotpath import HitCount

__all__ = ["Durations", "HitTimings", "Timings"]

_CELLS: Final = len(DURATION_BUCKETS) + 1

Durations = tuple[list[int], float]
"""How many took at most each bound (the last one is all), and the sum of seconds."""


class Timings:
    """What was counted of one operation: outcomes, and how long it took."""

    __slots__ = ("_lock", "cells", "outcomes", "recent", "seconds")

    def __init__(self) -> None:
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        self.cells = [0] * _CELLS
        self.seconds = 0.0
        # Durations of calls that went well, since :meth:`fold` last counted them.
        self.recent: list[float] = []
        self._lock = threading.Lock()

    def note(self, outcome: str, seconds: float) -> int:
        """Count one operation that was timed; return the cell of its duration."""
        self.outcomes[outcome] += 1
        cell = bisect_left(DURATION_BUCKETS, seconds)
        self.cells[cell] += 1
        self.seconds += seconds
        return cell

    def fold(self) -> Self:
        """Count what is in ``recent``: before anybody looks, and when it grows long."""
        with self._lock:  # who scrapes may do so in another thread
            recent = self.recent
            taken = recent[:]
            del recent[: len(taken)]
            taken.sort()
            before = 0
            for cell, bound in enumerate((*DURATION_BUCKETS, inf)):
                upto = bisect_right(taken, bound)
                self.cells[cell] += upto - before
                before = upto
            self.outcomes["ok"] += len(taken)
            self.seconds += sum(taken)
        return self


class HitTimings:
    """Hits in process: all are counted, by the fused paths, but only some are timed.

    The others are spread over the buckets as those that were timed since the last look. What was
    spread once stays where it is: a bucket that fell would look to Prometheus like a restart.
    """

    def __init__(self) -> None:
        self.counts: list[HitCount] = []
        self._timed = [0] * _CELLS
        self._seconds = 0.0
        # What had been timed at the last look, and what was spread until then.
        self._seen = [0] * _CELLS
        self._seen_seconds = 0.0
        self._spread = [0] * _CELLS
        self._spread_seconds = 0.0
        self._lock = threading.Lock()

    @property
    def hits(self) -> int:
        """All hits so far."""
        return sum(count.read() for count in self.counts)

    def note(self, seconds: float) -> None:
        """Take the duration of a hit that was timed."""
        self._timed[bisect_left(DURATION_BUCKETS, seconds)] += 1
        self._seconds += seconds

    def spread(self) -> tuple[list[int], float]:
        """Return all hits by cell, and their seconds."""
        with self._lock:
            timed, seconds = list(self._timed), self._seconds
            new = self.hits - sum(self._spread)
            if new > 0:
                weights = [now - seen for now, seen in zip(timed, self._seen, strict=True)]
                weight = sum(weights)
                sampled = seconds - self._seen_seconds
                if weight:
                    self._seen, self._seen_seconds = timed, seconds
                else:
                    weights, weight, sampled = timed, sum(timed), seconds
                if not weight:
                    # None was timed yet: a hit takes less than a microsecond.
                    weights, weight = [1], 1
                shares = [each * new // weight for each in weights]
                shares[max(range(len(shares)), key=shares.__getitem__)] += new - sum(shares)
                for cell, share in enumerate(shares):
                    self._spread[cell] += share
                self._spread_seconds += sampled * new / weight
            return list(self._spread), self._spread_seconds


def cumulative(cells: list[int], seconds: float, more: tuple[list[int], float]) -> Durations:
    """Return the cells of calls and of hits together, as a histogram has them."""
    both = [a + b for a, b in zip(cells, more[0], strict=True)]
    return list(accumulate(both)), seconds + more[1]
