"""How things are compared: side by side, in rounds whose order is shuffled each time.

What is compared is the quotient of two contenders *of the same round*, so that a neighbour who is
busy for a while weighs on both. The first round is thrown away.
"""

from __future__ import annotations

import asyncio
import gc
import time
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from benchmarks.figures import Spread, spread

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

__all__ = ["Cost", "Costs", "closed_loop", "compare", "load", "micro", "timed"]


@dataclass(frozen=True)
class Cost:
    """Seconds that one operation took, on the wall and of this process's CPU time."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Costs:
    """Costs of several contenders, round by round."""

    by_name: dict[str, list[Cost]]

    def wall(self, name: str) -> float:
        """Return the median cost of one operation in seconds."""
        return spread([cost.wall for cost in self.by_name[name]]).middle

    def cpu(self, name: str) -> float:
        """Return the median CPU time of one operation in seconds."""
        return spread([cost.cpu for cost in self.by_name[name]]).middle

    def ratio(self, name: str, to: str) -> Spread:
        """Return how many times as long an operation takes as that of another."""
        pairs = zip(self.by_name[name], self.by_name[to], strict=True)
        return spread([ours.wall / theirs.wall for ours, theirs in pairs])

    def faster(self, name: str, than: str) -> Spread:
        """Return how many times the throughput of another one has."""
        return self.ratio(than, name)

    def cpu_ratio(self, name: str, to: str) -> Spread:
        pairs = zip(self.by_name[name], self.by_name[to], strict=True)
        return spread([ours.cpu / theirs.cpu for ours, theirs in pairs])

    def difference(self, name: str, other: str, per: str | None = None) -> Spread:
        """Return how much longer an operation takes: in seconds, or in those of a third one."""
        unit = [1.0] * len(self.by_name[name]) if per is None else [
            cost.wall for cost in self.by_name[per]
        ]
        triples = zip(self.by_name[name], self.by_name[other], unit, strict=True)
        return spread([(ours.wall - theirs.wall) / one for ours, theirs, one in triples])


async def compare(
    contenders: Mapping[str, Callable[[], Awaitable[Cost]]], rounds: int, seed: int = 1
) -> Costs:
    """Run each contender once per round.

    Args:
        contenders: by name, what does a batch of operations and returns the cost of one.
        rounds: how many rounds count.
        seed: of the order.
    """
    order = list(contenders)
    random = Random(seed)
    costs: dict[str, list[Cost]] = {name: [] for name in order}
    for number in range(rounds + 1):
        random.shuffle(order)
        for name in order:
            gc.collect()
            gc.disable()
            try:
                cost = await contenders[name]()
            finally:
                gc.enable()
            if number:
                costs[name].append(cost)
    return Costs(costs)


async def timed(work: Awaitable[Any], operations: int) -> Cost:
    """Return what one of so many operations cost."""
    wall, cpu = time.perf_counter(), time.process_time()
    await work
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Cost(wall / operations, cpu / operations)


_LOOP = """
async def loop(call, items):
    for item in items:
        await call(item)
"""


def own_loop() -> Callable[[Callable[[Any], Awaitable[Any]], Iterable[Any]], Awaitable[None]]:
    """Return a loop with a code object of its own.

    The interpreter adapts code to what it sees there; contenders that shared it would disturb each
    other.
    """
    names: dict[str, Any] = {}
    exec(compile(_LOOP, "<loop>", "exec"), names)  # noqa: S102
    found: Callable[..., Awaitable[None]] = names["loop"]
    return found


def micro(call: Callable[[Any], Awaitable[Any]], items: Sequence[Any]) -> Callable[[], Any]:
    """Return a contender that calls one operation after another and never waits.

    It is measured in this process's CPU time, so that others on the machine do not count.
    """
    loop = own_loop()

    async def run() -> Cost:
        cost = await timed(loop(call, items), len(items))
        return Cost(cost.cpu, cost.cpu)

    return run


async def closed_loop(
    call: Callable[[Any], Awaitable[Any]], items: Sequence[Any], callers: int
) -> None:
    """Have so many callers do all items, each the next one as soon as it is answered."""
    left = iter(items)

    async def caller() -> None:
        for item in left:
            await call(item)

    await asyncio.gather(*(caller() for _ in range(callers)))


def load(
    call: Callable[[Any], Awaitable[Any]], items: Sequence[Any], callers: int
) -> Callable[[], Any]:
    """Return a contender with so many callers at once."""
    return lambda: timed(closed_loop(call, items, callers), len(items))
