"""Databases outlive releases: older tables are brought up to date, newer ones are refused."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from layered_store import (
    ConfigError,
    CorruptDataError,
    HealthStatus,
    SQLStore,
    StateSnapshot,
    UnavailableError,
)
from layered_store.stores.sql import versions

if TYPE_CHECKING:
    from layered_store.stores.sql.dialects import Statements

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"


@pytest.fixture(params=["sqlite", "postgres", "mysql"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def url(family: str, request: pytest.FixtureRequest) -> str:
    """An empty database."""
    return str(request.getfixturevalue(f"{family}_url"))


@pytest.fixture
async def first_release(family: str, url: str) -> str:
    """A database that the first release wrote."""
    await restore(family, url, (DATA / "schema_1" / f"{family}.sql").read_text())
    return url


@pytest.fixture(params=["schema_1", "schema_3"])
async def earlier(family: str, url: str, request: pytest.FixtureRequest) -> str:
    """A database of each layout that was."""
    await restore(family, url, (DATA / request.param / f"{family}.sql").read_text())
    return url


async def restore(family: str, url: str, script: str) -> None:
    where = make_url(url)
    if family == "sqlite":
        with sqlite3.connect(str(where.database)) as database:
            database.executescript(script)
        database.close()
    elif family == "postgres":
        import asyncpg

        connection = await asyncpg.connect(url.replace("+asyncpg", ""))
        try:
            await connection.execute(script)
        finally:
            await connection.close()
    else:
        import pymysql

        with (
            pymysql.connect(
                host=where.host,
                port=where.port or 3306,
                user=where.username,
                database=where.database,
                autocommit=True,
            ) as connection,
            connection.cursor() as cursor,
        ):
            for statement in script.split(";\n"):
                if statement.strip():
                    cursor.execute(statement)


async def execute(url: str, *statements: str) -> list[Any]:
    """Run statements on a connection of one's own; return the rows of the last."""
    engine = create_async_engine(url)
    try:
        async with engine.begin() as connection:
            for statement in statements:
                result = await connection.execute(text(statement))
            return list(result.all()) if result.returns_rows else []
    finally:
        await engine.dispose()


async def version_of(url: str) -> list[Any]:
    return await execute(url, "SELECT position FROM layered_store_latest_counter WHERE id = 2")


async def test_a_database_of_the_earlier_opens_with_all_it_holds(earlier: str) -> None:
    """States, histories, erasures and versions are what they were, and go on from there."""
    async with SQLStore(earlier) as store:
        latest = await store.get_latest("u-1")
        history = await store.get_history("u-1", 10)
        assert latest == StateSnapshot(
            "u-1", updated_at_unix_ms=1732406402000, axes={"warmth": 0.75}
        )
        assert [state.get_axis("warmth") for state in history] == [0.75, 0.5, 0.25]
        assert await store.get_latest("ünal") is not None
        assert await store.get_latest("gone") is None
        assert await store.get_history("gone", 10) == []
        before = (await store.read("gone")).version
        await store.upsert_latest(StateSnapshot("gone", axes={"calm": 0.1}))
        assert (await store.read("gone")).version > before > 0
        await store.upsert_latest(StateSnapshot("u-1", axes={"warmth": 1.0}))
        assert len(await store.get_history("u-1", 10)) == 4
        assert set((await store.users("", 10)).user_ids) == {"u-1", "ünal", "gone"}
    assert await version_of(earlier) == [(versions.SCHEMA_VERSION,)]


async def test_many_processes_may_open_an_older_database_at_once(earlier: str) -> None:
    """The steps are taken by one of them, and all go on."""
    stores = [SQLStore(earlier) for _ in range(5)]
    try:
        found = await asyncio.gather(*(store.get_latest("u-1") for store in stores))
    finally:
        for store in stores:
            await store.aclose()
    assert all(state is not None for state in found)
    assert await version_of(earlier) == [(versions.SCHEMA_VERSION,)]


