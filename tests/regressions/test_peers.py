"""What was seen to go wrong in the nearest libraries, and what happens here.

Each test names the library and version in which the failure was seen.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter
from servers import Server

from layered_store import (
    Cached,
    CircuitOpenError,
    ConfigError,
    ErasureIncompleteError,
    Fallback,
    MemoryStore,
    Metrics,
    RedisStore,
    Retry,
    SQLStore,
    StateSnapshot,
    StoreTimeoutError,
    Timeout,
    UnavailableError,
)
from layered_store.enumerable import Enumerable, enumerable_of
from layered_store.interface import Op
from layered_store.testing.clock import FakeClock, settle
from layered_store.testing.scripted import Gate, Scripted

OLD = StateSnapshot("u-1", 1, axes={"a": 0.1})
NEW = StateSnapshot("u-1", 2, axes={"a": 0.2})


async def test_a_read_during_a_slow_write_does_not_outlive_it() -> None:
    """py-key-value 0.5.0: after ``put(2)`` returned, its cache goes on answering 1."""
    gate = Gate()
    cache = Cached(Scripted(gate, OLD, NEW), ttl=1800)
    write = asyncio.create_task(cache.upsert_latest(NEW))
    await gate.entered.wait()
    assert await cache.get_latest("u-1") == OLD
    gate.open()
    await write
    assert await cache.get_latest("u-1") == NEW


async def test_a_delete_during_a_fill_is_final() -> None:
    """py-key-value 0.5.0, cashews 7.6.0, aiocache 0.12.3: the deleted value is answered."""
    gate = Gate()
    cache = Cached(Scripted(gate, None, None))
    fill = asyncio.create_task(cache.get_latest("u-1"))
    await gate.entered.wait()
    await cache.delete("u-1")
    gate.open(OLD)
    await fill
    assert await cache.get_latest("u-1") is None


async def test_a_hundred_readers_of_a_cold_user_are_one_read() -> None:
    """py-key-value 0.5.0: 100 reads of the primary; aiocache 0.12.3: 20 of 20."""
    gate = Gate()
    inner = Scripted(gate)
    cache = Cached(inner)
    readers = [asyncio.create_task(cache.get_latest("u-1")) for _ in range(100)]
    await gate.entered.wait()
    gate.open(OLD)
    assert await asyncio.gather(*readers) == [OLD] * 100
    assert inner.calls == [Op.GET_LATEST]


async def test_one_load_however_long_it_takes() -> None:
    """aiocache 0.12.3: with a lease shorter than the work, each of 20 callers loads."""
    clock, gate = FakeClock(), Gate()
    inner = Scripted(gate)
    cache = Cached(inner, ttl=1, clock=clock)
    readers = [asyncio.create_task(cache.get_latest("u-1")) for _ in range(20)]
    await gate.entered.wait()
    await clock.advance(3600)
    gate.open(OLD)
    assert await asyncio.gather(*readers) == [OLD] * 20
    assert inner.calls == [Op.GET_LATEST]


async def test_an_absent_user_is_remembered_when_asked_for() -> None:
    """py-key-value 0.5.0, aiocache 0.12.3: five reads of an absent key are five loads."""
    inner = Scripted()
    cache = Cached(inner, negative_ttl=30)
    for _ in range(5):
        assert await cache.get_latest("u-1") is None
    assert inner.calls == [Op.GET_LATEST]


@pytest.mark.parametrize("cancelled", [0, 1])
async def test_one_cancelled_caller_fails_no_other(cancelled: int) -> None:
    """cashews 7.6.0, theine 2.0.0: leader or follower, all three end in CancelledError."""
    gate, again = Gate(), Gate()
    cache = Cached(Scripted(gate, again))
    callers = [asyncio.create_task(cache.get_latest("u-1")) for _ in range(3)]
    await gate.entered.wait()
    await settle()
    callers[cancelled].cancel()
    await settle()
    gate.open(OLD)
    again.open(OLD)
    results = await asyncio.gather(*callers, return_exceptions=True)
    assert [isinstance(result, asyncio.CancelledError) for result in results].count(True) == 1
    assert results.count(OLD) == 2


async def test_a_fallback_takes_no_write_that_would_be_lost_or_unerased_later() -> None:
    """py-key-value 0.5.0: a write spills to the fallback, which still holds it after a delete."""
    primary, secondary = Scripted(UnavailableError()), MemoryStore()
    store = Fallback(primary, secondary=secondary)
    with pytest.raises(UnavailableError):
        await store.upsert_latest(NEW)
    assert await secondary.get_latest("u-1") is None
    await secondary.upsert_latest(OLD)
    await store.delete("u-1")
    assert await secondary.get_latest("u-1") is None


async def test_after_an_outage_the_cache_tier_shows_no_older_state() -> None:
    """The spill composition "Redis, else SQL": what was written during the outage is lost."""
    tier, record = MemoryStore(), MemoryStore()
    down = False

    class Flaky(MemoryStore):
        async def upsert_latest(self, snapshot: StateSnapshot) -> None:
            if down:
                raise UnavailableError
            await tier.upsert_latest(snapshot)

        async def get_latest(self, user_id: str) -> StateSnapshot | None:
            if down:
                raise UnavailableError
            return await tier.get_latest(user_id)

        async def delete(self, user_id: str) -> None:
            if down:
                raise UnavailableError
            await tier.delete(user_id)

    store = Cached(Flaky(), fallback=record, ttl=0.001, clock=(clock := FakeClock()))
    await store.upsert_latest(OLD)
    down = True
    await store.upsert_latest(NEW)
    down = False
    await clock.advance(1)
    assert await store.get_latest("u-1") == NEW
    assert await record.get_latest("u-1") == NEW
    down = True
    with pytest.raises(ErasureIncompleteError):
        await store.delete("u-1")
    down = False
    assert await store.get_latest("u-1") is None


async def test_a_failing_call_is_visible_in_the_metrics_and_is_no_miss() -> None:
    """py-key-value 0.5.0 leaves no trace of it; cashews 7.6.0 shows it as a miss."""
    registry = CollectorRegistry()
    store = Metrics(Cached(Scripted(UnavailableError())), name="s", registry=registry)
    with pytest.raises(UnavailableError):
        await store.get_latest("u-1")

    def value(metric: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"layered_store_{metric}", {"stack": "s", **labels})

    assert (
        value("operations_total", operation="get_latest", outcome="unavailable") == 1
    )
    assert value("reads_total", layer="1.cached", result="error") == 1
    assert not value("reads_total", layer="1.cached", result="miss")
    await store.aclose()


async def test_abilities_and_lifecycle_survive_wrapping() -> None:
    """py-key-value 0.5.0: the wrapped store lists no keys, has no ``async with`` and no close."""
    record = MemoryStore()
    async with Metrics(
        Cached(Retry(Timeout(record, seconds=1))), name="s", registry=CollectorRegistry()
    ) as store:
        await store.upsert_latest(NEW)
        listing = enumerable_of(store)
        assert isinstance(listing, Enumerable)
        assert list((await listing.users("", 10)).user_ids) == ["u-1"]
        assert await store.health_check()
    with pytest.raises(Exception, match="closed"):
        await record.get_latest("u-1")


def test_a_stack_prints_what_it_is() -> None:
    """py-key-value 0.5.0 prints an object address."""
    assert (
        repr(Retry(Timeout(MemoryStore(), seconds=0.5), attempts=5))
        == "Retry(Timeout(MemoryStore(), seconds=0.5), attempts=5)"
    )


@pytest.mark.parametrize(
    "url",
    [
        "redis://127.0.0.1:1/0?socket_timeout=nonsense",
        "redis://127.0.0.1:1/0?no_such_option=1",
        "http://127.0.0.1/",
    ],
)
def test_no_option_of_a_url_is_dropped_in_silence(url: str) -> None:
    """py-key-value 0.5.0 ignores the query of a Redis URL."""
    with pytest.raises(ConfigError, match=r"RedisStore\.url"):
        RedisStore(url)


async def test_retries_count_attempts_and_a_hang_ends_by_the_limit_inside() -> None:
    """py-key-value 0.5.0: retry(3) makes 4 attempts; here 3, each cut off by its own limit."""
    clock = FakeClock()
    inner = Scripted(*(Gate() for _ in range(9)))
    store = Retry(Timeout(inner, seconds=0.1, clock=clock), attempts=3, clock=clock)
    call = asyncio.create_task(store.get_latest("u-1"))
    await clock.advance(60)
    with pytest.raises(StoreTimeoutError):
        await call
    assert len(inner.calls) == 3


async def test_retry_never_repeats_what_a_breaker_refused() -> None:
    """Resilience4j's default order counts attempts against an open circuit."""
    inner = Scripted(CircuitOpenError(retry_after=1.0), NEW)
    with pytest.raises(CircuitOpenError):
        await Retry(inner).get_latest("u-1")
    assert len(inner.calls) == 1


