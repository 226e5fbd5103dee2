"""Public use as users write it: checked by mypy --strict, never run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import ParamSpec, TypeVar, assert_type

import layered_store
import layered_store.testing
from layered_store import (
    AroundLayer,
    Bulkhead,
    Cached,
    CircuitBreaker,
    CircuitOpenError,
    ErasureIncompleteError,
    Fallback,
    HealthReport,
    HealthStatus,
    Layer,
    MemoryStore,
    Metrics,
    Op,
    RedisStore,
    Retry,
    Source,
    SQLStore,
    StateSnapshot,
    StateStore,
    SyncStore,
    Timeout,
    WriteThrough,
    describe,
    find,
    lint,
    load_stack,
    replace,
    to_config,
)
from layered_store.clock import SYSTEM_CLOCK, Clock
from layered_store.coherence import Authority
from layered_store.testing import (
    FakeClock,
    Faults,
    Recorded,
    Report,
    Schedule,
    check_layer,
    check_store,
    explore,
    on_clock,
    record,
)

P = ParamSpec("P")
T = TypeVar("T")


class Mood(StateSnapshot):
    mood: str = ""
    tags: list[str] = []


async def use(store: StateStore) -> None:
    state = StateSnapshot("u-1", axes={"warmth": 0.7}, source=Source.MIXED, confidence=1)
    assert_type(state.get_axis("warmth"), float)
    assert_type(state.get_axis_opt("warmth"), float | None)
    assert_type(state.to_json(), bytes)
    assert_type(Mood.from_json(b""), Mood)
    mood = Mood("u-1", mood="calm", tags=["a"])
    state.confidence = 0.5  # type: ignore[misc]
    mood.mood = "wild"  # type: ignore[misc]
    await store.upsert_latest(state)
    await store.upsert_latest(mood)
    await store.upsert_latest_many(each for each in [state])
    assert_type(await store.get_latest("u-1"), StateSnapshot | None)
    assert_type(await store.get_latest_many({"u-1"}), dict[str, StateSnapshot])
    assert_type(await store.get_history("u-1", 5), list[StateSnapshot])
    assert_type(await store.health_check(), bool)
    report = await store.health_report()
    assert_type(report, HealthReport)
    assert_type(report.status, HealthStatus)
    assert_type(report.children, tuple[HealthReport, ...])
    await store.get_latest(1)  # type: ignore[arg-type]
    try:
        await store.delete("u-1")
    except ErasureIncompleteError as exc:
        assert_type(exc.pending, tuple[str, ...])
    except CircuitOpenError as exc:
        assert_type(exc.retry_after, float)
    authority = store.capability(Authority)
    assert_type(authority, Authority | None)
    async with Cached(store, ttl=timedelta(minutes=1)) as stack:
        assert_type(stack, Cached)


def compose() -> StateStore:
    stack = Metrics(
        Cached(
            CircuitBreaker(Timeout(RedisStore("redis://127.0.0.1:6379/0"), seconds=0.05)),
            fallback=Retry(SQLStore("sqlite+aiosqlite:///x.db"), attempts=3),
            ttl=60,
            max_entries=100_000,
        ),
        name="user_state",
    )
    WriteThrough(MemoryStore(), origin=Fallback(MemoryStore(), secondary=MemoryStore()))
    Bulkhead(stack, max_in_flight=10, max_waiting=5)
    Retry(stack, atempts=3)  # type: ignore[call-arg]
    layered_store.Retyr(stack)  # type: ignore[attr-defined]
    layered_store.testing.FakeClok()  # type: ignore[attr-defined]
    for block in describe(stack):
        assert_type(block.kind, str)
    assert_type(find(stack, Retry), list[Retry])
    lint(stack)
    to_config(stack)
    swapped = replace(stack, RedisStore, MemoryStore())
    assert_type(swapped, StateStore)
    return load_stack("stack.toml", overrides={"cache": swapped})


def block(store: StateStore) -> None:
    with SyncStore(store, timeout=timedelta(seconds=1)) as blocking:
        assert_type(blocking.get_latest("u-1"), StateSnapshot | None)
        blocking.upsert_latest(StateSnapshot("u-1"))


@dataclass(eq=False, repr=False)
class Slow(AroundLayer):
    seconds: float = field(default=1.0, kw_only=True)
    clock: Clock = field(default=SYSTEM_CLOCK, kw_only=True)

    async def around(
        self, op: Op, method: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        await self.clock.sleep(self.seconds)
        return await method(*args, **kwargs)


class ReadOnly(Layer):
    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        raise PermissionError

    async def upsert_latest_many(self, snapshots: Iterable[StateSnapshot]) -> None:
        raise PermissionError


class Mine(StateStore):
    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        snapshot.validate()

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        return None


async def kit() -> None:
    clock = FakeClock()
    faults = Faults(MemoryStore(clock=clock), seed=1, error={"get_latest": 0.5}, clock=clock)
    faults.fail(2, fault="error_after", operations=["upsert_latest"])
    with faults.outage("hang") as down:
        assert_type(down, Faults)
    stack = on_clock(Cached(Recorded(Slow(ReadOnly(faults)))), clock)
    async with record(stack) as path:
        await stack.get_latest("u-1")
    assert_type(path[0].outcome, str)
    assert_type(await check_store(Mine), Report)
    assert_type(await check_layer(lambda inner: Slow(inner, seconds=0)), Report)
    assert_type(await check_layer(lambda: Slow(MemoryStore(), seconds=0)), Report)

    async def scenario(schedule: Schedule) -> None:
        await schedule.clock.sleep(1)

    explore(scenario, schedules=10)


asyncio.run(use(compose()))
