"""Whether a backend answers, for the log: one line when it is lost, one when it is back."""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, Final

from layered_store.errors import StoreTimeoutError
from layered_store.events import log_event
from layered_store.stack import id_of

if TYPE_CHECKING:
    from layered_store.clock import Clock
    from layered_store.errors import StoreError
    from layered_store.interface import StateStore

__all__ = ["Presence"]

_QUIET_SECONDS: Final = 1.0
"""A backend that fails in part is lost once, and not once for each call that fails."""


class Presence:
    """Logs that a backend is lost, and that it is back.

    It is lost when an attempt got no answer in time, or when two in a row failed: one may have met
    a connection that was lost, and is made anew at once. It is back with the first that is answered
    a second or more after the last that failed.

    Args:
        backend: the backend.
        clock: source of time.

    Attributes:
        doubtful: whether an attempt failed since it was last well; until then ``answered`` need not
            be told.
    """

    __slots__ = ("_backend", "_clock", "_failed_at", "_lost_at", "doubtful")

    def __init__(self, backend: StateStore, clock: Clock) -> None:
        self._backend = weakref.ref(backend)
        self._clock = clock
        self.doubtful = False
        self._lost_at: float | None = None
        self._failed_at = -math.inf

    def failed(self, error: StoreError) -> None:
        """Note an attempt that did not reach the backend, or was not answered."""
        self._failed_at = now = self._clock.monotonic()
        again, self.doubtful = self.doubtful, True
        if self._lost_at is None and (again or isinstance(error, StoreTimeoutError)):
            self._lost_at = now
            log_event("backend_lost", backend=self._called(), reason=error.message)

    def answered(self) -> None:
        """Note an attempt that was answered."""
        if self._lost_at is None:
            self.doubtful = False
        elif (now := self._clock.monotonic()) - self._failed_at >= _QUIET_SECONDS:
            log_event("backend_back", backend=self._called(), after=round(now - self._lost_at, 3))
            self._lost_at = None
            self.doubtful = False

    def _called(self) -> str:
        backend = self._backend()
        return "" if backend is None else id_of(backend) or backend.name
