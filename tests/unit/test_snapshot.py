"""The snapshot: values, rules, wire form, immutability, privacy."""

from __future__ import annotations

import copy
import json
import logging
import math
import operator
import pickle
import re
import sys
import traceback
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from fractions import Fraction
from types import MappingProxyType, SimpleNamespace
from typing import Any, ClassVar, TypeVar, get_type_hints

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layered_store import MemoryStore, Source, StateSnapshot, ValidationError
from layered_store.codec import CodecError, SnapshotCodec

SHARES = st.floats(0, 1)
NAMES = st.from_regex(r"[a-z0-9](?:[a-z0-9_]{0,62}[a-z0-9])?", fullmatch=True)
SNAPSHOTS = st.builds(
    StateSnapshot,
    user_id=st.from_regex(r"[A-Za-z0-9_äßλ名-]{1,64}", fullmatch=True),
    updated_at_unix_ms=st.integers(-(2**63), 2**63 - 1),
    source=st.sampled_from(Source),
    confidence=SHARES,
    axes=st.dictionaries(NAMES, SHARES, max_size=30),
)


class Mood(StateSnapshot):
    """A class of the application's own."""

    mood: str = ""
    tags: list[str] = []
    detail: dict[str, list[int]] = {}
    pair: tuple[list[int], ...] = ()
    anything: Any = None


class Shouting:
    """What an application adds to several of its classes."""

    def shout(self: Any) -> str:
        return str(self.user_id).upper()


class Weather(Shouting, Mood):
    """A class of a class, that has more than fields."""

    VERSION: ClassVar[int] = 3
    UNITS: ClassVar[list[str]] = ["C"]
    REMARK: ClassVar[str]
    tags: list[str] = msgspec.field(default_factory=lambda: ["dry"])
    axes: dict[str, float] = msgspec.field(default_factory=lambda: {"warmth": 0.25})
    confidence: float = 0.75


# Values


def test_a_subclass_may_have_what_any_class_has() -> None:
    """Class variables, methods of a mixin, other defaults; what is in it is as unchangeable."""
    tags = ["a"]
    state = Weather("ada", 1, tags=tags)
    tags.append("b")
    state.tags.append("c")
    assert (state.tags, state.axes, state.confidence) == (["a"], {"warmth": 0.25}, 0.75)
    assert (state.VERSION, state.UNITS, state.shout()) == (3, ["C"], "ADA")
    assert "VERSION" not in Weather.__struct_fields__
    assert Weather("ada").tags == ["dry"]
    with pytest.raises(TypeError):
        state.axes["warmth"] = 1.0
    with pytest.raises(AttributeError):
        state.other = 1  # type: ignore[attr-defined]
    state.validate()
    for again in (
        copy.copy(state),
        copy.deepcopy(state),
        pickle.loads(pickle.dumps(state)),
        Weather.from_json(state.to_json()),
    ):
        assert again == state
        assert hash(again) == hash(state)


def test_defaults() -> None:
    """Now, self report, full confidence, no axes."""
    before = datetime.now(UTC).timestamp() * 1000
    state = StateSnapshot("u-1")
    assert before - 1 <= state.updated_at_unix_ms <= datetime.now(UTC).timestamp() * 1000
    assert state.source is Source.SELF_REPORT
    assert state.confidence == 1.0
    assert dict(state.axes) == {}
    state.validate()


def test_arguments_by_position() -> None:
    """The order of the arguments is that of the contract."""
    state = StateSnapshot("u-1", 7, Source.MIXED, 0.5, {"a": 0.25})
    assert (state.user_id, state.updated_at_unix_ms, state.source, state.confidence) == (
        "u-1",
        7,
        Source.MIXED,
        0.5,
    )
    assert state.axes == {"a": 0.25}


def test_axes() -> None:
    """An axis that is missing is neutral, or None where asked so; zero is a value."""
    state = StateSnapshot("u-1", axes={"a": 0.0, "b": 1.0})
    assert state.get_axis("a") == 0.0
    assert state.get_axis_opt("a") == 0.0
    assert state.get_axis("c") == 0.5
    assert state.get_axis_opt("c") is None


def test_sources() -> None:
    """Three sources with their wire values; a wire value is as good."""
    assert [source.value for source in Source] == ["self_report", "inferred", "mixed"]
    assert StateSnapshot("u-1", source="mixed").source is Source.MIXED  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [1, 0, Fraction(1, 2), Decimal("0.5")])
