"""Prometheus metrics of one point of a stack and of all blocks below it."""

from __future__ import annotations

import asyncio
import re
from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, TypeVar

from layered_store.clock import SYSTEM_CLOCK, Clock
from layered_store.errors import (
    ConfigError,
    ErasureIncompleteError,
    RejectedError,
    StoreTimeoutError,
    UnavailableError,
    ValidationError,
)
from layered_store.hotpath import HitCount, HotPath, hot_path_of
from layered_store.interface import Op
from layered_store.layer import AroundLayer
from layered_store.metrics.catalogue import DURATION_BUCKETS, OUTCOMES
from layered_store.options import check_choice
from layered_store.stack import walk
from layered_store.stats import Sample

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from layered_store.health import HealthReport
    from layered_store.interface import StateStore

__all__ = ["Metrics"]

P = ParamSpec("P")
T = TypeVar("T")

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.:-]{0,99}").fullmatch


class Timings:
    """What was counted of one operation: outcomes, and how long it took."""

    __slots__ = ("buckets", "outcomes", "sampled", "seconds")

    def __init__(self) -> None:
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        self.buckets = [0] * (len(DURATION_BUCKETS) + 1)
        self.seconds = 0.0
        # Durations of hits, of which only some are timed; by bucket, and their sum.
        self.sampled = [0] * (len(DURATION_BUCKETS) + 1)

    def note(self, outcome: str, seconds: float) -> None:
        """Count one operation that was timed."""
        self.outcomes[outcome] += 1
        self.buckets[bisect_left(DURATION_BUCKETS, seconds)] += 1
        self.seconds += seconds


@dataclass(eq=False, repr=False)
class Metrics(AroundLayer):
    """Count and time what passes here, and export what all blocks below it count.

    Nothing is registered until it is built, and then with one collector per registry; any number
    of stacks share a registry, told apart by ``name``; stacks of one name are added up. Counting
    is plain integers; the work is done when somebody scrapes. With ``PROMETHEUS_MULTIPROC_DIR``
    set, what was counted is handed to the client's own metric objects at each scrape, every 5 s
    and at the end of the process.

    Args:
        inner: the store below.
        name: value of the ``stack`` label: letters, digits and ``_.:-``, up to 100.
        registry: a ``prometheus_client.CollectorRegistry``; None takes the client's default one.
        time_hits: ``"sampled"`` times one in-process hit in 64, weighted; ``"all"`` times each.
        clock: source of time.

    Raises:
        ConfigError: an option is out of range.

    Order:
        Outermost, so that it sees what callers see.
    """

    name: str = field(kw_only=True)
    registry: Any = field(default=None, kw_only=True, repr=False)
    time_hits: str = field(default="sampled", kw_only=True)
    clock: Clock = field(default=SYSTEM_CLOCK, kw_only=True, repr=False)

    kind: ClassVar[str] = "metrics"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME(self.name):
            raise ConfigError(
                "must be 1 to 100 letters, digits or '_.:-', beginning with a letter or '_'",
                option="name",
                layer="Metrics",
            )
        check_choice(self.time_hits, "time_hits", self, ("sampled", "all"))
        self._monotonic = self.clock.monotonic
        self._timings = {op: Timings() for op in Op}
        self._hit_counts: list[HitCount] = []
        self._hit_seconds = 0.0
        self._in_flight = 0
        self._health: dict[str, int] = {}
        super().__post_init__()
        from layered_store.metrics.prometheus import export  # noqa: PLC0415  an optional driver

        self._exporter = export(self, self.registry)

    async def around(
        self, op: Op, method: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        begun = self._monotonic()
        self._in_flight += 1
        outcome = "ok"
        try:
            return await method(*args, **kwargs)
        except BaseException as exc:
            outcome = outcome_of(exc)
            raise
        finally:
            self._in_flight -= 1
            self._timings[op].note(outcome, self._monotonic() - begun)

    async def health_report(self) -> HealthReport:
        report = await super().health_report()
        # Both trees have the same shape, so their places are met in the same order.
        levels = [each.status.level for each in _flat(report)]
        labels = [place.label for place in walk(self)]
        if len(levels) == len(labels):
            self._health = dict(zip(labels, levels, strict=True))
        return report

    def hot_path(self) -> HotPath | None:
        path = hot_path_of(self.inner)
        if path is None:
            return None
        return HotPath(
            path.entries,
            path.trust,
            path.monotonic,
            (*path.observers, self),
            (*path.timers, self._time_hit),
            time_all=path.time_all or self.time_hits == "all",
        )

    def attach_hits(self, count: HitCount) -> None:
        self._hit_counts.append(count)

    def _time_hit(self, seconds: float) -> None:
        self._timings[Op.GET_LATEST].sampled[bisect_left(DURATION_BUCKETS, seconds)] += 1
        self._hit_seconds += seconds

    def samples(self) -> Iterable[Sample]:
        """Return the figures of this layer; the exporter adds those of the blocks below."""
        hits = sum(count.read() for count in self._hit_counts)
        for op, timings in self._timings.items():
            extra = hits if op is Op.GET_LATEST else 0
            for outcome, value in timings.outcomes.items():
                total = value + (extra if outcome == "ok" else 0)
                if total:
                    yield Sample("operations", total, (op.value, outcome))
        yield Sample("operations_in_flight", self._in_flight)

    def durations(self) -> Iterable[tuple[str, list[int], float]]:
        """Return, by operation, how many took at most each bound, and the sum of seconds.

        Hits that were not timed are spread over the buckets as those that were, so that the count
        equals the number of operations.
        """
        hits = sum(count.read() for count in self._hit_counts)
        for op, timings in self._timings.items():
            buckets, seconds = list(timings.buckets), timings.seconds
            if op is Op.GET_LATEST and hits:
                timed = sum(timings.sampled)
                spread = [share * hits // timed for share in timings.sampled] if timed else [0]
                common = max(range(len(spread)), key=spread.__getitem__)
                spread[common] += hits - sum(spread)
                for index, value in enumerate(spread):
                    buckets[index] += value
                seconds += self._hit_seconds * hits / timed if timed else 0.0
            if any(buckets):
                yield op.value, list(accumulate(buckets)), seconds

    def health_levels(self) -> dict[str, int]:
        """Return the health of each block at the last check, by its ``layer`` label."""
        return self._health

    async def aclose(self) -> None:
        await super().aclose()
        self._exporter.closed(self)


# An ordinary attribute in place of the property that names other blocks by their class.
Metrics.name = "Metrics"


def outcome_of(exc: BaseException) -> str:
    """Return the ``outcome`` label for what a call raised."""
    if isinstance(exc, ValidationError):
        return "invalid"
    if isinstance(exc, StoreTimeoutError):
        return "timeout"
    if isinstance(exc, UnavailableError | ErasureIncompleteError):
        return "unavailable"
    if isinstance(exc, RejectedError):
        return "rejected"
    if isinstance(exc, asyncio.CancelledError | GeneratorExit):
        return "cancelled"
    return "error"


def _flat(report: HealthReport) -> Iterable[HealthReport]:
    yield report
    for child in report.children:
        yield from _flat(child)


def blocks_below(metrics: Metrics) -> Iterable[tuple[str, StateStore]]:
    """Yield the blocks whose figures a ``Metrics`` exports: all below it, by ``layer`` label."""
    for place in walk(metrics):
        if not isinstance(place.store, Metrics):
            yield place.label, place.store
