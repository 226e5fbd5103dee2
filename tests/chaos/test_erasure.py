"""Erasure on real servers: final, honest when it cannot be, and leaving nothing to be found."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from servers import Server, start_postgres, start_redis

from layered_store import (
    Cached,
    ErasureIncompleteError,
    Metrics,
    SQLStore,
    StateSnapshot,
    StateStore,
    StoreError,
    UnavailableError,
)
from layered_store.call import call_begins

from .proxy import Mode
from .stacks import (
    TRUST_SECONDS,
    build,
    leased,
    number,
    proxied,
    redis_url,
    serving,
    started,
    state,
    until,
)

ROOT = Path(__file__).parent.parent.parent
MARK = 0.123456789012345
"""An axis value that is found wherever it is kept."""
MARKED_USER = "zebra-7f3a-quagga"
MARKED_AXIS = "xylophone_axis"


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(start_redis) as own:
        yield own


@pytest.fixture
def sql(tmp_path: Path) -> str:
    return f"sqlite+aiosqlite:///{tmp_path}/states.db"


async def nowhere(*stores: StateStore, user: str = "u", seconds: float = 2.0) -> None:
    """For a while, nobody shows a user in any way."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for store in stores:
            assert await number(store, user) is None
            assert await store.get_latest_many([user]) == {}
            assert await store.get_history(user, 9) == []
        await asyncio.sleep(0.01)


async def test_case_8_redis_is_down(server: Server, sql: str) -> None:
    """The error names the tier; SQL has it erased at once; Redis comes back with the old copy and
    shows it to nobody; the debt is paid without anybody's doing, and a repeat succeeds.
    """
    async with build(redis_url(server.port), sql) as one, build(redis_url(server.port), sql) as two:
        await one.upsert_latest(state("u", 1))
        await leased(two, "u")
        with redis.Redis(port=server.port, protocol=2) as client:
            client.save()
        server.kill()
        with pytest.raises(ErasureIncompleteError) as caught:
            await one.delete("u")
        assert caught.value.pending == ("RedisStore",)
        assert caught.value.user_id == "u" and "'u'" not in str(caught.value)
        origin = SQLStore(sql)
        assert await origin.get_latest("u") is None
        assert await origin.debts("u") == ("RedisStore",)
        await asyncio.sleep(1.1)  # no promise was made, yet leases have run out
        await nowhere(one, two, seconds=0.5)
        server.start()
        await nowhere(one, two, seconds=3.0)

        async def paid() -> bool:
            return await origin.debts("u") == ()

        await until(paid, "the debt to be paid")
        await one.delete("u")
        await one.upsert_latest(state("u", 2))
        assert await number(one, "u") == 2
        await origin.aclose()


async def test_case_8_only_the_deleter_is_cut_off_from_redis(server: Server, sql: str) -> None:
    """It is told so; for the others the user is gone within the bound all the same."""
    async with (
        proxied(server.port) as way, build(redis_url(way.port), sql) as cut,
        build(redis_url(server.port), sql) as other,
    ):
        await cut.upsert_latest(state("u", 1))
        await leased(other, "u")
        await way.set(Mode.SWALLOW)
        with pytest.raises(ErasureIncompleteError):
            await cut.delete("u")

        async def gone() -> bool:
            return await number(other, "u") is None

        assert await until(gone, "the erasure at the other") < TRUST_SECONDS
        await nowhere(cut, other, seconds=1.0)


async def test_sql_is_down() -> None:
    """Nothing is promised and nothing is taken away: the user is there, and a repeat erases it."""
    database: Server = started(start_postgres)
    try:
        with serving(start_redis) as server:
            async with proxied(database.port) as way:
                url = f"postgresql+asyncpg://tester@127.0.0.1:{way.port}/postgres"
                async with build(redis_url(server.port), url) as one:
                    await one.upsert_latest(state("u", 1))
                    await leased(one, "u")
                    await way.set(Mode.REFUSE)
                    with pytest.raises(UnavailableError) as caught:
                        await one.delete("u")
                    assert not isinstance(caught.value, ErasureIncompleteError)
                    await way.set(Mode.PASS)

                    async def erased() -> bool:
                        with contextlib.suppress(UnavailableError):
                            await one.delete("u")
                            return True
                        return False

                    await until(erased, "a repeat that succeeds")
                    await nowhere(one, seconds=0.5)
    finally:
        database.close()


