"""Try a new backend with the traffic of the old one, unseen by the callers."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from layered_store.background import Background, Job, Lane
from layered_store.call import Call, call_begins, call_continues, current_call
from layered_store.checks import check_snapshot, check_snapshots, check_user_ids
from layered_store.clock import SYSTEM_CLOCK, Clock
from layered_store.coherence.contract import Authority, Versioned
from layered_store.coherence.offering import offered
from layered_store.coherence.outcomes import Erasures, erased_in_part, not_happened
from layered_store.coherence.views import View, view_of
from layered_store.errors import ErasureIncompleteError, StoreError
from layered_store.health import HealthReport, HealthStatus
from layered_store.identity import check_user_id
from layered_store.interface import Op, StateStore, report_of
from layered_store.layer import Layer
from layered_store.options import (
    Seconds,
    check_a,
    check_count,
    check_salt,
    check_seconds,
    check_share,
    check_store,
)
from layered_store.sharing import belongs
from layered_store.stats import Sample

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

    from layered_store.snapshot import StateSnapshot

__all__ = ["Shadow"]

C = TypeVar("C")
T = TypeVar("T")

_WRITES = ("ok", "error", "dropped")
_RESULTS = ("same", "missing", "extra", "older", "newer", "value", "history", "error", "dropped")


@dataclass(eq=False, repr=False)
class Shadow(Layer):
    """Send reads and writes to ``candidate`` as well, in the background, and count differences.

    Callers get the answers of ``inner``; they neither wait for the candidate nor see its errors.
    What the candidate holds is compared with what ``inner`` answered. A difference is checked a
    second time before it is counted, because the user may have been written meanwhile. Erasures are
    the exception: they go to both, and ``delete`` raises when the candidate may still hold the
    user.

    The work in the background is bounded: at most ``max_pending`` calls wait or run, further ones
    are dropped and counted, and each is cut off after ``timeout``. A write that was dropped or
    failed is missing at the candidate until the user is written again. Read
    ``differences`` and ``mirrored`` in code, or the metrics.

    Args:
        inner: the store that answers.
        candidate: the store on trial.
        share: the share of users that is mirrored, 0 to 1; always the same users.
        salt: another text selects other users for the same share, 0 to 64 bytes.
        timeout: seconds that one call to the candidate may take.
        max_pending: calls to the candidate that may wait or run at once.
        drain_seconds: how long ``aclose`` waits for them.
        clock: source of time.

    Raises:
        ConfigError: an option is out of range, or ``candidate`` keeps another class of snapshots.
        ErasureIncompleteError: from ``delete``, when ``inner`` erased and the candidate could not.

    Order:
        Below ``Cached``, around the backend that is to be replaced, such as the ``origin`` of a
        ``WriteThrough``; above it, every hit is mirrored. Right:
        ``Cached(redis, fallback=Shadow(old, candidate=new, share=0.1))``. Wrong:
        ``WriteThrough(Shadow(redis, candidate=other), origin=sql)``: a cache tier fills itself.

    Cancellation:
        What a cancelled call has mirrored goes on. After a write that failed or was
        cancelled, the candidate is given what ``inner`` holds ``timeout`` later. A cancelled delete
        may have erased in ``inner`` only; repeat it.
    """

    candidate: StateStore = field(kw_only=True)
    share: float = field(default=1.0, kw_only=True)
    salt: str = field(default="", kw_only=True)
    timeout: Seconds = field(default=1.0, kw_only=True)
    max_pending: int = field(default=256, kw_only=True)
    drain_seconds: Seconds = field(default=5.0, kw_only=True)
    clock: Clock = field(default=SYSTEM_CLOCK, kw_only=True, repr=False)

    kind: ClassVar[str] = "shadow"

    def __post_init__(self) -> None:
        check_store(self.candidate, "candidate", self)
        self.share = check_share(self.share, "share", self)
        check_salt(self.salt, self)
        self._timeout = check_seconds(self.timeout, "timeout", self)
        check_count(self.max_pending, "max_pending", self)
        self._drain = check_seconds(self.drain_seconds, "drain_seconds", self, positive=False)
        check_a(self.clock, Clock, "clock", self)
        self._background = Background(self._timeout, self.max_pending, self.clock)
        self._erasures = Erasures(self.clock)
        self._mirrored: Counter[str] = Counter(dict.fromkeys(_WRITES, 0))
        self._compared: Counter[str] = Counter(dict.fromkeys(_RESULTS, 0))
        super().__post_init__()
        self._check_same_type(self.candidate, "inner and candidate")

    # What it found

    @property
    def differences(self) -> dict[str, int]:
        """How comparisons ended, by result.

        ``same``; ``missing`` or ``extra`` (the candidate lacks the user, or has one that ``inner``
        lacks); ``older``, ``newer`` or ``value`` (another state, by its time); ``history``;
        ``error`` (the candidate failed); ``dropped`` (too many were waiting).
        """
        return dict(self._compared)

    @property
    def mirrored(self) -> dict[str, int]:
        """How mirrored writes ended: ``ok``, ``error`` or ``dropped``."""
        return dict(self._mirrored)

    def samples(self) -> Iterable[Sample]:
        for result, value in self._compared.items():
            yield Sample("shadow_comparisons", value, (result,))
        for outcome, value in self._mirrored.items():
            yield Sample("shadow_writes", value, (outcome,))
        yield Sample("shadow_pending", self._background.pending)
        yield Sample("erasures_incomplete", self._erasures.incomplete)

    # Reading

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        found = await super().get_latest(user_id)
        self.compare(user_id, found)
        return found

    async def get_latest_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        wanted = check_user_ids(user_ids, self)
        found = await super().get_latest_many(wanted)
        for user_id in wanted:
            self.compare(user_id, found.get(user_id))
        return found

    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        found = await super().get_history(user_id, limit)
        if found and self._mirrors(user_id):
            self._add_comparison(user_id, partial(self._compare_history, user_id, found, limit))
        return found

    def compare(self, user_id: str, found: StateSnapshot | None) -> None:
        """Look in the background whether the candidate gives the same answer."""
        if self._mirrors(user_id):
            self._add_comparison(user_id, partial(self._compare, user_id, found))

    async def _compare(self, user_id: str, found: StateSnapshot | None) -> str:
        theirs = await self.candidate.get_latest(user_id)
        if theirs == found:
            return "same"
        # Written meanwhile, here or elsewhere: then it tells nothing.
        if self._background.lanes[user_id].writing or await self.inner.get_latest(user_id) != found:
            return ""
        if theirs is None:
            return "missing"
        if found is None:
            return "extra"
        age = theirs.updated_at_unix_ms - found.updated_at_unix_ms
        return "older" if age < 0 else "newer" if age > 0 else "value"

    async def _compare_history(
        self, user_id: str, found: Sequence[StateSnapshot], limit: int
    ) -> str:
        theirs = await self.candidate.get_history(user_id, limit)
        # The candidate may keep a shorter history, or have begun later: only what both have counts.
        length = min(len(found), len(theirs))
        if theirs and theirs[:length] == list(found[:length]):
            return "same"
        if self._background.lanes[user_id].writing:
            return ""
        again = await self.inner.get_history(user_id, limit)
        return "history" if list(again) == list(found) else ""

    # Writing

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        check_snapshot(snapshot, self.snapshot_type, block=self)
        with call_begins(self.clock) as call:
            await self.mirror([snapshot], call, lambda: self.inner.upsert_latest(snapshot))

    async def upsert_latest_many(self, snapshots: Iterable[StateSnapshot]) -> None:
        batch = check_snapshots(snapshots, self.snapshot_type, self)
        with call_begins(self.clock) as call:
            await self.mirror(batch, call, lambda: self.inner.upsert_latest_many(batch))

    async def mirror(
        self,
        batch: Sequence[StateSnapshot],
        call: Call,
        write: Callable[[], Awaitable[T]],
    ) -> T:
        """Do ``write`` in ``inner``, then have the candidate follow; return its result."""
        lanes = {}
        places: dict[str, list[int]] = {}
        for index, snapshot in enumerate(batch):
            user_id = snapshot.user_id
            places.setdefault(user_id, []).append(index)
            if user_id not in lanes and self._mirrors(user_id):
                lane = lanes[user_id] = self._background.lane(user_id)
                if lane.writing:
                    lane.overlapped = True
                lane.writing += 1
        # One that is under way already may end before this write does.
        deletes = {user_id: -1 if lane.held else lane.deletes for user_id, lane in lanes.items()}
        written = False
        try:
            result = await write()
            written = True
        except StoreError as exc:
            if not_happened(exc):
                self._leave(lanes)
                lanes = {}
            raise
        finally:
            for user_id, lane in lanes.items():
                erased = lane.deletes != deletes[user_id] or lane.held
                if written and not erased and not call.superseded:
                    for index in places[user_id]:
                        own = call.again(call.part(index) if len(batch) > 1 else None)
                        self._add_write(user_id, self._follow(batch[index], own))
                if not written:
                    self._copy_later(user_id)
                elif erased or call.superseded or lane.overlapped:
                    # What inner holds for the user may not be what was written.
                    lane.wrote += lane.held > 0
                    self._add_write(user_id, partial(self._copy, user_id))
            self._leave(lanes)
        return result

    def _follow(self, snapshot: StateSnapshot, call: Call) -> Callable[[], Awaitable[str]]:
        async def follow() -> str:
            # With the write's own beginning, so that an erasure after it wins here too.
            with call_continues(call):
                await self.candidate.upsert_latest(snapshot)
            # An erasure reaches inner first: a write in between stands there, and was refused here.
            return await self._copy(snapshot.user_id) if call.superseded else "ok"

        return follow

    def _copy_later(self, user_id: str) -> None:
        """Give the candidate what ``inner`` holds, once a write that failed has had its time."""
        self._background.add_later(user_id, Job(partial(self._copy, user_id), self._mirrored))

    async def _copy(self, user_id: str) -> str:
        with call_begins(self.clock):
            found = await self.inner.get_latest(user_id)
            if found is not None and await self.candidate.get_latest(user_id) != found:
                await self.candidate.upsert_latest(found)
        return "ok"

    def _leave(self, lanes: Mapping[str, Lane]) -> None:
        for user_id, lane in lanes.items():
            lane.writing -= 1
            if not lane.writing:
                lane.overlapped = False
            self._background.tidy(user_id, lane)

    # Erasing

    async def delete(self, user_id: str) -> None:
        check_user_id(user_id, Op.DELETE, self)
        await self.erase(user_id, lambda: self.inner.delete(user_id))

    async def erase(self, user_id: str, erase: Callable[[], Awaitable[T]]) -> T:
        """Erase in ``inner`` by ``erase``, then at the candidate; return the result of the first.

        All users, whatever the share is now: it may have been larger before.
        """
        with self._erasures.by(self):
            return await self._erase(user_id, erase)

    async def _erase(self, user_id: str, erase: Callable[[], Awaitable[T]]) -> T:
        lane = self._background.lane(user_id)
        lane.held += 1
        lane.deletes += 1
        wrote = lane.wrote
        erased = False
        try:
            first: Exception | None = None
            try:
                result = await erase()
            except Exception as exc:  # noqa: BLE001  whatever it was, the candidate must erase
                first = exc
            # What waits was written before; the write that runs must not land after the erasure.
            # Another event loop goes on with it: the candidate is not erased from here.
            if lane.loop is asyncio.get_running_loop():
                self._background.drop(lane)
            second = await self._erase_candidate(user_id, lane)
            if first is not None and not isinstance(first, ErasureIncompleteError):
                raise first
            both = ((first, self.inner), (second, self.candidate))
            failures = [(exc, store) for exc, store in both if exc is not None]
            if failures:
                raise erased_in_part(failures, self.name, user_id) from failures[0][0]
            erased = True
        finally:
            lane.held -= 1
            if not erased and self._mirrors(user_id):
                # The user may still be there, and the candidate has lost what waited.
                self._copy_later(user_id)
            elif lane.wrote != wrote:
                self._add_write(user_id, partial(self._copy, user_id))
            self._background.start_there(user_id, lane)
        return result

    async def _erase_candidate(self, user_id: str, lane: Lane) -> Exception | None:
        try:
            if lane.loop is not asyncio.get_running_loop():
                raise StoreError("mirrored calls of this user run in another event loop")
            if lane.task is not None:
                await asyncio.wait((lane.task,))
            with call_continues(current_call(self.clock).anew()):
                async with self.clock.timeout(self._timeout):
                    await self.candidate.delete(user_id)
        except Exception as exc:  # noqa: BLE001  whatever it was, the candidate may hold the user
            return exc
        return None

    # The background

    def _mirrors(self, user_id: str) -> bool:
        return belongs(user_id, self.share, self.salt)

    def _add_write(self, user_id: str, work: Callable[[], Awaitable[str]]) -> None:
        self._background.add(user_id, Job(work, self._mirrored))

    def _add_comparison(self, user_id: str, work: Callable[[], Awaitable[str]]) -> None:
        lane = self._background.lanes.get(user_id)
        if lane is None or not lane.compares:
            self._background.add(user_id, Job(work, self._compared, compares=True))

    # The rest of a layer

    def capability(self, kind: type[C]) -> C | None:
        return offered(self, kind, _MirroringAuthority)  # type: ignore[no-any-return]

    async def health_report(self) -> HealthReport:
        inner, candidate = await asyncio.gather(report_of(self.inner), report_of(self.candidate))
        status, message = inner.status, ""
        if candidate.status is HealthStatus.UNHEALTHY and status is HealthStatus.HEALTHY:
            status = HealthStatus.DEGRADED
            message = "the candidate is down: it misses writes, and deletes fail"
        return HealthReport(self.name, status, inner.latency_ms, message, (inner, candidate))

    async def open(self) -> None:
        await self.inner.open()
        try:
            async with self.clock.timeout(self._timeout):
                await self.candidate.open()
        except (StoreError, TimeoutError):
            return  # on trial; what it misses is counted

    def children(self) -> Mapping[str, StateStore]:
        return {"inner": self.inner, "candidate": self.candidate}

    async def aclose(self) -> None:
        self._refuse_operations()
        await asyncio.gather(self._background.aclose(self._drain), self._erasures.end())
        await self._close_children()


class _Mirroring(View):
    """The authority of ``inner``; what passes it goes to the candidate as well."""

    __slots__ = ()

    layer: Shadow
    target: Authority

    async def read(self, user_id: str) -> Versioned:
        record = await self.target.read(user_id)
        self.layer.compare(user_id, record.snapshot)
        return record

    async def read_many(self, user_ids: Sequence[str]) -> Mapping[str, Versioned]:
        records = await self.target.read_many(user_ids)
        for user_id, record in records.items():
            self.layer.compare(user_id, record.snapshot)
        return records

    async def write(self, snapshot: StateSnapshot) -> Versioned:
        check_snapshot(snapshot, self.layer.snapshot_type, block=self.layer)
        with call_begins(self.layer.clock) as call:
            return await self.layer.mirror([snapshot], call, lambda: self.target.write(snapshot))

    async def write_many(self, snapshots: Sequence[StateSnapshot]) -> Mapping[str, Versioned]:
        batch = check_snapshots(snapshots, self.layer.snapshot_type, self.layer)
        with call_begins(self.layer.clock) as call:
            return await self.layer.mirror(batch, call, lambda: self.target.write_many(batch))

    async def erase(self, user_id: str, tiers: Sequence[str] = ()) -> int:
        check_user_id(user_id, Op.DELETE, self.layer)
        return await self.layer.erase(user_id, lambda: self.target.erase(user_id, tiers))


_MirroringAuthority: Any = view_of(Authority, _Mirroring)
