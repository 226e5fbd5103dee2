"""Blocks of third parties: whatever their options and mistakes, loading and writing cope."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from layered_store import ConfigError, MemoryStore, describe, load_stack, to_config
from layered_store.config import json_schema
from layered_store.config.registry import spec_of

ODD = """
import enum
import socket
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Annotated, Any, Literal
from layered_store.layer import Layer
from layered_store.stores.memory import MemoryStore


class Colour(enum.StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(eq=False, repr=False)
class Odd(Layer):
    '''Odd.

    Args:
        wait: how long it waits.
    '''

    wait: float | timedelta = field(default=timedelta(seconds=90), kw_only=True)
    colour: Colour = field(default=Colour.RED, kw_only=True)
    size: Annotated[int, "counted"] = field(default=1, kw_only=True)
    share: int | float | None = field(default=None, kw_only=True)
    names: tuple[str, ...] = field(default=(), kw_only=True)
    table: dict[str, str] | None = field(default=None, kw_only=True)
    of: type | None = field(default=None, kw_only=True)
    things: list[bytes] | None = field(default=None, kw_only=True)
    socket: Any = field(default=None, kw_only=True)
    token: Any = field(default=None, kw_only=True, repr=False)
    strict: bool = field(default=False, kw_only=True)


class Plain(MemoryStore):
    def __init__(self, *rest: int, size: int = 1, **more: int) -> None:
        self.size = size
        super().__init__()


class Bare(Layer):
    def __init__(self, inner, label, limit=3, *, strict=False, wait=timedelta(1), note=None):
        super().__init__(inner)
        self.label, self.limit, self.strict, self.wait, self.note = label, limit, strict, wait, note


@dataclass(eq=False, repr=False)
class Slow(Layer):
    wait: timedelta = field(default=timedelta(seconds=90), kw_only=True)


class Chosen(MemoryStore):
    def __init__(
        self,
        size: int | Literal["auto"] = "auto",
        level: Literal[1, 2, "best"] = 1,
        mode: Literal["a", "b", None] = None,
    ) -> None:
        self.size, self.level, self.mode = size, level, mode
        super().__init__()


@dataclass(eq=False, repr=False)
class Unset(Layer):
    where: str = field(default_factory=lambda: {}["HOME"], kw_only=True)


class Needs(MemoryStore):
    def __init__(self) -> None:
        import a_package_that_nobody_has


class Breaks(MemoryStore):
    def __init__(self, password: str = "") -> None:
        raise RuntimeError(f"cannot log in as {password}")


nothing = 5
"""

_numbers = itertools.count()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of a package that registers blocks."""
    name = f"odd_blocks_{next(_numbers)}"  # classes are remembered by where they are
    (tmp_path / f"{name}.py").write_text(ODD)
    info = tmp_path / f"{name}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    blocks = {"odd": "Odd", "plain": "Plain", "needs": "Needs", "breaks": "Breaks"}
    blocks |= {"bare": "Bare", "slow": "Slow", "chosen": "Chosen", "unset": "Unset"}
    blocks |= {"number": "nothing", "missing": "Gone", "shadowed.nothing": "x"}
    lines = [f"{kind} = {name}:{place}" for kind, place in blocks.items()]
    lines.append(f"away = {name}_away:Block")
    (tmp_path / f"{name}_program.py").write_text("import sys\nsys.exit(3)\n")
    lines.append(f"program = {name}_program:Block")
    text = "[layered_store.blocks]\n" + "\n".join(lines) + "\n"
    (info / "entry_points.txt").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module(name)
    sys.modules.pop(name)


def odd(**options: Any) -> dict[str, Any]:
    return {"use": "memory", "layers": [{"use": "odd", **options}]}


def test_options_of_every_kind_come_from_a_file(module: Any) -> None:
    """Each as its annotation says; what comes from the environment is read as what it must be."""
    stack: Any = load_stack(
        odd(
            wait="2s",
            colour="blue",
            size="${SIZE}",
            share="${SHARE}",
            names=["a", "b"],
            table={"key": "value"},
            of="datetime:timedelta",
            strict="${STRICT}",
        ),
        environ={"SIZE": "3", "SHARE": "0.5", "STRICT": " True "},
    )
    assert (stack.wait, stack.colour, stack.size, stack.share) == (2.0, "blue", 3, 0.5)
    assert (stack.strict, stack.of, list(stack.names)) == (True, timedelta, ["a", "b"])
    assert stack.table == {"key": "value"}
    assert load_stack(odd(wait=timedelta(minutes=1))).wait == 60.0  # type: ignore[attr-defined]
    assert load_stack(odd(strict="${NO}"), environ={"NO": "false"}).strict is False  # type: ignore[attr-defined]
    jsonschema.validate({"store": odd(wait="2s", colour="red")}, json_schema())
    defaults = json_schema()["$defs"]["layer.odd"]["properties"]
    assert defaults["wait"]["default"] == 90.0
    assert defaults["colour"]["anyOf"][0] == {"enum": ["red", "blue"]}


def test_an_option_without_annotation_takes_what_its_default_is(module: Any) -> None:
    """Any plain value without one; inner is the store it wraps."""
    given = {"label": "x", "limit": 5, "strict": True, "wait": "2s", "note": 7}
    config: Any = {"use": "memory", "layers": [{"use": "bare", **given}]}
    stack: Any = load_stack(config)
    assert (stack.label, stack.limit, stack.strict, stack.note) == ("x", 5, True, 7)
    assert stack.wait == timedelta(seconds=2)
    assert to_config(stack)["store"]["layers"] == [{"use": "bare", **given, "wait": 2.0}]
    jsonschema.validate({"store": config}, json_schema())
    for wrong, words in (({"limit": "5"}, "whole number"), ({"strict": 1}, "true or false")):
        with pytest.raises(ConfigError, match=words):
            load_stack({"use": "memory", "layers": [{"use": "bare", "label": "x", **wrong}]})
    with pytest.raises(ConfigError, match="bare needs this option"):
        load_stack({"use": "memory", "layers": [{"use": "bare"}]})


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("size", 5, 5),
        ("size", "auto", "auto"),
        ("size", "${SIZE}", 7),
        ("size", "${MODE:-auto}", "auto"),
        ("level", 2, 2),
        ("level", "best", "best"),
        ("mode", "b", "b"),
        ("mode", None, None),
        ("mode", "none", None),
        ("size", "many", ValueError),
        ("size", True, ValueError),
        ("level", 3, ValueError),
        ("level", True, ValueError),
        ("mode", "c", ValueError),
    ],
)
@pytest.mark.usefixtures("module")
def test_some_values_of_one_type_and_any_of_another(name: str, value: Any, found: Any) -> None:
    """Of the types in a ``Literal`` only its values are taken, by the schema as by the loader."""
    config = {"store": {"use": "chosen", name: value}}
    assert jsonschema.Draft202012Validator(json_schema()).is_valid(config) == (
        found is not ValueError
    )
    if found is ValueError:
        with pytest.raises(ConfigError) as caught:
            load_stack(config)
        assert caught.value.path == f"store.{name}"
    else:
        stack = load_stack(config, environ={"SIZE": "7"})
        assert getattr(stack, name) == found
        assert load_stack(to_config(stack)).__dict__[name] == found