_KILLED = """
import asyncio, os, signal, sys
from layered_store import *
from layered_store.coherence.redis_tier import RedisTier

step, redis, sql = sys.argv[1:]

def die_at(kind, name, when):
    method = getattr(kind, name)
    async def call(self, *args, **kwargs):
        if when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = await method(self, *args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(kind, name, call)

async def main():
    stack = Cached(RedisStore(redis), fallback=SQLStore(sql))
    await stack.get_latest("u")
    await asyncio.sleep(0.5)
    kind, name, when = step.split()
    die_at({"sql": SQLStore, "redis": RedisTier}[kind], name, when)
    await stack.delete("u")

asyncio.run(main())
"""


@pytest.mark.parametrize(
    "step",
    [
        "sql erase before",
        "sql erase after",
        "redis bury before",
        "redis bury after",
        "redis holders before",
        "sql settle before",
        "sql settle after",
    ],
)
async def test_case_14_the_application_is_killed_between_two_steps(
    server: Server, sql: str, step: str
) -> None:
    """Before SQL has it, all is as it was; after it, nobody shows the user any more, with no help;
    a repeat completes it, and nothing is owed.
    """
    async with build(redis_url(server.port), sql) as two, build(redis_url(server.port), sql) as one:
        await one.upsert_latest(state("u", 1))
        await leased(two, "u")
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _KILLED, step, redis_url(server.port), sql,
            cwd=ROOT, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert await child.wait() == -9
        if step == "sql erase before":
            assert await number(one, "u") == 1
        else:

            async def gone() -> bool:
                return await number(one, "u") is None and await number(two, "u") is None

            await until(gone, "an erasure that nobody finished", TRUST_SECONDS + 1.5)
            await nowhere(one, two, seconds=0.5)
        await one.delete("u")
        await nowhere(one, two, seconds=0.5)
        async with SQLStore(sql) as origin:

            async def paid() -> bool:
                return await origin.debts("u") == ()

            await until(paid, "nothing owed")


async def test_repeated_and_concurrent_deletes(server: Server, sql: str) -> None:
    """Ten at a time from two processes, of a user who is there or not: each returns, all agree."""
    async with build(redis_url(server.port), sql) as one, build(redis_url(server.port), sql) as two:
        await one.upsert_latest(state("u", 1))
        await leased(two, "u")
        for _ in range(2):
            await asyncio.gather(*(stack.delete("u") for stack in (one, two) for _ in range(5)))
            await nowhere(one, two, seconds=0.2)


async def test_concurrent_with_upserts(server: Server, sql: str) -> None:
    """Whatever was written before a delete began is gone when it returned; what a process writes
    after it stays.
    """
    async with build(redis_url(server.port), sql) as one, build(redis_url(server.port), sql) as two:
        written = 0
        deadline = time.monotonic() + 6

        async def write() -> None:
            nonlocal written
            while time.monotonic() < deadline:
                written += 1
                await two.upsert_latest(state("u", written))
                await asyncio.sleep(0.003)

        writing = asyncio.create_task(write())
        while time.monotonic() < deadline:
            before = written - 1
            await one.delete("u")
            for stack in (one, two):
                shown = await number(stack, "u")
                assert shown is None or shown > before
            await asyncio.sleep(0.05)
        await writing
        await two.upsert_latest(state("u", 10**6))
        assert await number(two, "u") == 10**6


async def test_case_13_a_late_upsert_that_began_before(server: Server, sql: str) -> None:
    """A write that was held up while its user was erased elsewhere does not bring the user back;
    one that begins afterwards does.
    """

    class Held(SQLStore):
        gate: asyncio.Event

        async def write(self, snapshot: StateSnapshot) -> object:
            await self.gate.wait()
            return await super().write(snapshot)

    from layered_store import RedisStore

    origin = Held(sql)
    origin.gate = asyncio.Event()
    late = Cached(RedisStore(redis_url(server.port)), fallback=origin)
    async with late, build(redis_url(server.port), sql) as other:
        await other.upsert_latest(state("u", 1))
        await leased(other, "u")
        write = asyncio.create_task(late.upsert_latest(state("u", 2)))
        await asyncio.sleep(0.3)
        await other.delete("u")
        origin.gate.set()
        await write
        await nowhere(late, other, seconds=1.0)
        with call_begins():
            await late.upsert_latest(state("u", 3))
        assert await number(late, "u") == 3


