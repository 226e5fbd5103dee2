"""Metrics: what is counted, under which names, and when it comes and goes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse

from layered_store import (
    Bulkhead,
    Cached,
    CircuitBreaker,
    ConfigError,
    Fallback,
    HealthReport,
    HealthStatus,
    Layer,
    MemoryStore,
    Metrics,
    RedisStore,
    Retry,
    SQLStore,
    StateSnapshot,
    StateStore,
    Timeout,
    WriteThrough,
    describe,
)
from layered_store.errors import (
    CircuitOpenError,
    ClosedError,
    CorruptDataError,
    ErasureIncompleteError,
    OverloadedError,
    StoreTimeoutError,
    UnavailableError,
    UnsupportedError,
    ValidationError,
)
from layered_store.hotpath import hot_path_of
from layered_store.metrics.catalogue import CATALOGUE, DURATION_BUCKETS
from layered_store.metrics.prometheus import _exporters, exposition
from layered_store.metrics.timings import HitTimings, Timings
from layered_store.stats import Sample
from layered_store.testing.clock import FakeClock
from layered_store.testing.scripted import Gate, Scripted, Takes

PROMISED = {
    "layered_store_operations_total": ("counter", {"stack", "operation", "outcome"}),
    "layered_store_operation_duration_seconds": ("histogram", {"stack", "operation"}),
    "layered_store_operations_in_flight": ("gauge", {"stack"}),
    "layered_store_reads_total": ("counter", {"stack", "layer", "result"}),
    "layered_store_read_waits_total": ("counter", {"stack", "layer"}),
    "layered_store_cache_entries": ("gauge", {"stack", "layer"}),
    "layered_store_cache_evictions_total": ("counter", {"stack", "layer", "reason"}),
    "layered_store_invalidations_total": ("counter", {"stack", "layer", "reason"}),
    "layered_store_retries_total": ("counter", {"stack", "layer", "operation", "outcome"}),
    "layered_store_circuit_state": ("gauge", {"stack", "layer"}),
    "layered_store_fallbacks_total": ("counter", {"stack", "layer", "operation"}),
    "layered_store_pending_repairs": ("gauge", {"stack", "layer"}),
    "layered_store_health_status": ("gauge", {"stack", "layer"}),
}


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def figures(registry: CollectorRegistry, name: str, **labels: str) -> dict[tuple[str, ...], float]:
    """Return the samples of one name, by the values of the labels that are not given."""
    return {
        tuple(value for key, value in sample.labels.items() if key not in labels): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    }


def outcomes(registry: CollectorRegistry, operation: str) -> dict[str, float]:
    """Return the outcomes of an operation that happened."""
    counted = figures(registry, "layered_store_operations_total", operation=operation)
    return {key[-1]: value for key, value in counted.items() if value}


# Names


def test_the_catalogue_has_every_promised_metric() -> None:
    """Name, type and labels are those of the contract."""
    known = {
        metric.name + ("_total" if metric.kind == "counter" else ""): (
            metric.kind,
            set(metric.all_labels),
        )
        for metric in CATALOGUE.values()
    }
    assert PROMISED.items() <= known.items()
    assert all(name.startswith("layered_store_") for name in known)


async def test_every_metric_is_exported_with_its_type_help_and_labels(
    registry: CollectorRegistry,
) -> None:
    """What a scrape shows is what the catalogue says, in both formats."""
    breaker = CircuitBreaker(Timeout(Retry(MemoryStore()), seconds=1))
    middle = WriteThrough(breaker, origin=Fallback(MemoryStore(), secondary=MemoryStore()))
    stack = Metrics(Cached(Bulkhead(middle, max_in_flight=5)), name="all", registry=registry)
    await stack.upsert_latest(StateSnapshot("u-1"))
    await stack.get_latest("u-1")
    await stack.health_report()
    by_name = {metric.name: metric for metric in CATALOGUE.values()}
    for families in (
        list(parse(generate_latest(registry).decode())),
        list(parse_open(generate_openmetrics(registry).decode())),
    ):
        assert {family.name for family in families} == set(by_name)
        for family in families:
            metric = by_name[family.name]
            assert (family.type, family.documentation) == (metric.kind, metric.help)
            for sample in family.samples:
                assert set(sample.labels) - {"le"} == set(metric.all_labels)


# Outcomes


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "ok"),
        (ValidationError("bad"), "invalid"),
        (UnavailableError("away"), "unavailable"),
        (ErasureIncompleteError(), "unavailable"),
        (StoreTimeoutError("slow"), "timeout"),
        (TimeoutError("a third party's"), "timeout"),
        (CircuitOpenError(), "rejected"),
        (OverloadedError("full"), "rejected"),
        (CorruptDataError("bad"), "error"),
        (ClosedError("closed"), "error"),
        (UnsupportedError("no"), "error"),
        (RuntimeError("a bug"), "error"),
        (asyncio.CancelledError(), "cancelled"),
    ],
)
async def test_each_call_has_the_outcome_of_what_it_raised(
    registry: CollectorRegistry, error: BaseException | None, outcome: str
) -> None:
    """One call, one outcome, one observation."""
    stack = Metrics(Scripted(error), name="s", registry=registry)
    if error is None:
        await stack.get_latest("u-1")
    else:
        with pytest.raises(type(error)):
            await stack.get_latest("u-1")
    assert outcomes(registry, "get_latest") == {outcome: 1}
    name = "layered_store_operation_duration_seconds_count"
    assert figures(registry, name) == {("s", "get_latest"): 1}


async def test_every_operation_is_counted_under_its_name(registry: CollectorRegistry) -> None:
    """Those of a batch once for the whole of it."""
    stack = Metrics(MemoryStore(), name="s", registry=registry)
    await stack.upsert_latest(StateSnapshot("u-1"))
    await stack.upsert_latest_many([StateSnapshot("u-1")])
    await stack.get_latest("u-1")
    await stack.get_latest_many(["u-1", "u-2"])
    await stack.get_history("u-1", 5)
    await stack.delete("u-1")
    counted = figures(registry, "layered_store_operations_total", outcome="ok")
    assert {key[-1]: value for key, value in counted.items()} == dict.fromkeys(
        (
            *("upsert_latest", "upsert_latest_many", "get_latest", "get_latest_many"),
            *("get_history", "delete"),
        ),
        1,
    )


async def test_the_share_of_success_can_be_told_when_nothing_ever_succeeded(
    registry: CollectorRegistry,
) -> None:
    """``ok`` is there at 0; a share of a missing series would be no answer at all."""
    stack = Metrics(Scripted(UnavailableError("away")), name="s", registry=registry)
    with pytest.raises(UnavailableError):
        await stack.delete("u-1")
    counted = figures(registry, "layered_store_operations_total", operation="delete")
    assert counted == {("s", "ok"): 0, ("s", "unavailable"): 1}


async def test_a_call_in_flight_shows_and_a_cancelled_one_is_counted(
    registry: CollectorRegistry,
) -> None:
    """Cancellation is an outcome; nothing stays in flight."""
    for operation in ("get_latest", "delete"):
        gate = Gate()
        stack = Metrics(Scripted(gate), name=operation, registry=registry)
        call = asyncio.create_task(getattr(stack, operation)("u-1"))
        await gate.entered.wait()
        flying = figures(registry, "layered_store_operations_in_flight", stack=operation)
        assert flying == {(): 1}
        assert outcomes(registry, operation) == {}
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        flying = figures(registry, "layered_store_operations_in_flight", stack=operation)
        assert flying == {(): 0}
        assert outcomes(registry, operation) == {"cancelled": 1}


async def test_a_subclass_that_looks_at_every_call_sees_reads_too() -> None:
    """``get_latest`` is written out for speed; not past an ``around`` of one's own."""
    seen = []

    class Watching(Metrics):
        async def around(self, op: Any, method: Any, /, *args: Any, **kwargs: Any) -> Any:
            seen.append(op)
            return await super().around(op, method, *args, **kwargs)

    inner = MemoryStore()
    stack = Watching(inner, name="s", registry=CollectorRegistry())
    await stack.upsert_latest(StateSnapshot("u-1"))
    assert await stack.get_latest("u-1") == await inner.get_latest("u-1")
    assert seen == ["upsert_latest", "get_latest"]
    plain = Metrics(inner, name="s", registry=CollectorRegistry())
    plain.around = None  # type: ignore[method-assign, assignment]
    assert await plain.get_latest("u-1") is not None  # one coroutine less


