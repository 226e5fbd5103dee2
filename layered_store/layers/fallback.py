"""Read from a second store while the first is unavailable."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, ParamSpec, TypeVar

from layered_store.call import call_begins
from layered_store.checks import check_history, check_state, check_states, listed
from layered_store.clock import SYSTEM_CLOCK
from layered_store.coherence.outcomes import Erasures, erased_in_part, erased_nowhere
from layered_store.errors import RejectedError, StoreError, UnavailableError
from layered_store.health import HealthReport, HealthStatus
from layered_store.hotpath import HotPath, hot_path_of
from layered_store.identity import check_user_id
from layered_store.interface import Op, StateStore, report_of
from layered_store.layer import Layer
from layered_store.options import check_store
from layered_store.stats import Sample

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping

    from layered_store.snapshot import StateSnapshot

__all__ = ["Fallback"]

P = ParamSpec("P")
T = TypeVar("T")

_READS = (Op.GET_LATEST, Op.GET_LATEST_MANY, Op.GET_HISTORY)


@dataclass(eq=False, repr=False)
class Fallback(Layer):
    """Answer reads from ``secondary`` while ``inner`` is unavailable or refuses.

    Writes go to ``inner`` alone and fail when it fails: if ``secondary`` took writes, the two
    stores would disagree after the outage. ``secondary`` is fed by other means, such as replication
    or a copy job. Its answers may be older than what ``inner`` holds, by as much as those lag, and
    older than a write that has returned. An erasure goes to both, because ``secondary`` could show
    the user as long as it holds a copy; whatever feeds it must not bring the user back.

    Args:
        inner: the store to read from and to write to.
        secondary: a store with (older) copies of the same users, for reads.

    Raises:
        ConfigError: ``secondary`` is no store, or keeps another class of snapshots.
        ErasureIncompleteError: from ``delete``, when ``inner``, ``secondary`` or both could not
            erase; ``pending`` names them.
        UnsupportedError: from ``delete``, when neither of them can erase.

    Order:
        Around the ``Retry`` and ``CircuitBreaker`` of ``inner``: it answers what they gave up. A
        retry around it never sees an error. Below ``Cached``, keep the TTL short: an older copy
        from ``secondary`` is cached like any other. Right:
        ``Fallback(Retry(CircuitBreaker(primary)), secondary=replica)``. Wrong:
        ``Fallback(redis, secondary=sql)`` to put a cache before a database: that is
        ``WriteThrough(redis, origin=sql)``, which keeps both in step.

    Cancellation:
        A cancelled delete may have erased in ``inner`` and not in ``secondary``; repeat it.
    """

    secondary: StateStore = field(kw_only=True)

    kind: ClassVar[str] = "fallback"

    def __post_init__(self) -> None:
        check_store(self.secondary, "secondary", self)
        self._counts: Counter[Op] = Counter()
        self._erasures = Erasures(SYSTEM_CLOCK)
        super().__post_init__()
        self._check_same_type(self.secondary, "inner and secondary")

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        try:
            found = await self.inner.get_latest(user_id)
        except (UnavailableError, RejectedError) as exc:
            found = await self._instead(exc, Op.GET_LATEST, self.secondary.get_latest, user_id)
        return check_state(found, user_id, self)

    async def get_latest_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        wanted = listed(user_ids, "user_ids", Op.GET_LATEST_MANY, self)
        try:
            found = await self.inner.get_latest_many(wanted)
        except (UnavailableError, RejectedError) as exc:
            method = self.secondary.get_latest_many
            found = await self._instead(exc, Op.GET_LATEST_MANY, method, wanted)
        return check_states(found, wanted, self)

    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        try:
            found = await self.inner.get_history(user_id, limit)
        except (UnavailableError, RejectedError) as exc:
            method = self.secondary.get_history
            found = await self._instead(exc, Op.GET_HISTORY, method, user_id, limit)
        return check_history(found, user_id, self.name)

    async def _instead(
        self,
        first: StoreError,
        op: Op,
        method: Callable[P, Awaitable[T]],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        self._counts[op] += 1
        try:
            return await method(*args, **kwargs)
        except (UnavailableError, RejectedError) as second:
            # What the store that should have answered says decides whether to try again.
            try:
                raise first from second
            finally:
                del first  # it holds this frame

    async def delete(self, user_id: str) -> None:
        check_user_id(user_id, Op.DELETE, self)
        # One erasure, also where both stores are ways to the same database.
        with self._erasures.by(self), call_begins():
            failures: list[tuple[Exception, StateStore]] = []
            for store in (self.inner, self.secondary):
                try:
                    await store.delete(user_id)
                except Exception as exc:  # noqa: BLE001  whatever it was, the other must erase
                    failures.append((exc, store))
            if erased_nowhere(failures, of=2):
                raise failures[0][0]
            if failures:
                raise erased_in_part(failures, self.name, user_id) from failures[0][0]

    async def health_report(self) -> HealthReport:
        below = await asyncio.gather(report_of(self.inner), report_of(self.secondary))
        inner, secondary = (report.status is HealthStatus.UNHEALTHY for report in below)
        if inner and secondary:
            status, message = HealthStatus.UNHEALTHY, "inner and secondary are down"
        elif inner:
            status = HealthStatus.DEGRADED
            message = "inner is down: reads are answered by secondary, writes fail"
        elif secondary:
            status, message = (
                HealthStatus.DEGRADED,
                "secondary is down: nothing stands in for inner",
            )
        else:
            status = min((report.status for report in below), key=lambda each: each.level)
            message = ""
        latency = max(report.latency_ms for report in below)
        return HealthReport(self.name, status, latency, message, tuple(below))

    async def open(self) -> None:
        results = await asyncio.gather(
            self.inner.open(), self.secondary.open(), return_exceptions=True
        )
        failures = [result for result in results if isinstance(result, BaseException)]
        for failure in failures:
            # One of the two may come up later; anything but a StoreError is a mistake.
            if len(failures) == len(results) or not isinstance(failure, StoreError):
                raise failure

    async def aclose(self) -> None:
        self._refuse_operations()
        await self._erasures.end()
        await self._close_children()

    def children(self) -> Mapping[str, StateStore]:
        return {"inner": self.inner, "secondary": self.secondary}

    def samples(self) -> Iterable[Sample]:
        for op in _READS:
            yield Sample("fallbacks", self._counts[op], (op.value,))
        yield Sample("erasures_incomplete", self._erasures.incomplete)

    def hot_path(self) -> HotPath | None:
        return hot_path_of(self.inner)
