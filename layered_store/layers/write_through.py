"""A shared cache tier in front of the system of record."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Final, TypeVar, cast

from layered_store.call import call_begins
from layered_store.checks import (
    check_history,
    check_snapshot,
    check_snapshots,
    check_state,
    check_states,
    check_user_ids,
)
from layered_store.clock import SYSTEM_CLOCK, Clock
from layered_store.coherence.contract import (
    TRUST_SECONDS,
    Authority,
    CacheTier,
    Invalidations,
)
from layered_store.coherence.guarded import GuardedCopies
from layered_store.coherence.local import LocalCopies
from layered_store.coherence.outcomes import Erasures, not_happened
from layered_store.errors import ConfigError, StoreError
from layered_store.health import HealthReport, HealthStatus
from layered_store.identity import check_user_id
from layered_store.interface import Op, StateStore, ability_of, report_of, snapshot_type_of
from layered_store.layer import Layer
from layered_store.options import check_a, check_store
from layered_store.stats import Reads, Sample

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from layered_store.call import Call
    from layered_store.snapshot import StateSnapshot

__all__ = ["WriteThrough"]

C = TypeVar("C")

TIER_STEPS: Final = ("read", "write", "erase", "ping", "repair")
"""What can fail on the cache tier without any caller being told."""


@dataclass(eq=False, repr=False)
class WriteThrough(Layer):
    """Read from a cache tier in front of the system of record.

    Reads ask ``inner`` first, then ``origin``, and fill ``inner``. Writes are acknowledged when
    ``origin`` has them; ``inner`` is updated after that. While ``inner`` is down, ``origin`` serves
    reads and writes, and what changed meanwhile is not read from ``inner`` until it was repaired
    there. Histories come from ``origin``.

    Args:
        inner: the cache tier; give it a short time limit of its own.
        origin: the system of record: it alone acknowledges writes and decides their order.
        clock: source of time.

    Raises:
        ConfigError: ``inner`` and ``origin`` are one store, keep different classes of snapshots, or
            were built with different ``digest_key``.
        ErasureIncompleteError: from ``delete``, when ``inner`` may still hold the user.
        StoreTimeoutError: without versions, from a write or delete that waited behind another of
            the user that hangs; it was not sent.
        UnsupportedError: without versions, from a write or delete of a user whom another event loop
            writes at the same time.

    Order:
        Below ``Cached``; ``Retry``, ``Timeout`` and ``CircuitBreaker`` belong around ``inner`` and
        around ``origin`` separately, since they fail separately.

    Cancellation:
        A cancelled write may have reached ``origin``; the copy in ``inner`` is then doubtful and
        not read until it was repaired.
    """

    origin: StateStore = field(kw_only=True)
    clock: Clock = field(default=SYSTEM_CLOCK, kw_only=True, repr=False)

    kind: ClassVar[str] = "write_through"

    def __post_init__(self) -> None:
        check_store(self.origin, "origin", self)
        check_a(self.clock, Clock, "clock", self)
        super().__post_init__()
        if self.inner is self.origin:
            raise ConfigError(
                "must be another store than inner, which holds copies of what it has",
                option="origin",
                layer=self.name,
            )
        self._check_same_type(self.origin, "inner and origin")
        self._copies = LocalCopies(self.inner, self.clock)
        self._reads = Reads()
        self._erasures = Erasures(self.clock)
        self._authority = ability_of(self.origin, Authority)
        # With versions on both sides many processes agree; without, this one process does.
        self._guard: GuardedCopies | None = None
        tier = ability_of(self.inner, CacheTier)
        if tier is not None and self._authority is not None:
            if tier.digest.fingerprint != self._authority.digest.fingerprint:
                raise ConfigError(
                    "inner and origin must be built with the same digest_key=; and what changes the"
                    " user ids (Prefixed, Encrypted with hash_user_ids) must be around both alike,"
                    " or around this layer",
                    option="digest_key",
                    layer=self.name,
                )
            self._guard = GuardedCopies(tier, self._authority, self.clock, self.inner)

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        check_user_id(user_id, Op.GET_LATEST, self)
        if self._guard is not None:
            return await self._guard.get_latest(user_id)
        try:
            copy = await self._copies.read(user_id)
            snapshot = copy.snapshot
            if snapshot is not None:
                self._reads.hit += 1
                return snapshot
            mark = self._copies.watch(user_id) if copy.fillable else None
            try:
                snapshot = check_state(await self.origin.get_latest(user_id), user_id, self)
            except BaseException:
                self._copies.unwatch(mark)
                raise
            await self._copies.fill(user_id, snapshot, mark)
        except Exception as exc:
            self._reads.failed(exc)
            raise
        # The origin answered; the tier's failure to do so must not look like a miss.
        if copy.failed:
            self._reads.error += 1
        else:
            self._reads.miss += 1
        return snapshot

    async def get_latest_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        wanted = check_user_ids(user_ids, self)
        if self._guard is not None:
            return await self._guard.get_latest_many(wanted)
        try:
            found, missing, failed = await self._read_many(wanted)
        except Exception as exc:
            self._reads.failed(exc, len(wanted))
            raise
        self._reads.hit += len(wanted) - missing
        self._reads.error += failed
        self._reads.miss += missing - failed
        return {user_id: found[user_id] for user_id in wanted if user_id in found}

    async def _read_many(self, wanted: Sequence[str]) -> tuple[dict[str, StateSnapshot], int, int]:
        """Return what was found, how many the tier did not have, and how many it failed on."""
        copies = await self._copies.read_many(wanted)
        found = copies.found
        missing = tuple(user_id for user_id in wanted if user_id not in found)
        if not missing:
            return found, 0, 0
        marks = {
            user_id: self._copies.watch(user_id) if copies.fillable else None for user_id in missing
        }
        try:
            loaded = check_states(await self.origin.get_latest_many(missing), missing, self)
            found.update(loaded)
            while marks:
                user_id, mark = marks.popitem()
                if not await self._copies.fill(user_id, loaded.get(user_id), mark):
                    break
        finally:
            for mark in marks.values():
                self._copies.unwatch(mark)
        return found, len(missing), copies.failed

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        with call_begins(self.clock) as call:
            check_snapshot(snapshot, self.snapshot_type, block=self)
            user_id = snapshot.user_id
            if self._guard is not None:
                await self._guard.upsert_latest(snapshot)
                return
            with await self._copies.begin(user_id, Op.UPSERT_LATEST):
                try:
                    stands = await self._write(snapshot)
                except BaseException as exc:
                    self._unknown(user_id, exc)
                    raise
                if self._knows_what_stands(call):
                    await self._copies.put(user_id, stands)

    async def upsert_latest_many(self, snapshots: Iterable[StateSnapshot]) -> None:
        batch = check_snapshots(snapshots, self.snapshot_type, self)
        with call_begins(self.clock) as call:
            if self._guard is not None:
                await self._guard.upsert_latest_many(batch)
                return
            users = {snapshot.user_id for snapshot in batch}
            with await self._copies.begin_all(users, Op.UPSERT_LATEST_MANY) as turns:
                try:
                    stands = await self._write_many(batch)
                except BaseException as exc:
                    for user_id in turns:
                        self._unknown(user_id, exc)
                    raise
                if self._knows_what_stands(call):
                    for user_id in turns:
                        if not await self._copies.put(user_id, stands[user_id]):
                            break

    async def delete(self, user_id: str) -> None:
        check_user_id(user_id, Op.DELETE, self)
        with self._erasures.by(self), call_begins(self.clock):
            if self._guard is not None:
                await self._guard.delete(user_id)
            else:
                await self._delete(user_id)

    async def _delete(self, user_id: str) -> None:
        with await self._copies.begin(user_id, Op.DELETE):
            try:
                await self.origin.delete(user_id)
            except BaseException as exc:
                self._unknown(user_id, exc)
                raise
            await self._copies.bury(user_id)

    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        return check_history(await self.origin.get_history(user_id, limit), user_id, self.name)

    async def health_report(self) -> HealthReport:
        tier, origin = await asyncio.gather(report_of(self.inner), report_of(self.origin))
        if origin.status is HealthStatus.UNHEALTHY:
            status: HealthStatus = origin.status
            message = "the system of record is down"
        elif tier.status is HealthStatus.UNHEALTHY:
            status, message = HealthStatus.DEGRADED, "the cache tier is down"
        else:
            status, message = min(tier.status, origin.status, key=lambda s: s.level), ""
            if self._guard is not None and (trouble := self._guard.trouble):
                status, message = HealthStatus.DEGRADED, trouble
        latency = max(tier.latency_ms, origin.latency_ms)
        return HealthReport(self.name, status, latency, message, (tier, origin))

    async def open(self) -> None:
        tier, origin = await asyncio.gather(
            self.inner.open(), self.origin.open(), return_exceptions=True
        )
        if isinstance(origin, BaseException):
            raise origin
        # Without its cache tier the stack serves all the same, so that one may come up later.
        if isinstance(tier, BaseException) and not isinstance(tier, StoreError):
            raise tier
        if self._guard is not None:
            await self._guard.ready()

    @property
    def snapshot_type(self) -> type[StateSnapshot]:
        return snapshot_type_of(self.origin)

    def children(self) -> Mapping[str, StateStore]:
        return {"inner": self.inner, "origin": self.origin}

    def capability(self, kind: type[C]) -> C | None:
        if kind is Invalidations and self._guard is not None and self._guard.has_channel:
            return cast("C", self._guard)
        return super().capability(kind)

    def samples(self) -> Iterable[Sample]:
        guard = self._guard
        yield from (self._reads if guard is None else guard.reads).samples()
        copies = self._copies if guard is None else guard
        yield Sample("pending_repairs", copies.pending)
        yield Sample("erasures_incomplete", self._erasures.incomplete)
        for step in TIER_STEPS:
            yield Sample("tier_failures", copies.failures[step], (step,))
        if guard is not None:
            yield Sample("repairs", guard.repaired)
            yield Sample("channel_losses", guard.channel_losses)
            if (up := guard.channel_up) is not None:
                yield Sample("channel_up", int(up))

    def notes(self) -> tuple[str, ...]:
        """Return what ``describe`` says of this block: how processes agree."""
        if self._guard is not None:
            return (
                "versioned: other processes' writes show at once, after"
                f" {TRUST_SECONDS:g} s at the latest",
            )
        return ("no versions below: right within this process only",)

    @property
    def staleness(self) -> tuple[float, str]:
        """Seconds by which this block makes an answer older, and why when there is no bound."""
        if self._guard is not None:
            return TRUST_SECONDS, ""
        return math.inf, "the cache tier has no versions"

    async def aclose(self) -> None:
        self._refuse_operations()
        await self._erasures.end()
        if self._guard is not None:
            await self._guard.aclose()
        await self._close_children()

    def _unknown(self, user_id: str, exc: BaseException) -> None:
        """Note a write of the origin that failed and may still take effect."""
        if not not_happened(exc):
            self._copies.doubt(user_id, quarantine=True)

    def _knows_what_stands(self, call: Call) -> bool:
        """Tell whether what a write left in the origin is known; if not, the next read fills.

        An origin that keeps its versions to itself may have refused the write all the same, since
        an erasure or a newer snapshot won.
        """
        return self._authority is not None or not call.superseded

    async def _write(self, snapshot: StateSnapshot) -> StateSnapshot | None:
        """Write to the origin; return what it holds for the user afterwards."""
        if self._authority is None:
            await self.origin.upsert_latest(snapshot)
            return snapshot
        return (await self._authority.write(snapshot)).snapshot

    async def _write_many(
        self, batch: Sequence[StateSnapshot]
    ) -> Mapping[str, StateSnapshot | None]:
        if self._authority is None:
            await self.origin.upsert_latest_many(batch)
            return {snapshot.user_id: snapshot for snapshot in batch}
        records = await self._authority.write_many(batch)
        return {user_id: record.snapshot for user_id, record in records.items()}
