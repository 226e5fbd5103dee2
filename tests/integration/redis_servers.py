"""Redis servers of one's own, to kill, stop and mistreat."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

BINARY = shutil.which("redis-server")


def free_port() -> int:
    """Return a port that is free, below those whose cluster bus would not fit."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port < 55_000:  # noqa: PLR2004
            return port


class Server:
    """One redis-server process on a port of its own."""

    def __init__(self, *options: str, port: int | None = None) -> None:
        self.port = port or free_port()
        self.options = options
        self.folder = tempfile.mkdtemp()
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start the process and wait until it takes connections."""
        assert BINARY is not None
        self.process = subprocess.Popen(  # noqa: S603
            [BINARY, *self.command()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        end = time.monotonic() + 10
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.01)
        raise RuntimeError("redis-server did not start")

    def command(self) -> list[str]:
        """Return the arguments of the process."""
        return [
            *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", self.folder),
            *("--save", "", "--enable-debug-command", "yes", *self.options),
        ]

    def freeze(self) -> None:
        """Stop answering, with connections left open."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Go on answering."""
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End at once."""
        self.process.kill()
        self.process.wait()

    def remove(self) -> None:
        """End and leave nothing."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class Sentinel(Server):
    """A Sentinel that watches one server as ``mymaster``."""

    def __init__(self, watched: Server) -> None:
        self.watched = watched
        super().__init__()

    def command(self) -> list[str]:
        path = f"{self.folder}/sentinel.conf"
        with open(path, "w") as file:  # noqa: PTH123
            file.write(
                f"port {self.port}\nbind 127.0.0.1\ndir {self.folder}\n"
                f"sentinel monitor mymaster 127.0.0.1 {self.watched.port} 1\n"
            )
        return [path, "--sentinel"]


@contextlib.contextmanager
def running(*options: str) -> Iterator[Server]:
    """Run a server for the length of a block."""
    server = Server(*options)
    try:
        yield server
    finally:
        server.remove()


@contextlib.asynccontextmanager
async def relayed(port: int, pause: Callable[[bool], Awaitable[None]]) -> AsyncIterator[str]:
    """A way to a server on which each piece of data waits for ``pause``; give its URL.

    Args:
        port: the server's.
        pause: awaited before data goes on, with whether it is on its way to the server.
    """
    ways: set[asyncio.Task[None]] = set()

    async def pump(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, there: bool
    ) -> None:
        while data := await reader.read(65536):
            await pause(there)
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, forth = await asyncio.open_connection("127.0.0.1", port)
        ways.add(asyncio.create_task(pump(reader, forth, there=True)))
        ways.add(asyncio.create_task(pump(back, writer, there=False)))

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        yield f"redis://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
