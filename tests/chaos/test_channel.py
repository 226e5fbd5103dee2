"""The invalidation channel on a real server: whatever happens to it is noticed and distrusted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import redis
from servers import Server, start_redis

from layered_store import Cached
from layered_store.coherence.contract import CacheTier

from .proxy import Mode, Proxy
from .stacks import (
    LEASE_SECONDS,
    TRUST_SECONDS,
    build,
    count,
    leased,
    number,
    proxied,
    redis_url,
    serving,
    state,
    until,
)


class Two(NamedTuple):
    """Two processes' stacks over one Redis; the reader's way there can be disturbed."""

    writer: Cached
    reader: Cached
    way: Proxy
    server: Server

    def ask(self, *words: object) -> object:
        with redis.Redis(port=self.server.port, protocol=2) as client:
            return client.execute_command(*words)


@asynccontextmanager
async def two(tmp_path: Path, *options: str) -> AsyncIterator[Two]:
    with serving(lambda: start_redis(*options)) as server:
        sql = f"sqlite+aiosqlite:///{tmp_path}/states.db"
        async with proxied(server.port) as way:
            writer = build(redis_url(server.port), sql)
            reader = build(redis_url(way.port), sql)
            async with writer, reader:
                await writer.upsert_latest(state("u", 1))
                await leased(reader, "u")
                await leased(writer, "u")
                yield Two(writer, reader, way, server)


async def shown_late(both: Two) -> float:
    """Write, and return for how long the reader still shows what was before."""
    before = await number(both.reader, "u")
    assert before is not None
    await both.writer.upsert_latest(state("u", before + 1))
    start = last = time.monotonic()
    while time.monotonic() - start < LEASE_SECONDS + TRUST_SECONDS + 1:
        asked = time.monotonic()
        if await number(both.reader, "u") == before:
            last = asked
        await asyncio.sleep(0.01)
    return last - start


async def test_case_35_a_lost_channel_connection(tmp_path: Path) -> None:
    """A subscription that was cut: what is held is distrusted, and trusted again when it stands."""
    async with two(tmp_path) as both:
        losses = count(both.reader, "invalidations", "distrust")
        both.ask("CLIENT", "KILL", "TYPE", "pubsub")
        assert await shown_late(both) < LEASE_SECONDS
        await leased(both.reader, "u")
        assert count(both.reader, "invalidations", "distrust") > losses


@pytest.mark.parametrize("mode", [Mode.SWALLOW, Mode.DEAF])
async def test_case_36_a_half_open_socket(tmp_path: Path, mode: Mode) -> None:
    """No error, no bytes: the lease runs out by itself, reads go on, and all comes back."""
    async with two(tmp_path) as both:
        await both.way.set(mode)
        start = time.monotonic()
        assert await shown_late(both) <= LEASE_SECONDS + 0.1
        assert time.monotonic() - start < 10
        hits = count(both.reader, "reads", "hit")
        for _ in range(5):
            assert await number(both.reader, "u") == 2
        assert count(both.reader, "reads", "hit") == hits
        await both.way.set(Mode.PASS)
        await leased(both.reader, "u")


async def test_case_7_an_erasure_waits_for_a_half_open_reader(tmp_path: Path) -> None:
    """It cannot be told, so ``delete`` returns when its lease has run out, and not before."""
    async with two(tmp_path) as both:
        await both.way.set(Mode.SWALLOW)
        assert await number(both.reader, "u") == 1  # under its lease still
        start = time.monotonic()
        await both.writer.delete("u")
        assert await number(both.reader, "u") is None
        assert time.monotonic() - start < LEASE_SECONDS + 1
        await both.way.set(Mode.PASS)


async def test_case_35_a_slow_subscriber_is_kicked(tmp_path: Path) -> None:
    """Redis drops a subscriber whose buffer is full: no message lost with it stays unnoticed."""
    limit = ("--client-output-buffer-limit", "pubsub 65536 65536 1")
    async with two(tmp_path, *limit) as both:
        name = "layered_store:{0}:channel"
        before = both.ask("PUBSUB", "NUMSUB", name)
        assert before[1] == 2  # type: ignore[index]
        await both.way.set(Mode.DELAY, 5.0)  # nothing is read while it sleeps on one chunk
        await asyncio.sleep(0.1)

        def flood() -> None:
            with redis.Redis(port=both.server.port, protocol=2) as client:
                for _ in range(400):
                    client.publish(name, b"x" * 60_000)

        await asyncio.to_thread(flood)
        await until(
            lambda: both.ask("PUBSUB", "NUMSUB", name)[1] < 2,  # type: ignore[index]
            "a kicked subscriber",
        )
        assert await shown_late(both) <= LEASE_SECONDS + 0.1
        await both.way.set(Mode.PASS)
        both.way.reset()
        await leased(both.reader, "u")


async def test_case_35_a_restart_of_redis(tmp_path: Path) -> None:
    """An empty server: nobody shows old states, and the tier is believed again."""
    async with two(tmp_path) as both:
        await asyncio.to_thread(both.server.restart)
        assert await shown_late(both) < LEASE_SECONDS
        await leased(both.reader, "u")


async def test_messages_are_flushed_away_with_nothing_lost(tmp_path: Path) -> None:
    """FLUSHALL takes records, guard and register away while the channel stands."""
    async with two(tmp_path) as both:
        both.ask("FLUSHALL")
        assert await shown_late(both) < LEASE_SECONDS
        await both.writer.delete("u")
        assert await number(both.reader, "u") is None


async def test_a_client_passed_in_hears_the_channel_too(tmp_path: Path) -> None:
    """redis-py's own default protocol hands messages on another way; a URL may ask for it too."""
    from layered_store import RedisStore, SQLStore

    with serving(start_redis) as server:
        sql = f"sqlite+aiosqlite:///{tmp_path}/states.db"
        client = redis.asyncio.Redis(port=server.port)
        async with Cached(RedisStore(client=client), fallback=SQLStore(sql)) as stack:
            await stack.upsert_latest(state("u", 1))
            await leased(stack, "u")
        await client.aclose()
        url = f"{redis_url(server.port)}?protocol=3"
        async with Cached(RedisStore(url), fallback=SQLStore(sql)) as stack:
            await leased(stack, "u")


async def test_the_channel_of_a_server_before_7(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where scripts outlive a server run, they look themselves whether it is still the same."""
    from layered_store.coherence.redis_tier import loading

    monkeypatch.setattr(loading, "_FORGETS_SINCE", 99)
    async with two(tmp_path) as both:
        assert await shown_late(both) < LEASE_SECONDS
        tier = both.writer.inner.inner.capability(CacheTier)  # type: ignore[attr-defined]
        (known,) = tier._scripts.loaded.values()
        await asyncio.to_thread(both.server.restart)
        # As if a replica or an append-only file had handed the scripts on.
        for script in known.scripts.values():
            both.ask("SCRIPT", "LOAD", script.source)
        with pytest.raises(redis.exceptions.NoScriptError):
            both.ask("EVALSHA", known.sha["READ"].decode(), 2, "a", "b")
        await leased(both.reader, "u")
