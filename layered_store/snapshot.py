"""The value: one user's state at one moment, immutable all the way down."""

import copy
import dataclasses
import functools
import json
import math
import operator
import re
from collections.abc import Mapping
from datetime import date, time, timedelta, tzinfo
from enum import Enum, StrEnum
from types import MappingProxyType, MemberDescriptorType
from typing import Annotated, Any, Final, Self, TypeVar, dataclass_transform

import msgspec

from layered_store.clock import SYSTEM_CLOCK
from layered_store.errors import ValidationError
from layered_store.identity import check_user_id, redact

__all__ = ["DEFAULT_AXIS", "Source", "StateSnapshot"]

DEFAULT_AXIS: Final = 0.5
"""What ``get_axis`` gives for an axis the snapshot does not hold: the neutral middle."""

_INT64_MIN: Final = -(2**63)
_INT64_MAX: Final = 2**63 - 1
_is_axis_name: Final = re.compile(r"[a-z0-9](?:[a-z0-9_]{0,62}[a-z0-9])?").fullmatch

T = TypeVar("T")

Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Int64 = Annotated[int, msgspec.Meta(ge=_INT64_MIN, le=_INT64_MAX)]


class Source(StrEnum):
    """Where a state came from."""

    SELF_REPORT = "self_report"
    INFERRED = "inferred"
    MIXED = "mixed"


def _now_ms() -> int:
    return int(SYSTEM_CLOCK.time() * 1000)


def _as_float(value: object) -> object:
    """Give the float that a number stands for; leave anything else for ``validate`` to refuse."""
    if type(value) is float:
        return value
    if _is_bool(value) or isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        return value
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return value


def _as_int(value: object) -> object:
    """Give the int that an integer of another kind (numpy's, an enum's) stands for."""
    if _is_bool(value) or not hasattr(value, "__index__"):
        return value
    try:
        return operator.index(value)
    except TypeError:  # numpy gives an array the method too
        return value


def _is_bool(value: object) -> bool:
    """Tell a truth value, also one of numpy's, which can be turned into a number."""
    return isinstance(value, bool) or getattr(getattr(value, "dtype", None), "kind", None) == "b"


def _as_text(value: object) -> object:
    """Give plain text for text of a subclass (an enum, numpy's, a template's).

    Drivers and codecs know nothing of those.
    """
    return str.__str__(value) if isinstance(value, str) else value


# What the dataclass decorator would put on a subclass; a Struct has its own, in C.
_GENERATED = frozenset(
    {"__init__", "__repr__", "__eq__", "__setattr__", "__delattr__", "__hash__", "__match_args__"}
)


def _with_struct_fields(namespace: dict[str, Any]) -> dict[str, Any]:
    """Say the defaults of ``dataclasses.field`` as msgspec does, which would keep the ``Field``."""
    own = dict(namespace)
    for name, value in namespace.items():
        if not isinstance(value, dataclasses.Field):
            continue
        if value.default is not dataclasses.MISSING:
            own[name] = msgspec.field(default=value.default)
        elif value.default_factory is not dataclasses.MISSING:
            own[name] = msgspec.field(default_factory=value.default_factory)
        else:
            del own[name]
    return own


_SCALARS = frozenset({str, int, float, bool, bytes, "str", "int", "float", "bool", "bytes"})
_UNCHANGEABLE = (str, int, float, complex, bytes, Enum, date, time, timedelta, tzinfo, type(None))
"""What can be handed out as it is; anything else may hold something that can be changed."""


