"""What a write or erasure that failed may have left, and which failures no tier is to blame for."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from layered_store.errors import (
    ClosedError,
    ConfigError,
    ErasureIncompleteError,
    RejectedError,
    StoreError,
    StoreTimeoutError,
    UnsupportedError,
    ValidationError,
)
from layered_store.events import log_event
from layered_store.running import UnderWay
from layered_store.stack import id_of, tier_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from layered_store.clock import Clock
    from layered_store.interface import StateStore

__all__ = [
    "CALLER_ERRORS",
    "QUARANTINE_SECONDS",
    "Doubts",
    "Erasures",
    "after_commit",
    "erased_in_part",
    "erased_nowhere",
    "may_take_effect",
    "not_happened",
]

QUARANTINE_SECONDS: Final = 5.0
"""How long a write whose outcome is unknown may still take effect: longer than any backend's
limit.
"""

CALLER_ERRORS: Final = (ValidationError, ClosedError)
"""Mistakes of the program's: the caller is told, and the tier counts as sound."""

_NOT_HAPPENED: Final = (ValidationError, RejectedError, ClosedError, ConfigError, UnsupportedError)


def not_happened(exc: BaseException) -> bool:
    """Tell whether a write that raised this surely did not take effect, now or later.

    Of a batch a part may have been stored before the rest was refused; the error says so.
    """
    return isinstance(exc, _NOT_HAPPENED) and not exc.outcome_unknown


def may_take_effect(exc: BaseException) -> bool:
    """Tell whether a write that raised this may still take effect, now or later."""
    return isinstance(exc, StoreTimeoutError) or getattr(exc, "outcome_unknown", True)


def after_commit(exc: StoreError) -> StoreError:
    """Return the error of a closed tier as a caller is told whose write the origin has already."""
    told = exc.fresh()
    told.outcome_unknown = True
    return told


def _pending_of(exc: BaseException, store: StateStore) -> tuple[str, ...]:
    """Return the names of what may still hold a user whom ``store`` failed to erase."""
    nested = exc.pending if isinstance(exc, ErasureIncompleteError) else ()
    return nested or (tier_name(store),)


def erased_nowhere(failures: Sequence[tuple[Exception, StateStore]], of: int) -> bool:
    """Tell whether none of so many stores erased, and repeating it would not help.

    Args:
        failures: what they raised, and which.
        of: how many there are.
    """
    lasting = [exc for exc, _ in failures if isinstance(exc, UnsupportedError | ClosedError)]
    return len(lasting) == of


def erased_in_part(
    failures: Sequence[tuple[Exception, StateStore]], layer: str, user_id: str
) -> ErasureIncompleteError:
    """Return what to raise where a user is erased in some of several stores, but not in all.

    Args:
        failures: what the others raised, outermost first.
        layer: the block that erases, for the error.
        user_id: whom.
    """
    unable = [isinstance(exc, UnsupportedError) for exc, _ in failures]
    rest = ", and one of them cannot delete" if any(unable) else "; repeat the delete"
    error = ErasureIncompleteError(
        f"not every store has erased the user{rest}",
        pending=[name for exc, store in failures for name in _pending_of(exc, store)],
        layer=layer,
        user_id=user_id,
    )
    error.retryable = not all(unable)
    return error


class Doubts(OrderedDict[str, float]):
    """Users of whom a write may still take effect, and until when, in the order in which that ends.

    For one thread at a time: whoever shares it holds a lock.
    """

    def add(self, user_ids: Iterable[str], now: float) -> None:
        """Note that a write of these users, which failed now, may still take effect."""
        for user_id in user_ids:
            self[user_id] = now + QUARANTINE_SECONDS
            self.move_to_end(user_id)

    def end(self, now: float) -> list[str]:
        """Forget the users whose time is over, and return them."""
        ended = []
        while self and self[first := next(iter(self))] <= now:
            del self[first]
            ended.append(first)
        return ended


class Erasures(UnderWay):
    """Erasures from several stores: closing waits for them, and incomplete ones are told of.

    Attributes:
        incomplete: how many may have left the user somewhere.
    """

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.incomplete = 0
        self._failing = False

    @contextmanager
    def by(self, layer: StateStore) -> Iterator[None]:
        """Make one; log the first of a row that is incomplete, and the first that is not again."""
        try:
            with self.call():
                yield
        except ErasureIncompleteError as exc:
            self.incomplete += 1
            if not self._failing:
                self._failing = True
                pending = ",".join(exc.pending)
                log_event("erasure_incomplete", layer=id_of(layer) or layer.name, pending=pending)
            raise
        if self._failing:
            self._failing = False
            log_event("erasure_complete", layer=id_of(layer) or layer.name)
