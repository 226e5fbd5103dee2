"""What an outage of a database server leaves behind: connections, roles, time limits."""

from __future__ import annotations

import asyncio
import time
import traceback
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool

from layered_store.errors import StoreError, StoreTimeoutError, UnavailableError
from layered_store.snapshot import StateSnapshot
from layered_store.stores.sql import SQLStore
from tests.chaos.proxy import Mode, Proxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

SERVERS = ["postgresql+asyncpg", "postgresql+psycopg", "mysql+aiomysql"]


@pytest.fixture(params=SERVERS)
def url(request: pytest.FixtureRequest) -> str:
    kind = "mysql" if request.param.startswith("mysql") else "postgres"
    given = make_url(request.getfixturevalue(f"{kind}_url"))
    return given.set(drivername=request.param).render_as_string(hide_password=False)


def state(user_id: str = "u", value: float = 0.5) -> StateSnapshot:
    return StateSnapshot(user_id, axes={"a": value})


async def command(url: str, *texts: str) -> list[Any]:
    """Run commands as somebody else; return the rows of the last one."""
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT")
    rows: list[Any] = []
    async with engine.connect() as connection:
        for text in texts:
            result = await connection.exec_driver_sql(text)
            rows = list(result) if result.returns_rows else []
    await engine.dispose()
    return rows


async def idle(store: SQLStore) -> int:
    """Have several connections idle; return how many."""
    users = [f"u{number}" for number in range(100)]
    await store.upsert_latest_many([state(user_id) for user_id in users])
    await asyncio.gather(*(store.head() for _ in range(8)))
    (home,) = store._access.homes.values()
    return len(home.desks._idle)


@asynccontextmanager
async def proxied(url: str) -> AsyncIterator[tuple[Proxy, str]]:
    """Reach a server through a proxy."""
    address = make_url(url)
    assert address.port is not None
    proxy = Proxy(address.port)
    await proxy.start()
    through = address.set(host="127.0.0.1", port=proxy.port)
    try:
        yield proxy, through.render_as_string(hide_password=False)
    finally:
        await proxy.close()


@pytest.mark.parametrize(
    ("url", "given"),
    [*((url, False) for url in SERVERS), ("postgresql+asyncpg", True)],
    indirect=["url"],
)
async def test_a_restart_costs_one_call_however_many_connections_idled(
    url: str, given: bool
) -> None:
    """Else a retried call meets one dead connection after the other, and the server is there."""
    engine = create_async_engine(url) if given else None
    store = SQLStore(engine=engine) if given else SQLStore(url)
    count = await idle(store)
    if engine is not None:
        assert isinstance(engine.pool, AsyncAdaptedQueuePool)
        count = engine.pool.checkedin()
    assert count > 3
    if url.startswith("mysql"):
        others = (
            "SELECT id FROM information_schema.processlist"
            " WHERE db = database() AND id <> connection_id()"
        )
        await command(url, *(f"KILL {row[0]}" for row in await command(url, others)))
    else:
        await command(
            url,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()",
        )
    for home in store._access.homes.values():
        for desk in home.desks._idle:
            desk.idle_since = time.monotonic()  # so soon that nobody looks
    with pytest.raises(UnavailableError) as caught:
        await store.get_latest("u1")
    assert caught.value.retryable
    for number in range(12):
        assert await store.get_latest(f"u{number}") is not None
    await store.aclose()
    if engine is not None:
        await engine.dispose()


@pytest.mark.parametrize("url", [*SERVERS, "mysql+asyncmy"], indirect=True)
async def test_connections_that_the_server_ended_while_they_idled_cost_no_call(url: str) -> None:
    """As it does after its ``wait_timeout`` or ``idle_session_timeout``, and proxies after theirs:
    calls that are rare, or many at once now and then, would fail each time."""
    async with proxied(url) as (proxy, through):
        store = SQLStore(through)
        assert await idle(store) > 3
        (home,) = store._access.homes.values()

        def hang_up() -> None:
            for writer in list(proxy._open):
                writer.close()

        for end in (proxy.reset, hang_up):
            end()
            for _ in range(5):
                await asyncio.sleep(0)
            for desk in home.desks._idle:
                desk.idle_since = float("-inf")
            reads = (store.get_history(f"u{number}", 1) for number in range(8))
            found = await asyncio.gather(*reads, *(store.head() for _ in range(8)))
            assert all(found)
            assert len(home.desks._idle) > 1
        await store.upsert_latest(state())
        await store.aclose()


