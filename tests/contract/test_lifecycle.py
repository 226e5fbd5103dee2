"""Opening, closing, event loops, and a process that ends without closing anything."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from stacks import DEEP, LAYERS

from layered_store import (
    Cached,
    ClosedError,
    Fallback,
    Layer,
    MemoryStore,
    Ramp,
    RedisStore,
    Retry,
    SQLStore,
    StateSnapshot,
    StateStore,
    WriteThrough,
)
from layered_store.stack import walk
from layered_store.testing.clock import settle

ROOT = Path(__file__).parents[2]
STATE = StateSnapshot("u-1", axes={"a": 0.5})


class Noted(MemoryStore):
    """Counts how often it was opened and closed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.opened = self.closed = 0

    async def open(self) -> None:
        self.opened += 1

    async def aclose(self) -> None:
        self.closed += 1
        await super().aclose()


@pytest.mark.parametrize("name", [*LAYERS, *DEEP])
async def test_the_whole_tree_is_opened_and_closed(name: str) -> None:
    """``async with`` opens every store and closes every store; closing again is fine."""
    inner = Noted()
    stack = {**LAYERS, **DEEP}[name](inner)
    async with stack as entered:
        assert entered is stack
        assert inner.opened >= 1
    assert inner.closed >= 1
    await stack.aclose()
    for place in walk(stack):
        with pytest.raises(ClosedError) as refused:
            await place.store.get_latest("u-1")
        assert refused.value.layer is not None


class Takes(MemoryStore):
    """Takes a few turns for each write, and none more once it is closed."""

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        await settle()
        await super().upsert_latest(snapshot)

    async def delete(self, user_id: str) -> None:
        await settle()
        await super().delete(user_id)


@pytest.mark.parametrize(
    ("build", "operation"),
    [
        (lambda: WriteThrough(Takes(), origin=Takes()), "delete"),
        (lambda: Fallback(Takes(), secondary=Takes()), "delete"),
        (lambda: Ramp(Takes(), alternative=Takes(), share=1.0), "delete"),
        (lambda: Ramp(Takes(), alternative=Takes(), share=1.0), "upsert_latest"),
    ],
)
async def test_closing_lets_what_takes_steps_on_two_stores_finish(
    build: Callable[[], StateStore], operation: str
) -> None:
    """Each store drains what it has; the step on the second one began when the first had ended."""
    stack = build()
    await stack.upsert_latest(STATE)
    argument = STATE if operation == "upsert_latest" else STATE.user_id
    call = asyncio.create_task(getattr(stack, operation)(argument))
    await asyncio.sleep(0)
    await stack.aclose()
    await call


@pytest.mark.parametrize("name", [*LAYERS, *DEEP])
async def test_opens_itself(name: str) -> None:
    """Without ``async with`` everything works from the first call on."""
    stack = {**LAYERS, **DEEP}[name](MemoryStore())
    if name != "ReadOnly":
        await stack.upsert_latest(STATE)
    assert await stack.get_latest("u-1") == (None if name == "ReadOnly" else STATE)
    await stack.aclose()


async def test_all_branches_close_when_one_fails() -> None:
    """A store that cannot be closed keeps no other one open; once all are, its error is raised."""

    class Stuck(Noted):
        async def aclose(self) -> None:
            await super().aclose()
            raise RuntimeError("stuck")

    class Slow(Noted):
        async def aclose(self) -> None:
            for _ in range(9):
                await asyncio.sleep(0)
            await super().aclose()

    stores = [Stuck(), Slow(), Slow()]
    stack = Cached(Fallback(WriteThrough(stores[0], origin=stores[1]), secondary=Layer(stores[2])))
    with pytest.raises(RuntimeError, match="stuck"):
        await stack.aclose()
    assert [store.closed for store in stores] == [1, 1, 1]


async def test_an_error_inside_closes_too() -> None:
    """The block's own error is the one that is seen."""
    inner = Noted()
    with pytest.raises(ValueError, match="mine"):
        async with Retry(inner):
            raise ValueError("mine")
    assert inner.closed == 1


async def test_redis_client_stays_the_callers(redis_url: str) -> None:
    """A client that was passed in is open after the stack was closed."""
    from redis.asyncio import Redis

    client = Redis.from_url(redis_url)
    stack = Layer(RedisStore(client=client))
    await stack.upsert_latest(STATE)
    await stack.aclose()
    assert await client.ping()
    await client.aclose()


@pytest.mark.parametrize("database", ["sqlite_url", "postgres_url", "mysql_url"])
async def test_engine_stays_the_callers(database: str, request: pytest.FixtureRequest) -> None:
    """An engine that was passed in works after the stack was closed."""
    from sqlalchemy import text
    from sqlalchemy.ext.asyncio import create_async_engine

    engine = create_async_engine(request.getfixturevalue(database))
    stack = Layer(SQLStore(engine=engine))
    await stack.upsert_latest(STATE)
    await stack.aclose()
    async with engine.connect() as connection:
        assert (await connection.execute(text("SELECT 1"))).scalar_one() == 1
    await engine.dispose()


