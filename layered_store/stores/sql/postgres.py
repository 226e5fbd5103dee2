"""PostgreSQL's way: hot statements go to asyncpg itself, a batch in one round trip.

The statement that stores a batch is a transaction of its own. It takes the rows' locks in the order
of digests as all others do, looks at the rows as they are then, and leaves alone those that need a
closer look: a user who was erased, a write that was stored before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final

from sqlalchemy.dialects import postgresql

from layered_store.errors import StoreError
from layered_store.stores.sql.dialects import NOW_US, XID
from layered_store.stores.sql.way import Way

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from layered_store.clock import Clock
    from layered_store.stores.erasures import KnownErasures
    from layered_store.stores.sql.desks import Desk
    from layered_store.stores.sql.dialects import Statements
    from layered_store.stores.sql.schema import Tables
    from layered_store.stores.sql.session import Rules, Session
    from layered_store.stores.sql.transactions import Write
    from layered_store.stores.sql.way import Attempt

__all__ = ["PostgresWay"]

_ALL: Final = 2**62


class PostgresWay(Way):
    """Past SQLAlchemy to asyncpg, for reads and for writes that need no closer look.

    Args:
        statements: those of the store's database.
        rules: what decides about a write.
        erasures: what is known of erasures.
        clock: source of time.
    """

    # The statement that stores a batch takes one write of each user.
    one_each: ClassVar[bool] = True
    joins_histories: ClassVar[bool] = True

    def __init__(
        self, statements: Statements, rules: Rules, erasures: KnownErasures, clock: Clock
    ) -> None:
        super().__init__(statements, rules, erasures, clock)
        self.texts = PostgresStatements(statements.tables, NOW_US["postgresql"], XID)

    async def read_rows(
        self, session: Session, digests: list[bytes], desk: Desk
    ) -> Mapping[bytes, Any]:
        del session
        return await read_rows(desk.driver, self.texts, digests)

    async def read_histories(
        self, session: Session, longest: Mapping[bytes, int], age_us: int, desk: Desk
    ) -> Mapping[bytes, list[bytes]]:
        del session
        return await read_histories(desk.driver, self.texts, longest, age_us)

    async def write_at_once(
        self, session: Session, items: Sequence[Write], attempt: Attempt
    ) -> list[Any]:
        nothing: list[Any] = [None] * len(items)
        if self.rules.by_snapshot_time or self.rules.max_age_us is not None:
            return nothing
        firsts: dict[bytes, Write] = {}
        for item in items:
            firsts.setdefault(item.digest, item)

        async def at_once(desk: Desk) -> dict[bytes, int]:
            known = self.erasures.known_before
            pairs = [(item, known(item.digest, item.order)) for item in firsts.values()]
            session.committing = True
            try:
                return await write_rows(desk.driver, self.texts, pairs, self.rules)
            except Exception as exc:
                if refused(exc):
                    session.committing = False
                raise

        try:
            versions = await attempt(at_once)
        except StoreError as exc:
            if exc.outcome_unknown or not self.concerns_one(exc):
                raise
            return nothing
        return [
            versions.get(item.digest) if firsts[item.digest] is item else None for item in items
        ]


class PostgresStatements:
    """The texts for one store's tables.

    Args:
        tables: their names.
        now_us: SQL for the database's time in microseconds.
        position: SQL for a transaction's place in the change log.
    """

    def __init__(self, tables: Tables, now_us: str, position: str) -> None:
        dialect: Any = postgresql.dialect
        quote = dialect().identifier_preparer.quote
        latest, history = quote(tables.latest.name), quote(tables.history.name)
        columns = "user_id, version, payload"
        self.read = f"SELECT {columns} FROM {latest} WHERE digest = $1"
        # Plans are made while the tables are small and kept while they grow, until they are
        # analyzed. OFFSET and LIMIT leave the planner no way but one look into an index per user.
        self.read_many = f"""
            SELECT l.* FROM unnest($1::bytea[]) AS d (digest), LATERAL (
                SELECT digest, {columns} FROM {latest} WHERE digest = d.digest OFFSET 0
            ) l"""
        # As a query of its own it is asked once for a statement, not once for a row.
        now_us, position = f"(SELECT {now_us})", f"(SELECT {position})"
        # One way for any number of users, each with a limit of its own.
        self.histories = f"""
            SELECT d.digest, h.payload
            FROM unnest($1::bytea[], $2::bigint[]) AS d (digest, max_rows), LATERAL (
                SELECT payload, version FROM {history}
                WHERE digest = d.digest AND payload IS NOT NULL
                    AND recorded_at >= {now_us} - $3::bigint
                ORDER BY version DESC LIMIT d.max_rows
            ) h
            ORDER BY d.digest, h.version DESC"""
        many = (
            "unnest($1::bytea[], $2::text[], $3::bytea[], $4::bytea[], $5::bigint[], $6::bigint[])"
        )
        # Arrays are planned anew each time; a lone write is spared that.
        one = "(VALUES ($1::bytea, $2::text, $3::bytea, $4::bytea, $5::bigint, $6::bigint))"
        # What was trimmed is in the index until a vacuum: a trim looks back only as far as the one
        # before it may have left something, and now and then as far as anything may stand.
        write = f"""
            WITH given AS (
                SELECT * FROM %s AS g
                    (digest, user_id, payload, write_id, updated, after_erasure)
            ), stored AS (
                INSERT INTO {latest} AS l (digest, user_id, version, payload, write_id,
                    updated_at_unix_ms, position, erased_version)
                SELECT digest, user_id, {now_us} / 1000, payload, write_id, updated, {position},
                    after_erasure
                FROM given
                WHERE (SELECT h.version FROM {history} h
                    WHERE h.digest = given.digest AND h.write_id = given.write_id
                    LIMIT 1) IS NULL
                ORDER BY digest
                ON CONFLICT (digest) DO UPDATE SET user_id = excluded.user_id,
                    version = l.version + 1, payload = excluded.payload,
                    write_id = excluded.write_id, position = excluded.position,
                    updated_at_unix_ms = excluded.updated_at_unix_ms, purge_at = NULL
                WHERE (l.erased_version IS NULL OR l.erased_version = excluded.erased_version)
                    AND l.write_id IS DISTINCT FROM excluded.write_id
                RETURNING digest, version, write_id, payload
            ), kept AS (
                INSERT INTO {history} (digest, version, write_id, recorded_at, payload)
                SELECT digest, version, write_id, {now_us}, CASE WHEN $7 THEN payload END
                FROM stored
            ), trimmed AS (
                DELETE FROM {history} h USING stored
                WHERE h.digest = stored.digest AND h.version <= stored.version - $8::bigint
                    AND h.version > CASE WHEN stored.version %% 256 = 0 THEN 0
                        ELSE stored.version - $8::bigint - 32 END
                    AND stored.version %% 16 = 0
            )
            SELECT digest, version FROM stored"""
        self.write = write % many
        self.write_one = write % one


async def read_rows(
    driver: Any, texts: PostgresStatements, digests: list[bytes]
) -> dict[bytes, Any]:
    """Return the rows of these users, each as digest, user id, version, payload."""
    if len(digests) == 1:
        row = await driver.fetchrow(texts.read, digests[0])
        return {digests[0]: (digests[0], *row)} if row is not None else {}
    return {row[0]: row for row in await driver.fetch(texts.read_many, digests)}


async def read_histories(
    driver: Any, texts: PostgresStatements, longest: Mapping[bytes, int], age_us: int
) -> dict[bytes, list[bytes]]:
    """Return the payloads of these users' histories, newest first.

    Args:
        driver: asyncpg's connection.
        texts: the statements.
        longest: most rows by user.
        age_us: microseconds after which a state is no part of the history any more.
    """
    rows = await driver.fetch(texts.histories, list(longest), list(longest.values()), age_us)
    found: dict[bytes, list[bytes]] = {}
    for digest, payload in rows:
        found.setdefault(digest, []).append(payload)
    return found


async def write_rows(
    driver: Any, texts: PostgresStatements, writes: Sequence[tuple[Write, int | None]], rules: Rules
) -> dict[bytes, int]:
    """Store snapshots of different users; return the versions of those that were stored.

    Args:
        driver: asyncpg's connection.
        texts: the statements.
        writes: each with the erasure that it is known to have begun after.
        rules: the store's options.
    """
    rules_of = (rules.history_limit != 0, _ALL if rules.kept is None else rules.kept)
    if len(writes) == 1:
        ((item, erasure),) = writes
        rows = await driver.fetch(
            texts.write_one, item.digest, item.user_id, item.payload, item.write_id, item.updated,
            erasure, *rules_of,
        )  # fmt: skip
    else:
        erasures = [erasure for _, erasure in writes]
        rows = await driver.fetch(
            texts.write,
            [item.digest for item, _ in writes],
            [item.user_id for item, _ in writes],
            [item.payload for item, _ in writes],
            [item.write_id for item, _ in writes],
            [item.updated for item, _ in writes],
            # What the arrays are short of is NULL; nearly always nobody was erased.
            erasures if any(erasures) else [],
            *rules_of,
        )
    return dict(map(tuple, rows))


def refused(error: Exception) -> bool:
    """Tell whether the server answered that it did not do what it was asked to."""
    state = getattr(error, "sqlstate", None)
    # 08 and 57 (shut down, killed) may come after the commit; XX tells nothing. A statement that
    # was cancelled (statement_timeout) is 57014, and rolled back.
    return state == "57014" or (
        isinstance(state, str) and state[:2] not in ("08", "57", "58", "XX")
    )
