"""Versions of the tables: which one a database has, and the way from an older one to the present.

Version 1 is the layout of before there were versions: it has no version row. Each step changes the
tables from one version to the next, in place, under the lock of
:meth:`layered_store.stores.sql.dialects.Statements.create`. SQLite and PostgreSQL do all steps in
one transaction; MariaDB and MySQL commit after every change of a table, so a step must be safe to
repeat from any point of it, and on tables that are as the present release creates them (a process
that died between creating them and writing their version leaves such).

To change the tables: raise ``SCHEMA_VERSION``, add the step to ``STEPS``, raise ``OLDEST_USABLE``
when the statements of the new release fail on older tables, and keep a database of the version that
was in ``tests/data``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import inspect

from layered_store.errors import ConfigError, UnavailableError
from layered_store.stores.sql.failures import MISSING_TABLE
from layered_store.stores.sql.schema import COUNTER_ROW, VERSION_ROW

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sqlalchemy import Table

    from layered_store.stores.sql.dialects import Statements

__all__ = ["OLDEST_USABLE", "SCHEMA_VERSION", "STEPS", "check", "is_current", "upgrade"]

SCHEMA_VERSION: Final = 4
"""The version that this release creates."""

OLDEST_USABLE: Final = {"sqlite": 3, "postgresql": 1, "mysql": 1}
"""The oldest version that this release works with when it may not change tables."""


async def _tell_version(connection: Any, statements: Statements) -> None:
    """1 to 2: the tables are the same, and from here on they tell their version."""


async def _chain_histories(connection: Any, statements: Statements) -> None:
    """2 to 3: SQLite's history is a log of chains, and holds the latest states too."""
    if not statements.chained:
        return
    latest, history = statements.tables.latest.name, statements.tables.history.name
    columns = await connection.run_sync(lambda sync: inspect(sync).get_columns(latest))
    if "payload" not in {column["name"] for column in columns}:
        return  # as this release made it
    old = {name: f"{name}_version_2" for name in (latest, history)}
    for index in (f"{latest}_position", f"{latest}_purge_at"):
        await connection.exec_driver_sql(f'DROP INDEX IF EXISTS "{index}"')
    for name, former in old.items():
        await connection.exec_driver_sql(f'ALTER TABLE "{name}" RENAME TO "{former}"')
    await connection.run_sync(statements.tables.metadata.create_all)
    for step in _CHAIN:
        text = step.format(
            latest=f'"{latest}"',
            history=f'"{history}"',
            counter=f'"{statements.tables.counter.name}"',
            old_latest=f'"{old[latest]}"',
            old_history=f'"{old[history]}"',
        )
        await connection.exec_driver_sql(text)


# Places above all that were given before: who reads the change log meets everything once more.
_CHAIN: Final = (
    """
    WITH entries AS (
        SELECT digest, version, write_id, recorded_at, payload FROM {old_history}
        UNION ALL
        SELECT digest, version, coalesce(write_id, zeroblob(16)), version * 1000, payload
        FROM {old_latest} l WHERE NOT EXISTS (
            SELECT 1 FROM {old_history} h WHERE h.digest = l.digest AND h.version = l.version
        )
    ), placed AS (
        SELECT e.*, row_number() OVER (ORDER BY version, digest)
            + (SELECT position FROM {counter} WHERE id = 1) AS position
        FROM entries e
    )
    INSERT INTO {history} (position, digest, version, write_id, recorded_at, previous, payload)
    SELECT p.position, p.digest, p.version, p.write_id, p.recorded_at,
        lag(p.position) OVER (PARTITION BY p.digest ORDER BY p.version),
        CASE WHEN p.version = l.version THEN l.payload ELSE p.payload END
    FROM placed p JOIN {old_latest} l ON l.digest = p.digest
    ORDER BY p.position
    """,
    """
    INSERT INTO {latest} (digest, user_id, version, erased_version, erased_at, purge_at, debts,
        position, updated_at_unix_ms)
    SELECT l.digest, l.user_id, l.version, l.erased_version, l.erased_at, l.purge_at, l.debts,
        h.position, l.updated_at_unix_ms
    FROM {old_latest} l
        JOIN (SELECT digest, max(position) AS position FROM {history} GROUP BY digest) h
            ON h.digest = l.digest
    ORDER BY l.digest
    """,
    """
    UPDATE {counter}
    SET position = max(position, (SELECT coalesce(max(position), 0) FROM {history}))
    WHERE id = 1
    """,
    "DROP TABLE {old_latest}",
    "DROP TABLE {old_history}",
)


