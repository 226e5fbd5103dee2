"""The change log: what changed after a cursor, in pages, for whoever keeps copies in step.

A cursor tells a place in it and the database's time there: the position of a transaction, the
digest of the last user told of that position, and microseconds.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from layered_store.coherence.contract import Change, Changes
from layered_store.coherence.tombstones import LATEST_SECONDS
from layered_store.errors import StoreError, UnavailableError, ValidationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from layered_store.stores.erasures import KnownErasures
    from layered_store.stores.sql.access import Access
    from layered_store.stores.sql.session import Session

__all__ = ["ChangeLog"]

_COVERED_US: Final = int(LATEST_SECONDS * 1e6)
_MAX_POSITION: Final = 2**63 - 1
_AHEAD_ROWS: Final = 20_000
_ADOPTED_ROWS: Final = 5_000
_SCANNED: Final = 20_000
_CURSOR: Final = re.compile(r"(\d{1,19})\.([0-9a-f]{0,32})\.(\d{1,19})").fullmatch


class ChangeLog:
    """The change log of one store.

    Args:
        access: the way to its database.
        erasures: learns the database's time.
        name: the store's, for errors.
    """

    def __init__(self, access: Access, erasures: KnownErasures, name: str) -> None:
        self._access = access
        self._statements = access.statements
        self._erasures = erasures
        self._name = name

    async def head(self) -> str:
        """Return the cursor behind everything that is committed."""
        horizon, now_us = await self._access.run("head", self._horizon)
        return f"{horizon - 1}.{'f' * 32}.{now_us}"

    async def changes(self, cursor: str, limit: int) -> Changes:
        """Return a page of what changed behind the cursor, each user once."""
        position, after, issued = self._position_of(cursor)

        async def work(session: Session) -> tuple[int, int, bool, Sequence[Any]]:
            # First the horizon: all below it is committed, so the second statement sees it.
            horizon, now_us = await self._horizon(session)
            # What was overwritten since stands in SQLite's log as well: a page ends somewhere.
            cut = self._statements.chained and horizon > position + _SCANNED
            if cut:
                horizon = position + _SCANNED
            values = {
                "after_position": position,
                "after_digest": after,
                "horizon": horizon,
                "max_rows": limit + 1,
            }
            found = list(await session.rows(self._statements.changes, values))
            if len(found) <= limit and not self._statements.counted:
                # What was committed behind a transaction that is still open: it must be known
                # now, and is told again until the horizon has passed it.
                values |= {
                    "after_position": max(horizon - 1, position),
                    "after_digest": b"\xff" * 16,
                    "horizon": _MAX_POSITION,
                    "max_rows": _AHEAD_ROWS + 1,
                }
                ahead.extend(await session.rows(self._statements.changes, values))
                await self._adopt(session, ahead)
            return horizon, now_us, cut, found

        ahead: list[Any] = []
        horizon, now_us, cut, rows = await self._access.run("changes", work)
        if len(ahead) > _AHEAD_ROWS:
            raise UnavailableError(
                "a transaction has been open for so long that too many changes wait behind it, or"
                " the tables came with a dump and are being numbered anew",
                operation="changes",
                layer=self._name,
            )
        more = len(rows) > limit
        items = [
            Change(
                bytes(row.digest),
                row.version,
                row.user_id is None,
                owed=row.debts not in (None, "[]"),
            )
            for row in (*rows[:limit], *ahead)
        ]
        if not more:
            last = max(horizon - 1, position)
            time = issued if cut else now_us
            return Changes(items, f"{last}.{'f' * 32}.{time}", more=cut)
        # The time stays that of the first page: what it left out may be as old as that.
        end = rows[limit - 1] if limit else None
        place = f"{end.position}.{bytes(end.digest).hex()}" if end else f"{position}.{after.hex()}"
        return Changes(items, f"{place}.{issued}", more=True)

    async def _adopt(self, session: Session, ahead: Sequence[Any]) -> None:
        """Give rows that no transaction of this server can have written a new place in the log.

        They came with a dump of another one. Left as they are, all of them would be ahead of the
        log until this server has counted as far. Some at a time, since a call has its time limit.
        """
        if not ahead:
            return
        end = (await session.rows(self._statements.end_of_ids, {}))[0][0]
        if any(row.position >= end for row in ahead):
            await session.run(self._statements.adopt, [{"max_rows": _ADOPTED_ROWS}])

    async def covers(self, cursor: str) -> bool:
        """Tell whether nothing behind the cursor is forgotten yet; another store's never counts."""
        try:
            position, _, issued = self._position_of(cursor)
        except ValidationError:
            return False
        horizon, now_us = await self._access.run("covers", self._horizon)
        # A position from the future is another database's, or this one was restored.
        return position < horizon and now_us - issued < _COVERED_US

    async def _horizon(self, session: Session) -> tuple[int, int]:
        began = session.measure()
        sent = session.clock.monotonic()
        found = (await session.rows(self._statements.horizon, session.timed({})))[0]
        began.learn(sent, session.clock.monotonic(), found.now_us)
        self._erasures.learn(began)
        if found.horizon is None:
            raise StoreError(
                "the counter table is empty; let create_tables=True fill it", layer=self._name
            )
        return found.horizon, found.now_us

    def _position_of(self, cursor: str) -> tuple[int, bytes, int]:
        found = _CURSOR(cursor) if isinstance(cursor, str) else None
        if found is None:
            raise ValidationError(
                "is not one of this store's", field="cursor", operation="changes", layer=self._name
            )
        return int(found[1]), bytes.fromhex(found[2]), int(found[3])
