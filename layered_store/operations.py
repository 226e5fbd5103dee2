"""The operations of a store."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Op"]


class Op(StrEnum):
    """The operations of a store, by the names of its methods."""

    GET_LATEST = "get_latest"
    UPSERT_LATEST = "upsert_latest"
    DELETE = "delete"
    GET_HISTORY = "get_history"
    GET_LATEST_MANY = "get_latest_many"
    UPSERT_LATEST_MANY = "upsert_latest_many"

    @property
    def is_write(self) -> bool:
        """Whether the operation changes what is stored."""
        return self in _WRITES


_WRITES = frozenset({Op.UPSERT_LATEST, Op.UPSERT_LATEST_MANY, Op.DELETE})
