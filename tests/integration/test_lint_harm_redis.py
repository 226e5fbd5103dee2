"""What the linter's rules about Redis warn of, seen on a real one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from layered_store.config import lint, load_stack, to_config
from layered_store.errors import UnavailableError
from layered_store.interface import StateStore
from layered_store.layers.cached import Cached
from layered_store.layers.write_through import WriteThrough
from layered_store.snapshot import StateSnapshot
from layered_store.stores.redis import RedisStore
from layered_store.stores.sql import SQLStore

OLD, NEW = StateSnapshot("u", axes={"a": 0.1}), StateSnapshot("u", axes={"a": 0.9})


def rules(*stacks: StateStore) -> set[str]:
    return {finding.rule for finding in lint(*stacks)}


async def test_ls009_this_process_answers_with_what_the_tier_dropped(redis_url: str) -> None:
    """The shared tier has forgotten the user, and the longer-lived entry here still answers."""
    async with Cached(RedisStore(redis_url, ttl=0.05), ttl=60) as stack:
        assert "LS009" in rules(stack)
        await stack.upsert_latest(NEW)
        await stack.get_latest("u")
        await asyncio.sleep(0.1)
        async with RedisStore(redis_url) as other:
            assert await other.get_latest("u") is None
        assert await stack.get_latest("u") == NEW


async def test_ls013_they_overwrite_each_other(redis_url: str) -> None:
    """Two applications on one Redis with one prefix read each other's users as their own."""
    async with RedisStore(redis_url) as people, RedisStore(redis_url) as devices:
        assert "LS013" in rules(people, devices)
        await people.upsert_latest(OLD)
        await devices.upsert_latest(NEW)
        assert await people.get_latest("u") == NEW
        await devices.delete("u")
        assert await people.get_latest("u") is None
    async with RedisStore(redis_url) as people, RedisStore(redis_url, prefix="d:") as devices:
        assert "LS013" not in rules(people, devices)
        await people.upsert_latest(OLD)
        await devices.upsert_latest(NEW)
        assert await people.get_latest("u") == OLD


async def test_ls041_what_redis_acknowledged_is_lost(
    redis_server: Callable[..., object], tmp_path: Path
) -> None:
    """A Redis that is killed comes back without what it had acknowledged."""
    server = redis_server("--appendonly", "no", "--save", "")
    url = f"redis://127.0.0.1:{server.port}/0"  # type: ignore[attr-defined]
    database = SQLStore(f"sqlite+aiosqlite:///{tmp_path}/a.db")
    async with (
        Cached(RedisStore(url)) as wrong,
        WriteThrough(RedisStore(url, prefix="copies:"), origin=database) as right,
    ):
        assert "LS041" in rules(wrong)
        assert "LS041" not in rules(right)
        for stack in (wrong, right):
            await stack.upsert_latest(NEW)
        server.close()  # type: ignore[attr-defined]
        again = redis_server("--appendonly", "no", "--save", "")
        url = f"redis://127.0.0.1:{again.port}/0"  # type: ignore[attr-defined]
        async with RedisStore(url) as restarted:
            assert await restarted.get_latest("u") is None
        assert await right.get_latest("u") == NEW


async def test_ls042_users_vanish(redis_url: str) -> None:
    """Whoever was not written for the TTL is gone, though nobody erased him."""
    async with RedisStore(redis_url, ttl=0.05) as stack:
        assert "LS042" in rules(stack)
        await stack.upsert_latest(NEW)
        await asyncio.sleep(0.1)
        assert await stack.get_latest("u") is None


async def test_ls043_it_cannot_log_in(redis_server: Callable[..., object]) -> None:
    """A stack built from what ``to_config`` shows is refused by a server with a password."""
    server = redis_server("--requirepass", "secret")
    url = f"redis://:secret@127.0.0.1:{server.port}/0"  # type: ignore[attr-defined]
    async with RedisStore(url) as right:
        assert "LS043" not in rules(right)
        await right.upsert_latest(NEW)
        with pytest.warns(match="LS043"):
            wrong = load_stack(to_config(right))
    with pytest.raises(UnavailableError) as caught:
        await wrong.get_latest("u")
    assert not caught.value.retryable
    await wrong.aclose()
