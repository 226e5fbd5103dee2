"""MemoryStore: a full system of record in a dict."""

from __future__ import annotations

import asyncio
import gc

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from layered_store import ClosedError, MemoryStore, StateSnapshot, UnavailableError
from layered_store.call import call_begins, call_continues
from layered_store.coherence.contract import ABSENT
from layered_store.enumerable import pages
from layered_store.testing import FakeClock

DAY = 86_400.0


def state(user: str, number: int = 0) -> StateSnapshot:
    return StateSnapshot(user, updated_at_unix_ms=number)


async def test_history_is_bounded() -> None:
    """At most ``history_limit`` states of a user are kept; None keeps all, 0 none."""
    for limit, kept in ((3, 3), (None, 10), (0, 0), (1, 1)):
        store = MemoryStore(history_limit=limit)
        for number in range(10):
            await store.upsert_latest(state("u-1", number))
        history = await store.get_history("u-1", 100)
        assert [each.updated_at_unix_ms for each in history] == [9 - n for n in range(kept)]
        assert await store.get_latest("u-1") == state("u-1", 9)


async def test_older_snapshots_win_by_arrival() -> None:
    """Latest is the order of arrival, whatever the snapshots say of their time."""
    store = MemoryStore()
    await store.upsert_latest(state("u-1", 9))
    await store.upsert_latest(state("u-1", 1))
    assert await store.get_latest("u-1") == state("u-1", 1)


async def test_a_write_older_than_tombstones_brings_nobody_back() -> None:
    """A process slept for a week in the middle of a write: what it erased since is forgotten."""
    clock = FakeClock()
    store = MemoryStore(clock=clock)
    await store.upsert_latest(state("gone", 1))
    with call_begins(clock) as asleep:
        pass
    asleep.ended = False
    await store.delete("gone")
    version = (await store.read("gone")).version
    cursor = await store.head()
    await clock.advance(8 * DAY)
    await store.upsert_latest(state("other"))
    assert await store.read("gone") == ABSENT
    with call_continues(asleep), pytest.raises(UnavailableError, match="so long ago") as refused:
        await store.upsert_latest(state("gone", 2))
    assert not refused.value.retryable
    # A call of now is free to write; copies of before must not look newer than it.
    await store.upsert_latest(state("gone", 3))
    assert (await store.read("gone")).version > version
    assert await store.covers(cursor)


async def test_a_cursor_before_forgotten_erasures_covers_nothing() -> None:
    """A tier that was away for longer than tombstones live has to start over."""
    clock = FakeClock()
    store = MemoryStore(clock=clock)
    await store.upsert_latest(state("gone", 1))
    cursor = await store.head()
    await store.delete("gone")
    assert await store.covers(cursor)
    await clock.advance(8 * DAY)
    await store.upsert_latest(state("other"))
    assert not await store.covers(cursor)
    assert await store.covers(await store.head())


async def test_an_erasure_that_is_owed_is_not_forgotten() -> None:
    """A tier that was away for longer than tombstones live may still hold the user."""
    clock = FakeClock()
    store = MemoryStore(clock=clock)
    await store.erase("owing", ["redis"])
    for _ in range(3):
        await clock.advance(8 * DAY)
        await store.upsert_latest(state("other"))
        assert await store.debts("owing") == ["redis"]
    (owed,) = await store.owing("redis", 10)
    await store.settle(owed.digest, owed.version, "redis")
    await clock.advance(8 * DAY)
    await store.upsert_latest(state("other"))
    assert await store.read("owing") == ABSENT


async def test_tombstones_are_forgotten_after_7_days() -> None:
    """An erasure is remembered for 7 days and then leaves nothing behind."""
    clock = FakeClock()
    store = MemoryStore(clock=clock)
    for number in range(50):
        await store.upsert_latest(state(f"u-{number}"))
        await store.delete(f"u-{number}")
    assert (await store.read("u-1")).version == 2
    await clock.advance(7 * DAY - 1)
    await store.upsert_latest(state("other"))
    assert (await store.read("u-1")).version == 2
    await clock.advance(2)
    for number in range(50):
        await store.upsert_latest(state("other", number))
    assert await store.read("u-1") == ABSENT
    assert set(store._users) == {"other"}  # noqa: SLF001
    assert set(store._log) == {"other"}  # noqa: SLF001


async def test_an_erased_user_who_came_back_keeps_the_version() -> None:
    """A tombstone that was written over is not swept away with the user."""
    clock = FakeClock()
    store = MemoryStore(clock=clock)
    await store.upsert_latest(state("u-1"))
    await store.delete("u-1")
    await store.upsert_latest(state("u-1", 5))
    await clock.advance(8 * DAY)
    for number in range(5):
        await store.upsert_latest(state("other", number))
    assert await store.get_latest("u-1") == state("u-1", 5)
    assert (await store.read("u-1")).version == 3


async def test_repeats_of_a_batch_count_once() -> None:
    """A batch that is written again with the same write id appends nothing."""
    store = MemoryStore()
    batch = [state("u-1", 1), state("u-2", 1), state("u-1", 2)]
    with call_begins():
        await store.upsert_latest_many(batch)
        await store.upsert_latest_many(batch)
    assert await store.get_history("u-1", 10) == [state("u-1", 2), state("u-1", 1)]
    assert (await store.read("u-1")).version == 2


