"""Redis Cluster and Sentinel as the shared tier: leases, erasures, moved slots, lost nodes."""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from redis.crc import key_slot
from servers import Cluster, SentinelGroup, Server

sys.path.insert(0, str(Path(__file__).parent.parent))

from chaos.proxy import Proxy  # noqa: E402
from chaos.stacks import build, count, leased, number, started, state, trusted, until  # noqa: E402

from layered_store import Cached, RedisStore, SQLStore, UnavailableError  # noqa: E402
from layered_store.coherence.contract import CacheTier, Change  # noqa: E402
from layered_store.coherence.redis_tier.buckets import buckets_of  # noqa: E402

USERS = [f"user-{index}" for index in range(40)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    group: Cluster = started(Cluster)
    yield group
    group.close()


@asynccontextmanager
async def two(url: str, tmp_path: Path) -> AsyncIterator[tuple[Cached, Cached]]:
    sql = f"sqlite+aiosqlite:///{tmp_path}/states.db"
    async with build(url, sql) as one, build(url, sql) as other:
        for user in USERS:
            await one.upsert_latest(state(user, 1))
        for stack in (one, other):
            for user in USERS:
                await leased(stack, user)
        yield one, other


async def delivered(one: Cached, other: Cached, value: int, bound: float) -> None:
    """Each write of one shows at the other within a bound, whatever bucket it is in."""
    for user in USERS:
        await one.upsert_latest(state(user, value))

        async def shown(user: str = user) -> bool:
            return await number(other, user) == value

        assert await until(shown, f"{user} at the other") < bound


async def test_every_key_and_channel_of_a_bucket_is_in_one_slot(cluster: Cluster) -> None:
    """Whatever a script touches, its channel included, shares the hash tag of the user."""
    store = RedisStore(cluster.url)
    for user in USERS:
        digest = store.digest(user)
        bucket = buckets_of(store)[store.bucket_of(digest)]
        names = [store.key(digest), store.key(digest, "h"), bucket.guard, bucket.register]
        names += [bucket.repair, bucket.lock, bucket.channel]
        assert len({key_slot(name) for name in names}) == 1
    assert len({key_slot(store.bucket_key(bucket, "id")) for bucket in store.buckets}) == 16
    await store.aclose()


async def test_every_step_of_the_protocol_runs_in_every_bucket(cluster: Cluster) -> None:
    """A cluster refuses a script that touches two slots: none does."""
    store = RedisStore(cluster.url, prefix="steps:")
    tier: Any = store.capability(CacheTier)
    origin = SQLStore("sqlite+aiosqlite://")
    begun = await tier.begin("me", await origin.head())
    changes = [Change(store.digest(user), 1, erased=False) for user in USERS]
    await tier.repair(changes)
    for user in {store.bucket_of(store.digest(user)): user for user in USERS}.values():
        # Anew for each: trust lasts 2 s, and a busy machine may take longer over all of them.
        begun = await tier.begin("me", begun.cursor)
        assert await tier.stamp(begun, begun.cursor, 2.0)
        ticket = await tier.ticket(user)
        record = await origin.write(state(user, 1))
        await tier.put(user, record, ticket)
        assert (await tier.read(user)).found == record
        holders = await tier.bury(user, record.version + 1, "me")
        assert holders.others == {}
        assert (await tier.holders(user, "me")).since >= 0
    assert await tier.ping("me", 1.0, 0.0, 1) > 0
    begun = await tier.begin("me", begun.cursor)
    await tier.renew(begun.generation, begun.cursor)
    assert not (await tier.read(USERS[0])).trusted
    await store.aclose()
    await origin.aclose()


async def test_writes_and_erasures_show_at_once_in_a_cluster(
    cluster: Cluster, tmp_path: Path
) -> None:
    """L1s hold leases there too; when delete returned, the other process does not show the user."""
    async with two(cluster.url, tmp_path) as (one, other):
        await delivered(one, other, 2, 1.0)
        for user in USERS[:12]:
            await leased(other, user)
            await one.delete(user)
            assert await number(other, user) is None
            assert await number(one, user) is None


async def test_a_slot_that_moves(cluster: Cluster, tmp_path: Path) -> None:
    """Its bucket is published by another server from then on: noticed, and leased again."""
    async with two(cluster.url, tmp_path) as (one, other):
        store = other.inner.inner
        bucket = store.bucket_of(store.digest(USERS[0]))  # type: ignore[attr-defined]
        slot = key_slot(store.bucket_key(bucket, "id"))  # type: ignore[attr-defined]
        losses = count(other, "invalidations", "distrust")
        await asyncio.to_thread(cluster.move, slot)
        end = time.monotonic() + 3
        value = 2
        while time.monotonic() < end:
            value += 1
            await one.upsert_latest(state(USERS[0], value))
            written = time.monotonic()
            while await number(other, USERS[0]) != value:
                assert time.monotonic() - written < 3.5
                await asyncio.sleep(0.005)
        await leased(other, USERS[0])
        assert count(other, "invalidations", "distrust") > losses
        await delivered(one, other, 10**6, 1.0)


@pytest.mark.parametrize("how", ["killed", "frozen"])
async def test_a_node_that_is_lost(cluster: Cluster, tmp_path: Path, how: str) -> None:
    """Reads and writes are answered throughout, none is older than the bound, and when its replica
    took over the leases come back.
    """
    async with two(cluster.url, tmp_path) as (one, other):
        owner = await asyncio.to_thread(cluster.owner, 0)
        owner.kill() if how == "killed" else owner.stop()
        value, start = 1, time.monotonic()
        while time.monotonic() - start < 5:
            value += 1
            user = USERS[value % len(USERS)]
            await one.upsert_latest(state(user, value))
            written = time.monotonic()
            assert await number(one, user) == value
            while await number(other, user) != value:
                assert time.monotonic() - written < 4.0
                await asyncio.sleep(0.005)

        async def replaced() -> bool:
            try:
                return await asyncio.to_thread(cluster.owner, 0) is not owner
            except Exception:
                return False

        if how == "frozen":
            owner.cont()
        else:
            await until(replaced, "a replica that took over")
            owner.start()
        await asyncio.to_thread(cluster.wait)
        for user in USERS:
            await leased(other, user)
        await delivered(one, other, 10**6, 2.0)
        await one.delete(USERS[0])
        assert await number(other, USERS[0]) is None


async def written(store: RedisStore, value: int, *users: str) -> None:
    """Write users as soon as the cluster takes it, whatever is or was done to it."""

    async def taken() -> bool:
        try:
            await asyncio.gather(*(store.upsert_latest(state(user, value)) for user in users))
        except UnavailableError:
            return False
        return True

    await until(taken, "a cluster that takes writes")


async def test_a_store_alone_finds_the_successor_of_a_hung_node(cluster: Cluster) -> None:
    """The time limit that ends the calls cuts off the driver, which then learns nothing of it.

    The others are asked where the keys are now: who calls them meanwhile does not wait either.
    """
    store = RedisStore(cluster.url, timeout=0.5)
    await written(store, 1, *USERS)

    def owned(user: str) -> Server:
        return cluster.owner(cluster.slot(store.key(store.digest(user)).decode()))

    owner = await asyncio.to_thread(owned, "user-1")
    others = [user for user in USERS if owned(user) is not owner]
    owner.stop()
    try:
        for _ in range(2):
            with pytest.raises(UnavailableError):
                await store.upsert_latest(state("user-1", 2))
            assert await number(store, others[0]) == 1
        await written(store, 2, "user-1")
        assert await number(store, "user-1") == 2
    finally:
        owner.cont()
        await store.aclose()
        await asyncio.to_thread(cluster.wait)


async def test_a_node_that_hangs_keeps_its_own_callers_waiting_alone(cluster: Cluster) -> None:
    """However many they are: each node has places of its own."""
    store = RedisStore(cluster.url, max_connections=2)
    await written(store, 1, *USERS)

    def owned(user: str) -> Server:
        return cluster.owner(cluster.slot(store.key(store.digest(user)).decode()))

    owner = await asyncio.to_thread(owned, "user-1")
    other = next(user for user in USERS if owned(user) is not owner)
    owner.stop()
    try:
        calls = [asyncio.create_task(store.get_latest("user-1")) for _ in range(10)]
        await asyncio.sleep(0.1)
        begun = time.monotonic()
        for _ in range(10):
            assert await number(store, other) == 1
        assert time.monotonic() - begun < 0.5
        await asyncio.gather(*calls, return_exceptions=True)
    finally:
        owner.cont()
        await store.aclose()
        await asyncio.to_thread(cluster.wait)


async def test_a_store_closed_right_after_a_time_limit_leaves_no_connection(
    cluster: Cluster,
) -> None:
    """The driver takes itself for closed while it is to ask anew who has which keys."""
    store = RedisStore(cluster.url, timeout=0.2)
    await written(store, 1, *USERS)
    slot = cluster.slot(store.key(store.digest("user-1")).decode())
    owner = await asyncio.to_thread(cluster.owner, slot)
    link: Any = store._link
    nodes = list(link._client.nodes_manager.nodes_cache.values())
    connections = [each for node in nodes for each in node._connections]
    owner.stop()
    try:
        with pytest.raises(UnavailableError):
            await store.upsert_latest(state("user-1", 2))
        assert any(each.is_connected for each in connections)
        await store.aclose()
        assert not any(each.is_connected for each in connections)
    finally:
        owner.cont()
        await asyncio.to_thread(cluster.wait)


async def test_slots_that_move_cost_no_call(cluster: Cluster) -> None:
    """The driver closes all connections with every fifth that it hears of, those in use as well."""
    store = RedisStore(cluster.url)
    await written(store, 1, *USERS)
    slots = {cluster.slot(store.key(store.digest(user)).decode()) for user in USERS}
    moved = asyncio.Event()

    async def write(user: str) -> None:
        while not moved.is_set():
            await store.upsert_latest(state(user, 2))
            assert await number(store, user) == 2

    writers = [asyncio.create_task(write(user)) for user in USERS[:8]]
    for slot in slots:
        await asyncio.to_thread(cluster.move, slot)
    moved.set()
    await asyncio.gather(*writers)
    await store.aclose()


def test_event_loops_that_end_close_their_clients(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """The driver complains of a client that is collected open, in the log of the next loop."""
    store = RedisStore(cluster.url)
    connections: list[Any] = []

    async def use() -> None:
        await asyncio.gather(*(store.upsert_latest(state(user, 1)) for user in USERS))
        gc.collect()
        await asyncio.sleep(0)
        link: Any = store._link
        for node in link._client.nodes_manager.nodes_cache.values():
            connections.extend(node._connections)

    for _ in range(2):
        asyncio.run(use())
        assert connections
        assert not any(each.is_connected for each in connections)
    asyncio.run(store.aclose())
    gc.collect()
    assert "Unclosed" not in caplog.text


async def test_a_cluster_that_moved_is_found_under_the_name_in_the_url() -> None:
    """All nodes come back under other addresses, as in Kubernetes: the name is all that is left.

    redis-py (issue 2472) knows only where it saw the nodes last.
    """
    before: Cluster = started(lambda: Cluster(1, 0))
    after: Cluster = started(lambda: Cluster(1, 0))
    name = Proxy(before.nodes[0].port)
    await name.start()
    store = RedisStore(f"redis+cluster://127.0.0.1:{name.port}")
    try:
        await store.upsert_latest(state("user-1", 1))
        name.target = after.nodes[0].port
        name.reset()
        before.close()
        await written(store, 2, "user-1")
        assert await number(store, "user-1") == 2
    finally:
        await store.aclose()
        await name.close()
        before.close()
        after.close()


async def test_a_failover_by_sentinel(tmp_path: Path) -> None:
    """The primary is killed: an erasure and the writes of that time stand, and all is leased again
    under the successor, which may have missed the last of them.
    """
    group: SentinelGroup = started(SentinelGroup)
    try:
        async with two(group.url, tmp_path) as (one, other):
            primary = await asyncio.to_thread(group.primary)
            await one.delete(USERS[0])
            await one.upsert_latest(state(USERS[1], 2))
            primary.kill()
            start = time.monotonic()
            value = 2
            while time.monotonic() - start < 4:
                value += 1
                await one.upsert_latest(state(USERS[1], value))
                assert await number(one, USERS[1]) == value
                assert await number(other, USERS[0]) is None
                await asyncio.sleep(0.01)
            await trusted(other, USERS[2])
            await leased(other, USERS[2])
            assert await number(other, USERS[1]) == value
            await delivered(one, other, 10**6, 2.0)
            await one.delete(USERS[3])
            assert await number(other, USERS[3]) is None
    finally:
        group.close()
