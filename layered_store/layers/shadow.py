"""Try a new backend with the traffic of the old one, unseen by the callers."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections import Counter, deque
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from layered_store.call import Call, call_begins, call_continues, current_call
from layered_store.checks import check_snapshot, check_snapshots, check_user_ids
from layered_store.clock import SYSTEM_CLOCK, Clock
from layered_store.coherence.contract import Authority, Versioned
from layered_store.coherence.offering import offered
from layered_store.coherence.outcomes import not_happened, pending_of
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

    from layered_store.clock import TimerHandle
    from layered_store.snapshot import StateSnapshot

__all__ = ["Shadow"]

C = TypeVar("C")
T = TypeVar("T")

_WRITES = ("ok", "error", "dropped")
_RESULTS = ("same", "missing", "extra", "older", "newer", "value", "history", "error", "dropped")


class _Lane:
    """What goes to the candidate for one user, one thing after another.

    Args:
        jobs: what is to be done yet.
        task: does them, while there are any.
        writing: writes of the user under way in ``inner``.
        overlapped: whether two of them ever ran at the same time, so that nobody here knows which
            of them won.
        deletes: deletes of the user that began; one that overlaps a write decides about it.
        held: deletes that wait for their turn; nothing else begins meanwhile.
        wrote: writes that ended while a delete was held, so that it may not have erased them.
        compares: whether a comparison waits already; one is enough.
    """

    __slots__ = (
        "compares",
        "deletes",
        "held",
        "jobs",
        "loop",
        "overlapped",
        "task",
        "writing",
        "wrote",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.jobs: deque[_Job] = deque()
        self.task: asyncio.Task[None] | None = None
        self.writing = 0
        self.overlapped = False
        self.deletes = 0
        self.held = 0
        self.wrote = 0
        self.compares = False

    @property
    def idle(self) -> bool:
        return not (self.jobs or self.task or self.writing or self.held)


@dataclass(slots=True)
class _Job:
    """One thing to do at the candidate, and how it is counted."""

    work: Callable[[], Awaitable[str]]
    counts: Counter[str]
    compares: bool = False


@dataclass(eq=False, repr=False)
class Shadow(Layer):
    """Send reads and writes to ``candidate`` as well, in the background, and count differences.

    Callers get what ``inner`` says, when ``inner`` says it: nothing of the candidate (its speed,
    its errors, its hanging) reaches them. What it holds is compared with what ``inner`` answered; a
    difference is looked at a second time before it is counted, since the user may have been written
    meanwhile. Erasures are the exception: they go to both, and ``delete`` says when the candidate
    may still hold the user.

    The background has bounds: at most ``max_pending`` calls wait or run, more are dropped and
    counted, each is cut off after ``timeout``. A write that was dropped or failed is missing at
    the candidate until the user is written again: the candidate is fed, not kept in step. Read
    ``differences`` and ``mirrored`` in code, or the metrics.

    Args:
        inner: the store that answers.
        candidate: the store on trial.
        share: the share of users that is mirrored, 0 to 1; always the same users.
        salt: chooses other users, 0 to 64 bytes.
        timeout: seconds that one call of the candidate may take.
        max_pending: calls of the candidate that may wait or run at once.
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
        A cancelled call leaves what was mirrored to go on. After a write that failed or was
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
        self._lanes: dict[str, _Lane] = {}
        self._pending = 0
        self._timers: set[TimerHandle] = set()
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
        yield Sample("shadow_pending", self._pending)

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
        if self._lanes[user_id].writing or await self.inner.get_latest(user_id) != found:
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
        if self._lanes[user_id].writing:
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
                lane = lanes[user_id] = self._lane(user_id)
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
                lanes, deletes = self._left(lanes), {}
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
            self._left(lanes)
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
        if len(self._timers) >= self.max_pending or self._closed:
            self._mirrored["dropped"] += 1
            return

        def due() -> None:
            self._timers.discard(timer)
            self._add_write(user_id, partial(self._copy, user_id))

        timer = self.clock.call_later(self._timeout, due)
        self._timers.add(timer)

    async def _copy(self, user_id: str) -> str:
        with call_begins(self.clock):
            found = await self.inner.get_latest(user_id)
            if found is not None and await self.candidate.get_latest(user_id) != found:
                await self.candidate.upsert_latest(found)
        return "ok"

    def _left(self, lanes: Mapping[str, _Lane]) -> dict[str, _Lane]:
        for user_id, lane in lanes.items():
            lane.writing -= 1
            if not lane.writing:
                lane.overlapped = False
            self._tidy(user_id, lane)
        return {}

    # Erasing

    async def delete(self, user_id: str) -> None:
        check_user_id(user_id, Op.DELETE, self)
        await self.erase(user_id, lambda: self.inner.delete(user_id))

    async def erase(self, user_id: str, erase: Callable[[], Awaitable[T]]) -> T:
        """Erase in ``inner`` by ``erase``, then at the candidate; return the result of the first.

        All users, whatever the share is now: it may have been larger before.
        """
        lane = self._lane(user_id)
        here = lane.loop is asyncio.get_running_loop()
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
            if here:
                self._drop(lane)
            second = await self._erase_candidate(user_id, lane)
            if first is not None and not isinstance(first, ErasureIncompleteError):
                raise first
            failures = [exc for exc in (first, second) if exc is not None]
            if failures:
                raise ErasureIncompleteError(
                    "not every store has the user erased; repeat the delete",
                    pending=[
                        *(first.pending if first is not None else ()),
                        *(pending_of(second, self.candidate) if second is not None else ()),
                    ],
                    layer=self.name,
                    user_id=user_id,
                ) from failures[0]
            erased = True
        finally:
            lane.held -= 1
            if not erased and self._mirrors(user_id):
                # The user may still be there, and the candidate has lost what waited.
                self._copy_later(user_id)
            elif lane.wrote != wrote:
                self._add_write(user_id, partial(self._copy, user_id))
            if here:
                self._start(user_id, lane)
            else:
                with contextlib.suppress(RuntimeError):  # it was closed
                    lane.loop.call_soon_threadsafe(self._start, user_id, lane)
        return result

    async def _erase_candidate(self, user_id: str, lane: _Lane) -> Exception | None:
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

    def _lane(self, user_id: str) -> _Lane:
        lane = self._lanes.get(user_id)
        if lane is not None and lane.loop.is_closed():
            # What that loop left behind will never run.
            self._pending -= lane.task is not None
            self._drop(lane)
            lane = None
        if lane is None:
            lane = self._lanes[user_id] = _Lane(asyncio.get_running_loop())
        return lane

    def _tidy(self, user_id: str, lane: _Lane) -> None:
        if lane.idle and self._lanes.get(user_id) is lane:
            del self._lanes[user_id]

    def _add_write(self, user_id: str, work: Callable[[], Awaitable[str]]) -> None:
        self._add(user_id, _Job(work, self._mirrored))

    def _add_comparison(self, user_id: str, work: Callable[[], Awaitable[str]]) -> None:
        lane = self._lanes.get(user_id)
        if lane is not None and lane.compares:
            return
        self._add(user_id, _Job(work, self._compared, compares=True))

    def _add(self, user_id: str, job: _Job) -> None:
        lane = self._lane(user_id)
        here = lane.loop is asyncio.get_running_loop()
        if self._pending >= self.max_pending or not here or self._closed:
            job.counts["dropped"] += 1
            self._tidy(user_id, lane)
            return
        self._pending += 1
        lane.compares = lane.compares or job.compares
        lane.jobs.append(job)
        self._start(user_id, lane)

    def _drop(self, lane: _Lane) -> None:
        """Forget what waits, since the user is being erased; that is no loss and not counted."""
        self._pending -= len(lane.jobs)
        lane.jobs.clear()
        lane.compares = False

    def _lose(self, lane: _Lane) -> None:
        """Forget what waits and will not be done."""
        for job in lane.jobs:
            job.counts["dropped"] += 1
        self._drop(lane)

    def _start(self, user_id: str, lane: _Lane) -> None:
        if lane.jobs and lane.task is None and not lane.held and not self._closed:
            # A context of its own: what is done here is nobody's call.
            task = lane.loop.create_task(self._run(lane), context=contextvars.Context())
            if task.done():  # an eager one
                self._ended(user_id, lane, task)
                return
            lane.task = task
            # Not by the task: one that is cancelled as soon as it is made runs none of its code.
            task.add_done_callback(lambda ended: self._ended(user_id, lane, ended))
        else:
            self._tidy(user_id, lane)

    async def _run(self, lane: _Lane) -> None:
        """Do what waits for one user, until nothing does or the user is being erased."""
        while lane.jobs and not lane.held:
            job = lane.jobs.popleft()
            if job.compares:
                lane.compares = False
            try:
                async with self.clock.timeout(self._timeout):
                    result = await job.work()
            except Exception:  # noqa: BLE001  nothing of the candidate may reach a caller
                result = "error"
            except asyncio.CancelledError:
                job.counts["dropped"] += 1
                raise
            finally:
                self._pending -= 1
            if result:
                job.counts[result] += 1

    def _ended(self, user_id: str, lane: _Lane, task: asyncio.Task[None]) -> None:
        lane.task = None
        if task.cancelled():
            # The event loop ends: another task would be left behind on it.
            self._lose(lane)
        self._start(user_id, lane)

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
        for timer in self._timers:
            timer.cancel()
            self._mirrored["dropped"] += 1
        self._timers.clear()
        here = asyncio.get_running_loop()
        tasks = [
            lane.task
            for lane in self._lanes.values()
            if lane.task is not None and lane.loop is here
        ]
        if tasks:
            try:
                async with self.clock.timeout(self._drain):
                    await asyncio.wait(tasks)
            except TimeoutError:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        for lane in self._lanes.values():
            self._lose(lane)
        self._lanes.clear()
        await self._close_children()


