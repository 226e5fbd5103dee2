"""Every block names itself and the operation when it refuses an argument."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from stacks import DEEP, LAYERS

from layered_store import MemoryStore, SQLStore, StateSnapshot, ValidationError, explain
from layered_store.interface import StateStore
from layered_store.stack import walk

BAD: Any = "not an id"
GOOD = "u-1"
BUILDS: dict[str, Callable[..., StateStore]] = {
    "memory": lambda _: MemoryStore(),
    "sqlite": lambda _: SQLStore("sqlite+aiosqlite:///:memory:"),
    "plain": lambda _: Plain(),
    **LAYERS,
    **DEEP,
}
CALLS: list[tuple[str, Callable[[StateStore], Awaitable[object]]]] = [
    ("get_latest", lambda store: store.get_latest(BAD)),
    ("get_latest", lambda store: store.get_latest(["unhashable"])),  # type: ignore[arg-type]
    ("upsert_latest", lambda store: store.upsert_latest(StateSnapshot(BAD))),
    ("upsert_latest", lambda store: store.upsert_latest(BAD)),
    ("delete", lambda store: store.delete(BAD)),
    ("get_history", lambda store: store.get_history(BAD, 1)),
    ("get_history", lambda store: store.get_history(GOOD, -1)),
    ("get_latest_many", lambda store: store.get_latest_many([GOOD, BAD])),
    ("get_latest_many", lambda store: store.get_latest_many(BAD)),
    ("upsert_latest_many", lambda store: store.upsert_latest_many([StateSnapshot(BAD)])),
    ("upsert_latest_many", lambda store: store.upsert_latest_many(BAD)),
    ("explain", lambda store: explain(store, BAD)),
]


class Plain(MemoryStore):
    """With what the interface provides."""

    delete = StateStore.delete
    get_history = StateStore.get_history
    get_latest_many = StateStore.get_latest_many
    upsert_latest_many = StateStore.upsert_latest_many


@pytest.mark.parametrize("name", BUILDS)
async def test_who_refused_is_named(name: str) -> None:
    """A refusal tells which block refused what, and that a repeat would not help."""
    stack = BUILDS[name](MemoryStore())
    blocks = {type(place.store).__name__ for place in walk(stack)}
    async with stack:
        for number, (operation, call) in enumerate(CALLS):
            with pytest.raises(ValidationError) as caught:
                await call(stack)
            error = caught.value
            assert error.layer in blocks, (number, error.layer)
            assert error.operation == operation, number
            assert not error.retryable
            assert str(error).startswith(f"{error.layer}.{operation}: ")
