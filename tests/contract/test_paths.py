"""The path recorder on real servers, and subclasses of the snapshot through whole stacks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry

from layered_store import (
    Cached,
    CircuitBreaker,
    Compressed,
    Encrypted,
    Metrics,
    RedisStore,
    Retry,
    SQLStore,
    StateSnapshot,
    StateStore,
    Timeout,
)
from layered_store.testing import record

STATE = StateSnapshot("u-1", axes={"a": 0.5})


def three(redis: str, sql: str, **cached: float) -> Metrics:
    """The usual stack."""
    return Metrics(
        Cached(
            CircuitBreaker(Timeout(RedisStore(redis), seconds=0.3), minimum_calls=3),
            fallback=Retry(SQLStore(sql)),
            **cached,  # type: ignore[arg-type]
        ),
        name="paths",
        registry=CollectorRegistry(),
    )


async def test_real_tiers(redis_server: Callable[..., object], sqlite_url: str) -> None:
    """Each tier is told with what it did; a frozen Redis is a timeout, then an open circuit."""
    server = redis_server()
    url = f"redis://127.0.0.1:{server.port}/0"  # type: ignore[attr-defined]
    async with three(url, sqlite_url, ttl=1e-6) as stack:
        await stack.upsert_latest(STATE)
        await stack.get_latest("u-1")
        async with record(stack) as path:
            await stack.upsert_latest(STATE)
            await stack.get_latest("u-1")
            await stack.get_latest("u-2")
            server.stop()  # type: ignore[attr-defined]
            # What the repair and the channel meet in the background opens the circuit as well,
            # so how many calls still wait for Redis is not fixed.
            for _ in range(6):
                assert await stack.get_latest("u-1") == STATE
            server.cont()  # type: ignore[attr-defined]
    assert path[0] == "sql written, circuit closed, redis written"
    assert path[1] == "cached miss, circuit closed, redis hit"
    assert path[2] == "cached miss, circuit closed, redis miss, sql miss"
    slow = "cached miss, circuit closed, redis timeout, sql hit"
    assert path[3] == slow
    assert path[8] in ("cached miss, circuit open, sql hit", "cached miss, sql hit")
    assert set(path[3:]) <= {slow, path[8]}


async def test_a_fill_is_told(redis_url: str, sqlite_url: str) -> None:
    """What another process wrote is read from the database and kept in Redis."""
    async with three(redis_url, sqlite_url) as stack, SQLStore(sqlite_url) as other:
        await stack.get_latest("u-0")
        await other.upsert_latest(STATE)
        async with record(stack) as path:
            await stack.get_latest("u-1")
            await stack.get_latest("u-1")
    miss = "cached miss, circuit closed, redis miss, sql hit"
    assert path[0] == f"{miss}, circuit closed, redis filled"
    # Hits of the in-process cache take a lease, which may still be on its way.
    assert path[1] in ("cached hit", "cached miss, circuit closed, redis hit")


class Mood(StateSnapshot):
    """A class of the application's own."""

    mood: str = ""
    tags: list[str] = []
    scores: dict[str, float] = {}
    note: str | None = None


FULL = Mood(
    "u-1",
    7,
    axes={"a": 0.5},
    mood="calm",
    tags=["x", "ä"],
    scores={"k": 0.1},
    note="fine",
)


@pytest.mark.parametrize("database", ["sqlite_url", "postgres_url", "mysql_url"])
async def test_subclass_through_a_real_stack(
    database: str, redis_url: str, request: pytest.FixtureRequest
) -> None:
    """Every field comes back from every tier, as that class."""
    url = request.getfixturevalue(database)

    def build() -> StateStore:
        redis = RedisStore(redis_url, snapshot_type=Mood, history_limit=5)
        sql = SQLStore(url, snapshot_type=Mood)
        keys = [bytes(32)]
        return Cached(
            Encrypted(Compressed(redis, threshold=0), keys=keys),
            fallback=Retry(Encrypted(Compressed(sql, threshold=0), keys=keys)),
        )

    async with build() as first, build() as second:
        assert first.snapshot_type is Mood
        await first.upsert_latest(FULL)
        await first.upsert_latest_many([FULL])
        for stack in (first, second):
            for _ in range(2):
                assert await stack.get_latest("u-1") == FULL
            assert await stack.get_latest_many(["u-1"]) == {"u-1": FULL}
            assert await stack.get_history("u-1", 5) == [FULL, FULL]
            assert type(await stack.get_latest("u-1")) is Mood
        with pytest.raises(ValueError, match="must be a Mood, not StateSnapshot"):
            await first.upsert_latest(STATE)


async def test_subclass_is_read_as_the_usual_class(sqlite_url: str) -> None:
    """A process that does not know the subclass reads what it knows of it."""
    async with SQLStore(sqlite_url, snapshot_type=Mood) as knows:
        await knows.upsert_latest(FULL)
    async with SQLStore(sqlite_url) as other:
        assert await other.get_latest("u-1") == StateSnapshot("u-1", 7, axes={"a": 0.5})
        await other.upsert_latest(STATE)
    async with SQLStore(sqlite_url, snapshot_type=Mood) as knows:
        got = await knows.get_latest("u-1")
        assert isinstance(got, Mood)
        assert got.mood == ""
