"""What every system of record must do, on each that we have."""

from __future__ import annotations

import asyncio
import contextvars
import os
import subprocess
import sys
import uuid
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import literal_column, select, text

from layered_store.call import Call, _current, call_begins, next_order
from layered_store.coherence.contract import ABSENT, Change
from layered_store.errors import ClosedError, CorruptDataError, UnavailableError, ValidationError
from layered_store.layers.write_through import WriteThrough
from layered_store.snapshot import StateSnapshot
from layered_store.stores.memory import MemoryStore
from layered_store.stores.redis import RedisStore
from layered_store.stores.sql import SQLStore, transactions
from layered_store.stores.sql.session import Session

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

SHARED = ("sqlite_file", "postgres", "psycopg", "mysql", "asyncmy")
"""Where a second store sees the same data."""
DATABASES = (*SHARED, "sqlite_memory")
KINDS = ("memory", *DATABASES)


@dataclass
class Bench:
    """Builds stores over one database; each test has tables of its own."""

    kind: str
    url: str | None
    options: dict[str, Any] = field(default_factory=dict)
    opened: list[Any] = field(default_factory=list)

    def build(self, **options: Any) -> Any:
        if self.kind == "memory":
            store: Any = MemoryStore(**options)
        else:
            store = SQLStore(self.url, **{**self.options, **options})
        self.opened.append(store)
        return store

    async def execute(self, store: Any, statement: Any, values: dict[str, Any]) -> None:
        async def work(session: Any) -> None:
            await session.run(statement, [values])

        await store._access.run("test", work)


@pytest.fixture(params=KINDS)
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    kind = request.param
    url = {
        "memory": lambda: None,
        "sqlite_file": lambda: f"sqlite+aiosqlite:///{tmp_path}/states.db",
        "sqlite_memory": lambda: "sqlite+aiosqlite://",
        "postgres": lambda: request.getfixturevalue("postgres_url"),
        "psycopg": lambda: request.getfixturevalue("postgres_url").replace("asyncpg", "psycopg"),
        "mysql": lambda: request.getfixturevalue("mysql_url"),
        "asyncmy": lambda: request.getfixturevalue("mysql_url").replace("aiomysql", "asyncmy"),
    }[kind]()
    tag = uuid.uuid4().hex[:12]
    names = {"latest_table": f"latest_{tag}", "history_table": f"history_{tag}"}
    made = Bench(kind, url, {} if kind == "memory" else names)
    yield made
    for store in made.opened:
        await store.aclose()


about_tables = pytest.mark.parametrize("bench", DATABASES, indirect=True)
from_two_stores = pytest.mark.parametrize("bench", SHARED, indirect=True)


@asynccontextmanager
async def writing(
    write_id: bytes, started: float, order: int | None = None
) -> AsyncIterator[None]:
    """Make writes inside attempts of one call, which began at ``order`` (None: now)."""
    token = _current.set(Call(write_id, started, order=order or next_order()))
    try:
        yield
    finally:
        _current.reset(token)


def state(user_id: str, value: float = 0.5, **fields: Any) -> StateSnapshot:
    return StateSnapshot(user_id, axes={"a": value}, **fields)


async def all_changes(store: Any, cursor: str, limit: int = 3) -> tuple[dict[bytes, Any], str]:
    found: dict[bytes, Any] = {}
    while True:
        page = await store.changes(cursor, limit)
        assert len(page.items) <= limit or not page.more
        found.update({change.digest: change for change in page.items})
        cursor = page.cursor
        if not page.more:
            return found, cursor


async def test_versions_grow_across_erasure(bench: Bench) -> None:
    """Each write and erasure of a user has a higher version than the one before."""
    store = bench.build()
    versions = []
    for round_ in range(3):
        versions.append((await store.write(state("u", round_ / 10))).version)
        versions.append((await store.write(state("u", round_ / 9))).version)
        versions.append(await store.erase("u"))
        assert (await store.read("u")).snapshot is None
    assert versions == sorted(set(versions))
    assert (await store.read("u")).version == versions[-1]


async def test_a_user_never_seen_is_absent(bench: Bench) -> None:
    """No row gives version 0, alone and in a batch."""
    store = bench.build()
    assert await store.read("nobody") == ABSENT
    assert await store.read_many(["nobody", "no-one"]) == {"nobody": ABSENT, "no-one": ABSENT}
    assert await store.get_latest("nobody") is None


