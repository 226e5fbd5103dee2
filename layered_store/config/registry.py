"""Which blocks there are, and which options each takes in a config file.

A block's options are its constructor's: names, types and defaults are read from the signature, what
they mean from the docstring. Nothing is written down a second time.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Final, Literal

from layered_store.errors import ConfigError
from layered_store.interface import StateStore
from layered_store.options import nearest

__all__ = ["ENTRY_POINT_GROUP", "BlockSpec", "Option", "kinds", "path_of", "shown", "spec_of"]

ENTRY_POINT_GROUP: Final = "layered_store.blocks"
"""Entry points of this group name further blocks: ``kind = "module:Class"``."""

BUILT_IN: Final[Mapping[str, str]] = {
    "memory": "layered_store.stores.memory:MemoryStore",
    "redis": "layered_store.stores.redis:RedisStore",
    "sql": "layered_store.stores.sql:SQLStore",
    "cached": "layered_store.layers.cached:Cached",
    "write_through": "layered_store.layers.write_through:WriteThrough",
    "metrics": "layered_store.layers.metrics:Metrics",
    "retry": "layered_store.layers.retry:Retry",
    "timeout": "layered_store.layers.timeout:Timeout",
    "circuit_breaker": "layered_store.layers.circuit_breaker:CircuitBreaker",
    "fallback": "layered_store.layers.fallback:Fallback",
    "bulkhead": "layered_store.layers.bulkhead:Bulkhead",
    "tracing": "layered_store.layers.tracing:Tracing",
    "encrypted": "layered_store.layers.encrypted:Encrypted",
    "compressed": "layered_store.layers.compressed:Compressed",
    "prefixed": "layered_store.layers.prefixed:Prefixed",
    "read_only": "layered_store.layers.read_only:ReadOnly",
    "shadow": "layered_store.layers.shadow:Shadow",
    "ramp": "layered_store.layers.ramp:Ramp",
}
"""The library's own blocks by kind; a module is imported when a config uses its block."""

MISSING: Final = dataclasses.MISSING


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a block, as a config file may give it.

    Args:
        name: its name in the constructor and in the file.
        accepts: the plain types it takes, out of str, int, float, bool, list, dict and type;
            empty when only an object will do.
        default: its default, or ``MISSING`` when it must be given.
        store: it takes a store: a table in the file.
        duration: it takes seconds, and text such as ``"30s"``.
        nullable: it takes None, which a TOML file says as ``"none"`` or by leaving it out.
        choices: the values it is limited to; empty when any will do.
        limited: the types of which it takes the choices only; of the others it takes any value.
        doc: what the block's docstring says about it.
        secret: its value is never shown.
        mask: hides the secret parts of a value that is shown; None shows it as it is.
        table: the definition in the JSON Schema that a table has to fit; empty when any will do.
        item: the type of the items of a list.
        collection: what the constructor gets a list as.
        delta: the constructor gets a duration as a timedelta, and takes no number.
    """

    name: str
    accepts: frozenset[type]
    default: Any
    store: bool = False
    duration: bool = False
    nullable: bool = False
    choices: tuple[Any, ...] = ()
    limited: frozenset[type] = frozenset()
    doc: str = ""
    secret: bool = False
    mask: Any = None
    table: str = ""
    item: type | None = None
    collection: type = tuple
    delta: bool = False

    @property
    def required(self) -> bool:
        """Whether a block cannot be built without it."""
        return self.default is MISSING

    @property
    def free(self) -> frozenset[type]:
        """The types of which it takes any value."""
        return self.accepts - self.limited

    @property
    def from_file(self) -> bool:
        """Whether a config file can say it at all."""
        return self.store or bool(self.accepts)


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """A block and its options.

    Args:
        kind: what ``use`` names it by.
        cls: its class.
        options: in the order of the constructor.
        doc: the first paragraph of its docstring.
    """

    kind: str
    cls: type[StateStore]
    options: tuple[Option, ...]
    doc: str

    def option(self, name: str) -> Option | None:
        """Return the option of this name, or None."""
        return next((option for option in self.options if option.name == name), None)

    @property
    def is_layer(self) -> bool:
        """Whether it wraps a store called ``inner``."""
        inner = self.option("inner")
        return inner is not None and inner.store


def kinds() -> dict[str, str]:
    """Return every known kind with the place of its class, third parties' included."""
    found = {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}
    return {**found, **BUILT_IN}