def test_a_duration_that_is_a_timedelta_only(module: Any) -> None:
    """It is given in a file as any other, and its default is left out where a stack is shown."""
    assert repr(module.Slow(MemoryStore())) == "Slow(MemoryStore())"
    for wait in ("2s", 2, timedelta(seconds=2)):
        stack: Any = load_stack({"use": "slow", "inner": {"use": "memory"}, "wait": wait})
        assert stack.wait == timedelta(seconds=2)
        assert repr(stack) == "Slow(MemoryStore(), wait=2.0)"
    for wait in ("soon", float("nan"), 1e300):
        with pytest.raises(ConfigError, match="wait: must be"):
            load_stack({"use": "slow", "inner": {"use": "memory"}, "wait": wait})


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("colour", "green", "one of 'red', 'blue'"),
        ("share", "much", "a number"),
        ("size", 0.5, "a whole number"),
        ("names", "a", "a list"),
        ("table", 5, "a table"),
        ("of", "nowhere:Thing", "of"),
        ("things", ["x"], "takes an object, which a file cannot hold"),
        ("socket", 5, "takes an object, which a file cannot hold"),
        ("wait", "long", "duration"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(
    module: Any, option: str, value: Any, words: str
) -> None:
    """With the place and what belongs there."""
    with pytest.raises(ConfigError) as caught:
        load_stack(odd(**{option: value}))
    assert option in str(caught.value.path)
    assert words in str(caught.value)


def test_what_stands_in_a_stack_comes_back_as_a_file_may_say_it(module: Any) -> None:
    """Durations in seconds, classes by their place; an object by its class, a secret one too."""
    stack = module.Odd(
        MemoryStore(),
        wait=timedelta(seconds=5),
        of=timedelta,
        names=("a", "${b}"),
        share=0.5,
        socket=object(),
        token=object(),
        table={"a": "b"},
    )
    (layer,) = to_config(stack)["store"]["layers"]
    assert layer == {
        "use": "odd",
        "wait": 5.0,
        "of": "datetime:timedelta",
        "names": ["a", "$${b}"],
        "share": 0.5,
        "socket": "<object>",
        "token": "<object>",
        "table": {"a": "b"},
    }
    assert to_config(module.Odd(MemoryStore()))["store"]["layers"] == [{"use": "odd"}]
    named = load_stack({"use": "memory", "id": "here"})
    assert to_config(named)["store"]["id"] == "here"
    plain: Any = load_stack({"use": "plain", "size": 4})
    assert plain.size == 4
    assert [option.name for option in spec_of("plain").options] == ["size"]
    both: Any = {"use": "fallback", "inner": {"use": "memory"}, "secondary": {"use": "memory"}}
    twice = load_stack(both)
    twice.secondary = twice.inner  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="stands in two places"):
        to_config(twice)


