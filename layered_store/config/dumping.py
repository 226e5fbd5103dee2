"""From a stack back to a config that it can be loaded from."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from layered_store.config.environment import literal
from layered_store.config.registry import MISSING, spec_of_class
from layered_store.errors import ConfigError
from layered_store.interface import StateStore
from layered_store.masking import masked
from layered_store.stack import children_of, walk

if TYPE_CHECKING:
    from layered_store.config.registry import Option

__all__ = ["MASK", "to_config"]

MASK: Final = "***"
"""What stands in place of a secret in :func:`to_config` and ``describe``."""

_OF_THE_PROCESS: Final = frozenset({"clock", "exemplar", "random", "registry"})
"""Objects that are no part of a stack: one that is loaded takes those of its process."""


def to_config(stack: StateStore) -> dict[str, Any]:
    """Return the dict that :func:`load_stack` builds this stack from, secrets masked.

    A masked secret, or an object that no file can hold (shown as ``"<ClassName>"``), has to be put
    back by hand; loading says so. Everything else comes back as it was.

    Raises:
        ConfigError: a block has no kind, since it is no entry point of ``layered_store.blocks``.
    """
    seen: set[int] = set()
    for place in walk(stack):
        if id(place.store) in seen:
            raise ConfigError(
                f"the same {type(place.store).__name__} stands in two places; a file cannot say so",
                option="stack",
            )
        seen.add(id(place.store))
    return {"store": _table(stack)}


def _table(store: StateStore) -> dict[str, Any]:
    layers = []
    while list(children_of(store)) == ["inner"]:
        layers.append(_one(store))
        store = children_of(store)["inner"]
    table = _one(store)
    for role, child in children_of(store).items():
        table[role] = _table(child)
    if layers:
        table["layers"] = layers
    return table


def _one(store: StateStore) -> dict[str, Any]:
    spec = spec_of_class(type(store))
    table: dict[str, Any] = {"use": spec.kind}
    if (block_id := getattr(store, "block_id", None)) is not None:
        table["id"] = literal(block_id)
    for option in spec.options:
        value = getattr(store, option.name, option.default)
        if option.store or value is MISSING or isinstance(value, StateStore):
            continue
        if type(value) is type(option.default) and (
            value == option.default or not option.from_file
        ):
            continue
        if value is None:
            if option.default is not None:
                table[option.name] = None
            continue
        if not option.from_file:
            if option.name not in _OF_THE_PROCESS:
                table[option.name] = f"<{type(value).__name__}>"
            continue
        table[option.name] = _plain(option, value)
    return table


def _plain(option: Option, value: Any) -> Any:
    if option.mask is not None:
        return option.mask(value)
    if option.secret:
        return MASK
    value = masked(option.name, value)
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, type):
        return f"{value.__module__}:{value.__qualname__}"
    if isinstance(value, str | list | tuple | set | frozenset | bool | int | float | dict):
        return literal(value)
    return f"<{type(value).__name__}>"
