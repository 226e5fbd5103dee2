"""SQLite's history is one log of chains: nothing gets out of reach, nothing is stored twice."""

from __future__ import annotations

import asyncio
import contextvars
import random
import sqlite3
from collections import Counter
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from layered_store import SQLStore, StateSnapshot
from layered_store.call import call_begins
from layered_store.coherence.tombstones import LATEST_SECONDS
from layered_store.stores.sql import changelog
from layered_store.testing import FakeClock

if TYPE_CHECKING:
    from pathlib import Path

    from layered_store.call import Call


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "states.db"


def build(path: Path, **options: Any) -> SQLStore:
    return SQLStore(f"sqlite+aiosqlite:///{path}", **options)


def state(user_id: str, number: int = 0) -> StateSnapshot:
    return StateSnapshot(user_id, updated_at_unix_ms=number, axes={"n": number % 100 / 100})


def rows(path: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as database:
        return database.execute(query).fetchall()


HISTORY = "FROM layered_store_history"


@pytest.mark.parametrize(
    ("limit", "together"),
    [(0, True), (1, True), (100, True), (None, True), (0, False), (5, False)],
)
async def test_an_erasure_reaches_every_entry(
    path: Path, limit: int | None, together: bool
) -> None:
    """However often the history was trimmed in between, by single writes or by batches."""
    async with build(path, history_limit=limit) as store:
        for start in range(0, 300, 100):
            some = [state(user, start + n) for n in range(100) for user in ("u", "v")]
            if together:
                await store.upsert_latest_many(some)
            else:
                for each in some:
                    await store.upsert_latest(each)
        await store.delete("u")
        digest = store.digest("u")
        left = rows(path, f"SELECT digest, payload, previous {HISTORY}")
        assert [row[1:] for row in left if row[0] == digest] == [(None, None)]
        assert await store.get_latest("u") is None
        assert (await store.get_latest("v")) == state("v", 299)
        assert len(await store.get_history("v", 1000)) == (300 if limit is None else limit)


@pytest.mark.parametrize("limit", [0, 5, 100])
async def test_a_history_does_not_grow_beyond_its_limit(path: Path, limit: int) -> None:
    """It is trimmed now and then; without a history one state is kept, not those before it."""
    async with build(path, history_limit=limit) as store:
        for start in range(0, 400, 10):
            await store.upsert_latest_many(state("u", start + n) for n in range(10))
        assert rows(path, f"SELECT count(*) {HISTORY}")[0][0] <= max(limit, 16) + max(64, 2 * limit)
        if not limit:
            shown = f"SELECT count(*) {HISTORY} WHERE payload IS NOT NULL"
            assert rows(path, shown) == [(1,)]
        assert [s.updated_at_unix_ms for s in await store.get_history("u", 1000)] == list(
            range(399, 399 - limit, -1)
        )


@pytest.mark.parametrize("between", [0, 1, 120])
async def test_a_retried_write_is_stored_once(path: Path, between: int) -> None:
    """Also when many others came between its first attempt and the repeat."""
    async with build(path, history_limit=None) as store:

        async def write(call: Call) -> None:
            await store.upsert_latest(state("u", 1))
            assert not call.fresh

        with call_begins() as call:
            await write(call)
            assert not call.again().fresh
            other = SQLStore(store.url, history_limit=None)
            for number in range(between):
                await _on_its_own(other, state("u", 2 + number))
            await write(call)
            await store.upsert_latest_many([state("v", 1)])
            await other.aclose()
        history = await store.get_history("u", 1000)
        assert [s.updated_at_unix_ms for s in history].count(1) == 1
        assert len(history) == between + 1
        # What a repeat leaves is what stands there now.
        assert (await store.get_latest("u")) == state("u", 1 + between)


async def _on_its_own(store: SQLStore, snapshot: StateSnapshot) -> None:
    await asyncio.create_task(store.upsert_latest(snapshot), context=contextvars.Context())


async def test_the_change_log_ends_however_much_was_overwritten(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page looks at so many entries of the log; the pages together skip nobody."""
    monkeypatch.setattr(changelog, "_SCANNED", 50)
    async with build(path) as store:
        head = await store.head()
        await store.upsert_latest(state("early"))
        await store.upsert_latest_many([state("busy", number) for number in range(400)])
        await store.delete("gone")
        await store.upsert_latest(state("late"))
        found: list[bytes] = []
        cursor, pages, more = head, 0, True
        while more:
            page = await store.changes(cursor, 3)
            found += [change.digest for change in page.items]
            cursor, more = page.cursor, page.more
            pages += 1
        users = [store.digest(user) for user in ("early", "busy", "gone", "late")]
        assert found == users
        assert pages > 5
        assert await store.covers(cursor)
        assert not (await store.changes(cursor, 3)).items


async def test_a_cursor_from_before_tombstones_may_be_forgotten_is_not_covered(path: Path) -> None:
    """What was erased since then may not be told any more, so nothing of that time is believed."""
    clock = FakeClock()
    async with build(path, clock=clock) as store:
        await store.upsert_latest(state("u"))
        head = await store.head()
        await clock.advance(LATEST_SECONDS - 1)
        assert await store.covers(head)
        later = await store.head()
        await clock.advance(2)
        assert not await store.covers(head)
        assert await store.covers(later)


@pytest.mark.parametrize("at_once", [1, 3])
async def test_tombstones_leave_no_entry_behind(path: Path, at_once: int) -> None:
    """When their time is over their place in the log goes with them, however many erased at once.
    """
    async with build(path) as store:
        await store.upsert_latest(state("old"))
        await asyncio.gather(*(store.delete("old") for _ in range(at_once)))
        with closing(sqlite3.connect(path)) as database, database:
            database.execute("UPDATE layered_store_latest SET purge_at = 1")
        await store.upsert_latest_many([state(f"u{number}") for number in range(64)])
        digest = store.digest("old")
        for table in ("layered_store_latest", "layered_store_history"):
            assert digest not in {row[0] for row in rows(path, f"SELECT digest FROM {table}")}


async def test_a_write_after_an_erasure_begins_a_history(path: Path) -> None:
    """What was erased stays gone, and the new history holds what is written from then on."""
    async with build(path) as store:
        for number in range(5):
            await store.upsert_latest(state("u", number))
        await store.delete("u")
        for number in range(10, 13):
            await store.upsert_latest(state("u", number))
        for limit in (1, 2, 3, 10):
            shown = [s.updated_at_unix_ms for s in await store.get_history("u", limit)]
            assert shown == [12, 11, 10][:limit]


REACHED = """
    WITH RECURSIVE reached (position) AS (
        SELECT position FROM layered_store_latest
        UNION ALL SELECT h.previous FROM reached JOIN layered_store_history h
            ON h.position = reached.position WHERE h.previous IS NOT NULL
    ) SELECT position FROM reached
"""


@pytest.mark.parametrize("seed", range(4))
async def test_sweeping_leaves_every_chain_whole(path: Path, seed: int) -> None:
    """Whoever writes often or seldom, is erased, or is written by another store meanwhile."""
    chance = random.Random(seed)
    users = [f"u{number}" for number in range(chance.choice([3, 12, 40]))]
    often = [chance.choice([1, 1, 5, 40]) for _ in users]
    limit = chance.choice([1, 16, 30])
    known: dict[str, list[int]] = {user: [] for user in users}
    async with build(path, history_limit=limit) as one, build(path, history_limit=limit) as other:
        for start in range(0, 6_000, 20):
            batch = chance.choices(users, often, k=20)
            store = other if chance.random() < 0.2 else one
            await store.upsert_latest_many(state(user, start + n) for n, user in enumerate(batch))
            for n, user in enumerate(batch):
                known[user].append(start + n)
            if chance.random() < 0.03:
                user = chance.choice(users)
                await store.delete(user)
                known[user].clear()
        for user, written in known.items():
            shown = [s.updated_at_unix_ms for s in await one.get_history(user, 100)]
            assert shown == written[-limit:][::-1]
    entries = {row[0] for row in rows(path, f"SELECT position {HISTORY}")}
    assert entries
    assert entries <= {row[0] for row in rows(path, REACHED)}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("limit", [None, 20])
async def test_sweeping_what_is_old_leaves_every_chain_whole(
    path: Path, seed: int, limit: int | None
) -> None:
    """States grow too old while users write often, seldom or not at all, and are erased."""
    chance, clock = random.Random(seed), FakeClock()
    users = [f"u{number}" for number in range(20)]
    often = [chance.choice([1, 5, 40]) for _ in users]
    known: dict[str, list[tuple[float, int]]] = {user: [] for user in users}
    options: dict[str, Any] = {"history_limit": limit, "history_max_age": 600, "clock": clock}
    async with build(path, **options) as one, build(path, **options) as other:
        for start in range(0, 3_000, 10):
            await clock.advance(chance.choice([1.0, 10.0, 100.0]))
            batch = chance.choices(users, often, k=10)
            store = other if chance.random() < 0.3 else one
            await store.upsert_latest_many(state(user, start + n) for n, user in enumerate(batch))
            for n, user in enumerate(batch):
                known[user].append((clock.time(), start + n))
            if chance.random() < 0.05:
                user = chance.choice(users)
                await store.delete(user)
                known[user].clear()
        for user, written in known.items():
            found = await one.get_latest(user)
            assert (found and found.updated_at_unix_ms) == (written[-1][1] if written else None)
            young = [number for at, number in written if at >= clock.time() - 600]
            shown = [s.updated_at_unix_ms for s in await one.get_history(user, 1_000)]
            assert shown == young[-limit if limit else 0 :][::-1]
    entries = {row[0] for row in rows(path, f"SELECT position {HISTORY}")}
    assert entries <= {row[0] for row in rows(path, REACHED)}
    aged = f"recorded_at < {int((clock.time() - 1_200) * 1e6)}"
    old = rows(path, f"SELECT position {HISTORY} WHERE {aged}")
    heads = {row[0] for row in rows(path, "SELECT position FROM layered_store_latest")}
    assert {row[0] for row in old} <= heads


async def test_a_log_holds_little_more_than_is_shown(path: Path) -> None:
    """Sweeps remove what is due long before the walk down its user's chain would."""
    chance, users = random.Random(0), [f"u{number}" for number in range(50)]
    async with build(path, history_limit=50) as store:
        for start in range(0, 20_000, 100):
            batch = chance.choices(users, k=100)
            await store.upsert_latest_many(state(user, start) for user in batch)
    counts = Counter(row[0] for row in rows(path, f"SELECT digest {HISTORY}"))
    assert set(counts) == {store.digest(user) for user in users}
    assert min(counts.values()) >= 50
    assert sum(counts.values()) < 50 * 90


async def test_who_writes_seldom_is_trimmed_too(path: Path) -> None:
    """Sweeps pass by the entries of such a user while they are shown still; the walk finds them."""
    chance, users = random.Random(0), [f"u{number}" for number in range(4)]
    async with build(path, history_limit=16) as store:
        for start in range(1_000):
            batch = [*chance.choices(users, k=19), "seldom"]
            await store.upsert_latest_many(state(user, start) for user in batch)
        digest = store.digest("seldom")
    counts = Counter(row[0] for row in rows(path, f"SELECT digest {HISTORY}"))
    assert 16 <= counts[digest] <= 16 + 64
