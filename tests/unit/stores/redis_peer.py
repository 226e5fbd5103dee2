"""A pair of sockets: one end as redis-py hands a connection over, the other in the test's hand."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from layered_store.stores.redis.feed import Feed
from layered_store.stores.redis.lane import Lane
from layered_store.testing.clock import FakeClock

__all__ = ["Peer", "peer"]


class Peer:
    """The server's end, and the connection as redis-py hands it over."""

    def __init__(self, end: socket.socket, connection: Any) -> None:
        self.end = end
        self.connection = connection
        self.clock = FakeClock()
        self.changes: list[bool] = []

    def lane(self) -> Lane:
        return Lane(self.connection, self.clock, 1.0, lambda lane: self.changes.append(lane.open))

    def feed(self) -> Feed:
        return Feed(self.connection, self.clock)

    async def say(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.end, data)

    async def hear(self, size: int) -> bytes:
        heard = b""
        while len(heard) < size:
            heard += await asyncio.get_running_loop().sock_recv(self.end, size - len(heard))
        return heard

    async def hear_the_end(self) -> bool:
        """Tell whether nothing more comes, since the connection was closed."""
        return not await asyncio.get_running_loop().sock_recv(self.end, 1)


@contextlib.asynccontextmanager
async def peer() -> AsyncIterator[Peer]:
    here, there = socket.socketpair()
    there.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=here)
    try:
        yield Peer(there, SimpleNamespace(_reader=reader, _writer=writer))
    finally:
        writer.transport.abort()
        there.close()
        await asyncio.sleep(0)
