"""``${NAME}`` and ``${NAME:-default}`` in the texts of a config file."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from layered_store.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["interpolate"]

_REFERENCE: Final = re.compile(
    r"\$(?:(?P<escaped>\$)(?=\{)|\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}"
    r"|(?P<broken>\{))"
)


def interpolate(text: str, environ: Mapping[str, str]) -> str:
    """Return ``text`` with its variables filled in; ``$${`` stands for a literal ``${``.

    An empty variable counts as set for ``${NAME}`` and as unset for ``${NAME:-default}``, as in a
    shell. It happens after the file was parsed, so that no value can change the file's structure.

    Raises:
        ConfigError: a variable is not set, or a reference is malformed.
    """

    def fill(match: re.Match[str]) -> str:
        if match["escaped"]:
            return "$"
        if match["broken"]:
            raise ConfigError(
                "has a malformed variable; write ${NAME} or ${NAME:-default}, and $${ for a"
                " literal ${"
            )
        name, default = match["name"], match["default"]
        value = environ.get(name)
        if value is None or (default is not None and not value):
            if default is None:
                raise ConfigError(
                    f"the environment variable {name} is not set; set it, or give a default as"
                    f" ${{{name}:-default}}"
                )
            return str(default)
        return value

    return _REFERENCE.sub(fill, text)
