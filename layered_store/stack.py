"""Looking at a built stack: walk it, print it, find blocks in it, build it again with one
swapped.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
from collections.abc import MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from random import Random
from typing import TYPE_CHECKING, Any, Final, TypeVar

from layered_store.errors import ConfigError
from layered_store.interface import StateStore, name_of_store
from layered_store.masking import masked
from layered_store.options import check_store, nearest

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "Block",
    "describe",
    "expression",
    "find",
    "id_of",
    "kind_of",
    "options",
    "replace",
    "tier_name",
    "walk",
]

T = TypeVar("T", bound=StateStore)


@dataclass(frozen=True, slots=True)
class Place:
    """One block in a stack, as :func:`walk` meets it.

    Args:
        index: position in the flat list, outermost 0.
        depth: how many blocks are above it.
        path: roles from the outermost block down, such as ``"inner.origin"``; empty for that one.
        store: the block.
    """

    index: int
    depth: int
    path: str
    store: StateStore

    @property
    def label(self) -> str:
        """The block's value of the ``layer`` label in metrics, such as ``"1.cached"``."""
        return f"{self.index}.{kind_of(self.store)}"


def children_of(store: StateStore) -> dict[str, StateStore]:
    """Return the stores a block is built on, also for third-party layers that only hold them."""
    # A mock answers with a mock.
    named = dict(store.children()) if issubclass(type(store), StateStore) else {}
    if not named:
        held = vars(store) if hasattr(store, "__dict__") else {}
        named = {key: value for key, value in held.items() if isinstance(value, StateStore)}
    return named


def walk(stack: StateStore) -> Iterator[Place]:
    """Yield every block of a stack, outermost first, each branch down to its end."""
    check_store(stack, "stack", None)
    counter = 0
    pending: list[tuple[tuple[StateStore, ...], str, StateStore]] = [((), "", stack)]
    while pending:
        above, path, store = pending.pop()
        yield Place(counter, len(above), path, store)
        counter += 1
        below = [
            ((*above, store), f"{path}.{role}" if path else role, child)
            for role, child in children_of(store).items()
            # A third party's block may point back to what it stands in.
            if not any(child is each for each in (*above, store))
        ]
        pending.extend(reversed(below))


def tier_name(store: StateStore) -> str:
    """Return what a tier is called: by its backend, whatever layers stand around that.

    One that is made of several stores, such as a ``WriteThrough``, is called by its own name.
    """
    for place in walk(store):
        if len(children_of(place.store)) != 1:
            return name_of_store(place.store)
    return name_of_store(store)


def id_of(store: StateStore) -> str | None:
    """Return the ``id`` by which log events call a store: its own, else that of what it wraps."""
    for place in walk(store):
        if (block_id := getattr(place.store, "block_id", None)) is not None:
            return str(block_id)
        if len(children_of(place.store)) != 1:
            return None
    return None


def find(stack: StateStore, cls: type[T]) -> list[T]:
    """Return the blocks of a class, outermost first.

    Raises:
        ConfigError: ``cls`` is no class.
    """
    if not isinstance(cls, type):
        raise ConfigError("must be a class, such as RedisStore", option="cls")
    return [place.store for place in walk(stack) if isinstance(place.store, cls)]


def kind_of(store: StateStore) -> str:
    """Return the kind of a block: its class name in snake case, without ``Store``."""
    given = getattr(type(store), "kind", None)
    if isinstance(given, str):
        return given
    name = type(store).__name__.removesuffix("Store") or type(store).__name__
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def options(store: StateStore) -> dict[str, Any]:
    """Return the options of a block that differ from their defaults, secrets masked.

    Stores it wraps are not among them. A block that is no dataclass shows none.
    """
    shown: dict[str, Any] = {}
    if not dataclasses.is_dataclass(store):
        return shown
    for field in dataclasses.fields(store):
        if not field.init or not field.repr:
            continue
        value = getattr(store, field.name, None)
        if isinstance(value, StateStore):
            continue
        default = (
            field.default_factory()
            if field.default_factory is not dataclasses.MISSING
            else field.default
        )
        # As a config file has them.
        value, default = (
            each.total_seconds() if isinstance(each, timedelta) else each
            for each in (value, default)
        )
        if default is not dataclasses.MISSING and type(value) is type(default) and value == default:
            continue
        mask = field.metadata.get("mask")
        if value is not None:
            value = masked(field.name, value) if mask is None else mask(value)
        shown[field.name] = value
    return shown


