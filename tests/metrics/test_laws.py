"""The laws of the metrics, under random faults, cancellations and interleavings.

An independent count stands beside each tier; what the tiers report must agree with it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from layered_store import (
    Bulkhead,
    Cached,
    CircuitBreaker,
    Fallback,
    MemoryStore,
    Metrics,
    Retry,
    StateSnapshot,
    StateStore,
    Timeout,
    ValidationError,
    WriteThrough,
)
from layered_store.errors import (
    CorruptDataError,
    OverloadedError,
    StoreError,
    StoreTimeoutError,
    UnavailableError,
)
from layered_store.interface import Op
from layered_store.layer import AroundLayer, Layer
from layered_store.testing.explore import LoopClock, Schedule, explore

USERS = [f"u-{number}" for number in range(4)]
FAULTS: list[Callable[[], Exception]] = [
    lambda: UnavailableError("away"),
    lambda: StoreTimeoutError("slow"),
    lambda: OverloadedError("full"),
    lambda: CorruptDataError("bad"),
    lambda: RuntimeError("a bug"),
    lambda: TimeoutError("somebody else's"),
]


@dataclass(eq=False, repr=False)
class Faulty(AroundLayer):
    """Fails before or after the call took effect, or takes long, by chance."""

    random: Random = field(kw_only=True)
    clock: LoopClock = field(kw_only=True)
    share: float = field(default=0.3, kw_only=True)

    async def around(
        self, op: Op, method: Callable[..., Awaitable[Any]], /, *args: Any, **kwargs: Any
    ) -> Any:
        await self.clock.sleep(self.random.choice((0.0, 0.0, 0.01, 0.2)))
        if self.random.random() < self.share / 2:
            raise self.random.choice(FAULTS)()
        result = await method(*args, **kwargs)
        await self.clock.sleep(self.random.choice((0.0, 0.01)))
        if self.random.random() < self.share / 2:
            raise self.random.choice(FAULTS)()
        return result


@dataclass(eq=False, repr=False)
class Beside(Layer):
    """Counts by itself the reads that ended at the store below, user by user."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.ended = self.raised = 0

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        return await self._note(1, self.inner.get_latest(user_id), alone=True)

    async def get_latest_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        wanted = list(user_ids)
        return await self._note(len(set(wanted)), self.inner.get_latest_many(wanted))

    async def _note(self, users: int, call: Awaitable[Any], *, alone: bool = False) -> Any:
        try:
            result = await call
        except ValidationError:
            raise
        except Exception:
            self.ended += users
            # Of a batch that failed, those whose state was at hand already were hits.
            self.raised += alone
            raise
        self.ended += users
        return result


def shapes(schedule: Schedule) -> dict[str, tuple[StateStore, list[Beside]]]:
    """Stacks of every kind of tier, each tier with a count beside it."""
    random, clock = schedule.random, schedule.clock
    marks: list[Beside] = []

    def beside(store: StateStore) -> Beside:
        marks.append(Beside(store))
        return marks[-1]

    def backend(share: float = 0.3) -> StateStore:
        return Faulty(beside(MemoryStore(clock=clock)), random=random, clock=clock, share=share)

    kind = random.choice(("cache", "tiers", "all"))
    if kind == "cache":
        stack: StateStore = beside(
            Cached(
                backend(),
                ttl=0.5,
                negative_ttl=random.choice((0.0, 0.3)),
                stale_if_error=random.choice((0.0, 1.0)),
                refresh_ahead=random.choice((None, 0.5)),
                clock=clock,
            )
        )
    elif kind == "tiers":
        stack = beside(WriteThrough(backend(0.5), origin=backend(), clock=clock))
    else:
        primary = Retry(
            CircuitBreaker(
                Timeout(backend(), seconds=0.15, clock=clock), minimum_calls=4, clock=clock
            ),
            attempts=2,
            clock=clock,
        )
        middle = beside(
            WriteThrough(
                Bulkhead(backend(0.6), max_in_flight=2, clock=clock),
                origin=Fallback(primary, secondary=MemoryStore(clock=clock)),
                clock=clock,
            )
        )
        stack = beside(Cached(middle, ttl=0.3, negative_ttl=0.1, clock=clock))
    return {kind: (stack, marks)}