class _SnapshotMeta(msgspec.StructMeta):
    """Gives every new snapshot containers of its own, and hands out none that can be changed.

    Decoding does not pass through ``__call__``: what it builds is its own already.
    """

    _containers: dict[str, Any]

    def __new__(
        mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **config: Any
    ) -> Any:
        if config.get("frozen") is False:
            raise TypeError(f"{name} must be frozen: snapshots cannot be changed; leave frozen out")
        if any(base.__dictoffset__ for base in bases):
            config.setdefault("gc", True)  # a mixin without ``__slots__``; msgspec asks for it
        return super().__new__(mcs, name, bases, _with_struct_fields(namespace), **config)

    def __init__(
        cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **config: Any
    ) -> None:
        super().__init__(name, bases, namespace, **config)
        inherited: dict[str, Any] = {}
        for base in reversed(bases):
            inherited |= getattr(base, "_containers", {})
        # From Python 3.14 on they are not there yet, and each field may hold what can be changed.
        annotations = namespace.get("__annotations__", {})
        # One that only has another default has the slot of its base; a ``ClassVar`` has none.
        own = {
            field: slot
            for field in cls.__struct_fields__
            if isinstance(slot := cls.__dict__.get(field), MemberDescriptorType)
            and annotations.get(field) not in _SCALARS
            and bases[0] is not msgspec.Struct
        }
        type.__setattr__(cls, "_containers", {**inherited, **own})
        for field, slot in own.items():
            type.__setattr__(cls, field, property(_copier(slot)))

    # What it returns has to be the class's: else type checkers take a new snapshot for anything.
    def __call__(cls: type[T], *args: Any, **kwargs: Any) -> T:
        self: Any = super().__call__(*args, **kwargs)  # type: ignore[misc]
        for slot in cls._containers.values():  # type: ignore[attr-defined]
            if not isinstance(value := slot.__get__(self), _UNCHANGEABLE):
                slot.__set__(self, copy.deepcopy(value))
        axes = _raw_axes(self)
        try:
            own = {
                name: value if type(value) is float else _as_float(value)
                for name, value in axes.items()
            }
            if [*map(type, own)].count(str) != len(own):
                own = {_as_text(name): value for name, value in own.items()}
        except AttributeError:
            own = axes  # not a mapping: ``validate`` says so
        _axes_slot.__set__(self, own)
        user_id = self.user_id
        if type(user_id) is not str:
            _set_field(self, "user_id", _as_text(user_id))
        moment = self.updated_at_unix_ms
        if type(moment) is not int:
            _set_field(self, "updated_at_unix_ms", _as_int(moment))
        confidence = self.confidence
        if type(confidence) is not float:
            _set_field(self, "confidence", _as_float(confidence))
        source = self.source
        if type(source) is not Source:
            try:
                _set_field(self, "source", Source(source))
            except ValueError:
                pass
        return self  # type: ignore[no-any-return]

    def __setattr__(cls, name: str, value: Any) -> None:
        # ``@dataclass(frozen=True)`` on a subclass is harmless: its methods are not needed.
        if name not in _GENERATED:
            super().__setattr__(name, value)


def _copier(slot: Any) -> Any:
    def read(self: Any) -> Any:
        value = slot.__get__(self)
        return value if isinstance(value, _UNCHANGEABLE) else copy.deepcopy(value)

    return read


_set_field = msgspec.structs.force_setattr