async def test_erasing_an_absent_user_leaves_a_tombstone(bench: Bench) -> None:
    """Copies may exist although the row does not."""
    store = bench.build()
    version = await store.erase("u")
    record = await store.read("u")
    assert record.version == version > 0
    assert record.snapshot is None
    assert await store.erase("u") >= version


async def test_a_repeated_write_counts_once_also_after_another_write(bench: Bench) -> None:
    """The second attempt finds the first in the history and leaves the later write in place."""
    store = bench.build()
    started, snapshot = store.clock.monotonic(), state("u", 0.1)
    async with writing(b"w" * 16, started):
        first = await store.write(snapshot)
        assert await store.write(snapshot) == first
    between = await store.write(state("u", 0.2))
    async with writing(b"w" * 16, started):
        again = await store.write(snapshot)
    assert again == between
    assert [s.get_axis("a") for s in await store.get_history("u", 10)] == [0.2, 0.1]


async def test_a_repeated_batch_counts_once(bench: Bench) -> None:
    """Each part of a batch has an id of its own, and one user may be in it twice."""
    store = bench.build()
    batch = [state("u", 0.1), state("v", 0.2), state("u", 0.3)]
    started = store.clock.monotonic()
    for _ in range(2):
        async with writing(b"b" * 16, started):
            records = await store.write_many(batch)
        assert records["u"].snapshot.get_axis("a") == 0.3
    assert [s.get_axis("a") for s in await store.get_history("u", 10)] == [0.3, 0.1]
    assert len(await store.get_history("v", 10)) == 1


@pytest.mark.parametrize("limit", [0, 1, 3, None])
async def test_history_is_bounded(bench: Bench, limit: int | None) -> None:
    """At most ``history_limit`` states are given; a repeat is known even when none are kept."""
    store = bench.build(history_limit=limit)
    for index in range(20):
        await store.write(state("u", index / 100))
    kept = 20 if limit is None else limit
    values = [s.get_axis("a") for s in await store.get_history("u", 50)]
    assert values == [index / 100 for index in range(19, -1, -1)][:kept]
    assert await store.get_history("u", 0) == []
    async with writing(b"w" * 16, store.clock.monotonic()):
        snapshot = state("u", 1.0)
        first = await store.write(snapshot)
        await asyncio.sleep(0)
        assert (await store.write(snapshot)).version == first.version


async def test_a_late_writer_loses_to_an_erasure(bench: Bench) -> None:
    """A write that began before the erasure is dropped, also when the user was written again."""
    store = bench.build()
    started, order = store.clock.monotonic(), next_order()
    await store.write(state("u", 0.1))
    version = await store.erase("u")
    async with writing(b"l" * 16, started, order):
        record = await store.write(state("u", 0.2))
    assert (record.version, record.snapshot) == (version, None)
    fresh = await store.write(state("u", 0.3))
    assert fresh.snapshot is not None
    async with writing(b"m" * 16, started, order):
        assert await store.write(state("u", 0.4)) == fresh
    assert len(await store.get_history("u", 9)) == 1


async def test_a_write_after_an_erasure_counts_at_once(bench: Bench) -> None:
    """In one process the order of the two calls is certain, however close they are."""
    store = bench.build()
    for index in range(20):
        await store.erase("u")
        assert (await store.write(state("u", index / 20))).snapshot is not None


@from_two_stores
async def test_the_order_is_told_across_processes(bench: Bench) -> None:
    """A store that did not erase measures by the database's clock: both ways."""
    ours, theirs = bench.build(), bench.build()
    await ours.open()
    await theirs.open()
    started = ours.clock.monotonic()
    version = await theirs.erase("u")
    async with writing(b"l" * 16, started - 1):
        assert (await ours.write(state("u", 0.1))).version == version
    for _ in range(20):
        erased = await theirs.erase("u")
        record = None
        while record is None:
            try:
                record = await ours.write(state("u", 0.2))
            except Exception as exc:
                assert getattr(exc, "retryable", False)  # noqa: PT017
        assert record.version > erased