async def one_call(
    stack: StateStore,
    random: Random,
    outcomes: Counter[str],
    users: Sequence[str],
    *,
    batches: bool,
) -> None:
    outcomes["begun"] += 1  # a task that is cancelled before its first step makes no call
    user = random.choice(users)
    kind = random.choice((0, 1, 2, 3, 4, 5, 6, 7) if batches else (0, 1, 2, 3, 5, 6, 7))
    if kind < 4:
        await stack.get_latest(user)
    elif kind == 4:
        await stack.get_latest_many(random.choices(users, k=3))
    elif kind == 5:
        await stack.upsert_latest(StateSnapshot(user, axes={"warmth": 0.5}))
    elif kind == 6:
        await stack.delete(user)
    else:
        await stack.get_latest("not a user id!")


async def caller(
    stack: StateStore,
    schedule: Schedule,
    outcomes: Counter[str],
    cancelled: bool,
    users: Sequence[str] = USERS,
) -> None:
    for _ in range(4):
        call = asyncio.ensure_future(
            one_call(stack, schedule.random, outcomes, users, batches=not cancelled)
        )
        if cancelled and schedule.random.random() < 0.4:
            await schedule.clock.sleep(schedule.random.choice((0.0, 0.01, 0.1)))
            call.cancel()
        try:
            await call
            outcomes["ok"] += 1
        except asyncio.CancelledError:
            outcomes["cancelled"] += 1
        except ValidationError:
            outcomes["invalid"] += 1
        except (StoreError, RuntimeError, TimeoutError):
            outcomes["failed"] += 1


def samples(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in registry.collect()
        for sample in family.samples
    }


async def scenario(schedule: Schedule, *, cancelled: bool) -> None:
    (stack, marks) = next(iter(shapes(schedule).values()))
    registry = CollectorRegistry()
    front = Metrics(stack, name="front", registry=registry, clock=schedule.clock)
    seen: Counter[str] = Counter()
    await asyncio.gather(*(caller(front, schedule, seen, cancelled) for _ in range(4)))
    await schedule.clock.sleep(5)  # refreshes and cut off calls come to an end
    figures = samples(registry)

    # Every call has exactly one outcome, and the one that its caller saw.
    outcomes: Counter[str] = Counter()
    by_operation: Counter[str] = Counter()
    for (name, *labels), value in figures.items():
        if name == "layered_store_operations_total":
            outcomes[labels[2]] += int(value)
            by_operation[labels[1]] += int(value)
    seen["cancelled"] -= sum(seen.values()) - 2 * seen["begun"]  # those that never began
    assert sum(outcomes.values()) == seen["begun"]
    failed = sum(outcomes[each] for each in ("unavailable", "timeout", "rejected", "error"))
    assert (outcomes["ok"], outcomes["invalid"]) == (seen["ok"], seen["invalid"])
    assert failed + outcomes["cancelled"] == seen["failed"] + seen["cancelled"]
    if not cancelled:
        assert failed == seen["failed"]

    # A histogram's count is the number of calls, its buckets are cumulative.
    for operation, count in by_operation.items():
        cells = [
            value
            for (name, *labels), value in figures.items()
            if name == "layered_store_operation_duration_seconds_bucket" and labels[1] == operation
        ]
        assert cells == sorted(cells)
        assert (cells[-1] if cells else 0) == count

    assert figures["layered_store_operations_in_flight", "front"] == 0

    # Reads of a tier: hits, misses, negative hits, stale ones and errors, each user once.
    for mark in marks:
        tier = mark.inner
        reads = {s.labels[0]: int(s.value) for s in tier.samples() if s.metric == "reads"}
        if isinstance(tier, WriteThrough | Cached):
            assert reads["error"] >= mark.raised  # an error is never a miss
        else:
            assert reads["error"] == 0  # nothing below the faults fails
        assert sum(reads.values()) == mark.ended, (type(tier).__name__, reads)


@pytest.mark.parametrize("cancelled", [False, True], ids=["faults", "cancellations"])
def test_laws_hold_under_faults_in_every_interleaving(cancelled: bool) -> None:
    """Outcomes, histogram counts, reads of every tier and calls in flight, in 400 schedules."""

    async def run(schedule: Schedule) -> None:
        await scenario(schedule, cancelled=cancelled)

    explore(run, schedules=400, seed=1)