# Durations


async def test_durations_fall_into_their_buckets(registry: CollectorRegistry) -> None:
    """By the injected clock, the bound itself included."""
    clock = FakeClock()
    store = Scripted(Takes(clock, 0.025), Takes(clock, 0.03), Takes(clock, 99.0))
    stack = Metrics(store, name="s", registry=registry, clock=clock)
    for seconds in (0.025, 0.03, 99.0):
        call = asyncio.create_task(stack.delete("u-1"))
        await clock.advance(seconds)
        await call
    cells = figures(registry, "layered_store_operation_duration_seconds_bucket", operation="delete")
    assert [cells["s", le] for le in ("0.01", "0.025", "0.05", "10.0", "+Inf")] == [0, 1, 2, 2, 3]
    total = figures(registry, "layered_store_operation_duration_seconds_sum")
    assert total["s", "delete"] == pytest.approx(99.055)


async def test_an_operation_slower_than_every_bound_has_a_histogram(
    registry: CollectorRegistry,
) -> None:
    """Also when it is the only one; and a read's time counts from its own beginning."""
    clock = FakeClock()
    stack = Metrics(Scripted(Takes(clock, 99.0)), name="s", registry=registry, clock=clock)
    await clock.advance(1000)
    call = asyncio.create_task(stack.get_latest("u-1"))
    await clock.advance(99)
    await call
    cells = figures(registry, "layered_store_operation_duration_seconds_bucket")
    assert (cells["s", "get_latest", "10.0"], cells["s", "get_latest", "+Inf"]) == (0, 1)
    total = figures(registry, "layered_store_operation_duration_seconds_sum")
    assert total["s", "get_latest"] == pytest.approx(99)


async def test_hits_count_as_reads_only(registry: CollectorRegistry) -> None:
    """Other operations have their own number, in the counter and in the histogram."""
    stack = Metrics(Cached(MemoryStore()), name="s", registry=registry)
    await stack.upsert_latest(StateSnapshot("u-1"))
    for _ in range(70):
        await stack.get_latest("u-1")
    await stack.get_history("u-1", 1)
    done = figures(registry, "layered_store_operations_total", outcome="ok", stack="s")
    assert done == {("get_latest",): 70, ("upsert_latest",): 1, ("get_history",): 1}
    name = "layered_store_operation_duration_seconds_count"
    assert figures(registry, name, stack="s") == done


async def test_every_hit_is_timed_when_one_of_two_views_asks_for_it() -> None:
    """The inner view need not be the one that asks, nor the outer."""

    class Ticking(FakeClock):
        def monotonic(self) -> float:
            self.set(self._now + 0.001)
            return self._now

    for outer, inner in (("sampled", "all"), ("all", "sampled")):
        clock, registry = Ticking(), CollectorRegistry()
        cached = Cached(MemoryStore(), ttl=1e6, clock=clock)
        view = Metrics(cached, name="in", registry=registry, time_hits=inner, clock=clock)
        stack = Metrics(view, name="out", registry=registry, time_hits=outer, clock=clock)
        await stack.upsert_latest(StateSnapshot("u-1"))
        before = clock.monotonic()
        for _ in range(10):
            await stack.get_latest("u-1")
        assert clock.monotonic() - before == pytest.approx(0.021)  # two readings for each


