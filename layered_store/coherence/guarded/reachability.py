"""Whether a tier is asked, or passed by because it does not answer."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from layered_store.errors import RejectedError, StoreError, StoreTimeoutError
from layered_store.events import log_event
from layered_store.stack import id_of

if TYPE_CHECKING:
    from layered_store.clock import Clock
    from layered_store.coherence.contract import CacheTier
    from layered_store.coherence.guarded.watch import Signal
    from layered_store.interface import StateStore

__all__ = ["Reachability"]

_STEADY_SECONDS: Final = 5.0
"""A tier that is lost again within so long of its return has not come back for calls."""

_FIRST_PAUSE: Final = 0.1


@dataclass(eq=False, repr=False)
class Reachability:
    """Passes by a tier that does not answer, until a ping or a repair pass reaches it again.

    Else every call would wait out its time limit. A single failure may be a lost connection, which
    is made anew at once; a timeout, or a second failure in a row, means that the tier is lost.

    A tier may answer pings and passes and still refuse calls: it is full, a replica, or lacks
    rights. So one that is lost again soon after its return is passed by for longer each time, up
    to 5 s.

    Args:
        tier: the tier.
        clock: source of time.
        repair_now: has the next repair pass begin at once.
        block: the store that offers the tier, whose ``id`` log events name.

    Attributes:
        up: whether the tier is asked now.
        failures: steps on the tier that failed and that no caller was told of, by what was tried.
    """

    tier: CacheTier
    clock: Clock
    repair_now: Signal
    block: StateStore | None = None
    up: bool = field(default=True, init=False)
    failures: Counter[str] = field(default_factory=Counter, init=False)
    _in_a_row: int = field(default=0, init=False)
    _was_away: bool = field(default=False, init=False)
    # When it came back last, for how long it is passed by now, and until when.
    _back_at: float = field(default=-math.inf, init=False)
    _pause: float = field(default=0.0, init=False)
    _passed_by_until: float = field(default=-math.inf, init=False)

    def failed(self, exc: StoreError, step: str) -> None:
        """Note that the tier did not answer."""
        self.failures[step] += 1
        if isinstance(exc, RejectedError):
            return  # a breaker's refusal costs nothing, and it tries the tier again by itself
        self._in_a_row += 1
        if (isinstance(exc, StoreTimeoutError) or self._in_a_row > 1) and self.up:
            self.up = False
            self._was_away = True
            now = self.clock.monotonic()
            soon = now - self._back_at < _STEADY_SECONDS
            self._pause = min(max(_FIRST_PAUSE, 2 * self._pause), _STEADY_SECONDS) if soon else 0.0
            self._passed_by_until = now + self._pause
            self.tell("tier_lost", reason=type(exc).__name__)
        self.repair_now.set()

    def answered(self) -> None:
        """Note that a ping or a repair pass came through."""
        self._in_a_row = 0
        if not self.up and (now := self.clock.monotonic()) >= self._passed_by_until:
            self.up = True
            self._back_at = now
            self.tell("tier_back")

    def tell(self, event: str, **facts: str | float) -> None:
        """Log something about the tier."""
        known = None if self.block is None else id_of(self.block)
        log_event(event, tier=known or self.tier.tier_name, **facts)

    def was_away(self) -> bool:
        """Tell, once, whether the tier was lost since this was asked last."""
        away, self._was_away = self._was_away, False
        return away
