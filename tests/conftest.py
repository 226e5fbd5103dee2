"""Fixtures shared by all tests: real servers and fresh databases on them."""

from __future__ import annotations

import asyncio
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

from servers import (
    Server,
    ServerMissingError,
    start_mysql,
    start_postgres,
    start_prometheus,
    start_redis,
)

# A busy machine is no failure; and nothing is kept from one run to the next.
settings.register_profile("layered_store", deadline=None, database=None)
settings.load_profile("layered_store")


def _start(start: Callable[[], Server]) -> Server:
    try:
        return start()
    except ServerMissingError as exc:
        if os.environ.get("LAYERED_STORE_REQUIRE_SERVERS") == "1":
            pytest.fail(str(exc), pytrace=False)
        pytest.skip(str(exc))


@pytest.fixture(scope="session")
def redis_session_url() -> Iterator[str]:
    """A Redis that lasts for all tests."""
    given = os.environ.get("LAYERED_STORE_TEST_REDIS_URL")
    if given:
        yield given
        return
    server = _start(start_redis)
    yield f"redis://127.0.0.1:{server.port}/0"
    server.close()


@pytest.fixture
def redis_url(redis_session_url: str) -> str:
    """An empty Redis database."""
    import redis

    with redis.Redis.from_url(redis_session_url) as client:
        client.flushdb()
    return redis_session_url


@pytest.fixture
def redis_server() -> Iterator[Callable[..., Server]]:
    """Start Redis servers of one's own, to kill and freeze."""
    servers: list[Server] = []

    def start(*options: str) -> Server:
        servers.append(_start(lambda: start_redis(*options)))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def prometheus_server() -> Iterator[Callable[[Path], Server]]:
    """Start Prometheus on a folder with its configuration."""
    servers: list[Server] = []

    def start(folder: Path) -> Server:
        servers.append(_start(lambda: start_prometheus(folder)))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def postgres_session_url() -> Iterator[str]:
    """A PostgreSQL that lasts for all tests; its maintenance database."""
    given = os.environ.get("LAYERED_STORE_TEST_POSTGRES_URL")
    if given:
        yield given
        return
    server = _start(start_postgres)
    yield f"postgresql+asyncpg://tester@127.0.0.1:{server.port}/postgres"
    server.close()


@pytest.fixture
def postgres_url(postgres_session_url: str) -> str:
    """A fresh PostgreSQL database."""
    import asyncpg

    name = f"t_{uuid.uuid4().hex}"

    async def create() -> None:
        for _ in range(300):
            try:
                connection = await asyncpg.connect(postgres_session_url.replace("+asyncpg", ""))
                break
            except asyncpg.CannotConnectNowError:  # it listens already and still starts up
                await asyncio.sleep(0.05)
        try:
            await connection.execute(f"CREATE DATABASE {name}")
        finally:
            await connection.close()

    _run(create)
    return postgres_session_url.rpartition("/")[0] + f"/{name}"


@pytest.fixture(scope="session")
def mysql_session_url() -> Iterator[str]:
    """A MariaDB that lasts for all tests."""
    given = os.environ.get("LAYERED_STORE_TEST_MYSQL_URL")
    if given:
        yield given
        return
    server = _start(start_mysql)
    yield f"mysql+aiomysql://root@127.0.0.1:{server.port}/mysql"
    server.close()


@pytest.fixture
def mysql_url(mysql_session_url: str) -> str:
    """A fresh MariaDB database."""
    import pymysql
    from sqlalchemy.engine import make_url

    name = f"t_{uuid.uuid4().hex}"
    url = make_url(mysql_session_url)
    connection = pymysql.connect(
        host=url.host, port=url.port or 3306, user=url.username, password=url.password or ""
    )
    with connection, connection.cursor() as cursor:
        cursor.execute(f"CREATE DATABASE {name} CHARACTER SET utf8mb4")
    return url.set(database=name).render_as_string(hide_password=False)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """A fresh SQLite file."""
    return f"sqlite+aiosqlite:///{tmp_path}/store.db"


def _run(work: Callable[[], object]) -> None:
    """Run a coroutine function to its end in a thread: the tests' own loop may be running."""
    from threading import Thread

    failures: list[BaseException] = []

    def body() -> None:
        try:
            asyncio.run(work())  # type: ignore[arg-type]
        except BaseException as exc:
            failures.append(exc)

    thread = Thread(target=body)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
