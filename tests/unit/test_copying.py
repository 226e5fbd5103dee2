"""Copying users between stores."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest

from layered_store.copying import CopiedUsers, Copy, Progress
from layered_store.enumerable import UserPage, enumerable_of, pages
from layered_store.errors import CorruptDataError, UnsupportedError
from layered_store.identity import digest_function
from layered_store.interface import StateStore
from layered_store.layer import Layer
from layered_store.layers.cached import Cached
from layered_store.layers.retry import Retry
from layered_store.layers.write_through import WriteThrough
from layered_store.snapshot import StateSnapshot
from layered_store.stores.memory import MemoryStore


async def _filled(users: int, states: int = 3) -> MemoryStore:
    store = MemoryStore()
    for state in range(states):
        for user in range(users):
            await store.upsert_latest(StateSnapshot(f"u-{user}", axes={"a": state / 10}))
    return store


async def _same(one: StateStore, two: StateStore) -> bool:
    listing = enumerable_of(one)
    assert listing is not None
    users = [user async for page in pages(listing, 100) for user in page.user_ids]
    return all([await one.get_history(u, 99) == await two.get_history(u, 99) for u in users])


async def _copy(source: StateStore, target: StateStore, **options: Any) -> Progress:
    copy = Copy(source, target, **options)
    async for _ in copy.run():
        pass
    await copy.finish()
    return copy.progress


async def test_copies_everything() -> None:
    """All users arrive with their histories in order."""
    source, target = await _filled(25), MemoryStore()
    copy = Copy(source, target, page=10)
    steps = [step.users async for step in copy.run()]
    assert steps == [10, 20, 25]
    assert copy.progress == Progress(None, users=25, states=75)
    assert await copy.finish() == (25, 25, 0)
    assert await _same(source, target)


async def test_goes_on_after_a_kill_at_any_point() -> None:
    """A page that was half written is finished, and nothing is written twice."""
    source = await _filled(4)
    states = [s for u in range(4) for s in (await source.get_history(f"u-{u}", 9))[::-1]]
    for written in range(len(states) + 1):
        target = MemoryStore()
        for state in states[:written]:
            await target.upsert_latest(state)
        progress = await _copy(source, target, page=10)
        assert progress.states == len(states) - written
        assert await _same(source, target)


@pytest.mark.parametrize("order", sorted(set(itertools.permutations("aabb"))), ids="".join)
async def test_equal_states_in_a_history(order: tuple[str, ...]) -> None:
    """Also when a user was twice in the very same state, a copy that goes on is whole."""
    source = MemoryStore()
    states = [
        StateSnapshot("u", updated_at_unix_ms=1, axes={axis: 1.0 for axis in name})
        for name in order
    ]
    for state in states:
        await source.upsert_latest(state)
    for written in range(len(states) + 1):
        target = MemoryStore()
        for state in states[:written]:
            await target.upsert_latest(state)
        await _copy(source, target)
        assert await target.get_history("u", 9) == states[::-1]


async def test_leaves_other_states_alone() -> None:
    """A user that the target knows otherwise is counted as a conflict and not touched."""
    source, target = await _filled(2), MemoryStore()
    own = StateSnapshot("u-1", axes={"other": 1.0})
    await target.upsert_latest(own)
    progress = await _copy(source, target)
    assert progress.conflicts == 1
    assert await target.get_history("u-1", 9) == [own]
    assert len(await target.get_history("u-0", 9)) == 3


async def test_target_that_keeps_less() -> None:
    """A target with a shorter history, or none, gets the newest states and no conflict."""
    source = await _filled(3)
    for limit in (0, 1, 2):
        target = MemoryStore(history_limit=limit)
        assert (await _copy(source, target)).conflicts == 0
        again = await _copy(source, target)
        assert (again.states, again.conflicts) == (0, 0)
        for user in ("u-0", "u-1", "u-2"):
            assert await target.get_latest(user) == await source.get_latest(user)
            assert len(await target.get_history(user, 9)) == limit


async def test_erased_at_the_source_after_it_was_copied() -> None:
    """A user erased at the source while the copy goes on is not left behind in the target."""
    source, target = await _filled(20), MemoryStore()
    await target.upsert_latest(StateSnapshot("only-there"))
    copy = Copy(source, target, page=5)
    erased: list[str] = []
    async for _ in copy.run():
        listed = (await source.users("", 100)).user_ids
        for user in listed[:2]:
            await source.delete(user)
            erased.append(user)
    counts = await copy.finish()
    assert [user for user in erased if await target.get_latest(user)] == []
    assert await target.get_latest("only-there") is not None
    assert counts == (12, 13, 0)
    assert await _same(source, target)


async def test_erased_at_the_source_while_the_copy_was_dead() -> None:
    """What an earlier run copied is known to the next one by digests alone."""
    source, target = await _filled(6), MemoryStore()
    digest, kept = digest_function(b"secret"), bytearray()
    first = Copy(source, target, copied=CopiedUsers(digest, remember=kept.extend), page=3)
    async for _ in first.run():
        break
    gone = [user for user in ("u-0", "u-1", "u-2", "u-3") if await target.get_latest(user)]
    assert gone
    for user in gone:
        await source.delete(user)
    copied = CopiedUsers(digest, bytes(kept) + b"cut off", kept.extend)
    progress = await _copy(source, target, progress=first.progress, copied=copied)
    assert progress.erased == len(gone)
    assert [user for user in gone if await target.get_latest(user)] == []
    assert await _same(source, target)


async def test_erased_at_the_target_during_the_copy() -> None:
    """An erasure at the target is final: the copy, which began earlier, does not undo it."""
    source, target = await _filled(10), MemoryStore()
    copy = Copy(source, target, page=4)
    for user in ("u-1", "u-7"):
        await target.delete(user)
    async for _ in copy.run():
        pass
    assert await target.get_latest("u-1") is None
    assert await target.get_latest("u-7") is None
    assert (copy.progress.erased, copy.progress.states) == (2, 24)


async def test_written_to_during_the_copy() -> None:
    """A user written at the source between the copy's reads arrives with every state, in order."""

    class Busy(MemoryStore):
        async def get_latest_many(self, user_ids: Any) -> dict[str, StateSnapshot]:
            found = await super().get_latest_many(user_ids)
            await self.upsert_latest(StateSnapshot("u-0", axes={"a": 0.9}))
            return found

    source, target = Busy(), MemoryStore()
    await source.upsert_latest(StateSnapshot("u-0", axes={"a": 0.1}))
    assert (await _copy(source, target)).conflicts == 0
    assert len(await target.get_history("u-0", 9)) == 2
    assert await target.get_latest("u-0") == await source.get_latest("u-0")


