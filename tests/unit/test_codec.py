"""The stored form of a snapshot."""

from __future__ import annotations

import msgspec
import pytest

from layered_store import Source, StateSnapshot
from layered_store.codec import CodecError, SnapshotCodec

STATE = StateSnapshot("u-1", 7, Source.MIXED, 0.5, {"a": 0.25})


class Mood(StateSnapshot):
    """A later release's class."""

    mood: str = "none"


def test_form() -> None:
    """The fields by name, as a MessagePack map."""
    stored = SnapshotCodec(StateSnapshot).encode(STATE)
    assert msgspec.msgpack.decode(stored) == {
        "user_id": "u-1",
        "updated_at_unix_ms": 7,
        "source": "mixed",
        "confidence": 0.5,
        "axes": {"a": 0.25},
    }


def test_classes_read_each_other() -> None:
    """A field that is missing takes its default, one that is unknown is ignored."""
    old, new = SnapshotCodec(StateSnapshot), SnapshotCodec(Mood)
    assert new.decode(old.encode(STATE)) == Mood("u-1", 7, Source.MIXED, 0.5, {"a": 0.25})
    assert old.decode(new.encode(Mood("u-1", 7, Source.MIXED, 0.5, {"a": 0.25}, mood="x"))) == STATE


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "the record is empty"),
        (b"\x03\x80", "form 3, which this version does not know"),
        (b"\xff", "form 255"),
        (b'{"user_id":"u-1"}', "form 123"),
        (b"\x01", "DecodeError"),
        (b"\x02\xc1", "cannot be decoded"),
        (b"\x81\xc1", "cannot be decoded"),
        (msgspec.msgpack.encode([1, 2]), "form 146"),
        (msgspec.msgpack.encode({"confidence": 0.5}), "cannot be decoded"),
        (msgspec.msgpack.encode({"user_id": "u-1", "confidence": 7.25}), "cannot be"),
        (msgspec.msgpack.encode({"user_id": "u-1", "axes": {"a": float("nan")}}), "can"),
        (msgspec.msgpack.encode({"user_id": "u-1", "axes": {"a": True}}), "cannot be"),
        (msgspec.msgpack.encode({"user_id": "u-1", "source": "SECRET"}), "cannot be"),
        (b"\x81\xa7user_id\xa2\xff\xfe", "cannot be decoded"),
        (b"\x81\xa1x" + b"\x91" * 100_000, "cannot be decoded"),
        (SnapshotCodec(StateSnapshot).encode(STATE) + b"x", "cannot be decoded"),
        (SnapshotCodec(StateSnapshot).encode(StateSnapshot("SECRET")), "another user"),
    ],
)
def test_refused(data: bytes, why: str) -> None:
    """What is no record of this user is refused with a reason that shows nothing of it."""
    with pytest.raises(CodecError) as refused:
        SnapshotCodec(StateSnapshot).decode(data, "u-1")
    assert why in str(refused.value)
    assert "SECRET" not in str(refused.value)
    assert "7.25" not in str(refused.value)
    assert refused.value.__cause__ is None


def test_what_is_read_cannot_be_changed() -> None:
    """Nor can what a subclass holds in lists."""

    class Tagged(StateSnapshot):
        tags: list[str] = []

    codec = SnapshotCodec(Tagged)
    read = codec.decode(codec.encode(Tagged("u-1", tags=["x"])))
    read.tags.append("y")
    assert read.tags == ["x"]
    with pytest.raises(TypeError):
        read.axes["a"] = 1.0  # type: ignore[index]


def test_records_of_earlier_versions_are_read() -> None:
    """They hold the same map behind a 1; a damaged one is refused as any other is."""
    codec = SnapshotCodec(StateSnapshot)
    snapshot = StateSnapshot("u-1", 5, confidence=0.25, axes={"warmth": 0.7})
    earlier = b"\x01" + codec.encode(snapshot)
    assert codec.decode(earlier, "u-1") == snapshot
    with pytest.raises(CodecError, match="another user"):
        codec.decode(earlier, "u-2")
    for damaged in (b"\x01", earlier[:-1], b"\x01" + earlier):
        with pytest.raises(CodecError, match="cannot be decoded"):
            codec.decode(damaged, "u-1")
