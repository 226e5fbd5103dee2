"""Seeing a capability of the store below through a layer."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from layered_store.interface import Op

__all__ = ["View", "as_it_is", "through", "view_of", "viewed"]


class View:
    """A capability of the store below, as a layer offers it.

    A subclass writes the methods that the layer changes; :func:`view_of` adds the rest, handed on
    to ``target`` as they are.

    Args:
        layer: the layer.
        target: the capability of the store below.
    """

    __slots__ = ("layer", "target")

    def __init__(self, layer: Any, target: Any) -> None:
        self.layer = layer
        self.target = target


def view_of(kind: type, view: type[View]) -> Any:
    """Return a class of the capability ``kind`` made of ``view`` and of forwarding for the rest."""

    def forward(name: str) -> Any:
        if isinstance(inspect.getattr_static(kind, name), property):
            return as_it_is(name)
        return lambda self, *args, **kwargs: getattr(self.target, name)(*args, **kwargs)

    return viewed(kind, forward, view)


def viewed(kind: type, member: Callable[[str], Any], view: type[View] = View) -> Any:
    """Return a class of ``kind``: ``view``, and ``member(name)`` for each name that it lacks."""
    names: frozenset[str] = kind.__abstractmethods__  # type: ignore[attr-defined]
    body = {name: member(name) for name in names if not hasattr(view, name)}
    return type(f"{view.__name__.lstrip('_')}{kind.__name__}", (view, kind), body)


def through(name: str, op: Op) -> Any:
    """Return a method that calls the one of ``target`` as the operation ``op`` of the layer."""

    async def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return await self.layer.around(op, getattr(self.target, name), *args, **kwargs)

    call.__name__ = name
    return call


def as_it_is(name: str) -> Any:
    """Return a property that is the attribute or method of ``target``."""
    return property(lambda self: getattr(self.target, name))
