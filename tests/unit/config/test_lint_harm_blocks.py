"""What the rules about encryption, compression, ramps, shadows and read-only layers warn of."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace as altered

from layered_store import (
    Cached,
    Compressed,
    CorruptDataError,
    Encrypted,
    MemoryStore,
    Ramp,
    ReadOnly,
    RedisStore,
    RejectedError,
    Shadow,
    SQLStore,
    StateSnapshot,
    StateStore,
    WriteThrough,
    lint,
)
from layered_store.coherence.contract import Authority
from layered_store.sealed import SealedSnapshot
from layered_store.testing.clock import settle

KEYS = [bytes(range(32))]
BIG = StateSnapshot("u", axes={f"axis_{n}": 0.5 for n in range(200)})
OLD, NEW = StateSnapshot("u", axes={"a": 0.1}), StateSnapshot("u", axes={"a": 0.9})
URL = "redis://127.0.0.1:6379/0"


class TheirTier(StateStore):
    """A third party's store, which may be anywhere."""

    def __init__(self) -> None:
        self.kept: dict[str, StateSnapshot] = {}

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        self.kept[snapshot.user_id] = snapshot

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        return self.kept.get(user_id)


def rules(stack: StateStore) -> set[str]:
    return {finding.rule for finding in lint(stack)}


async def stored(store: StateStore) -> Any:
    return await store.get_latest("u")


async def test_ls050_ciphertext_does_not_get_smaller() -> None:
    """Compressed inside Encrypted spends time and saves nothing; outside, it saves most."""
    wrong_end, right_end = MemoryStore(), MemoryStore()
    wrong = Encrypted(Compressed(wrong_end), keys=KEYS)
    right = Compressed(Encrypted(right_end, keys=KEYS))
    for stack in (wrong, right):
        await stack.upsert_latest(BIG)
        assert await stack.get_latest("u") == BIG
    assert "LS050" in rules(wrong)
    assert "LS050" not in rules(right)
    assert len((await stored(wrong_end)).sealed) > 5 * len((await stored(right_end)).sealed)


async def test_ls051_every_hit_is_decrypted() -> None:
    """The cache holds ciphertext, and a hundred hits decrypt a hundred times."""
    decrypted = 0

    class Counting(Encrypted):
        def up(self, kept: StateSnapshot, user_id: str) -> StateSnapshot:
            nonlocal decrypted
            decrypted += 1
            return super().up(kept, user_id)

    wrong = Counting(Cached(MemoryStore()), keys=KEYS)
    right = Cached(Counting(MemoryStore(), keys=KEYS))
    for stack, most in ((wrong, 100), (right, 1)):
        await stack.upsert_latest(OLD)
        decrypted = 0
        for _ in range(100):
            await stack.get_latest("u")
        assert (decrypted >= most) if stack is wrong else (decrypted <= most)
    assert "LS051" in rules(wrong)
    assert "LS051" not in rules(right)


async def test_ls052_the_other_tier_is_in_the_clear() -> None:
    """With one side encrypted, the other has every state readable."""
    tier = TheirTier()
    wrong = WriteThrough(tier, origin=Encrypted(MemoryStore(), keys=KEYS))
    await wrong.upsert_latest(OLD)
    assert (await stored(tier)).get_axis("a") == 0.1
    assert "LS052" in rules(wrong)
    tier = TheirTier()
    right = WriteThrough(
        Encrypted(tier, keys=KEYS), origin=Encrypted(MemoryStore(), keys=KEYS)
    )
    await right.upsert_latest(OLD)
    assert type(await stored(tier)) is SealedSnapshot
    assert "LS052" not in rules(right)
    # The memory of this process holds states in the clear anyway.
    assert "LS052" not in rules(
        WriteThrough(MemoryStore(), origin=Encrypted(SQLStore("sqlite://"), keys=KEYS))
    )
    assert "LS052" in rules(WriteThrough(Encrypted(tier, keys=KEYS), origin=TheirTier()))