BUILDERS: dict[str, tuple[tuple[str, ...], Callable[..., StateStore]]] = {
    "memory": ((), MemoryStore),
    "redis": (("redis_url",), RedisStore),
    "sqlite": (("sqlite_url",), SQLStore),
    "postgresql": (("postgres_url",), SQLStore),
    "mariadb": (("mysql_url",), SQLStore),
    "three tiers": (
        ("redis_url", "postgres_url"),
        lambda redis, sql: Cached(RedisStore(redis), fallback=Retry(SQLStore(sql))),
    ),
}


def built(name: str, request: pytest.FixtureRequest) -> StateStore:
    fixtures, build = BUILDERS[name]
    return build(*map(request.getfixturevalue, fixtures))


async def _use(store: StateStore, user: str) -> None:
    """Write and read, or be refused by name with a remedy."""
    state = StateSnapshot(user)
    try:
        await store.upsert_latest(state)
        assert await store.get_latest(user) == state
    except ClosedError as exc:
        assert exc.layer, "the error names the store"
        assert "event loop" in str(exc), "the error names the remedy"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", BUILDERS)
def test_one_event_loop_after_another(name: str, request: pytest.FixtureRequest) -> None:
    """A second ``asyncio.run`` works, or is refused by an error that names store and remedy."""
    store = built(name, request)
    for number in range(3):
        asyncio.run(_use(store, f"u-{number}"))

    async def end() -> None:
        await store.aclose()

    asyncio.run(end())


@pytest.mark.parametrize("name", BUILDERS)
def test_two_event_loops_at_once(name: str, request: pytest.FixtureRequest) -> None:
    """Two threads with a loop each work side by side, or one is refused by name."""
    store = built(name, request)

    async def both() -> None:
        others = [
            asyncio.to_thread(lambda n=n: asyncio.run(_use(store, f"other-{n}"))) for n in range(2)
        ]
        await asyncio.gather(*others, *(_use(store, f"own-{n}") for n in range(5)))
        await store.aclose()

    asyncio.run(both())


def test_memory_store_from_many_threads() -> None:
    """Threads with loops of their own lose nothing and see each other's writes."""
    store = MemoryStore(history_limit=None)

    async def work(thread: int) -> None:
        for number in range(100):
            await store.upsert_latest(StateSnapshot("shared", 1_000 * thread + number))
            await store.upsert_latest(StateSnapshot(f"own-{thread}", number))
            assert (await store.get_latest(f"own-{thread}")).updated_at_unix_ms == number  # type: ignore[union-attr]
            await store.get_history("shared", 5)

    async def main() -> None:
        await asyncio.gather(
            *(asyncio.to_thread(lambda n=n: asyncio.run(work(n))) for n in range(8))
        )
        history = await store.get_history("shared", 10_000)
        assert len({state.updated_at_unix_ms for state in history}) == 800
        assert (await store.get_latest("shared")) == history[0]
        assert (await store.read("shared")).version == 800

    asyncio.run(main())


PROGRAM = """
import asyncio, sys
from layered_store import *
{build}
state = StateSnapshot("u-1", axes={{"a": 0.5}})

async def main():
    # How fast this machine is belongs to no rule here.
    asyncio.get_running_loop().slow_callback_duration = 60
    {first}
    await store.upsert_latest(state)
    await store.upsert_latest_many([state, StateSnapshot("u-2")])
    assert await store.get_latest("u-1") == state
    await store.get_latest_many(["u-1", "u-2", "u-3"])
    await store.get_history("u-1", 5)
    await asyncio.gather(*(store.get_latest(f"x-{{n}}") for n in range(50)))
    await store.delete("u-2")
    assert await store.health_check()
    {last}

asyncio.run(main())
print("done")
"""
STACKS = {
    "memory": "store = MemoryStore()",
    "redis": "store = RedisStore(sys.argv[1])",
    "sqlite": "store = SQLStore(sys.argv[1])",
    "postgresql": "store = SQLStore(sys.argv[1])",
    "mariadb": "store = SQLStore(sys.argv[1])",
    "three tiers": (
        "store = Metrics(Cached(CircuitBreaker(Timeout(RedisStore(sys.argv[1]), seconds=5)),"
        " fallback=Retry(Timeout(SQLStore(sys.argv[2]), seconds=20)), refresh_ahead=0.5),"
        " name='s')"
    ),
}


ENDS = [(name, "never closed") for name in STACKS] + [
    ("three tiers", how) for how in ("closed twice", "opened", "in a with block")
]


@pytest.mark.parametrize(("name", "how"), ENDS)
def test_the_process_ends(name: str, how: str, request: pytest.FixtureRequest) -> None:
    """It exits at once and silently, whatever was closed, all warnings being errors."""
    first, last = {
        "never closed": ("pass", "pass"),
        "closed twice": ("pass", "await store.aclose(); await store.aclose()"),
        "opened": ("await store.open()", "pass"),
        "in a with block": ("await store.__aenter__()", "await store.__aexit__(None, None, None)"),
    }[how]
    program = PROGRAM.format(build=STACKS[name], first=first, last=last)
    program = program.replace('print("done")', 'print("done", flush=True)')
    urls = [request.getfixturevalue(fixture) for fixture in BUILDERS[name][0]]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, "-W", "error", "-X", "dev", "-c", program, *urls],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    said = process.stdout.readline()
    done = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert said == "done\n", errors
    assert errors == ""
    assert process.returncode == 0
    assert time.monotonic() - done < 5
