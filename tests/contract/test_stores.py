"""Every shipped store passes the conformance suite, on every engine."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from layered_store import MemoryStore, RedisStore, SQLStore, StateSnapshot, ValidationError
from layered_store.interface import StateStore
from layered_store.testing import FakeClock, check_store


class Mood(StateSnapshot):
    """A class of the application's own."""

    mood: str = ""
    tags: list[str] = []
    detail: dict[str, int] = {}


EVERYTHING = {"writes", "history", "delete", "versions", "listing"}
STORES: dict[str, tuple[str | None, Callable[..., StateStore], set[str]]] = {
    "memory": (None, lambda: MemoryStore(), EVERYTHING),
    "memory, no history": (
        None,
        lambda: MemoryStore(history_limit=0),
        {"writes", "delete", "versions", "listing"},
    ),
    "memory, still clock": (
        None,
        lambda: MemoryStore(clock=FakeClock()),
        EVERYTHING,
    ),
    "memory, subclass": (
        None,
        lambda: MemoryStore(snapshot_type=Mood),
        EVERYTHING,
    ),
    "redis": ("redis_url", RedisStore, {"writes", "delete", "listing"}),
    "redis, history": (
        "redis_url",
        lambda url: RedisStore(url, history_limit=50),
        {"writes", "history", "delete", "listing"},
    ),
    "redis, subclass": (
        "redis_url",
        lambda url: RedisStore(url, history_limit=50, snapshot_type=Mood, digest_key=b"key"),
        {"writes", "history", "delete", "listing"},
    ),
    "sqlite": ("sqlite_url", SQLStore, EVERYTHING),
    "sqlite, all history": (
        "sqlite_url",
        lambda url: SQLStore(url, history_limit=None),
        EVERYTHING,
    ),
    "sqlite, by snapshot time": (
        "sqlite_url",
        lambda url: SQLStore(url, order="snapshot_time"),
        EVERYTHING,
    ),
    "sqlite, subclass": (
        "sqlite_url",
        lambda url: SQLStore(url, snapshot_type=Mood, digest_key=b"key"),
        EVERYTHING,
    ),
    "postgresql": (
        "postgres_url",
        SQLStore,
        EVERYTHING,
    ),
    "mariadb": ("mysql_url", SQLStore, EVERYTHING),
}


@pytest.mark.parametrize("name", STORES)
async def test_store(name: str, request: pytest.FixtureRequest) -> None:
    """Nothing fails, and every ability that the store has is found and checked."""
    fixture, build, abilities = STORES[name]
    where = () if fixture is None else (request.getfixturevalue(fixture),)
    report = await check_store(lambda: build(*where))
    assert report.ok, str(report)
    assert set(report.abilities) == abilities


BAD_IDS = ["", "a b", "a:b", "a\n", "a\0b", "x" * 257, "ä" * 129, "\ud800", None, 7, b"u-1", ["u"]]


@pytest.mark.parametrize("name", ["memory", "redis", "sqlite", "postgresql", "mariadb"])
async def test_bad_ids(name: str, request: pytest.FixtureRequest) -> None:
    """Shipped stores refuse a bad id in every operation, and a lone id in place of a batch."""
    fixture, build, _ = STORES[name]
    async with build(*(() if fixture is None else (request.getfixturevalue(fixture),))) as store:
        for bad in BAD_IDS:
            for call in (
                store.get_latest(bad),
                store.get_history(bad, 1),
                store.delete(bad),
                store.get_latest_many(["u-1", bad]),
                store.upsert_latest(StateSnapshot(bad)),
                store.upsert_latest_many([StateSnapshot("u-1"), StateSnapshot(bad)]),
            ):
                with pytest.raises(ValidationError, match="user_id"):
                    await call
        for batch in ("u-1", b"u-1", None, 7):
            with pytest.raises(ValidationError, match="user_ids must be a list"):
                await store.get_latest_many(batch)
        for batch in (StateSnapshot("u-1"), None, "u-1"):
            with pytest.raises(ValidationError, match="snapshots must be a list"):
                await store.upsert_latest_many(batch)
        for odd in (None, "u-1", {"user_id": "u-1"}, StateSnapshot):
            with pytest.raises(ValidationError, match="snapshot must be a StateSnapshot"):
                await store.upsert_latest(odd)
        assert await store.get_latest("u-1") is None
