"""The path recorder: what each call met, in words."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import pytest

from layered_store import (
    Bulkhead,
    Cached,
    CircuitBreaker,
    Fallback,
    Layer,
    MemoryStore,
    Metrics,
    Op,
    Retry,
    StateSnapshot,
    StateStore,
    StoreError,
    Timeout,
    WriteThrough,
)
from layered_store.layer import AroundLayer
from layered_store.testing import FakeClock, Faults, Recorded, record

STATE = StateSnapshot("u-1", axes={"a": 0.5})


class Redis(MemoryStore):
    kind = "redis"


class Sql(MemoryStore):
    kind = "sql"


class Three:
    """The usual stack of three tiers, whose tier and origin can fail."""

    def __init__(self, **cached: Any) -> None:
        from prometheus_client import CollectorRegistry

        self.clock = clock = FakeClock()
        self.redis = Faults(Redis(clock=clock), clock=clock)
        self.sql = Faults(Sql(clock=clock), clock=clock)
        self.stack = Metrics(
            Cached(
                CircuitBreaker(
                    Timeout(self.redis, seconds=0.05, clock=clock), minimum_calls=2, clock=clock
                ),
                fallback=Retry(self.sql, clock=clock, base_delay=0),
                clock=clock,
                **cached,
            ),
            name="three",
            registry=CollectorRegistry(),
            clock=clock,
        )

    async def run(self, call: Awaitable[Any], seconds: float = 1.0) -> Any:
        """Run a call to its end, moving time as it needs it."""
        task = asyncio.ensure_future(call)
        await self.clock.advance(seconds)
        assert task.done()
        return task.exception() or task.result()


async def test_the_example() -> None:
    """A cold read with Redis hanging and SQL there is told as it went."""
    three = Three()
    await three.sql.inner.upsert_latest(STATE)
    async with record(three.stack) as path:
        with three.redis.outage("hang"):
            assert await three.run(three.stack.get_latest("u-1")) == STATE
        await three.stack.get_latest("u-1")
    assert path == ["cached miss, circuit closed, redis timeout, sql hit", "cached hit"]
    assert str(path[0]) == "cached miss, circuit closed, redis timeout, sql hit"
    assert path[0].operation == "get_latest"
    assert path[0].outcome == "ok"
    assert [step.block for step in path[0].steps] == ["cached", "circuit", "redis", "sql"]
    assert path[0].steps[3].store is three.sql.inner
    assert path.last == "cached hit"


async def test_every_operation() -> None:
    """Writes, batches, history and erasure have their words."""
    three = Three()
    stack = three.stack
    async with record(stack) as path:
        await stack.upsert_latest(STATE)
        await stack.get_latest_many(["u-1", "u-2"])
        await stack.get_latest_many(["u-2", "u-3"])
        await stack.upsert_latest_many([StateSnapshot("u-4"), StateSnapshot("u-5")])
        await stack.get_history("u-1", 5)
        await stack.get_history("u-9", 5)
        await stack.delete("u-1")
        await stack.get_latest("u-1")
    assert path == [
        "sql written, circuit closed, redis written",
        "cached hit 1 of 2, circuit closed, redis miss, sql miss",
        "cached miss, circuit closed, redis miss, sql miss",
        "sql written, circuit closed, redis written, circuit closed, redis written",
        "sql hit",
        "sql miss",
        "sql erased, circuit closed, redis erased",
        "cached miss, circuit closed, redis miss, sql miss",
    ]
    assert [call.operation for call in path][:3] == [
        "upsert_latest",
        "get_latest_many",
        "get_latest_many",
    ]


async def test_attempts_and_the_circuit() -> None:
    """Repeated attempts are counted, an open circuit and a trial are named."""
    three = Three()
    await three.sql.inner.upsert_latest(STATE)
    stack, clock = three.stack, three.clock
    async with record(stack) as path:
        three.sql.fail(2)
        await three.run(stack.get_latest("u-1"))
        with three.redis.outage():
            for user in ("a", "b", "c", "d"):
                await three.run(stack.get_latest(user))
        await clock.advance(100)
        await three.run(stack.get_latest("e"))
    assert path[0] == (
        "cached miss, circuit closed, redis miss, retry 3 attempts, sql unavailable,"
        " sql unavailable, sql hit, circuit closed, redis written"
    )
    assert path[-2] == "cached miss, circuit open, sql miss"
    assert path[-1] == "cached miss, circuit half open, redis miss, sql miss"


async def test_stale_and_negative_and_shared() -> None:
    """A stale answer is marked as such, an absent user's mark and a shared load too."""
    clock = FakeClock()
    below = Faults(Sql(clock=clock), clock=clock)
    stack = Cached(below, ttl=10, negative_ttl=5, stale_if_error=60, clock=clock)
    await stack.upsert_latest(STATE)
    async with record(stack) as path:
        await clock.advance(11)
        with below.outage():
            assert await stack.get_latest("u-1") == STATE
            assert await stack.get_latest_many(["u-1"]) == {"u-1": STATE}
        await stack.get_latest("none")
        await stack.get_latest("none")
        await clock.advance(11)
        below.fail(fault="hang")
        tasks = [asyncio.create_task(stack.get_latest("u-1")) for _ in range(2)]
        await clock.advance(1)
        below.recover()
        await asyncio.gather(*tasks)
    assert path == [
        "cached stale, sql unavailable",
        "cached stale, sql unavailable",
        "cached miss, sql miss",
        "cached negative hit",
        "cached stale, sql unavailable",
        "cached shared",
    ]


