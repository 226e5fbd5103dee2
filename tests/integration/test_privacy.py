"""G10: no user id, state value or password in a log, metric, repr, health report or error text.

Marked values go through every operation and every failure, with all logging switched on; then all
text that came out is searched.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from servers import Server
from sqlalchemy.engine import make_url

from layered_store import (
    Bulkhead,
    Cached,
    CircuitBreaker,
    ConfigError,
    Fallback,
    MemoryStore,
    Metrics,
    RedisStore,
    Retry,
    SQLStore,
    StateSnapshot,
    StateStore,
    Timeout,
    describe,
    to_config,
)

USER, AXIS, VALUE, PASSWORD = "markeduser", "marked_axis", 0.7318294, "hunter2marked"
MARKS = (USER, AXIS, str(VALUE), PASSWORD, "marked")
STATE = StateSnapshot(USER, axes={AXIS: VALUE})
BAD = (
    StateSnapshot(USER + " !", axes={AXIS: VALUE}),
    StateSnapshot(USER, axes={AXIS.upper(): VALUE}),
    StateSnapshot(USER, axes={AXIS: VALUE + 1}),
    StateSnapshot(USER, confidence=VALUE + 1),
    StateSnapshot(USER, updated_at_unix_ms=VALUE),  # type: ignore[arg-type]
    StateSnapshot(USER, source=AXIS),  # type: ignore[arg-type]
)


class Listener:
    """Keeps all that was said."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.texts: list[str] = []
        self.caplog = caplog
        self.failures = 0

    def hear(self, *things: object) -> None:
        self.texts += [str(thing) for thing in things] + [repr(thing) for thing in things]

    async def call(self, work: Any) -> None:
        """Await a call and note what its error says, causes included."""
        try:
            await work
        except Exception as exc:
            self.failures += 1
            current: BaseException | None = exc
            while current is not None:
                self.hear(current)
                current = current.__cause__ or current.__context__
            self.texts.append("".join(traceback.format_exception(exc)))

    def check(self) -> None:
        said = "\n".join(self.texts) + self.caplog.text
        # The redacted form of an id may be shown: its first four characters and dots.
        for mark in MARKS:
            assert mark not in said.replace("mark...", ""), said[
                max(0, said.find(mark) - 300) : said.find(mark) + 100
            ]


@pytest.fixture
def listener(caplog: pytest.LogCaptureFixture) -> Iterator[Listener]:
    # SQLAlchemy's loggers have no level of their own until somebody asks for one.
    with caplog.at_level(logging.DEBUG), caplog.at_level(logging.DEBUG, "sqlalchemy"):
        yield Listener(caplog)


async def everything(stack: StateStore, listener: Listener) -> None:
    """Call every operation with good and bad arguments."""
    for snapshot in (STATE, *BAD):
        listener.hear(snapshot)
        await listener.call(stack.upsert_latest(snapshot))
        await listener.call(stack.upsert_latest_many([STATE, snapshot]))
    for user_id in (USER, USER + "/", USER * 40):
        await listener.call(stack.get_latest(user_id))
        await listener.call(stack.get_latest_many([user_id, "u-2"]))
        await listener.call(stack.get_history(user_id, 5))
        await listener.call(stack.get_history(user_id, -5))
        await listener.call(stack.delete(user_id))
    report = await stack.health_report()
    listener.hear(report, report.to_json(), stack, describe(stack), to_config(stack))


def layered(tier: StateStore, record: StateStore) -> tuple[StateStore, CollectorRegistry]:
    registry = CollectorRegistry()
    stack = Metrics(
        Cached(
            Retry(CircuitBreaker(Timeout(tier, seconds=0.5))),
            fallback=Bulkhead(Retry(Timeout(record, seconds=2), attempts=2), max_in_flight=8),
        ),
        name="stack",
        registry=registry,
    )
    return stack, registry


def with_password(url: str) -> str:
    parsed = make_url(url)
    return parsed.set(password=PASSWORD, username=parsed.username or "default").render_as_string(
        hide_password=False
    )


@pytest.mark.parametrize("engine", ["sqlite", "postgres", "mysql"])
async def test_a_stack_that_works_and_one_that_is_refused(
    engine: str, request: pytest.FixtureRequest, redis_url: str, listener: Listener
) -> None:
    """Good calls, refused arguments, and servers that refuse the login."""
    url = request.getfixturevalue(f"{engine}_url")
    stack, registry = layered(RedisStore(redis_url), SQLStore(url))
    await everything(stack, listener)
    assert listener.failures
    listener.texts.append(generate_latest(registry).decode())
    await stack.aclose()
    secret = redis_url.replace("redis://", f"redis://user:{PASSWORD}@")
    record = SQLStore(url if engine == "sqlite" else with_password(url).replace("tester", "nobody"))
    stack, registry = layered(RedisStore(secret), record)
    await everything(stack, listener)
    listener.texts.append(generate_latest(registry).decode())
    await stack.aclose()
    listener.check()


@pytest.fixture
async def dying(
    redis_server: Callable[..., Server], sqlite_url: str
) -> AsyncIterator[tuple[Server, StateStore]]:
    server = redis_server()
    secret = f"redis://127.0.0.1:{server.port}/0"
    stack, _ = layered(RedisStore(secret, timeout=0.2, connect_timeout=0.2), SQLStore(sqlite_url))
    yield server, stack
    await stack.aclose()


