"""What an outage leaves behind costs no more a user the more users met it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from layered_store import (
    Cached,
    MemoryStore,
    Ramp,
    Retry,
    StateSnapshot,
    StateStore,
    StoreTimeoutError,
)
from layered_store.testing import FakeClock
from layered_store.turns import Turn, Turns
from tests.unit.growth import MOST, Spent, growth

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

FEW, MANY = 1_000, 40_000


class Away(MemoryStore):
    """A database that does not answer."""

    async def upsert_latest_many(self, snapshots: Iterable[StateSnapshot]) -> None:
        raise StoreTimeoutError("no answer", outcome_unknown=True)


def states(count: int) -> list[StateSnapshot]:
    return [StateSnapshot(f"u-{n}") for n in range(count)]


@pytest.mark.parametrize(
    "layer",
    [
        lambda clock: Cached(Away(), clock=clock),
        lambda clock: Ramp(Away(), layer=Retry, share=0.0, clock=clock),
    ],
)
async def test_the_end_of_doubt(layer: Callable[[FakeClock], StateStore]) -> None:
    """Users of whom a write may still take effect are forgotten when its time is over."""

    async def costs(count: int) -> list[float]:
        clock = FakeClock()
        stack = layer(clock)
        with suppress(StoreTimeoutError):
            await stack.upsert_latest_many(states(count))
        await clock.advance(10)
        with Spent() as spent, suppress(StoreTimeoutError):
            await stack.upsert_latest_many([StateSnapshot("u-0")])
        return [spent.seconds]

    assert await growth(costs, FEW, MANY) < MOST


async def test_a_large_batch_of_reads_that_failed() -> None:
    """Each of its loads is ended once."""

    class Down(MemoryStore):
        async def get_latest_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
            raise StoreTimeoutError("no answer")

    async def costs(count: int) -> list[float]:
        stack = Cached(Down())
        users = [f"u-{n}" for n in range(count)]
        with Spent() as spent, suppress(StoreTimeoutError):
            await stack.get_latest_many(users)
        return [spent.seconds]

    assert await growth(costs, FEW, 4 * MANY) < MOST


async def test_writers_of_one_user() -> None:
    """Each is given the turn in the order in which they came."""

    async def costs(count: int) -> list[float]:
        turn = await Turns(Turn, "Layer").begin("u")
        waiting = [asyncio.ensure_future(turn.take()) for _ in range(count)]
        await asyncio.sleep(0)
        with Spent() as spent:
            for _ in range(count):
                turn.pass_on()
        assert all(await asyncio.gather(*waiting))
        return [spent.seconds]

    assert await growth(costs, FEW, MANY) < MOST
