"""RedisStore as the record of several processes on slow and uneven ways: seeded delays, all orders.

What callers saw is checked against what may have been, by when their calls began and ended.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, NamedTuple

import pytest
from redis_servers import BINARY, Server, relayed, running

from layered_store.call import call_begins
from layered_store.errors import UnavailableError
from layered_store.snapshot import StateSnapshot
from layered_store.stores.redis import RedisStore

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

pytestmark = pytest.mark.skipif(BINARY is None, reason="redis-server is not installed")

TIE = 0.006
"""Seconds between the beginnings of a write and an erasure within which either may come first."""


class Seen(NamedTuple):
    """One call that returned: of a write its number, of a read the number it was given."""

    user: str
    kind: str
    number: int | None
    began: float
    ended: float
    superseded: bool = False


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as own:
        yield own


def uneven(chance: random.Random, longest: float) -> Callable[[bool], Awaitable[None]]:
    """Make half of what passes a way, to the server or back, late."""

    async def pause(_there: bool) -> None:
        if longest and chance.random() < 0.5:
            await asyncio.sleep(chance.random() * longest)

    return pause


async def history(server: Server, seed: int) -> list[Seen]:
    """Run a dozen callers in four processes, and return what they saw."""
    chance = random.Random(seed)
    seen: list[Seen] = []
    numbers = iter(range(1, 10_000))

    async def caller(store: RedisStore) -> None:
        for _ in range(25):
            user, kind = f"u-{chance.randrange(3)}", chance.choice("wwwdrr")
            number: int | None = next(numbers)
            began = time.monotonic()
            superseded = False
            try:
                if kind == "w":
                    assert number is not None
                    with call_begins() as call:
                        await store.upsert_latest(StateSnapshot(user, number))
                    superseded = call.superseded
                elif kind == "d":
                    await store.delete(user)
                else:
                    found = await store.get_latest(user)
                    number = found and found.updated_at_unix_ms
            except UnavailableError as error:
                assert kind == "w" and "too close together" in str(error)
                continue
            seen.append(Seen(user, kind, number, began, time.monotonic(), superseded))
            await asyncio.sleep(chance.random() * 0.02)

    async with AsyncExitStack() as open_:
        callers = []
        loop = asyncio.get_running_loop()
        for longest in (0, 0.001, 0.01, 0.05):
            url = await open_.enter_async_context(relayed(server.port, uneven(chance, longest)))
            store = RedisStore(url, timeout=5, prefix=f"{seed}:")
            open_.push_async_callback(store.aclose)
            for _ in range(3):
                callers.append(loop.create_task(caller(store), context=contextvars.Context()))
        await asyncio.gather(*callers)
    return seen


def broken(seen: list[Seen]) -> Iterator[str]:
    """Yield which promise was broken, once for each time."""
    writes = {call.number: call for call in seen if call.kind == "w"}
    for call in seen:
        others = [other for other in seen if other.user == call.user]
        erasures = [other for other in others if other.kind == "d"]
        stored = [other for other in others if other.kind == "w" and not other.superseded]

        def erased(write: Seen, until: float, erasures: list[Seen] = erasures) -> bool:
            """Tell whether an erasure may have come after a write, and before this time."""
            return any(d.ended + TIE > write.began and d.began < until for d in erasures)

        if call.kind == "w" and call.superseded and not erased(call, call.ended):
            yield "a write was dropped while nobody erased"
        if call.kind != "r":
            continue
        if call.number is None:
            before = [write for write in stored if write.ended < call.began]
            if any(not erased(write, call.ended) for write in before):
                yield "an acknowledged write was lost"
            continue
        shown = writes[call.number]
        if shown.superseded:
            yield "a dropped write was shown"
        if any(shown.began + TIE < d.began and d.ended < call.began for d in erasures):
            yield "what was written before an erasure was shown after it"
        if any(shown.ended < write.began and write.ended < call.began for write in stored):
            yield "an older state was shown"


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_the_ways_cost_nothing_comes_back_or_is_lost(
    server: Server, seed: int
) -> None:
    """No erased state comes back, no acknowledged one is lost, in any order of arrival."""
    seen = await history(server, seed)
    assert sum(call.superseded for call in seen) > 0
    assert list(broken(seen)) == []
