"""Variables in the texts of a config file."""

from __future__ import annotations

import jsonschema
import pytest

from layered_store import ConfigError, MemoryStore, load_stack, to_config
from layered_store.config import json_schema
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


def test_names_and_ids_come_from_the_environment_too() -> None:
    """Which block stands there is chosen outside; a missing variable is named with its place."""
    config = {
        "use": "${KIND:-memory}",
        "id": "${ID}",
        "layers": [{"use": "${OUTER}", "id": "outer"}],
    }
    environ = {"ID": "truth", "OUTER": "retry"}
    assert repr(load_stack(config, environ=environ)) == "Retry(MemoryStore())"
    jsonschema.validate({"store": config}, json_schema())
    other = MemoryStore()
    stack = load_stack(config, environ=environ, overrides={"truth": other})
    assert stack.children()["inner"] is other
    with pytest.raises(ConfigError) as caught:
        load_stack(config, environ={"KIND": "memroy"})
    assert [(each.path, each.message.split(";")[0]) for each in caught.value.problems] == [
        ("store.layers.0.use", "the environment variable OUTER is not set"),
        ("store.use", "there is no block of this name"),
        ("store.id", "the environment variable ID is not set"),
    ]
    with pytest.raises(ConfigError, match="store.id: must be a name"):
        load_stack({"use": "memory", "id": "${ID}"}, environ={"ID": ""})
    literal = load_stack({"use": "memory", "id": "$${ID}"}, environ={})
    assert to_config(load_stack(to_config(literal)))["store"]["id"] == "$${ID}"
