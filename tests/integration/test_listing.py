"""Listing and copying users between real backends."""

from __future__ import annotations

from pathlib import Path

import pytest
from redis_servers import BINARY, Server

from layered_store.copying import Copy
from layered_store.enumerable import enumerable_of, pages
from layered_store.snapshot import StateSnapshot
from layered_store.stores.redis import RedisStore
from layered_store.stores.sql import SQLStore


@pytest.mark.skipif(BINARY is None, reason="no redis-server here")
async def test_redis_and_back(tmp_path: Path) -> None:
    """Redis lists exactly its own users, whatever its prefix holds, and copies to SQL whole."""
    server = Server()
    try:
        async with (
            RedisStore(server.url, prefix="a*[b]?", history_limit=5) as redis,
            RedisStore(server.url, prefix="aXb") as other,
            SQLStore(f"sqlite+aiosqlite:///{tmp_path / 'a.db'}") as sql,
        ):
            await other.upsert_latest(StateSnapshot("foreign"))
            for state in (0.1, 0.2):
                await redis.upsert_latest_many(
                    StateSnapshot(f"u-{user}", axes={"a": state}) for user in range(200)
                )
            await redis.delete("u-7")
            expected = {f"u-{user}" for user in range(200)} - {"u-7"}
            listing = enumerable_of(redis)
            assert listing is not None
            assert {u async for page in pages(listing, 30) for u in page.user_ids} == expected
            copy = Copy(redis, sql, page=30)
            async for _ in copy.run():
                pass
            await copy.finish()
            progress = copy.progress
            assert (progress.states, progress.conflicts) == (398, 0)
            listing = enumerable_of(sql)
            assert listing is not None
            found = [u async for page in pages(listing, 30) for u in page.user_ids]
            assert sorted(found) == sorted(expected)
            assert await sql.get_history("u-1", 9) == await redis.get_history("u-1", 9)
    finally:
        server.process.kill()
        server.process.wait()