def test_numbers_become_floats(number: Any) -> None:
    """Any real number is kept as the 64-bit float that it stands for."""
    state = StateSnapshot("u-1", confidence=number, axes={"a": number})
    state.validate()
    assert type(state.confidence) is float
    assert type(state.axes["a"]) is float
    assert state.axes["a"] == float(number)


class Number(IntEnum):
    """An integer of another class than int."""

    SEVEN = 7


class Word64:
    """An integer that is no int, as numpy's are."""

    def __index__(self) -> int:
        return 7


@pytest.mark.parametrize("moment", [Number.SEVEN, Word64()])
def test_integers_become_ints(moment: Any) -> None:
    """A moment may be any integer: a driver or codec knows the plain ones only."""
    state = StateSnapshot("u-1", moment)
    state.validate()
    assert type(state.updated_at_unix_ms) is int
    assert StateSnapshot.from_json(state.to_json()).updated_at_unix_ms == 7


class Truth:
    """A truth value as numpy has them: it can be turned into a number."""

    dtype = SimpleNamespace(kind="b")

    def __float__(self) -> float:
        return 1.0

    def __index__(self) -> int:
        return 1


def test_a_truth_value_of_a_library_is_no_number() -> None:
    """No more than ``True`` is."""
    for state in (
        StateSnapshot("u-1", Truth()),  # type: ignore[arg-type]
        StateSnapshot("u-1", confidence=Truth()),  # type: ignore[arg-type]
        StateSnapshot("u-1", axes={"a": Truth()}),  # type: ignore[dict-item]
    ):
        with pytest.raises(ValidationError):
            state.validate()


def test_equality_and_hash() -> None:
    """Equal when class and all fields are; usable as a key."""
    one, two = StateSnapshot("u-1", 1, axes={"a": 0.5}), StateSnapshot("u-1", 1, axes={"a": 0.5})
    assert one == two
    assert hash(one) == hash(two)
    assert len({one, two}) == 1
    for other in (
        StateSnapshot("u-2", 1, axes={"a": 0.5}),
        StateSnapshot("u-1", 2, axes={"a": 0.5}),
        StateSnapshot("u-1", 1, Source.MIXED, axes={"a": 0.5}),
        StateSnapshot("u-1", 1, confidence=0.5, axes={"a": 0.5}),
        StateSnapshot("u-1", 1, axes={"a": 0.25}),
        StateSnapshot("u-1", 1),
        Mood("u-1", 1, axes={"a": 0.5}),
        "u-1",
        None,
    ):
        assert one != other
    assert Mood("u-1", 1, mood="calm") != Mood("u-1", 1)
    assert hash(Mood("u-1", 1, tags=["a"])) == hash(Mood("u-1", 1, tags=["a"]))


