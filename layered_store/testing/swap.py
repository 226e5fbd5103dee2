"""The stack of production, rebuilt on a test's clock."""

from __future__ import annotations

import dataclasses
from typing import Any

from layered_store.clock import Clock
from layered_store.errors import ConfigError
from layered_store.interface import StateStore
from layered_store.options import check_a, check_store
from layered_store.stack import arguments, take_id, unshared, walk

__all__ = ["on_clock"]


def on_clock(stack: StateStore, clock: Clock) -> StateStore:
    """Return the same stack with every block on ``clock``; it opens nothing.

    What is on that clock already stays as it is, so a test keeps the stores that it swapped in;
    the rest is built again with the same options. Example::

        clock = FakeClock()
        redis = Faults(MemoryStore(clock=clock), clock=clock, plays="redis")
        stack = on_clock(load_stack("stack.toml", overrides={"cache": redis}), clock)

    Args:
        stack: the stack, which stays as it is.
        clock: where its blocks take time from.

    Raises:
        ConfigError: ``clock`` is no clock, or a layer that must be built again is no dataclass.
    """
    check_store(stack, "stack", on_clock)
    check_a(clock, Clock, "clock", on_clock)
    return _build(stack, clock, {})


def _build(store: StateStore, clock: Clock, done: dict[int, StateStore]) -> StateStore:
    if id(store) not in done:
        done[id(store)] = store if _is_on(store, clock) else _again(store, clock, done)
    return done[id(store)]


def _is_on(store: StateStore, clock: Clock) -> bool:
    """Whether no block from here down takes time from elsewhere."""
    clocks = (getattr(place.store, "clock", clock) for place in walk(store))
    return all(each is clock for each in clocks)


def _again(store: StateStore, clock: Clock, done: dict[int, StateStore]) -> StateStore:
    if not dataclasses.is_dataclass(store):
        raise ConfigError(
            f"cannot build {type(store).__name__} again, which is no dataclass; make it one, or"
            " build it on this clock",
            option="stack",
        )
    given: dict[str, Any] = {}
    for name, value in arguments(store).items():
        if isinstance(value, StateStore):
            given[name] = _build(value, clock, done)
        else:
            given[name] = clock if name == "clock" else unshared(value)
    twin = type(store)(**given)
    take_id(twin, getattr(store, "block_id", None))
    return twin