def shown(key: object) -> str:
    """Return a key of a file as messages may have it: a name as it is, anything else not.

    A URL that was put where a name belongs may hold a secret.
    """
    text = str(key)
    return text if re.fullmatch(r"[\w$-]{1,60}", text) else "<a key that is no name>"


def path_of(path: str, key: object) -> str:
    """Return the path of a key of the table at ``path``."""
    return f"{path}.{shown(key)}" if path else shown(key)


def spec_of(kind: str) -> BlockSpec:
    """Return the block that ``kind`` names, importing its module now.

    Raises:
        ConfigError: there is no such block, or a third party's cannot be imported or is no store.
    """
    if kind in BUILT_IN:
        return _spec(kind, BUILT_IN[kind])  # without looking at what is installed
    known = kinds()
    place = known.get(kind)
    if place is None:
        raise ConfigError(
            f"there is no block of this name; known are {', '.join(sorted(known))}",
            option="use",
            suggestion=nearest(kind, known),
        )
    return _spec(kind, place)


def spec_of_class(cls: type[StateStore]) -> BlockSpec:
    """Return the block of this class.

    Raises:
        ConfigError: no kind names it, so no file can.
    """
    kind = _kind_in(BUILT_IN, cls) or _kind_in(kinds(), cls)
    if kind is not None:
        return spec_of(kind)
    raise ConfigError(
        f"{cls.__name__} has no kind; register it as an entry point of the group"
        f" {ENTRY_POINT_GROUP!r} to use it in config files",
        option="stack",
    )


def _kind_in(places: Mapping[str, str], cls: type) -> str | None:
    """Return the kind that leads to a class, importing nothing."""
    for kind, place in places.items():
        module, _, name = place.partition(":")
        found: Any = sys.modules.get(module)
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is cls:
            return kind
    return None


@cache
def _spec(kind: str, place: str) -> BlockSpec:
    module_name, _, attribute = place.partition(":")
    try:
        cls: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            cls = getattr(cls, part)
    except (Exception, SystemExit) as exc:
        raise ConfigError(
            f"the block {kind} cannot be imported from {place} ({type(exc).__name__})",
            option="use",
        ) from exc
    if not (isinstance(cls, type) and issubclass(cls, StateStore)):
        raise ConfigError(f"the block {kind} at {place} is no StateStore", option="use")
    doc = inspect.cleandoc(cls.__doc__ or "")
    try:
        options = _options(cls, doc)
    except Exception as exc:  # a default or a signature of a third party's may fail
        raise ConfigError(
            f"the options of the block {kind} at {place} cannot be read ({type(exc).__name__})",
            option="use",
        ) from exc
    return BlockSpec(kind, cls, options, doc.split("\n\n", 1)[0].replace("\n", " "))


def _options(cls: type[StateStore], doc: str) -> tuple[Option, ...]:
    fields: dict[str, Any] = {}
    if dataclasses.is_dataclass(cls):
        fields = {field.name: field for field in dataclasses.fields(cls)}
    docs = _argument_docs(doc)
    found = []
    for parameter in list(inspect.signature(cls).parameters.values()):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        field = fields.get(parameter.name)
        mask = None if field is None else field.metadata.get("mask")
        default = MISSING if parameter.default is parameter.empty else parameter.default
        if field is not None and field.default_factory is not MISSING:
            default = field.default_factory()
        if parameter.annotation is parameter.empty:
            hint = _of_default(parameter.name, default)
        else:
            hint = _resolve(parameter.annotation, cls)
        found.append(
            Option(
                name=parameter.name,
                default=default,
                doc=docs.get(parameter.name, ""),
                secret=field is not None and not field.repr,
                mask=mask,
                table="" if field is None else field.metadata.get("table", ""),
                **_typing(hint, masked=mask is not None),
            )
        )
    return tuple(found)