@pytest.mark.parametrize("time_hits", ["sampled", "all"])
async def test_hits_are_counted_exactly_and_their_histogram_agrees(
    registry: CollectorRegistry, time_hits: str
) -> None:
    """The histogram's count is the counter, from the first hit on, and +Inf is the count."""
    stack = Metrics(Cached(MemoryStore()), name="s", registry=registry, time_hits=time_hits)
    await stack.upsert_latest(StateSnapshot("u-1"))
    done = 0
    for hits in (1, 62, 1, 1, 500):
        for _ in range(hits):
            await stack.get_latest("u-1")
        done += hits
        reads = figures(registry, "layered_store_reads_total", layer="1.cached", result="hit")
        assert reads == {("s",): done}
        assert outcomes(registry, "get_latest") == {"ok": done}
        name = "layered_store_operation_duration_seconds"
        count = figures(registry, f"{name}_count", operation="get_latest")
        cells = figures(registry, f"{name}_bucket", operation="get_latest")
        assert count == {("s",): done}
        assert cells["s", "+Inf"] == done
        assert list(cells.values()) == sorted(cells.values())
        total = figures(registry, f"{name}_sum", operation="get_latest")["s",]
        assert 0 < total < done * 0.01


async def test_all_hits_are_timed_when_asked_for(registry: CollectorRegistry) -> None:
    """With a clock that jumps at each reading, every hit takes as long as it says: one in ten
    takes ten times as long, which a sample would not meet exactly.
    """

    class Ticking(FakeClock):
        def __init__(self) -> None:
            super().__init__()
            self.ticks = itertools.count()

        def monotonic(self) -> float:
            self.set(self._now + (0.04 if next(self.ticks) % 20 == 7 else 0.004))
            return self._now

    clock = Ticking()
    stack = Metrics(
        Cached(MemoryStore(), ttl=1e6, clock=clock),
        name="s",
        registry=registry,
        time_hits="all",
        clock=clock,
    )
    await stack.upsert_latest(StateSnapshot("u-1"))
    clock.ticks = itertools.count()
    for _ in range(100):  # two readings each
        await stack.get_latest("u-1")
    cells = figures(
        registry, "layered_store_operation_duration_seconds_bucket", operation="get_latest"
    )
    bounds = ("0.0025", "0.005", "0.025", "0.05", "+Inf")
    assert [cells["s", bound] for bound in bounds] == [0, 90, 90, 100, 100]
    total = figures(registry, "layered_store_operation_duration_seconds_sum")
    assert total["s", "get_latest"] == pytest.approx(90 * 0.004 + 10 * 0.04)


def test_a_bucket_of_sampled_hits_never_falls() -> None:
    """Whatever is sampled next: a fall would look like a restart, and rates would jump."""
    hits = 0
    timings = HitTimings()
    timings.counts.append(type("Count", (), {"read": lambda _: hits})())  # type: ignore[arg-type]
    before, seconds_before = [0] * (len(DURATION_BUCKETS) + 1), 0.0
    durations = [5e-7, 3e-3, 3e-3, 5e-7, 8.0, 5e-7, 2e-6] * 10
    for index, duration in enumerate(durations):
        hits += 1
        timings.note(duration)
        hits += 63 if index % 3 else 20
        cells, seconds = timings.spread()
        assert sum(cells) == hits
        assert all(now >= then for now, then in zip(cells, before, strict=True))
        assert seconds >= seconds_before
        before, seconds_before = cells, seconds
    # One in seven took 8 s: the estimate is of that order.
    assert 0.5 < before[-2] / hits * 7 < 1.5
    assert 0.5 < seconds_before / (hits / 7 * 8.0) < 1.5


def test_hits_are_spread_as_those_that_were_sampled_since_the_last_look() -> None:
    """Hits that became slow show as slow at once, not after a day of averages."""
    hits = 0
    timings = HitTimings()
    timings.counts.append(type("Count", (), {"read": lambda _: hits})())  # type: ignore[arg-type]
    for duration in (5e-7, 2e-3):
        for _ in range(100):
            timings.note(duration)
        hits += 6_400
        cells, seconds = timings.spread()
    assert {cell: count for cell, count in enumerate(cells) if count} == {0: 6_400, 6: 6_400}
    assert seconds == pytest.approx(6_400 * (5e-7 + 2e-3))


def test_hits_that_cannot_be_shared_out_evenly_go_where_most_are() -> None:
    """None is left out, and none shows in a bucket in which no hit was timed."""
    timings = HitTimings()
    timings.counts.append(type("Count", (), {"read": lambda _: 11})())  # type: ignore[arg-type]
    for duration in (5e-7, 5e-6, 5e-6, 2e-3):
        timings.note(duration)
    cells, _ = timings.spread()
    assert {cell: count for cell, count in enumerate(cells) if count} == {0: 2, 1: 7, 6: 2}


def test_calls_are_folded_into_the_buckets_in_any_order() -> None:
    """A duration that equals a bound belongs below it, as in the client."""
    timings = Timings()
    timings.recent += [2e-3, 5e-7, 99.0, DURATION_BUCKETS[1], 2e-3, 5e-7]
    timings.fold().fold()
    assert timings.recent == []
    found = {cell: count for cell, count in enumerate(timings.cells) if count}
    assert found == {0: 2, 1: 1, 6: 2, len(DURATION_BUCKETS): 1}
    assert timings.outcomes["ok"] == 6
    assert timings.seconds == pytest.approx(99.004011)


def test_hits_of_which_none_was_timed_are_counted_all_the_same() -> None:
    """A look between the first hit and its sample."""
    timings = HitTimings()
    timings.counts.append(type("Count", (), {"read": lambda _: 7})())  # type: ignore[arg-type]
    assert sum(timings.spread()[0]) == 7
    timings.note(1.0)
    assert sum(timings.spread()[0]) == 7


