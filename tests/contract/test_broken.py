"""The conformance suite and the laws of layers catch what people get wrong, and say what it is."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Annotated, Any

import broken
import msgspec
import pytest

from layered_store import (
    Bulkhead,
    Cached,
    Compressed,
    MemoryStore,
    Retry,
    StateSnapshot,
    UnsupportedError,
)
from layered_store.coherence import Authority
from layered_store.interface import StateStore
from layered_store.options import Seconds
from layered_store.testing import (
    Report,
    check_layer,
    check_store,
    store_calls,
    store_life,
    store_suite,
)


@pytest.fixture(autouse=True)
async def ends_what_is_left() -> AsyncIterator[None]:
    """What is broken leaves tasks behind, here in the event loop of all tests."""
    before = asyncio.all_tasks()
    yield
    for task in asyncio.all_tasks() - before - {asyncio.current_task()}:
        task.cancel()
    await asyncio.sleep(0)  # not for those that swallow it


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
    "CallsItDegraded": "it says degraded; a layer has the status of what it wraps",
    "BatchLosesFields": "a batch of writes lost a state that counts as false, or one of its fields",
    "LeavesOutEqual": "a write that equals the one before is missing in the history",
    "CallsAllRetryable": "as UnavailableError; let it through as it is",
    "ForgetsDoubt": "came out without outcome_unknown",
    "CallsErasureUnavailable": "a ErasureIncompleteError from delete() of the store inside",
    "TellsWhoFailed": "the error of a failed get_latest() shows the user id",
    "LogsWhoFailed": "a failed get_latest() logs the user id",
    "RepeatsAll": "raised StoreError in the store inside and was called 2 times",
    "TakesDamageForAbsence": "says that there is no such user; let the CorruptDataError through",
    "SwallowsPending": "returned normally; let the ErasureIncompleteError through",
    "ForgetsBeforeOnly": "that began while upsert_latest() was under way put the older state back",
    "KeepsWhenDeleteFails": "a failed delete() took effect inside",
    "KeepsWhenBatchFails": "a failed upsert_latest_many() took effect inside",
    "KeepsErrors": "keep no errors",
    "FillsFromHistory": "a get_history() that began before upsert_latest() put the older state",
    "StaleForEver": "a read shows the state from before upsert_latest()",
    "ShowsWhatItHolds": "its repr shows a user id",
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
    "TellsIds": "an error text of get_latest() shows a user id",
    "StoreSwallowsCancellation": "a cancelled call returned normally",
    "GrowsItsList": "a write changed the list that get_history() had returned",
    "ShiftsBatches": "users where get_latest() finds",
    "LosesHistoryEntries": "no write may undo another's entry",
    "SharesItsQuery": "of several users read at the same time one got another's state",
    "TakesTheFirstOfAMoment": "of two states of one moment the latest is not the one written last",
    "ShortIds": "a valid user id was refused",
    "HistoryWithoutCase": "the history of a user holds states of another one with a similar id",
    "DeletesByPattern": "delete() removed another user with a similar id",
    "OrdersHistoryByTime": "the newest of the history is not the latest state; order both alike",
    "KeepsDifferingOnly": "a state that equals an earlier one is missing in the history",
    "ServesWhenClosed": "get_latest() after aclose() did not raise ClosedError",
    "WritesWhenClosed": "upsert_latest() after aclose() did not raise ClosedError",
    "EmptiesItselfWhenOpened": "open() of a store in use lost what it held",
    "ForgetsToCloseItself": "get_latest() after aclose() did not raise ClosedError",
    "SwallowsInContext": "`async with` swallowed an error",
    "ConnectsTwice": "of several first writes at the same time one was lost",
    "LeavesProbe": "aclose() left 1 tasks running",
    "SwallowsCancelledDelete": "a cancelled call returned normally",
    "TearsWrites": "after a cancelled write the newest of the history is not the latest state",
    "LosesConnections": "give back in `finally` what a call took",
    "HoldsUpTheLoop": "get_latest() held up the event loop for 0.",
    "MixesUpHistories": "one got another's state",
    "MixesUpDeletes": "keep what belongs to a call in that call",
    "ShowsIdsInBatches": "an error text of get_latest_many() shows a user id",
    "LogsIds": "what it logs shows a user id",
    "BelongsToALoop": "a call from a second event loop raised RuntimeError",
    "LosesFields": "it differs in level",
    "Hangs": "did not end within 2 s",
    "HealthHangs": "health_check() did not end within 0.3 s; bound what it waits for",
    "ClosesTwiceAtOnce": "raised AttributeError",
    "LeavesCallersBehind": "calls that were under way when it was closed did not end within",
    "CancelsItsCallers": "a call that was under way when it was closed raised CancelledError",
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
async def test_store_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken store fails with a message that names the fault."""
    for module in (store_calls, store_life, store_suite):
        monkeypatch.setattr(module, "SOON_SECONDS", 0.3)
    stores: list[StateStore] = []

    def build() -> StateStore:
        stores.append(getattr(broken, name)())
        return stores[-1]

    report = await check_store(build, limit=2)
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