async def test_failures_are_told() -> None:
    """What a caller gets as an error stands in the path, with the layer that raised it."""
    from layered_store.errors import ValidationError

    clock = FakeClock()
    below = Faults(Sql(clock=clock), clock=clock)
    stack = Bulkhead(Timeout(below, seconds=1, clock=clock), max_in_flight=1, clock=clock)
    async with record(stack) as path:
        below.fail(fault="hang")
        first = asyncio.create_task(stack.get_latest("u-1"))
        await clock.advance(0)
        with pytest.raises(StoreError):
            await stack.get_latest("u-2")
        assert path[0] == ""
        assert path[0].outcome == "running"
        await clock.advance(2)
        with pytest.raises(TimeoutError):
            await first
        with pytest.raises(ValidationError):
            await stack.get_latest("no id")
        below.fail(fault="corrupt")
        await below.inner.upsert_latest(STATE)
        with pytest.raises(StoreError):
            await stack.get_latest("u-1")
        below.fail(fault="hang_after")
        late = asyncio.create_task(stack.upsert_latest(STATE))
        await clock.advance(0)
        late.cancel()
        await asyncio.wait([late])
    assert path == [
        "sql timeout",
        "bulkhead full",
        "sql invalid",
        "sql corrupt",
        "sql cancelled",
    ]
    assert [call.outcome for call in path] == [
        "timeout",
        "full",
        "invalid",
        "corrupt",
        "cancelled",
    ]


async def test_fallback() -> None:
    """Both sides are told, in their order."""
    inner = Faults(Sql())
    stack = Fallback(inner, secondary=Redis())
    async with record(stack) as path:
        with inner.outage():
            await stack.get_latest("u-1")
    assert path == ["sql unavailable, redis miss"]


async def test_background_is_apart() -> None:
    """What the stack does on its own is no part of anybody's call."""
    clock = FakeClock()
    stack = Cached(Sql(clock=clock), ttl=10, refresh_ahead=0.5, clock=clock)
    await stack.upsert_latest(STATE)
    async with record(stack) as path:
        await clock.advance(6)
        await stack.get_latest("u-1")
        await clock.advance(1)
    assert path == ["cached hit"]
    assert path.background == ["sql hit"]
    path.clear()
    assert path == path.background == []


class Plain(StateStore):
    """A third party's cache: no Layer, another name for its inner store."""

    caches = True

    def __init__(self, below: StateStore) -> None:
        self.below = below
        self.kept: dict[str, StateSnapshot] = {}

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        await self.below.upsert_latest(snapshot)

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        if user_id in self.kept:
            return self.kept[user_id]
        found = await self.below.get_latest(user_id)
        if found is not None:
            self.kept[user_id] = found
        return found

    async def upsert_latest_many(self, snapshots: Iterable[StateSnapshot]) -> None:
        for snapshot in snapshots:
            await self.upsert_latest(snapshot)


class Mode(enum.Enum):
    FAST_LANE = 1


