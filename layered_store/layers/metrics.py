"""Prometheus metrics of one point of a stack and of all blocks below it."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, ParamSpec, TypeVar

from layered_store.checks import not_of_user
from layered_store.clock import SYSTEM_CLOCK, Clock
from layered_store.errors import (
    ConfigError,
    ErasureIncompleteError,
    RejectedError,
    UnavailableError,
    ValidationError,
)
from layered_store.hotpath import HitCount, HotPath, hot_path_of
from layered_store.interface import Op
from layered_store.layer import AroundLayer
from layered_store.limits import call_limits
from layered_store.metrics.exemplars import Exemplar, ExemplarHook, checked
from layered_store.metrics.timings import Durations, HitTimings, Timings, cumulative
from layered_store.options import check_a, check_choice
from layered_store.stack import children_of, walk
from layered_store.stats import Sample

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator

    from layered_store.health import HealthReport
    from layered_store.interface import StateStore
    from layered_store.snapshot import StateSnapshot

__all__ = ["Metrics"]

P = ParamSpec("P")
T = TypeVar("T")

_FOLD = 1024
"""How many calls are counted at once."""

_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,100}").fullmatch


@dataclass(eq=False, repr=False)
class Metrics(AroundLayer):
    """Count and time what passes here, and export what all blocks below it count.

    Nothing is registered until it is built, and then with one collector per registry; any number
    of stacks share a registry, told apart by ``name``; stacks of one name are added up. It may
    stand anywhere and several times in one stack, under names of their own. Counting is plain
    integers; the work is done when somebody scrapes. A stack that is closed or gone takes its
    series along; while another of its name is open, what it counted stays in their sum.

    With ``PROMETHEUS_MULTIPROC_DIR`` set, what was counted is handed to the client's own metric
    objects at each scrape, four times a second, and at the end of the process.

    Args:
        inner: the store below.
        name: value of the ``stack`` label: letters, digits and ``_.:-``, up to 100.
        registry: a ``prometheus_client.CollectorRegistry``; None takes the client's default one.
        time_hits: ``"sampled"`` times one in-process hit in 64, weighted; ``"all"`` times each.
        exemplar: called when a call (no hit) ends; the labels it returns, such as a trace id, are
            kept with the bucket of the call and shown in OpenMetrics output. See
            :func:`layered_store.metrics.exemplars.trace_exemplar`. It must name no user.
        clock: source of time.

    Raises:
        ConfigError: an option is out of range.

    Order:
        Outermost, so that it sees what callers see; further ones where another view is wanted,
        such as around one backend.

    Cancellation:
        A cancelled call counts with the outcome ``cancelled``.
    """

    name: str = field(kw_only=True)
    registry: Any = field(default=None, kw_only=True, repr=False)
    time_hits: Literal["sampled", "all"] = field(default="sampled", kw_only=True)
    exemplar: ExemplarHook | None = field(default=None, kw_only=True, repr=False)
    clock: Clock = field(default=SYSTEM_CLOCK, kw_only=True, repr=False)

    kind: ClassVar[str] = "metrics"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME(self.name):
            raise ConfigError(
                "must be 1 to 100 of the letters a-z and A-Z, digits and '_.:-'",
                option="name",
                layer="Metrics",
            )
        check_choice(self.time_hits, "time_hits", self, ("sampled", "all"))
        if self.exemplar is not None and not callable(self.exemplar):
            raise ConfigError(
                "must be a function that returns a dict of labels, or None",
                option="exemplar",
                layer="Metrics",
            )
        check_a(self.clock, Clock, "clock", self)
        self._monotonic = self.clock.monotonic
        self._timings = {op: Timings() for op in Op}
        self._read_timings = self._timings[Op.GET_LATEST]
        self._hits = HitTimings()
        self._in_flight = 0
        self._exemplars: dict[tuple[str, int], Exemplar] = {}
        self._health: dict[str, int] = {}
        self._health_checked: float | None = None
        self._whole = type(self).around is Metrics.around
        super().__post_init__()
        limits = call_limits([place for place in walk(self) if place.path])
        self._call_limit = max((limit for limit in limits if limit is not None), default=0.0)
        from layered_store.metrics.prometheus import export  # noqa: PLC0415  an optional driver

        self._exporter = export(self, self.registry)

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        if not self._whole:
            return await super().get_latest(user_id)
        # ``around``, written out for what is called most: it costs a miss one coroutine less, and
        # those that go well are counted many at a time.
        begun = self._monotonic()
        self._in_flight += 1
        try:
            value = await self.inner.get_latest(user_id)
            if value is not None and getattr(value, "user_id", None) != user_id:
                raise not_of_user(user_id, Op.GET_LATEST, self.name)
        except BaseException as exc:
            self._in_flight -= 1
            self._note(Op.GET_LATEST, outcome_of(exc), begun)
            raise
        self._in_flight -= 1
        if self.exemplar is not None:
            self._note(Op.GET_LATEST, "ok", begun)
            return value
        recent = self._read_timings.recent
        recent.append(self._monotonic() - begun)
        if len(recent) >= _FOLD:
            self._read_timings.fold()
        return value

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
            self._note(op, outcome, begun)

    def _note(self, op: Op, outcome: str, begun: float) -> None:
        elapsed = self._monotonic() - begun
        cell = self._timings[op].note(outcome, elapsed)
        if self.exemplar is not None:
            self._keep_exemplar(op, cell, elapsed)

    def _keep_exemplar(self, op: Op, cell: int, elapsed: float) -> None:
        assert self.exemplar is not None
        try:
            labels = checked(self.exemplar())
        except Exception:  # noqa: BLE001  measuring must not fail a call
            labels = None
        if labels is not None:
            self._exemplars[op.value, cell] = Exemplar(labels, elapsed, self.clock.time())

    async def health_report(self) -> HealthReport:
        report = await super().health_report()
        labels = {place.path: place.label for place in walk(self)}
        self._health = {labels[path]: level for path, level in _levels("", self, report)}
        self._health_checked = self.clock.time()
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
            (*path.timers, self._hits.note),
            time_all=path.time_all or self.time_hits == "all",
        )

    def attach_hits(self, count: HitCount) -> None:
        self._hits.counts.append(count)

    def samples(self) -> Iterable[Sample]:
        """Return the figures of this layer; the exporter adds those of the blocks below."""
        hits = self._hits.hits
        for op, timings in self._timings.items():
            counts = dict(timings.fold().outcomes)
            if op is Op.GET_LATEST:
                counts["ok"] += hits
            if any(counts.values()):
                # "ok" also when it is 0, so that a share of it can be told; of the others only
                # what happened: all of them would double the cost of a scrape.
                for outcome, value in counts.items():
                    if value or outcome == "ok":
                        yield Sample("operations", value, (op.value, outcome))
        yield Sample("operations_in_flight", self._in_flight)
        if self._call_limit:
            yield Sample("call_limit", self._call_limit)
        if self._health_checked is not None:
            yield Sample("health_checked", self._health_checked)

    def durations(self) -> Iterable[tuple[str, Durations]]:
        """Return, for each operation that was called, how many took at most each bound.

        Hits that were not timed are spread over the buckets as those that were, so that the count
        equals the number of operations.
        """
        for op, timings in self._timings.items():
            timings.fold()
            hits = self._hits.spread() if op is Op.GET_LATEST else ([0] * len(timings.cells), 0.0)
            counts, seconds = cumulative(timings.cells, timings.seconds, hits)
            if counts[-1]:
                yield op.value, (counts, seconds)

    def exemplars(self, operation: str) -> dict[int, Exemplar]:
        """Return what the hook said of the last call of each bucket of an operation."""
        return {
            cell: each for (op, cell), each in list(self._exemplars.items()) if op == operation
        }

    def health_levels(self) -> dict[str, int]:
        """Return the health of each block at the last check, by its ``layer`` label."""
        return self._health

    def last_health_check(self) -> float:
        """Return when the health was last checked, in seconds since 1970; 0 when it never was."""
        return self._health_checked or 0.0

    async def aclose(self) -> None:
        try:
            await super().aclose()
        finally:
            self._exporter.closed(self)


# An ordinary attribute in place of the property that names other blocks by their class.
Metrics.name = "Metrics"


def outcome_of(exc: BaseException) -> str:
    """Return the ``outcome`` label for what a call raised."""
    if isinstance(exc, ValidationError):
        return "invalid"
    if isinstance(exc, TimeoutError):  # StoreTimeoutError is one; others are a third party's
        return "timeout"
    if isinstance(exc, UnavailableError | ErasureIncompleteError):
        return "unavailable"
    if isinstance(exc, RejectedError):
        return "rejected"
    if isinstance(exc, asyncio.CancelledError | GeneratorExit):
        return "cancelled"
    return "error"


def _levels(path: str, store: StateStore, report: HealthReport) -> Iterator[tuple[str, int]]:
    """Yield the health of each block by its path, as far as the reports go."""
    yield path, report.status.level
    below = children_of(store)
    if len(below) != len(report.children):
        return  # a third party's layer that reports as one
    for (role, child), each in zip(below.items(), report.children, strict=True):
        yield from _levels(f"{path}.{role}" if path else role, child, each)


def blocks_below(metrics: Metrics) -> Iterable[tuple[str, StateStore]]:
    """Yield the blocks whose figures a ``Metrics`` exports: all below it, by ``layer`` label."""
    for place in walk(metrics):
        if not isinstance(place.store, Metrics):
            yield place.label, place.store
