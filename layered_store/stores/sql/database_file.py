"""SQLite's file: whether it is still the one that a store began with."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from layered_store.errors import UnavailableError

if TYPE_CHECKING:
    import sqlite3

__all__ = ["DatabaseFile"]


class DatabaseFile:
    """The file that a store began with; later its path may name another file, or none.

    SQLite goes on with a file that was replaced or deleted, and in WAL mode does not notice: what
    it acknowledges then is lost with the last connection. Nor may another file be opened instead:
    the old one's log stands beside it still, and would be replayed into it.
    """

    __slots__ = ("_known", "_path")

    def __init__(self) -> None:
        self._path: str | None = None
        self._known: tuple[int, int] | None = None

    @property
    def known(self) -> bool:
        """Whether a connection was opened already."""
        return self._path is not None

    def learn(self, connection: sqlite3.Connection) -> None:
        """Take note of the file that a connection was opened to; none if it is in memory."""
        _, _, path = connection.execute("PRAGMA database_list").fetchone()
        self._known = _identity(path)
        self._path = path

    def check(self) -> None:
        """Look whether it is still there, once it is known.

        Raises:
            UnavailableError: it is not.
        """
        if self._path and _identity(self._path) != self._known:
            raise UnavailableError(
                "the database file was moved, replaced or deleted while it was open; put it back,"
                " or build a new store",
                retryable=False,
            )


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
