"""Prefixed: tenants never meet, whatever they and their users are called."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layered_store import (
    Cached,
    ConfigError,
    CorruptDataError,
    MemoryStore,
    Prefixed,
    StateSnapshot,
    UnavailableError,
    ValidationError,
    WriteThrough,
    describe,
    load_stack,
    replace,
    to_config,
)
from layered_store.coherence.contract import Authority
from layered_store.enumerable import enumerable_of, pages
from layered_store.identity import is_valid_user_id
from layered_store.testing import check_store

NAMES = st.text("ab-_1ü", min_size=1, max_size=6)
TENANTS = st.text("ab-_16ü: /é", min_size=1, max_size=6).filter(lambda name: name not in "-:")


class Mood(StateSnapshot):
    mood: str = ""


def state(user_id: str = "user-1", value: float = 0.5) -> StateSnapshot:
    return StateSnapshot(user_id, updated_at_unix_ms=5, axes={"a": value})


async def test_it_is_a_store_like_any_other_but_for_the_longest_ids() -> None:
    """Every rule of the interface holds; ids end a prefix earlier."""
    report = await check_store(lambda: Prefixed(MemoryStore(), prefix="acme"))
    assert report.ok, str(report)
    store = Prefixed(MemoryStore(), prefix="acme")
    await store.upsert_latest(state("x" * 251))
    with pytest.raises(ValidationError, match="at most 251 UTF-8 bytes"):
        await store.upsert_latest(state("x" * 252))


@given(
    tenants=st.lists(TENANTS, min_size=2, max_size=2),
    users=st.lists(NAMES, min_size=2, max_size=2),
)
def test_two_tenants_never_share_a_user(tenants: list[str], users: list[str]) -> None:
    """Ids below are equal only when tenant and user are; and each leads back."""
    one, two = (Prefixed(MemoryStore(), prefix=tenant) for tenant in tenants)
    below = one.id_below(users[0], ""), two.id_below(users[1], "")
    names = [name[:-1] if name[-1] in "-:" else name for name in tenants]
    same = names[0] == names[1] and users[0] == users[1]
    assert (below[0] == below[1]) == same
    assert all(map(is_valid_user_id, below))
    assert one.id_above(below[0], None) == users[0]
    assert one.id_above(one.id_below("", ""), None) is None  # nobody: a record of the store's own
    if names[0] != names[1]:
        assert two.id_above(below[0], None) is None


async def test_everything_stays_within_the_tenant() -> None:
    """Reads, batches, histories, erasures and listings; the ids that come back are the caller's."""
    inner = MemoryStore()
    one, two = Prefixed(inner, prefix="a"), Prefixed(inner, prefix="a-b")
    await one.upsert_latest(state("b-1", 0.1))
    await two.upsert_latest_many([state("1", 0.2), state("2", 0.3)])
    assert await one.get_latest("b-1") == state("b-1", 0.1)
    assert await two.get_latest("1") == state("1", 0.2)
    assert await one.get_latest("1") is None
    assert await two.get_latest_many(["1", "2", "b-1"]) == {
        "1": state("1", 0.2),
        "2": state("2", 0.3),
    }
    assert await two.get_history("1", 9) == [state("1", 0.2)]
    for store, users in ((one, {"b-1"}), (two, {"1", "2"})):
        listing = enumerable_of(store)
        assert listing is not None
        found = [user async for page in pages(listing, 1) for user in page.user_ids]
        assert set(found) == users
    await one.delete("b-1")
    await one.delete("1")
    assert await one.get_latest("b-1") is None
    assert await two.get_latest("1") == state("1", 0.2)


async def test_the_id_below_is_the_prefix_and_the_id() -> None:
    """What others look for in the database: 'acme-u-1', with or without a separator in the option;
    a name that is no part of an id in hexadecimal."""
    for prefix, below in (
        ("acme", "acme-u-1"),
        ("acme-", "acme-u-1"),
        ("acme:", "acme-u-1"),
        ("tenant_a", "tenant_a-u-1"),
        ("a-b", "-612d62-u-1"),
        ("a:b:", "-613a62-u-1"),
        ("\ud800", "-eda080-u-1"),
        ("x" * 64, "x" * 64 + "-u-1"),
    ):
        inner = MemoryStore()
        await Prefixed(inner, prefix=prefix).upsert_latest(state("u-1"))
        assert (await inner.users("", 9)).user_ids == [below]
        assert await inner.get_latest(below) == state(below)


