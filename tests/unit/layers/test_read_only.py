"""ReadOnly: writes are refused before anything is asked, everything else passes."""

from __future__ import annotations

from typing import Any

import pytest

from layered_store import (
    Cached,
    MemoryStore,
    ReadOnly,
    RejectedError,
    Retry,
    StateSnapshot,
    ValidationError,
    WriteThrough,
    load_stack,
    to_config,
)
from layered_store.coherence.contract import Authority, CacheTier, Invalidations
from layered_store.enumerable import Enumerable
from layered_store.interface import Op
from layered_store.layer import Layer
from layered_store.stats import Sample


def state(user_id: str = "user-1", value: float = 0.5) -> StateSnapshot:
    return StateSnapshot(user_id, updated_at_unix_ms=5, axes={"a": value})


def writes(store: Any) -> list[Any]:
    return [
        lambda: store.upsert_latest(state(value=0.9)),
        lambda: store.upsert_latest_many([state(value=0.9)]),
        lambda: store.upsert_latest_many([]),
        lambda: store.delete("user-1"),
    ]


async def test_every_write_is_refused_and_changes_nothing() -> None:
    """RejectedError with the operation, not retryable, counted; the store below is not asked."""
    inner = MemoryStore()
    await inner.upsert_latest(state())
    store = ReadOnly(inner)
    told = [
        (Op.UPSERT_LATEST, "user-1"),
        (Op.UPSERT_LATEST_MANY, None),
        (Op.UPSERT_LATEST_MANY, None),
        (Op.DELETE, "user-1"),
    ]
    for number, write in enumerate(writes(store), 1):
        with pytest.raises(RejectedError, match="read-only") as caught:
            await write()
        assert not caught.value.retryable
        assert not caught.value.outcome_unknown
        assert caught.value.layer == "ReadOnly"
        assert (caught.value.operation, caught.value.user_id) == told[number - 1]
        assert "user-1" not in str(caught.value)
        assert list(store.samples()) == [Sample("refused_writes", number)]
    assert await inner.get_latest("user-1") == state()
    assert await inner.get_history("user-1", 9) == [state()]


async def test_bad_arguments_are_refused_as_such() -> None:
    """Validation comes first, as in every store."""
    store = ReadOnly(MemoryStore())
    bad = StateSnapshot("user-1", confidence=7.0)
    for call in (
        store.upsert_latest(bad),
        store.upsert_latest_many([state(), bad]),
        store.delete("not an id"),
    ):
        with pytest.raises(ValidationError):
            await call


async def test_reads_and_the_rest_pass() -> None:
    """All reads, health, opening and closing are those of the store below."""
    inner = MemoryStore()
    await inner.upsert_latest(state())
    async with ReadOnly(inner) as store:
        assert await store.get_latest("user-1") == state()
        assert await store.get_latest_many(["user-1", "nobody"]) == {"user-1": state()}
        assert await store.get_history("user-1", 9) == [state()]
        assert await store.health_check()
        assert [child.name for child in (await store.health_report()).children] == ["MemoryStore"]
        listing = store.capability(Enumerable)
        assert listing is not None
        assert (await listing.users("", 9)).user_ids == ["user-1"]
    assert inner._closed


async def test_hits_of_a_cache_below_stay_fused() -> None:
    """A read that hits costs nothing more."""
    inner = MemoryStore()
    await inner.upsert_latest(state())
    store = ReadOnly(Cached(inner))
    assert "get_latest" in vars(store)
    assert store.hot_path() is not None
    assert await store.get_latest("user-1") == await store.get_latest("user-1") == state()


async def test_versions_pass_and_their_writes_do_not() -> None:
    """As the origin of WriteThrough it takes no write; what it reads has its version."""
    inner = MemoryStore()
    await inner.upsert_latest(state())
    authority = ReadOnly(inner).capability(Authority)
    assert authority is not None
    assert await authority.read("user-1") == await inner.read("user-1")
    assert authority.digest is inner.digest
    assert await authority.head() == await inner.head()
    for call in (
        authority.write(state()),
        authority.write_many([state()]),
        authority.erase("user-1"),
    ):
        with pytest.raises(RejectedError):
            await call
    stack = WriteThrough(MemoryStore(), origin=ReadOnly(inner))
    assert await stack.get_latest("user-1") == state()
    for write in writes(stack)[:1] + writes(stack)[3:]:
        with pytest.raises(RejectedError):
            await write()
    assert await inner.get_latest("user-1") == state()


def test_a_cache_tier_or_channel_is_not_offered_by_itself() -> None:
    """A tier has to be written; a channel is passed when there is one."""

    class Tiered(Layer):
        def capability(self, kind: type[Any]) -> Any:
            return "offered" if kind in (CacheTier, Invalidations) else super().capability(kind)

    store = ReadOnly(Tiered(MemoryStore()))
    assert store.capability(CacheTier) is None
    assert store.capability(Invalidations) == "offered"  # type: ignore[comparison-overlap]
    assert store.capability(ReadOnly) is store


async def test_a_retry_does_not_repeat_a_refusal() -> None:
    """Nothing is gained by asking again."""
    store = ReadOnly(MemoryStore())
    with pytest.raises(RejectedError):
        await Retry(store, base_delay=0.0).upsert_latest(state())
    assert [sample.value for sample in store.samples()] == [1]


def test_it_comes_from_a_config_file() -> None:
    """It has no options."""
    config = {"store": {"use": "memory", "layers": [{"use": "read_only"}]}}
    stack = load_stack(config)
    assert to_config(stack) == config
    assert repr(stack) == "ReadOnly(MemoryStore())"
