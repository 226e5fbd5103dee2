"""A user of a large batch costs what one of a small batch does."""

from __future__ import annotations

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
from tests.unit.growth import MOST, Spent, growth

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable


class Looping(Layer):
    """A layer from elsewhere that stores a batch one by one."""

    async def upsert_latest_many(self, snapshots: Iterable[StateSnapshot]) -> None:
        for snapshot in snapshots:
            await self.inner.upsert_latest(snapshot)


FEW, MANY = 500, 10_000

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


@pytest.mark.parametrize("name", STACKS)
async def test_a_large_batch_costs_no_more_a_user(name: str) -> None:
    """Written for the first time, written again, read, and read where nobody is."""
    states = [StateSnapshot(f"u-{n}", axes={"a": 0.5}) for n in range(MANY)]
    users = [state.user_id for state in states]
    absent = [f"absent-{n}" for n in range(MANY)]

    async def costs(count: int) -> list[float]:
        store = STACKS[name]()
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: store.upsert_latest_many(states[:count]),
            lambda: store.upsert_latest_many(states[:count]),
            lambda: store.get_latest_many(users[:count]),
            lambda: store.get_latest_many(absent[:count]),
        ]
        seconds = []
        for call in calls:
            with Spent() as spent:
                await call()
            seconds.append(spent.seconds)
        await store.aclose()
        return seconds

    assert await growth(costs, FEW, MANY) < MOST