@pytest.mark.usefixtures("module")
def test_lists_and_tables_come_back_as_they_were_and_hide_secrets() -> None:
    """What looks like a variable stays text; passwords, also in URLs, are masked at any depth."""
    config = odd(names=["$${a}", "redis://u:s3cret-word@h"], table={"text": "$${b}"})
    stack = load_stack(config)
    (written,) = to_config(stack)["store"]["layers"]
    assert written["names"] == ["$${a}", "redis://u:***@h"]
    assert written["table"] == {"text": "$${b}"}
    again: Any = load_stack(to_config(stack), environ={})
    assert (again.names[0], again.table) == ("${a}", {"text": "${b}"})
    secrets = {"url": "x://u:s3cret-word@h", "password": "s3cret-word", "of": "s"}
    stack = load_stack(odd(table={**secrets, "more": {"token": "s3cret-word"}}))
    (written,) = to_config(stack)["store"]["layers"]
    hidden = {"url": "x://u:***@h", "password": "***", "of": "s", "more": {"token": "***"}}
    assert written["table"] == hidden
    assert "s3cret-word" not in f"{describe(stack)!r} {describe(stack)} {stack!r}"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("number", "is no StateStore"),
        ("missing", "cannot be imported from"),
        ("away", "cannot be imported from"),
        ("program", "cannot be imported from"),
        ("unset", "cannot be read (KeyError)"),
        ("needs", "needs a_package_that_nobody_has, which is not installed"),
        ("breaks", "cannot be built with these options (RuntimeError)"),
    ],
)
def test_a_block_that_is_broken_is_told(module: Any, kind: str, words: str) -> None:
    """By its place, without what its own error says: that may quote a secret."""
    options = {"password": "s3cret-word"} if kind == "breaks" else {}
    with pytest.raises(ConfigError) as caught:
        load_stack({"use": kind, **options})
    assert words in str(caught.value)
    assert "s3cret-word" not in str(caught.value)
    assert f"block.{kind}" not in json_schema()["$defs"] or kind in ("needs", "breaks")


def test_an_override_must_be_a_store() -> None:
    """The class of what was given is told, and which override it was."""
    make: Callable[[], object] = MemoryStore
    with pytest.raises(ConfigError, match="not the class .*; pass an instance") as caught:
        load_stack({"use": "memory", "id": "cache"}, overrides={"cache": make})  # type: ignore[dict-item]
    assert caught.value.path == "overrides.cache"
