"""Three tiers: a cache in each process, a shared Redis, a database that is the truth.

Two applications share Redis and the database. One writes, the other sees it at once; then Redis is
killed, and everything is still served; then it comes back, and is repaired before it is believed.

Run it with ``python examples/redis_and_sql.py``. It starts its own Redis and keeps states in an
SQLite file; set REDIS_URL and DATABASE_URL to use yours (a Redis that is yours is not killed).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from prometheus_client import CollectorRegistry

from layered_store import (
    Cached,
    CircuitBreaker,
    HealthReport,
    Metrics,
    RedisStore,
    Retry,
    SQLStore,
    StateSnapshot,
    StateStore,
    Timeout,
    describe,
)


def application(name: str, redis: str, database: str, registry: CollectorRegistry) -> Metrics:
    """Compose what each application of the fleet runs."""
    return Metrics(
        Cached(
            # Redis may be slow or gone: 50 ms, and after some failures not even that.
            CircuitBreaker(
                Timeout(RedisStore(redis, prefix="example:"), seconds=0.05),
                minimum_calls=5,
                open_for=1,
            ),
            # The system of record is worth an effort.
            fallback=Retry(
                SQLStore(
                    database,
                    latest_table="example_latest",
                    history_table="example_history",
                ),
                attempts=3,
            ),
            ttl=60,
        ),
        name=name,
        registry=registry,
    )


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


def show_health(report: HealthReport, depth: int = 0) -> None:
    mark = {"healthy": "+", "degraded": "~", "unhealthy": "!"}[report.status.value]
    reason = f": {report.message}" if report.message else ""
    print(f"{'  ' * depth}{mark} {report.name}  {report.status.value}{reason}")
    for child in report.children:
        show_health(child, depth + 1)


class Answers:
    """Tells which tier answered a read, from the counters of the stack."""

    def __init__(self, name: str, registry: CollectorRegistry) -> None:
        self._name = name
        self._registry = registry

    def _hits(self, layer: str) -> float:
        labels = {"stack": self._name, "layer": layer, "result": "hit"}
        return self._registry.get_sample_value("layered_store_reads_total", labels) or 0

    async def read(self, stack: StateStore, user_id: str, *, show: bool = True) -> str:
        """Read a user, print what came from where, and return the tier."""
        tiers = {"1.cached": "in-process cache", "2.write_through": "Redis"}
        before = {layer: self._hits(layer) for layer in tiers}
        begun = time.perf_counter()
        state = await stack.get_latest(user_id)
        took = time.perf_counter() - begun
        tier = next(
            (tier for layer, tier in tiers.items() if self._hits(layer) > before[layer]), "database"
        )
        axes = dict(state.axes) if state else "no such user"
        if show:
            text = f"{self._name:<7} reads {user_id:<7} {axes!s:<16} {tier:<17}"
            print(f"{text} {took * 1000:7.3f} ms")
        return tier

    async def wait_for(self, tier: str, stack: StateStore, user_id: str) -> None:
        """Read a user until this tier answers, for at most 20 s."""
        for _ in range(400):
            if await self.read(stack, user_id, show=False) == tier:
                return
            await asyncio.sleep(0.05)


async def main(redis: str, database: str, server: OwnRedis | None) -> None:
    registry = CollectorRegistry()
    first = application("first", redis, database, registry)
    second = application("second", redis, database, registry)
    from_first, from_second = Answers("first", registry), Answers("second", registry)
    heading("Each application, outermost first")
    print(describe(first))

    async with first, second:
        heading("The first writes; the second reads from Redis, then from its own cache")
        for user_id, warmth in (("ada", 0.7), ("grace", 0.4), ("linus", 0.1)):
            await first.upsert_latest(StateSnapshot(user_id, axes={"warmth": warmth}))
        # A cache answers under a lease, which its first echo over the channel brings.
        await from_first.wait_for("in-process cache", first, "ada")
        await from_second.wait_for("in-process cache", second, "linus")
        await from_first.read(first, "ada")
        await from_second.read(second, "ada")
        await from_second.read(second, "ada")

        heading("The first writes again; the second's copy is dropped at once")
        await first.upsert_latest(StateSnapshot("ada", axes={"warmth": 0.9}))
        await asyncio.sleep(0.1)
        await from_second.read(second, "ada")

        heading("Erased everywhere when delete returns")
        await first.delete("linus")
        await from_second.read(second, "linus")

        if server is None:
            print("\nThis Redis is yours, so it stays up. Unset REDIS_URL to see an outage.")
            return

        heading("Redis is killed: everything is still served")
        server.kill()
        await from_first.read(first, "ada")
        await first.upsert_latest(StateSnapshot("grace", axes={"warmth": 0.5}))
        for user_id in ("ada", "grace", "grace", "nobody"):
            await from_second.read(second, user_id)
        print()
        show_health(await second.health_report())

        heading("Redis is back, empty: repaired first, then believed")
        server.start()
        # Both hold a lease again: from here on what one reads is filled in for the other.
        await from_first.wait_for("in-process cache", first, "ada")
        await from_second.wait_for("in-process cache", second, "ada")
        await from_first.read(first, "grace")
        await from_second.read(second, "grace")
        await from_second.read(second, "grace")
        print()
        show_health(await second.health_report())


class OwnRedis:
    """A Redis on a free port that ends with the program."""

    def __init__(self, folder: str) -> None:
        found = shutil.which("redis-server") or next(
            (str(path) for base in sys.path for path in Path(base).glob("*/bin/redis-server")), None
        )
        if found is None:
            sys.exit(
                "No redis-server here. Install one (Debian: apt-get install redis-server; or"
                " pip install 'layered-store[test-servers]'), or set REDIS_URL."
            )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._command = [found, "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(  # noqa: S603
            self._command, cwd=self._folder, stdout=subprocess.DEVNULL
        )
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.02)
        sys.exit("redis-server did not start")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


if __name__ == "__main__":
    logging.basicConfig(level="INFO", format="  [log] %(message)s", stream=sys.stdout)
    with tempfile.TemporaryDirectory() as folder:
        given = os.environ.get("REDIS_URL")
        own = None if given else OwnRedis(folder)
        try:
            asyncio.run(
                main(
                    given or f"redis://127.0.0.1:{own.port if own else 6379}/0",
                    os.environ.get("DATABASE_URL", f"sqlite+aiosqlite:///{folder}/states.db"),
                    own,
                )
            )
        finally:
            if own is not None:
                own.kill()