async def test_an_older_database_gets_the_tables_and_indexes_of_a_new_one(
    earlier: str, family: str
) -> None:
    """Which rows an index holds belongs to it."""

    async def made() -> list[Any]:
        return sorted(await execute(earlier, _INDEXES[family]), key=str)

    async with SQLStore(earlier):
        pass
    changed = await made()
    drop = "DROP TABLE layered_store_{}"
    await execute(
        earlier, *(drop.format(name) for name in ("latest", "history", "latest_counter"))
    )
    async with SQLStore(earlier):
        pass
    assert changed == await made()
    assert any("purge_at" in str(row) for row in changed)


_INDEXES = {
    "sqlite": "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL",
    "postgres": "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'",
    "mysql": """
        SELECT table_name, index_name, seq_in_index, column_name, non_unique
        FROM information_schema.statistics WHERE table_schema = database()""",
}


async def test_new_tables_tell_their_version(url: str) -> None:
    """A fresh database is of the present version, without any step."""
    async with SQLStore(url):
        pass
    assert await version_of(url) == [(versions.SCHEMA_VERSION,)]


@pytest.mark.parametrize("create_tables", [True, False])
async def test_tables_of_a_newer_release_are_refused(url: str, create_tables: bool) -> None:
    """The error names both versions and the remedy; nothing is changed, health says why."""
    async with SQLStore(url) as store:
        await store.upsert_latest(StateSnapshot("u-1"))
    await execute(url, "UPDATE layered_store_latest_counter SET position = 99 WHERE id = 2")
    store = SQLStore(url, create_tables=create_tables)
    try:
        for call in (
            store.get_latest("u-1"),
            store.upsert_latest(StateSnapshot("u-1")),
            store.open(),
        ):
            with pytest.raises(ConfigError, match=r"version 99.*up to \d+: upgrade") as caught:
                await call
            assert not caught.value.retryable
        report = await store.health_report()
        assert report.status is HealthStatus.UNHEALTHY
        assert "version 99" in report.message
    finally:
        await store.aclose()
    assert await version_of(url) == [(99,)]
    # And once the version is one it knows, everything is there.
    await execute(
        url,
        f"UPDATE layered_store_latest_counter SET position = {versions.SCHEMA_VERSION}"
        " WHERE id = 2",
    )
    async with SQLStore(url) as store:
        assert await store.get_latest("u-1") is not None


