"""What was stored once is found and read by every later version: keys, digests and bytes."""

from __future__ import annotations

from typing import Any

import pytest

from layered_store import (
    Compressed,
    Encrypted,
    MemoryStore,
    RedisStore,
    Source,
    StateSnapshot,
    StateStore,
)
from layered_store.codec import SnapshotCodec
from layered_store.identity import digest_function
from layered_store.sealed import SealedSnapshot
from layered_store.stores.redis.record import STATE, unpack

SNAPSHOT = StateSnapshot("u-1", 7, Source.MIXED, 0.5, {"warmth": 0.25})
LARGER = StateSnapshot("u-1", 7, Source.MIXED, 0.5, {f"warmth_{n}": 0.25 for n in range(9)})
PLAIN = bytes.fromhex(
    "85a7757365725f6964a3752d31b2757064617465645f61745f756e69785f6d7307a6736f75726365a56d69786564aa"
    "636f6e666964656e6365cb3fe0000000000000a46178657381a67761726d7468cb3fd0000000000000"
)
# As a store keeps it: whose it is, its time, and the form of the layer that sealed it.
ENCRYPTED = (
    "0293a3752d3107c48502ef932f296c18689b4c628d44e067820857d3af4763930b630b9d6966c371333c3b64e2fad4"
    "f5c11d7d660a2c7dc511247e1ad9d675bd1871634df526be2117e7ca26cc7fe601b4f713b603e54072b4f4f083dbc3"
    "4c32b57cdc2f3e0e034eeff44a27ab8b5ecb98a7d8d92e9e8ad59f28f38c27db6af593e07acc5526ba222040ff4fa9"
    "42"
)
HASHED = (
    "0293d920346336356233353065323231633539326662313933643836336531393832363707c48502ef932f291108a8"
    "452bce61c7cab36e91a6d0be1c75292dcd9a6e59b6230acfc4a620387a52e29793cf6278c003177f6e9c77a3f6d492"
    "11ee913b13205a3f597ee0c85a8fa7a32f0b88b4b128178757d9b08aa5bd6d71dc6170f2a618d811af4a5779ddc41a"
    "f042593e57c7c5d646371db5cf46985fc75445b275af88cc6834e19622d11b"
)
COMPRESSED = (
    "0293a3752d3107c4760178da6b5d5e5a9c5a149f99b2b854d7705369414a62496a4a7c62497c695e66457c6e31fbb2"
    "e2fcd2a2e4d4a5b99915a929ab92f3f3d2325352f392534fdb3f600083258915a9c59d2bca138b724b32e20d4edb5f"
    "8088c3440c31448c30448c31444c30444c3144cc3044cc31442ce02200a13d501f"
)

KEY, OLDER = bytes(range(32)), bytes(32)


def test_snapshots() -> None:
    """In databases and in Redis."""
    assert SnapshotCodec(StateSnapshot).decode(PLAIN, "u-1") == SNAPSHOT


@pytest.mark.parametrize(
    ("snapshot", "stored", "layer", "options"),
    [
        (SNAPSHOT, ENCRYPTED, Encrypted, {"keys": [KEY]}),
        (SNAPSHOT, ENCRYPTED, Encrypted, {"keys": [OLDER, KEY]}),
        (
            SNAPSHOT,
            HASHED,
            Encrypted,
            {"keys": [KEY, OLDER], "id_key": OLDER, "hash_user_ids": True},
        ),
        (LARGER, COMPRESSED, Compressed, {}),
    ],
    ids=["encrypted", "encrypted with an older key", "ids hashed", "compressed"],
)
async def test_sealed_states(
    snapshot: StateSnapshot, stored: str, layer: type[StateStore], options: dict[str, Any]
) -> None:
    """By the layer that sealed them, under the id that they have below."""
    below = MemoryStore()
    kept = SnapshotCodec(StateSnapshot).decode(bytes.fromhex(stored))
    assert isinstance(kept, SealedSnapshot)
    await below.upsert_latest(kept)
    stack: Any = layer(below, **options)
    assert await stack.get_latest("u-1") == snapshot


def test_digests() -> None:
    """They are what rows and keys are found by."""
    assert digest_function()("u-1").hex() == "8e7d36d4c530c0cf85bf8a7bd5dcea94"
    assert digest_function("secret")("u-1").hex() == "45e8f0ad7de83f4c5154a21a78b6c6fb"


def test_records_of_redis() -> None:
    """On one server and in a cluster, where the digest chooses the bucket."""
    head = "4c530153" + "0000000000000005" + "00" * 16 + "01" + bytes(range(16)).hex()
    record = unpack(bytes.fromhex(head) + PLAIN)
    assert record is not None
    assert record == (STATE, 5, bytes(16), (bytes(range(16)),), PLAIN)
    digest = "45e8f0ad7de83f4c5154a21a78b6c6fb"
    for url, bucket in (("redis://h", "0"), ("redis+cluster://h", "5")):
        store = RedisStore(url, digest_key="secret")
        for kind in ("s", "h"):
            key = store.key(store.digest("u-1"), kind)
            assert key.decode() == f"layered_store:{{{bucket}}}:{kind}:{digest}"
