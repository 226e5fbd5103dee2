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
    from layered_store.interface import StateStore

__all__ = [
    "CALLER_ERRORS",
    "QUARANTINE_SECONDS",
    "after_commit",
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