async def test_debts_are_kept_until_settled() -> None:
    """Each tier is owed until it is settled at the erasure's version or a later one."""
    store = MemoryStore()
    await store.upsert_latest(state("u-1"))
    version = await store.erase("u-1", ("b", "a"))
    digest = store.digest("u-1")
    assert list(await store.debts("u-1")) == ["a", "b"]
    await store.settle(digest, version - 1, "a")
    assert list(await store.debts("u-1")) == ["a", "b"]
    await store.settle(digest, version, "a")
    await store.settle(store.digest("nobody"), version, "b")
    assert list(await store.debts("u-1")) == ["b"]
    await store.settle(digest, version, "b")
    assert list(await store.debts("u-1")) == []
    assert list(await store.debts("nobody")) == []


async def test_changes_page_by_page() -> None:
    """Every user that changed after the cursor comes once, oldest first, in pages."""
    store = MemoryStore()
    await store.upsert_latest(state("before"))
    cursor = await store.head()
    for user in ("a", "b", "c", "a", "d"):
        await store.upsert_latest(state(user))
    await store.delete("b")
    seen: list[bytes] = []
    erased: list[bool] = []
    more = True
    while more:
        page = await store.changes(cursor, 2)
        assert len(page.items) <= 2
        seen += [change.digest for change in page.items]
        erased += [change.erased for change in page.items]
        cursor, more = page.cursor, page.more
    assert seen == [store.digest(user) for user in ("c", "a", "d", "b")]
    assert erased == [False, False, False, True]
    assert not (await store.changes(cursor, 2)).items


async def test_listing() -> None:
    """In pages, in order, without those who were erased; a cursor survives a change."""
    store = MemoryStore()
    for number in range(10):
        await store.upsert_latest(state(f"u-{number}"))
    await store.delete("u-3")
    first = await store.users("", 4)
    assert list(first.user_ids) == ["u-0", "u-1", "u-2", "u-4"]
    await store.upsert_latest(state("u-99"))
    rest: list[str] = []
    async for page in pages(store, 4, first.cursor or ""):
        rest += page.user_ids
    assert rest == ["u-5", "u-6", "u-7", "u-8", "u-9", "u-99"]


async def test_closed() -> None:
    """Every operation is refused, and what was kept is not shown."""
    store = MemoryStore()
    await store.upsert_latest(state("u-1"))
    await store.aclose()
    await store.aclose()
    for call in (
        store.get_latest("u-1"),
        store.upsert_latest(state("u-1")),
        store.delete("u-1"),
        store.get_history("u-1", 1),
        store.get_latest_many(["u-1"]),
        store.upsert_latest_many([state("u-1")]),
        store.users("", 1),
        store.open(),
    ):
        with pytest.raises(ClosedError, match="MemoryStore"):
            await call


async def test_nothing_is_left_of_lookups() -> None:
    """Asking for absent users takes no memory."""
    store = MemoryStore()
    for number in range(1_000):
        await store.get_latest(f"u-{number}")
        await store.get_history(f"u-{number}", 5)
    await store.get_latest_many([f"u-{number}" for number in range(1_000)])
    assert store._users == {}  # noqa: SLF001
    gc.collect()


class Model(RuleBasedStateMachine):
    """Any sequence of operations behaves as a dict of lists does."""

    users = st.sampled_from(["a", "b", "c"])

    def __init__(self) -> None:
        super().__init__()
        self.store = MemoryStore(history_limit=4)
        self.model: dict[str, list[StateSnapshot]] = {}
        self.versions: dict[str, int] = {}
        self.number = 0

    def run(self, call: object) -> object:
        return asyncio.run(_await(call))

    @rule(user=users)
    def write(self, user: str) -> None:
        self.number += 1
        self.run(self.store.upsert_latest(state(user, self.number)))
        self.model.setdefault(user, []).insert(0, state(user, self.number))

    @rule(batch=st.lists(users, max_size=4))
    def write_many(self, batch: list[str]) -> None:
        states = []
        for user in batch:
            self.number += 1
            states.append(state(user, self.number))
            self.model.setdefault(user, []).insert(0, states[-1])
        self.run(self.store.upsert_latest_many(states))

    @rule(user=users)
    def delete(self, user: str) -> None:
        self.run(self.store.delete(user))
        self.model.pop(user, None)

    @invariant()
    def agrees(self) -> None:
        async def check() -> None:
            for user in ("a", "b", "c"):
                kept = self.model.get(user, [])
                assert await self.store.get_latest(user) == (kept[0] if kept else None)
                assert await self.store.get_history(user, 10) == kept[:4]
                version = (await self.store.read(user)).version
                assert version >= self.versions.get(user, 0), "versions never fall"
                self.versions[user] = version
            many = await self.store.get_latest_many(["a", "b", "c"])
            assert many == {user: kept[0] for user, kept in self.model.items() if kept}

        self.run(check())


async def _await(call: object) -> object:
    return await call  # type: ignore[misc]


TestModel = Model.TestCase
TestModel.settings = settings(
    max_examples=30,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