# Type checkers then know that a subclass is frozen without saying so.
@dataclass_transform(frozen_default=True, field_specifiers=(msgspec.field,))
class StateSnapshot(msgspec.Struct, frozen=True, gc=False, metaclass=_SnapshotMeta):
    """The state of one user, as it was at one moment.

    Immutable: the axes are copied in and shown as a read-only mapping. Two snapshots are equal
    when their class and all fields are. To keep more fields, subclass it and build the stores
    with ``snapshot_type=``::

        class MoodSnapshot(StateSnapshot):
            mood: str = ""

        store = MemoryStore(snapshot_type=MoodSnapshot)

    Building one checks nothing; :meth:`validate` does, and every store calls it before it writes.
    Fields of a subclass must hold what their annotations say and what MessagePack can write, or no
    backend could give them back.

    Args:
        user_id: 1 to 256 UTF-8 bytes of Unicode alphanumerics, ``_`` and ``-``.
        updated_at_unix_ms: when the state was observed, milliseconds since 1970, signed 64 bits;
            now unless given.
        source: how the state became known.
        confidence: trust in it, 0 to 1.
        axes: values in [0, 1] by name; names are 1 to 64 of ``a-z0-9_``, no ``_`` at either end.
    """

    user_id: str
    updated_at_unix_ms: Int64 = msgspec.field(default_factory=_now_ms)
    source: Source = Source.SELF_REPORT
    confidence: Share = 1.0
    axes: Mapping[str, Share] = msgspec.field(default_factory=dict)

    def get_axis(self, name: str) -> float:
        """Return the value of an axis, or 0.5 when the snapshot does not hold it."""
        return self.axes.get(name, DEFAULT_AXIS)

    def get_axis_opt(self, name: str) -> float | None:
        """Return the value of an axis, or None when the snapshot does not hold it."""
        return self.axes.get(name)

    def validate(self) -> None:
        """Raise :class:`ValidationError`, naming the field, unless all rules hold."""
        check_user_id(self.user_id)
        moment = self.updated_at_unix_ms
        if type(moment) is not int or not _INT64_MIN <= moment <= _INT64_MAX:
            raise self._refuse("updated_at_unix_ms", "must be an int of at most 64 signed bits")
        if type(self.source) is not Source:
            raise self._refuse("source", "must be 'self_report', 'inferred' or 'mixed'")
        if not _is_share(self.confidence):
            raise self._refuse("confidence", "must be a finite number from 0 to 1")
        axes = _raw_axes(self)
        if type(axes) is not dict:
            raise self._refuse("axes", "must be a mapping of names to numbers")
        if not _axes_hold(axes):
            self._look_at(axes)
        if type(self) is not StateSnapshot:
            self._check_added_fields()

    def _look_at(self, axes: dict[Any, Any]) -> None:
        for name, value in axes.items():
            if type(name) is not str or not _is_axis_name(name):
                raise self._refuse(
                    "axes",
                    "has a name that is not 1 to 64 of a-z, 0-9 and '_' "
                    "(with no '_' at either end)",
                )
            if not _is_share(value):
                raise self._refuse("axes", "has a value that is not a finite number from 0 to 1")
        if len(_good_names) >= _MOST_NAMES:
            _good_names.clear()  # names that came once must not keep out those that come again
        _good_names.update(axes)

    def _check_added_fields(self) -> None:
        """Refuse what a backend would keep and could not read again, or not keep at all."""
        cls = type(self)
        try:
            _decoder(cls).decode(_encode(self))
        except _NOT_KEPT:
            for field in msgspec.structs.fields(cls):
                if field.name in StateSnapshot.__struct_fields__:
                    continue
                try:
                    msgspec.msgpack.decode(_encode(getattr(self, field.name)), type=field.type)
                except _NOT_KEPT:
                    raise self._refuse(
                        field.name, "must hold what its annotation says, and MessagePack can write"
                    ) from None
            raise self._refuse("snapshot", "cannot be written and read again") from None

    def to_json(self) -> bytes:
        """Return the wire form, one line of UTF-8 JSON.

        Raises:
            ValidationError: a field cannot be written as JSON.
        """
        try:
            # JSON has no NaN and no infinity: they would be written as null, and not be read again.
            if not math.isfinite(self.confidence + sum(_raw_axes(self).values())):
                raise OverflowError
            text = _json_encoder.encode(self)
            if type(self) is not StateSnapshot and b"null" in text:
                # The same of an added field, wherever in it; this raises then.
                json.dumps(msgspec.to_builtins(self), allow_nan=False)
            return text
        except (TypeError, ValueError, AttributeError, msgspec.MsgspecError, OverflowError) as exc:
            raise self._refuse(
                "snapshot", f"cannot be written as JSON ({type(exc).__name__})"
            ) from None

    @classmethod
    def from_json(cls, data: bytes | str) -> Self:
        """Return the valid snapshot that ``data`` holds; unknown keys are ignored.

        Raises:
            ValidationError: not JSON, a field is missing, stands there twice or breaks a rule.
        """
        try:
            snapshot = msgspec.json.decode(data, type=cls)
            repeated = _repeated(cls, data)
        except (msgspec.MsgspecError, ValueError, RecursionError, TypeError) as exc:
            raise ValidationError(_decode_problem(exc), field="snapshot") from None
        if repeated:
            raise ValidationError(f"has the field {repeated} twice", field="snapshot")
        snapshot.validate()
        return snapshot

    def __replace__(self, **changes: Any) -> Self:
        # What copy.replace calls: a new one takes copies, like any other.
        fields = {name: getattr(self, name) for name in self.__struct_fields__}
        return type(self)(**{**fields, **changes})

    def _refuse(self, field: str, message: str) -> ValidationError:
        user_id = self.user_id if isinstance(self.user_id, str) else None
        return ValidationError(message, field=field, user_id=user_id)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(user_id={redact(self.user_id)!r}, axes=<{_count(self)}>)"

    def __str__(self) -> str:
        return repr(self)

    def __rich_repr__(self) -> Any:
        yield "user_id", redact(self.user_id)
        yield "axes", f"<{_count(self)}>"

    def __hash__(self) -> int:
        return hash((self.user_id, self.updated_at_unix_ms, self.source, self.confidence))