async def test_ls053_a_damaged_copy_is_an_error() -> None:
    """Around both tiers at once, what the tier damaged cannot be told from a damaged record."""

    def parts() -> tuple[MemoryStore, MemoryStore]:
        return MemoryStore(), MemoryStore()

    tier, origin = parts()
    wrong = Encrypted(WriteThrough(tier, origin=origin), keys=KEYS)
    await wrong.upsert_latest(OLD)
    await tier.upsert_latest(altered(await stored(tier), sealed=b"\x02" + bytes(60)))
    with pytest.raises(CorruptDataError):
        await wrong.get_latest("u")
    tier, origin = parts()
    right = WriteThrough(Encrypted(tier, keys=KEYS), origin=Encrypted(origin, keys=KEYS))
    await right.upsert_latest(OLD)
    await tier.upsert_latest(altered(await stored(tier), sealed=b"\x02" + bytes(60)))
    assert await right.get_latest("u") == OLD
    sql = SQLStore("sqlite://")
    assert "LS053" in rules(Encrypted(WriteThrough(RedisStore(URL), origin=sql), keys=KEYS))
    both = WriteThrough(
        Encrypted(RedisStore(URL), keys=KEYS), origin=Encrypted(SQLStore("sqlite://"), keys=KEYS)
    )
    assert "LS053" not in rules(both)


async def test_ls054_anybody_with_the_database_can_put_a_state_there() -> None:
    """A forged plain record is believed, until accept_plain is gone."""
    database = MemoryStore()
    wrong = Encrypted(database, keys=KEYS, accept_plain=True)
    right = Encrypted(database, keys=KEYS)
    await wrong.upsert_latest(OLD)
    await database.upsert_latest(NEW)
    assert await wrong.get_latest("u") == NEW
    with pytest.raises(CorruptDataError):
        await right.get_latest("u")
    assert "LS054" in rules(wrong)
    assert "LS054" not in rules(right)


async def test_ls055_the_tier_is_never_filled() -> None:
    """Every read goes to the origin, for ever."""

    class Counting(MemoryStore):
        reads = 0

        async def get_latest(self, user_id: str) -> StateSnapshot | None:
            self.reads += 1
            return await super().get_latest(user_id)

    for tier, found, reads in ((ReadOnly(MemoryStore()), True, 9), (MemoryStore(), False, 1)):
        origin = Counting()
        await origin.upsert_latest(OLD)
        stack = WriteThrough(tier, origin=origin)
        for _ in range(9):
            assert await stack.get_latest("u") == OLD
        assert origin.reads == reads
        assert ("LS055" in rules(stack)) is found
    right = WriteThrough(MemoryStore(), origin=ReadOnly(MemoryStore()))
    assert "LS055" not in rules(right)
    with pytest.raises(RejectedError):
        await right.upsert_latest(OLD)


async def test_ls056_the_candidate_gets_the_traffic_of_a_cache() -> None:
    """A hundred hits are a hundred reads of the candidate, where the database has one."""

    class Counting(MemoryStore):
        reads = 0

        async def get_latest(self, user_id: str) -> StateSnapshot | None:
            self.reads += 1
            return await super().get_latest(user_id)

    for above, least, most in ((True, 50, 100), (False, 0, 2)):
        database, candidate = Counting(), Counting()
        await database.upsert_latest(OLD)
        await candidate.upsert_latest(OLD)
        stack: StateStore = (
            Shadow(Cached(database), candidate=candidate)
            if above
            else Cached(Shadow(database, candidate=candidate))
        )
        for _ in range(100):
            await stack.get_latest("u")
            await settle()
        assert database.reads == 1
        assert least <= candidate.reads <= most
        assert ("LS056" in rules(stack)) is above
    tier = Shadow(MemoryStore(), candidate=MemoryStore())
    assert "LS056" in rules(WriteThrough(tier, origin=MemoryStore()))


async def test_ls057_versions_do_not_pass_a_ramp() -> None:
    """Below WriteThrough it takes the numbers away by which processes agree."""
    ramp = Ramp(MemoryStore(), alternative=MemoryStore())
    wrong = WriteThrough(MemoryStore(), origin=ramp)
    assert wrong.origin.capability(Authority) is None
    assert any("this process only" in note for note in wrong.notes())
    assert "LS057" in rules(wrong)
    right = Ramp(WriteThrough(MemoryStore(), origin=MemoryStore()), layer={"use": "cached"})
    assert "LS057" not in rules(right)
