"""Listing and copying users between real backends."""

from __future__ import annotations

from pathlib import Path

import pytest
from redis_servers import BINARY, Server, running

from layered_store.copying import Copy
from layered_store.enumerable import enumerable_of, pages
from layered_store.errors import ValidationError
from layered_store.snapshot import StateSnapshot
from layered_store.stores.redis import RedisStore
from layered_store.stores.redis.record import STATE, pack
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


@pytest.mark.skipif(BINARY is None, reason="no redis-server here")
async def test_a_listing_names_only_users_that_a_read_would_find() -> None:
    """Not what cannot be read, what is no record, nor what stands under another user's key."""
    with running() as server:
        async with RedisStore(server.url) as redis:

            async def put(user_id: str, value: bytes) -> None:
                key = redis.key(redis.digest(user_id))
                await redis.command("SET", key, value, operation="users", write=True)

            listing = enumerable_of(redis)
            assert listing is not None
            await put("u-4", pack(STATE, 1, b"no snapshot"))
            assert [page.user_ids async for page in pages(listing, 100)] == [[]]
            await redis.upsert_latest_many([StateSnapshot("u-1"), StateSnapshot("u-2")])
            key = redis.key(redis.digest("u-2"))
            record = await redis.command("GET", key, operation="users", write=False)
            await put("u-3", record)
            await put("u-5", b"no record")
            found = [user async for page in pages(listing, 100) for user in page.user_ids]
            assert sorted(found) == ["u-1", "u-2"]
            for user_id in ("u-3", "u-4", "u-5"):
                assert await redis.get_latest(user_id) is None


async def test_a_cursor_of_another_store_is_refused_by_a_database(tmp_path: Path) -> None:
    """As a mistake of the caller's, in our own words."""
    async with SQLStore(f"sqlite+aiosqlite:///{tmp_path / 'a.db'}") as sql:
        with pytest.raises(ValidationError, match="not one of this store's"):
            await sql.users("another's", 10)
