"""Stores and layers that are each wrong in one way, as people write them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from layered_store import (
    HealthReport,
    Layer,
    MemoryStore,
    Op,
    OverloadedError,
    StateSnapshot,
    StateStore,
    StoreError,
    UnavailableError,
    ValidationError,
)
from layered_store.layer import AroundLayer


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
