"""How the cost of an item grows with how many there are."""

from __future__ import annotations

import gc
import time
from math import inf
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

MOST = 5.0
"""Times as much an item that may take among many; with the square of them it is many times more."""

_TRIALS = 5


class Spent:
    """CPU seconds of this process that a block took, without collections of garbage."""

    seconds = inf

    def __enter__(self) -> Spent:
        gc.collect()
        gc.disable()
        self._begun = time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.process_time() - self._begun
        gc.enable()


async def growth(
    costs: Callable[[int], Awaitable[Sequence[float]]], few: int, many: int
) -> float:
    """Return how many times as much an item costs among ``many``, at least.

    A ratio of CPU times, and the least of some trials: a busy machine can only make it larger.

    Args:
        costs: does some pieces of work for so many items; returns the CPU seconds of each. The one
            that grows most counts.
        few: how many are cheap in any case.
        many: among how many it must not cost much more.
    """
    least: list[float] = []
    for _ in range(_TRIALS):
        of_few = [min(each) for each in zip(*[await costs(few) for _ in range(3)], strict=True)]
        of_many = await costs(many)
        times = [much / many * few / little for much, little in zip(of_many, of_few, strict=True)]
        least = [min(each) for each in zip(least or times, times, strict=True)]
        if max(least) < MOST:
            break
    return max(least)