def _marked(value: float) -> list[bytes]:
    """Return what is searched: the id, the axis and its value, in the forms they are kept in."""
    import struct

    return [
        MARKED_USER.encode(),
        MARKED_AXIS.encode(),
        repr(value).encode(),
        struct.pack("<d", value),
        struct.pack(">d", value),
    ]


def _find(data: bytes, where: str) -> None:
    for needle in _marked(MARK):
        assert needle not in data, f"{needle!r} in {where}"


@pytest.mark.parametrize("engine", ["sqlite", "postgres", "mysql"])
async def test_case_16_nothing_is_left_to_be_found(
    server: Server,
    sql: str,
    engine: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
) -> None:
    """After the erasure the marked values stand in no key of Redis, not in its dump, in no row of
    the database, in no file of SQLite, in no log, metric, report or error.
    """
    from prometheus_client import CollectorRegistry, generate_latest

    caplog.set_level(logging.DEBUG)
    url = sql if engine == "sqlite" else str(request.getfixturevalue(f"{engine}_url"))
    registry = CollectorRegistry()
    said: list[str] = []
    cached = build(redis_url(server.port), url, negative_ttl=60, stale_if_error=60)
    async with Metrics(cached, name="search", registry=registry) as one:  # noqa: SIM117
        async with build(redis_url(server.port), url) as two:
            for round_ in range(1, 6):
                axes = {MARKED_AXIS: MARK, "other": round_ / 10}
                await one.upsert_latest(StateSnapshot(MARKED_USER, round_, axes=axes))
            await one.upsert_latest(StateSnapshot("stays", 1))
            await leased(two, MARKED_USER)
            assert any(each in _dump(server) for each in _marked(MARK)), "the search finds nothing"
            rows = await _rows(url)
            assert any(each in rows for each in _marked(MARK)), "the search finds nothing"
            server.stop()
            with contextlib.suppress(StoreError):
                await one.delete(MARKED_USER)
            server.cont()
            for _ in range(100):
                try:
                    await one.delete(MARKED_USER)
                    break
                except StoreError as exc:
                    said += [str(exc), repr(exc)]
                    await asyncio.sleep(0.1)
            await nowhere(one, two, user=MARKED_USER, seconds=0.5)
            said += [repr(one), str(one.health_report), str(await one.health_report())]
            said.append(generate_latest(registry).decode())
    _find("\n".join(said).encode(), "what was said")
    _find(caplog.text.encode(), "the log")
    _find(_dump(server), "the dump of Redis")
    with redis.Redis(port=server.port, protocol=2) as client:
        for key in client.keys("*"):
            _find(key, "a key")
    _find(await _rows(url), "a row")
    if engine == "sqlite":
        for path in tmp_path.iterdir():
            if path.is_file():
                _find(path.read_bytes(), path.name)


def _dump(server: Server) -> bytes:
    with redis.Redis(port=server.port, protocol=2) as client:
        # Compressed strings could hide what is searched.
        client.config_set("rdbcompression", "no")
        client.save()
    return (server.folder / "dump.rdb").read_bytes()


async def _rows(url: str) -> bytes:
    """Return all that stands in the tables."""
    from sqlalchemy import text
    from sqlalchemy.ext.asyncio import create_async_engine

    engine = create_async_engine(url)
    found: list[bytes] = []
    async with engine.connect() as connection:
        for table in ("layered_store_latest", "layered_store_history"):
            for row in (await connection.execute(text(f"SELECT * FROM {table}"))).all():
                for value in row:
                    found.append(bytes(value) if isinstance(value, bytes) else str(value).encode())
    await engine.dispose()
    return b"\n".join(found)
