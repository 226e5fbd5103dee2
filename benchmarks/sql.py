"""Rows 8 and 9: reads and upserts in SQLite and PostgreSQL, against their drivers."""

from __future__ import annotations

import asyncio
from itertools import count
from typing import TYPE_CHECKING, Any

import aiosqlite

from benchmarks.figures import Figure, Result
from benchmarks.rounds import Costs, compare, load
from benchmarks.setting import Setting, encoded, snapshot, user
from layered_store import SQLStore

if TYPE_CHECKING:
    from pathlib import Path

    from layered_store import StateSnapshot

__all__ = ["run"]

_USERS = 2_000
_POOL = 10
_GET = "SELECT user_id, data FROM raw WHERE user_id = {}"
_PUT = (
    "INSERT INTO raw (user_id, data) VALUES ({}, {})"
    " ON CONFLICT (user_id) DO UPDATE SET data = excluded.data"
)


async def run(setting: Setting) -> list[Result]:
    """Measure both."""
    return [await _sqlite(setting), await _postgres(setting)]


async def _open_raw(path: Path, synchronous: str, **options: Any) -> aiosqlite.Connection:
    raw = await aiosqlite.connect(path, **options)
    for pragma in ("journal_mode=WAL", f"synchronous={synchronous}"):
        await raw.execute(f"PRAGMA {pragma}")
    await raw.execute("CREATE TABLE raw (user_id TEXT PRIMARY KEY, data BLOB)")
    return raw


async def _sqlite(setting: Setting) -> Result:
    raw = await _open_raw(setting.folder / "raw.db", "FULL")  # as durable as ours
    lax = await _open_raw(setting.folder / "lax.db", "NORMAL")
    # As ``isolation_level=None`` has it: a statement is a transaction.
    each = await _open_raw(setting.folder / "each.db", "FULL", isolation_level=None)
    lax_each = await _open_raw(setting.folder / "lax_each.db", "NORMAL", isolation_level=None)
    get, put = _GET.format("?"), _PUT.format("?", "?")

    # As its documentation shows: a hop to the thread for each step.
    async def read(user_id: str) -> Any:
        async with raw.execute(get, (user_id,)) as cursor:
            return await cursor.fetchone()

    async def read_in_one_hop(user_id: str) -> Any:
        return await raw.execute_fetchall(get, (user_id,))

    def upserting(connection: aiosqlite.Connection) -> Any:
        payload = _changing(_payloads())

        async def upsert(user_id: str) -> Any:
            await connection.execute(put, (user_id, payload()))
            await connection.commit()

        async def upsert_alone(user_id: str) -> Any:
            await connection.execute(put, (user_id, payload()))

        return upsert_alone if connection.isolation_level is None else upsert

    users = [user(n) for n in range(_USERS)]
    writing = {connection: upserting(connection) for connection in (raw, lax, each, lax_each)}
    for connection in writing:
        await connection.executemany(put, [(user_id, _payloads()[0]) for user_id in users])
        await connection.commit()
    assert await read(users[0])
    result = Result(
        "SQLite (WAL, synchronous=FULL), against raw aiosqlite on one connection",
        columns=["operation", "callers", "aiosqlite /s", "ours /s", "times", "CPU"],
        note=(
            "Ours decodes what it reads, keeps versions, the history and write ids. A transaction"
            " each: theirs with isolation_level=None. Sharing commits: theirs executes and commits,"
            " and one commit takes along what all other callers have executed. Not durable: theirs"
            " with synchronous=NORMAL, where acknowledged writes are lost with the power. Full:"
            " ours once each write pushes an old entry out of a history, and in place of theirs"
            " ours with few entries."
        ),
    )
    for callers in (1, 16, 64, 256):
        # A new one each time: histories that grow full would count for the later ones only.
        store = await _new_store(setting, f"ours_{callers}", users)
        ours = _upserting(store)
        for name, their_call, our_call in (
            ("read", read, store.get_latest),
            ("read, execute_fetchall", read_in_one_hop, store.get_latest),
            ("upsert, a transaction each", writing[each], ours),
            ("upsert, a transaction each, theirs not durable", writing[lax_each], ours),
            ("upsert, sharing commits", writing[raw], ours),
            ("upsert, sharing commits, theirs not durable", writing[lax], ours),
        ):
            slow = their_call is writing[each]  # it waits for the disk at each call
            costs = await _race(setting, users, callers, their_call, our_call, slow=slow)
            goals = {"read": 5, "upsert, a transaction each": 3, "upsert, sharing commits": 3}
            _note(result, 8, name, callers, costs, goals)
        await store.aclose()
    for connection in writing:
        await connection.close()
    await _full(setting, users, result)
    return result


async def _new_store(setting: Setting, name: str, users: list[str]) -> SQLStore:
    store = SQLStore(f"sqlite+aiosqlite:///{setting.folder}/{name}.db")
    await store.upsert_latest_many(snapshot(user_id) for user_id in users)
    assert await store.get_latest(users[0]) == snapshot(users[0])
    return store