async def test_a_write_behind_a_newer_one_of_its_user_began_before_an_erasure(
    bench: Bench,
) -> None:
    """Both may reach the database together, after the erasure that lies between them."""
    store = bench.build()
    await store.write(state("u", 0.1))

    def apart(work: Any) -> asyncio.Task[Any]:
        return asyncio.create_task(work, context=contextvars.Context())

    with call_begins(store.clock):
        await apart(store.erase("u"))
        ahead = [apart(store.write(state(f"ahead-{number}"))) for number in range(3)]
        for _ in range(3):
            await asyncio.sleep(0)  # those are under way, what comes now waits for the next batch
        newer = apart(store.write(state("u", 0.2)))
        await asyncio.sleep(0)
        older = asyncio.create_task(store.write(state("u", 0.3)))
        await asyncio.gather(*ahead, newer, older)
    assert (await store.get_latest("u")).get_axis("a") == 0.2
    assert [s.get_axis("a") for s in await store.get_history("u", 9)] == [0.2]


@about_tables
async def test_no_history_is_kept_without_a_limit_above_0(bench: Bench) -> None:
    """Of a user who was erased once either: the database holds the latest state alone."""
    store = bench.build(history_limit=0)
    for user in ("u", "v"):
        await store.write(state(user, 0.1))
    await store.erase("u")
    for value in (0.2, 0.3, 0.4):
        await store.write_many([state(user, value) for user in ("u", "v")])
    table = store.metadata.tables[store.history_table]
    async with store._access.home("test").engine.connect() as connection:
        shown = select(table.c.digest).where(table.c.payload.is_not(None))
        found = [bytes(digest) for (digest,) in (await connection.execute(shown)).all()]
    # In SQLite the latest state stands in the history.
    assert len(found) == len(set(found))
    assert set(found) <= {store.digest("u"), store.digest("v")}


async def test_trimming_a_history_spares_those_of_others(bench: Bench) -> None:
    """Also of one whose versions are the same, since both were written first at one moment."""
    store = bench.build(history_limit=3)
    for value in (0.1, 0.2):
        await store.write_many([state(user, value) for user in ("busy", "idle")])
    for index in range(40):
        await store.write(state("busy", index / 100))
    assert [s.get_axis("a") for s in await store.get_history("idle", 9)] == [0.2, 0.1]
    assert [s.get_axis("a") for s in await store.get_history("busy", 9)] == [0.39, 0.38, 0.37]


async def test_debts_stay_until_they_are_settled(bench: Bench) -> None:
    """A tier named in an erasure is owed; settling an older erasure changes nothing."""
    store = bench.build()
    await store.write(state("u"))
    first = await store.erase("u", ["redis-1"])
    second = await store.erase("u", ["redis-2"])
    assert sorted(await store.debts("u")) == ["redis-1", "redis-2"]
    await store.settle(store.digest("u"), first, "redis-1")
    assert sorted(await store.debts("u")) == ["redis-1", "redis-2"]
    await store.settle(store.digest("u"), second, "redis-1")
    await store.settle(store.digest("u"), second, "unknown")
    assert list(await store.debts("u")) == ["redis-2"]
    owed = Change(store.digest("u"), second, erased=True, owed=True)
    assert list(await store.owing("redis-2", 9)) == [owed]
    assert not await store.owing("redis-1", 9)
    await store.settle(store.digest("u"), second, "redis-2")
    assert list(await store.debts("u")) == []
    await store.settle(store.digest("never-seen"), second, "redis-2")
    assert list(await store.debts("never-seen")) == []


