"""The conformance suite and the laws of layers catch what people get wrong, and say what it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import broken
import pytest

from layered_store import Cached, Compressed, MemoryStore, Retry, StateSnapshot
from layered_store.coherence import Authority
from layered_store.interface import StateStore
from layered_store.testing import Report, check_layer, check_store

# What the message must say, for the twelve faults of the field and a few more.
LAYERS = {
    "DropsHistory": "get_history() gave 0 states where the store inside has 4",
    "InheritsHealth": "forward health_report()",
    "HidesDelete": "delete() says unsupported although the store inside can",
    "ForgetsDelete": "delete() did not reach the store inside",
    "SwallowsCancellation": "let CancelledError through",
    "LeavesCallRunning": "left its call running in the store",
    "ForgetsClose": "aclose() did not close the store inside",
    "FailsToClose": "aclose() raised KeyError",
    "LayerLeavesTask": "left 1 tasks running after aclose()",
    "AnswersWhenClosed": "get_latest() after aclose() did not raise ClosedError",
    "StumblesWhenClosed": "get_latest() after aclose() raised AttributeError, not ClosedError",
    "NoLayer": "it inherits delete, get_history, health_report, aclose",
    "HidesTheClass": "snapshot_type is not that of the store inside",
    "LosesBatchItems": "upsert_latest_many() of 122 snapshots lost 100 of 120 users",
    "LosesBatchReads": "get_latest_many() found 2 of the 5 users",
    "SwallowsErrors": "failed in the store inside and returned normally",
    "NaiveCache": "put the older state back",
    "SharedLoad": "a reader that was cancelled took another one with it",
    "BypassesItself": "written through capability(Authority) does not show",
    "LeaksPlaces": "after 128 cancelled calls it refuses the next one (OverloadedError)",
    "RepeatsWrites": "upsert_latest() was repeated after it took effect",
    "RemembersAbsence": "a read after upsert_latest_many() gives an older state",
    "RemembersAbsenceLate": "put the absence back",
    "RemembersHistory": "a history after delete() is not []",
    "RemembersHistoryLate": "a get_history() that began before upsert_latest() put the older",
    "SkipsEqualWrites": "a read after upsert_latest() gives an older state",
    "MergesWrites": "only one of them reached the store inside",
}
STORES = {
    "SharesItsList": "changing what get_history() returned changed what the store holds",
    "ReturnsMutable": "get_latest() gave a Loose, not a StateSnapshot",
    "AcceptsNegativeLimit": "get_history(limit=-1) was accepted; raise ValidationError",
    "OldestFirst": "the history is oldest first; give the newest first",
    "IgnoresValidation": "upsert_latest() with a bad axes was accepted",
    "MixesStates": "a state was mixed with the one before it",
    "LeavesTask": "aclose() left 1 tasks running",
    "RoundsValues": "not equal to what was written; it differs in axes",
    "EqualToOthers": "two stores are equal",
    "DeleteLeavesHistory": "delete() left 3 states in the history",
    "LowersIds": "a user got the state of another one",
    "TellsIds": "error text shows a user id",
    "StoreSwallowsCancellation": "a cancelled call returned normally",
    "GrowsItsList": "a write changed the list that get_history() had returned",
    "ShiftsBatches": "users where get_latest() finds",
    "LosesHistoryEntries": "no write may undo another's entry",
    "SharesItsQuery": "of several users read at the same time one got another's state",
    "TakesTheFirstOfAMoment": "of two states of one moment the latest is not the one written last",
}


def messages(report: Report) -> str:
    return "\n".join(result.message for result in report.failures)


@pytest.mark.parametrize("name", LAYERS)
async def test_layer_is_caught(name: str) -> None:
    """A broken layer fails with a message that names the fault."""
    report = await check_layer(getattr(broken, name), limit=5)
    assert not report.ok
    assert LAYERS[name] in messages(report), str(report)


@pytest.mark.parametrize("name", STORES)
async def test_store_is_caught(name: str) -> None:
    """A broken store fails with a message that names the fault."""
    stores: list[StateStore] = []

    def build() -> StateStore:
        stores.append(getattr(broken, name)())
        return stores[-1]

    report = await check_store(build, limit=5)
    for store in stores:
        if (task := getattr(store, "task", None)) is not None:
            task.cancel()
    assert not report.ok
    assert STORES[name] in messages(report), str(report)


@pytest.mark.parametrize("versions", [True, False])
async def test_broken_around_some_stores(versions: bool) -> None:
    """A layer that is right around a store with versions and wrong around others is caught."""

    class Picky(broken.Layer):
        async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
            if (self.inner.capability(Authority) is not None) is versions:
                return await StateStore.get_history(self, user_id, limit)
            return await super().get_history(user_id, limit)

    report = await check_layer(Picky)
    assert "get_history() gave 0 states where the store inside has 4" in messages(report)


async def test_minimal_store() -> None:
    """A store of the two required methods is complete: what it cannot do is skipped and said."""
    report = await check_store(broken.Plain)
    assert report.ok, str(report)
    assert report.abilities == ("writes",)
    skipped = {result.message for result in report.results if result.outcome == "skipped"}
    assert "it cannot delete (UnsupportedError)" in skipped
    assert "it keeps no history" in skipped


async def test_store_that_hangs() -> None:
    """A check that does not end is a finding, and the others still run."""

    class Hangs(MemoryStore):
        async def get_latest_many(self, user_ids: Any) -> Any:
            del user_ids
            await asyncio.Event().wait()

    report = await check_store(Hangs, limit=0.1)
    failed = [result.check for result in report.failures]
    assert "A batch of reads agrees with single reads" in failed
    assert "did not end within 0.1 s" in messages(report)
    assert any(result.outcome == "passed" for result in report.results)


async def test_async_factory() -> None:
    """Factories may be coroutine functions."""

    async def build_store() -> StateStore:
        await asyncio.sleep(0)
        return MemoryStore()

    async def build_layer(inner: StateStore) -> StateStore:
        await asyncio.sleep(0)
        return broken.Layer(inner)

    assert await check_store(build_store)
    assert await check_layer(build_layer)


async def test_what_others_threw_away_is_not_the_layers() -> None:
    """A generator that is collected while a law runs, and takes its time to end, is nobody's task
    but the event loop's.
    """

    async def slow() -> AsyncIterator[None]:
        try:
            yield
        finally:
            await asyncio.sleep(0.5)

    async def factory(inner: StateStore) -> StateStore:
        thrown_away = slow()
        await anext(thrown_away)
        return Compressed(inner)

    report = await check_layer(factory)
    assert report.ok, str(report)


async def test_factory_of_something_else() -> None:
    """What is no store is refused, not checked."""
    with pytest.raises(TypeError, match="must return a StateStore, not dict"):
        await check_store(dict)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a function that builds a store"):
        await check_store(MemoryStore())  # type: ignore[arg-type]
    for nothing in (lambda: None, lambda _: None):
        with pytest.raises(TypeError, match="must return a StateStore, not NoneType"):
            await check_layer(nothing)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a function that builds a layer"):
        await check_layer(broken.Layer(MemoryStore()))  # type: ignore[arg-type]


async def test_factory_without_a_parameter() -> None:
    """A function that builds a whole stack is checked as well, its end being swapped."""
    stack = lambda: Cached(Retry(MemoryStore(), base_delay=0))  # noqa: E731
    report = await check_layer(stack)
    assert report.ok, str(report)
    report = await check_layer(lambda: Cached(broken.DropsHistory(MemoryStore())))
    assert "get_history() gave 0 states" in messages(report)


async def test_report() -> None:
    """The report reads well, and raises when told to."""
    good = await check_store(MemoryStore)
    good.raise_for_failures()
    assert good
    assert str(good).startswith(
        "MemoryStore: 23 passed, 0 failed, 0 skipped; abilities: writes, history"
    )
    bad = await check_store(broken.OldestFirst)
    assert not bad
    lines = str(bad).splitlines()
    assert lines[1].startswith("  FAIL  "), "failures come first"
    with pytest.raises(AssertionError, match="newest first"):
        bad.raise_for_failures()
