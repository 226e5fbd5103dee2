"""Stores and layers that are each wrong in one way, as people write them."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Iterable
from typing import Any

from layered_store import (
    ClosedError,
    CorruptDataError,
    ErasureIncompleteError,
    HealthReport,
    HealthStatus,
    Layer,
    MemoryStore,
    Op,
    OverloadedError,
    StateSnapshot,
    StateStore,
    StoreError,
    UnavailableError,
    UnsupportedError,
    ValidationError,
)
from layered_store.layer import AroundLayer
from layered_store.testing import Gate


class DropsHistory(Layer):
    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        return await StateStore.get_history(self, user_id, limit)


class InheritsHealth(Layer):
    async def health_check(self) -> bool:
        return await StateStore.health_check(self)

    async def health_report(self) -> HealthReport:
        return await StateStore.health_report(self)


class HidesDelete(Layer):
    async def delete(self, user_id: str) -> None:
        await StateStore.delete(self, user_id)


class ForgetsDelete(Layer):
    """A cache that deletes from itself and forgets the store inside."""

    async def delete(self, user_id: str) -> None:
        pass


class SwallowsCancellation(AroundLayer):
    async def around(self, op: Op, method: Any, /, *args: Any, **kwargs: Any) -> Any:
        del op
        try:
            return await method(*args, **kwargs)
        except asyncio.CancelledError:
            return None


class LeavesCallRunning(AroundLayer):
    """Shields the call below and lets nobody end it."""

    async def around(self, op: Op, method: Any, /, *args: Any, **kwargs: Any) -> Any:
        del op
        return await asyncio.shield(asyncio.ensure_future(method(*args, **kwargs)))


class SharesItsList(MemoryStore):
    """Returns the very list and dict that it keeps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lists: dict[str, list[StateSnapshot]] = {}

    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        fresh = await super().get_history(user_id, limit)
        if limit < 5:
            return fresh
        kept = self.lists.setdefault(user_id, fresh)
        if kept and fresh and fresh[0] != kept[0]:
            kept[:] = fresh
        return kept


class Loose:
    """A state that anybody can change, as a third party's dataclass would be."""

    def __init__(self, state: StateSnapshot) -> None:
        self.__dict__.update({name: getattr(state, name) for name in state.__struct_fields__})
        self.axes = dict(state.axes)


class ReturnsMutable(MemoryStore):
    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        found = await super().get_latest(user_id)
        return None if found is None else Loose(found)  # type: ignore[return-value]


class AcceptsNegativeLimit(MemoryStore):
    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        return await super().get_history(user_id, max(0, limit))


class OldestFirst(MemoryStore):
    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        kept = await super().get_history(user_id, 100)
        await super().get_history(user_id, limit)
        return kept[::-1][:limit]


class Plain(StateStore):
    """A dict with two methods, right but for what a subclass does wrong."""

    def __init__(self) -> None:
        self.states: dict[str, StateSnapshot] = {}
        self.kept: dict[str, list[StateSnapshot]] = {}

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        snapshot.validate()
        self.states[snapshot.user_id] = snapshot
        self.kept.setdefault(snapshot.user_id, []).insert(0, snapshot)

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        return self.states.get(user_id)


class IgnoresValidation(Plain):
    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        self.states[snapshot.user_id] = snapshot

    async def upsert_latest_many(self, snapshots: Iterable[StateSnapshot]) -> None:
        for snapshot in snapshots:
            await self.upsert_latest(snapshot)


class MixesStates(Plain):
    """An upsert taken for an update of the axes that it names."""

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        snapshot.validate()
        before = self.states.get(snapshot.user_id)
        axes = {**(before.axes if before else {}), **snapshot.axes}
        await super().upsert_latest(snapshot.__replace__(axes=axes))


class ForgetsClose(Layer):
    async def aclose(self) -> None:
        self._refuse_operations()


class FailsToClose(Layer):
    """Closes the store inside and then stumbles over itself."""

    async def aclose(self) -> None:
        await super().aclose()
        raise KeyError("connection")


class LayerLeavesTask(Layer):
    """Starts a loop of its own with the first write and forgets it when closed."""

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        if "task" not in self.__dict__:
            self.__dict__["task"] = asyncio.ensure_future(asyncio.sleep(60))
        await super().upsert_latest(snapshot)


class AnswersWhenClosed(Layer):
    """Keeps what it read last, for ever."""

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        if self.__dict__.get("closed"):
            return None
        return await super().get_latest(user_id)

    async def aclose(self) -> None:
        self.__dict__["closed"] = True
        await self._close_children()


