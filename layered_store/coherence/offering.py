"""The abilities of a layer that changes writes but no user ids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from layered_store.coherence.contract import Authority, Invalidations
from layered_store.enumerable import Enumerable, enumerable_of
from layered_store.interface import ability_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from layered_store.layer import Layer

__all__ = ["offered"]


def offered(layer: Layer, kind: type, authority: Callable[[Layer, Any], Any]) -> Any:
    """Return the ability ``kind`` of a layer; None when it has none.

    Users are listed and messages of the invalidation channel come as below. The authority below is
    seen through ``authority``, which lets no write past the layer. A cache tier below is hidden: it
    could be filled and emptied past the layer.
    """
    if isinstance(layer, kind):
        return layer
    if kind is Enumerable:
        return enumerable_of(layer.inner)
    target: Any = ability_of(layer.inner, kind)
    if target is None or kind is Invalidations:
        return target
    return authority(layer, target) if kind is Authority else None