# Tiers


async def test_an_error_of_the_cache_tier_is_no_miss(registry: CollectorRegistry) -> None:
    """The origin answered, the tier failed: an error of that tier, and the step is told."""
    tier = Scripted(UnavailableError("away"), None)
    origin = MemoryStore()
    await origin.upsert_latest(StateSnapshot("u-1"))
    stack = Metrics(WriteThrough(tier, origin=origin), name="s", registry=registry)
    await stack.get_latest("u-1")
    assert outcomes(registry, "get_latest") == {"ok": 1}
    reads = figures(registry, "layered_store_reads_total", layer="1.write_through")
    assert {key[-1]: value for key, value in reads.items() if value} == {"error": 1}
    steps = figures(registry, "layered_store_tier_failures_total")
    assert {key[-1]: value for key, value in steps.items() if value} == {"read": 1}
    tier.steps.insert(0, UnavailableError("away"))
    await stack.get_latest_many(["u-1", "u-2"])
    reads = figures(registry, "layered_store_reads_total", layer="1.write_through")
    assert {key[-1]: value for key, value in reads.items() if value} == {"error": 3}


async def test_stale_answers_are_neither_hits_nor_misses(registry: CollectorRegistry) -> None:
    """For the caller that loads, those who share its load, and each user of a batch."""
    clock = FakeClock()
    gate = Gate()
    below = Scripted(
        StateSnapshot("u-1"),
        StateSnapshot("u-2"),
        gate,
        UnavailableError("away"),
        snapshot_type=StateSnapshot,
    )
    stack = Metrics(
        Cached(below, ttl=10, stale_if_error=60, clock=clock), name="s", registry=registry
    )
    for user_id in ("u-1", "u-2"):
        await stack.get_latest(user_id)
    await clock.advance(11)
    calls = [asyncio.create_task(stack.get_latest("u-1")) for _ in range(3)]
    await gate.entered.wait()
    gate.open(UnavailableError("away"))
    assert {each.user_id for each in await asyncio.gather(*calls)} == {"u-1"}  # type: ignore[union-attr]
    assert len(await stack.get_latest_many(["u-1", "u-2"])) == 2
    reads = figures(registry, "layered_store_reads_total", stack="s", layer="1.cached")
    assert {key[-1]: value for key, value in reads.items() if value} == {"miss": 2, "stale": 5}
    assert outcomes(registry, "get_latest") == {"ok": 5}


async def test_every_tier_counts_its_reads(registry: CollectorRegistry) -> None:
    """A cold user, a hot one, an absent one, and each of a batch."""
    stack = Metrics(
        Cached(WriteThrough(MemoryStore(), origin=MemoryStore()), negative_ttl=10),
        name="s",
        registry=registry,
    )
    await stack.upsert_latest(StateSnapshot("u-1"))
    for user_id in ("u-1", "u-1", "nobody", "nobody"):
        await stack.get_latest(user_id)
    await stack.get_latest_many(["u-1", "u-1", "nobody", "u-2"])
    with pytest.raises(ValidationError):
        await stack.get_latest("not an id")
    reads = figures(registry, "layered_store_reads_total", stack="s")
    counted = {key: value for key, value in reads.items() if value}
    assert counted == {
        ("1.cached", "hit"): 3,
        ("1.cached", "miss"): 2,
        ("1.cached", "negative_hit"): 2,
        ("2.write_through", "miss"): 2,
        ("3.memory", "miss"): 2,
        ("4.memory", "miss"): 2,
    }


async def test_pending_repairs_and_incomplete_erasures_show(registry: CollectorRegistry) -> None:
    """A delete that missed the tier leaves a doubtful copy and is told."""
    tier = Scripted(UnavailableError("away"))
    stack = Metrics(WriteThrough(tier, origin=MemoryStore()), name="s", registry=registry)
    with pytest.raises(ErasureIncompleteError):
        await stack.delete("u-1")
    assert figures(registry, "layered_store_pending_repairs") == {("s", "1.write_through"): 1}
    incomplete = figures(registry, "layered_store_erasures_incomplete_total")
    assert incomplete == {("s", "1.write_through"): 1}
    await stack.delete("u-1")
    assert figures(registry, "layered_store_pending_repairs") == {("s", "1.write_through"): 0}


# Places


class Inherited(MemoryStore):
    """A third party's backend that counts nothing of its own kind."""

    def samples(self) -> Iterator[Sample]:
        yield Sample("stale_writes", 7)


class Wrapped(StateStore):
    """A third party's layer that knows nothing of this library's bases."""

    def __init__(self, store: StateStore) -> None:
        self._store = store

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        await self._store.upsert_latest(snapshot)

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        return await self._store.get_latest(user_id)


async def test_labels_are_the_positions_that_describe_tells(registry: CollectorRegistry) -> None:
    """Also below a third party's layer, which hides nothing."""
    stack = Metrics(
        Wrapped(Cached(WriteThrough(CircuitBreaker(Inherited()), origin=MemoryStore()))),
        name="s",
        registry=registry,
    )
    await stack.get_latest("u-1")
    places = {f"{block.index}.{block.kind}": block for block in describe(stack)}
    layers = {
        sample.labels["layer"]
        for family in registry.collect()
        for sample in family.samples
        if "layer" in sample.labels
    }
    assert layers == {"2.cached", "3.write_through", "4.circuit_breaker", "5.memory", "6.memory"}
    assert layers < set(places)
    assert places["5.memory"].name == "Inherited"
    assert figures(registry, "layered_store_stale_writes_total") == {("s", "5.memory"): 7}
    assert outcomes(registry, "get_latest") == {"ok": 1}