async def _index_only_tombstones(connection: Any, statements: Statements) -> None:
    """3 to 4: PostgreSQL's index of ``purge_at`` holds tombstones alone, as SQLite's does."""
    if statements.family != "postgresql":
        return
    latest = statements.tables.latest
    (index,) = (each for each in latest.indexes if each.name == f"{latest.name}_purge_at")
    await connection.run_sync(lambda sync: index.drop(sync, checkfirst=True))
    await connection.run_sync(index.create)


STEPS: dict[int, Callable[[Any, Statements], Awaitable[None]]] = {
    1: _tell_version,
    2: _chain_histories,
    3: _index_only_tombstones,
}
"""By the version they start from."""


async def is_current(connection: Any, statements: Statements) -> bool:
    """Tell whether there is nothing to do: a replica or a read-only file must open as well.

    Raises:
        ConfigError: the tables are newer than this release.
    """
    tables = statements.tables
    if not await _has(connection, tables.latest, tables.history, tables.counter):
        return False
    numbers = {row.id: row.position for row in await connection.execute(statements.numbers)}
    _refuse_newer(numbers.get(VERSION_ROW, 1))
    counted = not statements.counted or COUNTER_ROW in numbers
    return counted and numbers.get(VERSION_ROW) == SCHEMA_VERSION


async def upgrade(connection: Any, statements: Statements) -> None:
    """Create what is missing and take every step up to the present version.

    Raises:
        ConfigError: the tables are newer than this release.
    """
    tables = statements.tables
    found = await _has(connection, tables.latest)
    version = SCHEMA_VERSION
    if found:
        version = await _version(connection, statements)
        _refuse_newer(version)
    await connection.run_sync(tables.metadata.create_all)
    if statements.counted:
        await connection.execute(statements.start_counter)
    await connection.execute(statements.start_version, {"to_version": version})
    while version < SCHEMA_VERSION:
        await STEPS[version](connection, statements)
        version += 1
        await connection.execute(statements.set_version, {"to_version": version})


async def check(connection: Any, statements: Statements) -> None:
    """Look at tables that somebody else takes care of.

    Raises:
        UnavailableError: there are none.
        ConfigError: this release cannot work with their version.
    """
    tables = statements.tables
    if not await _has(connection, tables.latest, tables.history):
        raise UnavailableError(MISSING_TABLE, retryable=False, layer="SQLStore")
    if not await _has(connection, tables.counter):
        return  # the first statement that needs a table says which is missing
    version = await _version(connection, statements)
    _refuse_newer(version)
    oldest = OLDEST_USABLE[statements.family]
    if version < oldest:
        raise ConfigError(
            f"the tables have version {version} and this release needs {oldest} to"
            f" {SCHEMA_VERSION}; run your migrations (docs/migrations.md), or open them once with"
            " create_tables=True",
            option="create_tables",
            layer="SQLStore",
        )


def _refuse_newer(version: int) -> None:
    if version > SCHEMA_VERSION:
        raise ConfigError(
            f"the tables have version {version}, from a newer release; this one knows them up to"
            f" {SCHEMA_VERSION}: upgrade layered-store here, or name other tables",
            option="latest_table",
            layer="SQLStore",
        )


async def _has(connection: Any, *tables: Table) -> bool:
    """Tell whether all of these tables are there."""

    def present(sync: Any) -> bool:
        look = inspect(sync)
        return all(look.has_table(table.name) for table in tables)

    return bool(await connection.run_sync(present))


async def _version(connection: Any, statements: Statements) -> int:
    if not await _has(connection, statements.tables.counter):
        return 1
    numbers = {row.id: row.position for row in await connection.execute(statements.numbers)}
    return int(numbers.get(VERSION_ROW, 1))