@pytest.mark.parametrize("missing", ["get_history", "delete", "upsert_latest"])
async def test_what_a_store_cannot_do(missing: str) -> None:
    """A store may say of a history, of an erasure or of all writes that it cannot do that."""

    class Cannot(broken.Whole):
        pass

    async def refuse(self: StateStore, *_: object) -> None:
        raise UnsupportedError("not here", layer=self.name)

    setattr(Cannot, missing, refuse)
    report = await check_store(Cannot)
    assert report.ok, str(report)
    assert any("UnsupportedError" in each.message or not each.message for each in report.results)


async def test_how_long_the_event_loop_was_held_up_is_told() -> None:
    """It sleeps 0.06 s; a busy machine makes it longer, and never shorter."""
    report = await check_store(broken.HoldsUpTheLoop)
    told = re.search(
        r"get_latest\(\) held up the event loop for (\d+\.\d\d) s each time", messages(report)
    )
    assert told is not None
    assert float(told[1]) >= 0.06


async def test_states_of_an_application() -> None:
    """Fields that must be given are made up; one for which that cannot be is named."""

    class Odd(StateSnapshot, kw_only=True):
        score: Annotated[int, msgspec.Meta(ge=1000)]

    assert await check_store(lambda: MemoryStore(snapshot_type=broken.Mooded))
    with pytest.raises(TypeError, match=r"cannot make up a value for Odd\.score"):
        await check_store(lambda: MemoryStore(snapshot_type=Odd))


async def test_right_layers() -> None:
    """A cache that forgets in time, and a layer that takes one call at a time, are right."""
    assert await check_layer(broken.GoodCache, limit=timedelta(seconds=30))
    assert await check_layer(lambda inner: Bulkhead(inner, max_in_flight=1))


@pytest.mark.parametrize("limit", [0.1, timedelta(seconds=0.1)])
async def test_store_that_hangs(limit: Seconds) -> None:
    """A check that does not end is a finding, and the others still run."""

    class Hangs(MemoryStore):
        async def get_latest_many(self, user_ids: Any) -> Any:
            del user_ids
            await asyncio.Event().wait()

    report = await check_store(Hangs, limit=limit)
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
        "MemoryStore: 27 passed, 0 failed, 0 skipped; abilities: writes, history"
    )
    bad = await check_store(broken.OldestFirst)
    assert not bad
    assert repr(bad).startswith("<Report OldestFirst: ")
    assert bad.failures[0].message in repr(bad)
    assert "\n" not in repr(bad)
    lines = str(bad).splitlines()
    assert lines[1].startswith("  FAIL  "), "failures come first"
    with pytest.raises(AssertionError, match="newest first"):
        bad.raise_for_failures()