async def test_connections_that_a_firewall_forgot_cost_one_time_limit(url: str) -> None:
    """Nothing comes back on any that idled; new ones work."""
    async with proxied(url) as (proxy, through):
        store = SQLStore(through, timeout=0.5)
        assert await idle(store) > 3
        proxy._tainted.update(proxy._open)
        with pytest.raises(StoreTimeoutError):
            await store.get_latest("u1")
        for number in range(12):
            assert await store.get_latest(f"u{number}") is not None
        await store.aclose()


async def test_connections_that_are_never_answered_again_give_their_places_back(url: str) -> None:
    """No end of theirs is ever heard of, and a driver that was cancelled may wait for an answer."""
    async with proxied(url) as (proxy, through):
        store = SQLStore(through, timeout=0.5, pool_size=2)
        await store.upsert_latest(state())
        for _ in range(2):
            await proxy.set(Mode.SWALLOW)
            calls = (store.get_latest("u"), store.upsert_latest(state()), store.head())
            errors = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(error, StoreTimeoutError) for error in errors), errors
            proxy._tainted.clear()  # else they were reset now
            await proxy.set(Mode.PASS)
            begun = time.monotonic()
            while True:
                try:
                    await store.upsert_latest(state())
                    await asyncio.gather(store.get_latest("u"), store.head())
                    break
                except UnavailableError:
                    assert time.monotonic() - begun < 4
        (home,) = store._access.homes.values()
        begun = time.monotonic()
        while home.desks.busy:
            assert time.monotonic() - begun < 8
            await asyncio.sleep(0.01)
        await store.aclose()


