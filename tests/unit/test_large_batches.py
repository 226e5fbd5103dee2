"""A user of a large batch costs what one of a small batch does."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from layered_store import (
    Bulkhead,
    Cached,
    CircuitBreaker,
    Compressed,
    Encrypted,
    Fallback,
    Layer,
    MemoryStore,
    Prefixed,
    Ramp,
    Retry,
    Shadow,
    StateSnapshot,
    StateStore,
    Timeout,
    WriteThrough,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable


class Looping(Layer):
    """A layer from elsewhere that stores a batch one by one."""

    async def upsert_latest_many(self, snapshots: Iterable[StateSnapshot]) -> None:
        for snapshot in snapshots:
            await self.inner.upsert_latest(snapshot)


FEW, MANY = 1_000, 20_000
MOST = 5
"""Times as much a user; work that grows with the square of the batch is near 20 times."""

STACKS: dict[str, Callable[[], StateStore]] = {
    "memory": MemoryStore,
    "bulkhead": lambda: Bulkhead(MemoryStore(), max_in_flight=1),
    "cached": lambda: Cached(MemoryStore()),
    "circuit_breaker": lambda: CircuitBreaker(MemoryStore()),
    "compressed": lambda: Compressed(MemoryStore()),
    "encrypted": lambda: Encrypted(MemoryStore(), keys=[bytes(32)]),
    "fallback": lambda: Fallback(MemoryStore(), secondary=MemoryStore()),
    "looping": lambda: Cached(Looping(MemoryStore())),
    "prefixed": lambda: Prefixed(MemoryStore(), prefix="app"),
    "ramp": lambda: Ramp(MemoryStore(), alternative=MemoryStore(), share=0.5),
    "ramp_layer": lambda: Ramp(MemoryStore(), layer=Retry, share=0.5),
    "retry": lambda: Retry(MemoryStore()),
    "shadow": lambda: Shadow(MemoryStore(), candidate=MemoryStore(), share=0.5),
    "timeout": lambda: Timeout(MemoryStore(), seconds=60.0),
    "write_through": lambda: WriteThrough(MemoryStore(), origin=MemoryStore()),
}


async def cost(call: Callable[[], Awaitable[object]]) -> float:
    """Return the CPU seconds of a call."""
    begun = time.process_time()
    await call()
    return time.process_time() - begun


@pytest.mark.parametrize("name", STACKS)
async def test_a_large_batch_costs_no_more_a_user(name: str) -> None:
    """Written for the first time, written again, read, and read where nobody is."""
    few, many = STACKS[name](), STACKS[name]()
    states = [StateSnapshot(f"u-{n}", axes={"a": 0.5}) for n in range(MANY)]
    users = [state.user_id for state in states]
    absent = [f"absent-{n}" for n in range(MANY)]

    def calls(store: StateStore, size: int) -> list[Callable[[], Awaitable[object]]]:
        return [
            lambda: store.upsert_latest_many(states[:size]),
            lambda: store.upsert_latest_many(states[:size]),
            lambda: store.get_latest_many(users[:size]),
            lambda: store.get_latest_many(absent[:size]),
        ]

    for of_few, of_many in zip(calls(few, FEW), calls(many, MANY), strict=True):
        one = min([await cost(of_few) for _ in range(3)]) / FEW
        assert await cost(of_many) / MANY < MOST * one + 5e-6
    await few.aclose()
    await many.aclose()
