"""The option ``layer`` of a ``Ramp``: what it puts around ``inner``, what may be shown of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from layered_store.errors import ConfigError
from layered_store.interface import StateStore
from layered_store.layers.translating import TranslatingLayer
from layered_store.masking import masked
from layered_store.stack import walk

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["layers_between", "put_around", "shown"]


def put_around(
    inner: StateStore, layer: Callable[[StateStore], StateStore] | Mapping[str, Any], block: str
) -> StateStore:
    """Return what a function, or a table as in a config file, puts around ``inner``.

    Raises:
        ConfigError: it puts nothing around ``inner``, or users who leave the share could not be
            read without it.
    """

    def refused(message: str) -> ConfigError:
        return ConfigError(message, option="layer", layer=block)

    if isinstance(layer, Mapping):
        built = _built(inner, layer)
    elif callable(layer):
        built = layer(inner)
    else:
        raise refused("must be a function, or a table such as {'use': 'cached'}")
    if not isinstance(built, StateStore) or built is inner:
        raise refused("must give a store around the one that it is given")
    places = list(walk(built))
    ends = [place.path for place in places if place.store is inner]
    if not ends:
        raise refused("must be put around the store that it is given, not another")
    for place in places:
        above = f"{place.path}." if place.path else ""
        on_the_way = place.store is not inner and any(path.startswith(above) for path in ends)
        if on_the_way and isinstance(place.store, TranslatingLayer):
            raise refused(
                f"must keep states as they are: whoever leaves the share reads what"
                f" {place.store.name} stored without it; give alternative= another store"
            )
    return built


def layers_between(built: StateStore, inner: StateStore) -> list[StateStore]:
    """Return the blocks of what was built that are not of ``inner``, outermost first."""
    below = {id(place.store) for place in walk(inner)}
    return [place.store for place in walk(built) if id(place.store) not in below]


def _built(inner: StateStore, table: Mapping[str, Any]) -> StateStore:
    """Return the layer of a config file's table around ``inner``."""
    from layered_store.config.loader import load_unchecked  # noqa: PLC0415

    end = "ramp.inner"
    stack = {"store": {"use": "memory", "id": end, "layers": [dict(table)]}}
    try:
        # The linter sees the whole stack elsewhere, and nothing of it here.
        return load_unchecked(stack, overrides={end: inner})[0]
    except ConfigError as exc:
        exc.option = "layer"
        for each in (exc, *exc.problems):
            each.path = "layer" + (each.path or "").removeprefix("store.layers.0")
        raise


def shown(layer: object) -> object:
    """Return what may be shown of the option: of a table, all but its secrets."""
    if isinstance(layer, list | tuple):
        return [shown(each) for each in layer]
    if not isinstance(layer, Mapping):
        return f"<{type(layer).__name__}>"
    from layered_store.config.registry import spec_of  # noqa: PLC0415

    known = {option.name: option for option in spec_of(str(layer.get("use"))).options}
    found = {}
    for name, value in layer.items():
        option = known.get(name)
        if name == "layers" or (option is not None and option.store):
            found[name] = shown(value)
        elif option is not None and option.mask is not None:
            found[name] = option.mask(value)
        else:
            hidden = option is not None and option.secret
            found[name] = "***" if hidden else masked(str(name), value)
    return found
