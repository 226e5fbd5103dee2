"""The laws of reads on real servers: each tier alone, and the guarded tier under faults."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from random import Random
from types import SimpleNamespace

import pytest
from servers import Server
from test_laws import Beside, Faulty, caller

from layered_store import (
    CircuitBreaker,
    MemoryStore,
    RedisStore,
    SQLStore,
    StateSnapshot,
    StateStore,
    ValidationError,
    WriteThrough,
)
from layered_store.clock import SYSTEM_CLOCK
from layered_store.errors import StoreError


def reads(store: StateStore) -> dict[str, int]:
    """Return the results that happened."""
    counted = {s.labels[0]: int(s.value) for s in store.samples() if s.metric == "reads"}
    assert set(counted) == {"hit", "miss", "negative_hit", "stale", "error"}
    return {result: count for result, count in counted.items() if count}


async def ask(store: StateStore) -> None:
    """Read two users that are there and two that are not, alone and in a batch."""
    for user_id in ("u-1", "u-2", "nobody", "u-1"):
        await store.get_latest(user_id)
    await store.get_latest_many(["u-1", "u-1", "nobody", "nowhere"])
    await store.get_latest_many([])
    with pytest.raises(ValidationError):
        await store.get_latest("not an id")
    with pytest.raises(ValidationError):
        await store.get_latest_many(["u-1", "not an id"])


@pytest.mark.parametrize("backend", ["redis", "sqlite", "postgres"])
async def test_a_backend_counts_its_reads(
    backend: str, request: pytest.FixtureRequest, redis_server: Callable[..., Server]
) -> None:
    """Hits and misses of what was asked; errors, and no misses, once it is gone."""
    if backend == "redis":
        server = redis_server()
        store: StateStore = RedisStore(f"redis://127.0.0.1:{server.port}/0")
    else:
        store = SQLStore(request.getfixturevalue(f"{backend}_url"), timeout=2.0)
    async with store:
        await store.upsert_latest_many([StateSnapshot("u-1"), StateSnapshot("u-2")])
        await ask(store)
        assert reads(store) == {"hit": 4, "miss": 3}
        await asyncio.gather(*(store.get_latest(f"u-{n % 4}") for n in range(100)))
        assert reads(store) == {"hit": 54, "miss": 53}
        call = asyncio.ensure_future(store.get_latest("u-1"))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert reads(store) == {"hit": 54, "miss": 53}
        if backend == "redis":
            server.kill()
            with pytest.raises(StoreError):
                await store.get_latest("u-1")
            with pytest.raises(StoreError):
                await store.get_latest_many(["u-1", "u-2", "u-1"])
            assert reads(store) == {"hit": 54, "miss": 53, "error": 3}
    with pytest.raises(StoreError):
        await store.get_latest("u-1")
    assert reads(store)["error"] == (4 if backend == "redis" else 1)


async def test_what_redis_cannot_read_is_a_miss_and_counted_as_corrupt(redis_url: str) -> None:
    """On its own and as a guarded tier; the system of record answers."""
    origin = MemoryStore()
    async with RedisStore(redis_url) as store:
        stack = WriteThrough(store, origin=origin)
        await stack.upsert_latest(StateSnapshot("u-1"))
        assert await stack.get_latest("u-1") is not None
        key = store.key(store.digest("u-1"))
        before = store.corrupt_records
        await store.command("SET", key, b"LS\x01S and then nothing")
        assert await stack.get_latest("u-1") is not None
        assert store.corrupt_records == before + 1
        assert reads(origin)["hit"] >= 1
        await store.command("SET", key, b"another program's")
        assert await store.get_latest("u-1") is None
        assert store.corrupt_records == before + 2
        await stack.aclose()


@pytest.mark.parametrize("cancelled", [False, True], ids=["faults", "cancellations"])
async def test_the_laws_hold_for_the_guarded_tier_under_faults(
    redis_url: str, cancelled: bool
) -> None:
    """Every read that ended at WriteThrough counts once, whatever failed below it."""
    random = Random(5)

    clock = SimpleNamespace(sleep=lambda seconds: SYSTEM_CLOCK.sleep(seconds / 100))

    def faulty(inner: StateStore) -> Faulty:
        return Faulty(inner, random=random, clock=clock, share=0.0)  # type: ignore[arg-type]

    redis = RedisStore(redis_url)
    cache, origin = faulty(redis), faulty(MemoryStore())
    breaker = CircuitBreaker(cache, minimum_calls=20, window=1.0, open_for=0.02)
    tier = WriteThrough(breaker, origin=origin)
    stack = Beside(tier)
    # Many, since a write that may have happened bars its user's copy for longer than this takes.
    users = [f"u-{number}" for number in range(40)]
    await stack.upsert_latest_many([StateSnapshot(user) for user in users])
    while reads(tier).get("hit", 0) < len(users):  # until all are copied and trusted
        await asyncio.gather(*map(stack.get_latest, users))
    before = reads(tier)["hit"]
    cache.share = origin.share = 0.2
    seen: Counter[str] = Counter()
    schedule = SimpleNamespace(random=random, clock=clock)
    for turn in range(200):
        if turn >= 20 and "miss" in reads(tier):  # whether one came about is up to chance
            break
        await asyncio.gather(
            *(caller(stack, schedule, seen, cancelled, users) for _ in range(8))  # type: ignore[arg-type]
        )
    assert seen["begun"] > 500
    counted = reads(tier)
    assert sum(counted.values()) == stack.ended
    assert {"hit", "miss", "error"} <= set(counted)
    assert counted["hit"] > before
    assert counted["error"] >= stack.raised
    assert sum(reads(redis).values()) <= stack.ended
    await stack.aclose()
