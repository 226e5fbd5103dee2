"""Values of a config file, with the variables in their texts filled in."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from layered_store.config.environment import MAX_DEPTH, interpolate, literal
from layered_store.config.registry import path_of, spec_of
from layered_store.config.values import from_text
from layered_store.errors import ConfigError

if TYPE_CHECKING:
    from layered_store.config.registry import Option

__all__ = ["filled"]


def filled(option: Option, value: Any, environ: Mapping[str, str], path: str) -> Any:
    """Return a value of the file with its variables filled in.

    A text that had variables is read as a number or truth value where the option takes no text. In
    a table that its block reads as a config again, what was filled in is escaped, so that it is
    not filled in twice.

    Args:
        option: whose value it is.
        value: what the file holds.
        environ: where the variables come from.
        path: of the value in the file.

    Raises:
        ConfigError: a variable is not set, a reference is malformed, or tables have no end.
    """
    if option.table and isinstance(value, Mapping):
        return _block(value, environ, path)
    return _told(option, value, environ, path)


def _told(option: Option | None, value: Any, environ: Mapping[str, str], path: str) -> Any:
    new = _deep(value, environ, path)
    if option is None:
        return new
    if isinstance(value, str) and new != value and str not in option.free:
        return new if new in option.choices else from_text(new)
    if isinstance(value, list) and option.item not in (str, None):
        return [
            from_text(text) if isinstance(old, str) and text != old else text
            for old, text in zip(value, new, strict=True)
        ]
    return new


def _block(
    table: Mapping[str, Any], environ: Mapping[str, str], path: str, depth: int = 0
) -> dict[str, Any]:
    """Return a table that its block reads as a config again, with its filled-in text escaped."""
    _check_depth(depth)
    options: tuple[Option, ...] = ()
    with suppress(ConfigError):  # told when the table is read
        options = spec_of(interpolate(str(table.get("use")), environ)).options
    known = {option.name: option for option in options}
    found: dict[str, Any] = {}
    for key, value in table.items():
        place, option = path_of(path, key), known.get(key)
        if isinstance(value, Mapping) and (option is None or option.store or option.table):
            found[key] = _block(value, environ, place, depth + 1)
        elif key == "layers" and isinstance(value, list | tuple):
            found[key] = [
                _block(each, environ, f"{place}.{index}", depth + 1)
                if isinstance(each, Mapping)
                else each
                for index, each in enumerate(value)
            ]
        else:
            found[key] = literal(_told(option, value, environ, place))
    return found


def _deep(value: Any, environ: Mapping[str, str], path: str, depth: int = 0) -> Any:
    """Fill in the variables of a text, a list or a table, at whatever depth."""
    _check_depth(depth)
    if isinstance(value, str):
        try:
            return interpolate(value, environ)
        except ConfigError as exc:
            exc.path = path
            raise
    if isinstance(value, list | tuple):
        return [_deep(item, environ, path, depth + 1) for item in value]
    if isinstance(value, Mapping):
        return {
            key: _deep(item, environ, path_of(path, key), depth + 1)
            for key, item in value.items()
        }
    return value


def _check_depth(depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ConfigError(f"is nested without end (more than {MAX_DEPTH} deep)")
