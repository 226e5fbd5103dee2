"""The three-tier stack on a real Redis that is killed: what the metrics and the log say."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

import pytest
from prometheus_client import CollectorRegistry
from servers import Server

from layered_store import (
    Cached,
    CircuitBreaker,
    Metrics,
    RedisStore,
    SQLStore,
    StateSnapshot,
    Timeout,
    WriteThrough,
)
from layered_store.errors import ErasureIncompleteError


def figure(registry: CollectorRegistry, name: str, layer: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, {"stack": "users", "layer": layer, **labels})


async def until(check: Callable[[], bool], seconds: float = 15.0) -> None:
    """Wait for something that another process or a background task does."""
    async with asyncio.timeout(seconds):
        while not check():  # noqa: ASYNC110  what it waits for has no event
            await asyncio.sleep(0.05)


async def test_an_outage_of_redis_shows_and_ends(
    redis_server: Callable[..., Server], sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Reads that the tier failed on are errors; what it missed is pending until it is repaired."""
    caplog.set_level(logging.INFO, logger="layered_store")
    server = redis_server()
    registry = CollectorRegistry()
    url = f"redis://127.0.0.1:{server.port}/0"
    stack = Metrics(
        Cached(
            CircuitBreaker(Timeout(RedisStore(url), seconds=0.5)),
            fallback=SQLStore(sqlite_url),
            ttl=0.001,
        ),
        name="users",
        registry=registry,
    )
    tier, redis, sql = "2.write_through", "5.redis", "6.sql"

    def reads(layer: str) -> dict[str, int]:
        results = ("hit", "miss", "negative_hit", "stale", "error")
        return {
            result: int(figure(registry, "layered_store_reads_total", layer, result=result) or 0)
            for result in results
        }

    def pending() -> float | None:
        return figure(registry, "layered_store_pending_repairs", tier)

    async with stack:
        for number in range(20):
            await stack.upsert_latest(StateSnapshot(f"u-{number}", axes={"warmth": 0.5}))
        await until(lambda: figure(registry, "layered_store_channel_up", tier) == 1)
        for number in range(20):
            await stack.get_latest(f"u-{number}")
        before = reads(tier)
        assert before["hit"] > 0
        assert reads(redis)["hit"] >= before["hit"]
        assert reads("1.cached")["miss"] == sum(before.values())
        assert pending() == 0

        server.kill()
        with pytest.raises(ErasureIncompleteError):
            await stack.delete("u-19")
        for number in range(10):
            await stack.upsert_latest(StateSnapshot(f"u-{number}", axes={"warmth": 0.9}))
            await asyncio.sleep(0.01)
            assert await stack.get_latest(f"u-{number}") is not None
        during = reads(tier)
        assert during["error"] == 10
        assert during["miss"] == before["miss"]
        assert sum(during.values()) == reads("1.cached")["miss"] + reads("1.cached")["error"]
        assert reads(sql)["hit"] >= 10
        assert pending() == 11
        assert figure(registry, "layered_store_erasures_incomplete_total", tier) == 1
        assert figure(registry, "layered_store_tier_failures_total", tier, step="erase") == 1
        await until(lambda: figure(registry, "layered_store_channel_up", tier) == 0)
        assert (figure(registry, "layered_store_channel_losses_total", tier) or 0) >= 1

        server.start()
        await until(lambda: pending() == 0)
        await until(lambda: figure(registry, "layered_store_channel_up", tier) == 1)
        with suppress(ErasureIncompleteError):
            await stack.delete("u-18")
        await stack.delete("u-19")
    events = [record.event for record in caplog.records if hasattr(record, "event")]
    for event in ("tier_lost", "channel_lost", "erasure_incomplete"):
        assert event in events
    for lost, back in (("tier_lost", "tier_back"), ("channel_lost", "channel_back")):
        assert events.index(back) > events.index(lost)
    assert events.count("tier_repaired") <= events.count("tier_lost")
    assert events.count("erasure_incomplete") == events.count("erasure_complete")
    assert not any(f"u-{number}" in caplog.text for number in range(20))


async def test_a_frozen_redis_is_repaired_when_it_goes_on(
    redis_server: Callable[..., Server], sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It still has the old copies then: they are removed, counted and told of once."""
    caplog.set_level(logging.INFO, logger="layered_store")
    server = redis_server()
    registry = CollectorRegistry()
    redis = RedisStore(f"redis://127.0.0.1:{server.port}/0", timeout=0.3)
    tier = "1.write_through"
    async with Metrics(
        WriteThrough(redis, origin=SQLStore(sqlite_url)), name="users", registry=registry
    ) as stack:
        for number in range(8):
            await stack.upsert_latest(StateSnapshot(f"u-{number}", axes={"warmth": 0.1}))
        server.stop()
        for number in range(8):
            await stack.upsert_latest(StateSnapshot(f"u-{number}", axes={"warmth": 0.9}))
        assert figure(registry, "layered_store_pending_repairs", tier) == 8
        server.cont()
        await until(lambda: figure(registry, "layered_store_pending_repairs", tier) == 0)
        repaired = figure(registry, "layered_store_repairs_total", tier)
        assert repaired is not None
        assert 1 <= repaired <= 8
        for number in range(8):
            state = await stack.get_latest(f"u-{number}")
            assert state is not None
            assert state.get_axis("warmth") == 0.9
    told = [record for record in caplog.records if getattr(record, "event", "") == "tier_repaired"]
    assert [record.facts["users"] for record in told] == [repaired]  # type: ignore[attr-defined]