async def _full(setting: Setting, users: list[str], result: Result) -> None:
    """What an upsert costs once each pushes an old entry out of its user's history."""
    few, full = [await _new_store(setting, name, users) for name in ("few", "full")]
    forms = [[snapshot(user_id, form) for user_id in users] for form in range(_FORMS)]
    for number in range(setting.some(170, 2)):  # not all of them at the same version
        batch = setting.random.choices(forms[number % _FORMS], k=len(users))
        await full.upsert_latest_many(batch)
    costs = await _race(setting, users, 64, _upserting(few), _upserting(full))
    _note(result, 8, "upsert, full, against few entries", 64, costs, {})
    times = costs.ratio("ours", "raw")
    what = "SQLite upsert, 64 callers, full histories, to one with few entries"
    result.figures.append(Figure(8, what, times))
    await few.aclose()
    await full.aclose()


async def _postgres(setting: Setting) -> Result:
    import asyncpg

    dsn = await setting.postgres()
    pool = await asyncpg.create_pool(dsn, min_size=_POOL, max_size=_POOL)
    await pool.execute("CREATE TABLE raw (user_id TEXT PRIMARY KEY, data BYTEA)")
    get, put = _GET.format("$1"), _PUT.format("$1", "$2")
    payload = _changing(_payloads())

    async def read(user_id: str) -> Any:
        return await pool.fetchrow(get, user_id)

    async def upsert(user_id: str) -> Any:
        await pool.execute(put, user_id, payload())

    store = SQLStore(dsn.replace("postgresql:", "postgresql+asyncpg:"), pool_size=_POOL)
    users = await _fill(store, upsert, setting)
    assert await read(users[0])
    result = Result(
        "PostgreSQL (commits wait for the disk), against a raw asyncpg pool of 10",
        columns=["operation", "callers", "asyncpg /s", "ours /s", "times", "CPU"],
        note="Ours decodes what it reads, keeps versions, the history and write ids.",
    )
    for callers in (1, 16, 64, 256):
        for name, theirs, ours in (
            ("read", read, store.get_latest),
            ("upsert", upsert, _upserting(store)),
        ):
            costs = await _race(setting, users, callers, theirs, ours)
            goals = {"read": 0.95, "upsert": 0.95} if callers == 1 else {"read": 4, "upsert": 2.5}
            _note(result, 9, name, callers, costs, goals)
            if callers == 64:
                share = costs.cpu_ratio("ours", "raw")
                what = f"PostgreSQL {name}, 64 callers, CPU per call"
                result.figures.append(Figure(9, what, share, at_most=0.2))
    await store.aclose()
    await pool.close()
    return result


# An upsert of what is there already is no upsert: SQLite then leaves the page as it is.
_FORMS = 7


def _payloads() -> list[bytes]:
    return [encoded(user(0), form) for form in range(_FORMS)]


def _changing(values: list[Any]) -> Any:
    """Return a function that gives these values in turn."""
    number = count()
    return lambda: values[next(number) % len(values)]


def _upserting(store: SQLStore) -> Any:
    made: dict[str, list[StateSnapshot]] = {
        user(n): [snapshot(user(n), form) for form in range(_FORMS)] for n in range(_USERS)
    }
    number = count()

    async def upsert(user_id: str) -> None:
        await store.upsert_latest(made[user_id][next(number) % _FORMS])

    return upsert


async def _fill(store: SQLStore, upsert: Any, setting: Setting) -> list[str]:
    users = [user(n) for n in range(_USERS)]
    await store.upsert_latest_many(snapshot(user_id) for user_id in users)
    await asyncio.gather(*map(upsert, users))
    assert await store.get_latest(users[0]) == snapshot(users[0])
    return users


async def _race(
    setting: Setting,
    users: list[str],
    callers: int,
    theirs: Any,
    ours: Any,
    *,
    slow: bool = False,
) -> Costs:
    calls = setting.some(300 if callers == 1 or slow else 3_000, 100 if callers == 1 else 600)
    keys = [setting.random.choice(users) for _ in range(calls)]
    contenders = {"raw": load(theirs, keys, callers), "ours": load(ours, keys, callers)}
    return await compare(contenders, setting.some(9, 2))


def _note(
    result: Result, row: int, name: str, callers: int, costs: Costs, goals: dict[str, Any]
) -> None:
    times = costs.faster("ours", "raw")
    result.rows.append(
        [
            name,
            callers,
            1 / costs.wall("raw"),
            1 / costs.wall("ours"),
            str(times),
            str(costs.cpu_ratio("ours", "raw")),
        ]
    )
    # One caller of SQLite is bimodal by where the two threads run: no target.
    if name in goals and ((row == 9 and callers in (1, 64)) or (row == 8 and callers > 1)):
        database = "SQLite" if row == 8 else "PostgreSQL"
        what = f"{database} {name}, {callers} caller{'s' * (callers > 1)}"
        result.figures.append(Figure(row, what, times, at_least=goals[name]))
