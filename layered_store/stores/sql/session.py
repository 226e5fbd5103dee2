"""What transactions are made of: one connection at work, and the rules for what stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from layered_store.errors import UnavailableError
from layered_store.stores.erasures import Began

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from layered_store.clock import Clock
    from layered_store.stores.sql.dialects import Statements

__all__ = ["Rules", "Session", "no_counter", "padded"]

_KEPT_WRITE_IDS: Final = 16
"""History rows kept per user however small ``history_limit`` is, so that a retry finds its id."""

_TRIM_EVERY: Final = 16
"""The history is trimmed with every so many versions of a user: reads never show more anyway."""

_KEPT_US: Final = 60 * 1_000_000
"""How long an entry stays when it is too old to be shown: a retry must find its id."""


@dataclass(slots=True)
class Rules:
    """The options of the store that decide about a write."""

    history_limit: int | None
    max_age_us: int | None
    by_snapshot_time: bool

    @property
    def kept(self) -> int | None:
        """How many entries of each user stay; None for all."""
        return None if self.history_limit is None else max(self.history_limit, _KEPT_WRITE_IDS)

    def cutoff(self, now_us: int) -> int | None:
        """Return the time before which entries go for their age; None where they do not."""
        return None if self.max_age_us is None else now_us - self.max_age_us - _KEPT_US


@dataclass(slots=True)
class Session:
    """One connection at work.

    Args:
        connection: SQLAlchemy's, in AUTOCOMMIT mode.
        statements: those of its database.
        clock: source of time.
    """

    connection: Any
    statements: Statements
    clock: Clock
    open: bool = False
    committing: bool = False
    committed: bool = False

    @property
    def sent(self) -> bool:
        """Whether a commit was sent: what it wrote stands, or may."""
        return self.committing or self.committed

    def timed(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return ``values`` with the time, where the host's clock is the database's."""
        if self.statements.host_time:
            values["now_us"] = int(self.clock.time() * 1e6)
        return values

    def measure(self) -> Began:
        """Return what is to learn the database's time."""
        return Began(drift=0.0) if self.statements.host_time else Began()

    async def rows(self, statement: Any, values: dict[str, Any]) -> Sequence[Any]:
        """Return all rows that a statement gives."""
        return (await self.connection.execute(statement, values)).all()  # type: ignore[no-any-return]

    async def run(self, statement: Any, values: list[dict[str, Any]]) -> None:
        """Run a statement once for each set of values."""
        if len(values) == 1:
            await self.connection.execute(statement, values[0])
        elif values and (rows := self.statements.many.get(id(statement))) is not None:
            for text, flat in rows.pack(values):
                await self.connection.exec_driver_sql(text, flat)
        elif values:
            await self.connection.execute(statement, values)

    async def command(self, command: str) -> None:
        """Run a command that gives no rows."""
        await self.connection.exec_driver_sql(command)

    async def begin(self) -> None:
        """Start a write transaction."""
        self.open = True
        for command in self.statements.begin:
            await self.command(command)

    async def commit(self) -> None:
        """Commit; from here on, an error leaves the outcome unknown."""
        self.committing = True
        await self.command(self.statements.commit)
        self.open = False
        self.committing = False
        self.committed = True

    async def rollback(self) -> None:
        """Give up the transaction."""
        await self.command(self.statements.rollback)
        self.open = False

    async def positioned(self, values: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return ``values`` with this transaction's place in the change log."""
        if self.statements.counted and not self.statements.chained:
            # The update itself tells the new number, as that of the last insert.
            place = (await self.connection.execute(self.statements.advance)).lastrowid
            if not place:
                raise no_counter()
            for item in values:
                item["at_position"] = place
        return values

    async def trim(self, entries: list[dict[str, Any]], rules: Rules, now_us: int) -> None:
        """Remove what is due of the histories that these new entries belong to."""
        keep, cutoff = rules.kept, rules.cutoff(now_us)
        if keep is None and cutoff is None:
            return
        newest = {entry["digest"]: entry["version"] for entry in entries}
        due = set(newest)
        if cutoff is None:
            due = {entry["digest"] for entry in entries if entry["version"] % _TRIM_EVERY == 0}
        values: list[dict[str, Any]] = [
            {"at_digest": digest, "floor": 0 if keep is None else newest[digest] - keep}
            for digest in due
        ]
        if cutoff is None:
            await self.run(self.statements.trim, values)
            return
        for item in values:
            item["cutoff"] = cutoff
        await self.run(self.statements.trim_aged, values)

    async def chain(self, entries: list[dict[str, Any]], heads: dict[bytes, int]) -> None:
        """Give new entries their places, each behind the one before it of the same user.

        Args:
            entries: in their order.
            heads: by digest, the place of the newest entry; updated.
        """
        await self.run(self.statements.advance, [{"steps": len(entries)}])
        found = await self.rows(self.statements.position, {})
        if not found:
            raise no_counter()
        last = int(found[0][0])
        for place, entry in enumerate(entries, last - len(entries) + 1):
            entry["position"] = place
            entry["previous"] = heads.get(entry["digest"])
            heads[entry["digest"]] = place


def no_counter() -> UnavailableError:
    """Return what to raise where the row that numbers transactions is missing."""
    return UnavailableError(
        "the counter table is empty; let create_tables=True fill it", retryable=False
    )


def padded(values: Iterable[bytes]) -> list[bytes]:
    """Return sorted distinct values, the last repeated up to a power of two.

    Databases prepare a statement per number of values: this way there are few.
    """
    found = sorted(set(values))
    size = 1 << max(0, len(found) - 1).bit_length()
    return found + found[-1:] * (size - len(found))
