"""Compressed: what is stored how, what is refused, what it counts."""

from __future__ import annotations

import random
import zlib
from typing import Any

import pytest

from layered_store import (
    Compressed,
    ConfigError,
    CorruptDataError,
    Encrypted,
    MemoryStore,
    StateSnapshot,
    UnavailableError,
    load_stack,
    to_config,
)
from layered_store.codec import SnapshotCodec
from layered_store.layers import compressed
from layered_store.sealed import SealedSnapshot
from layered_store.testing import check_layer, check_store

CODEC = SnapshotCodec(StateSnapshot)


def state(axes: int = 200, user_id: str = "user-1") -> StateSnapshot:
    return StateSnapshot(
        user_id, updated_at_unix_ms=5, axes={f"axis_{n}": 0.5 for n in range(axes)}
    )


def samples(layer: Any) -> dict[tuple[str, tuple[str, ...]], float]:
    return {(sample.metric, sample.labels): sample.value for sample in layer.samples()}


@pytest.mark.parametrize("threshold", [0, 1024])
async def test_it_is_a_store_and_a_layer_like_any_other(threshold: int) -> None:
    """Every rule of stores holds, compressed or not; the laws of layers where states are small."""
    report = await check_store(lambda: Compressed(MemoryStore(), threshold=threshold))
    assert report.ok, str(report)
    laws = await check_layer(lambda inner: Compressed(inner, threshold=10**6))
    assert laws.ok, str(laws)


async def test_large_states_are_stored_small_and_come_back_equal() -> None:
    """From the threshold on, the store below keeps a tenth; the latest state and the history."""
    inner = MemoryStore()
    store = Compressed(inner)
    await store.upsert_latest(state())
    kept = await inner.get_latest("user-1")
    assert isinstance(kept, SealedSnapshot)
    assert len(kept.sealed) < len(CODEC.encode(state())) / 5
    assert await store.get_latest("user-1") == state()
    assert await store.get_history("user-1", 5) == [state()]
    assert await store.get_latest_many(["user-1"]) == {"user-1": state()}
    before = samples(store)["compression_bytes", ("before",)]
    assert before == len(CODEC.encode(state()))
    assert 0 < samples(store)["compression_bytes", ("after",)] < before / 5


async def test_small_states_are_stored_as_they_are() -> None:
    """Below the threshold nothing is done, and nothing counted."""
    inner = MemoryStore()
    size = len(CODEC.encode(state()))
    for threshold, kind in ((size, SealedSnapshot), (size + 1, StateSnapshot)):
        store = Compressed(inner, threshold=threshold)
        await store.upsert_latest(state())
        assert type(await inner.get_latest("user-1")) is kind
        assert await store.get_latest("user-1") == state()
        assert (samples(store)["compression_bytes", ("before",)] > 0) == (kind is SealedSnapshot)


async def test_what_does_not_get_smaller_is_stored_as_it_is() -> None:
    """Such as ciphertext of a layer outside, and noise."""
    inner = MemoryStore()
    store = Compressed(inner, threshold=0)
    noise = SealedSnapshot("user-1", 5, sealed=b"\x02" + random.Random(1).randbytes(2000))
    await store.upsert_latest(noise)
    assert await inner.get_latest("user-1") == noise
    assert await store.get_latest("user-1") == noise
    wrong = Encrypted(store, keys=[bytes(range(32))])
    await wrong.upsert_latest(state())
    assert await wrong.get_latest("user-1") == state()


async def test_a_store_with_data_can_be_wrapped_and_unwrapped_by_size() -> None:
    """Both kinds are read, whatever the options are now."""
    inner = MemoryStore()
    await inner.upsert_latest(state())
    store = Compressed(inner, threshold=10**6, level=1)
    assert await store.get_latest("user-1") == state()
    await Compressed(inner, threshold=0, level=9).upsert_latest(state(3))
    assert await store.get_latest("user-1") == state(3)


@pytest.mark.parametrize(
    "damage",
    [
        lambda sealed: sealed[:-1],
        lambda sealed: sealed[: len(sealed) // 2],
        lambda sealed: sealed[:1],
        lambda sealed: sealed + b"more",
        lambda sealed: sealed[:1] + b"no zlib at all",
        lambda sealed: sealed[:1] + zlib.compress(b"\x01no state"),
        lambda sealed: sealed[:1] + zlib.compress(CODEC.encode(state(3, "user-2"))),
    ],
)
async def test_a_damaged_record_is_an_error_of_that_user(damage: Any) -> None:
    """Truncated, longer, no state, another user's: CorruptDataError, and counted."""
    inner = MemoryStore()
    store = Compressed(inner)
    await store.upsert_latest_many([state(), state(200, "user-3")])
    kept = await inner.get_latest("user-1")
    assert isinstance(kept, SealedSnapshot)
    await inner.upsert_latest(SealedSnapshot("user-1", 5, sealed=damage(kept.sealed)))
    with pytest.raises(CorruptDataError) as caught:
        await store.get_latest("user-1")
    assert caught.value.user_id == "user-1"
    assert "user-1" not in str(caught.value)
    assert list(await store.get_latest_many(["user-1", "user-3"])) == ["user-3"]
    assert samples(store)["corrupt_records", ()] == 2


async def test_a_bomb_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that unfolds to more than the limit is refused without unfolding it."""
    inner = MemoryStore()
    store = Compressed(inner)
    await store.upsert_latest(state())
    monkeypatch.setattr(compressed, "_LONGEST", 1000)
    with pytest.raises(CorruptDataError, match="too long"):
        await store.get_latest("user-1")


@pytest.mark.parametrize(("room", "kind"), [(0, SealedSnapshot), (-1, StateSnapshot)])
async def test_what_would_be_too_long_to_unfold_is_stored_as_it_is(
    monkeypatch: pytest.MonkeyPatch, room: int, kind: type[StateSnapshot]
) -> None:
    """No state is taken that could not be read back."""
    monkeypatch.setattr(compressed, "_LONGEST", len(CODEC.encode(state())) + room)
    inner = MemoryStore()
    store = Compressed(inner)
    await store.upsert_latest(state())
    assert type(await inner.get_latest("user-1")) is kind
    assert await store.get_latest("user-1") == state()


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"threshold": -1}, "threshold"),
        ({"threshold": 1.5}, "threshold"),
        ({"level": 0}, "level"),
        ({"level": 10}, "level"),
        ({"level": True}, "level"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], option: str) -> None:
    """The error names the option and its range."""
    with pytest.raises(ConfigError) as caught:
        Compressed(MemoryStore(), **options)
    assert caught.value.option == option


def test_it_comes_from_a_config_file() -> None:
    """Options in, options out."""
    config = {
        "store": {
            "use": "memory",
            "layers": [{"use": "compressed", "threshold": 100, "level": 1}],
        }
    }
    assert to_config(load_stack(config)) == config


async def test_errors_from_below_are_as_they_were() -> None:
    """A layer that changes no ids changes no error."""

    class Down(MemoryStore):
        async def get_latest(self, user_id: str) -> StateSnapshot | None:
            raise UnavailableError("down", user_id=user_id)

    with pytest.raises(UnavailableError) as caught:
        await Compressed(Down()).get_latest("user-1")
    assert caught.value.user_id == "user-1"


async def test_a_record_of_another_user_is_not_handed_on() -> None:
    """Also one that was too small to be compressed: the store below may be anybody's."""

    class Mixed(MemoryStore):
        async def get_latest(self, user_id: str) -> StateSnapshot | None:
            return StateSnapshot("user-2")

    with pytest.raises(CorruptDataError):
        await Compressed(Mixed()).get_latest("user-1")
