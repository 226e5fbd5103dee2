"""Encrypted, Compressed and Prefixed around real tiers: the protocol holds, nothing shows."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from layered_store import (
    Cached,
    Compressed,
    ConfigError,
    CorruptDataError,
    Encrypted,
    Prefixed,
    RedisStore,
    SQLStore,
    StateSnapshot,
    StateStore,
    WriteThrough,
    find,
)
from layered_store.coherence.contract import Authority
from layered_store.copying import Copy
from layered_store.enumerable import enumerable_of, pages
from layered_store.testing import Faults, check_store

KEY, OTHER = (bytes([n]) * 32 for n in (1, 2))
MARK = "zebra_marked_axis"
USER = "marked-user-zebra"


def state(user_id: str = USER, value: float = 0.5, at: int = 5, axes: int = 0) -> StateSnapshot:
    more = {f"{MARK}_{n}": 0.5 for n in range(axes)}
    return StateSnapshot(user_id, updated_at_unix_ms=at, axes={MARK: value, **more})


@pytest.fixture(params=["sqlite", "postgres", "mysql"])
def sql_url(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(f"{request.param}_url"))


def around(store: StateStore, kind: str) -> StateStore:
    if kind == "encrypted":
        return Encrypted(store, keys=[KEY])
    if kind == "hashed":
        return Encrypted(store, keys=[KEY], hash_user_ids=True)
    if kind == "compressed":
        return Compressed(store, threshold=0)
    if kind == "prefixed":
        return Prefixed(store, prefix="tenant-a")
    return Prefixed(
        Compressed(Encrypted(store, keys=[KEY], hash_user_ids=True), threshold=0), prefix="t"
    )


async def until(stack: StateStore, expected: StateSnapshot) -> None:
    """Wait for what another process wrote to arrive."""
    for _ in range(1000):
        if await stack.get_latest(expected.user_id) == expected:
            return
        await asyncio.sleep(0.002)
    raise AssertionError("another process's write does not show")


KINDS = ["encrypted", "hashed", "compressed", "prefixed", "all"]


def dump_redis(url: str) -> bytes:
    import redis

    with redis.Redis.from_url(url) as client:
        parts = []
        for key in client.scan_iter(count=1000):
            parts.append(key)
            if client.type(key) == b"string":
                parts.append(client.get(key))
            elif client.type(key) == b"list":
                parts.extend(client.lrange(key, 0, -1))
    return b"\n".join(parts)


@pytest.mark.parametrize("kind", KINDS)
async def test_it_is_a_store_like_any_other_around_each_backend(
    kind: str, redis_url: str, sqlite_url: str
) -> None:
    """The conformance suite, on Redis with a history and on SQL."""
    number = iter(range(10_000))
    for make in (
        lambda: RedisStore(redis_url, prefix=f"c{next(number)}:", history_limit=20),
        lambda: SQLStore(sqlite_url.replace(".db", f"{next(number)}.db")),
    ):
        report = await check_store(lambda: around(make(), kind))  # noqa: B023
        failed = [r for r in report.results if r.outcome == "failed"]
        # A prefix takes its part of the longest ids.
        assert all("UTF-8 bytes" in r.message for r in failed), str(report)
        assert len(failed) <= (kind in ("prefixed", "all"))


@pytest.mark.parametrize("kind", KINDS)
async def test_two_processes_agree_through_it(kind: str, redis_url: str, sql_url: str) -> None:
    """The versioned protocol, the channel and erasures work between two stacks as without it."""

    def stack() -> Cached:
        return Cached(
            around(RedisStore(redis_url), kind), fallback=around(SQLStore(sql_url), kind), ttl=600
        )

    async with stack() as one, stack() as two:
        assert "versioned" in find(one, WriteThrough)[0].notes()[0]
        await one.upsert_latest(state(value=0.1))
        assert await two.get_latest(USER) == state(value=0.1)
        assert await one.get_latest(USER) == state(value=0.1)
        for number in range(2, 6):
            await one.upsert_latest(state(value=number / 10))
            await until(two, state(value=number / 10))
        await two.upsert_latest_many([state(f"user-{n}") for n in range(20)])
        many = await one.get_latest_many([f"user-{n}" for n in range(21)])
        assert many == {f"user-{n}": state(f"user-{n}") for n in range(20)}
        assert [s.get_axis(MARK) for s in await two.get_history(USER, 9)] == [
            0.5, 0.4, 0.3, 0.2, 0.1,
        ]  # fmt: skip
        await two.delete(USER)
        assert await one.get_latest(USER) is None
        assert await two.get_latest(USER) is None
        assert await one.get_history(USER, 9) == []
        listing = enumerable_of(one)
        assert listing is not None
        users = [user async for page in pages(listing, 7) for user in page.user_ids]
        assert sorted(users) == sorted(f"user-{n}" for n in range(20))


@pytest.mark.parametrize("hashed", [False, True])
async def test_nothing_of_a_state_is_in_the_servers(
    hashed: bool, redis_url: str, sqlite_url: str
) -> None:
    """No axis, and with hashed ids no user id, in any key or value of Redis or byte of the file;
    also not what Compressed outside made of it."""

    def layer(store: StateStore) -> StateStore:
        return Compressed(Encrypted(store, keys=[KEY], hash_user_ids=hashed))

    redis = RedisStore(redis_url, history_limit=10)
    stack = Cached(layer(redis), fallback=layer(SQLStore(sqlite_url)))
    async with stack:
        await stack.upsert_latest(state())
        await stack.upsert_latest(state(axes=100))
        assert await stack.get_latest(USER) == state(axes=100)
        await layer(redis).upsert_latest(state("user-2"))
        assert len(await stack.get_history(USER, 9)) == 2
    dump = dump_redis(redis_url)
    folder = Path(str(make_url(sqlite_url).database)).parent
    dump += b"".join(file.read_bytes() for file in folder.glob("store.db*"))
    assert len(dump) > 1000
    assert b"zebra_marked" not in dump
    assert (USER.encode() in dump) is not hashed


async def test_a_copy_that_no_key_reads_is_a_miss_and_a_record_is_an_error(
    redis_url: str, sqlite_url: str
) -> None:
    """The same damage in the tier and in the system of record."""
    origin = Encrypted(SQLStore(sqlite_url), keys=[KEY])
    async with Cached(Encrypted(RedisStore(redis_url), keys=[KEY]), fallback=origin) as first:
        await first.upsert_latest(state())
    rotated = Encrypted(RedisStore(redis_url), keys=[OTHER])
    fresh = Encrypted(SQLStore(sqlite_url), keys=[KEY])
    async with WriteThrough(rotated, origin=fresh) as stack:
        for _ in range(2):
            assert await stack.get_latest(USER) == state()
            assert await stack.get_latest_many([USER]) == {USER: state()}
        assert next(s.value for s in rotated.samples() if s.metric == "corrupt_records") > 0
        await stack.upsert_latest(state(value=0.9))
        assert await rotated.inner.get_latest(USER) is not None
        assert await rotated.get_latest(USER) == state(value=0.9)
    async with Encrypted(RedisStore(redis_url), keys=[KEY]) as alone:
        assert await alone.get_latest(USER) is None
    async with Encrypted(SQLStore(sqlite_url), keys=[OTHER]) as wrong:
        with pytest.raises(CorruptDataError):
            await wrong.get_latest(USER)
        with pytest.raises(CorruptDataError):
            await wrong.get_history(USER, 3)
        assert await wrong.get_latest_many([USER]) == {}


@pytest.mark.parametrize("kind", ["hashed", "all"])
async def test_a_stale_copy_answers_through_it(
    kind: str, redis_url: str, sqlite_url: str
) -> None:
    """With the system of record away, a copy that was trusted answers within stale_if_error."""
    database = Faults(SQLStore(sqlite_url))
    stack = Cached(
        around(RedisStore(redis_url), kind),
        fallback=around(database, kind),
        ttl=0.05,
        stale_if_error=60,
    )
    async with stack:
        await stack.upsert_latest(state())
        assert await stack.get_latest(USER) == state()
        with database.outage():
            for _ in range(30):  # for longer than the tier is trusted without a repair
                await asyncio.sleep(0.1)
                stack.distrust()  # else the copy in this process would answer
                assert await stack.get_latest(USER) == state()
        (tiers,) = find(stack, WriteThrough)
        assert {sample.labels: sample.value for sample in tiers.samples()}["stale",] > 0


@pytest.mark.parametrize("kind", KINDS)
async def test_older_snapshots_lose_through_it(kind: str, sqlite_url: str) -> None:
    """order="snapshot_time" reads the time, which stays readable, and what won comes back."""
    store = around(SQLStore(sqlite_url, order="snapshot_time"), kind)
    async with store:
        await store.upsert_latest(state(value=0.9, at=9))
        await store.upsert_latest(state(value=0.1, at=1))
        await store.upsert_latest_many([state(value=0.2, at=2), state("user-2", at=2)])
        assert await store.get_latest(USER) == state(value=0.9, at=9)
        authority = store.capability(Authority)
        assert authority is not None
        assert (await authority.write(state(value=0.3, at=3))).snapshot == state(value=0.9, at=9)


async def test_tiers_whose_users_would_not_meet_are_refused(redis_url: str) -> None:
    """Hashed on one side only, hashed otherwise, another tenant: told when the stack is built."""
    redis, sql = RedisStore(redis_url), SQLStore("sqlite://")
    pairs: list[tuple[StateStore, StateStore]] = [
        (redis, Encrypted(sql, keys=[KEY], hash_user_ids=True)),
        (Encrypted(redis, keys=[KEY], hash_user_ids=True), Encrypted(sql, keys=[KEY])),
        (
            Encrypted(redis, keys=[KEY], hash_user_ids=True),
            Encrypted(sql, keys=[OTHER], hash_user_ids=True),
        ),
        (Prefixed(redis, prefix="a"), Prefixed(sql, prefix="b")),
        (redis, Prefixed(sql, prefix="b")),
    ]
    for tier, origin in pairs:
        with pytest.raises(ConfigError):
            WriteThrough(tier, origin=origin)
    WriteThrough(Encrypted(redis, keys=[OTHER]), origin=Encrypted(sql, keys=[KEY]))


async def test_users_are_copied_into_an_encrypted_store(sqlite_url: str) -> None:
    """The way to hashed ids: everybody comes along, under the new key."""
    old, new = SQLStore(sqlite_url), SQLStore(sqlite_url.replace("store.db", "new.db"))
    target = Encrypted(new, keys=[KEY], hash_user_ids=True)
    async with old, target:
        await old.upsert_latest_many([state(f"user-{n}") for n in range(30)])
        copy = Copy(old, target, page=7)
        async for _ in copy.run():
            pass
        counts = await copy.finish()
        assert (counts.source, counts.target) == (30, 30)
        assert await target.get_latest_many([f"user-{n}" for n in range(30)]) == {
            f"user-{n}": state(f"user-{n}") for n in range(30)
        }
        listing = enumerable_of(target)
        assert listing is not None
        assert len((await listing.users("", 100)).user_ids) == 30