class Moody(AroundLayer):
    """A third party's layer that shows its state."""

    state = Mode.FAST_LANE

    async def around(
        self, op: Op, method: Callable[..., Awaitable[Any]], /, *args: Any, **kwargs: Any
    ) -> Any:
        del op
        return await method(*args, **kwargs)


async def test_third_parties() -> None:
    """Blocks of others are recorded without knowing of it, by what they call and answer."""
    stack = Layer(Moody(Plain(Recorded(Sql()))))
    async with record(stack) as path:
        await stack.upsert_latest(STATE)
        await stack.get_latest("u-1")
        await stack.get_latest("u-1")
        await stack.upsert_latest_many([STATE, STATE])
    assert path == [
        "moody fast lane, sql written",
        "moody fast lane, plain miss, sql hit",
        "moody fast lane, plain hit",
        "moody fast lane, sql written, sql written",
    ]


async def test_nothing_is_left_behind() -> None:
    """After the block every object is as it was, the fused path included."""
    three = Three()
    stack = three.stack
    before = {id(place): dict(vars(place)) for place in (stack, stack.inner, three.redis.inner)}
    fused = stack.__dict__["get_latest"]
    with pytest.raises(RuntimeError):
        async with record(stack):
            assert stack.__dict__["get_latest"] is not fused
            raise RuntimeError
    assert stack.__dict__["get_latest"] is fused
    for place in (stack, stack.inner, three.redis.inner):
        assert set(vars(place)) == set(before[id(place)])


async def test_hits_are_counted_once() -> None:
    """A recorded hit counts in metrics as any other."""
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    stack = Metrics(Cached(MemoryStore()), name="s", registry=registry)
    await stack.upsert_latest(STATE)
    await stack.get_latest("u-1")
    async with record(stack):
        await stack.get_latest("u-1")
    await stack.get_latest("u-1")
    labels = {"stack": "s", "operation": "get_latest", "outcome": "ok"}
    assert registry.get_sample_value("layered_store_operations_total", labels) == 3
    labels = {"stack": "s", "layer": "1.cached", "result": "hit"}
    assert registry.get_sample_value("layered_store_reads_total", labels) == 3


async def test_two_recorders() -> None:
    """Recordings of one stack, or of a part of it, overlap in any order."""
    inner = Cached(Sql())
    stack = Layer(inner)
    first, second = record(stack), record(inner)
    whole = await first.__aenter__()
    part = await second.__aenter__()
    await stack.get_latest("u-1")
    await first.__aexit__(None, None, None)
    await inner.get_latest("u-2")
    await second.__aexit__(None, None, None)
    await stack.get_latest("u-3")
    assert whole == ["cached miss, sql miss"]
    assert part == ["cached miss, sql miss", "cached miss, sql miss"]


async def test_concurrent_calls_are_kept_apart() -> None:
    """Each task's call has a path of its own, in the order in which they began."""
    stack = Cached(Sql())
    await stack.inner.upsert_latest(STATE)
    async with record(stack) as path:
        await asyncio.gather(*(stack.get_latest(user) for user in ("u-1", "u-2", "u-3")))
    assert path == ["cached miss, sql hit", "cached miss, sql miss", "cached miss, sql miss"]


async def test_closing_meanwhile() -> None:
    """A stack closed while it is recorded stays closed."""
    stack = WriteThrough(MemoryStore(), origin=MemoryStore())
    async with record(stack):
        await stack.aclose()
    with pytest.raises(StoreError, match="closed"):
        await stack.get_latest("u-1")


async def test_sequence() -> None:
    """A recording is a sequence: lengths, slices, printing."""
    stack = Cached(Sql())
    async with record(stack) as path:
        with pytest.raises(IndexError):
            _ = path.last
        await stack.get_latest("u-1")
        await stack.get_latest("u-2")
    assert len(path) == 2
    assert path[:1] == ["cached miss, sql miss"]
    assert str(path) == "cached miss, sql miss\ncached miss, sql miss"
    assert repr(path) == "Recording(['cached miss, sql miss', 'cached miss, sql miss'])"
    assert path != 3


@pytest.mark.parametrize("stack", [None, MemoryStore, "memory"])
async def test_only_stacks_are_recorded(stack: Any) -> None:
    """Anything else is refused by name."""
    with pytest.raises(ValueError, match="stack: must be a StateStore"):
        async with record(stack):
            pass
