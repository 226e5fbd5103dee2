"""What the callers of all processes saw, in one order."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from layered_store.testing.explore import LoopClock

__all__ = ["Call", "History"]

CLOCK = LoopClock()


@dataclass
class Call:
    """One call of one user by one client; a batch is a call of each of its users.

    Args:
        process: where it was made; a process that was started again has another name.
        kind: ``read``, ``upsert`` or ``delete``.
        user: whom it was about.
        value: what an upsert wrote, or a read returned; None for no state.
        began: its place among all events.
        began_at: when.
        ended: the place of its end; None while it runs, or when its process died.
        ended_at: when.
        outcome: ``ok``; ``pending`` while it runs; else the name of the error.
    """

    process: str
    kind: str
    user: str
    value: int | None
    began: int
    began_at: float
    ended: int | None = None
    ended_at: float = float("inf")
    outcome: str = "pending"

    @property
    def ok(self) -> bool:
        """Whether it returned normally."""
        return self.outcome == "ok"

    def __str__(self) -> str:
        end = "never" if self.ended is None else f"{self.ended_at:.4f}"
        return (
            f"{self.began_at:8.4f} to {end}  {self.process:4} {self.kind:6} {self.user} "
            f"{'' if self.value is None else self.value} {self.outcome}"
        )


@dataclass
class History:
    """All calls of a run.

    Args:
        orders: numbers the events.
    """

    orders: itertools.count[int]
    calls: list[Call] = field(default_factory=list)

    def begin(self, process: str, kind: str, user: str, value: int | None = None) -> Call:
        """Note that a call begins."""
        call = Call(process, kind, user, value, next(self.orders), CLOCK.monotonic())
        self.calls.append(call)
        return call

    def end(self, call: Call, outcome: str, value: Any = None) -> None:
        """Note how it ended."""
        call.outcome = outcome
        call.ended = next(self.orders)
        call.ended_at = CLOCK.monotonic()
        if call.kind == "read":
            call.value = value
