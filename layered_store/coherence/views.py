"""Seeing a capability of the store below through a layer that changes a part of it."""

from __future__ import annotations

import inspect
from typing import Any

__all__ = ["View", "view_of"]


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
            return property(lambda self: getattr(self.target, name))
        return lambda self, *args, **kwargs: getattr(self.target, name)(*args, **kwargs)

    missing: frozenset[str] = kind.__abstractmethods__  # type: ignore[attr-defined]
    body = {name: forward(name) for name in missing if not hasattr(view, name)}
    return type(view.__name__.lstrip("_"), (view, kind), body)
