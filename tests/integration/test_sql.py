"""SQLStore's own behaviour: failures, time limits, cancellation, event loops, options."""

from __future__ import annotations

import asyncio
import gc
import os
import sqlite3
import subprocess
import sys
import threading
import traceback
import uuid
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from loops import AskedLoop
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from layered_store.clock import SYSTEM_CLOCK
from layered_store.errors import (
    ClosedError,
    ConfigError,
    StoreError,
    StoreTimeoutError,
    UnavailableError,
)
from layered_store.health import HealthStatus
from layered_store.snapshot import StateSnapshot
from layered_store.stack import describe
from layered_store.stores.sql import SQLStore
from layered_store.stores.sql.engines import _open_asyncpg
from layered_store.stores.sql.session import Session

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

PASSWORD = "zebra-pa55"  # noqa: S105


@pytest.fixture(params=["sqlite", "postgres", "mysql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path}/states.db"
    return str(request.getfixturevalue(f"{request.param}_url"))


def tables() -> dict[str, str]:
    tag = uuid.uuid4().hex[:12]
    return {"latest_table": f"latest_{tag}", "history_table": f"history_{tag}"}


def state(user_id: str = "u", value: float = 0.5) -> StateSnapshot:
    return StateSnapshot(user_id, axes={"a": value})


@asynccontextmanager
async def server(answer: Callable[[Any, Any], Any]) -> AsyncIterator[int]:
    """Run something on a port that is no database."""
    writers = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await answer(reader, writer)

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield listening.sockets[0].getsockname()[1]
    finally:
        listening.close()
        for writer in writers:
            writer.transport.abort()


def text_of(error: BaseException) -> str:
    """Return all that a log would show of an error, causes included."""
    return "".join(traceback.format_exception(error)) + repr(error)


DRIVERS = ["postgresql+asyncpg", "mysql+aiomysql"]


@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_refused_connection_is_unavailable(driver: str) -> None:
    """Nobody listens: retryable, no password shown, health says unhealthy with the reason."""
    async with server(lambda _r, _w: asyncio.sleep(0)) as port:
        pass
    store = SQLStore(f"{driver}://me:{PASSWORD}@127.0.0.1:{port}/db", timeout=3)
    with pytest.raises(UnavailableError) as caught:
        await store.upsert_latest(state())
    assert caught.value.retryable
    assert not caught.value.outcome_unknown
    assert PASSWORD not in text_of(caught.value)
    report = await store.health_report()
    assert report.status is HealthStatus.UNHEALTHY
    assert report.message
    assert PASSWORD not in report.to_json() + repr(store) + repr(describe(store))
    assert await store.health_check() is False
    await store.aclose()


@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_server_that_hangs_costs_the_time_limit(driver: str) -> None:
    """A server that accepts and is silent gives StoreTimeoutError in time, and no more tasks."""
    async with server(lambda _r, _w: asyncio.sleep(30)) as port:
        store = SQLStore(
            f"{driver}://me:{PASSWORD}@127.0.0.1:{port}/db", timeout=0.3, probe_seconds=0.2
        )
        begun = SYSTEM_CLOCK.monotonic()
        with pytest.raises(StoreTimeoutError) as caught:
            await store.get_latest("u")
        assert await store.health_check() is False
        assert SYSTEM_CLOCK.monotonic() - begun < 1.5
        assert caught.value.retryable
        await store.aclose()
        assert not store._access.homes


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("reply", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x00" * 64])
async def test_protocol_garbage_is_unavailable(driver: str, reply: bytes) -> None:
    """A server of another kind, or one that hangs up, raises none of the driver's own errors."""

    async def answer(_reader: Any, writer: asyncio.StreamWriter) -> None:
        writer.write(reply)
        writer.close()

    async with server(answer) as port:
        store = SQLStore(f"{driver}://me:{PASSWORD}@127.0.0.1:{port}/db", timeout=2)
        with pytest.raises(UnavailableError) as caught:
            await store.get_latest("u")
        assert PASSWORD not in text_of(caught.value)
        await store.aclose()


async def test_a_wrong_password_is_not_worth_repeating(mysql_url: str) -> None:
    """The login is refused: not retryable, and no password is shown."""
    wrong = make_url(mysql_url).set(username="nobody", password=PASSWORD)
    store = SQLStore(wrong.render_as_string(hide_password=False))
    with pytest.raises(UnavailableError) as caught:
        await store.get_latest("u")
    assert not caught.value.retryable
    assert PASSWORD not in text_of(caught.value)
    await store.aclose()


async def test_a_missing_table_names_the_remedy(url: str) -> None:
    """With ``create_tables=False`` nothing is created and the error says what to do."""
    store = SQLStore(url, create_tables=False, **tables())
    for call in (store.open(), store.get_latest("u"), store.upsert_latest(state())):
        with pytest.raises(StoreError, match="create_tables") as caught:
            await call
        assert not caught.value.retryable
    await store.aclose()


async def test_a_missing_database_is_not_worth_repeating(url: str) -> None:
    """The server answers, the database is not there."""
    parsed = make_url(url)
    name = "/no/such/dir/x.db" if url.startswith("sqlite") else "no_such_database"
    store = SQLStore(parsed.set(database=name).render_as_string(hide_password=False))
    with pytest.raises(UnavailableError) as caught:
        await store.get_latest("u")
    assert not caught.value.retryable
    await store.aclose()


async def test_a_read_only_file_reads_and_does_not_write(tmp_path: Path) -> None:
    """Reads go on, a write is refused with the reason."""
    path = tmp_path / "states.db"
    async with SQLStore(f"sqlite+aiosqlite:///{path}") as store:
        await store.upsert_latest(state())
    reader = SQLStore(f"sqlite+aiosqlite:///file:{path}?mode=ro&uri=true", create_tables=False)
    assert await reader.get_latest("u") is not None
    with pytest.raises(UnavailableError, match="read-only"):
        await reader.upsert_latest(state())
    await reader.aclose()


async def test_a_full_disk_is_unavailable_and_heals(tmp_path: Path) -> None:
    """A write that finds no room fails, the store goes on, and repeating the call is safe."""
    async with SQLStore(f"sqlite+aiosqlite:///{tmp_path}/s.db", pool_size=1) as store:
        await store.upsert_latest(state("u", 0.1))

        async def limit(session: Session, pages: int) -> None:
            await session.command(f"PRAGMA max_page_count={pages}")

        await store._access.run("test", lambda session: limit(session, 1))
        batch = [state(f"user-{n}") for n in range(400)]
        with pytest.raises(UnavailableError, match="room") as caught:
            await store.upsert_latest_many(batch)
        assert caught.value.operation == "upsert_latest_many"
        await store._access.run("test", lambda session: limit(session, 1_000_000))
        assert await store.get_latest("user-399") is None
        await store.upsert_latest_many(batch)
        assert len(await store.get_latest_many(s.user_id for s in batch)) == 400
        await store.upsert_latest(state("u", 0.2))
        assert len(await store.get_history("u", 5)) == 2


async def test_a_file_that_is_no_database_says_so(tmp_path: Path) -> None:
    """Not retryable, and never overwritten."""
    path = tmp_path / "states.db"
    path.write_bytes(b"not a database, but long enough to look at" * 50)
    store = SQLStore(f"sqlite+aiosqlite:///{path}")
    with pytest.raises(UnavailableError, match="no SQLite") as caught:
        await store.upsert_latest(state())
    assert not caught.value.retryable
    await store.aclose()
    assert path.read_bytes().startswith(b"not a database")


async def test_a_locked_file_is_retryable(tmp_path: Path) -> None:
    """Another program holds the write lock: reads go on, and the write gives up while it can still
    be told that it never began.
    """
    path = tmp_path / "states.db"
    store = SQLStore(f"sqlite+aiosqlite:///{path}", timeout=2.0)
    await store.upsert_latest(state("u", 0.1))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(UnavailableError) as caught:
        await store.upsert_latest(state("u", 0.2))
    assert caught.value.retryable and not caught.value.outcome_unknown
    with pytest.raises(UnavailableError) as caught:
        await store.delete("u")
    assert caught.value.retryable and not caught.value.outcome_unknown
    assert (await store.get_latest("u")).get_axis("a") == 0.1  # type: ignore[union-attr]
    asyncio.get_running_loop().call_later(0.1, other.execute, "ROLLBACK")
    await store.upsert_latest(state("u", 0.3))
    assert (await store.get_latest("u")).get_axis("a") == 0.3  # type: ignore[union-attr]
    other.close()
    await store.aclose()


@pytest.mark.parametrize(
    "options",
    [
        "timeout=3",
        "sslmode=prefer&command_timeout=3",
        "statement_cache_size=0&prepared_statement_cache_size=0",
        "max_cached_statement_lifetime=0&max_cacheable_statement_size=0",
        "direct_tls=false",
    ],
)
async def test_options_in_a_url_are_asyncpgs(postgres_url: str, options: str) -> None:
    """It takes numbers and truth values only as such, and a URL has text."""
    async with SQLStore(f"{postgres_url}?{options}") as store:
        await store.upsert_latest(StateSnapshot("u-1"))
        assert await store.get_latest("u-1") is not None


@pytest.mark.parametrize("options", ["prepare_threshold=0", "prepare_threshold=none"])
async def test_options_in_a_url_are_psycopgs(postgres_url: str, options: str) -> None:
    """As asyncpg's."""
    url = postgres_url.replace("asyncpg", "psycopg")
    async with SQLStore(f"{url}?{options}&sslmode=prefer") as store:
        await store.upsert_latest(StateSnapshot("u-1"))
        assert await store.get_latest("u-1") is not None


async def test_a_killed_connection_costs_one_retryable_error(postgres_url: str) -> None:
    """After a restart of the server each pooled connection fails at most once."""
    store = SQLStore(postgres_url, pool_size=1, **tables())
    await store.upsert_latest(state())
    admin = create_async_engine(postgres_url, isolation_level="AUTOCOMMIT")
    async with admin.connect() as connection:
        await connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE pid <> pg_backend_pid() AND query LIKE"
            f" '%{store.latest_table}%'"
        )
    await admin.dispose()
    errors = []
    for _ in range(3):
        try:
            assert await store.get_latest("u") is not None
        except UnavailableError as exc:
            errors.append(exc)
    assert len(errors) <= 1
    assert all(error.retryable for error in errors)
    assert await store.get_latest("u") is not None
    await store.aclose()


async def test_a_commit_that_was_cut_off_is_unknown(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error at the commit says that the outcome is unknown; one before it does not."""
    store = SQLStore(url, **tables())
    await store.upsert_latest(state())

    async def cut(self: Session) -> None:
        self.committing = True
        raise ConnectionResetError

    async def early(self: Session) -> None:
        raise ConnectionResetError

    for commit, unknown in ((cut, True), (early, False)):
        monkeypatch.setattr(Session, "commit", commit)
        with pytest.raises(UnavailableError) as caught:
            await store.delete("u")
        assert caught.value.outcome_unknown is unknown
        assert caught.value.operation == "delete"
    monkeypatch.undo()
    await store.upsert_latest(state())
    assert len(await store.get_history("u", 5)) == 2
    await store.aclose()


async def test_a_statement_that_commits_by_itself_is_unknown_once_sent(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that is one statement: unknown when the connection went, not when it was refused."""
    store = SQLStore(postgres_url, **tables())
    await store.upsert_latest(state())

    async def gone(*_: object) -> None:
        raise ConnectionResetError

    monkeypatch.setattr("layered_store.stores.sql.postgres.write_rows", gone)
    calls = [store.upsert_latest(state(f"u{n}")) for n in range(3)]
    for error in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(error, UnavailableError)
        assert error.outcome_unknown
    monkeypatch.undo()
    table = store.history_table
    await store._access.run("test", lambda session: session.command(f"DROP TABLE {table}"))
    with pytest.raises(StoreError, match="create_tables") as caught:
        await store.upsert_latest(state())
    assert not caught.value.outcome_unknown
    await store.aclose()


async def test_a_commit_that_sqlite_refuses_is_unknown_and_rolled_back(tmp_path: Path) -> None:
    """The connection is used again afterwards, with no transaction left open on it."""
    store = SQLStore(f"sqlite+aiosqlite:///{tmp_path}/s.db", pool_size=1)
    await store.upsert_latest(state("u", 0.1))

    async def forbid(session: Session) -> None:
        def allowed(action: int, what: str | None, *_: object) -> int:
            denied = action == sqlite3.SQLITE_TRANSACTION and what == "COMMIT"
            return sqlite3.SQLITE_DENY if denied else sqlite3.SQLITE_OK

        session.connection.set_authorizer(allowed)

    await store._access.run("test", forbid)
    with pytest.raises(StoreError) as caught:
        await store.upsert_latest(state("u", 0.2))
    assert caught.value.outcome_unknown
    found = await store.get_latest("u")
    assert found is not None
    assert found.get_axis("a") == 0.1
    await store.aclose()


async def test_cancelled_calls_leave_nothing_behind(url: str) -> None:
    """Calls cancelled at any moment give their connections back and block nobody."""
    store = SQLStore(url, pool_size=4, **tables())
    await store.upsert_latest(state())
    for turns in range(40):
        calls = [
            asyncio.create_task(store.upsert_latest(state(f"u{n % 3}", 0.1))) for n in range(4)
        ] + [asyncio.create_task(store.get_latest("u"))]
        for _ in range(turns):
            await asyncio.sleep(0)
        for call in calls:
            call.cancel()
        for result in await asyncio.gather(*calls, return_exceptions=True):
            assert result is None or isinstance(result, asyncio.CancelledError | StateSnapshot), (
                result
            )
    (home,) = store._access.homes.values()
    await home.reads.drain()
    await home.writes.drain()
    assert home.desks.busy == 0
    for user_id in ("u", "u0", "u1", "u2"):
        await store.upsert_latest(state(user_id, 0.9))
        assert (await store.get_latest(user_id)).get_axis("a") == 0.9  # type: ignore[union-attr]
    await store.aclose()


async def test_a_cancelled_batch_is_cancelled(url: str) -> None:
    """At any moment, and none of its callers takes a part of the answer for the whole."""
    async with SQLStore(url, **tables()) as store:
        await store.upsert_latest(state())
        for turns in range(20):
            calls = [
                asyncio.create_task(store.get_latest_many(["u", "v"])),
                asyncio.create_task(store.upsert_latest_many([state("w"), state("x")])),
            ]
            for _ in range(turns):
                await asyncio.sleep(0)
            ended = [call.done() for call in calls]
            for call in calls:
                call.cancel()
            await asyncio.wait(calls)
            assert [call.cancelled() for call in calls] == [not early for early in ended]


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_statement_that_nobody_waits_for_is_stopped(driver: str, postgres_url: str) -> None:
    """Whichever call it is of: it would keep its connection until the time limit."""
    store = SQLStore(postgres_url.replace("asyncpg", driver), timeout=60)
    await store.upsert_latest(state())
    waiting = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    holder = create_async_engine(postgres_url)
    admin = create_async_engine(postgres_url, isolation_level="AUTOCOMMIT")
    async with holder.connect() as lock, admin.connect() as watch, asyncio.timeout(20):
        await lock.exec_driver_sql(f"LOCK TABLE {store.latest_table}, {store.history_table}")
        for call in (
            store.get_latest("u"),
            store.read("u"),
            store.get_latest_many(["u", "v"]),
            store.get_history("u", 1),
            store.upsert_latest(state()),
            store.upsert_latest_many([state("v"), state("w")]),
            store.delete("u"),
        ):
            task = asyncio.create_task(call)
            while not (await watch.exec_driver_sql(waiting)).scalar():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.wait([task])
            while (await watch.exec_driver_sql(waiting)).scalar():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await lock.rollback()
    await holder.dispose()
    await admin.dispose()
    await store.aclose()


async def test_a_cancelled_call_keeps_the_database_in_memory() -> None:
    """It has one connection, and throwing that away would throw the states away."""
    async with SQLStore("sqlite://") as store:
        await store.upsert_latest(state())
        for turns in range(30):
            call = asyncio.create_task(store.upsert_latest(state("v")))
            for _ in range(turns):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
        assert await store.get_latest("u") is not None


def test_a_store_works_in_one_event_loop_after_another(url: str) -> None:
    """Each loop has connections of its own."""
    store = SQLStore(url, **tables())
    asyncio.run(store.upsert_latest(state("u", 0.1)))
    found = asyncio.run(store.get_latest("u"))
    assert found is not None
    asyncio.run(store.aclose())


def test_an_engine_stays_in_its_event_loop(tmp_path: Path) -> None:
    """A store on a given engine, or in memory, says what to do in a second loop."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/s.db")
    for store, remedy in ((SQLStore(engine=engine), "url="), (SQLStore("sqlite://"), "file")):
        asyncio.run(store.upsert_latest(state()))
        for call in (
            lambda store: store.get_latest("u"),
            lambda store: store.upsert_latest(state()),
            lambda store: store.delete("u"),
            lambda store: store.get_history("u", 1),
            lambda store: store.get_latest_many(["u"]),
            lambda store: store.upsert_latest_many([state()]),
        ):
            coroutine = call(store)
            with pytest.raises(ClosedError, match=remedy) as caught:
                asyncio.run(coroutine)
            assert caught.value.operation == coroutine.__name__
            assert caught.value.layer == "SQLStore"


async def test_a_given_engine_stays_open(url: str) -> None:
    """It is the caller's: the store works on it and does not dispose of it."""
    engine = create_async_engine(url)
    names = tables()
    store = SQLStore(engine=engine, **names)
    await store.upsert_latest(state())
    await store.delete("u")
    await store.upsert_latest(state("u", 0.3))
    await store.aclose()
    async with engine.connect() as connection:
        # The erasure left an entry that shows nothing, by which a repeat of it is known.
        found = await connection.exec_driver_sql(
            f"SELECT count(*) FROM {names['history_table']} WHERE payload IS NOT NULL"
        )
        assert found.scalar() == 1
    await engine.dispose()


def test_a_process_ends_without_closing(url: str) -> None:
    """It exits at once, with no warning on its error output, in development mode too."""
    program = (
        "import asyncio, sys\n"
        "from layered_store.snapshot import StateSnapshot\n"
        "from layered_store.stores.sql import SQLStore\n"
        "names = dict(latest_table=sys.argv[2], history_table=sys.argv[3])\n"
        "store = SQLStore(sys.argv[1], **names)\n"
        "asyncio.run(store.upsert_latest(StateSnapshot('u')))\n"
    )
    names = tables().values()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, url, *names],
        capture_output=True,
        timeout=20,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_importing_the_store_imports_no_database_library() -> None:
    """SQLAlchemy is imported when a store is built."""
    program = (
        "import sys, layered_store.stores.sql\n"
        "assert not {'sqlalchemy', 'aiosqlite', 'asyncpg', 'aiomysql'} & sys.modules.keys()\n"
    )
    subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"url": None}, "url"),
        ({"url": "no url"}, "url"),
        ({"url": 5}, "url"),
        ({"url": f"oracle://me:{PASSWORD}@h/d"}, "url"),
        ({"url": f"postgresql+psycopg2://me:{PASSWORD}@h/d"}, "url"),
        ({"url": f"postgresql://me:{PASSWORD}@h:port/d"}, "url"),
        ({"engine": object()}, "url"),
        ({"url": None, "engine": object()}, "engine"),
        ({"history_limit": -1}, "history_limit"),
        ({"history_limit": True}, "history_limit"),
        ({"history_max_age": 0}, "history_max_age"),
        ({"order": "newest"}, "order"),
        ({"latest_table": "x; drop table y"}, "latest_table"),
        ({"history_table": ""}, "history_table"),
        ({"latest_table": "same", "history_table": "Same"}, "history_table"),
        ({"create_tables": 1}, "create_tables"),
        ({"snapshot_type": dict}, "snapshot_type"),
        ({"digest_key": b"k" * 65}, "digest_key"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": None}, "timeout"),
        ({"probe_seconds": -1}, "probe_seconds"),
        ({"pool_size": 0}, "pool_size"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], option: str) -> None:
    """The error names the option and shows no password."""
    with pytest.raises(ConfigError) as caught:
        SQLStore(**{"url": "sqlite://", **options})
    assert caught.value.option == option
    assert PASSWORD not in text_of(caught.value)


