"""How long erasures are remembered, and what follows from it for writes that come late."""

from __future__ import annotations

from typing import Final

from layered_store.errors import UnavailableError

__all__ = ["LATEST_SECONDS", "TOMBSTONE_SECONDS", "too_late"]

TOMBSTONE_SECONDS: Final = 7 * 86_400.0
"""How long a system of record keeps a tombstone, and a tier a copy, at least and at most."""

LATEST_SECONDS: Final = TOMBSTONE_SECONDS - 3_600.0
"""How long ago a write may have begun: an hour less, for clocks that were set."""


def too_late(operation: str | None = None, layer: str | None = None) -> UnavailableError:
    """Return the error of a write that began before tombstones that may be forgotten by now."""
    return UnavailableError(
        "the write began so long ago that an erasure since then may be forgotten; nothing was"
        " stored, call again",
        operation=operation,
        layer=layer,
        retryable=False,
    )