async def test_two_views_of_one_stack(registry: CollectorRegistry) -> None:
    """The front counts what callers see, hits included; the back what reaches the backend."""
    back = Metrics(MemoryStore(), name="back", registry=registry)
    front = Metrics(Cached(Retry(back)), name="front", registry=registry)
    await front.upsert_latest(StateSnapshot("u-1"))
    for _ in range(10):
        await front.get_latest("u-1")
    await front.get_latest("u-2")
    counted = figures(registry, "layered_store_operations_total", outcome="ok")
    assert counted["front", "get_latest"] == 11
    assert counted["back", "get_latest"] == 1
    reads = figures(registry, "layered_store_reads_total", result="hit")
    assert reads == {("front", "1.cached"): 10, ("front", "4.memory"): 0, ("back", "1.memory"): 0}
    await front.aclose()
    assert list(registry.collect()) == []


async def test_hits_pass_through_two_views(registry: CollectorRegistry) -> None:
    """Both count every hit, however the reads come in."""
    below = Metrics(Cached(MemoryStore()), name="below", registry=registry)
    above = Metrics(below, name="above", registry=registry, time_hits="all")
    await above.upsert_latest(StateSnapshot("u-1"))
    for _ in range(70):
        await above.get_latest("u-1")
    for _ in range(30):
        await below.get_latest("u-1")
    name = "layered_store_operation_duration_seconds_count"
    assert figures(registry, name, operation="get_latest") == {("above",): 70, ("below",): 100}
    counted = figures(registry, "layered_store_operations_total", outcome="ok")
    assert (counted["above", "get_latest"], counted["below", "get_latest"]) == (70, 100)
    assert figures(registry, "layered_store_reads_total", layer="1.cached", result="hit") == {
        ("below",): 100
    }


