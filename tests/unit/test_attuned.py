"""The same rules and the same JSON as the published package ``attuned``.

Documented exceptions: booleans are no numbers here, and values are kept as 64-bit floats, where
attuned rounds to 32 bits (so it takes a value that is above 1 by less than that rounds away).
"""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layered_store import Source, StateSnapshot, ValidationError
from layered_store._alphanumeric import ALPHANUMERIC_RANGES

attuned = pytest.importorskip("attuned", reason="attuned has no wheel for this Python")

SOURCES = {
    Source.SELF_REPORT: "SelfReport",
    Source.INFERRED: "Inferred",
    Source.MIXED: "Mixed",
}


def theirs(user_id: Any = "u-1", axes: Any = None, confidence: Any = 1.0) -> bool:
    """Whether attuned takes it."""
    builder = attuned.StateSnapshot.builder()
    try:
        builder = builder.user_id(user_id)
        for name, value in (axes or {}).items():
            builder = builder.axis(name, value)
        builder.confidence(confidence).build()
    except (ValueError, TypeError, OverflowError, UnicodeEncodeError):
        return False
    return True


def ours(user_id: Any = "u-1", axes: Any = None, confidence: Any = 1.0) -> bool:
    """Whether layered_store takes it."""
    try:
        StateSnapshot(user_id, axes=axes or {}, confidence=confidence).validate()
    except ValidationError:
        return False
    return True


@given(st.text(max_size=300))
def test_user_ids(user_id: str) -> None:
    """Any text is an id in both or in neither."""
    assert ours(user_id) is theirs(user_id)


def test_characters() -> None:
    """Every edge of the table of alphanumerics is theirs too, and so is a sample of the rest."""
    codes = set(random.Random(7).sample(range(0x110000), 3_000)) | set(range(0x300))
    for word in ALPHANUMERIC_RANGES.split():
        first, _, last = word.partition("-")
        for edge in (int(first, 16), int(last or first, 16)):
            codes |= {edge - 1, edge, edge + 1}
    differ = [
        hex(code)
        for code in sorted(codes)
        if not 0xD800 <= code < 0xE000 and ours(chr(code)) is not theirs(chr(code))
    ]
    assert differ == []


@pytest.mark.parametrize("size", [255, 256, 257])
@pytest.mark.parametrize("character", ["x", "ä", "名", "𝔘"])
def test_lengths(character: str, size: int) -> None:
    """The length is counted in UTF-8 bytes by both."""
    width = len(character.encode())
    for count in (size // width, size // width + 1):
        assert ours(character * count) is theirs(character * count)


@given(st.one_of(st.text("abz09_A-é", max_size=66), st.text(max_size=5)))
def test_axis_names(name: str) -> None:
    """Any text is an axis name in both or in neither."""
    assert ours(axes={name: 0.5}) is theirs(axes={name: 0.5})


@given(st.floats(width=32))
def test_values(value: float) -> None:
    """Any 32-bit number is a value, and a confidence, in both or in neither."""
    assert ours(axes={"a": value}) is theirs(axes={"a": value})
    assert ours(confidence=value) is theirs(confidence=value)


@pytest.mark.parametrize("value", ["0.5", None, b"1", [1], 1j, math.nan, math.inf, -math.inf])
def test_no_values(value: Any) -> None:
    """What is no finite number is refused by both."""
    assert not ours(axes={"a": value})
    assert not theirs(axes={"a": value})


def test_documented_exceptions() -> None:
    """Booleans, and what 32 bits round away."""
    assert theirs(axes={"a": True})
    assert not ours(axes={"a": True})
    assert theirs(axes={"a": math.nextafter(1, 2)})
    assert not ours(axes={"a": math.nextafter(1, 2)})


@pytest.mark.parametrize("field", ["user_id", "updated_at_unix_ms", "source", "confidence", "axes"])
def test_a_field_may_not_stand_twice(field: str) -> None:
    """It is refused by both; of an axis the last value counts for both."""
    state = StateSnapshot("u", 1, Source.MIXED, 0.5, {"a": 0.25}).to_json().decode()
    value = json.dumps(json.loads(state)[field])
    twice = state.replace("{", f'{{"{field}":{value},', 1)
    with pytest.raises(ValueError, match="duplicate field"):
        attuned.StateSnapshot.from_json(twice)
    with pytest.raises(ValidationError, match=f"the field {field} twice"):
        StateSnapshot.from_json(twice)
    axis = state.replace('{"a"', '{"a":0.75,"a"')
    assert axis != state
    assert attuned.StateSnapshot.from_json(axis).axes == {"a": 0.25}
    assert StateSnapshot.from_json(axis).axes == {"a": 0.25}


SNAPSHOTS = st.builds(
    StateSnapshot,
    user_id=st.from_regex(r"[A-Za-z0-9_äλ名-]{1,40}", fullmatch=True),
    updated_at_unix_ms=st.integers(-(2**63), 2**63 - 1),
    source=st.sampled_from(Source),
    confidence=st.floats(0, 1, width=32),
    axes=st.dictionaries(
        st.from_regex(r"[a-z0-9](?:[a-z0-9_]{0,20}[a-z0-9])?", fullmatch=True),
        st.floats(0, 1, width=32),
        max_size=25,
    ),
)


@given(SNAPSHOTS)
def test_they_read_what_we_write(state: StateSnapshot) -> None:
    """Every field arrives."""
    read = attuned.StateSnapshot.from_json(state.to_json().decode())
    assert read.user_id == state.user_id
    assert read.updated_at_unix_ms == state.updated_at_unix_ms
    assert str(read.source) == state.source.value
    assert read.confidence == state.confidence
    assert dict(read.axes) == dict(state.axes)


@given(SNAPSHOTS)
def test_we_read_what_they_write(state: StateSnapshot) -> None:
    """Every field arrives, a value within what 32 bits can say."""
    builder = attuned.StateSnapshot.builder().user_id(state.user_id)
    builder = builder.updated_at(state.updated_at_unix_ms).confidence(state.confidence)
    builder = builder.source(getattr(attuned.Source, SOURCES[state.source]))
    for name, value in state.axes.items():
        builder = builder.axis(name, value)
    read = StateSnapshot.from_json(builder.build().to_json())
    assert read.user_id == state.user_id
    assert read.updated_at_unix_ms == state.updated_at_unix_ms
    assert read.source is state.source
    assert read.confidence == pytest.approx(state.confidence, rel=1e-6)
    assert dict(read.axes) == pytest.approx(dict(state.axes), rel=1e-6, abs=1e-40)


def test_neutral_axis() -> None:
    """A missing axis is the same number in both."""
    state = attuned.StateSnapshot.builder().user_id("u-1").build()
    assert state.get_axis("warmth") == StateSnapshot("u-1").get_axis("warmth") == 0.5
    assert state.get_axis_opt("warmth") is StateSnapshot("u-1").get_axis_opt("warmth") is None
