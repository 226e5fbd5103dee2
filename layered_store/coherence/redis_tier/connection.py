"""A connection of the tier's own, apart from those that carry the calls."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from layered_store.errors import UnavailableError
from layered_store.stores.redis.feed import Feed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable

    from layered_store.coherence.redis_tier.buckets import Bucket
    from layered_store.stores.redis.store import RedisStore

__all__ = ["Connection", "ServerRun", "connected"]


class ServerRun(NamedTuple):
    """One life of one server.

    Args:
        run_id: 40 hexadecimal digits; another after each start.
        major: of the server's version.
    """

    run_id: str
    major: int


class Connection:
    """One connection of the driver, whose errors become ours.

    Args:
        store: which store's it is.
        driver: the driver's connection.
    """

    def __init__(self, store: RedisStore, driver: Any) -> None:
        self._store = store
        self._driver = driver

    async def ask(self, *command: bytes | str) -> Any:
        """Send a command and return its reply."""
        await self._done(self._driver.send_command(*command))
        return await self._done(self._driver.read_response())

    def feed(self) -> Feed:
        """Return a feed that goes on with this connection; closing it is the caller's."""
        return Feed(self._driver, self._store.clock)

    async def server_run(self) -> ServerRun:
        """Return which run of which server this connection leads to."""
        info = await self.ask("INFO", "server")
        # It names files too, whose names need not be text.
        text = info.decode(errors="replace") if isinstance(info, bytes | bytearray) else str(info)
        fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        try:
            version = [int(part) for part in fields["redis_version"].split(".")]
            return ServerRun(fields["run_id"], version[0])
        except (KeyError, ValueError):
            raise UnavailableError(
                "the server does not tell its run id; INFO must be allowed",
                operation="command",
                layer=self._store.name,
            ) from None

    async def _done(self, step: Awaitable[Any]) -> Any:
        try:
            return await step
        except Exception as exc:
            raise self._store.refusal(exc, "command") from exc


@asynccontextmanager
async def connected(store: RedisStore, bucket: Bucket) -> AsyncIterator[Connection]:
    """Connect to the server that answers for a bucket now; the block's end closes it."""
    driver = await store.new_connection(bucket.name)
    try:
        yield Connection(store, driver)
    finally:
        await driver.disconnect(nowait=True)