# Rules


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"user_id": ""}, "user_id"),
        ({"user_id": "a b"}, "user_id"),
        ({"user_id": None}, "user_id"),
        ({"user_id": "x" * 257}, "user_id"),
        ({"confidence": -0.001}, "confidence"),
        ({"confidence": 1.001}, "confidence"),
        ({"confidence": math.nan}, "confidence"),
        ({"confidence": math.inf}, "confidence"),
        ({"confidence": True}, "confidence"),
        ({"confidence": "1"}, "confidence"),
        ({"confidence": None}, "confidence"),
        ({"confidence": 1j}, "confidence"),
        ({"confidence": 10**400}, "confidence"),
        ({"axes": {"a": -1e-300}}, "axes"),
        ({"axes": {"a": math.nextafter(1, 2)}}, "axes"),
        ({"axes": {"a": math.nan}}, "axes"),
        ({"axes": {"a": -math.inf}}, "axes"),
        ({"axes": {"a": False}}, "axes"),
        ({"axes": {"a": "0.5"}}, "axes"),
        ({"axes": {"a": None}}, "axes"),
        ({"axes": {"": 0.5}}, "axes"),
        ({"axes": {"_a": 0.5}}, "axes"),
        ({"axes": {"a_": 0.5}}, "axes"),
        ({"axes": {"_": 0.5}}, "axes"),
        ({"axes": {"A": 0.5}}, "axes"),
        ({"axes": {"ä": 0.5}}, "axes"),
        ({"axes": {"²": 0.5}}, "axes"),
        ({"axes": {"a-b": 0.5}}, "axes"),
        ({"axes": {"a\n": 0.5}}, "axes"),
        ({"axes": {"x" * 65: 0.5}}, "axes"),
        ({"axes": {1: 0.5}}, "axes"),
        ({"axes": None}, "axes"),
        ({"axes": [("a", 0.5)]}, "axes"),
        ({"axes": "a"}, "axes"),
        ({"source": "guess"}, "source"),
        ({"source": None}, "source"),
        ({"source": 1}, "source"),
        ({"updated_at_unix_ms": 2**63}, "updated_at_unix_ms"),
        ({"updated_at_unix_ms": -(2**63) - 1}, "updated_at_unix_ms"),
        ({"updated_at_unix_ms": 1.0}, "updated_at_unix_ms"),
        ({"updated_at_unix_ms": "1"}, "updated_at_unix_ms"),
        ({"updated_at_unix_ms": True}, "updated_at_unix_ms"),
        ({"updated_at_unix_ms": None}, "updated_at_unix_ms"),
    ],
    ids=repr,
)
async def test_refused(fields: dict[str, Any], field: str) -> None:
    """Each broken rule is told by field, without the value, before anything is stored."""
    state = StateSnapshot(**{"user_id": "u-1", **fields})
    with pytest.raises(ValidationError) as refused:
        state.validate()
    assert refused.value.field == field
    assert isinstance(refused.value, ValueError)
    assert str(refused.value).startswith(field)
    store = MemoryStore()
    for call in (store.upsert_latest(state), store.upsert_latest_many([StateSnapshot("v"), state])):
        with pytest.raises(ValidationError):
            await call
    assert store._users == {}  # noqa: SLF001


@pytest.mark.parametrize("name", ["a", "0", "a_b", "a__b", "x" * 64, "9_9", "warmth"])
def test_axis_names(name: str) -> None:
    """1 to 64 of a-z, 0-9 and ``_``, no ``_`` at either end; also when seen before."""
    for _ in range(2):
        StateSnapshot("u-1", axes={name: 0.5}).validate()


@pytest.mark.parametrize(
    "kind", [StrEnum("Axis", {"WARMTH": "warmth"}), type("Text", (str,), {})]
)
def test_names_of_a_subclass_of_str(kind: type[str]) -> None:
    """Applications name their axes by an enum; what is kept is plain text."""
    state = StateSnapshot("u-1", 1, axes={kind("warmth"): 0.5, "calm": 1})
    state.validate()
    assert [*map(type, state.axes)] == [str, str]
    assert state.get_axis(kind("warmth")) == 0.5
    assert state == StateSnapshot("u-1", 1, axes={"warmth": 0.5, "calm": 1.0})
    assert StateSnapshot.from_json(state.to_json()) == state
    with pytest.raises(ValidationError, match="axes"):
        StateSnapshot("u-1", axes={kind("warmth"): 0.5, 7: 0.5}).validate()  # type: ignore[dict-item]


def test_names_equal_to_a_known_one() -> None:
    """A name that only compares equal to a valid one counts as the text that it holds."""

    class Name(str):
        __slots__ = ()

        def __hash__(self) -> int:
            return hash("warmth")

        def __eq__(self, other: object) -> bool:
            return other == "warmth"

    StateSnapshot("u-1", axes={"warmth": 0.5}).validate()
    with pytest.raises(ValidationError, match="axes"):
        StateSnapshot("u-1", axes={Name("NOT A NAME"): 0.5}).validate()


@given(SNAPSHOTS)
def test_valid_ones_survive(state: StateSnapshot) -> None:
    """Whatever is valid comes back equal from JSON and from the stored form."""
    state.validate()
    assert StateSnapshot.from_json(state.to_json()) == state
    codec = SnapshotCodec(StateSnapshot)
    assert codec.decode(codec.encode(state), state.user_id) == state
    assert json.loads(state.to_json()) == {
        "user_id": state.user_id,
        "updated_at_unix_ms": state.updated_at_unix_ms,
        "source": state.source.value,
        "confidence": state.confidence,
        "axes": dict(state.axes),
    }


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    """Garbage is a ValidationError or a CodecError, and its text shows none of it."""
    with pytest.raises(ValidationError):
        StateSnapshot.from_json(b"\xff" + data)
    with pytest.raises(CodecError):
        SnapshotCodec(StateSnapshot).decode(b"\x81" + data)