class StumblesWhenClosed(Layer):
    """Throws away what it needs, and is called once more."""

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        if self.__dict__.get("closed"):
            raise AttributeError("no connection")
        return await super().get_latest(user_id)

    async def aclose(self) -> None:
        self.__dict__["closed"] = True
        await self._close_children()


class NoLayer(StateStore):
    """Wraps a store without being a layer: only what must be written is."""

    def __init__(self, inner: StateStore) -> None:
        self.inner = inner

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        await self.inner.upsert_latest(snapshot)

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        return await self.inner.get_latest(user_id)


class HidesTheClass(Layer):
    """Says that it keeps plain snapshots, whatever is inside."""

    @property
    def snapshot_type(self) -> type[StateSnapshot]:
        return StateSnapshot


class LeavesTask(MemoryStore):
    """Starts a loop of its own and forgets it when closed."""

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        self.task = asyncio.create_task(asyncio.sleep(3600))
        await super().upsert_latest(snapshot)


class RoundsValues(MemoryStore):
    """Wrong equality: what comes back is nearly what was written."""

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        snapshot.validate()
        axes = {name: round(value, 4) for name, value in snapshot.axes.items()}
        await super().upsert_latest(
            StateSnapshot(
                snapshot.user_id,
                snapshot.updated_at_unix_ms,
                snapshot.source,
                snapshot.confidence,
                axes,
            )
        )


class EqualToOthers(MemoryStore):
    """Wrong equality: any two of them are equal, as plain dataclasses are."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EqualToOthers)

    __hash__ = None  # type: ignore[assignment]


class LosesBatchItems(Layer):
    async def upsert_latest_many(self, snapshots: Iterable[StateSnapshot]) -> None:
        await self.inner.upsert_latest_many({s.user_id: s for s in list(snapshots)[:20]}.values())


class LosesBatchReads(Layer):
    async def get_latest_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        return await self.inner.get_latest_many(list(user_ids)[:2])


class DeleteLeavesHistory(Plain):
    async def delete(self, user_id: str) -> None:
        await self.get_latest(user_id)
        self.states.pop(user_id, None)

    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        await StateStore.get_history(self, user_id, limit)
        await self.get_latest(user_id)
        return self.kept.get(user_id, [])[:limit]


class SwallowsErrors(AroundLayer):
    """Best effort: what fails is logged and forgotten."""

    async def around(self, op: Op, method: Any, /, *args: Any, **kwargs: Any) -> Any:
        try:
            return await method(*args, **kwargs)
        except ValidationError:
            raise
        except StoreError:
            return {} if op is Op.GET_LATEST_MANY else None


class NaiveCache(Layer):
    """The cache that everybody writes first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.kept: dict[str, StateSnapshot] = {}

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        if user_id in self.kept:
            return self.kept[user_id]
        found = await self.inner.get_latest(user_id)
        if found:
            self.kept[user_id] = found
        return found

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        await self.inner.upsert_latest(snapshot)
        self.kept[snapshot.user_id] = snapshot

    async def upsert_latest_many(self, snapshots: Iterable[StateSnapshot]) -> None:
        batch = list(snapshots)
        await self.inner.upsert_latest_many(batch)
        for snapshot in batch:
            self.kept[snapshot.user_id] = snapshot

    async def delete(self, user_id: str) -> None:
        await self.inner.delete(user_id)
        self.kept.pop(user_id, None)