class Mood(StateSnapshot):
    """A snapshot with one more field."""

    mood: str = ""


async def test_a_subclass_comes_back_whole(url: str) -> None:
    """With ``snapshot_type`` the fields of the application are stored too."""
    async with SQLStore(url, snapshot_type=Mood, **tables()) as store:
        await store.upsert_latest(Mood("u", mood="calm"))
        assert await store.get_latest("u") == (await store.get_history("u", 1))[0]
        assert (await store.get_latest("u")).mood == "calm"  # type: ignore[union-attr]


async def test_digests_depend_on_the_key(tmp_path: Path) -> None:
    """A store with another key finds nothing of the first one's, and overwrites nothing."""
    url = f"sqlite+aiosqlite:///{tmp_path}/s.db"
    async with SQLStore(url, digest_key=b"one") as one, SQLStore(url, digest_key=b"two") as two:
        await one.upsert_latest(state())
        assert await two.get_latest("u") is None
        assert "one" not in repr(one)


async def test_histories_that_share_a_round_trip(url: str) -> None:
    """Concurrent histories are each as long as asked for, and those of one user agree."""
    async with SQLStore(url, history_limit=5, **tables()) as store:
        for value in range(8):
            await store.upsert_latest_many(state(f"u-{n}", value / 10) for n in range(30))
        asked = [(f"u-{n}", limit) for n in range(32) for limit in (0, 1, 3, 5, 99)]
        found = await asyncio.gather(*(store.get_history(user, limit) for user, limit in asked))
        for (user, limit), states in zip(asked, found, strict=True):
            kept = [0.7, 0.6, 0.5, 0.4, 0.3][:limit] if int(user[2:]) < 30 else []
            assert [(each.user_id, each.axes["a"]) for each in states] == [
                (user, value) for value in kept
            ]
        await store.delete("u-3")
        three, four = await asyncio.gather(store.get_history("u-3", 9), store.get_history("u-4", 9))
        assert (len(three), len(four)) == (0, 5)