@pytest.mark.parametrize("end", ["kill", "stop"])
async def test_a_tier_that_dies_or_hangs(
    end: str, dying: tuple[Server, StateStore], listener: Listener
) -> None:
    """Errors of lost connections and time limits, an erasure that cannot finish."""
    server, stack = dying
    await stack.upsert_latest(STATE)
    getattr(server, end)()
    await everything(stack, listener)
    server.cont()
    listener.check()


async def test_records_that_cannot_be_read(
    redis_url: str, sqlite_url: str, listener: Listener
) -> None:
    """What stands in the databases is not quoted when it is damaged or another user's."""
    from sqlalchemy import text
    from sqlalchemy.ext.asyncio import create_async_engine

    redis, record = RedisStore(redis_url), SQLStore(sqlite_url)
    await record.upsert_latest(STATE)
    await redis.upsert_latest(STATE)
    engine = create_async_engine(sqlite_url)
    async with engine.begin() as connection:
        await connection.execute(text("UPDATE layered_store_history SET payload = :p"), {"p": b"x"})
    await redis.command("SET", redis.key(redis.digest(USER)), f"{USER} {VALUE} {AXIS}")
    for store in (redis, record):
        await everything(store, listener)
        await record.upsert_latest(STATE)
        async with engine.begin() as connection:
            await connection.execute(text("UPDATE layered_store_latest SET user_id = 'other'"))
        await listener.call(store.get_latest(USER))
        await store.aclose()
    await engine.dispose()
    listener.check()


async def test_constructors_show_no_secret(listener: Listener) -> None:
    """Neither a wrong URL nor a wrong option is quoted."""
    for build in (
        lambda: RedisStore(f"redis://user:{PASSWORD}@127.0.0.1:99999/0"),
        lambda: RedisStore(f"nonsense://user:{PASSWORD}@127.0.0.1/0"),
        lambda: RedisStore(f"redis://127.0.0.1/0?password={PASSWORD}&timeout={PASSWORD}"),
        lambda: RedisStore(f"redis+sentinel://user:{PASSWORD}@127.0.0.1"),
        lambda: RedisStore(f"redis+cluster://user:{PASSWORD}@127.0.0.1:x"),
        lambda: RedisStore("redis://127.0.0.1", digest_key=PASSWORD * 9),
        lambda: RedisStore("redis://127.0.0.1", prefix=f"{{{PASSWORD}}}"),
        lambda: SQLStore(f"postgresql+psycopg9://user:{PASSWORD}@127.0.0.1/db"),
        lambda: SQLStore(f"nonsense://user:{PASSWORD}@127.0.0.1/db"),
        lambda: SQLStore(f"postgresql://user:{PASSWORD}@[::1/db"),
        lambda: SQLStore("sqlite://", latest_table=PASSWORD + "'"),
        lambda: SQLStore("sqlite://", digest_key=PASSWORD * 9),
        lambda: Cached(MemoryStore(), ttl=PASSWORD),  # type: ignore[arg-type]
        lambda: Metrics(MemoryStore(), name=PASSWORD + "!"),
    ):
        with pytest.raises(ConfigError) as caught:
            build()
        listener.hear(caught.value)
        listener.texts.append("".join(traceback.format_exception(caught.value)))
    # The lines of this file that a traceback quotes say "PASSWORD", never its value.
    for store in (
        RedisStore(f"redis://user:{PASSWORD}@127.0.0.1/0"),
        RedisStore(f"redis://127.0.0.1/0?password={PASSWORD}", digest_key=PASSWORD),
        SQLStore(f"postgresql://user:{PASSWORD}@127.0.0.1/db", digest_key=PASSWORD),
        Fallback(
            SQLStore(f"mysql://u:{PASSWORD}@127.0.0.1/d?ssl_key={PASSWORD}"),
            secondary=MemoryStore(),
        ),
    ):
        listener.hear(store, describe(store), to_config(store))
    listener.check()


async def test_a_task_that_fails_unseen_tells_nobody(listener: Listener, sqlite_url: str) -> None:
    """Cancelled callers leave nothing for asyncio to complain about with their arguments."""
    stack = Cached(SQLStore(sqlite_url))
    asyncio.get_running_loop().set_debug(True)
    try:
        tasks = [asyncio.create_task(stack.upsert_latest(STATE)) for _ in range(20)]
        tasks += [asyncio.create_task(stack.get_latest(USER)) for _ in range(20)]  # type: ignore[misc]
        for index, task in enumerate(tasks):
            await asyncio.sleep(0.001 * (index % 3))
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await stack.aclose()
    finally:
        asyncio.get_running_loop().set_debug(False)
    listener.check()


async def test_asyncios_slow_callbacks_show_nobody(listener: Listener, sqlite_url: str) -> None:
    """In its debug mode it logs what a callback was called with, results of threads too."""
    loop = asyncio.get_running_loop()
    stack = Cached(SQLStore(sqlite_url))
    before = loop.slow_callback_duration
    loop.set_debug(True)
    loop.slow_callback_duration = 0
    try:
        await stack.upsert_latest(STATE)
        await stack.inner.get_latest(USER)
        await stack.get_history(USER, 5)
        await stack.get_latest_many([USER])
        await stack.delete(USER)
        await stack.aclose()
    finally:
        loop.slow_callback_duration = before
        loop.set_debug(False)
    listener.check()