def expression(store: StateStore, above: tuple[StateStore, ...] = ()) -> str:
    """Return a block and all below it as the nested expression that builds it, secrets masked."""
    parts = []
    shown = options(store)
    way = (*above, store)
    for role, child in children_of(store).items():
        if not any(child is each for each in way):
            text = expression(child, way)
            parts.append(text if role == "inner" else f"{role}={text}")
    positional: set[str] = set()
    if dataclasses.is_dataclass(store):
        positional = {field.name for field in dataclasses.fields(store) if not field.kw_only}
    for name, value in shown.items():
        parts.append(_show(value) if name in positional else f"{name}={_show(value)}")
    return f"{type(store).__name__}({', '.join(parts)})"


def _show(value: object) -> str:
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, str | int | float | bool | None):
        return repr(value)
    return f"<{type(value).__name__}>"


@dataclass(frozen=True, slots=True)
class Block:
    """One line of :func:`describe`.

    Args:
        index: position, outermost 0.
        path: roles from the outermost block down, such as ``"inner.origin"``.
        kind: the block's kind in config files, such as ``"cached"``.
        name: its class name.
        depth: how many blocks are above it.
        options: options that differ from the defaults, secrets masked.
        id: the name given in the config file, if any.
        notes: what a caller should know, such as the worst-case staleness.
    """

    index: int
    path: str
    kind: str
    name: str
    depth: int
    options: dict[str, Any]
    id: str | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = ", ".join(f"{key}={_show(value)}" for key, value in self.options.items())
        role = self.path.rpartition(".")[2]
        prefix = "  " * self.depth + (f"{role}: " if role not in ("", "inner") else "")
        return f"{prefix}{self.name}({shown})" + "".join(f"  # {note}" for note in self.notes)


class Description(list[Block]):
    """The flat list of blocks of a stack, outermost first; prints one line each."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))


def describe(stack: StateStore) -> Description:
    """Return the flat list of a stack's blocks, outermost first, secrets masked."""
    return Description(
        Block(
            index=place.index,
            path=place.path,
            kind=kind_of(place.store),
            name=type(place.store).__name__,
            depth=place.depth,
            options=options(place.store),
            id=getattr(place.store, "block_id", None),
            notes=tuple(getattr(place.store, "notes", lambda: ())()),
        )
        for place in walk(stack)
    )


def staleness(stack: StateStore) -> tuple[float, str]:
    """Return how old an answer may be in seconds, and why when there is no bound.

    That is towards other processes, and while what is below answers; what this process wrote shows
    at once. What the blocks on the way down add sums up; a block says so in ``staleness``.
    """
    total, reasons = 0.0, []
    store: StateStore | None = stack
    while store is not None:
        seconds, why = getattr(store, "staleness", (0.0, ""))
        total += seconds
        if why:
            reasons.append(why)
        # The copies of a write-through are as old as it says, whatever holds them.
        store = None if kind_of(store) == "write_through" else children_of(store).get("inner")
    return total, "; ".join(reasons)


def replace(stack: StateStore, target: object, new: StateStore) -> StateStore:
    """Return a new stack with ``target`` swapped for ``new`` and the rest rebuilt.

    The rebuilt blocks have the same options and share no state with the old ones. Only an end of a
    third party's that keeps what it was built with under other names is copied as it is.

    Args:
        stack: the stack to start from; it stays as it is.
        target: a class, an ``id`` of the config file, or a block of the stack. A class or id that
            matches several blocks is refused.
        new: what stands there instead. It takes over the ``id``, unless it has one.

    Raises:
        ConfigError: ``new`` is no store, nothing matches or several blocks do, or a block does not
            tell with what it was built.
    """
    check_store(new, "new", replace)
    # By identity: one object that stands in two places is one match, swapped in both.
    unique = {id(place.store): place.store for place in walk(stack)}
    matches = [store for store in unique.values() if _matches(store, target)]
    if not matches and isinstance(target, str):
        ids = {name for store in unique.values() if (name := getattr(store, "block_id", None))}
        raise ConfigError(
            f"no block has this id; ids of this stack: {', '.join(sorted(ids)) or 'none'}",
            option="target",
            suggestion=nearest(target, ids),
        )
    if not matches:
        blocks = ", ".join(dict.fromkeys(type(store).__name__ for store in unique.values()))
        raise ConfigError(
            f"{_shown(target)} is no block of this stack, which has {blocks}", option="target"
        )
    if len(matches) > 1:
        raise ConfigError(
            f"matches {len(matches)} blocks of this stack; pass the block itself, from"
            " find(stack, cls)",
            option="target",
        )
    take_id(new, getattr(matches[0], "block_id", None))
    return _rebuild(stack, {id(matches[0]): new})