async def test_steps_are_taken_in_place_in_their_order_once(
    first_release: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release with more steps takes them all, keeps the data, and not again on the next open."""
    taken: list[int] = []

    def step(number: int) -> Any:
        async def take(connection: Any, statements: Statements) -> None:
            taken.append(number)
            table = statements.tables.latest.name
            add = f"ALTER TABLE {table} ADD COLUMN extra_{number} BIGINT"
            await connection.exec_driver_sql(add)

        return take

    now = versions.SCHEMA_VERSION
    steps = {now: step(1), now + 1: step(2), now + 2: step(3)}
    monkeypatch.setattr(versions, "STEPS", {**versions.STEPS, **steps})
    monkeypatch.setattr(versions, "SCHEMA_VERSION", now + 3)
    for _ in range(2):
        async with SQLStore(first_release) as store:
            assert await store.get_latest("u-1") is not None
    assert taken == [1, 2, 3]
    assert await version_of(first_release) == [(now + 3,)]
    columns = "SELECT extra_1, extra_2, extra_3 FROM layered_store_latest"
    assert len(await execute(first_release, columns)) == 3


async def test_a_step_that_fails_leaves_the_version_where_it_was(
    first_release: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next open begins at the step that failed."""
    fails = True

    async def step(connection: Any, statements: Statements) -> None:
        if fails:
            await connection.exec_driver_sql("SELECT * FROM there_is_no_such_table")

    now = versions.SCHEMA_VERSION
    monkeypatch.setattr(versions, "STEPS", {**versions.STEPS, now: step})
    monkeypatch.setattr(versions, "SCHEMA_VERSION", now + 1)
    store = SQLStore(first_release)
    with pytest.raises(Exception, match="table"):
        await store.open()
    fails = False
    await store.open()
    assert await store.get_latest("u-1") is not None
    await store.aclose()
    assert await version_of(first_release) == [(now + 1,)]


async def test_tables_that_must_not_be_changed_are_only_looked_at(
    first_release: str, family: str
) -> None:
    """With create_tables=False an older database that still fits is used as it is."""
    if family == "sqlite":  # whose second version was the last of that layout
        store = SQLStore(first_release, create_tables=False)
        with pytest.raises(ConfigError, match="version 1 and this release needs 3 to 4"):
            await store.get_latest("u-1")
        await store.aclose()
        return
    async with SQLStore(first_release, create_tables=False) as store:
        assert await store.get_latest("u-1") is not None
        await store.upsert_latest(StateSnapshot("u-1"))
    assert await version_of(first_release) == []


async def test_tables_too_old_to_be_used_unchanged_are_refused(
    first_release: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With create_tables=False, the error says what to run."""
    now = versions.SCHEMA_VERSION
    monkeypatch.setattr(versions, "OLDEST_USABLE", dict.fromkeys(versions.OLDEST_USABLE, now))
    store = SQLStore(first_release, create_tables=False)
    with pytest.raises(
        ConfigError, match=f"version 1 and this release needs {now} to .*migrations"
    ):
        await store.get_latest("u-1")
    await store.aclose()
    async with SQLStore(first_release) as changing:
        assert await changing.get_latest("u-1") is not None
    store = SQLStore(first_release, create_tables=False)
    assert await store.get_latest("u-1") is not None
    await store.aclose()


async def test_tables_of_this_release_are_opened_without_writing(url: str) -> None:
    """A replica and a login that may only read open with the default options."""
    async with SQLStore(url) as store:
        await store.upsert_latest(StateSnapshot("u-1"))
    make = make_url(url)
    if make.get_backend_name() == "sqlite":
        read_only = url.replace("aiosqlite:///", "aiosqlite:///file:") + "?mode=ro&uri=true"
    elif make.get_backend_name() == "postgresql":
        await execute(
            url,
            "CREATE ROLE reader LOGIN",
            "GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader",
        )
        read_only = make.set(username="reader").render_as_string()
    else:
        grant = f"GRANT SELECT ON {make.database}.* TO reader"
        await execute(url, "CREATE OR REPLACE USER reader", grant)
        read_only = make.set(username="reader").render_as_string()
    try:
        async with SQLStore(read_only) as store:
            assert await store.get_latest("u-1") is not None
            with pytest.raises(UnavailableError):
                await store.upsert_latest(StateSnapshot("u-1"))
    finally:
        if make.get_backend_name() == "postgresql":
            await execute(url, "DROP OWNED BY reader", "DROP ROLE reader")


async def test_tables_that_were_lost_are_made_again(url: str, family: str) -> None:
    """The version alone does not make them complete; states that went along are not invented."""
    async with SQLStore(url) as store:
        await store.upsert_latest(StateSnapshot("u-1"))
    await execute(
        url,
        "DROP TABLE layered_store_history",
        "DELETE FROM layered_store_latest_counter WHERE id = 2",
    )
    async with SQLStore(url) as store:
        if family == "sqlite":  # its history holds the latest states too
            with pytest.raises(CorruptDataError):
                await store.get_latest("u-1")
        else:
            assert await store.get_latest("u-1") is not None
        await store.upsert_latest(StateSnapshot("u-1"))
        assert await store.get_latest("u-1") is not None
        assert len(await store.get_history("u-1", 5)) == 1
    assert await version_of(url) == [(versions.SCHEMA_VERSION,)]


async def test_the_alembic_recipe_works_on_every_database(url: str, tmp_path: Path) -> None:
    """The page's own code creates the tables, finds no difference afterwards, and they work."""
    runner, page = ROOT / "tests" / "docs" / "run_page.py", ROOT / "docs" / "migrations.md"
    path = f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, runner, page, "{}"],
        cwd=tmp_path,
        env={**os.environ, "DATABASE_URL": url, "PYTHONPATH": str(ROOT), "PATH": path},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    assert await version_of(url) == [(versions.SCHEMA_VERSION,)]
    async with SQLStore(url) as store:
        assert await store.get_latest("u-1") is not None