async def test_closing_while_the_server_hangs_keeps_its_limit(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It waits for calls under way and for the server once, not for each connection."""
    async with proxied(url) as (proxy, through):
        store = SQLStore(through, timeout=0.5)
        assert await idle(store) > 3
        await proxy.set(Mode.SWALLOW)
        begun = time.monotonic()
        async with asyncio.timeout(10):
            await store.aclose()
        assert time.monotonic() - begun < 2.5
    assert "Exception closing connection" not in caplog.text


@pytest.mark.parametrize("waited", [0.0, 0.6], ids=["in time", "over"])
async def test_closing_in_the_midst_of_calls_that_hang_leaves_no_task(
    url: str, waited: float
) -> None:
    """Neither theirs nor what a driver does to have the server stop; and a write may stand."""
    async with proxied(url) as (proxy, through):
        store = SQLStore(through, timeout=0.5)
        assert await idle(store) > 3
        await proxy.set(Mode.DEAF)
        before = asyncio.all_tasks()
        calls = [
            asyncio.ensure_future(store.get_latest("u1")),
            asyncio.ensure_future(store.get_history("u1", 5)),
            asyncio.ensure_future(store.upsert_latest(state("u2"))),
        ]
        await asyncio.sleep(waited)
        async with asyncio.timeout(5.0):
            await store.aclose()
        errors = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(error, StoreError) for error in errors)
        if url.startswith("postgresql+asyncpg"):  # it writes and commits in one statement
            assert getattr(errors[2], "outcome_unknown", False)
        await asyncio.sleep(0)
        # What the proxy opened meanwhile is no concern of the store's.
        left = asyncio.all_tasks() - before - set(calls) - proxy._tasks
        assert not {task for task in left if "Proxy" not in repr(task)}


async def test_a_server_that_takes_writes_again_is_written_to(postgres_url: str) -> None:
    """After a failover the old connections are those of a replica, for as long as they live."""
    name = make_url(postgres_url).database
    store = SQLStore(postgres_url)
    await store.upsert_latest(state())
    await store.aclose()
    await command(postgres_url, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    store = SQLStore(postgres_url)
    for call in (store.upsert_latest(state()), store.delete("u")):
        with pytest.raises(UnavailableError, match="read-only") as caught:
            await call
        assert caught.value.retryable
        assert not caught.value.outcome_unknown
    assert await store.get_latest("u") is not None
    await command(
        postgres_url,
        "SET default_transaction_read_only = off",
        f"ALTER DATABASE {name} RESET default_transaction_read_only",
    )
    with pytest.raises(UnavailableError, match="read-only"):
        await store.upsert_latest(state())  # over a connection from before
    await store.upsert_latest(state("u", 0.7))
    await store.delete("u")
    await store.aclose()


async def test_a_write_that_the_server_cut_off_did_not_happen(postgres_url: str) -> None:
    """``statement_timeout`` rolls back: the outcome is known."""
    store = SQLStore(postgres_url)
    await store.upsert_latest(state("u", 0.1))
    await store.aclose()
    name = make_url(postgres_url).database
    await command(postgres_url, f"ALTER DATABASE {name} SET statement_timeout = 100")
    store = SQLStore(postgres_url)
    other = create_async_engine(postgres_url)
    async with other.connect() as connection:
        await connection.exec_driver_sql(f"SELECT * FROM {store.latest_table} FOR UPDATE")
        with pytest.raises(StoreTimeoutError) as caught:
            await store.upsert_latest(state("u", 0.2))
        await connection.rollback()
    await other.dispose()
    assert not caught.value.outcome_unknown
    found = await store.get_latest("u")
    assert found is not None
    assert found.get_axis("a") == 0.1
    await store.aclose()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_row_that_somebody_elses_rule_refuses_shows_in_no_log(
    driver: str, postgres_url: str
) -> None:
    """PostgreSQL tells the whole row; repeating such a write is of no use."""
    store = SQLStore(postgres_url.replace("asyncpg", driver))
    await store.upsert_latest(state("marked-user", 0.1))
    rule = f"ALTER TABLE {store.latest_table} ADD CONSTRAINT never CHECK (version < 0) NOT VALID"
    await command(postgres_url, rule)
    for call in (
        store.upsert_latest(state("marked-user", 0.2)),
        store.upsert_latest_many([state("marked-user", 0.3), state("other")]),
    ):
        with pytest.raises(StoreError) as caught:
            await call
        assert not caught.value.retryable
        shown = "".join(traceback.format_exception(caught.value))
        assert "marked-user" not in shown
        assert "Failing row" not in shown
    await store.aclose()


@pytest.mark.parametrize("how", ["deleted", "replaced", "moved"])
async def test_a_file_that_is_no_longer_there_is_told_at_once(how: str, tmp_path: Path) -> None:
    """SQLite would go on with it, and all that it acknowledged would be gone with the process."""
    path, away = tmp_path / "states.db", tmp_path / "away.db"
    store = SQLStore(f"sqlite+aiosqlite:///{path}")
    await store.upsert_latest(state("u", 0.1))
    assert await store.health_check()
    if how == "replaced":
        other = SQLStore(f"sqlite+aiosqlite:///{tmp_path}/other.db")
        await other.upsert_latest(state("v", 0.9))
        await other.aclose()
        for name in ("states.db-wal", "states.db-shm"):
            (tmp_path / name).unlink()
        (tmp_path / "other.db").replace(path)
    elif how == "moved":
        path.rename(away)
    else:
        path.unlink()
    calls = [
        store.upsert_latest(state("u", 0.2)),
        store.upsert_latest_many([state("u", 0.2), state("w")]),
        store.delete("u"),
        store.get_latest("u"),
        store.get_latest_many(["u", "v"]),
        store.get_history("u", 5),
    ]
    for call in calls:
        with pytest.raises(UnavailableError, match="moved, replaced or deleted") as caught:
            await call
        assert not caught.value.retryable
        assert not caught.value.outcome_unknown
    assert not await store.health_check()
    if how == "moved":
        away.rename(path)
        found = await store.get_latest("u")
        assert found is not None
        assert found.get_axis("a") == 0.1
        await store.upsert_latest(state("u", 0.3))
    await store.aclose()
    if how == "replaced":
        anew = SQLStore(f"sqlite+aiosqlite:///{path}")
        assert await anew.get_latest("v") is not None
        await anew.aclose()