class SharedLoad(NaiveCache):
    """One load for all who ask, awaited by the first: whoever cancels it cancels all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.loads: dict[str, asyncio.Task[StateSnapshot | None]] = {}

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        load = self.loads.get(user_id)
        if load is None:
            load = self.loads[user_id] = asyncio.ensure_future(self.inner.get_latest(user_id))
            load.add_done_callback(lambda _: self.loads.pop(user_id, None))
        return await load


class LowersIds(MemoryStore):
    """Compares ids as some databases do."""

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        snapshot.validate()
        await super().upsert_latest(
            StateSnapshot(snapshot.user_id.lower(), axes=dict(snapshot.axes))
        )

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        return await super().get_latest(user_id.lower() if isinstance(user_id, str) else user_id)


class TellsIds(MemoryStore):
    """Shows the user in its errors."""

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        try:
            return await super().get_latest(user_id)
        except ValidationError as exc:
            raise ValidationError(f"bad user id {user_id}") from exc


class BypassesItself(NaiveCache):
    """A cache that offers the versions of what is inside, past itself."""

    def capability(self, kind: Any) -> Any:
        return self.inner.capability(kind)


class StoreSwallowsCancellation(MemoryStore):
    """Takes a cancellation for the end of a wait."""

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        try:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            pass
        return await super().get_latest(user_id)


class GrowsItsList(Plain):
    """Hands out the list that it goes on writing to."""

    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        await StateStore.get_history(self, user_id, limit)
        kept = self.kept.get(user_id, [])
        if len(kept) == 1 and limit == 5:
            if not getattr(self, "given", False):
                self.given = True
                return list(kept)
            return kept
        return kept[:limit]


class ShiftsBatches(Plain):
    """Pairs ids and states by position, absent ones forgotten."""

    async def get_latest_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        wanted = list(user_ids)
        found = [self.states[user] for user in wanted if user in self.states]
        return dict(zip(wanted, found, strict=False))


class LosesHistoryEntries(Plain):
    """Reads the history, waits for its database and writes back one entry more."""

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        snapshot.validate()
        kept = [snapshot, *self.kept.get(snapshot.user_id, [])]
        await asyncio.sleep(0)
        self.kept[snapshot.user_id] = kept
        self.states[snapshot.user_id] = kept[0]

    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        await StateStore.get_history(self, user_id, limit)
        return self.kept.get(user_id, [])[:limit]


class SharesItsQuery(Plain):
    """Keeps the user whom it looks for on itself while it waits for its connection."""

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        self.wanted = user_id
        await asyncio.sleep(0)
        return self.states.get(self.wanted)


class TakesTheFirstOfAMoment(Plain):
    """Sorts by the time of the states, and of two of one moment takes either."""

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        kept = self.kept.get(user_id, [])
        return max(kept[::-1], key=lambda state: state.updated_at_unix_ms, default=None)


class RepeatsWrites(Layer):
    """A retry by hand: each attempt is a write of its own."""

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        try:
            await super().upsert_latest(snapshot)
        except UnavailableError:
            await super().upsert_latest(snapshot)


class RemembersAbsence(Layer):
    """Forgets that a user was absent when a state is written, but not when a batch is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.absent: set[str] = set()

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        if user_id in self.absent:
            return None
        found = await super().get_latest(user_id)
        if found is None:
            self.absent.add(user_id)
        return found

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        await super().upsert_latest(snapshot)
        self.absent.discard(snapshot.user_id)


class RemembersAbsenceLate(RemembersAbsence):
    """The same with batches in mind, but not what was read meanwhile."""

    async def upsert_latest_many(self, snapshots: Iterable[StateSnapshot]) -> None:
        batch = list(snapshots)
        await super().upsert_latest_many(batch)
        self.absent -= {snapshot.user_id for snapshot in batch}


class RemembersHistory(Layer):
    """Keeps histories until the next write, and forgets erasures."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.histories: dict[tuple[str, int], list[StateSnapshot]] = {}

    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        key = (user_id, limit)
        if key not in self.histories:
            self.histories[key] = await super().get_history(user_id, limit)
        return list(self.histories[key])

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        await super().upsert_latest(snapshot)
        self.histories.clear()

    async def upsert_latest_many(self, snapshots: Iterable[StateSnapshot]) -> None:
        await super().upsert_latest_many(snapshots)
        self.histories.clear()


class RemembersHistoryLate(RemembersHistory):
    """The same with erasures in mind, but not what was read meanwhile."""

    async def delete(self, user_id: str) -> None:
        await super().delete(user_id)
        self.histories.clear()


class SkipsEqualWrites(Layer):
    """Leaves out a write that equals the one before, whatever happened between them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.last: dict[str, StateSnapshot] = {}

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        snapshot.validate()
        if self.last.get(snapshot.user_id) != snapshot:
            await super().upsert_latest(snapshot)
            self.last[snapshot.user_id] = snapshot


class MergesWrites(Layer):
    """Takes a write for done when another one of the user is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.writing: dict[str, asyncio.Event] = {}

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        snapshot.validate()
        if (other := self.writing.get(snapshot.user_id)) is not None:
            await other.wait()
            return
        done = self.writing[snapshot.user_id] = asyncio.Event()
        try:
            await super().upsert_latest(snapshot)
        finally:
            del self.writing[snapshot.user_id]
            done.set()


class LeaksPlaces(AroundLayer):
    """Bounds the calls at a time, and forgets the place of one that was cancelled."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.inside = 0

    async def around(self, op: Op, method: Any, /, *args: Any, **kwargs: Any) -> Any:
        if self.inside >= 64:
            raise OverloadedError("full", operation=op)
        self.inside += 1
        try:
            result = await method(*args, **kwargs)
        except Exception:
            self.inside -= 1
            raise
        self.inside -= 1
        return result


