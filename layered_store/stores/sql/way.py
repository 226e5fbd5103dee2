"""How work reaches the database: through SQLAlchemy, or past it where a driver has a faster way.

A way is chosen once, when the store is built. The one here serves every driver; SQLite's
(:mod:`layered_store.stores.sql.lite`) and asyncpg's (:mod:`layered_store.stores.sql.postgres`)
change what they do faster.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from layered_store.stores.sql.failures import concerns_one, read_only, translate
from layered_store.stores.sql.session import Session, padded

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine

    from layered_store.clock import Clock
    from layered_store.stores.erasures import KnownErasures
    from layered_store.stores.sql.desks import Desk
    from layered_store.stores.sql.dialects import Statements
    from layered_store.stores.sql.session import Rules
    from layered_store.stores.sql.transactions import Write

    Attempt = Callable[[Callable[[Desk], Awaitable[Any]]], Awaitable[Any]]
    """Does a piece of work with a connection."""

__all__ = ["Way"]

T = TypeVar("T")


class Way:
    """Through SQLAlchemy: with any driver, one statement after the other.

    Args:
        statements: those of the store's database.
        rules: what decides about a write.
        erasures: what is known of erasures.
        clock: source of time.

    Attributes:
        reads_out: most batches of reads under way.
        writes_out: most batches of writes under way. A commit waits for the disk, and the server
            flushes several at once.
        stoppable: whether what runs ends when nobody waits for it any more.
        one_each: whether a batch of writes holds one per user.
        joins_histories: whether reads of histories share a round trip.
    """

    reads_out: ClassVar[int] = 2
    writes_out: ClassVar[int] = 2
    stoppable: ClassVar[bool] = True
    one_each: ClassVar[bool] = False
    joins_histories: ClassVar[bool] = False

    def __init__(
        self, statements: Statements, rules: Rules, erasures: KnownErasures, clock: Clock
    ) -> None:
        self.statements = statements
        self.rules = rules
        self.erasures = erasures
        self.clock = clock

    def watch(self, engine: AsyncEngine) -> None:
        """Have a look at the connections that an engine of the store's own opens."""

    def session(self) -> Session:
        """Return what a piece of work is done in."""
        return Session(None, self.statements, self.clock)

    async def operate(
        self, session: Session, work: Callable[[Session], Awaitable[T]], desk: Desk
    ) -> T:
        """Do ``work`` on a connection."""
        session.connection = desk.connection
        return await work(session)

    async def read_rows(
        self, session: Session, digests: list[bytes], desk: Desk
    ) -> Mapping[bytes, Any]:
        """Return the rows of these users, each as digest, user id, version, payload."""
        session.connection = desk.connection
        found = await session.rows(self.statements.read_many, {"digests": padded(digests)})
        return {bytes(row.digest): row for row in found}

    async def read_histories(
        self, session: Session, longest: Mapping[bytes, int], age_us: int, desk: Desk
    ) -> Mapping[bytes, list[bytes]]:
        """Return the payloads of these users' histories, newest first.

        Args:
            session: what it is done in.
            longest: most rows by user.
            age_us: microseconds after which a state is no part of the history any more.
            desk: the connection.
        """

        async def each(session: Session) -> dict[bytes, list[bytes]]:
            found = {}
            for digest, rows in longest.items():
                values = {"at_digest": digest, "max_rows": rows, "max_age_us": age_us}
                got = await session.rows(self.statements.history, session.timed(values))
                found[digest] = [row.payload for row in got]
            return found

        return await self.operate(session, each, desk)

    async def write_at_once(
        self, session: Session, items: Sequence[Write], attempt: Attempt
    ) -> list[Any]:
        """Store what can be stored without a look at each row first.

        Args:
            session: what it is done in.
            items: what to store, in its order.
            attempt: does a piece of work with a connection.

        Returns:
            A version for each that was stored, None for each that needs a closer look.
        """
        del session, attempt
        return [None] * len(items)

    def concerns_one(self, error: Exception) -> bool:
        """Tell whether an error may be about one of several calls that failed together."""
        return concerns_one(error, alone_at_work=not self.stoppable)

    async def spoilt(self, session: Session, desk: Desk, exc: Exception, *, given: bool) -> bool:
        """Roll back after an error; tell whether the connection is of no more use.

        Args:
            session: in which it came.
            desk: the connection.
            exc: the error.
            given: whether the engine is the caller's.
        """
        if read_only(translate(exc, operation="", layer="")):
            return True  # after a failover the old primary is a replica: another may be meant now
        closed = getattr(desk.driver, "is_closed", None)
        if closed is not None and closed():
            if given:
                with suppress(Exception):  # SQLAlchemy learns of it, and empties its pool
                    await desk.connection.exec_driver_sql("SELECT 1")
            return True
        if session.open:
            try:
                await session.command(self.statements.rollback)
            except Exception:  # noqa: BLE001  it failed before
                return True
        return False
