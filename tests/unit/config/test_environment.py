"""Variables in the texts of a config file."""

from __future__ import annotations

import pytest

from layered_store import ConfigError, load_stack
from layered_store.config.environment import interpolate

ENVIRON = {"A": "1", "B": "2", "EMPTY": "", "BRACES": "${A}", "JSON": '{"a": 1}'}


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("${A}", "1"),
        ("x${A}y${B}z", "x1y2z"),
        ("${EMPTY}", ""),
        ("${EMPTY:-d}", "d"),
        ("${NO:-}", ""),
        ("${NO:-a:b-c}", "a:b-c"),
        ("${A:-{x}}", "1"),
        ("${NO:-{x}}", "{x}"),
        ('${NO:-{"a": {"b": 1}}}!', '{"a": {"b": 1}}!'),
        ("${NO:-${B}}", "2"),
        ("${A:-${NO}}", "1"),
        ("${NO:-${NONE:-z}}", "z"),
        ("${NO:-<${A}${B}>}", "<12>"),
        ("${NO:-$${A}}", "${A}"),
        ("$${A}", "${A}"),
        ("$$${A}", "$${A}"),
        ("$A $ $$ {A} }", "$A $ $$ {A} }"),
        ("${BRACES}", "${A}"),
        ("${JSON}", '{"a": 1}'),
    ],
)
def test_filled_in(text: str, filled: str) -> None:
    """Defaults hold variables and pairs of braces; what a variable holds is not looked into."""
    assert interpolate(text, ENVIRON) == filled


@pytest.mark.parametrize(
    "text",
    ["${", "${}", "${A", "${A:-", "${A:-{}", "${A:-${B}", "${1A}", "${A B}", "${A:=x}", "${A-x}"],
)
def test_malformed(text: str) -> None:
    """A reference that is none says how it is written, also when its variable is set."""
    with pytest.raises(ConfigError, match="malformed variable"):
        interpolate(text, ENVIRON)


@pytest.mark.parametrize("text", ["${NO}", "${NO:-${NO}}", "${EMPTY:-${NO}}"])
def test_missing(text: str) -> None:
    """A missing variable is named."""
    with pytest.raises(ConfigError, match="variable NO is not set"):
        interpolate(text, ENVIRON)


@pytest.mark.parametrize("source", [None, 5, [], b"stack.toml"])
def test_no_source_at_all(source: object) -> None:
    """What is neither a path nor a dict is a ConfigError too."""
    with pytest.raises(ConfigError, match="source: must be a path or a dict"):
        load_stack(source)  # type: ignore[arg-type]
