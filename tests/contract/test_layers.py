"""Every shipped layer, and ten deep stacks, keep the laws of layers."""

from __future__ import annotations

import itertools
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
from stacks import DEEP, LAYERS, metrics

from layered_store import (
    Cached,
    ErasureIncompleteError,
    Fallback,
    MemoryStore,
    Metrics,
    Ramp,
    RedisStore,
    Retry,
    Shadow,
    SQLStore,
    StateSnapshot,
    Timeout,
    UnavailableError,
    WriteThrough,
    describe,
    lint,
)
from layered_store.interface import StateStore
from layered_store.testing import check_layer, check_store


@pytest.mark.parametrize("name", [*LAYERS, *DEEP])
async def test_layer(name: str) -> None:
    """Nothing fails, whatever the store inside does."""
    report = await check_layer({**LAYERS, **DEEP}[name])
    assert report.ok, str(report)


@pytest.mark.parametrize("name", [name for name in (*LAYERS, *DEEP) if name != "ReadOnly"])
async def test_a_mock_of_the_interface_serves_as_a_store(name: str) -> None:
    """As users' tests write it: what it says of itself is a mock too, and stands for nothing."""
    mock = AsyncMock(spec=StateStore)
    mock.get_latest.return_value = None
    mock.get_latest_many.return_value = {}
    mock.get_history.return_value = []
    stack = {**LAYERS, **DEEP}[name](mock)
    assert await stack.get_latest("u-1") is None
    assert await stack.get_latest_many(["u-1"]) == {}
    assert await stack.get_history("u-1", 3) == []
    await stack.upsert_latest(StateSnapshot("u-1"))
    await stack.upsert_latest_many([StateSnapshot("u-2")])
    await stack.delete("u-1")
    for operation in ("get_latest", "get_history", "upsert_latest", "upsert_latest_many"):
        assert getattr(mock, operation).await_count == 1, operation
    assert mock.delete.await_count == 1
    lint(stack)
    await stack.aclose()


@pytest.mark.parametrize("mock", [AsyncMock(spec=StateStore), Mock(spec=StateStore)])
async def test_what_a_mock_could_not_do_is_told_as_of_any_store(mock: Any) -> None:
    """Its name is a mock too: by its class it stands in errors and health reports."""
    mock.delete = AsyncMock(side_effect=UnavailableError("down"))
    for stack in (
        WriteThrough(mock, origin=MemoryStore()),
        Fallback(MemoryStore(), secondary=mock),
        Shadow(MemoryStore(), candidate=mock),
        Ramp(MemoryStore(), alternative=mock),
    ):
        with pytest.raises(ErasureIncompleteError) as caught:
            await stack.delete("u-1")
        assert caught.value.pending == (type(mock).__name__,)
        assert type(mock).__name__ in (await stack.health_report()).to_json()
        assert type(mock).__name__ in str(describe(stack))


async def test_over_a_real_tier(redis_url: str) -> None:
    """The laws hold with Redis as the cache tier in front of the truth, guarded by versions."""

    runs = itertools.count()

    def stack(inner: StateStore) -> Metrics:
        # Each truth has copies of its own: versions are compared.
        tier = RedisStore(
            redis_url, prefix=f"check-{next(runs)}:", snapshot_type=inner.snapshot_type
        )
        return metrics(Cached(Timeout(tier, seconds=20), fallback=Retry(inner, base_delay=0)))

    report = await check_layer(stack)
    assert report.ok, str(report)


@pytest.mark.parametrize("database", ["sqlite_url", "postgres_url", "mysql_url"])
async def test_real_stacks(database: str, redis_url: str, request: pytest.FixtureRequest) -> None:
    """Real stacks of three tiers pass the conformance suite."""
    url = request.getfixturevalue(database)
    builds = [lambda: metrics(Cached(RedisStore(redis_url), fallback=SQLStore(url)))]
    if database == "sqlite_url":
        builds.append(lambda: WriteThrough(RedisStore(redis_url), origin=Retry(SQLStore(url))))
    for build in builds:
        report = await check_store(build)
        assert report.ok, str(report)