class Whole(Plain):
    """A store with all operations that waits for its database; right but for what a subclass does
    wrong.
    """

    def __init__(self) -> None:
        super().__init__()
        self.closed = False

    async def wait(self) -> None:
        if self.closed:
            raise ClosedError("closed", layer="Whole")
        await asyncio.sleep(0)

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        snapshot.validate()
        await self.wait()
        await super().upsert_latest(snapshot)

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        await self.wait()
        return self.states.get(user_id)

    async def delete(self, user_id: str) -> None:
        await self.wait()
        self.states.pop(user_id, None)
        self.kept.pop(user_id, None)

    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        await StateStore.get_history(self, user_id, limit)
        await self.wait()
        return self.kept.get(user_id, [])[:limit]

    async def aclose(self) -> None:
        self.closed = True


class ShortIds(Whole):
    """Its column is too narrow."""

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        if len(snapshot.user_id) > 64:
            raise ValidationError("the user id is too long")
        await super().upsert_latest(snapshot)


class HistoryWithoutCase(Whole):
    """Compares ids as it should in one table and as some databases do in the other."""

    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        await super().get_history(user_id, limit)
        return [s for key in self.kept if key.lower() == user_id.lower() for s in self.kept[key]][
            :limit
        ]


class DeletesByPattern(Whole):
    """Deletes with LIKE, to which an underscore is any character."""

    async def delete(self, user_id: str) -> None:
        await self.wait()
        for key in [*self.states]:
            if re.fullmatch(user_id.replace("_", "."), key):
                await super().delete(key)


class OrdersHistoryByTime(Whole):
    """The latest is what came last, the history goes by the states' own time."""

    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        kept = await super().get_history(user_id, min(limit, 1) and 10**6)
        return sorted(kept, key=lambda state: -state.updated_at_unix_ms)[:limit]


class KeepsDifferingOnly(Whole):
    """A history without what it has already."""

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        known = snapshot in self.kept.get(snapshot.user_id, [])
        await super().upsert_latest(snapshot)
        if known:
            self.kept[snapshot.user_id].pop(0)


class ServesWhenClosed(Whole):
    async def wait(self) -> None:
        await asyncio.sleep(0)


class WritesWhenClosed(Whole):
    """Refuses to read, and takes writes that go nowhere."""

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        snapshot.validate()
        if not self.closed:
            await super().upsert_latest(snapshot)


class EmptiesItselfWhenOpened(Whole):
    """Makes its tables anew."""

    async def open(self) -> None:
        self.states.clear()


class ForgetsToCloseItself(Whole):
    async def __aexit__(self, *exc_info: object) -> None:
        pass


class SwallowsInContext(Whole):
    async def __aexit__(self, *exc_info: object) -> Any:
        await self.aclose()
        return True


class ConnectsTwice(Whole):
    """Two first calls at the same time: each opens a database of its own."""

    opened = False

    async def wait(self) -> None:
        await super().wait()
        if not self.opened:
            await asyncio.sleep(0)
            self.opened = True
            self.states, self.kept = {}, {}


class LeavesProbe(Whole):
    """Starts a task for every health check."""

    async def health_check(self) -> bool:
        self.task = asyncio.create_task(asyncio.sleep(3600))
        return True


class SwallowsCancelledDelete(Whole):
    async def delete(self, user_id: str) -> None:
        try:
            await super().delete(user_id)
        except asyncio.CancelledError:
            pass


class TearsWrites(Whole):
    """Writes the history, then the latest state; cut off between them they stay apart."""

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        snapshot.validate()
        await self.wait()
        self.kept.setdefault(snapshot.user_id, []).insert(0, snapshot)
        await asyncio.sleep(0)
        self.states[snapshot.user_id] = snapshot


