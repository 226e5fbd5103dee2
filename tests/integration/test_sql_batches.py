"""Batches on real databases: as if each call had gone alone, in its order."""

from __future__ import annotations

import asyncio
import uuid
from collections import defaultdict
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from layered_store.errors import UnavailableError
from layered_store.layers.retry import Retry
from layered_store.snapshot import StateSnapshot
from layered_store.stores.memory import MemoryStore
from layered_store.stores.sql import SQLStore

if TYPE_CHECKING:
    from pathlib import Path

USERS = ("ann", "bob", "cat", "dan")


@pytest.fixture(params=["sqlite", "memory", "postgres", "mysql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path}/states.db"
    if request.param == "memory":
        return "sqlite://"
    return str(request.getfixturevalue(f"{request.param}_url"))


def build(url: str, **options: Any) -> SQLStore:
    tag = uuid.uuid4().hex[:12]
    names = {"latest_table": f"latest_{tag}", "history_table": f"history_{tag}"}
    return SQLStore(url, **names, **options)


def state(user_id: str, value: int) -> StateSnapshot:
    return StateSnapshot(user_id, axes={"a": value / 10_000})


def values(history: list[StateSnapshot]) -> list[int]:
    return [round(snapshot.get_axis("a") * 10_000) for snapshot in reversed(history)]


@pytest.mark.parametrize("seed", range(3))
async def test_calls_made_together_end_as_one_after_another(url: str, seed: int) -> None:
    """A model that takes the same calls one by one ends with the same states and histories.

    Erasures come in waves of their own: one drops the writes that began before it returned.
    """
    random = Random(seed)
    async with build(url, history_limit=None) as store, MemoryStore(history_limit=None) as model:
        for wave in range(6):
            todo = [(random.choice(USERS), n + 100 * wave) for n in range(80)]
            reads = [store.get_latest(random.choice(USERS)) for _ in range(20)]
            await asyncio.gather(*(store.upsert_latest(state(*each)) for each in todo), *reads)
            for each in todo:
                await model.upsert_latest(state(*each))
            gone = random.sample(USERS, random.choice((0, 1, 2)))
            await asyncio.gather(*map(store.delete, [*gone, *gone]))
            for user in gone:
                await model.delete(user)
            for user in USERS:
                expected = await model.get_latest(user)
                found = await store.get_latest(user)
                assert (found and found.axes) == (expected and expected.axes)
                ours = values(await store.get_history(user, 1_000))
                assert ours == values(await model.get_history(user, 1_000))
            many = await store.get_latest_many(USERS)
            assert set(many) == set(await model.get_latest_many(USERS))


@pytest.mark.parametrize("seed", range(2))
async def test_cancelled_callers_harm_nobody(url: str, seed: int) -> None:
    """Each write that was answered is stored once, in its order; the others once or not at all."""
    random = Random(seed)
    async with build(url, history_limit=None) as store:
        called: dict[str, list[int]] = defaultdict(list)
        answered: set[int] = set()

        async def write(user: str, value: int) -> None:
            called[user].append(value)
            await store.upsert_latest(state(user, value))
            answered.add(value)

        for wave in range(10):
            tasks = [
                asyncio.create_task(write(random.choice(USERS), n + 100 * wave)) for n in range(30)
            ]
            for task in random.sample(tasks, 8):
                for _ in range(random.choice((0, 1, 3, 9))):
                    await asyncio.sleep(0)
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert result is None or isinstance(result, asyncio.CancelledError), result
        for user in USERS:
            stored = values(await store.get_history(user, 1_000))
            assert len(set(stored)) == len(stored)
            places = [called[user].index(value) for value in stored]
            assert places == sorted(places)
            assert answered & set(called[user]) <= set(stored)


async def test_connections_that_are_killed_lose_and_double_nothing(postgres_url: str) -> None:
    """Repeated by ``Retry``, each write counts once, whenever its connection went."""
    store = build(postgres_url, history_limit=None)
    other = SQLStore(postgres_url, latest_table=store.latest_table,
                     history_table=store.history_table)  # fmt: skip
    stack = Retry(store, attempts=10, budget=None, base_delay=0.01)
    await stack.upsert_latest(state("ann", 0))
    ending = False

    async def kill() -> None:
        command = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            f" WHERE pid <> pg_backend_pid() AND query LIKE '%{store.latest_table}%'"
        )
        while not ending:
            await other._run("test", lambda session: session.command(command))
            await asyncio.sleep(0.02)

    killer = asyncio.create_task(kill())
    written: dict[str, list[int]] = defaultdict(list)

    async def write(user: str, first: int) -> None:
        for value in range(first, first + 20):
            try:
                await stack.upsert_latest(state(user, value))
            except UnavailableError as exc:  # every attempt met a kill
                assert exc.retryable
                continue
            written[user].append(value)

    await asyncio.gather(
        *(write(user, 1 + 100 * number + 1_000 * n)
          for n, user in enumerate(USERS) for number in range(5))
    )  # fmt: skip
    ending = True
    await killer
    for user in USERS:
        stored = values(await other.get_history(user, 1_000))
        assert len(set(stored)) == len(stored), "a write was stored twice"
        assert set(written[user]) <= set(stored), "an acknowledged write is gone"
    await other.aclose()
    await stack.aclose()


async def test_a_row_that_cannot_be_read_fails_its_reader_alone(url: str) -> None:
    """In one batch: one reader is told of the damage, the others get their states."""
    async with build(url) as store:
        await store.upsert_latest_many([state(user, 1) for user in USERS])
        table = store.metadata.tables[store.latest_table]
        damage = table.update().where(table.c.digest == store.digest("bob"))
        statement = damage.values(payload=b"\x01\xc1damage")
        await store._run("test", lambda session: session.run(statement, [{}]), writes=True)
        results = await asyncio.gather(*map(store.get_latest, USERS), return_exceptions=True)
        kinds = [type(result).__name__ for result in results]
        assert kinds == ["StateSnapshot", "CorruptDataError", "StateSnapshot", "StateSnapshot"]


async def test_a_write_too_large_for_the_server_fails_alone(mysql_url: str) -> None:
    """MariaDB hangs up on it: the others of its batch are stored all the same."""

    class Noted(StateSnapshot):
        note: str = ""

    async with build(mysql_url, snapshot_type=Noted, timeout=20) as store:
        await store.upsert_latest(Noted("ann"))
        large = Noted("cat", note="x" * 20_000_000)
        calls = [Noted("ann"), Noted("bob"), large, Noted("dan")]
        results = await asyncio.gather(*map(store.upsert_latest, calls), return_exceptions=True)
        assert isinstance(results[2], UnavailableError)
        assert [result for result in results if result is not results[2]] == [None] * 3
        assert set(await store.get_latest_many(USERS)) == {"ann", "bob", "dan"}