@given(SNAPSHOTS, st.data())
def test_damaged_records(state: StateSnapshot, data: st.DataObject) -> None:
    """A truncated or changed record is refused, or still valid; never another exception."""
    codec = SnapshotCodec(StateSnapshot)
    stored = bytearray(codec.encode(state))
    place = data.draw(st.integers(0, len(stored) - 1))
    stored[place] = data.draw(st.integers(0, 255))
    for damaged in (bytes(stored), bytes(stored[:place])):
        try:
            read = codec.decode(damaged, state.user_id)
        except CodecError:
            continue
        assert read.user_id == state.user_id
        assert 0.0 <= read.confidence <= 1.0
        assert all(0.0 <= value <= 1.0 for value in read.axes.values())


# Wire form


def test_wire_form() -> None:
    """Exactly the documented JSON, in its order."""
    state = StateSnapshot("u-1", 1732406400000, axes={"warmth": 0.7})
    assert state.to_json() == (
        b'{"user_id":"u-1","updated_at_unix_ms":1732406400000,"source":"self_report",'
        b'"confidence":1.0,"axes":{"warmth":0.7}}'
    )


def test_reading() -> None:
    """Unknown keys are ignored, whole numbers are numbers, text and bytes are as good."""
    text = (
        '{"axes": {"a": 1}, "new": [{}], "user_id": "u-1", "confidence": 0, "source": "mixed",'
        ' "updated_at_unix_ms": -5}'
    )
    state = StateSnapshot("u-1", -5, Source.MIXED, 0.0, {"a": 1.0})
    assert StateSnapshot.from_json(text) == StateSnapshot.from_json(text.encode()) == state
    assert type(StateSnapshot.from_json(text).axes["a"]) is float


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"user_id":null}',
        b'{"user_id":"SECRET !"}',
        b'{"user_id":"u","axes":{"SECRET":0.5}}',
        b'{"user_id":"u","axes":{"a":7.25}}',
        b'{"user_id":"u","axes":{"a":null}}',
        b'{"user_id":"u","axes":null}',
        b'{"user_id":"u","confidence":7.25}',
        b'{"user_id":"u","confidence":NaN}',
        b'{"user_id":"u","confidence":1e999}',
        b'{"user_id":"u","confidence":true}',
        b'{"user_id":"u","source":"SECRET"}',
        b'{"user_id":"u","updated_at_unix_ms":9223372036854775808}',
        b'{"user_id":"u","updated_at_unix_ms":1.5}',
        b'{"user_id":"u"',
        b'{"user_id":"u"}SECRET',
        b"\xff\xfe",
        b"[" * 100_000,
        None,
        7,
    ],
    ids=lambda data: repr(data)[:40],
)
def test_refused_reading(data: Any) -> None:
    """What is no valid snapshot is a ValidationError that shows none of it."""
    with pytest.raises(ValidationError) as refused:
        StateSnapshot.from_json(data)
    text = "".join(traceback.format_exception(refused.value, chain=True))
    shown = text.rpartition("ValidationError")[2]
    assert "SECRET" not in shown
    assert "7.25" not in shown


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"user_id":"u","confidence":"x"}', "Expected `float`, got `str` - at `$.confidence`"),
        (b'{"user_id":"u","axes":[]}', "axes must map names to finite numbers"),
        (b'{"user_id":"u","axes":{"a":"x"}}', "axes must map names to finite numbers"),
        (b'{"user_id":"u","source":"x"}', "source must be 'self_report', 'inferred' or 'mixed'"),
        (b"nonsense", "is not valid JSON"),
        (b'{"user_id":"u","user_id":"v"}', "snapshot has the field user_id twice"),
        (b'{"user_id":"u","axes":{},"\\u0061xes":{}}', "snapshot has the field axes twice"),
        (b'{"user_id":"u","x":[' + b"9" * 5000 + b'],"source":"mixed","source":"mixed"}', "source"),
    ],
)
def test_refused_reading_says_what_is_wrong(data: bytes, reason: str) -> None:
    """As far as that shows no key of the data."""
    with pytest.raises(ValidationError, match=re.escape(reason)):
        StateSnapshot.from_json(data)


