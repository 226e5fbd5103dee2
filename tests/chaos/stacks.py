"""What the scenarios share: stacks on real servers, and waiting for something to hold."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from servers import Server, ServerMissingError

from layered_store import Cached, RedisStore, SQLStore, StateSnapshot, StateStore

from .proxy import Proxy

LEASE_SECONDS = 1.0
TRUST_SECONDS = 2.0


def started(start: Callable[[], Any]) -> Any:
    """Start a server, or skip the test where it is missing and not required."""
    try:
        return start()
    except ServerMissingError as exc:
        if os.environ.get("LAYERED_STORE_REQUIRE_SERVERS") == "1":
            raise
        pytest.skip(str(exc))


@contextlib.contextmanager
def serving(start: Callable[[], Server]) -> Iterator[Server]:
    """Run a server for the length of a block."""
    server = started(start)
    try:
        yield server
    finally:
        server.close()


def redis_url(port: int) -> str:
    return f"redis://127.0.0.1:{port}/0"


def build(redis: str, sql: str, **options: Any) -> Cached:
    """Return what one process of a fleet has."""
    tier = RedisStore(redis, timeout=0.3, connect_timeout=0.3)
    return Cached(tier, fallback=SQLStore(sql, timeout=3.0), **options)


@contextlib.asynccontextmanager
async def proxied(port: int) -> AsyncIterator[Proxy]:
    """Run a proxy for the length of a block."""
    proxy = Proxy(port)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.close()


def state(user: str, number: int) -> StateSnapshot:
    """Return a state of a user that can be told from others by its number."""
    return StateSnapshot(user, number)


async def number(store: StateStore, user: str) -> int | None:
    """Return the number of the state that a store shows."""
    found = await store.get_latest(user)
    return None if found is None else found.updated_at_unix_ms


def count(store: StateStore, metric: str, *labels: str) -> float:
    """Return what a block counted."""
    for sample in store.samples():
        if sample.metric == metric and sample.labels == labels:
            return sample.value
    return 0


async def until(holds: Callable[[], Any], what: str, seconds: float = 20.0) -> float:
    """Wait until something holds; return how long that took."""
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        found = holds()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return time.monotonic() - start
        await asyncio.sleep(0.01)
    raise AssertionError(f"{what} did not come about within {seconds:g} s")


async def leased(store: Cached, user: str) -> None:
    """Wait until a user's reads are hits of the in-process cache."""

    async def hit() -> bool:
        before = count(store, "reads", "hit")
        await store.get_latest(user)
        return count(store, "reads", "hit") > before

    await until(hit, "a hit under a lease")


async def trusted(store: Cached, user: str) -> None:
    """Wait until the cache tier answers for a user that exists."""
    tier = store.inner

    async def hit() -> bool:
        before = count(tier, "reads", "hit")
        await tier.get_latest(user)
        return count(tier, "reads", "hit") > before

    await until(hit, "a hit of the cache tier")
