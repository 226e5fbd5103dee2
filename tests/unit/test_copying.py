"""Copying users between stores."""

from __future__ import annotations

from layered_store.copying import Progress, copy_users
from layered_store.enumerable import enumerable_of, pages
from layered_store.layers.cached import Cached
from layered_store.snapshot import StateSnapshot
from layered_store.stores.memory import MemoryStore


async def _filled(users: int, states: int = 3) -> MemoryStore:
    store = MemoryStore()
    for state in range(states):
        for user in range(users):
            await store.upsert_latest(StateSnapshot(f"u-{user}", axes={"a": state / 10}))
    return store


async def _same(one: MemoryStore, two: MemoryStore) -> bool:
    users = [user async for page in pages(one, 100) for user in page.user_ids]
    return all([await one.get_history(u, 99) == await two.get_history(u, 99) for u in users])


async def test_copies_everything() -> None:
    """All users arrive with their histories in order."""
    source, target = await _filled(25), MemoryStore()
    progress = Progress()
    steps = [step.users async for step in copy_users(source, target, progress, page=10)]
    assert steps == [10, 20, 25]
    assert (progress.states, progress.conflicts, progress.cursor) == (75, 0, None)
    assert await _same(source, target)


async def test_goes_on_after_a_kill_at_any_point() -> None:
    """A page that was half written is finished, and nothing is written twice."""
    source = await _filled(4)
    states = [s for u in range(4) for s in (await source.get_history(f"u-{u}", 9))[::-1]]
    for written in range(len(states) + 1):
        target = MemoryStore()
        for state in states[:written]:
            await target.upsert_latest(state)
        progress = Progress()
        async for _ in copy_users(source, target, progress, page=10):
            pass
        assert progress.states == len(states) - written
        assert await _same(source, target)


async def test_leaves_other_states_alone() -> None:
    """A user that the target knows otherwise is counted as a conflict and not touched."""
    source, target = await _filled(2), MemoryStore()
    own = StateSnapshot("u-1", axes={"other": 1.0})
    await target.upsert_latest(own)
    progress = Progress()
    async for _ in copy_users(source, target, progress):
        pass
    assert progress.conflicts == 1
    assert await target.get_history("u-1", 9) == [own]
    assert len(await target.get_history("u-0", 9)) == 3


async def test_listing_pages() -> None:
    """Pages hold each user once, erased users not, also through layers."""
    store = await _filled(23, 1)
    await store.delete("u-7")
    listing = enumerable_of(Cached(store))
    assert listing is not None
    found = [user async for page in pages(listing, 5) for user in page.user_ids]
    assert sorted(found) == sorted(f"u-{i}" for i in range(23) if i != 7)