async def test_a_target_that_cannot_list() -> None:
    """It is copied to all the same; who would have to be erased there is counted."""
    source = await _filled(3)
    copy = Copy(source, Silent())
    async for _ in copy.run():
        await source.delete("u-1")
    assert await copy.finish() == (2, None, 1)


async def test_listing_pages() -> None:
    """Pages hold each user once, erased users not, also through layers."""
    store = await _filled(23, 1)
    await store.delete("u-7")
    for stack in (Cached(store), Retry(WriteThrough(MemoryStore(), origin=Cached(Retry(store))))):
        listing = enumerable_of(stack)
        assert listing is not None
        found = [user async for page in pages(listing, 5) for user in page.user_ids]
        assert sorted(found) == sorted(f"u-{i}" for i in range(23) if i != 7)


async def test_ids_that_a_layer_changes() -> None:
    """Past a layer that may know its users by other ids, nothing is listed at all."""
    assert enumerable_of(Layer(MemoryStore())) is None


async def test_back_again_before_the_end() -> None:
    """A user whom the last listing missed, since he came back meanwhile, stays in the target."""

    class Late(MemoryStore):
        missing = ""

        async def users(self, cursor: str, limit: int) -> Any:
            page = await super().users(cursor, limit)
            return page._replace(user_ids=[u for u in page.user_ids if u != self.missing])

    source, target = Late(), MemoryStore()
    for user in ("u-0", "u-1"):
        await source.upsert_latest(StateSnapshot(user))
    copy = Copy(source, target)
    async for _ in copy.run():
        source.missing = "u-1"
    await copy.finish()
    assert await target.get_latest("u-1") is not None
    assert copy.progress.erased == 0


async def test_a_history_that_lags_behind() -> None:
    """The latest state is copied although the history does not have it yet."""

    class Lagging(MemoryStore):
        async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
            return (await super().get_history(user_id, limit + 1))[1:]

    source, target = Lagging(), MemoryStore()
    for value in (0.1, 0.2, 0.3):
        await source.upsert_latest(StateSnapshot("u-0", axes={"a": value}))
    await _copy(source, target)
    assert [state.axes["a"] for state in await target.get_history("u-0", 9)] == [0.3, 0.2, 0.1]


async def test_a_source_that_cannot_list_is_refused() -> None:
    """Before anything is copied, saying what to name instead."""
    with pytest.raises(UnsupportedError, match="name its system of record"):
        Copy(Silent(), MemoryStore())


class Silent(MemoryStore):
    """Cannot tell its users."""

    def capability(self, kind: type[Any]) -> Any:
        return None


class Forgetful(MemoryStore):
    """Keeps no history; and loses a user between the listing and the read."""

    lost: str | None = None

    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        return []

    async def users(self, cursor: str, limit: int) -> UserPage:
        page = await super().users(cursor, limit)
        if self.lost is not None:
            await self.delete(self.lost)
        return page


async def test_without_a_history_the_latest_state_is_copied() -> None:
    """From a source that keeps none."""
    source, target = Forgetful(), MemoryStore()
    states = [StateSnapshot(f"u-{user}", 1, axes={"a": user / 10}) for user in range(3)]
    await source.upsert_latest_many(states)
    assert (await _copy(source, target)).states == 3
    for state in states:
        assert await target.get_history(state.user_id, 9) == [state]


class Damaged(MemoryStore):
    """A source with one user whose latest state cannot be read, and one with such a history."""

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        if user_id == "u-1":
            raise CorruptDataError("damaged")
        return await super().get_latest(user_id)

    async def get_latest_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        found = await super().get_latest_many(user_ids)
        found.pop("u-1", None)
        return found

    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        if user_id in ("u-1", "u-2"):
            raise CorruptDataError("damaged")
        return await super().get_history(user_id, limit)


async def test_a_record_that_cannot_be_read_leaves_its_user_alone() -> None:
    """It is counted, and all others are copied."""
    source, target = Damaged(), MemoryStore()
    await source.upsert_latest_many([StateSnapshot(f"u-{user}", 1) for user in range(4)])
    progress = await _copy(source, target)
    assert (progress.users, progress.states, progress.unreadable) == (4, 2, 2)
    assert set(await target.get_latest_many(f"u-{user}" for user in range(4))) == {"u-0", "u-3"}


async def test_a_user_erased_since_it_was_listed_is_not_copied() -> None:
    """Nor is it a conflict."""
    source, target = Forgetful(), MemoryStore()
    await source.upsert_latest_many([StateSnapshot(f"u-{user}", 1) for user in range(3)])
    source.lost = "u-1"
    progress = await _copy(source, target)
    assert (progress.states, progress.conflicts) == (2, 0)
    assert await target.get_latest("u-1") is None
    assert await target.get_latest("u-2") is not None
