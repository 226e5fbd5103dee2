"""Send a share of the users another way, and change the share while running."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from layered_store.call import call_begins
from layered_store.checks import check_limit, check_snapshot, check_snapshots, check_user_ids
from layered_store.clock import SYSTEM_CLOCK, Clock
from layered_store.coherence.contract import Invalidations
from layered_store.enumerable import Enumerable, enumerable_of
from layered_store.errors import ConfigError, StoreError
from layered_store.health import HealthReport, HealthStatus
from layered_store.identity import check_user_id
from layered_store.interface import Op, StateStore, ability_of, report_of
from layered_store.layer import Layer
from layered_store.layers.cached import Cached
from layered_store.options import check_a, check_salt, check_share, check_store
from layered_store.ramping.around import layers_between, put_around, shown
from layered_store.ramping.through_layer import ThroughLayer
from layered_store.ramping.to_alternative import ToAlternative
from layered_store.sharing import belongs
from layered_store.stack import staleness
from layered_store.stats import Sample

if TYPE_CHECKING:
    from collections.abc import Iterable

    from layered_store.snapshot import StateSnapshot

__all__ = ["Ramp"]

C = TypeVar("C")


@dataclass(eq=False, repr=False)
class Ramp(Layer):
    """Send a share of the users through ``layer`` or to ``alternative``, the rest to ``inner``.

    For a given share it is always the same users, and a larger share includes all users of a
    smaller one. Set :attr:`share` at any time, ``ramp.share = 0.2``. However it changes, a
    read never returns an older state than a write that has returned.

    With ``layer``, both ways end in ``inner``. When a user leaves the share, their reads no longer
    go through the layer, but their writes and erasures still do, because it may hold their state.
    A cache in the layer behaves like any cache: writes of other processes show after its TTL. It is
    emptied whenever the share is raised, since reads that passed it by may have seen newer states.

    With ``alternative``, a second store takes every write and erasure of all users after ``inner``
    did, whatever the share, and answers the reads of the share. ``inner`` has everything at all
    times, so taking the share back to 0 is safe at any moment. Begin with an empty alternative: a
    user it does not have yet is read from ``inner``. When it misses a write of a user outside the
    share, the write stands and the user is read from ``inner`` until the next one reaches both; in
    the share, the write raises. Histories of the share begin with the first write that reached it.

    Args:
        inner: the way of everybody else.
        alternative: another store of the same class of snapshots.
        layer: instead of it, what is put around ``inner``: a function that takes a store and gives
            one around it, or a table as in a config file, ``{"use": "cached", "ttl": 5.0}``.
        share: the share of users that goes the other way, 0 to 1.
        salt: another text selects other users for the same share, 0 to 64 bytes.
        clock: source of time.

    Raises:
        ConfigError: an option is out of range, or not exactly one of ``alternative`` and ``layer``
            is given.
        UnavailableError: from an upsert of the share that ``inner`` took and the alternative did
            not, with ``outcome_unknown``; repeat it.
        ErasureIncompleteError: from ``delete``, when one of the two could not erase.
        UnsupportedError: from ``delete``, when neither of them can erase; with ``alternative``,
            from a write or delete of a user whom another event loop writes at the same time.
        StoreTimeoutError: with ``alternative``, from a write or delete that waited behind another
            of the user that hangs; it was not sent.

    Order:
        Above ``WriteThrough`` and below ``Cached``, which makes its choice cost nothing on a hit.
        Right: ``Cached(Ramp(stack, layer={"use": "timeout", "seconds": 0.2}, share=0.1))``.
        Wrong: ``WriteThrough(redis, origin=Ramp(sql, alternative=other))``, as no versions pass it
        and processes would not agree.

    Cancellation:
        A cancelled write may have reached ``inner`` and not the alternative, or reach it late; the
        user is then read from ``inner`` until a write that comes 5 s later, or more.
    """

    alternative: StateStore | None = field(default=None, kw_only=True)
    layer: Callable[[StateStore], StateStore] | Mapping[str, Any] | None = field(
        default=None,
        kw_only=True,
        metadata={"mask": shown, "table": "layer"},
    )
    share: float = field(default=0.0, kw_only=True)
    salt: str = field(default="", kw_only=True)
    clock: Clock = field(default=SYSTEM_CLOCK, kw_only=True, repr=False)

    kind: ClassVar[str] = "ramp"
    _reached: ClassVar[float] = 0.0

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "share":
            value = check_share(value, "share", self)
            if self.alternative is None and value > self.__dict__.get("share", value):
                # Reads that passed the layer by may have seen more than its caches hold.
                for store in self._layers():
                    if isinstance(store, Cached):
                        store.distrust()
            # Whoever was in the share once may still have something on that way.
            self.__dict__["_reached"] = max(self._reached, value)
        super().__setattr__(name, value)

    def __post_init__(self) -> None:
        check_salt(self.salt, self)
        check_a(self.clock, Clock, "clock", self)
        if (self.alternative is None) == (self.layer is None):
            raise ConfigError(
                "give either alternative= or layer=", option="alternative", layer=self.name
            )
        if self.alternative is not None:
            check_store(self.alternative, "alternative", self)
        if isinstance(self.layer, Mapping):
            # Read-only: a table is an option like any other, and no state to be emptied.
            self.layer = MappingProxyType(dict(self.layer))
        super().__post_init__()
        alternative = self.alternative
        if alternative is None:
            assert self.layer is not None
            self._other = put_around(self.inner, self.layer, self.name)
        else:
            self._other = alternative
        self._check_same_type(self._other, "both ways")
        self._ways: ToAlternative | ThroughLayer
        ends = (self, self.inner, self._other, self._in_share, self.clock)
        if alternative is not None:
            self._ways = ToAlternative(*ends)
        else:
            self._ways = ThroughLayer(*ends, was_in_share=self._was_in_share)

    def _in_share(self, user_id: str) -> bool:
        return belongs(user_id, self.share, self.salt)

    def _was_in_share(self, user_id: str) -> bool:
        return belongs(user_id, self._reached, self.salt)

    def takes(self, user_id: str) -> bool:
        """Tell whether reads of a user go the other way now."""
        return self._ways.takes(user_id)

    @property
    def behind(self) -> int:
        """How many users the alternative missed a write of."""
        return len(self._ways.behind) if isinstance(self._ways, ToAlternative) else 0

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        check_user_id(user_id, Op.GET_LATEST, self)
        return await self._ways.get_latest(user_id)

    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        check_user_id(user_id, Op.GET_HISTORY, self)
        check_limit(limit, self)
        return await self._ways.get_history(user_id, limit)

    async def get_latest_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        return await self._ways.get_latest_many(check_user_ids(user_ids, self))

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        check_snapshot(snapshot, self.snapshot_type, block=self)
        with call_begins(self.clock) as call:
            await self._ways.write([snapshot], Op.UPSERT_LATEST, call)

    async def upsert_latest_many(self, snapshots: Iterable[StateSnapshot]) -> None:
        batch = check_snapshots(snapshots, self.snapshot_type, self)
        with call_begins(self.clock) as call:
            await self._ways.write(batch, Op.UPSERT_LATEST_MANY, call)

    async def delete(self, user_id: str) -> None:
        check_user_id(user_id, Op.DELETE, self)
        await self._ways.erase(user_id)

    # The rest of a layer

    def capability(self, kind: type[C]) -> C | None:
        if isinstance(self, kind):
            return self
        if kind is Enumerable:
            return enumerable_of(self.inner)  # type: ignore[return-value]
        if kind is Invalidations and self.alternative is None:
            # What is written through the layer ends in inner too.
            return ability_of(self.inner, kind)
        return None

    async def health_report(self) -> HealthReport:
        if self.alternative is None:
            below = await report_of(self._other if self._reached else self.inner)
            return HealthReport(self.name, below.status, below.latency_ms, "", (below,))
        inner, other = await asyncio.gather(report_of(self.inner), report_of(self._other))
        status, message = inner.status, ""
        if other.status is HealthStatus.UNHEALTHY and status is HealthStatus.HEALTHY:
            status = HealthStatus.DEGRADED
            message = "the alternative is down: calls of the share and all deletes fail"
        latency = max(inner.latency_ms, other.latency_ms)
        return HealthReport(self.name, status, latency, message, (inner, other))

    async def open(self) -> None:
        if self.alternative is None:
            await (self._other if self._reached else self.inner).open()
            return
        await self.inner.open()
        try:
            await self._other.open()
        except StoreError:
            if self.share > 0.0:
                raise

    def children(self) -> Mapping[str, StateStore]:
        if self.alternative is None:
            return {"inner": self.inner}
        return {"inner": self.inner, "alternative": self.alternative}

    def notes(self) -> tuple[str, ...]:
        """Return what ``describe`` says of this block: where the share goes."""
        if self.alternative is not None:
            return (f"{self.share:.6g} of the users read from the alternative",)
        layers = [type(store).__name__ for store in self._layers()]
        return (f"{self.share:.6g} of the users go through {', '.join(layers) or 'nothing more'}",)

    @property
    def staleness(self) -> tuple[float, str]:
        """Seconds by which the other way makes an answer older, and why when there is no bound."""
        (other, why), (inner, no_bound) = staleness(self._other), staleness(self.inner)
        if no_bound:
            return 0.0, ""  # inner says so itself
        return max(0.0, other - inner), why

    def samples(self) -> Iterable[Sample]:
        yield Sample("ramp_share", self.share)
        for side, reads in self._ways.reads.items():
            yield Sample("ramp_reads", reads, (side,))
        if isinstance(self._ways, ToAlternative):
            yield Sample("ramp_behind", self.behind)
            yield Sample("erasures_incomplete", self._ways.calls.incomplete)
            return
        # The layers of the share are this block's own: what they count is counted here.
        totals: dict[tuple[str, tuple[str, ...]], float] = {}
        for store in self._layers():
            for sample in store.samples():
                key = (sample.metric, sample.labels)
                totals[key] = totals.get(key, 0.0) + sample.value
        for (metric, labels), value in totals.items():
            yield Sample(metric, value, labels)

    async def aclose(self) -> None:
        self._refuse_operations()
        await self._ways.end()
        results = await asyncio.gather(self._other.aclose(), return_exceptions=True)
        await self._close_children()
        for result in results:
            if isinstance(result, BaseException):
                raise result

    def _layers(self) -> list[StateStore]:
        return layers_between(self._other, self.inner)
