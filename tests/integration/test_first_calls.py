"""Stacks of three tiers: from the first call on, and with caches above caches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from servers import Server

from layered_store import Cached, RedisStore, Retry, SQLStore, StateSnapshot, Timeout, WriteThrough
from layered_store.stack import find

STATE = StateSnapshot("u-1", 1, axes={"a": 0.1})


def hits(stack: Cached) -> float:
    return sum(s.value for s in stack.samples() if s.metric == "reads" and s.labels == ("hit",))


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("first", ["upsert", "get", "get many"])
async def test_the_second_call_is_a_hit(
    first: str, opened: bool, redis_url: str, sqlite_url: str
) -> None:
    """The channel stands and the lease is given before the first call goes below."""
    async with SQLStore(sqlite_url) as record:
        await record.upsert_latest(STATE)
    stack = Cached(RedisStore(redis_url), fallback=SQLStore(sqlite_url))
    if opened:
        await stack.open()
    if first == "upsert":
        await stack.upsert_latest(STATE)
    elif first == "get":
        assert await stack.get_latest("u-1") == STATE
    else:
        assert await stack.get_latest_many(["u-1"]) == {"u-1": STATE}
    assert hits(stack) == 0
    assert await stack.get_latest("u-1") == STATE
    assert hits(stack) == 1
    await stack.aclose()


async def test_a_tier_that_hangs_from_the_start_costs_the_first_call_its_limits(
    redis_server: Callable[..., Server], sqlite_url: str
) -> None:
    """The wait for the channel ends; reads and writes go on from the system of record."""
    server = redis_server()
    server.stop()
    tier = RedisStore(
        f"redis://127.0.0.1:{server.port}/0", timeout=0.1, connect_timeout=0.1, probe_seconds=0.1
    )
    stack = Cached(tier, fallback=SQLStore(sqlite_url))
    loop_time = find(stack, RedisStore)[0].clock.monotonic
    begun = loop_time()
    await stack.upsert_latest(STATE)
    assert await stack.get_latest("u-1") == STATE
    assert loop_time() - begun < 3
    server.cont()
    await stack.aclose()


async def test_a_tier_that_hangs_costs_a_large_batch_of_reads_its_limit_once(
    redis_server: Callable[..., Server], sqlite_url: str
) -> None:
    """However many parts it is worked off in: all are read from the system of record."""
    server = redis_server()
    tier = RedisStore(
        f"redis://127.0.0.1:{server.port}/0", timeout=0.5, connect_timeout=0.5, probe_seconds=0.5
    )
    stack = WriteThrough(tier, origin=SQLStore(sqlite_url))
    await stack.upsert_latest(STATE)
    assert await stack.get_latest("u-1") == STATE
    server.stop()
    begun = tier.clock.monotonic()
    assert await stack.get_latest_many([f"u-{n}" for n in range(10_000)]) == {"u-1": STATE}
    assert tier.clock.monotonic() - begun < 3  # ten parts
    server.cont()
    await stack.aclose()


async def test_a_cache_above_a_cache_hears_of_other_processes_too(
    redis_url: str, sqlite_url: str
) -> None:
    """Both let go of what another process wrote or erased, whatever stands between them."""

    def build() -> Cached:
        below = Cached(RedisStore(redis_url), fallback=SQLStore(sqlite_url))
        return Cached(Retry(Timeout(below, seconds=5)))

    ours, theirs = build(), build()
    await theirs.upsert_latest(STATE)
    assert await ours.get_latest("u-1") == STATE
    assert await ours.get_latest("u-1") == STATE
    assert hits(ours) == 1
    await theirs.delete("u-1")
    assert await ours.get_latest("u-1") is None
    await ours.upsert_latest(STATE)
    assert await theirs.get_latest("u-1") == STATE
    await ours.aclose()
    await theirs.aclose()