def take_id(store: StateStore, block_id: str | None) -> None:
    """Let a store that takes the place of a block be found by its id, unless it has one."""
    if block_id is not None and getattr(store, "block_id", None) is None:
        with suppress(AttributeError):  # of a class with slots
            store.block_id = block_id  # type: ignore[attr-defined]


def _shown(target: object) -> str:
    if isinstance(target, type):
        return target.__name__
    return f"this {type(target).__name__}" if target is not None else "None"


def _matches(store: StateStore, target: object) -> bool:
    if isinstance(target, type):
        return isinstance(store, target)
    if isinstance(target, str):
        return getattr(store, "block_id", None) == target
    return store is target


def _rebuild(store: StateStore, done: dict[int, StateStore]) -> StateStore:
    """Build a block again, with all below it; ``done`` has the new block of each old one's id."""
    if id(store) in done:
        return done[id(store)]
    try:
        options = arguments(store)
    except ConfigError:
        if dataclasses.is_dataclass(store) or children_of(store):
            raise
        twin = _copied(store)
    else:
        given = {
            name: _rebuild(value, done) if isinstance(value, StateStore) else unshared(value)
            for name, value in options.items()
        }
        twin = type(store)(**given)
        take_id(twin, getattr(store, "block_id", None))
    done[id(store)] = twin
    return twin


def _copied(end: StateStore) -> StateStore:
    """Return a store that does not tell what it was built with, with containers of its own."""
    twin = copy.copy(end)
    for name, value in getattr(end, "__dict__", {}).items():
        if isinstance(value, dict | list | set):
            twin.__dict__[name] = copy.copy(value)
    return twin


_BY_NAME: Final = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def arguments(store: Any) -> dict[str, Any]:
    """Return what a block was built with: its fields, or what an ``__init__`` of its own takes.

    Raises:
        ConfigError: it keeps an argument under another name.
    """
    known = dataclasses.is_dataclass(store)
    declared = dataclasses.fields(store) if known else ()
    fields = {field.name: getattr(store, field.name) for field in declared if field.init}
    builder = next(cls for cls in type(store).__mro__ if "__init__" in vars(cls))
    if "__dataclass_params__" in vars(builder) and builder.__dataclass_params__.init:  # type: ignore[attr-defined]
        return fields
    wanted = inspect.signature(type(store)).parameters.values()
    if known and any(parameter.kind is parameter.VAR_KEYWORD for parameter in wanted):
        return fields
    found = {}
    for parameter in wanted:
        if known and parameter.kind is parameter.VAR_POSITIONAL:
            continue
        names = (parameter.name, f"_{parameter.name}")
        # What every store has, such as its name, is not what this one was built with.
        own = (n for n in names if n in vars(store) or not hasattr(StateStore, n))
        name = next((n for n in own if hasattr(store, n)), None)
        if name is None or parameter.kind not in _BY_NAME:
            how = " and keeps it under another name" if parameter.kind in _BY_NAME else ""
            raise ConfigError(
                f"cannot rebuild {type(store).__name__}, whose __init__ takes"
                f" {parameter.name!r}{how}; make it a dataclass",
                option="stack",
            )
        found[parameter.name] = getattr(store, name)
    return found


def unshared(value: Any) -> Any:
    """Return an option's value as the rebuilt block may have it: without the old one's state."""
    if isinstance(value, Random):
        return copy.copy(value)
    if isinstance(value, MutableMapping):
        # A cache object of the user's, of whatever class: its like, and empty.
        twin = copy.deepcopy(value)
        twin.clear()
        return twin
    return value
