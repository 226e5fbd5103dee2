"""What each rule of the linter warns of, done and seen.

Every test runs the stack that the rule finds and observes what goes wrong, and for most the right
one beside it. The rules about Redis itself are in ``tests/integration/test_lint_harm_redis.py``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import pytest

from layered_store.config import lint
from layered_store.errors import (
    CircuitOpenError,
    StoreError,
    StoreTimeoutError,
    UnavailableError,
    UnsupportedError,
)
from layered_store.interface import Op, StateStore
from layered_store.layer import AroundLayer
from layered_store.layers.bulkhead import Bulkhead
from layered_store.layers.cached import Cached
from layered_store.layers.circuit_breaker import CircuitBreaker
from layered_store.layers.fallback import Fallback
from layered_store.layers.metrics import Metrics
from layered_store.layers.retry import Retry
from layered_store.layers.timeout import Timeout
from layered_store.layers.write_through import WriteThrough
from layered_store.snapshot import StateSnapshot
from layered_store.stores.memory import MemoryStore
from layered_store.stores.sql import SQLStore
from layered_store.testing.clock import FakeClock
from layered_store.testing.faults import Faults
from layered_store.testing.scripted import Gate, Scripted, Takes

OLD, NEW = StateSnapshot("u", axes={"a": 0.1}), StateSnapshot("u", axes={"a": 0.9})


def rules(stack: StateStore, **options: Any) -> set[str]:
    return {finding.rule for finding in lint(stack, **options)}


def down(calls: int = 99) -> Scripted:
    return Scripted(*(UnavailableError("down") for _ in range(calls)))


def impatient(inner: StateStore, clock: FakeClock, **options: Any) -> Retry:
    return Retry(inner, base_delay=0, max_delay=0, clock=clock, **options)


async def ends(call: Any, clock: FakeClock, seconds: float) -> Any:
    """What a call gives when so much time goes by; None while it still waits."""
    task = asyncio.ensure_future(call)
    await clock.advance(seconds)
    if task.done():
        return task.exception() or task.result()
    task.cancel()
    return None


async def test_ls001_a_call_that_hangs_is_never_repeated() -> None:
    """Without a limit below, a hanging first attempt is the only one, for ever."""
    clock = FakeClock()
    wrong, right = Scripted(Gate()), Scripted(Gate(), NEW)
    stack = impatient(wrong, clock)
    assert "LS001" in rules(stack)
    assert await ends(stack.get_latest("u"), clock, 3600) is None
    assert len(wrong.calls) == 1
    limited = impatient(Timeout(right, seconds=1, clock=clock), clock)
    assert "LS001" not in rules(limited)
    assert await ends(limited.get_latest("u"), clock, 3600) == NEW


async def test_ls002_the_first_attempt_uses_up_the_limit() -> None:
    """A limit outside alone ends the call with its first attempt."""
    clock = FakeClock()
    wrong, right = Scripted(Gate(), NEW), Scripted(Gate(), NEW)
    stack = Timeout(impatient(wrong, clock), seconds=3, clock=clock)
    assert "LS002" in rules(stack)
    assert isinstance(await ends(stack.get_latest("u"), clock, 10), StoreTimeoutError)
    assert len(wrong.calls) == 1
    attempt = Timeout(right, seconds=1, clock=clock)
    limited = Timeout(impatient(attempt, clock, attempts=2), seconds=3, clock=clock)
    assert not rules(limited) & {"LS002", "LS007"}
    assert await ends(limited.get_latest("u"), clock, 10) == NEW


async def test_ls003_the_layer_above_never_sees_a_failure() -> None:
    """A retry above a fallback repeats nothing, and a breaker there never opens."""
    clock, first = FakeClock(), Scripted(UnavailableError("down"), NEW)
    spare = MemoryStore()
    await spare.upsert_latest(OLD)
    stack = impatient(Fallback(first, secondary=spare), clock)
    assert "LS003" in rules(stack)
    assert await stack.get_latest("u") == OLD
    right = Fallback(
        impatient(Scripted(UnavailableError("down"), NEW), clock), secondary=MemoryStore()
    )
    assert "LS003" not in rules(right)
    assert await right.get_latest("u") == NEW
    breaker = CircuitBreaker(Fallback(down(), secondary=spare), minimum_calls=1, clock=clock)
    assert "LS003" in rules(breaker)
    for _ in range(20):
        assert await breaker.get_latest("u") == OLD


class Driver(StateStore):
    """A backend whose driver repeats each call."""

    driver_retries = 3

    def __init__(self) -> None:
        self.tries = 0

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        self.tries += self.driver_retries + 1
        raise UnavailableError("down")

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        await self.get_latest(snapshot.user_id)


async def test_ls004_retries_multiply() -> None:
    """Three attempts of a driver that repeats three times are twelve."""
    driver = Driver()
    stack = impatient(driver, FakeClock())
    assert "LS004" in rules(stack)
    with pytest.raises(UnavailableError):
        await stack.get_latest("u")
    assert driver.tries == 12


async def test_ls005_nested_retries_multiply() -> None:
    """Three attempts of three are nine."""
    clock, wrong, right = FakeClock(), down(), down()
    stack = impatient(impatient(wrong, clock), clock)
    assert "LS005" in rules(stack)
    for store in (stack, impatient(right, clock)):
        with pytest.raises(UnavailableError):
            await store.get_latest("u")
    assert (len(wrong.calls), len(right.calls)) == (9, 3)


@dataclass(eq=False, repr=False)
class Stubborn(AroundLayer):
    """A third party's retry layer that repeats whatever it is told to."""

    retry_on: tuple[type[Exception], ...] = field(default=(StoreError,), kw_only=True)
    attempts: int = field(default=5, kw_only=True)
    kind: ClassVar[str] = "retry"
    tried: int = field(default=0, init=False)

    async def around(self, op: Op, method: Any, /, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        for attempt in range(self.attempts):
            self.tried += 1
            try:
                return await method(*args, **kwargs)
            except self.retry_on:
                if attempt == self.attempts - 1:
                    raise
        return None


async def test_ls006_an_open_circuit_is_asked_again_and_again() -> None:
    """All attempts are wasted on a breaker that refuses them; ours gives up at the first."""
    clock = FakeClock()
    breaker = CircuitBreaker(down(), minimum_calls=1, clock=clock)
    stack, right = Stubborn(breaker), impatient(breaker, clock)
    assert "LS006" in rules(stack)
    assert "LS006" not in rules(right)
    with pytest.raises(StoreError):
        await breaker.get_latest("u")
    with pytest.raises(CircuitOpenError):
        await stack.get_latest("u")
    assert stack.tried == 5
    assert "LS006" not in rules(Stubborn(breaker, retry_on=(UnavailableError,)))


async def test_ls007_the_last_attempts_never_come() -> None:
    """The limit outside ends the call before the third attempt, which would have succeeded."""
    clock = FakeClock()
    wrong, right = Scripted(Gate(), Gate(), NEW), Scripted(Gate(), Gate(), NEW)
    attempt = Timeout(wrong, seconds=1, clock=clock)
    stack = Timeout(impatient(attempt, clock), seconds=2, clock=clock)
    assert "LS007" in rules(stack)
    assert isinstance(await ends(stack.get_latest("u"), clock, 10), StoreTimeoutError)
    limited = Timeout(
        impatient(Timeout(right, seconds=1, clock=clock), clock), seconds=4, clock=clock
    )
    assert "LS007" not in rules(limited)
    assert await ends(limited.get_latest("u"), clock, 10) == NEW


async def test_ls011_other_processes_show_late() -> None:
    """What another process wrote, or erased, does not show until the TTL is over."""
    shared, clock = MemoryStore(), FakeClock()
    mine, other = Cached(shared, ttl=60, clock=clock), Cached(shared, ttl=60, clock=clock)
    await mine.upsert_latest(OLD)
    await mine.get_latest("u")
    await other.delete("u")
    assert await mine.get_latest("u") == OLD
    await clock.advance(61)
    assert await mine.get_latest("u") is None
    tier = Driver()
    assert "LS011" in rules(Cached(WriteThrough(tier, origin=MemoryStore())))


class Wrapper(StateStore):
    """A third party's layer that forwards what it must and does not say what it wraps."""

    def __init__(self, wrapped: StateStore) -> None:
        self.wrapped = wrapped

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        await self.wrapped.upsert_latest(snapshot)

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        return await self.wrapped.get_latest(user_id)


async def test_ls017_what_is_inside_is_hidden() -> None:
    """The history is there and not shown, health is made up, and nobody can be erased."""
    memory = MemoryStore()
    await memory.upsert_latest(NEW)
    stack = Wrapper(memory)
    assert "LS017" in rules(stack)
    (finding,) = [each for each in lint(Cached(stack)) if each.rule == "LS017"]
    for hidden in ("delete", "get_history", "health"):
        assert hidden in finding.reason
    assert await stack.get_history("u", 5) == []
    assert await Wrapper(Scripted(healthy=False)).health_check()
    with pytest.raises(UnsupportedError):
        await stack.delete("u")


async def test_ls022_a_restart_forgets_everybody() -> None:
    """What memory acknowledged is gone with the process."""
    stack = Cached(MemoryStore())
    assert "LS022" in rules(stack)
    await stack.upsert_latest(NEW)
    await stack.aclose()
    assert await Cached(MemoryStore()).get_latest("u") is None


async def test_ls022_a_fallback_of_memory_calls_users_absent() -> None:
    """While inner is away nobody is told so: the user does not exist."""
    stack = Fallback(Scripted(None, UnavailableError("down")), secondary=MemoryStore())
    assert "LS022" in rules(stack)
    await stack.upsert_latest(NEW)
    assert await stack.get_latest("u") is None


async def test_ls023_hits_are_not_counted() -> None:
    """Metrics inside the cache see one read of a hundred at most."""
    from prometheus_client import CollectorRegistry

    def counted(registry: CollectorRegistry) -> float:
        labels = {"stack": "s", "operation": "get_latest", "outcome": "ok"}
        return registry.get_sample_value("layered_store_operations_total", labels) or 0.0

    inside, outside = CollectorRegistry(), CollectorRegistry()
    wrong = Cached(Metrics(MemoryStore(), name="s", registry=inside))
    right = Metrics(Cached(MemoryStore()), name="s", registry=outside)
    assert "LS023" in rules(wrong)
    assert "LS023" in rules(Cached(MemoryStore()))
    assert "LS023" not in rules(right)
    for stack in (wrong, right):
        await stack.upsert_latest(NEW)
        for _ in range(100):
            await stack.get_latest("u")
    assert counted(inside) <= 1
    assert counted(outside) == 100


async def test_ls025_one_breaker_for_two_stories() -> None:
    """A breaker that stands in two places opens for the healthy side as well."""
    clock, broken = FakeClock(), down(1)
    shared = CircuitBreaker(broken, minimum_calls=1, clock=clock)
    stack = Fallback(shared, secondary=shared)
    assert "LS025" in rules(stack)
    with pytest.raises(StoreError):
        await stack.get_latest("u")
    # The store below answers again, and neither side asks it.
    with pytest.raises(CircuitOpenError):
        await stack.get_latest("u")
    assert len(broken.calls) == 1


async def test_ls026_calls_queue_unseen(tmp_path: Path) -> None:
    """The bulkhead lets four in and refuses nobody; three of them wait for one connection."""
    clock, place = FakeClock(), asyncio.Semaphore(1)

    class Pool(Scripted):
        pool_size = 1

        async def get_latest(self, user_id: str) -> StateSnapshot | None:
            async with place:
                return await super().get_latest(user_id)

    store = Pool(*(Takes(clock, 1) for _ in range(4)))
    stack = Bulkhead(store, max_in_flight=4)
    assert "LS026" in rules(stack)
    tasks = [asyncio.ensure_future(stack.get_latest("u")) for _ in range(4)]
    await clock.advance(0.5)
    assert store.most_inside == 1
    await clock.advance(3)
    assert not tasks[3].done()
    await clock.advance(1)
    assert all(task.done() for task in tasks)

    from sqlalchemy.ext.asyncio import create_async_engine
    from sqlalchemy.pool import AsyncAdaptedQueuePool

    engine = create_async_engine(
        f"sqlite+aiosqlite:///{tmp_path}/a.db",
        poolclass=AsyncAdaptedQueuePool,
        pool_size=2,
        max_overflow=1,
    )
    assert "LS026" in rules(Bulkhead(SQLStore(engine=engine), max_in_flight=4))
    assert "LS026" not in rules(Bulkhead(SQLStore(engine=engine), max_in_flight=3))
    await engine.dispose()


async def test_ls027_hits_take_places() -> None:
    """A hit waits behind misses, or is refused, though it needs no backend."""
    clock = FakeClock()

    def misses() -> list[Takes]:
        return [Takes(clock, 9) for _ in range(3)]

    async def hit(stack: StateStore) -> Any:
        await stack.upsert_latest(StateSnapshot("cached"))
        await stack.get_latest("cached")
        slow = [asyncio.ensure_future(stack.get_latest(f"u-{n}")) for n in range(3)]
        await clock.advance(1)
        found = await ends(stack.get_latest("cached"), clock, 0)
        await clock.advance(30)
        await asyncio.gather(*slow)
        return found

    wrong = Bulkhead(Cached(Scripted(None, *misses()), clock=clock), max_in_flight=3)
    right = Cached(Bulkhead(Scripted(None, *misses()), max_in_flight=3), clock=clock)
    assert "LS027" in rules(wrong)
    assert "LS027" not in rules(right)
    assert isinstance(await hit(wrong), StoreError)
    assert (await hit(right)).user_id == "cached"


async def test_ls028_calls_fail_on_purpose() -> None:
    """A stack with faults in it fails by design."""
    stack = Faults(MemoryStore(), seed=1, error=1.0)
    assert "LS028" in rules(stack)
    with pytest.raises(StoreError):
        await stack.get_latest("u")


async def test_ls034_an_answer_older_than_is_acceptable() -> None:
    """An old answer is given long after what the application said it can accept."""
    clock, backend = FakeClock(), Scripted(NEW, *(UnavailableError("down") for _ in range(9)))
    stack = Cached(backend, ttl=60, stale_if_error=600, clock=clock)
    assert "LS034" in rules(stack, max_staleness=300)
    await stack.get_latest("u")
    await clock.advance(301)
    assert await stack.get_latest("u") == NEW
    assert "LS034" not in rules(Cached(backend, ttl=60, stale_if_error=240), max_staleness=300)


async def test_ls037_everybody_repeats_for_himself() -> None:
    """Fifty callers of one user share each load; outside the cache they each repeat it."""
    clock = FakeClock()

    def failing() -> Scripted:
        return Scripted(*(Takes(clock, 0.01, UnavailableError("down")) for _ in range(200)))

    def retry(inner: StateStore) -> Retry:
        return Retry(inner, base_delay=1, max_delay=1, clock=clock, budget=None, random=Random(1))

    async def calls(stack: StateStore, backend: Scripted) -> int:
        tasks = [asyncio.ensure_future(stack.get_latest("u")) for _ in range(50)]
        await clock.advance(60)
        await asyncio.gather(*tasks, return_exceptions=True)
        return len(backend.calls)

    outside, inside = failing(), failing()
    wrong, right = retry(Cached(outside, clock=clock)), Cached(retry(inside), clock=clock)
    assert "LS037" in rules(wrong)
    assert "LS037" not in rules(right)
    assert await calls(right, inside) == 3
    assert await calls(wrong, outside) > 30


async def test_ls038_the_breaker_sees_less() -> None:
    """Outside the retry a breaker of two failures lets six attempts through; inside, two."""
    clock, outside, inside = FakeClock(), down(), down()
    wrong = CircuitBreaker(impatient(outside, clock), minimum_calls=2, clock=clock)
    right = impatient(CircuitBreaker(inside, minimum_calls=2, clock=clock), clock)
    assert "LS038" in rules(wrong)
    assert "LS038" not in rules(right)
    for stack in (wrong, right):
        for _ in range(5):
            with pytest.raises(StoreError):
                await stack.get_latest("u")
    assert (len(outside.calls), len(inside.calls)) == (6, 2)


async def test_ls039_all_are_loaded_at_once() -> None:
    """What was stored together expires together: one moment brings all loads, the rest none."""

    async def most_at_once(jitter: float) -> int:
        clock, backend = FakeClock(), Scripted()
        stack = Cached(backend, ttl=100, ttl_jitter=jitter, random=Random(1), clock=clock)
        loads = []
        for _ in range(40):
            before = len(backend.calls)
            for number in range(100):
                backend.steps[:] = [StateSnapshot(f"u-{number}")]
                await stack.get_latest(f"u-{number}")
            loads.append(len(backend.calls) - before)
            await clock.advance(5)
        return max(loads[1:])  # the first ones find nothing

    assert "LS039" in rules(Cached(Scripted()))
    assert "LS039" not in rules(Cached(Scripted(), ttl_jitter=0.1))
    assert await most_at_once(0.0) == 100
    assert await most_at_once(0.5) < 40


async def test_ls040_lifetimes_add_up() -> None:
    """An answer of two caches is older than either would give."""
    clock, shared = FakeClock(), MemoryStore()
    below = Cached(shared, ttl=10, clock=clock)
    stack = Cached(below, ttl=10, clock=clock)
    assert "LS040" in rules(stack)
    await shared.upsert_latest(OLD)
    await below.get_latest("u")
    await shared.upsert_latest(NEW)
    await clock.advance(9)
    await stack.get_latest("u")
    await clock.advance(9)
    assert await stack.get_latest("u") == OLD


def test_rules_judge_third_parties_too() -> None:
    """A kind or an attribute is enough: no rule asks for our classes."""

    @dataclass(eq=False, repr=False)
    class TheirTimeout(AroundLayer):
        seconds: float = field(default=1.0, kw_only=True)
        kind: ClassVar[str] = "timeout"

        async def around(self, op: Op, method: Any, /, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
            return await method(*args, **kwargs)

    class Quick(Driver):
        time_limit = 0.5
        driver_retries = 0

    assert "LS001" in rules(Retry(Scripted()))
    assert "LS001" not in rules(Retry(TheirTimeout(Scripted())))
    assert "LS001" not in rules(Retry(Quick()))
    assert "LS004" not in rules(Retry(Quick()))
    # Each way down is judged for itself: the limit of one tier does not help the other.
    assert "LS001" in rules(Retry(WriteThrough(TheirTimeout(Scripted()), origin=Scripted())))


class Two(StateStore):
    """A third party's layer with stores in roles of its own."""

    def __init__(self, **stores: StateStore) -> None:
        self._stores = stores

    def children(self) -> Mapping[str, StateStore]:
        return self._stores

    async def upsert_latest(self, snapshot: StateSnapshot) -> None: ...

    async def get_latest(self, user_id: str) -> StateSnapshot | None: ...


def test_places_name_the_way() -> None:
    """A finding's place is the roles from the outermost block down."""
    stack = Two(left=MemoryStore(), right=Two(inner=Retry(Scripted())))
    places = {finding.rule: finding.place for finding in lint(stack)}
    assert places["LS001"] == "right.inner (retry)"
    assert [f.place for f in lint(stack) if f.rule == "LS017"] == ["outermost (two)", "right (two)"]