class _Mirroring(View):
    """The authority of ``inner``; what passes it goes to the candidate as well."""

    __slots__ = ()

    layer: Shadow

    async def read(self, user_id: str) -> Versioned:
        record: Versioned = await self.target.read(user_id)
        self.layer.compare(user_id, record.snapshot)
        return record

    async def read_many(self, user_ids: Sequence[str]) -> Mapping[str, Versioned]:
        records: Mapping[str, Versioned] = await self.target.read_many(user_ids)
        for user_id, record in records.items():
            self.layer.compare(user_id, record.snapshot)
        return records

    async def write(self, snapshot: StateSnapshot) -> Versioned:
        check_snapshot(snapshot, self.layer.snapshot_type, block=self.layer)
        with call_begins(self.layer.clock) as call:
            record: Versioned = await self.layer.mirror(
                [snapshot], call, lambda: self.target.write(snapshot)
            )
        return record

    async def write_many(self, snapshots: Sequence[StateSnapshot]) -> Mapping[str, Versioned]:
        batch = check_snapshots(snapshots, self.layer.snapshot_type, self.layer)
        with call_begins(self.layer.clock) as call:
            records: Mapping[str, Versioned] = await self.layer.mirror(
                batch, call, lambda: self.target.write_many(batch)
            )
        return records

    async def erase(self, user_id: str, tiers: Sequence[str] = ()) -> int:
        check_user_id(user_id, Op.DELETE, self.layer)
        version: int = await self.layer.erase(user_id, lambda: self.target.erase(user_id, tiers))
        return version


_MirroringAuthority: Any = view_of(Authority, _Mirroring)