_axes_slot: Any = StateSnapshot.__dict__["axes"]
_raw_axes = _axes_slot.__get__
# A property over the slot: C code reads the slot by its offset, so encoding stays fast, the dict in
# it stays untracked by the garbage collector, and Python code sees a view that cannot be changed.
type.__setattr__(
    StateSnapshot,
    "axes",
    property(lambda self: _view(_raw_axes(self)), doc="Values in [0, 1] by axis name, read-only."),
)


def _view(axes: Any) -> Any:
    return MappingProxyType(axes) if type(axes) is dict else axes


def _count(snapshot: StateSnapshot) -> str:
    axes = _raw_axes(snapshot)
    return str(len(axes)) if type(axes) is dict else "?"


def _is_share(value: object) -> bool:
    return type(value) is float and 0.0 <= value <= 1.0  # a NaN compares false with everything


# Names that were found good: an application has few, and looking at 23 one by one costs more than
# the rest of a write.
_good_names: set[str] = set()
_MOST_NAMES: Final = 4096


def _axes_hold(axes: dict[Any, Any]) -> bool:
    """Tell quickly that all axes are good; False only means that each must be looked at."""
    if not axes:
        return True
    values = axes.values()
    if not axes.keys() <= _good_names or [*map(type, values)].count(float) != len(axes):
        return False
    ordered = sorted(values)  # quicker than looking for both ends
    # A NaN may stand anywhere in it.
    return ordered[0] >= 0.0 and ordered[-1] <= 1.0 and not math.isnan(sum(values))


_json_encoder = msgspec.json.Encoder()
_encode = msgspec.msgpack.Encoder().encode
# Of a value that cannot be written, and of bytes that are not what an annotation says.
_NOT_KEPT = (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError)


@functools.cache
def _decoder(cls: type[StateSnapshot]) -> msgspec.msgpack.Decoder[StateSnapshot]:
    return msgspec.msgpack.Decoder(cls)


def _repeated(cls: type[StateSnapshot], data: bytes | str) -> str | None:
    """Return the name of a field that a JSON object has twice.

    Readers differ in which of the two counts: what looked at the data before may have seen another
    user.
    """
    text = data if isinstance(data, str) else str(data, "utf-8")
    names = cls.__struct_encode_fields__
    if "\\" not in text and all(text.count(f'"{name}"') <= 1 for name in names):
        return None
    # Numbers stay text: those of unknown keys may be of any length.
    pairs = json.loads(text, object_pairs_hook=list, parse_int=str, parse_float=str)
    keys = [key for key, _ in pairs]
    return next((name for name in names if keys.count(name) > 1), None)


def _decode_problem(exc: Exception) -> str:
    """Say what is wrong without showing any part of the data.

    msgspec's messages name types, ranges and the path, whose keys may be user data.
    """
    text = str(exc)
    if isinstance(exc, msgspec.ValidationError) and "[...]" not in text and "`$.axes" not in text:
        return (
            f"is not valid: {text}"
            if "Invalid enum value" not in text
            else ("is not valid: source must be 'self_report', 'inferred' or 'mixed'")
        )
    if isinstance(exc, msgspec.ValidationError):
        return "is not valid: axes must map names to finite numbers from 0 to 1"
    return "is not valid JSON"