@pytest.mark.parametrize(
    "data",
    [
        b'{"user_id":"u","axes":{"confidence":0.5,"source":0.5},"source":"mixed"}',
        b'{"user_id":"u","axes":{"axes":0.5},"x":{"user_id":"user_id","user_id":"\\u0075"}}',
        b'{"user_id":"u","axes":{"a":0.1,"a":0.5},"x":' + b"9" * 5000 + b',"x":"\\t"}',
    ],
)
def test_only_a_field_of_the_snapshot_may_not_stand_twice(data: bytes) -> None:
    """Elsewhere it is no matter of ours, and of an axis the last value counts: as for attuned."""
    data = data.replace(b"{", b'{"updated_at_unix_ms":5,', 1)  # without it, each has its own
    assert StateSnapshot.from_json(data).user_id == "u"
    assert StateSnapshot.from_json(data.decode()) == StateSnapshot.from_json(data)



@pytest.mark.parametrize(
    "fields",
    [
        {"axes": {"a": math.nan}},
        {"axes": {"a": math.inf}},
        {"confidence": -math.inf},
        {"axes": {"a": object()}},
        {"axes": None},
        {"user_id": "\ud800"},
    ],
    ids=repr,
)
def test_refused_writing(fields: dict[str, Any]) -> None:
    """What JSON cannot say is refused, and not written as something else."""
    with pytest.raises(ValidationError, match="cannot be written as JSON"):
        StateSnapshot(**{"user_id": "u-1", **fields}).to_json()


def test_an_added_number_that_json_cannot_say_is_refused() -> None:
    """It would be written as null, and then not be read again, or as something else."""

    class Measured(StateSnapshot):
        level: float | None = None
        rest: dict[str, list[float]] = {}  # noqa: RUF012

    for fields in ({"level": math.nan}, {"rest": {"a": [0.5, -math.inf]}}):
        with pytest.raises(ValidationError, match="cannot be written as JSON"):
            Measured("u-1", **fields).to_json()  # type: ignore[arg-type]
    absent = Measured("u-1", rest={"null": [0.5]})
    assert Measured.from_json(absent.to_json()) == absent


# Immutability


@pytest.mark.parametrize(
    "change",
    [
        lambda s: setattr(s, "user_id", "x"),
        lambda s: setattr(s, "axes", {}),
        lambda s: setattr(s, "new", 1),
        lambda s: delattr(s, "confidence"),
        lambda s: operator.setitem(s.axes, "a", 0.1),
        lambda s: operator.delitem(s.axes, "a"),
        lambda s: s.axes.update(a=0.1),
        lambda s: s.axes.clear(),
        lambda s: s.axes.pop("a"),
        lambda s: operator.ior(s.axes, {"a": 0.1}),
    ],
)
def test_cannot_be_changed(change: Callable[[Any], object]) -> None:
    """Neither a field nor an axis can be set, removed or added."""
    state = StateSnapshot("u-1", 1, axes={"a": 0.5})
    try:
        change(state)
    except (AttributeError, TypeError):
        pass
    assert state == StateSnapshot("u-1", 1, axes={"a": 0.5})


@pytest.mark.parametrize("kind", [dict, OrderedDict, MappingProxyType])
def test_what_was_passed_in_stays_apart(kind: Any) -> None:
    """Changing the caller's mapping later changes nothing here."""
    own = {"a": 0.5}
    state = StateSnapshot("u-1", axes=kind(own) if kind is not MappingProxyType else kind(own))
    own["a"] = 0.1
    own["b"] = 0.1
    assert dict(state.axes) == {"a": 0.5}


@dataclass
class Detail:
    """Something that can be changed, of a class nobody knows here."""

    items: list[int]


def test_subclasses_are_as_safe() -> None:
    """Lists, dicts and objects in further fields are copied in and copied out, at any depth."""
    tags, detail, pair, other = ["x"], {"k": [1]}, ([1],), Detail([1])
    state = Mood("u-1", 1, mood="calm", tags=tags, detail=detail, pair=pair, anything=other)
    same = copy.deepcopy(state)
    tags.append("y")
    detail["k"].append(2)
    pair[0].append(2)
    other.items.append(2)
    state.tags.append("z")
    state.detail["k"].append(3)
    state.pair[0].append(3)
    state.anything.items.append(3)
    assert state == same
    assert (state.tags, state.detail, state.pair) == (["x"], {"k": [1]}, ([1],))
    assert state.anything == Detail([1])


