"""What docs/comparison.md says of other libraries was seen with the versions installed here.

A test that fails after an upgrade means that the page is to be corrected, also in their favour.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import inspect
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from blocks import ROOT

from layered_store import Cached, StateSnapshot, StateStore

CALLERS = 20
Load = Callable[[str], Awaitable[Any]]


class Library:
    """How one library caches a slow load; ``loads`` counts."""

    def __init__(self) -> None:
        self.loads = 0
        self.gate = asyncio.Event()

    async def fetch(self) -> None:
        self.loads += 1
        await self.gate.wait()

    async def read(self, key: str) -> Any:
        raise NotImplementedError

    async def delete(self, key: str) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        """End what is open."""


class Ours(Library):
    def __init__(self) -> None:
        super().__init__()
        library = self

        class Slow(StateStore):
            gone = False

            async def get_latest(self, user_id: str) -> StateSnapshot | None:
                found = None if self.gone else StateSnapshot(user_id)
                await library.fetch()
                return found

            async def upsert_latest(self, snapshot: StateSnapshot) -> None:
                raise NotImplementedError

            async def delete(self, user_id: str) -> None:
                self.gone = True

        self.stack = Cached(Slow())

    async def read(self, key: str) -> Any:
        return await self.stack.get_latest(key)

    async def delete(self, key: str) -> None:
        await self.stack.delete(key)


class KeyValue(Library):
    def __init__(self) -> None:
        super().__init__()
        pytest.importorskip("key_value")
        from key_value.aio.stores.memory import MemoryStore
        from key_value.aio.wrappers.base import BaseWrapper
        from key_value.aio.wrappers.passthrough_cache import PassthroughCacheWrapper

        library = self

        class Slow(BaseWrapper):
            def __init__(self) -> None:
                self.key_value = MemoryStore()

            async def ttl(self, key: str, *, collection: str | None = None) -> Any:
                found = await self.key_value.ttl(key, collection=collection)
                await library.fetch()
                return found

        self.primary = Slow()
        self.stack = PassthroughCacheWrapper(
            primary_key_value=self.primary, cache_key_value=MemoryStore()
        )

    async def read(self, key: str) -> Any:
        if not self.loads and not await self.primary.key_value.get(key):
            await self.primary.key_value.put(key, {"v": 1})
        return await self.stack.get(key)

    async def delete(self, key: str) -> None:
        await self.stack.delete(key)


class Cashews(Library):
    def __init__(self) -> None:
        super().__init__()
        cashews = pytest.importorskip("cashews")
        self.cache = cashews.Cache()
        self.cache.setup("mem://")

        @self.cache(ttl="1m", key="u:{key}")
        async def load(key: str) -> Any:
            await self.fetch()
            return {"v": 1}

        self.load = load

    async def read(self, key: str) -> Any:
        return await self.load(key)

    async def delete(self, key: str) -> None:
        await self.cache.delete(f"u:{key}")

    async def close(self) -> None:
        await self.cache.close()


class AioCache(Library):
    def __init__(self) -> None:
        super().__init__()
        aiocache = pytest.importorskip("aiocache")

        @aiocache.cached(ttl=60, key_builder=lambda _, key: key)
        async def load(key: str) -> Any:
            await self.fetch()
            return {"v": 1}

        self.load = load

    async def read(self, key: str) -> Any:
        return await self.load(key)

    async def delete(self, key: str) -> None:
        await self.load.cache.delete(key)


class AsyncLru(Library):
    def __init__(self) -> None:
        super().__init__()
        async_lru = pytest.importorskip("async_lru")

        @async_lru.alru_cache(maxsize=100)
        async def load(key: str) -> Any:
            await self.fetch()
            return {"v": 1}

        self.load = load

    async def read(self, key: str) -> Any:
        return await self.load(key)

    async def delete(self, key: str) -> None:
        self.load.cache_invalidate(key)

    async def close(self) -> None:
        await self.load.cache_close()


async def turns() -> None:
    """Let everything that can run do so."""
    for _ in range(50):
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("library", "loads"),
    [(Ours, 1), (KeyValue, CALLERS), (Cashews, 1), (AioCache, CALLERS), (AsyncLru, 1)],
)
async def test_loads_for_many_readers_of_one_cold_key(library: type[Library], loads: int) -> None:
    """One load, or one each."""
    one = library()
    readers = [asyncio.create_task(one.read("k")) for _ in range(CALLERS)]
    await turns()
    one.gate.set()
    await asyncio.gather(*readers)
    assert one.loads == loads
    await one.close()


@pytest.mark.parametrize(
    ("library", "others"),
    [(Ours, "served"), (Cashews, "cancelled"), (AsyncLru, "served")],
)
async def test_a_reader_that_shares_a_load_is_cancelled(
    library: type[Library], others: str
) -> None:
    """What happens to the others."""
    one = library()
    readers = [asyncio.create_task(one.read("k")) for _ in range(3)]
    await turns()
    readers[0].cancel()
    await turns()
    one.gate.set()
    results = await asyncio.gather(*readers, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    cancelled = [isinstance(result, asyncio.CancelledError) for result in results[1:]]
    assert cancelled == [others == "cancelled"] * 2
    await one.close()


@pytest.mark.parametrize(
    ("library", "after"),
    [
        (Ours, "gone"),
        (KeyValue, "back"),
        (Cashews, "back"),
        (AioCache, "back"),
        (AsyncLru, "gone"),
    ],
)
async def test_a_delete_while_a_load_is_under_way(library: type[Library], after: str) -> None:
    """Whether the next read is answered with what was deleted, without a load."""
    one = library()
    reader = asyncio.create_task(one.read("k"))
    await turns()
    await one.delete("k")
    one.gate.set()
    await reader
    loads = one.loads
    await one.read("k")
    assert ("back" if one.loads == loads else "gone") == after
    await one.close()


async def test_absent_is_remembered() -> None:
    """aiocache and py-key-value ask again each time; cashews and async-lru remember None."""
    aiocache, cashews = pytest.importorskip("aiocache"), pytest.importorskip("cashews")
    async_lru = pytest.importorskip("async_lru")
    cache = cashews.Cache()
    cache.setup("mem://")
    counts = {"aiocache": 0, "cashews": 0, "async-lru": 0}

    @aiocache.cached(ttl=60)
    async def one(key: str) -> None:
        counts["aiocache"] += 1

    @cache(ttl="1m", key="k:{key}")
    async def two(key: str) -> None:
        counts["cashews"] += 1

    @async_lru.alru_cache(maxsize=10)
    async def three(key: str) -> None:
        counts["async-lru"] += 1

    for _ in range(5):
        for load in (one, two, three):
            await load("k")
    assert counts == {"aiocache": 5, "cashews": 1, "async-lru": 1}
    await cache.close()
    await three.cache_close()


def test_dogpile_is_synchronous_and_loads_once() -> None:
    """dogpile.cache has no coroutine, and one thread loads while the others wait."""
    dogpile = pytest.importorskip("dogpile.cache")
    methods = [method for _, method in inspect.getmembers(dogpile.CacheRegion, callable)]
    assert not any(inspect.iscoroutinefunction(method) for method in methods)
    region = dogpile.make_region().configure("dogpile.cache.memory", expiration_time=60)
    loads = []

    def load() -> int:
        loads.append(1)
        time.sleep(0.05)
        return 1

    threads = [
        threading.Thread(target=region.get_or_create, args=("k", load)) for _ in range(CALLERS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1


def test_py_key_value_wrappers_hide_abilities_and_say_little() -> None:
    """Wrapped, a store can no longer list its keys; a wrapper's repr is an address."""
    pytest.importorskip("key_value")
    from key_value.aio.stores.memory import MemoryStore
    from key_value.aio.wrappers.retry import RetryWrapper

    assert hasattr(MemoryStore(), "keys")
    assert not hasattr(RetryWrapper(MemoryStore()), "keys")
    assert " object at 0x" in repr(RetryWrapper(MemoryStore()))
    assert not any("health" in name or name == "ping" for name in dir(MemoryStore()))


@pytest.mark.parametrize(
    "package",
    ["py-key-value-aio", "cashews", "aiocache", "dogpile.cache", "async-lru"],
)
def test_the_page_names_the_version_that_was_seen(package: str) -> None:
    """The versions of the page are those that the tests ran with, up to the last number."""
    try:
        seen = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    page = (ROOT / "docs" / "comparison.md").read_text()
    assert f"{package} {seen.rpartition('.')[0]}" in page, seen