class LosesConnections(Whole):
    """A pool of ten that gets none back from a cancelled call."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = asyncio.Semaphore(10)

    async def wait(self) -> None:
        await self.pool.acquire()
        await super().wait()
        self.pool.release()


class HoldsUpTheLoop(Whole):
    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        self.reads = getattr(self, "reads", 0) + 1
        if self.reads < 20:
            time.sleep(0.06)  # noqa: ASYNC251  this is what is wrong
        return await super().get_latest(user_id)


class MixesUpHistories(Whole):
    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        self.wanted = user_id
        await StateStore.get_history(self, user_id, limit)
        await self.wait()
        return self.kept.get(self.wanted, [])[:limit]


class MixesUpDeletes(Whole):
    async def delete(self, user_id: str) -> None:
        self.wanted = user_id
        await self.wait()
        self.states.pop(self.wanted, None)
        self.kept.pop(self.wanted, None)


class ShowsIdsInBatches(Whole):
    async def get_latest_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        wanted = list(user_ids)
        try:
            return await super().get_latest_many(wanted)
        except ValidationError as exc:
            raise ValidationError(f"cannot look for {wanted}") from exc


class LogsIds(Whole):
    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        logging.getLogger("shop").warning("looking for %s", user_id)
        return await super().get_latest(user_id)


class BelongsToALoop(Whole):
    """What it waits on belongs to the event loop of the first call."""

    loop: Any = None

    async def wait(self) -> None:
        await super().wait()
        self.loop = self.loop or asyncio.get_running_loop()
        if self.loop is not asyncio.get_running_loop():
            raise RuntimeError("got a Future attached to a different loop")


class Mooded(StateSnapshot, kw_only=True):
    """A state of an application: with a field that must be given, and others."""

    mood: str
    level: int = 3


class LosesFields(Whole):
    """Reads the columns that it knows."""

    @property
    def snapshot_type(self) -> type[StateSnapshot]:
        return Mooded

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        found = await super().get_latest(user_id)
        if found is None:
            return None
        return Mooded(
            user_id,
            found.updated_at_unix_ms,
            found.source,
            found.confidence,
            found.axes,
            mood=found.mood,  # type: ignore[attr-defined]
        )


class Hangs(Whole):
    async def wait(self) -> None:
        await asyncio.Event().wait()


class HealthHangs(Whole):
    async def health_check(self) -> bool:
        await asyncio.Event().wait()
        return True


class ClosesTwiceAtOnce(Whole):
    """Forgets its connection when that is closed; who closes meanwhile does so too."""

    connection: Any = Gate

    async def aclose(self) -> None:
        self.closed = True
        if self.connection is not None:
            await asyncio.sleep(0)
            self.connection.__name__  # noqa: B018
            self.connection = None


class LeavesCallersBehind(Whole):
    """Its reader ends when it is closed, and nobody tells those who wait for an answer."""

    async def wait(self) -> None:
        await super().wait()
        if self.closed:
            await asyncio.Event().wait()


class CancelsItsCallers(Whole):
    def __init__(self) -> None:
        super().__init__()
        self.running: set[Any] = set()

    async def wait(self) -> None:
        if not self.closed:
            task = asyncio.current_task()
            self.running.add(task)
            try:
                await super().wait()
            finally:
                self.running.discard(task)
        await super().wait()

    async def aclose(self) -> None:
        await super().aclose()
        for task in self.running:
            task.cancel()


class CallsItDegraded(Layer):
    async def health_report(self) -> HealthReport:
        below = await self.inner.health_report()
        status = below.status if below.status is HealthStatus.HEALTHY else HealthStatus.DEGRADED
        return HealthReport(self.name, status, below.latency_ms, "", (below,))


class BatchLosesFields(Layer):
    async def upsert_latest_many(self, snapshots: Iterable[StateSnapshot]) -> None:
        fields = ("user_id", "updated_at_unix_ms", "source", "confidence", "axes")
        await self.inner.upsert_latest_many(
            [type(s)(*(getattr(s, name) for name in fields)) for s in snapshots]
        )


class LeavesOutEqual(Layer):
    """Asks what is there, and writes what differs."""

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        snapshot.validate()
        if await self.inner.get_latest(snapshot.user_id) != snapshot:
            await super().upsert_latest(snapshot)


class Translates(AroundLayer):
    """Raises ``becomes`` in place of every ``error`` from inside."""

    error: type[Exception] = StoreError
    becomes: Any = UnavailableError

    async def around(self, op: Op, method: Any, /, *args: Any, **kwargs: Any) -> Any:
        try:
            return await method(*args, **kwargs)
        except (ValidationError, ClosedError, UnsupportedError):
            raise
        except self.error as exc:
            raise self.becomes(f"{op.value} failed", operation=op) from exc


class CallsAllRetryable(Translates):
    pass


class ForgetsDoubt(Translates):
    error = UnavailableError


class CallsErasureUnavailable(Translates):
    error = ErasureIncompleteError


class TellsWhoFailed(AroundLayer):
    async def around(self, op: Op, method: Any, /, *args: Any, **kwargs: Any) -> Any:
        try:
            return await method(*args, **kwargs)
        except UnavailableError as exc:
            raise UnavailableError(f"{op.value} of {args[0]} failed") from exc


class LogsWhoFailed(AroundLayer):
    async def around(self, op: Op, method: Any, /, *args: Any, **kwargs: Any) -> Any:
        try:
            return await method(*args, **kwargs)
        except UnavailableError:
            logging.getLogger("shop").warning("%s of %s failed", op.value, args[0])
            raise


class RepeatsAll(AroundLayer):
    async def around(self, op: Op, method: Any, /, *args: Any, **kwargs: Any) -> Any:
        try:
            return await method(*args, **kwargs)
        except ValidationError:
            raise
        except StoreError:
            return await method(*args, **kwargs)


class TakesDamageForAbsence(AroundLayer):
    async def around(self, op: Op, method: Any, /, *args: Any, **kwargs: Any) -> Any:
        try:
            return await method(*args, **kwargs)
        except CorruptDataError:
            return {Op.GET_LATEST_MANY: {}, Op.GET_HISTORY: []}.get(op)


class SwallowsPending(Layer):
    async def delete(self, user_id: str) -> None:
        try:
            await super().delete(user_id)
        except ErasureIncompleteError:
            pass


class GoodCache(Layer):
    """A cache that is right but for what a subclass does wrong: not one call is kept that another
    one overtook.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.held: dict[str, StateSnapshot] = {}
        self.turn: dict[str, int] = {}

    def forget(self, *user_ids: str) -> None:
        for user_id in user_ids:
            self.held.pop(user_id, None)
            self.turn[user_id] = self.turn.get(user_id, 0) + 1

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        if user_id in self.held:
            return self.held[user_id]
        turn = self.turn.get(user_id)
        found = await super().get_latest(user_id)
        if found is not None and self.turn.get(user_id) == turn:
            self.held[user_id] = found
        return found

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        snapshot.validate()
        self.forget(snapshot.user_id)
        try:
            await super().upsert_latest(snapshot)
        finally:
            self.forget(snapshot.user_id)

    async def upsert_latest_many(self, snapshots: Iterable[StateSnapshot]) -> None:
        batch = list(snapshots)
        users = [snapshot.user_id for snapshot in batch]
        self.forget(*users)
        try:
            await super().upsert_latest_many(batch)
        finally:
            self.forget(*users)

    async def delete(self, user_id: str) -> None:
        self.forget(user_id)
        try:
            await super().delete(user_id)
        finally:
            self.forget(user_id)


