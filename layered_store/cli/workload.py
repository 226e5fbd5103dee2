"""What ``bench`` asks of a stack, and what it notes of the answers."""

from __future__ import annotations

import asyncio
import random
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

from layered_store.cli.common import new_snapshot
from layered_store.clock import SYSTEM_CLOCK
from layered_store.errors import StoreError
from layered_store.interface import Op, StateStore
from layered_store.snapshot import StateSnapshot
from layered_store.stack import walk

__all__ = ["Mix", "Workload"]

_PERCENTILES: Final = (50.0, 90.0, 99.0, 99.9)
_KEPT: Final = 200_000
_HISTORY: Final = 10


@dataclass(frozen=True, slots=True)
class Mix:
    """Shares of the calls; the rest reads latest states."""

    writes: float = 0.0
    histories: float = 0.0
    erasures: float = 0.0


class Workload:
    """Calls of made-up users, chosen at random, and how long they took.

    Args:
        name: what all user ids begin with.
        users: how many there are.
        mix: shares of the operations.
        zipf: the n-th user is asked for ``1 / n**zipf`` as often as the first.
        axes: how many axes a state has.
        seed: of all random choices.
    """

    def __init__(
        self, name: str, users: int, mix: Mix, *, zipf: float, axes: int, seed: int
    ) -> None:
        self.users, self.mix, self.zipf = users, mix, zipf
        self._name = name
        self._random = random.Random(seed)
        self._axes = {f"axis_{i}": self._random.random() for i in range(axes)}
        self._weights = list(accumulate((rank + 1) ** -zipf for rank in range(users)))
        self._times: dict[str, list[float]] = defaultdict(list)
        self.calls: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._before: dict[str, Counter[str]] = {}
        self._reads: dict[str, Counter[str]] = {}
        self._now: Callable[[], float] = SYSTEM_CLOCK.monotonic
        self._begun = self._elapsed = 0.0

    def user(self, number: int) -> str:
        """Return the id of a user."""
        return f"{self._name}{number}"

    def snapshot(self, store: StateStore, user: str) -> StateSnapshot:
        """Return a state of a user."""
        return new_snapshot(store, user, axes=self._axes)

    def begin(self, store: StateStore, now: Callable[[], float]) -> float:
        """Start the clock; return what it reads."""
        self._before = _reads(store)
        self._now = now
        self._begun = now()
        return self._begun

    def note_time(self, store: StateStore) -> None:
        """Note how far the clock and the stack's own counts have come."""
        self._elapsed = self._now() - self._begun
        self._reads = {
            name: counts - self._before.get(name, Counter())
            for name, counts in _reads(store).items()
        }

    async def call_until(self, store: StateStore, end: float) -> None:
        """Call one operation after the other, at least one."""
        now = self._now
        began = float("-inf")
        turns = 0
        while began < end:
            operation, call = self._next(store)
            began = now()
            try:
                await call()
            except StoreError as exc:
                self._errors[type(exc).__name__] += 1
            self._note(operation, now() - began)
            turns += 1
            if turns % 64 == 0:
                await asyncio.sleep(0)  # hits never wait, and the other callers want their turn

    def _next(self, store: StateStore) -> tuple[str, Callable[[], Any]]:
        draw = self._random.random
        user = self.user(bisect_left(self._weights, draw() * self._weights[-1]))
        kind, mix = draw(), self.mix
        if kind < mix.writes:
            snapshot = self.snapshot(store, user)
            return Op.UPSERT_LATEST.value, lambda: store.upsert_latest(snapshot)
        if kind < mix.writes + mix.histories:
            return Op.GET_HISTORY.value, lambda: store.get_history(user, _HISTORY)
        if kind < mix.writes + mix.histories + mix.erasures:
            return Op.DELETE.value, lambda: store.delete(user)
        return Op.GET_LATEST.value, lambda: store.get_latest(user)

    def _note(self, operation: str, seconds: float) -> None:
        self.calls[operation] += 1
        times = self._times[operation]
        if len(times) < _KEPT:
            times.append(seconds)
        elif (place := self._random.randrange(self.calls[operation])) < _KEPT:
            times[place] = seconds  # reservoir sampling: every call is as likely to be kept

    def result(self) -> dict[str, Any]:
        """Return the figures so far."""
        elapsed = self._elapsed or 1e-9
        operations = {}
        for operation in (op.value for op in Op):
            if calls := self.calls[operation]:
                times = sorted(self._times[operation])
                figures = {f"p{p:g}_ms": _at(times, p) for p in _PERCENTILES}
                operations[operation] = {
                    "calls": calls,
                    "per_second": round(calls / elapsed, 1),
                    **figures,
                    "max_ms": _at(times, 100.0),
                }
        ratios = {
            name: round(counts["hit"] / counts.total(), 4)
            for name, counts in self._reads.items()
            if counts.total()
        }
        return {
            "seconds": round(self._elapsed, 3),
            "errors": self._errors.total(),
            "error_kinds": dict(self._errors.most_common()),
            "operations": operations,
            "hit_ratio": ratios,
        }


def _at(times: list[float], percent: float) -> float:
    return round(times[min(len(times) - 1, int(len(times) * percent / 100))] * 1000, 4)


def _reads(store: StateStore) -> dict[str, Counter[str]]:
    """Return what each tier counted of its reads, by its label."""
    found: dict[str, Counter[str]] = {}
    for place in walk(store):
        for sample in place.store.samples():
            if sample.metric == "reads":
                tier = found.setdefault(place.label, Counter())
                tier[sample.labels[-1]] += int(sample.value)
    return found
