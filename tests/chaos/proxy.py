"""A TCP proxy that delays, cuts, swallows and refuses, for one process's way to one server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from enum import StrEnum


class Mode(StrEnum):
    """What the proxy does to the bytes that pass."""

    PASS = "pass"
    DELAY = "delay"
    """Hand them on late."""
    SWALLOW = "swallow"
    """Take them in both directions and hand on nothing: a half-open connection."""
    DEAF = "deaf"
    """Hand on requests and drop replies: the call takes effect and its caller never hears."""
    REFUSE = "refuse"
    """Cut every connection at once. It goes on to listen: its port would be taken meanwhile."""


class Proxy:
    """Stands between a client and ``127.0.0.1:target``.

    A connection whose bytes were dropped is of no use afterwards: it is reset when the mode ends,
    as a router that lost its table does.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.mode = Mode.PASS
        self.seconds = 0.0
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.StreamWriter, asyncio.StreamWriter] = {}
        self._tainted: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def set(self, mode: Mode, seconds: float = 0.0) -> None:
        """Change what happens from now on."""
        if self.mode in (Mode.SWALLOW, Mode.DEAF) and mode is not self.mode:
            for writer in list(self._tainted):
                self._abort(writer)
        self.mode, self.seconds = mode, seconds
        if mode is Mode.REFUSE:
            self.reset()

    def reset(self) -> None:
        """Cut every connection with a TCP reset."""
        for writer in list(self._open):
            self._abort(writer)

    async def close(self) -> None:
        """Stop for good."""
        if self._server is not None:
            self._server.close()
        self.reset()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.mode is Mode.REFUSE:
            self._open[writer] = writer
            self._abort(writer)
            return
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            self._tasks.discard(task)
            return
        self._open[writer] = server_writer
        try:
            await asyncio.gather(
                self._pump(reader, server_writer, writer, to_server=True),
                self._pump(server_reader, writer, writer, to_server=False),
            )
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._abort(writer)
            self._tasks.discard(task)

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        client: asyncio.StreamWriter,
        *,
        to_server: bool,
    ) -> None:
        while data := await reader.read(65_536):
            if self.mode is Mode.DELAY:
                await asyncio.sleep(self.seconds)
            if self.mode is Mode.SWALLOW or (self.mode is Mode.DEAF and not to_server):
                self._tainted.add(client)
            if client in self._tainted and (self.mode is Mode.SWALLOW or not to_server):
                continue
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError

    def _abort(self, writer: asyncio.StreamWriter) -> None:
        self._tainted.discard(writer)
        server = self._open.pop(writer, None)
        for each in (writer, server):
            if each is None:
                continue
            sock = each.get_extra_info("socket")
            with contextlib.suppress(OSError, AttributeError):
                # Linger 0: a reset and no orderly end.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            each.transport.abort()
