"""Two processes' stacks over one Redis and one database, held up at chosen steps.

Each stack has a clock, caches and connections of its own, so two of them are two processes as far
as the servers can tell.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, ParamSpec, TypeVar

import pytest
import redis

from layered_store import (
    RedisStore,
    SQLStore,
    StateSnapshot,
    UnavailableError,
    WriteThrough,
    explain,
)
from layered_store.call import call_begins
from layered_store.coherence.contract import CacheTier, Versioned
from layered_store.explaining import Held
from layered_store.interface import Op
from layered_store.layer import AroundLayer
from layered_store.testing import Faults
from layered_store.testing.scripted import Gate

P = ParamSpec("P")
T = TypeVar("T")


def state(value: float = 0.5, user_id: str = "u-1") -> StateSnapshot:
    return StateSnapshot(user_id, 0, axes={"a": value})


class Gated(AroundLayer):
    """Holds calls at a gate, before or after they took effect."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.before: dict[Op, Gate] = {}
        self.after: dict[Op, Gate] = {}

    async def around(
        self, op: Op, method: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        if (gate := self.before.pop(op, None)) is not None:
            await gate.pass_through()
        result = await method(*args, **kwargs)
        if (gate := self.after.pop(op, None)) is not None:
            await gate.pass_through()
        return result


class Process:
    """One process: a stack whose steps can be held up."""

    def __init__(self, redis_url: str, sql_url: str) -> None:
        self.tier = Gated(RedisStore(redis_url))
        self.record = Gated(SQLStore(sql_url))
        self.stack = WriteThrough(self.tier, origin=self.record)


@pytest.fixture
async def pair(redis_url: str, sqlite_url: str) -> AsyncIterator[tuple[Process, Process]]:
    processes = Process(redis_url, sqlite_url), Process(redis_url, sqlite_url)
    for process in processes:
        await process.stack.open()
    yield processes
    for process in processes:
        await process.stack.aclose()


async def in_redis(process: Process, user_id: str = "u-1") -> Held:
    tiers = await explain(process.stack, user_id)
    return next(tier.held for tier in tiers if tier.kind == "redis")


@pytest.mark.parametrize("write", ["upsert", "delete"])
async def test_case_6_a_fill_in_flight_never_lands_after_a_write(
    pair: tuple[Process, Process], write: str
) -> None:
    """A reader of one process has read the database; another process writes or erases; the fill
    comes too late."""
    ours, theirs = pair
    await theirs.stack.upsert_latest(state(0.1))
    await theirs.tier.inner.command("DEL", theirs.tier.inner.key(theirs.tier.inner.digest("u-1")))
    gate = ours.record.after[Op.GET_LATEST] = Gate()
    reader = asyncio.create_task(ours.stack.get_latest("u-1"))
    await gate.entered.wait()
    if write == "upsert":
        await theirs.stack.upsert_latest(state(0.2))
    else:
        await theirs.stack.delete("u-1")
    gate.open()
    assert await reader == state(0.1)
    expected = state(0.2) if write == "upsert" else None
    for process in pair:
        assert await process.stack.get_latest("u-1") == expected
    if write == "delete":
        assert await in_redis(ours) is not Held.STATE


async def test_case_26_the_tier_follows_the_order_of_the_database(
    pair: tuple[Process, Process],
) -> None:
    """Of two writers the one whose commit came first reaches Redis last: the later one stands."""
    ours, theirs = pair
    gate = ours.tier.before[Op.UPSERT_LATEST] = Gate()
    first = asyncio.create_task(ours.stack.upsert_latest(state(0.1)))
    await gate.entered.wait()
    await theirs.stack.upsert_latest(state(0.2))
    gate.open()
    await first
    for process in pair:
        assert await process.stack.get_latest("u-1") == state(0.2)
    assert [s.axes["a"] for s in await ours.stack.get_history("u-1", 9)] == [0.2, 0.1]


async def test_case_34_a_writer_that_dies_after_its_commit_is_repaired_by_others(
    pair: tuple[Process, Process],
) -> None:
    """The copy that it did not replace is gone within a repair pass, in any process."""
    ours, theirs = pair
    await theirs.stack.upsert_latest(state(0.1))
    gate = ours.tier.before[Op.UPSERT_LATEST] = Gate()
    dying = asyncio.create_task(ours.stack.upsert_latest(state(0.2)))
    await gate.entered.wait()
    dying.cancel()
    await asyncio.gather(dying, return_exceptions=True)
    async with asyncio.timeout(10):
        while await theirs.stack.get_latest("u-1") != state(0.2):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_case_25_and_28_a_copy_only_moves_up(pair: tuple[Process, Process]) -> None:
    """An older version never replaces a newer one, also where doubles would confuse the two."""
    store = pair[0].tier.inner
    tier = store.capability(CacheTier)
    assert tier is not None
    top = 2**53 - 2
    for newer, older in ((top, top - 1), (1_795_000_000_000_001, 1_795_000_000_000_000)):
        user = f"v-{newer}"
        ticket = await tier.ticket(user)
        await tier.put(user, Versioned(newer, state(0.9, user)), ticket)
        await tier.put(user, Versioned(older, state(0.1, user)), await tier.ticket(user))
        read = await tier.read(user)
        assert read.found == Versioned(newer, state(0.9, user))


async def test_a_version_that_the_database_gave_twice_leaves_no_copy_of_the_first(
    pair: tuple[Process, Process],
) -> None:
    """A failover to a replica that never had the last write loses it; the next one has its number.

    The copy of what was lost would else be shown until it runs out, and no later read would show
    the write that was acknowledged.
    """
    tier = pair[0].tier.inner.capability(CacheTier)
    assert tier is not None
    lost, written = Versioned(7, state(0.2)), Versioned(7, state(0.3))
    await tier.put("u-1", lost, await tier.ticket("u-1"))
    await tier.put("u-1", lost, None)  # a repeat of the same
    assert (await tier.read("u-1")).found == lost
    await tier.put("u-1", written, None)
    read = await tier.read("u-1")
    assert read.trusted
    assert read.found is None


async def test_case_13_a_late_write_of_another_process_does_not_bring_the_user_back(
    pair: tuple[Process, Process],
) -> None:
    """Begun before the erasure and held up above the database until it returned."""
    ours, theirs = pair
    await theirs.stack.upsert_latest(state(0.1))
    gate = ours.record.before[Op.UPSERT_LATEST] = Gate()
    late = asyncio.create_task(ours.stack.upsert_latest(state(0.2)))
    await gate.entered.wait()
    await asyncio.sleep(0.05)  # what the two clocks may be apart is measured, and is less
    await theirs.stack.delete("u-1")
    gate.open()
    await late
    for process in pair:
        assert await process.stack.get_latest("u-1") is None
        assert await process.stack.get_history("u-1", 9) == []
    await ours.stack.upsert_latest(state(0.3))
    assert await theirs.stack.get_latest("u-1") == state(0.3)


async def test_case_29_a_repeated_write_counts_once_through_all_tiers(
    pair: tuple[Process, Process],
) -> None:
    """Its first attempt was cut off after the commit, and another write came in between."""
    ours, theirs = pair
    snapshot = state(0.1)
    with call_begins():
        gate = ours.record.after[Op.UPSERT_LATEST] = Gate()
        attempt = asyncio.create_task(ours.stack.upsert_latest(snapshot))
        await gate.entered.wait()
        attempt.cancel()
        await asyncio.gather(attempt, return_exceptions=True)
        await asyncio.create_task(_alone(theirs.stack.upsert_latest(state(0.2))))
        await ours.stack.upsert_latest(snapshot)
    for process in pair:
        assert await process.stack.get_latest("u-1") == state(0.2)
        history = await process.stack.get_history("u-1", 9)
        assert [s.axes["a"] for s in history] == [0.2, 0.1]


async def _alone(work: Awaitable[T]) -> T:
    """Await a write that belongs to no call of this context."""
    from layered_store.call import _current

    _current.set(None)
    return await work


async def test_a_token_is_for_one_filler(pair: tuple[Process, Process]) -> None:
    """Readers who miss together get the same token; the first fill takes it, the second is void."""
    ours, theirs = pair
    tiers = [process.tier.inner.capability(CacheTier) for process in pair]
    await theirs.record.upsert_latest(state(0.1))
    tickets = [await tier.ticket("u-1") for tier in tiers]
    assert tickets[0] == tickets[1]
    record = await ours.record.inner.read("u-1")
    await tiers[0].fill("u-1", record, tickets[0])
    await tiers[1].fill("u-1", Versioned(record.version - 1, state(0.9)), tickets[1])
    assert (await tiers[1].read("u-1")).found == record


async def test_writes_without_the_tier_share_repair_passes(sqlite_url: str) -> None:
    """While Redis is away the database is not asked for its head with every write."""
    store = SQLStore(sqlite_url)
    heads = 0
    real = store.head

    async def counted() -> str:
        nonlocal heads
        heads += 1
        return await real()

    store.head = counted  # type: ignore[method-assign]
    stack = WriteThrough(RedisStore("redis://127.0.0.1:1/0"), origin=store)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    for index in range(200):
        await stack.upsert_latest(state(0.5, f"u-{index}"))
    assert heads <= 2 + (loop.time() - begun) / 0.05
    await stack.aclose()


@pytest.mark.parametrize("write", ["upsert", "upsert many", "delete"])
async def test_a_write_that_may_have_happened_leaves_no_copy_to_be_read(
    write: str, redis_url: str, sqlite_url: str
) -> None:
    """It took effect and then failed: from then on this process reads the database, and not the
    older copy that the repair has still to remove."""
    record = Faults(SQLStore(sqlite_url))
    stack = WriteThrough(RedisStore(redis_url), origin=record)
    await stack.upsert_latest(state(0.1))
    assert await stack.get_latest("u-1") == state(0.1)
    operation = {
        "upsert": Op.UPSERT_LATEST, "upsert many": Op.UPSERT_LATEST_MANY, "delete": Op.DELETE
    }[write]  # fmt: skip
    record.fail(1, fault="error_after", operations=[operation])
    with pytest.raises(UnavailableError):
        if write == "delete":
            await stack.delete("u-1")
        elif write == "upsert":
            await stack.upsert_latest(state(0.2))
        else:
            await stack.upsert_latest_many([state(0.2)])
    expected = None if write == "delete" else state(0.2)
    assert await stack.get_latest("u-1") == expected
    assert (await stack.get_latest_many(["u-1"])).get("u-1") == expected
    await stack.aclose()


def _another_programs(kind: str, client: redis.Redis) -> None:
    """Put something else under every key, as a program with the same keys would."""
    for key in client.keys("*"):
        client.delete(key)
        if kind == "text":
            client.set(key, "another program's")
        elif kind == "list":
            client.rpush(key, "a")
        else:
            client.hset(key, mapping={"born": "x", "pass": "y", "gen": "z", "until": "w"})


@pytest.mark.parametrize("kind", ["text", "list", "hash"])
async def test_whatever_stands_under_the_keys_is_replaced(
    kind: str, pair: tuple[Process, Process], redis_url: str
) -> None:
    """Records, guard, register, lock and the repairer's place alike: reads and writes go on, an
    erasure finishes, and soon the tier holds copies again. A lock of another program, which never
    runs out, stops no repair."""
    one, other = pair
    await one.stack.upsert_latest(state(0.1))
    await one.stack.upsert_latest(state(0.1, "u-2"))
    with contextlib.closing(redis.Redis.from_url(redis_url)) as client:
        _another_programs(kind, client)
        for process in pair:
            assert await process.stack.get_latest("u-1") == state(0.1)
        await one.stack.upsert_latest(state(0.2))
        assert await other.stack.get_latest("u-1") == state(0.2)
        _another_programs(kind, client)
        await one.stack.delete("u-2")
        assert await other.stack.get_latest("u-2") is None
        _another_programs(kind, client)
        for _ in range(100):
            if await other.stack.get_latest("u-1") and await in_redis(other) is Held.STATE:
                break
            await asyncio.sleep(0.05)
        else:
            pytest.fail("the tier was not repaired")


@pytest.mark.parametrize("cursor", [b"4f0c.17", b"another program's", b"\xff"])
async def test_a_cursor_that_the_database_does_not_know_begins_a_new_generation(
    cursor: bytes, pair: tuple[Process, Process], redis_url: str
) -> None:
    """As another kind of store left it, which was the system of record before: no copy of that
    time counts, and soon the tier holds copies again."""
    one, other = pair
    await one.stack.upsert_latest(state(0.1))
    with contextlib.closing(redis.Redis.from_url(redis_url)) as client:
        (key,) = client.keys("*:repair")
        (guard,) = client.keys("*:guard")
        generation = client.hget(key, "gen")
        client.hset(key, "cursor", cursor)
        client.delete(guard)
        for _ in range(100):
            if client.hget(key, "gen") != generation and client.exists(guard):
                break
            await asyncio.sleep(0.05)
        else:
            pytest.fail("the tier was not repaired")
    assert await other.stack.get_latest("u-1") == state(0.1)


async def test_reads_of_one_turn_share_a_script(redis_url: str, sqlite_url: str) -> None:
    """A hundred copies are two script calls, the first of which leaves before the turn is over.

    A broken one is read from the database alone.
    """
    async with (
        SQLStore(sqlite_url) as record,
        WriteThrough(RedisStore(redis_url), origin=record) as stack,
    ):
        tier = stack.inner
        assert isinstance(tier, RedisStore)
        users = [f"u-{n}" for n in range(100)]
        await stack.upsert_latest_many(state(n / 100, user) for n, user in enumerate(users))
        await asyncio.gather(*map(stack.get_latest, users))
        key = tier.key(tier.digest("u-7"))
        await tier.command("SET", key, b"nonsense")
        with redis.Redis.from_url(redis_url) as raw:
            before = raw.info("commandstats")["cmdstat_mget"]["calls"]
            found = await asyncio.gather(*map(stack.get_latest, users))
            after = raw.info("commandstats")["cmdstat_mget"]["calls"]
        assert [each and each.axes["a"] for each in found] == [n / 100 for n in range(100)]
        assert after - before == 2
        assert tier.corrupt_records == 1


async def test_reads_that_share_a_script_all_learn_that_it_is_gone(
    redis_url: str, sqlite_url: str
) -> None:
    """Each is answered by the database; the next ones find the scripts again."""
    async with (
        SQLStore(sqlite_url) as record,
        WriteThrough(RedisStore(redis_url), origin=record) as stack,
    ):
        users = [f"u-{n}" for n in range(20)]
        await stack.upsert_latest_many(state(n / 100, user) for n, user in enumerate(users))
        with redis.Redis.from_url(redis_url) as raw:
            raw.script_flush()
        for _ in range(2):
            found = await asyncio.gather(*map(stack.get_latest, users))
            assert [each and each.axes["a"] for each in found] == [n / 100 for n in range(20)]


FORKED = """
import asyncio, os, sys
from layered_store import Cached, RedisStore, SQLStore, StateSnapshot

stack = Cached(RedisStore({redis!r}), fallback=SQLStore({sql!r}))


def hits():
    return sum(each.value for each in stack.samples() if each.labels == ("hit",))


async def hold(user_id):
    await stack.upsert_latest(StateSnapshot(user_id))
    before = hits()
    while hits() == before:  # its own write may still come over the channel
        assert await stack.get_latest(user_id) is not None
        await asyncio.sleep(0)


async def reads():
    before = hits()
    await stack.get_latest("u-0")
    if hits() != before:
        return 3  # answered under the parent's lease
    await hold("u-1")
    os.write(tell_held, b"x")
    os.read(erased, 1)  # on purpose without awaiting: it hears nothing of the erasure
    return 0 if await stack.get_latest("u-1") is None else 1


async def erases():
    await stack.get_latest("u-0")
    await asyncio.to_thread(os.read, holds, 1)
    await stack.delete("u-1")
    os.write(tell_erased, b"x")
    return 0


(holds, tell_held), (erased, tell_erased) = os.pipe(), os.pipe()
if {used}:
    loop = asyncio.new_event_loop()
    loop.run_until_complete(hold("u-0"))


def child(work):
    pid = os.fork()
    if not pid:
        code = 2
        try:
            code = asyncio.run(work())
        finally:
            os.write(tell_held, b"x")  # whatever went wrong, the other need not wait
            os._exit(code)
    return pid


for pid in [child(reads), child(erases)]:
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("used", [False, True])
def test_children_of_one_parent_are_told_apart(
    redis_url: str,
    sqlite_url: str,
    used: bool,  # noqa: FBT001
) -> None:
    """A stack built before a fork: an erasure by one child waits for the lease of the other."""
    done = subprocess.run(  # noqa: S603
        [
            *(sys.executable, "-W", "ignore::DeprecationWarning"),  # of forks beside threads
            *("-c", FORKED.format(redis=redis_url, sql=sqlite_url, used=used)),
        ],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.stdout.split(), done.stderr) == (["0", "0"], "")
