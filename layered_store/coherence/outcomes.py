"""What a write that failed may still do, and which failures no tier is to blame for."""

from __future__ import annotations

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
from layered_store.stack import tier_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from layered_store.interface import StateStore

__all__ = [
    "CALLER_ERRORS",
    "QUARANTINE_SECONDS",
    "after_commit",
    "erased_in_part",
    "erased_nowhere",
    "may_take_effect",
    "not_happened",
    "pending_of",
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


def pending_of(exc: BaseException, store: StateStore) -> tuple[str, ...]:
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
        f"not every store has the user erased{rest}",
        pending=[name for exc, store in failures for name in pending_of(exc, store)],
        layer=layer,
        user_id=user_id,
    )
    error.retryable = not all(unable)
    return error