async def test_two_views_of_one_name_count_each_call_once(
    registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    """Names tell views apart; with one name the outer one speaks for both, and a log says so."""
    inner = Metrics(MemoryStore(), name="s", registry=registry)
    outer = Metrics(Retry(inner), name="s", registry=registry)
    assert "name them apart" in caplog.text
    await outer.get_latest("u-1")
    assert outcomes(registry, "get_latest") == {"ok": 1}
    assert figures(registry, "layered_store_reads_total", result="miss") == {("s", "3.memory"): 1}
    del outer
    gc.collect()
    await inner.get_latest("u-1")
    assert outcomes(registry, "get_latest") == {"ok": 2}


# Registries


async def test_two_stacks_share_a_registry(registry: CollectorRegistry) -> None:
    """Told apart by name; those of one name are added up, and the worst of their states counts."""
    one = Metrics(Cached(MemoryStore()), name="a", registry=registry)
    two = Metrics(Cached(MemoryStore()), name="b", registry=registry)
    three = Metrics(Cached(MemoryStore()), name="b", registry=registry)
    for stack in (one, two, three, three):
        await stack.get_latest("u-1")
    name = "layered_store_operation_duration_seconds_count"
    assert figures(registry, name) == {("a", "get_latest"): 1, ("b", "get_latest"): 3}
    counted = figures(registry, "layered_store_operations_total", outcome="ok")
    assert (counted["a", "get_latest"], counted["b", "get_latest"]) == (1, 3)
    await one.health_report()
    assert figures(registry, "layered_store_health_status")["a", "0.metrics"] == 2


async def test_of_states_of_one_name_the_worst_one_shows(registry: CollectorRegistry) -> None:
    """An open breaker does not vanish behind a closed one, nor bad health behind good."""
    stacks = [
        Metrics(
            CircuitBreaker(Scripted(error, healthy=error is None), minimum_calls=1),
            name="s",
            registry=registry,
        )
        for error in (None, UnavailableError("away"), None)
    ]
    for stack in stacks:
        with contextlib.suppress(UnavailableError):
            await stack.get_latest("u-1")
        await stack.health_report()
    assert figures(registry, "layered_store_circuit_state") == {("s", "1.circuit_breaker"): 2}
    assert figures(registry, "layered_store_health_status")["s", "0.metrics"] == 0


async def test_an_old_health_check_counts_no_more_beside_a_new_one_of_the_same_name(
    registry: CollectorRegistry,
) -> None:
    """A stack that was asked once, in an outage, does not say for ever that it goes on."""
    clock = FakeClock()
    old = Metrics(Scripted(healthy=False), name="s", registry=registry, clock=clock)
    new = Metrics(Scripted(), name="s", registry=registry, clock=clock)

    def shown() -> float:
        return figures(registry, "layered_store_health_status")["s", "0.metrics"]

    await old.health_check()
    await new.health_check()
    assert shown() == 0  # the worst one
    await clock.advance(301)
    assert shown() == 0  # nobody knows better
    await new.health_check()
    assert shown() == 2
    await old.health_check()
    assert shown() == 0


async def test_no_counter_falls_when_one_of_a_name_is_closed(registry: CollectorRegistry) -> None:
    """What a closed stack counted stays while another of its name is open: to Prometheus a sum that
    falls is a restart, and all that is left of it new traffic.
    """

    def counts() -> list[float | None]:
        once = {"stack": "s", "operation": "get_latest"}
        at_cache = {"stack": "s", "layer": "1.cached", "result": "miss"}
        return [
            registry.get_sample_value("layered_store_operations_total", {**once, "outcome": "ok"}),
            registry.get_sample_value("layered_store_operation_duration_seconds_count", once),
            registry.get_sample_value("layered_store_reads_total", at_cache),
        ]

    old, new = (Metrics(Cached(MemoryStore()), name="s", registry=registry) for _ in range(2))
    other = Metrics(MemoryStore(), name="other", registry=registry)
    for stack in (old, old, old, new):
        await stack.get_latest("u-1")
    await old.aclose()
    await old.aclose()
    assert counts() == [4, 4, 4]
    newest = Metrics(Cached(MemoryStore()), name="s", registry=registry)
    await newest.get_latest("u-1")
    await new.aclose()
    assert counts() == [5, 5, 5]
    await newest.aclose()
    assert counts() == [None, None, None], "the last one takes them along"
    fresh = Metrics(Cached(MemoryStore()), name="s", registry=registry)
    await fresh.get_latest("u-1")
    assert counts() == [1, 1, 1]
    for stack in (fresh, other):
        await stack.aclose()


async def test_no_counter_falls_when_one_of_a_name_is_let_go(registry: CollectorRegistry) -> None:
    """As when it is closed; what was never scraped cannot fall, and what was closed counts once."""

    def counts() -> list[float | None]:
        gc.collect()
        once = {"stack": "s", "operation": "get_latest"}
        return [
            registry.get_sample_value("layered_store_operations_total", {**once, "outcome": "ok"}),
            registry.get_sample_value("layered_store_operation_duration_seconds_count", once),
        ]

    gone, closed, kept = (Metrics(MemoryStore(), name="s", registry=registry) for _ in range(3))
    for stack in (gone, gone, closed, kept):
        await stack.get_latest("u-1")
    assert counts() == [4, 4]
    del gone, stack
    assert counts() == [4, 4]
    await closed.aclose()
    del closed
    assert counts() == [4, 4]
    await kept.get_latest("u-1")
    assert counts() == [5, 5]
    second = Metrics(MemoryStore(), name="s", registry=registry)
    await second.get_latest("u-1")
    assert counts() == [6, 6]
    del second
    assert counts() == [6, 6]
    await kept.aclose()
    assert counts() == [None, None]


async def test_closing_a_stack_takes_its_series_away(registry: CollectorRegistry) -> None:
    """Those of the others stay; with the last one the registry is as empty as before."""
    one = Metrics(Cached(MemoryStore()), name="a", registry=registry)
    two = Metrics(Cached(MemoryStore()), name="b", registry=registry)
    for stack in (one, two):
        await stack.get_latest("u-1")
        await stack.health_report()
    await one.aclose()
    await one.aclose()
    stacks = {s.labels["stack"] for family in registry.collect() for s in family.samples}
    assert stacks == {"b"}
    await two.aclose()
    assert list(registry.collect()) == []
    assert generate_latest(registry) == b""


async def test_a_stack_that_is_gone_takes_its_series_along(registry: CollectorRegistry) -> None:
    """Nobody has to close what is no longer there."""
    stack: StateStore | None = Metrics(Cached(MemoryStore()), name="a", registry=registry)
    assert stack is not None
    await stack.get_latest("u-1")
    stack = None
    gc.collect()
    assert list(registry.collect()) == []


async def test_stacks_that_are_gone_leave_nothing_behind(registry: CollectorRegistry) -> None:
    """However many a service lets go without closing them, and nobody scrapes."""
    sizes = []
    for _ in range(2):
        for _ in range(50):
            Metrics(MemoryStore(), name="a", registry=registry)
        gc.collect()
        Metrics(MemoryStore(), name="a", registry=registry)
        sizes.append(len(_exporters[registry]._stacks))
    assert max(sizes) < 5


async def test_a_block_that_has_the_stacks_name_is_no_metrics(
    registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody is told to name them apart."""
    store = MemoryStore()
    stack = Metrics(store, name=store.name, registry=registry)
    await stack.get_latest("u-1")
    assert outcomes(registry, "get_latest") == {"ok": 1}
    assert not caplog.records


class Unclosable(MemoryStore):
    async def aclose(self) -> None:
        raise UnavailableError("hangs")


async def test_a_stack_that_cannot_be_closed_is_not_exported_any_more(
    registry: CollectorRegistry,
) -> None:
    """Its error reaches the caller all the same."""
    stack = Metrics(Unclosable(), name="a", registry=registry)
    with pytest.raises(UnavailableError):
        await stack.aclose()
    assert list(registry.collect()) == []


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"name": ""}, "name"),
        ({"name": "with space"}, "name"),
        ({"name": "é"}, "name"),
        ({"name": "x" * 101}, "name"),
        ({"name": None}, "name"),
        ({"name": 'a"b'}, "name"),
        ({"name": "a", "time_hits": "some"}, "time_hits"),
        ({"name": "a", "time_hits": None}, "time_hits"),
        ({"name": "a", "exemplar": "trace"}, "exemplar"),
        ({"name": "a", "clock": 3}, "clock"),
        ({"name": "a", "inner": "redis://"}, "inner"),
    ],
)
def test_a_failed_construction_leaves_the_registry_clean(
    registry: CollectorRegistry, options: dict[str, Any], option: str
) -> None:
    """The error names the option; nothing was registered, so the next try works."""
    with pytest.raises(ConfigError) as caught:
        Metrics(options.pop("inner", MemoryStore()), registry=registry, **options)
    assert caught.value.option == option
    assert not registry._collector_to_names
    stack = Metrics(MemoryStore(), name="a", registry=registry)
    assert len(figures(registry, "layered_store_operations_in_flight")) == 1
    del stack


def test_a_registry_must_be_one() -> None:
    """Anything else is refused by name."""
    with pytest.raises(ConfigError) as caught:
        Metrics(MemoryStore(), name="a", registry=object())
    assert caught.value.option == "registry"


class Boastful(MemoryStore):
    """A third party's store with figures that nobody knows."""

    def samples(self) -> Iterable[Sample]:
        return [
            Sample("reads", 3, ("hit",)),
            Sample("no_such_metric", 1),
            Sample("reads", 3, ()),
            Sample("operations", 1, ("get_latest", "ok")),
        ]


class Failing(MemoryStore):
    def samples(self) -> Iterable[Sample]:
        raise RuntimeError("u-secret")


@pytest.mark.parametrize("store", [Boastful, Failing])
async def test_a_block_with_bad_figures_does_not_break_the_scrape(
    registry: CollectorRegistry,
    caplog: pytest.LogCaptureFixture,
    store: type[MemoryStore],
) -> None:
    """What cannot be exported is left out, once in the log and without the error's text."""
    stack = Metrics(Cached(store()), name="a", registry=registry)
    await stack.get_latest("u-1")
    for _ in range(3):
        assert outcomes(registry, "get_latest") == {"ok": 1}
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "u-secret" not in caplog.text
    hits = figures(registry, "layered_store_reads_total", layer="2.memory", result="hit")
    assert hits == ({("a",): 3} if store is Boastful else {})
    reads = [s for f in registry.collect() for s in f.samples if s.name.endswith("_reads_total")]
    assert all(set(sample.labels) == {"stack", "layer", "result"} for sample in reads)
    assert set(figures(registry, "layered_store_operations_total")) == {("a", "get_latest", "ok")}


# Health


@pytest.mark.parametrize(
    ("build", "limit"),
    [
        (lambda: MemoryStore(), None),
        (lambda: Scripted(), None),
        (lambda: SQLStore("sqlite+aiosqlite://", timeout=3), 3.0),
        (lambda: Timeout(SQLStore("sqlite+aiosqlite://", timeout=3), seconds=0.5), 0.5),
        (lambda: Timeout(SQLStore("sqlite+aiosqlite://", timeout=3), seconds=9), 3.0),
        (lambda: Timeout(Retry(MemoryStore()), seconds=timedelta(seconds=2)), None),
        (
            lambda: Cached(
                Timeout(RedisStore("redis://127.0.0.1"), seconds=0.05),
                fallback=Retry(SQLStore("sqlite+aiosqlite://", timeout=3)),
            ),
            3.0,
        ),
    ],
)
def test_how_long_one_attempt_may_take(
    build: Callable[[], StateStore], limit: float | None, registry: CollectorRegistry
) -> None:
    """At the slowest backend, by what limits the way to it and by its own limit."""
    stack = Metrics(build(), name="a", registry=registry)
    found = figures(registry, "layered_store_call_limit_seconds")
    assert found == ({} if limit is None else {(stack.name,): limit})


async def test_health_shows_for_each_block_as_of_the_last_check(
    registry: CollectorRegistry,
) -> None:
    """And when that was, so that an alert can tell an old answer from a good one."""
    clock = FakeClock(wall=5_000.0)
    tier = Scripted(healthy=False)
    stack = Metrics(
        Cached(WriteThrough(tier, origin=MemoryStore())), name="a", registry=registry, clock=clock
    )
    assert figures(registry, "layered_store_health_status") == {}
    assert figures(registry, "layered_store_health_checked_timestamp_seconds") == {}
    await stack.health_report()
    assert figures(registry, "layered_store_health_status", stack="a") == {
        ("0.metrics",): 1,
        ("1.cached",): 1,
        ("2.write_through",): 1,
        ("3.scripted",): 0,
        ("4.memory",): 2,
    }
    checked = "layered_store_health_checked_timestamp_seconds"
    assert figures(registry, checked) == {("a",): 5_000.0}
    tier.healthy = True
    await clock.advance(60)
    assert await stack.health_check()
    assert set(figures(registry, "layered_store_health_status").values()) == {2}
    assert figures(registry, checked) == {("a",): 5_060.0}


class Summary(Wrapped):
    """A third party's layer that reports as one block, whatever it wraps."""

    async def health_report(self) -> HealthReport:
        return HealthReport("Summary", HealthStatus.DEGRADED, 0.0, "so so")


async def test_health_of_a_layer_that_reports_as_one(registry: CollectorRegistry) -> None:
    """What it does not tell is not shown, rather than shown wrongly."""
    stack = Metrics(Summary(Cached(MemoryStore())), name="a", registry=registry)
    await stack.health_report()
    assert figures(registry, "layered_store_health_status", stack="a") == {
        ("0.metrics",): 1,
        ("1.summary",): 1,
    }


# Exemplars and formats


async def test_exemplars_lead_from_a_bucket_to_a_trace(registry: CollectorRegistry) -> None:
    """Only with the hook, only in OpenMetrics, one for each bucket; hits have none."""
    clock = FakeClock(wall=9_000.0)
    traces = iter(["a1", "a2", None, "a4"])

    def hook() -> dict[str, str] | None:
        trace = next(traces)
        return None if trace is None else {"trace_id": trace}

    store = Scripted(None, None, None, Takes(clock, 2.0))
    stack = Metrics(store, name="s", registry=registry, exemplar=hook, clock=clock)
    for _ in range(3):
        await stack.delete("u-1")
    call = asyncio.create_task(stack.delete("u-1"))
    await clock.advance(2.0)
    await call
    body, content_type = exposition(registry, "application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    shown = {
        sample.labels["le"]: sample.exemplar
        for family in parse_open(body.decode())
        for sample in family.samples
        if sample.exemplar is not None
    }
    assert {le: each.labels["trace_id"] for le, each in shown.items()} == {
        "1e-06": "a2",
        "2.5": "a4",
    }
    assert (shown["2.5"].value, float(shown["2.5"].timestamp)) == (2.0, 9_002.0)
    plain, content_type = exposition(registry)
    assert content_type.startswith("text/plain")
    assert b"a4" not in plain


@pytest.mark.parametrize(
    "hook",
    [
        lambda: {"trace_id": "x" * 200},
        lambda: {"trace_id": 3},
        dict,
        lambda: None,
        lambda: 1 / 0,
    ],
    ids=["long", "int", "empty", "none", "raises"],
)
async def test_a_bad_exemplar_is_left_out(registry: CollectorRegistry, hook: Any) -> None:
    """Measuring never fails a call, and never makes output that nobody can parse."""
    stack = Metrics(MemoryStore(), name="s", registry=registry, exemplar=hook)
    await stack.get_latest("u-1")
    body = generate_openmetrics(registry).decode()
    assert " # {" not in body
    assert list(parse_open(body))


@pytest.mark.parametrize(
    ("operation", "other"), [("delete", "get_latest"), ("get_latest", "delete")]
)
async def test_exemplars_are_those_of_the_operation(operation: str, other: str) -> None:
    """A slow erasure is no trace of a slow read."""
    stack = Metrics(
        MemoryStore(),
        name="s",
        registry=CollectorRegistry(),
        exemplar=lambda: {"trace_id": "a1"},
        clock=FakeClock(),
    )
    await getattr(stack, operation)("u-1")
    assert stack.exemplars(other) == {}
    assert [each.labels for each in stack.exemplars(operation).values()] == [{"trace_id": "a1"}]
    assert Sample("operations", 1, (operation, "ok")) in set(stack.samples())


async def test_another_registry_shows_nothing_of_it() -> None:
    """Nothing is registered at import, nor in the default registry when one is given."""
    from prometheus_client import REGISTRY

    own = CollectorRegistry()
    stack = Metrics(MemoryStore(), name="only-here", registry=own)
    assert "only-here" not in generate_latest(REGISTRY).decode()
    assert "only-here" in generate_latest(own).decode()
    default = Metrics(MemoryStore(), name="by-default")
    assert "by-default" in generate_latest(REGISTRY).decode()
    await default.aclose()
    await stack.aclose()
    assert "by-default" not in generate_latest(REGISTRY).decode()


@pytest.mark.parametrize(
    ("time_hits", "reads"), [("sampled", 6_400 + 100 * 2), ("all", 6_400 * 2)]
)
async def test_one_hit_in_64_is_timed_or_all_are(
    registry: CollectorRegistry, time_hits: Any, reads: int
) -> None:
    """Each reads the clock once, since it may be over; one that is timed, for its duration too."""

    class Watched(FakeClock):
        reads = 0

        def monotonic(self) -> float:
            self.reads += 1
            return super().monotonic()

    clock = Watched()
    cached = Cached(MemoryStore(), clock=clock)
    stack = Metrics(cached, name="s", registry=registry, time_hits=time_hits, clock=clock)
    await stack.upsert_latest(StateSnapshot("u-1"))
    clock.reads = 0
    for _ in range(6_400):
        await stack.get_latest("u-1")
    assert clock.reads == reads
    assert outcomes(registry, "get_latest")["ok"] == 6_400


# Threads


@pytest.mark.skipif(
    not getattr(sys, "_is_gil_enabled", lambda: True)(),
    reason="without a global interpreter lock threads may miss a few: docs/metrics.md",
)
def test_calls_of_several_threads_are_counted_exactly(registry: CollectorRegistry) -> None:
    """Each with an event loop of its own, while another thread scrapes."""
    stack = Metrics(MemoryStore(), name="s", registry=registry)
    done = threading.Event()
    broken: list[BaseException] = []

    async def calls() -> None:
        for number in range(5_000):
            await stack.get_latest(f"u-{number % 7}")

    def scrape() -> None:
        last = 0.0
        while not done.is_set():
            try:
                now = outcomes(registry, "get_latest").get("ok", 0.0)
                assert now >= last
                last = now
            except BaseException as exc:  # handed to the test
                broken.append(exc)
                return

    scraping = threading.Thread(target=scrape)
    scraping.start()
    callers = [threading.Thread(target=asyncio.run, args=(calls(),)) for _ in range(4)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    done.set()
    scraping.join()
    assert not broken
    assert outcomes(registry, "get_latest") == {"ok": 20_000}
    assert figures(registry, "layered_store_operations_in_flight") == {("s",): 0}
    reads = figures(registry, "layered_store_reads_total", result="miss")
    assert reads == {("s", "1.memory"): 20_000}


async def test_a_stack_that_is_built_while_another_thread_closes_one_is_exported(
    registry: CollectorRegistry,
) -> None:
    """Neither takes the other's change back."""
    built = threading.Event()
    kept: list[Metrics] = []

    def build() -> None:
        kept.append(Metrics(MemoryStore(), name="late", registry=registry))
        built.set()

    class Met(Metrics):
        """One that ``aclose`` of another comes upon when it takes that one out."""

        def __eq__(self, other: object) -> bool:
            if other is None and not thread.ident:
                thread.start()
                built.wait(0.1)
            return self is other

        __hash__ = Metrics.__hash__

    thread = threading.Thread(target=build)
    kept.append(Met(MemoryStore(), name="met", registry=registry))
    await Metrics(MemoryStore(), name="closed", registry=registry).aclose()
    assert thread.ident
    thread.join()
    in_flight = figures(registry, "layered_store_operations_in_flight")
    assert in_flight == {("met",): 0, ("late",): 0}


@pytest.mark.parametrize("time_hits", [None, "sampled", "all"])
async def test_what_is_no_user_id_is_refused_by_the_fast_path_as_by_any_other(
    registry: CollectorRegistry, time_hits: str | None
) -> None:
    """Also what no dict can look up; and a hit after it is still one."""
    stack: StateStore = Cached(MemoryStore())
    if time_hits is not None:
        stack = Metrics(stack, name="s", registry=registry, time_hits=time_hits)
    await stack.upsert_latest(StateSnapshot("u-1"))
    wrong: Any
    for wrong in (["u-1"], {}, None, 5, "", b"u-1"):
        with pytest.raises(ValidationError):
            await stack.get_latest(wrong)
    assert await stack.get_latest("u-1") is not None


def test_what_knows_nothing_of_the_fast_path_is_awaited() -> None:
    """As is a class that changed its reads since the hook was declared."""

    class Changed(Layer):
        async def get_latest(self, user_id: str) -> StateSnapshot | None:
            return None

    assert hot_path_of(object()) is None
    assert hot_path_of(Changed(Cached(MemoryStore()))) is None
    assert hot_path_of(Cached(MemoryStore())) is not None
