"""``${NAME}`` and ``${NAME:-default}`` in the texts of a config file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from layered_store.errors import ConfigError

__all__ = ["MAX_DEPTH", "interpolate", "literal"]

_REFERENCE: Final = re.compile(
    r"\$(?:(?P<escaped>\$)(?=\{)|\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?P<then>:-|\})|(?P<broken>\{))"
)
_MALFORMED: Final = (
    "has a malformed variable; write ${NAME} or ${NAME:-default} (braces in a default come in"
    " pairs), and $${ for a literal ${"
)

MAX_DEPTH: Final = 32
"""How deep tables, lists and defaults may stand in one another."""


def interpolate(text: str, environ: Mapping[str, str], depth: int = 0) -> str:
    """Return ``text`` with its variables filled in; ``$${`` stands for a literal ``${``.

    An empty variable counts as set for ``${NAME}`` and as unset for ``${NAME:-default}``, as in a
    shell. A default may hold variables and pairs of braces; what a variable holds is taken as it
    is. It happens after the file was parsed, so that no value can change the file's structure.

    Args:
        text: what a file holds.
        environ: where the variables come from.
        depth: how many defaults this text stands in.

    Raises:
        ConfigError: a variable is not set, or a reference is malformed.
    """
    if depth > MAX_DEPTH:
        raise ConfigError(f"has defaults within defaults, more than {MAX_DEPTH} deep")
    parts: list[str] = []
    place = 0
    while match := _REFERENCE.search(text, place):
        parts.append(text[place : match.start()])
        place = match.end()
        if match["escaped"]:
            parts.append("${")
            place += 1
            continue
        if match["broken"]:
            raise ConfigError(_MALFORMED)
        default = None
        if match["then"] == ":-":
            end = _end_of_default(text, place)
            default, place = text[place:end], end + 1
        name = match["name"]
        value = environ.get(name)
        if value is None and default is None:
            raise ConfigError(
                f"the environment variable {name} is not set; set it, or give a default as"
                f" ${{{name}:-default}}"
            )
        parts.append(value or interpolate(default or "", environ, depth + 1))
    parts.append(text[place:])
    return "".join(parts)


def _end_of_default(text: str, start: int) -> int:
    """Return where the brace stands that ends a default: those within it come in pairs."""
    depth = 0
    for place in range(start, len(text)):
        if text[place] == "{":
            depth += 1
        elif text[place] == "}":
            if not depth:
                return place
            depth -= 1
    raise ConfigError(_MALFORMED)


def literal(value: Any) -> Any:
    """Return a value of which :func:`interpolate` makes this one: no text in it is a variable."""
    if isinstance(value, str):
        return str(value).replace("${", "$${")
    if isinstance(value, list | tuple | set | frozenset):
        return [literal(item) for item in value]
    if isinstance(value, Mapping):
        return {key: literal(item) for key, item in value.items()}
    return value