@pytest.mark.parametrize("time_hits", ["sampled", "all"])
def test_laws_hold_on_the_fused_path_of_hits(time_hits: str) -> None:
    """Where a hit passes all layers in one coroutine, through two views and a breaker."""

    async def run(schedule: Schedule) -> None:
        registry, clock = CollectorRegistry(), schedule.clock
        below = Faulty(MemoryStore(clock=clock), random=schedule.random, clock=clock, share=0.2)
        cache = Cached(below, ttl=0.4, stale_if_error=0.2, clock=clock)
        limited = Timeout(cache, seconds=9, clock=clock)
        back = Metrics(limited, name="back", registry=registry, clock=clock)
        front = Metrics(
            CircuitBreaker(back, minimum_calls=6, open_for=0.1, clock=clock),
            name="front",
            registry=registry,
            time_hits=time_hits,
            clock=clock,
        )
        seen: Counter[str] = Counter()
        await asyncio.gather(*(caller(front, schedule, seen, True) for _ in range(6)))
        figures = samples(registry)
        ended = {}
        for name in ("front", "back"):
            calls = {
                key[3]: int(value)
                for key, value in figures.items()
                if key[:3] == ("layered_store_operations_total", name, "get_latest")
            }
            count = ("layered_store_operation_duration_seconds_count", name, "get_latest")
            assert figures.get(count, 0) == sum(calls.values())
            assert figures["layered_store_operations_in_flight", name] == 0
            ended[name] = sum(calls.values()) - calls.get("invalid", 0) - calls.get("cancelled", 0)
            ended[name] -= calls.get("rejected", 0) if name == "front" else 0
        reads = {s.labels[0]: int(s.value) for s in cache.samples() if s.metric == "reads"}
        assert sum(reads.values()) == ended["back"] >= ended["front"]
        hits.append(reads["hit"])

    hits: list[int] = []
    explore(run, schedules=300, seed=11)
    assert sum(hits) > 200


def test_followers_of_a_load_count_once_each() -> None:
    """A thousand callers of one cold user: a thousand misses, one load, 999 waits."""

    async def run(schedule: Schedule) -> None:
        below = MemoryStore(clock=schedule.clock)
        slow = Faulty(below, random=schedule.random, clock=schedule.clock, share=0.0)
        cache = Cached(slow, clock=schedule.clock)
        await asyncio.gather(*(cache.get_latest("u-1") for _ in range(1_000)))
        figures = {(s.metric, *s.labels): s.value for s in cache.samples()}
        assert figures["reads", "miss"] == 1_000
        assert figures["read_waits",] == 999
        assert {s.labels[0]: s.value for s in below.samples()}["miss"] == 1

    explore(run, schedules=3)


def test_followers_of_a_failed_load_are_errors_and_no_misses() -> None:
    """Alone and in a batch; also those of a batch that joined the load."""

    async def run(schedule: Schedule) -> None:
        broken = Faulty(
            MemoryStore(clock=schedule.clock),
            random=schedule.random,
            clock=schedule.clock,
            share=2.0,
        )
        cache = Cached(broken, clock=schedule.clock)
        calls = [cache.get_latest("u-1") for _ in range(5)]
        calls += [cache.get_latest_many(["u-1", "u-2", "u-1"]) for _ in range(3)]  # type: ignore[misc]
        await asyncio.gather(*calls, return_exceptions=True)
        reads = {s.labels[0]: s.value for s in cache.samples() if s.metric == "reads"}
        assert reads == {"hit": 0, "miss": 0, "negative_hit": 0, "stale": 0, "error": 11}

    explore(run, schedules=50)


async def test_a_hundred_thousand_users_leave_the_number_of_series_unchanged() -> None:
    """Labels have few values, whatever the users do."""
    registry = CollectorRegistry()
    stack = Metrics(
        Cached(WriteThrough(MemoryStore(), origin=MemoryStore()), max_entries=500),
        name="users",
        registry=registry,
    )

    async def use(first: int, last: int) -> None:
        for number in range(first, last):
            await stack.get_latest(f"u-{number}")
        await stack.upsert_latest(StateSnapshot(f"u-{first}", axes={"warmth": 0.1}))
        await stack.get_history(f"u-{first}", 1)
        await stack.delete(f"u-{first}")

    await stack.upsert_latest(StateSnapshot("u-0"))
    await stack.get_latest_many(["u-0"])
    await stack.upsert_latest_many([StateSnapshot("u-0")])
    await use(0, 10)
    for number in range(1_000):  # fill it, so that it evicts
        await stack.upsert_latest(StateSnapshot(f"w-{number}"))
    before = set(samples(registry))
    await use(10, 100_000)
    assert set(samples(registry)) == before
    text = " ".join(str(key) for key in before)
    assert "u-0" not in text
    assert "w-1" not in text