async def test_a_call_cancelled_while_its_connection_opens_leaves_no_message(
    postgres_url: str,
) -> None:
    """asyncpg, cancelled in the turn in which TCP connects, leaves a future whose error asyncio
    would report to the log."""
    said: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: said.append(context))
    try:
        for turns in range(25):
            store = SQLStore(postgres_url, **tables(), create_tables=False)
            call = asyncio.create_task(store.get_latest("u-1"))
            for _ in range(turns):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.wait((call,))
            await store.aclose()
            gc.collect()
    finally:
        loop.set_exception_handler(None)
    assert said == []


async def test_a_connection_that_opens_is_given_up_though_it_is_cancelled_twice() -> None:
    """As when the store is closed just after its caller left; a server may take long to answer."""
    before = asyncio.all_tasks()
    lines: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda _, line: lines.append(line), "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    try:
        opening = asyncio.create_task(_open_asyncpg(host=host, port=port, user="u", ssl=False))
        while not lines:  # noqa: ASYNC110  nothing else is to run meanwhile
            await asyncio.sleep(0)
        opening.cancel()
        await asyncio.sleep(0)
        opening.cancel()
        await asyncio.wait((opening,))
        assert opening.cancelled()
        left = asyncio.all_tasks() - before
        _, going_on = await asyncio.wait(left, timeout=1.0) if left else (left, left)
        assert not going_on
    finally:
        server.close()
        for line in lines:
            line.close()


