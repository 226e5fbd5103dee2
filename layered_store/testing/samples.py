"""Values for the fields that an application added to its snapshots."""

from __future__ import annotations

import typing
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

import msgspec

from layered_store.errors import ValidationError
from layered_store.snapshot import StateSnapshot

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["sample_fields"]

_VALUES: Final[tuple[Any, ...]] = (
    "sample",
    b"sample",
    1,
    2,
    0.5,
    0.25,
    True,
    False,
    "2024-01-01T00:00:00Z",
    "2024-01-01",
    "00000000-0000-4000-8000-000000000001",
    [],
    [1],
    ["sample"],
    {},
    {"sample": 1},
    None,
)


def sample_fields(cls: type[StateSnapshot]) -> dict[str, Any]:
    """Return a value for each field that ``cls`` adds and that can have one beside its default.

    So a store that loses a field shows it. What a rule of the class refuses is left at its default.

    Raises:
        TypeError: a field has no default, and no value could be made up for it.
    """
    fields: dict[str, Any] = {}
    added = _added(cls)
    for field in added:
        if field.required:
            try:
                fields[field.name] = next(_values_of(field.type))
            except StopIteration:
                raise TypeError(
                    f"cannot make up a value for {cls.__name__}.{field.name}; give it a default"
                ) from None
    for field in added:
        if not field.required:
            usual = getattr(cls(user_id="sample", **fields), field.name)
            other = [value for value in _values_of(field.type) if value != usual][:1]
            if other and _takes(cls, changed := {**fields, field.name: other[0]}):
                fields = changed
    return fields


def _added(cls: type[StateSnapshot]) -> list[Any]:
    if cls is StateSnapshot:
        return []
    try:
        fields = msgspec.structs.fields(cls)
    except NameError:  # its annotations name what only a function knew
        return []
    return [field for field in fields if field.name not in StateSnapshot.__struct_fields__]


def _values_of(kind: Any) -> Iterator[Any]:
    """Yield values that an annotation allows."""
    members = [each.value for each in kind] if isinstance(kind, type(Enum)) else []
    for value in (*members, *typing.get_args(kind), *_VALUES):
        try:
            yield msgspec.convert(value, kind)
        except (msgspec.MsgspecError, TypeError, ValueError):
            continue


def _takes(cls: type[StateSnapshot], fields: dict[str, Any]) -> bool:
    try:
        cls(user_id="sample", **fields).validate()
    except (ValidationError, TypeError, ValueError):
        return False
    return True
