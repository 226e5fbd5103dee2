"""Every shipped layer, and ten deep stacks, keep the laws of layers."""

from __future__ import annotations

import itertools

import pytest
from stacks import DEEP, LAYERS, metrics

from layered_store import Cached, Metrics, RedisStore, Retry, SQLStore, Timeout, WriteThrough
from layered_store.interface import StateStore
from layered_store.testing import check_layer, check_store


@pytest.mark.parametrize("name", [*LAYERS, *DEEP])
async def test_layer(name: str) -> None:
    """Nothing fails, whatever the store inside does."""
    report = await check_layer({**LAYERS, **DEEP}[name])
    assert report.ok, str(report)


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
