"""Batches on real databases: as if each call had gone alone, in its order."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import uuid
from collections import defaultdict
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from layered_store.call import Call, call_continues
from layered_store.clock import SYSTEM_CLOCK
from layered_store.errors import StoreError, UnavailableError
from layered_store.layers.retry import Retry
from layered_store.snapshot import StateSnapshot
from layered_store.stores.memory import MemoryStore
from layered_store.stores.sql import SQLStore, transactions
from layered_store.stores.sql.postgres import PostgresWay

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


@pytest.fixture(params=["sqlite", "postgres", "mysql"])
def shared_url(request: pytest.FixtureRequest) -> str:
    """A database that several processes can open."""
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


async def test_two_processes_in_each_others_way_do_not_show_it(shared_url: str) -> None:
    """Batches of the same users in opposite orders, and erasures of them: no call fails, and in the
    end each user is there who was written after the last erasure.
    """
    one = build(shared_url, timeout=60)
    names = {"latest_table": one.latest_table, "history_table": one.history_table}
    two = SQLStore(shared_url, timeout=60, **names)

    async def traffic(store: SQLStore, seed: int, users: tuple[str, ...]) -> None:
        random = Random(seed)
        for number in range(30):
            if random.random() < 0.2:
                await store.delete(random.choice(users))
            await store.upsert_latest_many([state(user, number) for user in users])

    async with one, two, asyncio.TaskGroup() as group:
        for seed in range(3):
            group.create_task(traffic(one, seed, USERS))
            group.create_task(traffic(two, 10 + seed, USERS[::-1]))
    async with SQLStore(shared_url, **names) as after:
        await after.upsert_latest_many([state(user, 99) for user in USERS])
        assert set(await after.get_latest_many(USERS)) == set(USERS)


@pytest.mark.parametrize(
    ("offset", "stands"), [(-0.5, False), (0.0, None), (0.5, True)], ids=["before", "tie", "after"]
)
async def test_a_write_that_began_with_an_erasure_elsewhere(
    shared_url: str, offset: float, stands: bool | None
) -> None:
    """Half a second before it the write is dropped, half a second after it is stored. At the very
    moment, nobody saw the erasure yet: either will do, and an error will not.
    """
    one = build(shared_url)
    other = SQLStore(shared_url, latest_table=one.latest_table, history_table=one.history_table)
    latest = one.metadata.tables[one.latest_table]

    async def erased_ago(session: Any) -> float:
        """Return the moment of the erasure on the clock of this process."""
        rows = await session.rows(latest.select(), {})
        now = await session.rows(session.statements.now, session.timed({}))
        return SYSTEM_CLOCK.monotonic() - (now[0][0] - rows[0].erased_at) / 1e6

    async with one, other:
        for number in range(20):
            await one.upsert_latest(state("ann", number))
            await other.delete("ann")
            moment = await one._access.run("test", erased_ago)
            call = Call(uuid.uuid4().bytes, moment + offset)
            with call_continues(call):
                await one.upsert_latest(state("ann", 5))
            found = await other.get_latest("ann")
            assert call.superseded is (found is None)
            if stands is not None:
                assert (found is not None) is stands


@pytest.mark.parametrize("fixture", ["postgres_url", "mysql_url"])
async def test_nobody_sees_an_erasure_within_what_counts_as_its_moment(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    """A write that cannot be told from the erasure is dropped: so nobody who saw the user gone may
    begin one so early.
    """
    async with build(request.getfixturevalue(fixture)) as store:
        await store.upsert_latest(state("ann", 1))
        await store.get_latest("ann")
        begun = SYSTEM_CLOCK.monotonic()
        await store.delete("ann")
        assert SYSTEM_CLOCK.monotonic() - begun > transactions._HIDDEN_SECONDS


@pytest.mark.parametrize("together", [1, 2, 4])
async def test_histories_stay_short_however_writes_come(shared_url: str, together: int) -> None:
    """Trimming is due with every so many versions, also when a batch goes past that one."""
    async with build(shared_url, history_limit=20) as store:
        await store.upsert_latest(state("u", 1))
        if (await store.read("u")).version % 2 == 0:  # else no batch ends with an even one
            await store.upsert_latest(state("u", 2))
        for number in range(150 // together):
            await asyncio.gather(
                *(store.upsert_latest(state("u", number * 10 + n)) for n in range(together))
            )
        engine = create_async_engine(shared_url)
        async with engine.connect() as connection:
            counted = text(f"SELECT count(*) FROM {store.history_table}")  # noqa: S608
            kept = (await connection.execute(counted)).scalar_one()
        await engine.dispose()
        assert 20 <= kept < 20 + 64 + 5
        assert len(await store.get_history("u", 100)) == 20


async def test_a_limit_that_was_lowered_holds_for_older_entries_too(shared_url: str) -> None:
    """Nothing that is not shown any more stays for ever, whatever trims were left out."""
    async with build(shared_url, history_limit=None) as before:
        await before.upsert_latest_many(state("u", number) for number in range(150))
        names = {"latest_table": before.latest_table, "history_table": before.history_table}
        async with SQLStore(shared_url, history_limit=20, **names) as store:
            for number in range(150, 420):
                await store.upsert_latest(state("u", number))
            engine = create_async_engine(shared_url)
            async with engine.connect() as connection:
                counted = text(f"SELECT count(*) FROM {store.history_table}")  # noqa: S608
                kept = (await connection.execute(counted)).scalar_one()
            await engine.dispose()
            assert 20 <= kept <= 20 + 64
            assert values(await store.get_history("u", 100)) == list(range(400, 420))


async def test_plans_made_while_the_tables_are_small_stay_good(postgres_url: str) -> None:
    """A server keeps a plan while a table grows: none may look through a whole table."""
    async with build(postgres_url) as store:
        await store.upsert_latest(state("first", 1))
        home = store._access.home("get_latest")
        way = store._access.way
        assert isinstance(way, PostgresWay)
        texts = way.texts
        desk = await home.desks.take()
        try:
            await desk.driver.execute("SET plan_cache_mode = force_generic_plan")
            for name in ("read", "read_many", "histories", "write", "write_one"):
                prepared = await desk.driver.prepare(getattr(texts, name))
                nulls = ", ".join("NULL" for _ in prepared.get_parameters())
                plan = await desk.driver.fetch(
                    f"EXPLAIN EXECUTE {prepared.get_name()}({nulls})"
                )
                lines = "\n".join(row[0] for row in plan)
                assert "Index Scan" in lines
                assert "Seq Scan" not in lines, f"{name}:\n{lines}"
        finally:
            await home.desks.give(desk, broken=True)


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
            await other._access.run("test", lambda session: session.command(command))
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


def table_of_states(store: SQLStore) -> Any:
    """The table whose rows hold the latest states: on SQLite the history."""
    latest = store.metadata.tables[store.latest_table]
    return latest if "payload" in latest.c else store.metadata.tables[store.history_table]


async def test_a_row_that_cannot_be_read_fails_its_reader_alone(url: str) -> None:
    """In one batch: one reader is told of the damage, the others get their states."""
    async with build(url) as store:
        await store.upsert_latest_many([state(user, 1) for user in USERS])
        table = table_of_states(store)
        damage = table.update().where(table.c.digest == store.digest("bob"))
        statement = damage.values(payload=b"\x01\xc1damage")
        await store._access.run("test", lambda session: session.run(statement, [{}]))
        results = await asyncio.gather(*map(store.get_latest, USERS), return_exceptions=True)
        kinds = [type(result).__name__ for result in results]
        assert kinds == ["StateSnapshot", "CorruptDataError", "StateSnapshot", "StateSnapshot"]
        for users in (USERS, ["bob"]):
            found = await store.get_latest_many(users)
            assert list(found) == [user for user in users if user != "bob"]


async def test_ids_that_the_encoding_lacks_fail_alone(mysql_url: str) -> None:
    """They are refused, and the database counts as well: no repeat helps."""
    store = build(f"{mysql_url}?charset=latin1")
    users = ["ann", "имя", "слово", "ещё", "bob"]
    results = await asyncio.gather(
        *(store.upsert_latest(state(user, 1)) for user in users), return_exceptions=True
    )
    for user, result in zip(users, results, strict=True):
        if user.isascii():
            assert result is None
        else:
            assert type(result) is StoreError
            assert not result.retryable
    assert set(await store.get_latest_many(users)) == {"ann", "bob"}
    await store.aclose()


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


async def test_an_erasure_that_is_repeated_counts_once(shared_url: str) -> None:
    """At the same time and afterwards: one version, and what was written since stays."""
    async with build(shared_url) as store:
        await store.upsert_latest_many([state("ann", 1), state("bob", 1)])
        call = Call(os.urandom(16), SYSTEM_CLOCK.monotonic(), SYSTEM_CLOCK)
        with call_continues(call):
            first, same = await asyncio.gather(store.erase("ann"), store.erase("ann"))
        assert first == same
        call.superseded = False
        await store.upsert_latest(state("ann", 2))
        call.ended = False  # its reply was lost, so it comes once more
        with call_continues(call):
            again = await store.erase("ann")
        assert again >= first
        assert call.superseded
        for user, value in (("ann", 2), ("bob", 1)):
            found = await store.get_latest(user)
            assert found is not None and values([found]) == [value]
        assert values(await store.get_history("ann", 9)) == [2]


@pytest.mark.parametrize("fixture", ["sqlite_url", "mysql_url"])
async def test_a_counter_that_somebody_emptied_is_told(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    """Nothing is written without a number, and the error says how to get one again."""
    url = request.getfixturevalue(fixture)
    async with build(url) as store:
        await store.upsert_latest(state("ann", 1))
        engine = create_async_engine(url)
        async with engine.begin() as connection:
            await connection.execute(text(f"DELETE FROM {store.latest_table}_counter WHERE id = 1"))
        await engine.dispose()
        with pytest.raises(UnavailableError, match="create_tables=True") as caught:
            await store.upsert_latest(state("ann", 2))
        assert not caught.value.retryable
        found = await store.get_latest("ann")
        assert found is not None and values([found]) == [1]
        assert values(await store.get_history("ann", 9)) == [1]


async def test_a_batch_of_which_the_database_refuses_a_part_says_that_it_took_effect(
    tmp_path: Path,
) -> None:
    """The others are stored, and the error does not read as if nothing had been."""
    path = tmp_path / "states.db"
    async with SQLStore(f"sqlite+aiosqlite:///{path}") as store:
        await store.upsert_latest(state("ann", 1))
        await store.upsert_latest(state("bob", 1))
        with sqlite3.connect(path) as connection:
            connection.execute(
                "CREATE TRIGGER refusing BEFORE UPDATE ON layered_store_latest"
                " WHEN new.user_id = 'bob' BEGIN SELECT RAISE(ABORT, 'not bob'); END"
            )
        connection.close()
        with pytest.raises(StoreError) as caught:
            await store.upsert_latest_many([state("bob", 2)])
        assert not caught.value.outcome_unknown
        with pytest.raises(StoreError) as caught:
            await store.upsert_latest_many([state("ann", 2), state("bob", 2)])
        assert caught.value.outcome_unknown
        assert values(await store.get_history("ann", 9)) == [1, 2]
        assert values(await store.get_history("bob", 9)) == [1]


@pytest.mark.parametrize(
    ("code", "stored"), [("40001", True), ("23514", True), ("53100", False), ("57P01", False)]
)
async def test_a_lone_write_that_met_a_conflict_is_stored_in_a_transaction(
    postgres_url: str, code: str, stored: bool
) -> None:
    """So is one that the server refused for what may concern it alone; a full disk, and an end of
    which nobody knows the outcome, are told at once."""
    async with SQLStore(postgres_url) as store:
        await store.upsert_latest(state("ann", 1))
        engine = create_async_engine(postgres_url)
        async with engine.begin() as connection:
            for command in (
                "CREATE SEQUENCE tries",
                "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
                " IF nextval('tries') = 1 THEN"
                f" RAISE EXCEPTION USING ERRCODE = '{code}'; END IF; RETURN NULL; END $$",
                "CREATE TRIGGER refusing BEFORE INSERT ON layered_store_history"
                " FOR EACH STATEMENT EXECUTE FUNCTION refuse()",
            ):
                await connection.execute(text(command))
        if stored:
            await store.upsert_latest(state("ann", 2))
        else:
            with pytest.raises(UnavailableError) as caught:
                await store.upsert_latest(state("ann", 2))
            assert caught.value.outcome_unknown == (code == "57P01")
        async with engine.begin() as connection:
            tries = (await connection.execute(text("SELECT last_value FROM tries"))).scalar()
        await engine.dispose()
        assert tries == 1 + stored
        assert values(await store.get_history("ann", 9)) == [1, 2][: tries]