def test_subclass_defaults_are_not_shared() -> None:
    """A list as a default is each snapshot's own."""
    one, two = Mood("u-1"), Mood("u-2")
    one.tags.append("x")
    assert two.tags == []


def test_subclass_must_be_frozen() -> None:
    """A subclass cannot make its snapshots changeable."""
    with pytest.raises(TypeError, match="must be frozen"):

        class Loose(StateSnapshot, frozen=False):
            mood: str = ""


def test_unchangeable_values_are_handed_out_as_they_are() -> None:
    """Copies are made only where something could be changed."""

    class Kind(Enum):
        ONE = 1

    now = datetime.now(UTC)
    for value in ("text", 1, None, b"x", now, Kind.ONE):
        assert Mood("u-1", anything=value).anything is value


async def test_readers_do_not_share() -> None:
    """What one reader does to what it read is never seen by another."""
    store = MemoryStore(snapshot_type=Mood)
    await store.upsert_latest(Mood("u-1", 1, tags=["x"], detail={"k": [1]}))
    first = await store.get_latest("u-1")
    assert isinstance(first, Mood)
    first.tags.append("y")
    first.detail["k"].append(2)
    assert await store.get_latest("u-1") == Mood("u-1", 1, tags=["x"], detail={"k": [1]})


@pytest.mark.parametrize(
    "again",
    [
        copy.copy,
        copy.deepcopy,
        lambda state: pickle.loads(pickle.dumps(state)),  # noqa: S301
        lambda state: msgspec.structs.replace(state),
        lambda state: type(state).from_json(state.to_json()),
    ],
)
def test_copies(again: Callable[[StateSnapshot], StateSnapshot]) -> None:
    """Copies of all kinds are equal, of the same class, and immutable."""
    for state in (
        StateSnapshot("u-1", 1, axes={"a": 0.5}),
        Mood("u-1", 1, axes={"a": 0.5}, mood="calm", tags=["x"], detail={"k": [1]}),
    ):
        twin = again(state)
        assert twin == state
        assert type(twin) is type(state)
        with pytest.raises(TypeError):
            twin.axes["a"] = 0.1  # type: ignore[index]


def test_replace_takes_copies() -> None:
    """``copy.replace`` (of Python 3.13) gives a snapshot as safe as a new one."""
    axes: dict[str, float] = {"a": 1}
    state = Mood("u-1", 1, mood="calm").__replace__(axes=axes, confidence=0)
    axes["b"] = 2
    assert state == Mood("u-1", 1, mood="calm", axes={"a": 1.0}, confidence=0.0)
    state.validate()


class Picky(StateSnapshot):
    """Fields of several kinds."""

    mood: str = ""
    count: int = 0
    seen: list[int] = msgspec.field(default_factory=list)
    anything: object = None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mood", 5),
        ("mood", "\ud800"),
        ("count", "x"),
        ("count", 2**70),
        ("seen", ["x"]),
        ("anything", object()),
        ("anything", [lambda: None]),
    ],
)
async def test_fields_of_a_subclass_are_validated(field: str, value: object) -> None:
    """What a database could not give back is refused by every store, and the field is named."""
    state = Picky("u-1", **{field: value})  # type: ignore[arg-type]
    with pytest.raises(ValidationError) as caught:
        await MemoryStore(snapshot_type=Picky).upsert_latest(state)
    assert caught.value.field == field
    if field != "count":
        assert repr(value) not in str(caught.value)


def test_good_fields_of_a_subclass() -> None:
    """What can be kept is not refused, also when it is read back as a list or a NaN."""
    Picky(
        "u-1", mood="calm", count=2, seen=[1], anything={"a": [1, None, {1}, float("nan")]}
    ).validate()


@pytest.mark.parametrize("kind", [StrEnum("Ids", {"ID": "u-1"}), type("Text", (str,), {})])
def test_ids_of_a_subclass_of_str(kind: type[str]) -> None:
    """An id of a subclass (of an enum, a library) becomes plain text, as drivers know it."""
    state = StateSnapshot(kind("u-1"), 1)
    assert type(state.user_id) is str
    assert state == StateSnapshot("u-1", 1)
    assert StateSnapshot.from_json(state.to_json()) == state


def test_frozen_dataclass_on_a_subclass() -> None:
    """A decorator out of habit does no harm."""

    @dataclass(frozen=True)
    class Decorated(StateSnapshot):
        mood: str = ""

    state = Decorated("user-1", 1, mood="calm")
    assert state.mood == "calm"
    assert state == Decorated("user-1", 1, mood="calm")
    assert "calm" not in repr(state)