async def test_ids_may_be_as_long_as_the_rest_of_an_id() -> None:
    """Prefix and id have 256 bytes together; one more is a ValidationError that says how many."""
    store = Prefixed(MemoryStore(), prefix="tenant")
    for longest in ("u" * 249, "ü" * 124 + "u"):
        await store.upsert_latest(state(longest))
        assert await store.get_latest(longest) == state(longest)
        assert await store.get_history(longest, 1) == [state(longest)]
        longer = longest + "u"
        for call in (
            store.upsert_latest(state(longer)),
            store.upsert_latest_many([state(longer)]),
            store.get_latest(longer),
            store.get_latest_many([longer]),
            store.get_history(longer, 1),
            store.delete(longer),
        ):
            with pytest.raises(ValidationError, match="at most 249 UTF-8 bytes") as caught:
                await call
            assert caught.value.field == "user_id"
            assert (caught.value.layer, caught.value.user_id) == ("Prefixed", longer)
            assert caught.value.operation
            assert longer not in str(caught.value)


async def test_a_record_of_another_user_is_never_returned() -> None:
    """Also when the store below mixes its users up."""

    class Mixed(MemoryStore):
        async def get_latest(self, user_id: str) -> StateSnapshot | None:
            return state("acme-user-2")

    with pytest.raises(CorruptDataError) as caught:
        await Prefixed(Mixed(), prefix="acme").get_latest("user-1")
    assert (caught.value.layer, caught.value.user_id) == ("Prefixed", "user-1")


async def test_subclasses_and_their_fields_pass() -> None:
    """Only the id changes; containers of a snapshot are not shared with the caller's."""
    inner = MemoryStore(snapshot_type=Mood)
    store = Prefixed(inner, prefix="acme")
    await store.upsert_latest(Mood("user-1", mood="calm"))
    found = await store.get_latest("user-1")
    assert isinstance(found, Mood)
    assert (found.user_id, found.mood) == ("user-1", "calm")


async def test_errors_from_below_carry_the_callers_id() -> None:
    """And the text of none."""

    class Down(MemoryStore):
        async def delete(self, user_id: str) -> None:
            raise UnavailableError("down", user_id=user_id)

    with pytest.raises(UnavailableError) as caught:
        await Prefixed(Down(), prefix="acme").delete("user-1")
    assert caught.value.user_id == "user-1"


@pytest.mark.parametrize("prefix", ["", "-", ":", "x" * 65, "ü" * 33, 5, None, b"acme"])
def test_a_prefix_that_can_be_no_part_of_an_id_is_refused(prefix: Any) -> None:
    """The error names the rule."""
    with pytest.raises(ConfigError, match="1 to 64 UTF-8 bytes") as caught:
        Prefixed(MemoryStore(), prefix=prefix)
    assert caught.value.option == "prefix"


async def test_tiers_of_one_tenant_agree_and_others_are_refused() -> None:
    """The digests that key rows are those of the ids below."""
    inner = MemoryStore()
    one = Prefixed(inner, prefix="a").capability(Authority)
    same = Prefixed(MemoryStore(), prefix="a-").capability(Authority)
    other = Prefixed(inner, prefix="b").capability(Authority)
    assert one is not None
    assert same is not None
    assert other is not None
    assert one.digest("u") == same.digest("u") == MemoryStore.digest("a-u")
    assert one.digest.fingerprint == same.digest.fingerprint != other.digest.fingerprint


async def test_it_may_stand_anywhere() -> None:
    """Above a cache, below it, around both tiers."""
    origin = MemoryStore()
    for stack in (
        Prefixed(Cached(origin), prefix="a"),
        Cached(Prefixed(origin, prefix="a")),
        WriteThrough(Prefixed(MemoryStore(), prefix="a"), origin=Prefixed(origin, prefix="a")),
        Prefixed(WriteThrough(MemoryStore(), origin=origin), prefix="a"),
        Prefixed(Prefixed(origin, prefix="b"), prefix="c"),
    ):
        await stack.upsert_latest(state(value=0.25))
        assert await stack.get_latest("user-1") == state(value=0.25)
        await stack.upsert_latest(state(value=0.75))
        assert await stack.get_latest("user-1") == state(value=0.75)
        await stack.delete("user-1")
        assert await stack.get_latest("user-1") is None


def test_it_comes_from_a_config_file_and_can_be_swapped() -> None:
    """Options in, options out; the prefix is no secret."""
    config = {"store": {"use": "memory", "layers": [{"use": "prefixed", "prefix": "acme"}]}}
    stack = load_stack(config)
    assert to_config(stack) == config
    assert repr(stack) == "Prefixed(MemoryStore(), prefix='acme')"
    assert repr(replace(stack, MemoryStore, MemoryStore(history_limit=1))) == (
        "Prefixed(MemoryStore(history_limit=1), prefix='acme')"
    )
    assert describe(stack)[0].options == {"prefix": "acme"}
