"""Row 14: a million users against ten thousand, and a user with a long history."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.figures import Figure, Result, spread
from benchmarks.rounds import compare, load
from benchmarks.setting import Setting, snapshot, user
from layered_store import RedisStore, SQLStore

__all__ = ["run"]

_BATCH = 2_000


async def run(setting: Setting) -> list[Result]:
    """Fill each backend twice and compare reads; then one user's long history."""
    few, many = setting.some(10_000, 500), setting.some(1_000_000, 2_000)
    dsn = (await setting.postgres()).replace("postgresql:", "postgresql+asyncpg:")
    url = setting.redis_url

    def sql(address: str, name: str) -> SQLStore:
        return SQLStore(
            address, history_limit=0, latest_table=f"latest_{name}", history_table=f"hist_{name}"
        )

    pairs: dict[str, tuple[Any, Any]] = {
        "SQLite": (
            sql(f"sqlite+aiosqlite:///{setting.folder}/few.db", "a"),
            sql(f"sqlite+aiosqlite:///{setting.folder}/many.db", "a"),
        ),
        "PostgreSQL": (sql(dsn, "few"), sql(dsn, "many")),
        "Redis": (RedisStore(url, prefix="few:"), RedisStore(url, prefix="many:")),
    }
    result = Result(
        f"{many:,} users against {few:,}",
        columns=["backend", f"µs a read of {few:,}", f"µs a read of {many:,}", "filled, users/s"],
        note="16 callers; users drawn evenly.",
    )
    for name, (small, large) in pairs.items():
        await _fill(small, few)
        begun = time.perf_counter()
        await _fill(large, many)
        rate = many / (time.perf_counter() - begun)
        calls = setting.some(3_000, 200)
        small_keys = [user(setting.random.randrange(few)) for _ in range(calls)]
        large_keys = [user(setting.random.randrange(many)) for _ in range(calls)]
        costs = await compare(
            {
                "few": load(small.get_latest, small_keys, 16),
                "many": load(large.get_latest, large_keys, 16),
            },
            setting.rounds,
        )
        ratio = costs.ratio("many", "few")
        what = f"{name}: a read of {many:,} users to one of {few:,}"
        result.figures.append(Figure(14, what, ratio, at_most=1.2))
        result.rows.append([name, costs.wall("few") * 1e6, costs.wall("many") * 1e6, rate])
        await small.aclose()
        await large.aclose()
    return [result, await _histories(setting, dsn)]


async def _fill(store: Any, users: int) -> None:
    for start in range(0, users, _BATCH):
        numbers = range(start, min(users, start + _BATCH))
        await store.upsert_latest_many(snapshot(user(number)) for number in numbers)


async def _histories(setting: Setting, dsn: str) -> Result:
    """The newest ten of a long history, against those of a short one."""
    short, long = 100, setting.some(10_000, 300)
    result = Result(
        "One user's history",
        columns=["backend", f"µs newest 10 of {short}", f"µs newest 10 of {long:,}", "ms delete"],
    )
    addresses = {"SQLite": f"sqlite+aiosqlite:///{setting.folder}/history.db", "PostgreSQL": dsn}
    for name, address in addresses.items():
        store = SQLStore(
            address, history_limit=None, latest_table="latest_h", history_table="history_h"
        )
        for user_id, count in (("short", short), ("long", long)):
            for start in range(0, count, 500):
                size = min(500, count - start)
                await store.upsert_latest_many(snapshot(user_id) for _ in range(size))
        items = [10] * setting.some(300, 20)

        async def newest(user_id: str, store: SQLStore = store) -> None:
            assert len(await store.get_history(user_id, 10)) == 10

        costs = await compare(
            {name: load(newest, [name] * len(items), 1) for name in ("short", "long")},
            setting.rounds,
        )
        ratio = costs.ratio("long", "short")
        what = f"{name}: newest 10 of {long:,} states to those of {short}"
        result.figures.append(Figure(14, what, ratio, at_most=1.2))
        begun = time.perf_counter()
        await store.delete("long")
        took = (time.perf_counter() - begun) * 1e3
        result.figures.append(
            Figure(14, f"{name}: delete of {long:,} states", spread([took]), "ms")
        )
        micros = [costs.wall(each) * 1e6 for each in ("short", "long")]
        result.rows.append([name, *micros, took])
        await store.aclose()
    return result
