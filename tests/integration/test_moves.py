"""Shadow and Ramp between real backends, under traffic that writes, erases and goes down."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
from servers import Server

from layered_store import (
    Cached,
    ErasureIncompleteError,
    Ramp,
    RedisStore,
    Shadow,
    SQLStore,
    StateSnapshot,
    StateStore,
    UnavailableError,
    WriteThrough,
    find,
)
from layered_store.interface import Op
from layered_store.layer import AroundLayer

USERS = [f"u-{n}" for n in range(12)]


def state(user_id: str, value: float = 0.5) -> StateSnapshot:
    return StateSnapshot(user_id, updated_at_unix_ms=5, axes={"a": value})


async def traffic(store: StateStore, seed: int, calls: int = 60) -> None:
    """Write, erase and read some users; an unknown outcome is part of life."""
    dice = random.Random(seed)
    for _ in range(calls):
        user_id = dice.choice(USERS)
        kind = dice.random()
        try:
            if kind < 0.5:
                await store.upsert_latest(state(user_id, round(dice.random(), 6)))
            elif kind < 0.6:
                await store.delete(user_id)
            elif kind < 0.7:
                batch = [state(each, round(dice.random(), 6)) for each in dice.sample(USERS, 3)]
                await store.upsert_latest_many(batch)
            else:
                await store.get_latest(user_id)
        except UnavailableError:
            pass


async def settled(shadow: Shadow) -> None:
    for _ in range(6_000):
        if not shadow._background.lanes:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the background does not end")


@pytest.mark.parametrize("candidate_of", ["mysql", "redis"])
async def test_a_shadow_of_the_origin_ends_up_with_the_same(
    candidate_of: str, request: pytest.FixtureRequest, postgres_url: str, redis_url: str
) -> None:
    """Two processes under traffic, each with its shadow: afterwards both databases agree."""

    url = request.getfixturevalue(f"{candidate_of}_url")

    def stack() -> Cached:
        new = (
            RedisStore(url, prefix="candidate:", history_limit=10)
            if candidate_of == "redis"
            else SQLStore(url, timeout=60)
        )
        old = SQLStore(postgres_url, timeout=60)
        shadow = Shadow(old, candidate=new, max_pending=10_000, timeout=60)
        return Cached(RedisStore(redis_url), fallback=shadow)

    async with stack() as one, stack() as two:
        assert "versioned" in find(one, WriteThrough)[0].notes()[0]
        async with asyncio.TaskGroup() as group:
            for number in range(4):
                group.create_task(traffic(one, number))
                group.create_task(traffic(two, 100 + number))
        shadows = [find(each, Shadow)[0] for each in (one, two)]
        for shadow in shadows:
            await settled(shadow)
            assert shadow.mirrored["error"] == shadow.mirrored["dropped"] == 0
        # What two processes wrote at the same moment may have crossed; a later write settles it.
        for user_id in USERS[::2]:
            await one.upsert_latest(state(user_id, 0.25))
        for user_id in USERS[1::2]:
            await two.delete(user_id)
        for shadow in shadows:
            await settled(shadow)
        old, new = shadows[0].inner, shadows[0].candidate
        assert await old.get_latest_many(USERS) == await new.get_latest_many(USERS)
        assert set(await new.get_latest_many(USERS)) == set(USERS[::2])
        for user_id in USERS[1::2]:
            assert await new.get_history(user_id, 5) == []


async def test_a_candidate_that_dies_is_noticed_by_deletes_only(
    redis_server: Callable[..., Server], sqlite_url: str
) -> None:
    """Killed and frozen: calls go on at their speed; a delete says what is pending, and a repeat
    after the return finishes it."""
    server = redis_server()
    candidate = RedisStore(f"redis://127.0.0.1:{server.port}/0", timeout=0.3, connect_timeout=0.3)
    async with Shadow(SQLStore(sqlite_url), candidate=candidate, timeout=0.5) as stack:
        await stack.upsert_latest(state("u-1"))
        await settled(stack)
        assert await candidate.get_latest("u-1") == state("u-1")
        server.stop()
        begun = asyncio.get_running_loop().time()
        for number in range(20):
            await stack.upsert_latest(state(f"u-{number}"))
            await stack.get_latest(f"u-{number}")
        assert asyncio.get_running_loop().time() - begun < 0.4
        with pytest.raises(ErasureIncompleteError) as caught:
            await stack.delete("u-1")
        assert caught.value.pending == ("RedisStore",)
        assert (await stack.health_report()).status.value == "degraded"
        server.cont()
        await settled(stack)
        await stack.delete("u-1")
        assert await candidate.get_latest("u-1") is None
        server.kill()
        await stack.upsert_latest(state("u-2", 0.9))
        assert await stack.get_latest("u-2") == state("u-2", 0.9)
        server.start()


@pytest.mark.parametrize("way", ["layer", "alternative"])
async def test_a_ramp_that_is_turned_under_traffic_shows_nobody_an_older_state(
    way: str, redis_url: str, sqlite_url: str, postgres_url: str
) -> None:
    """One writer and several readers of each user, and somebody who turns the share."""
    inner = SQLStore(sqlite_url)
    if way == "layer":
        ramp = Ramp(inner, layer=lambda store: Cached(RedisStore(redis_url), fallback=store))
    else:
        ramp = Ramp(inner, alternative=SQLStore(postgres_url))
    told = dict.fromkeys(USERS, 0.0)
    running = True

    async def write(user_id: str) -> None:
        for number in range(1, 31):
            await ramp.upsert_latest(state(user_id, number / 100))
            told[user_id] = number / 100

    async def read(user_id: str) -> None:
        latest = 0.0
        while running:
            least = max(latest, told[user_id])
            found = await ramp.get_latest(user_id)
            value = 0.0 if found is None else found.get_axis("a")
            assert value >= least
            latest = value

    async def turn() -> None:
        dice = random.Random(3)
        while running:
            ramp.share = dice.choice([0.0, 0.3, 0.7, 1.0])
            await asyncio.sleep(0.005)

    async with ramp:
        async with asyncio.TaskGroup() as group:
            others = [group.create_task(turn())]
            others += [group.create_task(read(user_id)) for user_id in USERS for _ in range(2)]
            await asyncio.gather(*(write(user_id) for user_id in USERS))
            running = False
        for share in (0.0, 1.0):
            ramp.share = share
            assert await ramp.get_latest_many(USERS) == {
                user_id: state(user_id, 0.3) for user_id in USERS
            }
        for user_id in USERS:
            await ramp.delete(user_id)
        for share in (0.0, 1.0):
            ramp.share = share
            assert await ramp.get_latest_many(USERS) == {}
        assert ramp.behind == 0


@pytest.mark.parametrize("by", ["shadow", "ramp"])
async def test_an_erasure_by_another_process_wins_over_what_is_on_its_way(
    by: str, sqlite_url: str, postgres_url: str
) -> None:
    """A write that the other store has not got yet, when the user is erased elsewhere, is dropped
    there: it began before."""

    entered = asyncio.Event()

    class Held(AroundLayer):
        gate: asyncio.Event | None = None

        async def around(self, op: Op, method: Any, /, *args: Any, **kwargs: Any) -> Any:
            if op is Op.UPSERT_LATEST and self.gate is not None:
                entered.set()
                await self.gate.wait()
            return await method(*args, **kwargs)

    def process() -> tuple[StateStore, Held]:
        other = Held(SQLStore(postgres_url))
        if by == "shadow":
            return Shadow(SQLStore(sqlite_url), candidate=other, timeout=10), other
        return Ramp(SQLStore(sqlite_url), alternative=other, share=1.0), other

    (one, held), (two, _) = process(), process()
    async with one, two:
        await one.upsert_latest(state("u-1", 0.1))
        held.gate = asyncio.Event()
        write = asyncio.create_task(one.upsert_latest(state("u-1", 0.2)))
        await entered.wait()
        await two.delete("u-1")
        held.gate.set()
        await write
        if isinstance(one, Shadow):
            await settled(one)
        assert await two.get_latest("u-1") is None
        assert await held.inner.get_latest("u-1") is None
        assert await held.inner.get_history("u-1", 5) == []
        await two.upsert_latest(state("u-1", 0.3))
        if isinstance(two, Shadow):
            await settled(two)
        assert await held.inner.get_latest("u-1") == state("u-1", 0.3)
