"""How SQLite's histories are trimmed: the log is swept where its entries are due.

Each write makes the oldest entry that its user's history shows one too many. By then that entry
stands among those of others, half a dozen to a page: removing what is due user by user would change
each page of the log as many times. A sweep follows the newest entry at a distance and removes in
one go what is due there. The distance is learnt by walking down users' chains now and then, and a
walk removes what sweeps did not: entries of users who write more seldom than most.

What is too old to be shown stands at the log's old end, whoever's it is, and a sweep of its own
begins there.
"""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence

    from layered_store.stores.sql.session import Rules

__all__ = ["Sweep"]

_WALK_EVERY: Final = 64
"""A user's chain is walked with every so many versions, or with twice as many as are kept: each
time all entries are passed that are kept."""

_PACE: Final = 2
"""Entries of the log that are looked at for each new one: a sweep that fell back catches up."""

_LEAST: Final = 32
"""Least entries that are looked at where those stand that are too old."""

_FARTHER, _NEARER = 1 / 8, 1 / 32
"""How much the distance grows or shrinks with a walk: it so is that of four users in five."""

_SPREAD: Final = 2.5
"""Standard deviations by which the distance is exceeded: how often others write is chance."""

# Place in the log, digest, version, place of the entry before it of the same user.
Entry = tuple[int, bytes, int, int | None]


class Sweep:
    """Where the log of a store is swept next.

    What it knows are hints, shared by all connections of the store: whatever they are, only due
    entries are removed, and of a chain only its end.

    Args:
        latest: quoted name of the table of latest states.
        history: quoted name of the log.
        rules: how many entries of each user stay, and how long.
    """

    def __init__(self, latest: str, history: str, rules: Rules) -> None:
        self._rules = rules
        self._keep = rules.kept
        self._every = max(_WALK_EVERY, 2 * (self._keep or 0))
        self._distance = 0.0
        self._place = 0
        self._old = 0
        self._chain = (
            "WITH RECURSIVE chain (position, previous, version) AS ("
            f" SELECT position, previous, version FROM {history} WHERE position = ?"
            " UNION ALL SELECT h.position, h.previous, h.version"
            f" FROM chain JOIN {history} h ON h.position = chain.previous)"
            " SELECT position, version FROM chain"
        )
        self._remove = f"DELETE FROM {history} WHERE position = ?"
        # What stands behind a due entry is due as well, and would be out of reach without it.
        with_all_behind = (
            f" UNION SELECT h.position, h.previous FROM due JOIN {history} h"
            " ON h.position = due.previous)"
            f" DELETE FROM {history} WHERE position IN (SELECT position FROM due)"
        )
        some = (
            "WITH RECURSIVE due (position, previous) AS ("
            f" SELECT h.position, h.previous FROM {history} h"
            f" JOIN {latest} l ON l.digest = h.digest WHERE h.position > ? AND h.position <= ?"
        )
        self._remove_surplus = f"{some} AND h.version <= l.version - {self._keep}{with_all_behind}"
        self._remove_old = f"{some} AND h.position <> l.position{with_all_behind}"
        self._remove_from = (
            "WITH RECURSIVE due (position, previous) AS ("
            f" SELECT position, previous FROM {history} WHERE position = ?{with_all_behind}"
        )
        self._first = (
            f"SELECT position, recorded_at FROM {history} WHERE position > ?"
            " ORDER BY position LIMIT 1"
        )
        self._first_young = (
            f"SELECT position FROM {history} WHERE position > ? AND position <= ?"
            " AND recorded_at >= ? ORDER BY position LIMIT 1"
        )

    def trim(
        self, connection: sqlite3.Connection, entries: Sequence[Entry], now_us: int
    ) -> None:
        """Remove some of what is due.

        Args:
            connection: in its thread, in a transaction.
            entries: what this transaction has added to the log, in its order.
            now_us: the time, in microseconds.
        """
        if self._keep is not None:
            for place, digest, version, _ in entries:
                if (version + digest[0]) % self._every == 0:  # users take turns
                    self._walk(connection, place, version, self._keep)
            self._sweep(connection, entries[-1][0], len(entries), self._keep)
        cutoff = self._rules.cutoff(now_us)
        if cutoff is not None:
            self._sweep_old(connection, entries, cutoff)

    def _walk(
        self, connection: sqlite3.Connection, newest: int, version: int, keep: int
    ) -> None:
        """Remove what is due of one user; learn how far behind the newest entry that begins."""
        chain = connection.execute(self._chain, (newest,)).fetchall()
        oldest = version - keep + 1
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

    def _sweep(
        self, connection: sqlite3.Connection, newest: int, written: int, keep: int
    ) -> None:
        """Go on through the log, removing what is too much of any user."""
        distance = self._distance
        # Farther behind, walks have left nothing of users who write as often as most.
        start = max(self._place, newest - int(distance * (1 + self._every / keep)))
        end = min(start + _PACE * written, newest - int(distance * (1 + _SPREAD / sqrt(keep))))
        if distance and start < end:
            connection.execute(self._remove_surplus, (start, end))
            self._place = end

    def _sweep_old(
        self, connection: sqlite3.Connection, entries: Sequence[Entry], cutoff: int
    ) -> None:
        """Go on from the log's old end, removing all that is older but the latest states."""
        for *_, previous in entries:
            # What was passed as the latest state, and is not any more.
            if previous is not None and previous <= self._old:
                connection.execute(self._remove_from, (previous,))
        first = connection.execute(self._first, (self._old,)).fetchone()
        if first is None or first[1] >= cutoff:
            return
        start = first[0] - 1
        end = start + max(_LEAST, _PACE * len(entries))
        young = connection.execute(self._first_young, (start, end, cutoff)).fetchone()
        if young is not None:
            end = young[0] - 1
        connection.execute(self._remove_old, (start, end))
        self._old = end