class ForgetsBeforeOnly(GoodCache):
    """Forgets a user when a write begins, and keeps what is read until it takes effect."""

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        snapshot.validate()
        self.forget(snapshot.user_id)
        await self.inner.upsert_latest(snapshot)


class KeepsWhenDeleteFails(GoodCache):
    async def delete(self, user_id: str) -> None:
        await self.inner.delete(user_id)
        self.forget(user_id)


class KeepsWhenBatchFails(GoodCache):
    async def upsert_latest_many(self, snapshots: Iterable[StateSnapshot]) -> None:
        batch = list(snapshots)
        await self.inner.upsert_latest_many(batch)
        self.forget(*(snapshot.user_id for snapshot in batch))


class KeepsErrors(GoodCache):
    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        errors = self.__dict__.setdefault("errors", {})
        if user_id in errors:
            raise errors[user_id]
        try:
            return await super().get_latest(user_id)
        except UnavailableError as exc:
            errors[user_id] = exc
            raise


class FillsFromHistory(GoodCache):
    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        kept = await super().get_history(user_id, limit)
        if kept:
            self.held[user_id] = kept[0]
        return kept


class StaleForEver(GoodCache):
    """Serves its last copy while the store inside is away, even of a user who was deleted."""

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        old = self.__dict__.setdefault("old", {})
        try:
            found = await super().get_latest(user_id)
        except UnavailableError:
            if user_id in old:
                return old[user_id]
            raise
        if found is not None:
            old[user_id] = found
        return found


class ShowsWhatItHolds(GoodCache):
    def __repr__(self) -> str:
        return f"ShowsWhatItHolds({list(self.held)})"
