"""How long a call of a stack may take, as far as its blocks say."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from layered_store.interface import StateStore
from layered_store.stack import Place, children_of, kind_of

__all__ = ["call_limits", "is_a", "number"]

_LIMITS: Final = ("time_limit", "timeout", "operation_timeout", "command_timeout", "socket_timeout")
"""Attributes by which a backend says how long a call of it takes at most, in seconds."""


def call_limits(places: Sequence[Place]) -> list[float | None]:
    """Return how long one call may take on the way to each backend of a stack, in seconds.

    The shortest of the limits on that way and of the backend's own; None where there is none,
    0 for memory, which never waits.

    Args:
        places: of the stack, or of a part of it.
    """
    found = []
    for end in places:
        if children_of(end.store):
            continue
        limits = [
            number(place.store, "seconds")
            for place in places
            if is_a(place.store, "timeout") and end.path.startswith(f"{place.path}.")
        ]
        limits.append(0.0 if is_a(end.store, "memory") else number(end.store, *_LIMITS))
        found.append(min((limit for limit in limits if limit is not None), default=None))
    return found


def is_a(store: StateStore, kind: str) -> bool:
    """Tell whether a block is of this kind, or of a class made from it."""
    return any(getattr(cls, "kind", None) == kind for cls in type(store).__mro__) or (
        kind_of(store) == kind
    )


def number(store: object, *names: str) -> float | None:
    """Return the first of these options that holds a number."""
    for name in names:
        value: object = getattr(store, name, None)
        if isinstance(value, timedelta):
            value = value.total_seconds()
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    return None
