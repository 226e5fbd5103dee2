"""The conformance suite on the engines that the contract tests do not start."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import Cluster, SentinelGroup, Server, start_pgbouncer, start_postgres

sys.path.insert(0, str(Path(__file__).parent.parent))

from chaos.stacks import serving, started  # noqa: E402

from layered_store import Cached, RedisStore, SQLStore  # noqa: E402
from layered_store.testing import check_store  # noqa: E402


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    group: Cluster = started(Cluster)
    yield group
    group.close()


@pytest.fixture(scope="module")
def sentinels() -> Iterator[SentinelGroup]:
    group: SentinelGroup = started(SentinelGroup)
    yield group
    group.close()


@pytest.fixture(scope="module")
def bouncer() -> Iterator[Server]:
    with (
        serving(start_postgres) as postgres,
        serving(lambda: start_pgbouncer(postgres.port)) as server,
    ):
        yield server


@pytest.mark.parametrize("group", ["cluster", "sentinels"])
async def test_redis_groups(group: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """A store on its own and a whole stack over it pass."""
    url = request.getfixturevalue(group).url
    alone = await check_store(
        lambda: RedisStore(url, history_limit=50, prefix=f"{uuid.uuid4().hex}:")
    )
    assert alone.ok, str(alone)
    sql = f"sqlite+aiosqlite:///{tmp_path}/states.db"
    stack = await check_store(lambda: Cached(RedisStore(url), fallback=SQLStore(sql)))
    assert stack.ok, str(stack)
    assert {"writes", "history", "delete"} <= set(stack.abilities)


@pytest.mark.parametrize("driver", ["postgresql+psycopg", "postgresql+asyncpg"])
async def test_behind_pgbouncer(bouncer: Server, driver: str) -> None:
    """With nothing set, everything that a PostgreSQL of one's own does."""
    url = f"{driver}://tester@127.0.0.1:{bouncer.port}/postgres"
    names = {"latest_table": f"latest_{driver[11:]}", "history_table": f"history_{driver[11:]}"}
    report = await check_store(lambda: SQLStore(url, timeout=30, **names))
    assert report.ok, str(report)
    assert {"writes", "history", "delete", "versions", "listing"} <= set(report.abilities)
    assert bouncer.running, "what a store does to stop a query must not end the pooler"


@pytest.mark.parametrize(
    ("fixture", "plain", "driver"),
    [("postgres_url", "asyncpg", "psycopg"), ("mysql_url", "aiomysql", "asyncmy")],
)
async def test_other_drivers(
    fixture: str, plain: str, driver: str, request: pytest.FixtureRequest
) -> None:
    """psycopg and asyncmy do what the default drivers do."""
    url = str(request.getfixturevalue(fixture)).replace(plain, driver)
    report = await check_store(lambda: SQLStore(url, timeout=30))
    assert report.ok, str(report)
    assert {"writes", "history", "delete", "versions", "listing"} <= set(report.abilities)
