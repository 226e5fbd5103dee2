"""explain: what each tier holds of a user, looked at without a trace."""

from __future__ import annotations

from typing import Any

import cachetools
import pytest

from layered_store import (
    Cached,
    MemoryStore,
    Metrics,
    Prefixed,
    RedisStore,
    Retry,
    SQLStore,
    StateSnapshot,
    StateStore,
    Timeout,
    UnavailableError,
    ValidationError,
    WriteThrough,
    explain,
)
from layered_store.explaining import Held, Peek
from layered_store.stack import walk
from layered_store.testing.clock import FakeClock
from layered_store.testing.scripted import Scripted

WALL = 1_700_000_000.0


def state(user_id: str = "u-1", ago: float = 5.0) -> StateSnapshot:
    return StateSnapshot(user_id, int((WALL - ago) * 1000), axes={"marked": 0.7318})


def counts(stack: StateStore) -> list[Any]:
    return [sample for place in walk(stack) for sample in place.store.samples()]


async def test_tiers_of_one_process() -> None:
    """Age, time left and version of each tier that holds the user; layers are passed over."""
    clock = FakeClock(wall=WALL)
    record = MemoryStore(clock=clock)
    stack = Retry(Cached(Timeout(record, seconds=1), ttl=60, negative_ttl=9, clock=clock))
    before = counts(stack)
    assert [view.held for view in await explain(stack, "u-1", clock=clock)] == ["absent"] * 2
    await stack.upsert_latest(state())
    await clock.advance(20)
    cached, kept = await explain(stack, "u-1", clock=clock)
    assert (cached.index, cached.kind, cached.path) == (1, "cached", "inner")
    assert (cached.held, cached.age, cached.time_left, cached.answers) == ("state", 25, 40, True)
    assert (kept.index, kept.kind, kept.path) == (3, "memory", "inner.inner.inner")
    assert (kept.held, kept.age, kept.time_left, kept.version) == ("state", 25, None, 1)
    await clock.advance(40)
    cached, kept = await explain(stack, "u-1", clock=clock)
    assert (cached.held, cached.time_left, cached.answers) == ("state", 0, False)
    await stack.delete("u-1")
    cached, kept = await explain(stack, "u-1", clock=clock)
    assert (cached.held, kept.held, kept.version) == (Held.ABSENT, Held.ERASED, 2)
    await stack.get_latest("u-2")
    assert [v.time_left for v in await explain(stack, "u-2", clock=clock)] == [9, None]
    assert counts(stack) != before


@pytest.mark.parametrize("given", [None, cachetools.LRUCache(2), cachetools.LFUCache(2)])
async def test_looking_changes_and_counts_nothing(given: Any) -> None:
    """No hit, no miss, no use noted: the entry that was to be evicted still is."""
    stack = Cached(MemoryStore(), cache=given, max_entries=2)
    await stack.upsert_latest(state("u-1"))
    await stack.upsert_latest(state("u-2"))
    before = counts(stack)
    for _ in range(5):
        await explain(stack, "u-1")
        await explain(stack, "u-9")
    assert counts(stack) == before
    await stack.upsert_latest(state("u-3"))
    assert (await explain(stack, "u-1"))[0].held is Held.ABSENT
    assert (await explain(stack, "u-2"))[0].held is Held.STATE


async def test_three_tiers_on_real_servers(redis_url: str, sqlite_url: str) -> None:
    """Versions agree, the copy has its time to live, an erasure leaves tombstones."""
    async with Metrics(
        Cached(Retry(RedisStore(redis_url, ttl=500)), fallback=SQLStore(sqlite_url)), name="s"
    ) as stack:
        await stack.upsert_latest(state())
        cached, copy, row = await explain(stack, "u-1")
        assert [view.kind for view in (cached, copy, row)] == ["cached", "redis", "sql"]
        assert {view.held for view in (cached, copy, row)} == {Held.STATE}
        assert copy.version == row.version == cached.version
        assert copy.answers
        assert copy.time_left is not None
        assert 400 < copy.time_left <= 500
        text = str(await explain(stack, "u-1"))
        assert "4.redis: state" in text
        for mark in ("u-1", "marked", "0.7318"):
            assert mark not in text
        await stack.delete("u-1")
        cached, copy, row = await explain(stack, "u-1")
        assert [view.held for view in (cached, copy, row)] == ["absent", "erased", "erased"]
        assert copy.version == row.version
        absent = await explain(stack, "u-2")
        assert [view.held for view in absent] == ["absent"] * 3


async def test_a_redis_record_of_its_own(redis_url: str) -> None:
    """Without a tier above it answers by itself; what is no record is told as such."""
    async with RedisStore(redis_url) as store:
        await store.upsert_latest(state())
        (view,) = await explain(store, "u-1")
        assert (view.held, view.version, view.time_left, view.answers) == ("state", 1, None, True)
        await store.delete("u-1")
        (view,) = await explain(store, "u-1")
        assert (view.held, view.version) == (Held.ERASED, 2)
        await store.command("SET", store.key(store.digest("u-1")), b"nonsense")
        (view,) = await explain(store, "u-1")
        assert (view.held, view.note) == (Held.ABSENT, "what stands there is no record")
        before = counts(store)
        await explain(store, "u-1")
        assert counts(store) == before


async def test_a_tier_that_cannot_be_asked_is_unknown_and_the_others_are_told() -> None:
    """An outage of one tier does not hide what the others hold."""

    class Down(MemoryStore):
        async def peek(self, user_id: str) -> Peek:
            raise UnavailableError("the tier is down", layer="Down")

    class Odd(MemoryStore):
        async def peek(self, user_id: str) -> Peek:
            raise ValueError(user_id)

    down, odd = await explain(WriteThrough(Down(), origin=Odd()), "u-1")
    assert (down.held, down.note, down.answers) == ("unknown", "Down: the tier is down", False)
    assert (odd.held, odd.note) == (Held.UNKNOWN, "ValueError")
    (foreign,) = await explain(Retry(Scripted()), "u-1")
    assert foreign.held is Held.UNKNOWN
    assert "peek()" in str(foreign)


async def test_layers_that_rename_users_are_followed() -> None:
    """Each tier is asked by the id under which it knows the user."""
    store = Prefixed(MemoryStore(), prefix="acme-")
    await store.upsert_latest(state())
    assert (await explain(store, "u-1"))[0].held is Held.STATE
    assert (await explain(store, "acme-u-1"))[0].held is Held.ABSENT


async def test_a_store_that_knows_where_it_stands_is_looked_at_once() -> None:
    """What it holds of its stack is no part of the way down."""

    class Knowing(MemoryStore):
        stack: StateStore

        def children(self) -> dict[str, StateStore]:
            return {"stack": self.stack}

    record = Knowing()
    record.stack = stack = Prefixed(Cached(record), prefix="acme")
    await stack.upsert_latest(state())
    assert [view.kind for view in await explain(stack, "u-1")] == ["cached", "memory"]


async def test_a_bad_id_is_refused() -> None:
    """As by every operation."""
    with pytest.raises(ValidationError):
        await explain(MemoryStore(), "a b")
