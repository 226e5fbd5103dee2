"""The state machine of a circuit breaker: which calls pass, and when it opens and closes."""

from __future__ import annotations

from collections import deque
from enum import IntEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

__all__ = ["Circuit", "CircuitState"]

_BUCKETS: Final = 10
"""Parts of the rolling window: what is older leaves it in steps of a tenth."""
_NANOSECOND: Final = 1e-9
"""The narrowest part: clocks tell no less, and a quotient could come out as infinite."""


class CircuitState(IntEnum):
    """What the breaker does with calls; the numbers are those of the metric."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class _Window:
    """Calls and failures of the last seconds, kept in ten parts.

    Args:
        seconds: how far back it counts.
    """

    __slots__ = ("_calls", "_failures", "_newest", "_width", "calls", "failures")

    def __init__(self, seconds: float) -> None:
        self._width = max(_NANOSECOND, seconds / _BUCKETS)
        self.clear()

    def clear(self) -> None:
        self._newest: int | None = None
        self._calls = deque([0.0] * _BUCKETS, _BUCKETS)
        self._failures = deque([0] * _BUCKETS, _BUCKETS)
        self.calls = 0.0
        self.failures = 0

    def add(self, now: float, hits: int, *, failed: bool) -> None:
        """Count one call, and hits that were answered since the last one."""
        part = int(now // self._width)
        if self._newest is None:
            self._newest = part
        # A call of another thread that read the clock later may have been counted before.
        steps = max(0, part - self._newest)
        self._newest += steps
        if steps:
            kept = min(steps, _BUCKETS)
            self._calls.extend([0.0] * kept)
            self._failures.extend([0] * kept)
        if hits:
            # They came at any time since then; those before the window are not spread into it.
            each = hits / (steps + 1)
            for index in range(max(0, _BUCKETS - 1 - steps), _BUCKETS):
                self._calls[index] += each
        self._calls[-1] += 1.0
        self._failures[-1] += failed
        self.calls = sum(self._calls) if steps or hits else self.calls + 1.0
        self.failures = sum(self._failures) if steps else self.failures + failed


class Circuit:
    """The state machine of a circuit breaker: who may pass, and what their outcomes mean.

    ::

        CLOSED ──(failure share reached)──► OPEN ──(time is over)──► HALF_OPEN
           ▲                                 ▲                          │
           │                                 └──────(trial failed)──────┤
           └────────────────────────(trial succeeded)───────────────────┘

    Every change of state begins a new era. A call belongs to the era in which it was admitted, and
    its outcome counts only while that lasts: what began before the circuit opened says nothing
    about the store of now. A trial that does not end counts as failed after ``window`` seconds, or
    ``open_for`` where that is longer; it goes on, and its outcome counts no more.

    Args:
        failure_share: share of failed calls at which it opens.
        minimum_calls: calls in the window without which it does not open.
        window: seconds over which calls are counted.
        open_for: seconds until the first trial.
        max_open_for: longest time between trials that fail in a row.
        monotonic: source of time.
        random: source of the jitter of those longer times.
    """

    __slots__ = (
        "_era",
        "_failed_trials",
        "_failure_share",
        "_max_open_for",
        "_minimum_calls",
        "_monotonic",
        "_open_for",
        "_random",
        "_trial",
        "_trial_ends",
        "_trial_for",
        "_until",
        "_window",
        "state",
    )

    def __init__(
        self,
        *,
        failure_share: float,
        minimum_calls: int,
        window: float,
        open_for: float,
        max_open_for: float,
        monotonic: Callable[[], float],
        random: Random,
    ) -> None:
        self._failure_share = failure_share
        self._minimum_calls = minimum_calls
        self._open_for = open_for
        self._max_open_for = max_open_for
        self._trial_for = max(window, open_for)
        self._monotonic = monotonic
        self._random = random
        self._window = _Window(window)
        self.state = CircuitState.CLOSED
        self._era = 0
        self._until = 0.0
        self._trial = False
        self._trial_ends = 0.0
        self._failed_trials = 0

    @property
    def retry_after(self) -> float:
        """Seconds until a call may be tried; 0 when it may be now, or when a trial is under way."""
        if self.state is not CircuitState.OPEN:
            return 0.0
        return max(0.0, self._until - self._monotonic())

    @property
    def trying(self) -> bool:
        """Whether a trial is under way."""
        return self._trial

    def admit(self) -> int | None:
        """Let a call pass: return what :meth:`settle` needs afterwards, or None to refuse it."""
        if self.state is CircuitState.CLOSED:
            return self._era
        now = self._monotonic()
        if self._trial and now >= self._trial_ends:
            self._trial = False
            self._failed_trials += 1
            self._open()
        if self._trial or (self.state is CircuitState.OPEN and now < self._until):
            return None
        self.state = CircuitState.HALF_OPEN
        self._trial = True
        self._trial_ends = now + self._trial_for
        self._era += 1
        return self._era

    def settle(self, era: int, *, failed: bool | None, hits: int = 0) -> None:
        """Take note of how an admitted call ended.

        Args:
            era: what :meth:`admit` returned for it.
            failed: whether it failed; None when it says nothing about the store.
            hits: calls that succeeded meanwhile without being admitted one by one.
        """
        if era != self._era:
            return
        if self._trial:
            self._trial = False
            if failed is None:
                return
            if failed:
                self._failed_trials += 1
                self._open()
            else:
                self._close()
        elif failed is not None:
            window = self._window
            window.add(self._monotonic(), hits, failed=failed)
            if (
                failed
                and window.calls >= self._minimum_calls
                # Divided, since 0.07 * 100 is a little more than 7.
                and window.failures / window.calls >= self._failure_share
            ):
                self._open()

    def _open(self) -> None:
        self.state = CircuitState.OPEN
        self._era += 1
        seconds = self._open_for
        if self._failed_trials:
            # 2.0**63 is far above any limit, and larger exponents would overflow.
            longest = min(self._max_open_for, seconds * 2.0 ** min(self._failed_trials, 63))
            seconds = self._random.uniform(seconds, longest)
        self._until = self._monotonic() + seconds

    def _close(self) -> None:
        self.state = CircuitState.CLOSED
        self._era += 1
        self._failed_trials = 0
        self._window.clear()
