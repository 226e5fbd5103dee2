"""SQLAlchemy engines: built from a URL, one per event loop, with the drivers' traps closed."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, StaticPool

from layered_store.clock import SYSTEM_CLOCK
from layered_store.errors import ConfigError
from layered_store.stores.sql.desks import let_go_of_parents
from layered_store.stores.sql.dialects import FAMILIES
from layered_store.stores.sql.url_options import check_options, typed_options

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from layered_store.stores.sql.batching import Batcher, Reads, Writes
    from layered_store.stores.sql.desks import Desks

__all__ = [
    "Home",
    "build_engine",
    "close_with_loop",
    "drop",
    "family_of",
    "forget_dead",
    "in_memory",
    "parse_url",
]

_DRIVERS: Final = {
    "sqlite": "sqlite+aiosqlite",
    "postgres": "postgresql+asyncpg",
    "postgresql": "postgresql+asyncpg",
    "mysql": "mysql+aiomysql",
    "mariadb": "mariadb+aiomysql",
}
_ASYNC: Final = ("aiosqlite", "asyncpg", "psycopg", "psycopg_async", "aiomysql", "asyncmy")
_EXTRAS: Final = {
    "asyncpg": "postgres",
    "psycopg": "psycopg",
    "aiomysql": "mysql",
    "asyncmy": "asyncmy",
}
_THREAD_SECONDS: Final = 1.0
_MAX_PORT: Final = 65_535
_SCHEMES: Final = "sqlite+aiosqlite://, postgresql+asyncpg:// or mysql+aiomysql://"
_BUSY_MS: Final = 5_000
_CLOSE_SECONDS: Final = 1.0
_OPENED_SECONDS: Final = 0.25
_LONGEST: Final = 86_400
"""Seconds; the settings of servers and drivers take no more than some weeks."""
_LOG_NAME: Final = "layered_store"


@dataclass(eq=False, slots=True)
class Home:
    """What a store keeps for one event loop: connections cannot move to another.

    Args:
        loop: the loop.
        engine: makes connections, in AUTOCOMMIT mode.
        desks: the connections.
        reads: the reads that wait or are under way.
        writes: the writes and erasures that wait or are under way.
        histories: the reads of histories; None where they do not share a round trip.
        writing: the right to write; one writer at a time on SQLite.
        opening: held while tables are looked for, or the engine is replaced.
        ready: whether the tables are known to exist.
        closer: closes an engine of our own when the loop ends and nobody called ``aclose``.
        running: operations under way, also those whose caller is gone.
    """

    loop: asyncio.AbstractEventLoop
    engine: AsyncEngine
    desks: Desks
    reads: Reads = field(init=False)
    writes: Writes = field(init=False)
    histories: Reads | None = None
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    opening: asyncio.Lock = field(default_factory=asyncio.Lock)
    ready: bool = False
    closer: AsyncGenerator[None, None] | None = None
    running: set[asyncio.Task[Any]] = field(default_factory=set)

    def batchers(self) -> list[Batcher]:
        """Return all that send calls together."""
        return [self.reads, self.writes, *([self.histories] if self.histories else [])]

    def tasks(self) -> set[asyncio.Task[Any]]:
        """Return what is under way."""
        out = [batch.task for each in self.batchers() for batch in each.out]
        return {*self.running, *(task for task in out if task is not None)}


def parse_url(url: object, owner: str) -> URL:
    """Return the URL with an async driver filled in where it names none.

    Raises:
        ConfigError: no URL, or of a database or driver that cannot be used; its text is not shown.
    """
    parsed = None
    try:
        parsed = make_url(url)  # type: ignore[arg-type]
    except (ArgumentError, ValueError, TypeError, AttributeError):
        pass
    if parsed is None:
        # The URL may hold a password: neither it nor the cause goes along.
        raise ConfigError(
            "must be a URL such as sqlite+aiosqlite:///states.db or"
            " postgresql+asyncpg://user:password@host/database",
            option="url",
            layer=owner,
        )
    if parsed.port is not None and not 0 < parsed.port <= _MAX_PORT:
        raise ConfigError(f"names a port beyond {_MAX_PORT}", option="url", layer=owner)
    scheme = parsed.drivername
    if scheme in _DRIVERS:
        parsed = parsed.set(drivername=_DRIVERS[scheme])
        scheme = parsed.drivername
    base, _, driver = scheme.partition("+")
    if base not in FAMILIES or driver not in _ASYNC:
        raise ConfigError(
            f"must name a database and an async driver: {_SCHEMES}", option="url", layer=owner
        )
    module = driver.removesuffix("_async")
    if importlib.util.find_spec(module) is None:
        extra = _EXTRAS.get(module)
        install = f"'layered-store[{extra}]'" if extra else module
        raise ConfigError(
            f"needs the driver {module}, which is not installed: pip install {install}",
            option="url",
            layer=owner,
        )
    return check_options(parsed, owner)


def family_of(dialect_name: str, option: str, owner: str) -> str:
    """Return which of the three kinds of database a dialect is."""
    try:
        return FAMILIES[dialect_name]
    except KeyError:
        raise ConfigError(
            "must be of SQLite, PostgreSQL, MariaDB or MySQL", option=option, layer=owner
        ) from None


def in_memory(url: URL) -> bool:
    """Tell whether this is an SQLite database that lives and dies with its connection."""
    if FAMILIES.get(url.get_backend_name()) != "sqlite":
        return False
    name = url.database or ":memory:"
    return name == ":memory:" or "mode=memory" in name or url.query.get("mode") == "memory"


def build_engine(url: URL, *, size: int, wait: float, prepares: bool) -> AsyncEngine:
    """Return an engine of our own for one event loop.

    Args:
        url: with an async driver.
        size: most connections; callers beyond wait for one.
        wait: seconds that a caller waits for a connection, and a connection for its server.
        prepares: whether statements are prepared once and kept (PostgreSQL); a pooler that gives
            each transaction another connection, such as pgbouncer, does not keep them.
    """
    options: dict[str, Any] = {
        # Each statement commits by itself; write transactions say BEGIN and COMMIT, so that
        # we know whether a commit was sent. Nothing is then left to reset.
        "isolation_level": "AUTOCOMMIT",
        "pool_reset_on_return": None,
        "hide_parameters": True,
        "logging_name": _LOG_NAME,
    }
    # SQLAlchemy logs whole rows at DEBUG, whatever hide_parameters says.
    logging.getLogger(f"sqlalchemy.engine.Engine.{_LOG_NAME}").addFilter(_no_rows)
    arguments = typed_options(url) | _connect_arguments(url, wait)
    if prepares:
        arguments |= _session_arguments(url, wait)
    else:
        arguments |= _unprepared_arguments(url)
    if in_memory(url):
        options["connect_args"] = arguments
        engine = create_async_engine(url, poolclass=StaticPool, **options)
    else:
        options |= {
            "poolclass": AsyncAdaptedQueuePool,
            "pool_size": size,
            "max_overflow": 0,
            "pool_timeout": wait,
            "connect_args": arguments,
        }
        engine = create_async_engine(url, **options)
    if url.get_backend_name() == "sqlite":
        event.listen(engine.sync_engine, "connect", _prepare_sqlite)
    return engine


def _no_rows(record: logging.LogRecord) -> bool:
    return record.levelno > logging.DEBUG


def _connect_arguments(url: URL, wait: float) -> dict[str, Any]:
    driver = url.get_driver_name()
    if driver == "aiosqlite":
        return {"async_creator_fn": _open_sqlite}
    if driver == "asyncpg":
        limit = {} if "timeout" in url.query else {"timeout": wait}
        return limit | {"async_creator_fn": _open_asyncpg}
    if driver in ("aiomysql", "asyncmy", "psycopg", "psycopg_async"):
        return {} if "connect_timeout" in url.query else {"connect_timeout": _whole(wait)}
    return {}


async def _open_sqlite(*args: Any, **options: Any) -> Any:
    """Return an open aiosqlite connection.

    When it cannot be opened, its thread speaks to the event loop once more before it ends. A loop
    that is closed by then has the thread die with a traceback.
    """
    import aiosqlite  # noqa: PLC0415  only where it is the driver

    let_go_of_parents(args[0])
    # One thread uses it; only a forked child closes it, where that thread is not.
    connection = aiosqlite.connect(*args, **{"check_same_thread": False, **options})
    thread: Any = getattr(connection, "_thread", connection)  # which it was itself before 0.22
    thread.daemon = True
    try:
        return await connection
    except BaseException:
        if thread.is_alive():
            await asyncio.to_thread(thread.join, _THREAD_SECONDS)
        raise


async def _open_asyncpg(*args: Any, **options: Any) -> Any:
    """Return an open asyncpg connection.

    Cancelled in the turn in which TCP has connected, asyncpg leaves behind a future whose error
    nobody reads, and asyncio writes that to the log. So a cancelled opening gets a moment to come
    past that point; the caller of the store left at once, this is a task of its own.
    """
    import asyncpg  # noqa: PLC0415  only where it is the driver

    opening = asyncio.ensure_future(asyncpg.connect(*args, **options))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        try:
            if not opening.done():
                await asyncio.wait((opening,), timeout=_OPENED_SECONDS)
        finally:  # also when it is cancelled again
            if not opening.done():
                opening.cancel()
            elif not opening.cancelled() and opening.exception() is None:
                opening.result().terminate()
        raise


def _session_arguments(url: URL, wait: float) -> dict[str, Any]:
    """Return what makes the server end a transaction whose client is gone without a word.

    It would hold its locks, and on PostgreSQL the change log, until TCP gives up: for hours.
    """
    driver, seconds = url.get_driver_name(), _whole(wait)
    idle = "idle_in_transaction_session_timeout"
    if driver == "asyncpg":
        return {"server_settings": {idle: str(seconds * 1000)}}
    if driver in ("psycopg", "psycopg_async") and "options" not in url.query:
        return {"options": f"-c {idle}={seconds * 1000}"}
    if driver in ("aiomysql", "asyncmy") and "init_command" not in url.query:
        # MariaDB reads what stands in this comment, MySQL knows no such limit.
        only = f"/*M!100300 , SESSION idle_write_transaction_timeout = {seconds} */"
        return {"init_command": f"SET @layered_store = 1 {only}"}
    return {}


def _whole(seconds: float) -> int:
    return max(1, int(min(seconds, _LONGEST)))


def _unprepared_arguments(url: URL) -> dict[str, Any]:
    driver = url.get_driver_name()
    if driver == "asyncpg":
        # The statement without a name lasts until the next one, which is all that is needed: it
        # is prepared and run before the connection may be given to another.
        return {
            "statement_cache_size": 0,
            "prepared_statement_cache_size": 0,
            "prepared_statement_name_func": str,
        }
    return {"prepare_threshold": None} if driver in ("psycopg", "psycopg_async") else {}


def _prepare_sqlite(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    try:
        cursor.execute(f"PRAGMA busy_timeout={_BUSY_MS}")
        # FULL: an acknowledged write survives power loss too (in WAL, NORMAL would not sync).
        cursor.execute("PRAGMA synchronous=FULL")
        # What was erased is overwritten in the file too, as Debian's SQLite does by itself.
        cursor.execute("PRAGMA secure_delete=ON")
        cursor.execute("PRAGMA journal_mode")
        mode = cursor.fetchone()
        if mode is not None and mode[0] not in ("wal", "memory"):
            # A read-only file cannot change its mode, and can be read in any.
            with suppress(Exception):
                cursor.execute("PRAGMA journal_mode=WAL")
        # A batch of writes touches hundreds of pages: with SQLite's 1000, every fourth commit
        # would pay for a checkpoint. 4000 are 16 MB.
        cursor.execute("PRAGMA wal_autocheckpoint=4000")
    finally:
        cursor.close()


# Held here, since a generator that is collected just before its loop ends is not waited for.
_closers: dict[AsyncEngine, AsyncGenerator[None, None]] = {}


async def close_with_loop(home: Home) -> AsyncGenerator[None, None]:
    """Have its connections closed when the running loop ends; return what does it earlier."""
    closer = _closers[home.engine] = _closer(home.engine, home.desks)
    await anext(closer)
    return closer


async def _closer(engine: AsyncEngine, desks: Desks) -> AsyncGenerator[None, None]:
    """Close all connections when this generator ends.

    An event loop ends its generators before it closes (``asyncio.run`` sees to that), which is
    the last moment at which connections can still be closed properly.
    """
    try:
        yield
    finally:
        _closers.pop(engine, None)
        # A server that hangs must not keep the process from ending.
        with suppress(Exception):
            async with SYSTEM_CLOCK.timeout(_CLOSE_SECONDS):
                await desks.release()
                await engine.dispose()


def drop(engine: AsyncEngine) -> None:
    """Forget an engine whose event loop is gone or not ours: its connections cannot be closed."""
    _closers.pop(engine, None)
    engine.sync_engine.dispose(close=False)


def forget_dead(homes: dict[asyncio.AbstractEventLoop, Home]) -> None:
    """Forget the homes of event loops that are closed."""
    for other in [other for other in homes if other.is_closed()]:
        drop(homes.pop(other).engine)