def test_one_store_serves_two_event_loops(redis_url: str, sqlite_url: str) -> None:
    """py-key-value 0.5.0: RuntimeError "Event loop is closed" in the second ``asyncio.run``."""
    stack = Cached(RedisStore(redis_url), fallback=SQLStore(sqlite_url))

    async def use() -> StateSnapshot | None:
        await stack.upsert_latest(NEW)
        return await stack.get_latest("u-1")

    assert [asyncio.run(use()) for _ in range(3)] == [NEW] * 3
    asyncio.run(stack.aclose())


async def test_many_stacks_share_a_registry() -> None:
    """prometheus_client refuses a counter built twice; cashews keeps globals."""
    registry = CollectorRegistry()
    stacks = [Metrics(MemoryStore(), name=name, registry=registry) for name in ("a", "b", "a")]
    for stack in stacks:
        await stack.upsert_latest(NEW)
    Counter("other", "Another's.", registry=registry)

    def count(name: str) -> float | None:
        labels = {"stack": name, "operation": "upsert_latest", "outcome": "ok"}
        return registry.get_sample_value("layered_store_operations_total", labels)

    assert (count("a"), count("b")) == (2, 1)
    for stack in stacks:
        await stack.aclose()


async def test_one_call_is_one_connection_when_the_server_drops_it() -> None:
    """redis-py 8.1.0 opens 11 connections for one GET, with py-key-value's retry(3) around it 44;
    py-key-value's default retry never fires, since it does not know the driver's errors."""
    accepted = 0

    async def drop(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal accepted
        accepted += 1
        writer.close()

    server = await asyncio.start_server(drop, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        store = RedisStore(f"redis://127.0.0.1:{port}/0")
        with pytest.raises(UnavailableError):
            await store.get_latest("u-1")
        assert accepted == 1
        with pytest.raises(UnavailableError):
            await Retry(store, attempts=3).get_latest("u-1")
        assert accepted == 4
        await store.aclose()


async def test_a_burst_of_a_thousand_with_default_settings(redis_url: str) -> None:
    """redis-py 8.1.0, aiocache, py-key-value: 900 of 1,000 fail with MaxConnectionsError."""
    store = RedisStore(redis_url)
    results = await asyncio.gather(*(store.get_latest(f"u-{n}") for n in range(1000)))
    assert results == [None] * 1000
    await store.aclose()


async def test_a_hung_server_costs_the_time_limit(
    redis_server: Callable[..., Server],
) -> None:
    """redis-py 8.1.0 with its defaults: one GET takes 59 s."""
    server = redis_server()
    store = RedisStore(f"redis://127.0.0.1:{server.port}/0", timeout=0.2, connect_timeout=0.2)
    await store.upsert_latest(NEW)
    server.stop()
    loop = asyncio.get_running_loop()
    begun = loop.time()
    with pytest.raises(StoreTimeoutError):
        await store.get_latest("u-1")
    assert loop.time() - begun < 2
    server.cont()
    await store.aclose()


async def test_falsy_is_not_absent() -> None:
    """py-key-value 0.4.4 took an empty value for a miss: a state without axes is a state."""
    empty = StateSnapshot("u-1", 0, confidence=0.0, axes={})
    inner = Scripted(empty)
    cache: Any = Cached(inner)
    assert await cache.get_latest("u-1") == empty
    assert await cache.get_latest("u-1") == empty
    assert await cache.get_latest_many(["u-1"]) == {"u-1": empty}
    assert inner.calls == [Op.GET_LATEST]

