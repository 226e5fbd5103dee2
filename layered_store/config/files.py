"""What a config file holds: TOML or JSON, read without telling anything of it in an error."""

from __future__ import annotations

import json
import re
import tomllib
from typing import TYPE_CHECKING, Any, Final

from layered_store.config.registry import shown
from layered_store.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["read_file"]

_MAX_FILE_BYTES: Final = 1_000_000


def read_file(path: Path) -> dict[str, Any]:
    """Return what a file holds.

    Raises:
        ConfigError: it cannot be read. The parser's own error, which has the whole text, does not
            go along.
    """
    found, wrong = _parse(path)
    if wrong:
        raise ConfigError(wrong, option="source")
    if not isinstance(found, dict):
        raise ConfigError(f"{path.name!r} must hold a table", option="source")
    return found


def _parse(path: Path) -> tuple[Any, str]:
    """Return what a file holds, or what is wrong with it."""
    suffix = path.suffix.lower()
    name = repr(path.name)
    if suffix not in (".toml", ".json"):
        return None, "a config file ends in .toml or .json"
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as exc:
        return None, f"cannot read {name}: {getattr(exc, 'strerror', None) or type(exc).__name__}"
    if len(raw) > _MAX_FILE_BYTES:
        return None, f"{name} is larger than a megabyte"
    try:
        text = raw.decode("utf-8-sig")
        found = (
            tomllib.loads(text)
            if suffix == ".toml"
            else json.loads(text, object_pairs_hook=_unrepeated)
        )
    except UnicodeDecodeError:
        return None, f"{name} is not UTF-8"
    except json.JSONDecodeError as exc:
        return None, f"{name} is not valid JSON: {exc.msg} at line {exc.lineno}, column {exc.colno}"
    except tomllib.TOMLDecodeError as exc:
        return None, f"{name} is not valid TOML{_toml_place(exc)}"
    except _RepeatedKeyError as exc:
        return None, f"{name} has the key {shown(exc.key)} twice in one table"
    except (RecursionError, ValueError):
        return None, f"{name} cannot be read"
    return found, ""


class _RepeatedKeyError(Exception):
    """A table of a JSON file has a key twice, of which one would silently win."""

    def __init__(self, key: str) -> None:
        self.key = key


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise _RepeatedKeyError(key)
        table[key] = value
    return table


def _toml_place(exc: Exception) -> str:
    # Only the place is told: the rest of the message may quote what stands there.
    found = re.search(r"\(at (line \d+, column \d+|end of document)\)$", str(exc))
    return f": there is an error at {found[1]}" if found else ""
