"""Whether a tier is asked, or passed by since it does not answer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from layered_store.errors import RejectedError, StoreError, StoreTimeoutError
from layered_store.events import log_event

if TYPE_CHECKING:
    from layered_store.coherence.contract import CacheTier
    from layered_store.coherence.guarded.watch import Signal

__all__ = ["Reachability"]


@dataclass(eq=False, repr=False)
class Reachability:
    """Passes a tier by that does not answer, until a ping or a repair pass reaches it again.

    It must not cost every call its time limit. One failure may be a connection that was lost, and
    is made anew at once; one that hangs, or a second failure, is not.

    Args:
        tier: the tier.
        repair_now: has the next repair pass begin at once.

    Attributes:
        up: whether the tier is asked now.
        failures: steps on the tier that failed and that no caller was told of, by what was tried.
    """

    tier: CacheTier
    repair_now: Signal
    up: bool = field(default=True, init=False)
    failures: Counter[str] = field(default_factory=Counter, init=False)
    _in_a_row: int = field(default=0, init=False)
    _was_away: bool = field(default=False, init=False)

    def failed(self, exc: StoreError, step: str) -> None:
        """Note that the tier did not answer."""
        self.failures[step] += 1
        if isinstance(exc, RejectedError):
            return  # a breaker's refusal costs nothing, and it tries the tier again by itself
        self._in_a_row += 1
        if (isinstance(exc, StoreTimeoutError) or self._in_a_row > 1) and self.up:
            self.up = False
            self._was_away = True
            log_event("tier_lost", tier=self.tier.tier_name, reason=type(exc).__name__)
        self.repair_now.set()

    def answered(self) -> None:
        """Note that a ping or a repair pass came through."""
        self._in_a_row = 0
        if not self.up:
            self.up = True
            log_event("tier_back", tier=self.tier.tier_name)

    def was_away(self) -> bool:
        """Tell, once, whether the tier was lost since this was asked last."""
        away, self._was_away = self._was_away, False
        return away
