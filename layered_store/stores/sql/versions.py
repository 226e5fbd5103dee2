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

from layered_store.errors import ConfigError
from layered_store.stores.sql.schema import COUNTER_ROW, VERSION_ROW

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from layered_store.stores.sql.dialects import Statements

__all__ = ["OLDEST_USABLE", "SCHEMA_VERSION", "STEPS", "check", "is_current", "upgrade"]

SCHEMA_VERSION: Final = 2
"""The version that this release creates."""

OLDEST_USABLE: Final = 1
"""The oldest version that this release works with when it may not change tables."""


async def _tell_version(connection: Any, statements: Statements) -> None:
    """1 to 2: the tables are the same, and from here on they tell their version."""


STEPS: dict[int, Callable[[Any, Statements], Awaitable[None]]] = {1: _tell_version}
"""By the version they start from."""


async def is_current(connection: Any, statements: Statements) -> bool:
    """Tell whether there is nothing to do: a replica or a read-only file must open as well.

    Raises:
        ConfigError: the tables are newer than this release.
    """
    tables = statements.tables
    needed = (tables.latest.name, tables.history.name, tables.counter.name)

    def present(sync: Any) -> bool:
        look = inspect(sync)
        return all(look.has_table(name) for name in needed)

    if not await connection.run_sync(present):
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
    found = await _has(connection, tables.latest.name)
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
        ConfigError: this release cannot work with their version.
    """
    if not await _has(connection, statements.tables.counter.name):
        return  # the first statement that needs a table says which is missing
    version = await _version(connection, statements)
    _refuse_newer(version)
    if version < OLDEST_USABLE:
        raise ConfigError(
            f"the tables have version {version} and this release needs {OLDEST_USABLE} to"
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


async def _has(connection: Any, table: str) -> bool:
    return bool(await connection.run_sync(lambda sync: inspect(sync).has_table(table)))


async def _version(connection: Any, statements: Statements) -> int:
    if not await _has(connection, statements.tables.counter.name):
        return 1
    numbers = {row.id: row.position for row in await connection.execute(statements.numbers)}
    return int(numbers.get(VERSION_ROW, 1))
