"""Values of a config file, converted to what the constructor of a block takes."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from datetime import timedelta
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final

from layered_store.config.durations import parse_duration
from layered_store.options import nearest

if TYPE_CHECKING:
    from layered_store.config.registry import Option

__all__ = ["converted", "expected", "from_text", "word"]

_WORDS: Final = {"true": True, "false": False}


def from_text(text: str) -> Any:
    """Read a number or truth value that came out of the environment."""
    if text.strip().lower() in _WORDS:
        return _WORDS[text.strip().lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def converted(option: Option, value: Any) -> Any:
    """Return a value of a config file as the block's constructor takes it.

    Raises:
        ValueError: the option does not take it; the message says what it takes.
    """
    found = _converted(option, value)
    if not option.delta or found is None:
        return found
    try:
        return timedelta(seconds=found)
    except (OverflowError, ValueError):
        raise ValueError("must be a finite number of seconds that a timedelta can hold") from None


def _converted(option: Option, value: Any) -> Any:
    accepts = option.accepts
    if isinstance(value, str) and value == "none" and _none_is_a_word(option):
        return None  # TOML has no null
    if value is None:
        if option.nullable:
            return None
        raise ValueError(f"must be {expected(option)}, not null")
    if option.duration and isinstance(value, str):
        return parse_duration(value)
    if option.duration and isinstance(value, timedelta):
        return value.total_seconds()
    if type in accepts and isinstance(value, str):
        return _class(value)
    if type in accepts and isinstance(value, type):
        return value  # of a dict that was written in code
    kind = str if isinstance(value, str) else type(value)
    if kind in option.limited and not any(
        type(choice) is kind and choice == value for choice in option.choices
    ):
        near = nearest(str(value), [str(choice) for choice in option.choices])
        hint = f"; did you mean {near!r}?" if near else ""
        raise ValueError(f"must be {expected(option)}{hint}")
    plain = next((each for each in (bool, int, float, str, dict) if isinstance(value, each)), None)
    if plain in accepts:
        return value
    if plain is int and float in accepts:
        try:
            return float(value)
        except OverflowError:
            raise ValueError("is too large a number") from None
    if isinstance(value, list) and list in accepts:
        if all(
            type(item) is option.item or (option.item is float and type(item) is int)
            for item in value
        ):
            return option.collection(value)
        raise ValueError(f"must be {expected(option)}; an item is something else")
    raise ValueError(f"must be {expected(option)}, not {word(value)}")


def _class(text: str) -> type:
    module, colon, name = text.partition(":")
    if not (colon and all(part.isidentifier() for part in name.split("."))):
        raise ValueError('must name a class as "package.module:Class"')
    try:
        found = attrgetter(name)(importlib.import_module(module))
    except Exception as exc:  # noqa: BLE001  importing runs anything
        missing = isinstance(exc, ModuleNotFoundError)
        remedy = "; its module must be installed, or in a folder of PYTHONPATH" if missing else ""
        raise ValueError(f"this class cannot be imported ({type(exc).__name__}){remedy}") from None
    if not isinstance(found, type):
        raise ValueError("must name a class, and names something else")  # noqa: TRY004
    return found


_NAMES: Final = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "a table",
    type: 'a class as "package.module:Class"',
}


_ITEMS: Final = {
    str: "texts",
    bool: "truth values",
    int: "whole numbers",
    float: "numbers",
}


def _none_is_a_word(option: Option) -> bool:
    text_too = str in option.free or "none" in option.choices
    return option.nullable and not text_too


def expected(option: Option) -> str:
    free = option.free
    kinds = [name for kind, name in _NAMES.items() if kind in free]
    if list in free and option.item is not None:
        kinds[kinds.index(_NAMES[list])] = f"a list of {_ITEMS[option.item]}"
    if int in free and float in free:
        kinds.remove(_NAMES[int])
    if option.duration:
        kinds = ['seconds or a duration such as "30s"']
    if option.limited:
        kinds.insert(0, "one of " + ", ".join(repr(choice) for choice in option.choices))
    if kinds and _none_is_a_word(option):
        kinds.append('"none"')
    return " or ".join(kinds) or "left out"


def word(value: object) -> str:
    if isinstance(value, bool):
        return "a truth value"
    if isinstance(value, Mapping):
        return "a table"
    return _NAMES.get(type(value), type(value).__name__)