def test_dataclass_fields_on_a_subclass() -> None:
    """Their defaults are those of the snapshot, made anew for each where they can change."""

    @dataclass(frozen=True)
    class Decorated(StateSnapshot):
        mood: str = field(default="calm")
        tags: list[str] = field(default_factory=lambda: ["new"])

    class Needed(StateSnapshot, kw_only=True):
        mood: str = field(repr=False)

    state = Decorated("user-1", 1)
    state.validate()
    assert (state.mood, state.tags) == ("calm", ["new"])
    assert Decorated.from_json(state.to_json()) == state
    assert Needed("user-1", mood="calm").mood == "calm"
    with pytest.raises(TypeError, match="mood"):
        Needed("user-1")


# Privacy

MARK, VALUE = "marked-user-4711", 0.4711471147114711


@pytest.mark.parametrize(
    "show",
    [
        repr,
        str,
        ascii,
        "{}".format,
        "{0!r:>80}".format,
        "{!s}".format,
        lambda s: "%s %r" % (s, s),  # noqa: UP031
        lambda s: f"{s}{s!r}{s!a}",
        lambda s: repr([s, {"k": s}, (s,)]),
        lambda s: repr(OrderedDict(k=s)),
    ],
)
def test_shown_redacted(show: Callable[[object], str]) -> None:
    """No way of showing a snapshot shows a long id whole, or any value."""
    for cls in (StateSnapshot, Mood):
        text = show(cls(MARK, axes={"warmth": VALUE}, confidence=VALUE))
        assert "mark..." in text
        assert MARK not in text
        assert "4711" not in text
        assert "warmth" not in text


def test_short_ids_are_not_shown_at_all() -> None:
    """Four characters would be the whole id."""
    assert repr(StateSnapshot("abcd")) == "StateSnapshot(user_id='[redacted]', axes=<0>)"
    assert repr(StateSnapshot("abcde")) == "StateSnapshot(user_id='abcd...', axes=<0>)"


def test_errors_show_nothing() -> None:
    """Neither validation, pickling, logging nor a traceback shows a value."""
    state = StateSnapshot(MARK, axes={"warmth": 1 + VALUE})
    texts = []
    try:
        state.validate()
    except ValidationError as exc:
        texts += [str(exc), repr(exc), "".join(traceback.format_exception(exc))]
    bad = StateSnapshot(MARK, axes={"warmth": VALUE}, confidence=lambda: None)  # type: ignore[arg-type]
    for call in (lambda: pickle.dumps(bad), bad.to_json, lambda: state < state):  # type: ignore[operator]
        try:
            call()
        except Exception as exc:  # noqa: BLE001
            texts += [str(exc), repr(exc)]
    record = logging.LogRecord("x", 20, "f", 1, "state %s of %r", (state, state), None)
    texts.append(record.getMessage())
    assert len(texts) == 10
    for text in texts:
        assert MARK not in text
        assert "4711" not in text


def test_it_stays_small() -> None:
    """No dict per object, and nothing for the garbage collector to walk."""
    import gc

    state = StateSnapshot("u-1", axes={"a": 0.5})
    assert not hasattr(state, "__dict__")
    assert not gc.is_tracked(state)
    # Of a bare object it takes 16 bytes, without a global interpreter lock more.
    assert sys.getsizeof(state) <= 48 + sys.getsizeof(object())


def test_type_checkers_know_what_is_built() -> None:
    """Building a snapshot has its class as type: else pyright, and editors with it, take each for
    anything, complete nothing and check no argument.
    """
    hints = get_type_hints(type(StateSnapshot).__call__)
    assert isinstance(hints["return"], TypeVar)
    assert hints["cls"].__args__ == (hints["return"],)


def test_names_that_came_once_keep_out_none_that_come_again() -> None:
    """However many names were seen, those in use are known: else each write looks at each axis."""
    from layered_store.snapshot import _axes_hold, _good_names

    for number in range(3_000):
        StateSnapshot("u-1", axes={f"once_{number}_{part}": 0.5 for part in "abc"}).validate()
    assert len(_good_names) <= 4_200
    used = {f"used_{number}": 0.5 for number in range(23)}
    StateSnapshot("u-1", axes=used).validate()
    assert _axes_hold(used)
