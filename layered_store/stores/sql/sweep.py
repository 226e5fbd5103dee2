"""How SQLite's histories are trimmed: the log is swept where its entries are due.

Each write makes the oldest entry that its user's history shows one too many. By then that entry
stands among those of others, half a dozen to a page: removing what is due user by user would change
each page of the log as many times. A sweep follows the newest entry at a distance and removes in
one go what is due there. The distance is learnt by walking down users' chains now and then, and a
walk removes what sweeps did not: entries of users who write more seldom than most.
"""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import sqlite3

__all__ = ["Sweep"]

_WALK_EVERY: Final = 64
"""A user's chain is walked with every so many versions, or with twice as many as are kept: each
time all entries are passed that are kept."""

_PACE: Final = 2
"""Entries of the log that are looked at for each new one: a sweep that fell back catches up."""

_FARTHER, _NEARER = 1 / 8, 1 / 32
"""How much the distance grows or shrinks with a walk: it so is that of four users in five."""

_SPREAD: Final = 2.5
"""Standard deviations by which the distance is exceeded: how often others write is chance."""


class Sweep:
    """Where the log of a store is swept next.

    What it knows are hints, shared by all connections of the store: whatever they are, only due
    entries are removed, and of a chain only its end.

    Args:
        latest: quoted name of the table of latest states.
        history: quoted name of the log.
        keep: how many entries of each user stay; those before them are due.
    """

    __slots__ = ("_beyond", "_chain", "_distance", "_due", "_every", "_keep", "_place", "_remove")

    def __init__(self, latest: str, history: str, keep: int) -> None:
        self._keep = keep
        self._every = max(_WALK_EVERY, 2 * keep)
        self._distance = 0.0
        self._beyond = 1 + _SPREAD / sqrt(keep)
        self._place = 0
        self._chain = (
            "WITH RECURSIVE chain (position, previous, version) AS ("
            f" SELECT position, previous, version FROM {history} WHERE position = ?"
            " UNION ALL SELECT h.position, h.previous, h.version"
            f" FROM chain JOIN {history} h ON h.position = chain.previous)"
            " SELECT position, version FROM chain"
        )
        self._remove = f"DELETE FROM {history} WHERE position = ?"
        # What stands behind a due entry is due as well, and would be out of reach without it.
        self._due = (
            "WITH RECURSIVE due (position, previous) AS ("
            f" SELECT h.position, h.previous FROM {history} h"
            f" JOIN {latest} l ON l.digest = h.digest"
            f" WHERE h.position > ? AND h.position <= ? AND h.version <= l.version - {keep}"
            " UNION SELECT h.position, h.previous"
            f" FROM due JOIN {history} h ON h.position = due.previous)"
            f" DELETE FROM {history} WHERE position IN (SELECT position FROM due)"
        )

    def walks(self, digest: bytes, version: int) -> bool:
        """Tell whether a user's chain is walked with this version: users take turns."""
        return (version + digest[0]) % self._every == 0

    def walk(self, connection: sqlite3.Connection, newest: int, version: int) -> None:
        """Remove what is due of one user; learn how far behind the newest entry that begins.

        Args:
            connection: in its thread, in a transaction.
            newest: place of the user's newest entry.
            version: of that entry.
        """
        chain = connection.execute(self._chain, (newest,)).fetchall()
        oldest = version - self._keep + 1
        connection.executemany(self._remove, [(place,) for place, of in chain if of < oldest])
        for place, of in chain:
            if of == oldest:
                self._learn(newest - place)

    def _learn(self, distance: int) -> None:
        known = self._distance
        if not known:
            self._distance = float(distance)
        elif distance > known:
            self._distance = known * (1 + _FARTHER)
        else:
            self._distance = known * (1 - _NEARER)

    def sweep(self, connection: sqlite3.Connection, newest: int, written: int) -> None:
        """Go on through the log, removing what is due of any user.

        Args:
            connection: in its thread, in a transaction.
            newest: the last place of the log.
            written: how many entries this transaction adds.
        """
        distance = self._distance
        # Farther behind, walks have left nothing of users who write as often as most.
        start = max(self._place, newest - int(distance * (1 + self._every / self._keep)))
        end = min(start + _PACE * written, newest - int(distance * self._beyond))
        if distance and start < end:
            connection.execute(self._due, (start, end))
            self._place = end