def _of_default(name: str, default: Any) -> Any:
    """Return the type of an option without annotation: its default's, or any plain one."""
    if name == "inner":
        return StateStore
    if default is MISSING or default is None:
        plain = str | int | float | bool | dict[str, Any]
        return plain if default is MISSING else plain | None
    return type(default)


def _resolve(annotation: Any, cls: type) -> Any:
    """Return the type that an annotation stands for; ``object`` when it cannot be told here."""
    if not isinstance(annotation, str):
        return annotation
    for owner in cls.__mro__:
        names = vars(sys.modules.get(owner.__module__, types.ModuleType("gone")))
        try:
            return eval(annotation, {"StateStore": StateStore, **names})  # noqa: S307
        except Exception:  # noqa: BLE001, S112  a name imported for type checkers only
            continue
    return object


def _typing(hint: Any, *, masked: bool) -> dict[str, Any]:
    """Return what the annotation of an option says about the values that a file may hold."""
    accepts: set[type] = set()
    choices: list[Any] = []
    facts: dict[str, Any] = {}
    for part in _parts(hint):
        origin = typing.get_origin(part) or part
        if part is type(None) or part is None:
            facts["nullable"] = True
        elif part is Any and masked:
            accepts.add(str)  # a URL as text, or as the driver's object
        elif origin is Literal:
            choices += [each for each in typing.get_args(part) if each is not None]
            if None in typing.get_args(part):
                facts["nullable"] = True
        elif origin is timedelta:
            facts["duration"] = True
        elif origin in (list, tuple, set, frozenset, Sequence):
            accepts.add(list)
            facts["collection"] = tuple if origin is Sequence else origin
            # Of several kinds of items, such as str | bytes, the one that a file can hold.
            items = [each for a in typing.get_args(part) if a is not Ellipsis for each in _parts(a)]
            facts["item"] = next((a for a in items if a in (str, int, float, bool)), None)
            if facts["item"] is None:
                accepts.discard(list)
        elif origin is type:
            accepts.add(type)
        elif origin in (dict, Mapping):
            if all(arg in (str, int, float, bool, Any) for arg in typing.get_args(part)):
                accepts.add(dict)
        elif isinstance(origin, type) and issubclass(origin, StateStore):
            facts["store"] = True
        elif isinstance(origin, type) and issubclass(origin, enum.StrEnum):
            choices += [str(choice) for choice in origin]
        elif origin in (str, int, float, bool):
            accepts.add(origin)
    if facts.get("duration") and not accepts:
        accepts.add(float)
        facts["delta"] = True
    limited = {type(choice) for choice in choices} - accepts
    facts |= {"choices": tuple(choices), "limited": frozenset(limited)}
    return {"accepts": frozenset(accepts | limited), **facts}


def _parts(hint: Any) -> list[Any]:
    if isinstance(hint, dataclasses.InitVar):
        hint = hint.type
    if typing.get_origin(hint) is typing.Annotated:
        return _parts(typing.get_args(hint)[0])
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return [part for each in typing.get_args(hint) for part in _parts(each)]
    return [hint]


def _argument_docs(doc: str) -> dict[str, str]:
    """Return what the ``Args`` section of a docstring says about each argument."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", doc, re.MULTILINE)
    if section is None:
        return {}
    body = inspect.cleandoc(section[1])
    entries = re.findall(r"^(\w+):[ ]*((?:.*)(?:\n[ \t]+.*)*)", body, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text).strip() for name, text in entries}