async def test_settlements_made_together_share_a_commit(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many erasures end at once, each with its own result, of several tiers too."""
    store = bench.build()
    users = [f"u{number}" for number in range(40)]
    tiers = ["redis-1", "redis-2"]
    versions = await asyncio.gather(*(store.erase(user, tiers) for user in users))
    again = await store.erase("u7", ["redis-3"])
    transactions_done = []
    settle = transactions.settle

    async def counted(session: Session, settlements: Any) -> list[bool]:
        transactions_done.append(len(settlements))
        return await settle(session, settlements)

    monkeypatch.setattr(transactions, "settle", counted)
    await asyncio.gather(
        *(
            store.settle(store.digest(user), version, tier)
            for user, version in zip(users, versions, strict=True)
            for tier in tiers
        ),
        store.settle(store.digest("never-seen"), again, "redis-1"),
    )
    owed = {user: sorted(await store.debts(user)) for user in users}
    assert owed.pop("u7") == [*tiers, "redis-3"]
    assert not any(owed.values())
    assert bench.kind == "memory" or len(transactions_done) < 10


async def test_changes_come_after_the_head(bench: Bench) -> None:
    """A cursor taken from ``head`` shows all that follows, each user once, erasures marked."""
    store = bench.build()
    await store.write(state("before"))
    head = await store.head()
    users = [f"u{index}" for index in range(8)]
    for user_id in users:
        await store.write(state(user_id))
    await store.write(state("u0", 0.9))
    await store.erase("u1")
    found, cursor = await all_changes(store, head)
    assert set(found) == {store.digest(user_id) for user_id in users}
    assert [c.digest for c in found.values() if c.erased] == [store.digest("u1")]
    for user_id in users:
        assert found[store.digest(user_id)].version == (await store.read(user_id)).version
    assert await store.covers(cursor)
    assert (await all_changes(store, cursor))[0] == {}


async def test_changes_never_skip_a_concurrent_writer(bench: Bench) -> None:
    """A reader that follows the log while others write ends with every user's last version."""
    store = bench.build()
    other = bench.build() if bench.kind in SHARED else store
    cursor = await store.head()
    seen: dict[bytes, int] = {}
    writing_now = True

    async def write(which: Any, name: str) -> None:
        for index in range(25):
            await which.write(state(f"{name}-{index % 7}", index / 25))
            if index % 5 == 0:
                await which.write_many([state(f"both-{n}", 0.1) for n in range(4)])

    async def follow() -> None:
        nonlocal cursor
        while True:
            last = not writing_now
            found, cursor = await all_changes(store, cursor)
            for digest, change in found.items():
                assert change.version >= seen.get(digest, 0)
                seen[digest] = change.version
            if last:
                return
            await asyncio.sleep(0)

    reader = asyncio.create_task(follow())
    await asyncio.gather(*(write(s, n) for s in (store, other) for n in ("x", "y", "z")))
    writing_now = False
    await reader
    for user_id in [f"{n}-{i}" for n in "xyz" for i in range(7)] + [f"both-{n}" for n in range(4)]:
        assert seen[store.digest(user_id)] == (await store.read(user_id)).version


async def test_a_cursor_of_the_future_is_not_covered(bench: Bench) -> None:
    """After a restore, positions that were handed out are ahead of the database."""
    store = bench.build()
    head = await store.head()
    assert await store.covers(head)
    position = head.split(".", maxsplit=1)[0]
    assert not await store.covers(head.replace(position, str(10**15), 1))
    # PostgreSQL's go on with whatever the server does.
    if bench.kind in ("sqlite_file", "sqlite_memory", "mysql", "asyncmy"):
        assert not await store.covers(head.replace(position, str(int(position) + 1), 1))


async def test_a_cursor_of_another_store_is_not_covered(bench: Bench) -> None:
    """A cache tier may have been in front of one, and tells it to the next."""
    store = bench.build()
    await store.head()
    for cursor in ("", "4f0c.17", "another program's", "1.zz.1"):
        assert not await store.covers(cursor)


@pytest.mark.parametrize("bench", ["postgres", "psycopg"], indirect=True)
async def test_an_open_transaction_holds_the_log_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL: what commits late with a lower position is still found, and what was committed
    behind it is told meanwhile: nobody may vouch for a tier without knowing it.
    """
    store = bench.build()
    cursor = await store.head()
    gate, entered = asyncio.Event(), asyncio.Event()
    commit = Session.commit

    async def first_waits(self: Session) -> None:
        if not entered.is_set():
            entered.set()
            await gate.wait()
        await commit(self)

    monkeypatch.setattr(Session, "commit", first_waits)
    late = asyncio.create_task(store.erase("slow"))
    await entered.wait()
    await store.write(state("quick"))
    for _ in range(2):
        seen, cursor = await all_changes(store, cursor)
        assert seen.keys() == {store.digest("quick")}
    gate.set()
    await late
    more, _ = await all_changes(store, cursor)
    assert {store.digest("slow"), store.digest("quick")} == more.keys()


@pytest.mark.parametrize("bench", ["postgres", "psycopg"], indirect=True)
async def test_tables_that_came_with_a_dump_are_numbered_anew(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL: places in the log are ids of transactions, and those of a dump are another
    server's. More of them than a page may tell must not keep the log from being read for ever.
    """
    monkeypatch.setattr("layered_store.stores.sql.changelog._AHEAD_ROWS", 10)
    monkeypatch.setattr("layered_store.stores.sql.changelog._ADOPTED_ROWS", 4)
    store = bench.build()
    users = [f"u{number}" for number in range(30)]
    await store.write_many([state(user_id) for user_id in users])
    await store.erase("u0")
    restored = (
        f"UPDATE {store.latest_table} SET position = position + 1000000000"
        f" WHERE user_id IS DISTINCT FROM 'u1'"
    )
    await store._access.run("test", lambda session: session.command(restored))
    cursor = await store.head()
    await store.write(state("u1", 0.9))
    seen: dict[bytes, Any] = {}
    for _ in range(20):
        try:
            found, cursor = await all_changes(store, cursor)
        except UnavailableError as exc:
            assert exc.retryable
        else:
            seen.update(found)
    assert seen.keys() == {store.digest(user_id) for user_id in users}
    assert seen[store.digest("u0")].erased
    assert not (await all_changes(store, cursor))[0]
    await store.write(state("u2", 0.9))
    assert (await all_changes(store, cursor))[0].keys() == {store.digest("u2")}
    assert [(await store.get_latest(user_id)) is None for user_id in users] == [True] + 29 * [False]


async def test_many_writers_of_one_user_all_count(bench: Bench) -> None:
    """Versions are computed under the row's lock: none is lost, none is given twice."""
    store = bench.build()
    other = bench.build() if bench.kind in SHARED else store
    records = await asyncio.gather(
        *((store, other)[index % 2].write(state("u", index / 40)) for index in range(40))
    )
    versions = sorted(record.version for record in records)
    assert versions == list(range(versions[0], versions[0] + 40))
    assert len(await store.get_history("u", 100)) == 40
    newest = max(records, key=lambda record: record.version)
    assert await store.read("u") == newest


async def test_batches_that_cross_do_not_deadlock(bench: Bench) -> None:
    """Two batches with the same users in opposite orders both finish."""
    store = bench.build()
    other = bench.build() if bench.kind in SHARED else store
    users = [f"u{index}" for index in range(10)]
    for _ in range(5):
        await asyncio.gather(
            store.write_many([state(user_id, 0.1) for user_id in users]),
            other.write_many([state(user_id, 0.2) for user_id in reversed(users)]),
        )
    assert len(await store.get_latest_many(users)) == 10


PAIRS = [
    "alice",
    "Alice",
    "märrie",
    "marrie",
    "\u212b",
    "\u00c5",
    "\u00e5",
    "straße",
    "strasse",
    "ﬁ",
    "fi",
    "bob",
    "bob_",
]


async def test_ids_that_look_alike_are_different_users(bench: Bench) -> None:
    """Case, accents, normal forms and compatibility characters keep users apart."""
    store = bench.build()
    for index, user_id in enumerate(PAIRS):
        await store.write(state(user_id, index / 20))
    found = await store.get_latest_many(PAIRS)
    assert {u: s.get_axis("a") for u, s in found.items()} == {
        user_id: index / 20 for index, user_id in enumerate(PAIRS)
    }
    await store.erase("alice")
    assert await store.get_latest("Alice") is not None


def table_of_states(store: SQLStore) -> Any:
    """The table whose rows hold the latest states: on SQLite the history."""
    latest = store.metadata.tables[store.latest_table]
    return latest if "payload" in latest.c else store.metadata.tables[store.history_table]


@about_tables
async def test_a_corrupt_row_is_that_users_alone(bench: Bench) -> None:
    """It raises when asked alone, others are served, and a write heals it."""
    store = bench.build()
    await store.write_many([state("good"), state("bad")])
    table = table_of_states(store)
    statement = table.update().where(table.c.digest == store.digest("bad"))
    await bench.execute(store, statement.values(payload=b"\x01\xc1garbage"), {})
    with pytest.raises(CorruptDataError) as caught:
        await store.get_latest("bad")
    assert caught.value.user_id == "bad"
    assert "bad" not in str(caught.value).replace("UPSERT", "")
    found = await store.read_many(["good", "bad", "none"])
    assert set(found) == {"good", "none"}
    await store.write(state("bad", 0.7))
    assert (await store.get_latest("bad")).get_axis("a") == 0.7


@pytest.mark.parametrize("bench", ["sqlite_file"], indirect=True)
@pytest.mark.parametrize("stored", ["text", 5, 10**14, -1, 1.5])
async def test_a_state_of_another_type_is_that_users_alone(bench: Bench, stored: object) -> None:
    """SQLite keeps in a column whatever somebody puts there."""
    store = bench.build()
    await store.write_many([state("good"), state("bad")])
    table = store.history_table
    await bench.execute(
        store,
        text(f"UPDATE {table} SET payload = :stored WHERE digest = :digest"),
        {"stored": stored, "digest": store.digest("bad")},
    )
    for read in (store.get_latest("bad"), store.get_history("bad", 5)):
        with pytest.raises(CorruptDataError):
            await read
    assert set(await store.read_many(["good", "bad"])) == {"good"}
    assert not (await store.peek("bad")).answers
    await store.write(state("bad", 0.7))
    assert (await store.get_latest("bad")).get_axis("a") == 0.7


@about_tables
async def test_a_row_of_another_user_is_never_returned(bench: Bench) -> None:
    """Whoever put it there: the id in the row and the id in the record are both checked."""
    store = bench.build()
    await store.write_many([state("mine"), state("theirs")])
    table = store.metadata.tables[store.latest_table]
    mine = table.update().where(table.c.digest == store.digest("mine"))
    await bench.execute(store, mine.values(user_id="theirs"), {})
    with pytest.raises(CorruptDataError):
        await store.get_latest("mine")
    await bench.execute(store, mine.values(user_id="mine"), {})
    assert await store.get_latest("mine") is not None
    table = table_of_states(store)
    mine = table.update().where(table.c.digest == store.digest("mine"))
    payload = store._codec.encode(state("theirs"))
    await bench.execute(store, mine.values(payload=payload), {})
    with pytest.raises(CorruptDataError):
        await store.get_latest("mine")


@about_tables
async def test_erasure_leaves_no_trace(bench: Bench) -> None:
    """After an erasure neither table holds the id or a state of the user."""
    store = bench.build()
    await store.write(state("u-secret"))
    await store.erase("u-secret")
    rows: list[Any] = []

    async def work(session: Any) -> None:
        for table in store.metadata.tables.values():
            rows.extend(await session.rows(table.select(), {}))

    await store._access.run("test", work)
    assert "u-secret" not in repr(rows)


@about_tables
async def test_snapshot_time_ignores_older_snapshots(bench: Bench) -> None:
    """With that order, a snapshot observed earlier than the stored one is counted and dropped."""
    store = bench.build(order="snapshot_time")
    newest = await store.write(state("u", 0.1, updated_at_unix_ms=2_000))
    assert await store.write(state("u", 0.2, updated_at_unix_ms=1_000)) == newest
    equal = await store.write(state("u", 0.3, updated_at_unix_ms=2_000))
    assert equal.version > newest.version
    assert {sample.metric: sample.value for sample in store.samples()}["stale_writes"] == 1
    assert len(await store.get_history("u", 10)) == 2


@from_two_stores
@pytest.mark.parametrize(("written", "left"), [((10, 50), 50), ((50, 10), 30)])
async def test_a_store_that_begins_to_go_by_the_time_finds_that_of_the_latest_state(
    bench: Bench, written: tuple[int, int], left: int
) -> None:
    """Not that of an earlier one, though another order decided until then."""
    for number in written:
        await bench.build().write(at_time("u", number))
    store = bench.build(order="snapshot_time")
    await store.write(at_time("u", 30))
    assert await store.get_latest("u") == at_time("u", left)


@about_tables
async def test_old_history_is_not_shown(bench: Bench) -> None:
    """States older than ``history_max_age`` are gone from the history, not from the latest."""
    store = bench.build(history_max_age=3600)
    await store.write(state("u", 0.1))
    table = store.metadata.tables[store.history_table]
    await bench.execute(store, table.update().values(recorded_at=1), {})
    assert await store.get_history("u", 10) == []
    await store.write(state("u", 0.2))
    assert [s.get_axis("a") for s in await store.get_history("u", 10)] == [0.2]
    assert (await store.get_latest("u")).get_axis("a") == 0.2


@about_tables
@pytest.mark.parametrize("limit", [None, 100])
@pytest.mark.parametrize("order", ["arrival", "snapshot_time"])
async def test_what_is_too_old_to_be_shown_is_removed(
    bench: Bench, limit: int | None, order: str
) -> None:
    """With later writes of its user; what is the latest state stays however old it is."""
    store = bench.build(history_max_age=3600, history_limit=limit, order=order)
    users = ["u", "v", "idle"]
    for value in range(20):
        await store.write_many([at_time(user, value) for user in users])
    table = store.metadata.tables[store.history_table]
    await bench.execute(store, table.update().values(recorded_at=1), {})
    for value in range(20, 25):
        await store.write_many([at_time(user, value) for user in users[:2]])
    async with store._access.home("test").engine.connect() as connection:
        found = (await connection.execute(select(table.c.digest, table.c.recorded_at))).all()
    left = [bytes(digest) for digest, recorded in found if recorded == 1]
    assert set(left) <= {store.digest("idle")}
    kept = [bytes(digest) for digest, _ in found]
    assert [kept.count(store.digest(user)) for user in users[:2]] == [5, 5]
    assert await store.get_latest("idle") == at_time("idle", 19)
    assert await store.get_history("idle", 100) == []
    # The one that was the latest state for so long goes when it is not any more.
    await store.write(at_time("idle", 30))
    for _ in range(3):
        await store.write(at_time("u", 30))
    async with store._access.home("test").engine.connect() as connection:
        old = select(table.c.digest).where(table.c.recorded_at == 1)
        assert not (await connection.execute(old)).all()
    assert len(await store.get_history("idle", 100)) == 1


def at_time(user_id: str, number: int) -> StateSnapshot:
    return StateSnapshot(user_id, updated_at_unix_ms=number, axes={"a": number / 100})


@about_tables
async def test_tombstones_are_forgotten_after_their_time(bench: Bench) -> None:
    """Old tombstones go with later writes; one with debts stays."""
    store = bench.build()
    await store.erase("old")
    await store.erase("owing", ["redis"])
    table = store.metadata.tables[store.latest_table]
    await bench.execute(store, table.update().values(purge_at=1), {})
    await store.write_many([state(f"u{index}") for index in range(64)])
    assert await store.read("old") == ABSENT
    assert list(await store.debts("owing")) == ["redis"]


@about_tables
@pytest.mark.parametrize("order", ["arrival", "snapshot_time"])
@pytest.mark.parametrize("many", [False, True], ids=["one", "several"])
async def test_who_is_written_again_after_an_erasure_is_not_forgotten_with_it(
    bench: Bench, order: str, many: bool
) -> None:
    """When the time of tombstones is over, the state and its history stay."""
    store = bench.build(order=order)
    users = ["u", "v"] if many else ["u"]
    for user in users:
        await store.write(state(user, 0.1))
        await store.erase(user)
    if many:
        await store.write_many([state(user, 0.2) for user in users])
    else:
        await store.write(state("u", 0.2))
    table = store.metadata.tables[store.latest_table]
    tombstones = table.update().where(table.c.purge_at.is_not(None)).values(purge_at=1)
    await bench.execute(store, tombstones, {})
    await store.write_many([state(f"u{index}") for index in range(64)])
    for user in users:
        assert (await store.get_latest(user)).get_axis("a") == 0.2
        assert len(await store.get_history(user, 10)) == 1


@about_tables
async def test_versions_grow_over_an_erasure_that_was_forgotten(bench: Bench) -> None:
    """Else a copy from before it, in a cache tier that was away, would count as the newer one."""
    store = bench.build()
    users = ["u", "v", "w"]
    await store.write_many([state(user, 0.1) for user in users])
    erased = [await store.erase(user) for user in users]
    table = store.metadata.tables[store.latest_table]
    await bench.execute(store, table.update().values(purge_at=1), {})
    await store.write_many([state(f"u{index}") for index in range(64)])
    assert await store.read_many(users) == dict.fromkeys(users, ABSENT)
    written = [await store.write(state("u", 0.2))]
    written += (await store.write_many([state(user, 0.2) for user in users[1:]])).values()
    assert all(after.version > before for after, before in zip(written, erased, strict=True))


@about_tables
async def test_tombstones_that_cannot_be_forgotten_fail_no_write(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writes they would have gone with are committed; later ones try again."""
    store = bench.build()
    await store.erase("old")
    table = store.metadata.tables[store.latest_table]
    await bench.execute(store, table.update().values(purge_at=1), {})
    with monkeypatch.context() as patch:
        broken = select(literal_column("no_such_column")).select_from(table)
        patch.setattr(store._access.statements, "purgeable", broken)
        for index in range(64):
            await store.write(state(f"u{index}"))
    assert (await store.get_latest("u63")).get_axis("a") == 0.5
    for start in range(0, 1024, 256):
        await store.write_many([state(f"v{start + index}") for index in range(256)])
    assert await store.read("old") == ABSENT


@about_tables
@pytest.mark.parametrize("batch", [1, 2])
async def test_a_write_older_than_tombstones_is_refused(bench: Bench, batch: int) -> None:
    """An erasure since it began may be forgotten, so nobody can tell whether it is late."""
    store = bench.build()
    with call_begins(store.clock) as call:
        call.started -= 7 * 86_400
        writes = [store.write(state(f"u{index}")) for index in range(batch)]
        found = await asyncio.gather(*writes, return_exceptions=True)
    assert all(isinstance(each, UnavailableError) and not each.retryable for each in found)
    assert await store.read("u0") == ABSENT
    await store.write(state("u0"))


@about_tables
async def test_a_burst_while_the_cache_tier_is_away_is_bounded(bench: Bench) -> None:
    """However many callers there are, the database has a few statements of theirs at once.

    So WriteThrough needs no limit of its own: a store of record bounds itself, or is given a
    Bulkhead.
    """
    store = bench.build(timeout=60.0)
    away = RedisStore("redis://127.0.0.1:1/0", connect_timeout=0.5)
    stack = WriteThrough(away, origin=store)
    await stack.upsert_latest(state("u0"))
    desks = next(iter(store._access.homes.values())).desks
    most = 0
    done = asyncio.Event()

    async def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, desks.busy)
            await asyncio.sleep(0)

    watching = asyncio.create_task(watch())
    reads = [stack.get_latest(f"u{number % 2_000}") for number in range(9_000)]
    writes = [stack.upsert_latest(state(f"u{number}")) for number in range(1_000)]
    await asyncio.gather(*reads, *writes)
    done.set()
    await watching
    # Two batches of reads and of writes, and a repair pass.
    assert 1 <= most <= 5
    await stack.aclose()


async def test_nothing_is_stored_of_a_batch_with_a_bad_snapshot(bench: Bench) -> None:
    """All are validated before the first is stored."""
    store = bench.build()
    with pytest.raises(ValidationError):
        await store.write_many([state("good"), state("bad user")])
    assert await store.read("good") == ABSENT


async def test_a_large_batch_passes_the_drivers_limits(bench: Bench) -> None:
    """More users than a statement may have parameters."""
    store = bench.build(history_limit=1)
    users = [f"u{index}" for index in range(1_500)]
    await store.upsert_latest_many(state(user_id) for user_id in users)
    assert set(await store.get_latest_many([*users, "other"])) == set(users)


async def test_a_closed_store_says_so(bench: Bench) -> None:
    """After ``aclose``, twice, every call raises ClosedError."""
    store = bench.build()
    await store.write(state("u"))
    await store.aclose()
    await store.aclose()
    for call in (store.get_latest("u"), store.write(state("u")), store.delete("u")):
        with pytest.raises(ClosedError):
            await call


_CHILD = """
import asyncio, sys
from layered_store.snapshot import StateSnapshot
from layered_store.stores.sql import SQLStore

async def main():
    store = SQLStore(sys.argv[1], latest_table=sys.argv[2], history_table=sys.argv[3])
    print("up", flush=True)
    sys.stdin.readline()
    await store.upsert_latest(StateSnapshot(sys.argv[4]))

asyncio.run(main())
"""


@from_two_stores
async def test_several_processes_create_the_tables_at_once(bench: Bench) -> None:
    """Four processes start together, each writes, none fails, and each ends without closing."""
    names = [bench.options["latest_table"], bench.options["history_table"]]
    children = [
        subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-W", "error", "-c", _CHILD, str(bench.url), *names, f"u{index}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for index in range(4)
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write(b"go\n")
        child.stdin.flush()
    for child in children:
        _, errors = await asyncio.to_thread(child.communicate, timeout=30)
        assert (child.returncode, errors) == (0, b"")
    store = bench.build()
    assert len(await store.get_latest_many([f"u{index}" for index in range(4)])) == 4