@pytest.mark.parametrize("longest", [1e7, 1e308])
async def test_a_time_limit_or_age_of_any_length_is_taken(url: str, longest: float) -> None:
    """Servers and drivers take some weeks at most in their settings."""
    async with SQLStore(url, timeout=longest, history_max_age=longest, **tables()) as store:
        await store.upsert_latest(state())
        assert len(await store.get_history("u", 5)) == 1


def test_threads_may_begin_at_the_same_time(tmp_path: Path) -> None:
    """Event loops of two threads come while those of the past are forgotten: both are served."""
    store = SQLStore(f"sqlite+aiosqlite:///{tmp_path}/states.db")

    def use() -> None:
        asyncio.run(store.upsert_latest(state()))

    threads: list[threading.Thread] = []

    def meanwhile() -> None:
        if not threads:
            threads.append(threading.Thread(target=use))
            threads[0].start()
            threads[0].join(0.2)  # it cannot end before, when one waits for the other

    use()
    ((_, home),) = store._access.homes.items()
    store._access.homes = {AskedLoop(meanwhile): home, AskedLoop(meanwhile): home}
    use()
    threads[0].join()
    asyncio.run(store.aclose())


async def test_a_close_whose_caller_is_cancelled_goes_on(url: str) -> None:
    """The caller leaves at once; who closes again waits until the connections are gone."""
    store = SQLStore(url, **tables())
    await store.upsert_latest(state())
    ((_, home),) = store._access.homes.items()
    pool = home.engine.sync_engine.pool
    write = asyncio.create_task(store.upsert_latest(state()))
    await asyncio.sleep(0)
    closing = asyncio.create_task(store.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    await store.aclose()
    assert write.done()
    await write
    assert not home.desks._idle
    assert home.engine.sync_engine.pool is not pool  # which was disposed of


def test_closed_from_another_event_loop(url: str) -> None:
    """The loop that has the connections closes them itself, as soon as it runs."""
    store = SQLStore(url, **tables())
    loop = asyncio.new_event_loop()
    loop.run_until_complete(store.upsert_latest(state()))
    ((_, home),) = store._access.homes.items()
    pool = home.engine.sync_engine.pool
    asyncio.run(store.aclose())
    assert home.desks._idle
    loop.run_until_complete(store.aclose())
    assert not home.desks._idle
    assert home.engine.sync_engine.pool is not pool  # which was disposed of
    loop.close()


FORKED = """
import os, sqlite3, sys, threading
from layered_store import ClosedError, SQLStore, StateSnapshot, SyncStore
from layered_store.stores.sql import desks

store = SyncStore(lambda: SQLStore("sqlite:///" + sys.argv[1]))
(told, tell), (over, end) = os.pipe(), os.pipe()


def put(user_id):
    store.upsert_latest(StateSnapshot(user_id))


def child(work):
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except ClosedError as exc:
        print(exc)
    finally:
        sys.stdout.flush()
        os.write(tell, b"x")
        os._exit(0)


def writes():
    put("before")
    os.write(tell, b"x")
    os.read(over, 1)
    put("after")
    store.close()


put("parent")
"""
WHILE_IDLE = """
pid = child(writes)
os.read(told, 1)
store.close()
os.write(end, b"x")
os.waitpid(pid, 0)
"""
WHILE_BUSY = """
other = sqlite3.connect(sys.argv[1], isolation_level=None)
other.execute("BEGIN IMMEDIATE")
busy = threading.Thread(target=put, args=("busy",))
busy.start()
while not any(each.busy for each in desks._alive):
    pass
pid = child(lambda: put("child"))
os.waitpid(pid, 0)
other.execute("ROLLBACK")
busy.join()
store.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize(
    ("script", "said", "kept"),
    [
        (WHILE_IDLE, "", ["after", "before", "parent"]),
        (WHILE_BUSY, "fork between calls", ["busy", "parent"]),
    ],
    ids=["while it is idle", "in the midst of a call"],
)
def test_forked_children_write_the_same_file(
    tmp_path: Path, script: str, said: str, kept: list[str]
) -> None:
    """What a child wrote stands when the parent closed the file meanwhile; or the child is told."""
    path = tmp_path / "states.db"
    done = subprocess.run(  # noqa: S603
        [
            *(sys.executable, "-W", "ignore::DeprecationWarning"),  # of forks beside threads
            *("-c", FORKED + script, str(path)),
        ],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert said in done.stdout
    assert bool(said) == bool(done.stdout)
    assert not done.stderr
    with sqlite3.connect(path) as file:
        found = file.execute("SELECT user_id FROM layered_store_latest ORDER BY user_id")
        assert [user_id for (user_id,) in found] == kept
