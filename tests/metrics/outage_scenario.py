"""A scripted workload with outages, scraped by a real Prometheus."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import re
import urllib.parse
import urllib.request
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from committed_dashboards import RULES, expressions
from prometheus_client import CollectorRegistry, start_http_server
from servers import Server

from layered_store import (
    Cached,
    CircuitBreaker,
    Compressed,
    Encrypted,
    Fallback,
    HealthReport,
    HealthStatus,
    MemoryStore,
    Metrics,
    Ramp,
    ReadOnly,
    RedisStore,
    Retry,
    Shadow,
    SQLStore,
    StateSnapshot,
    StateStore,
    StoreError,
    Timeout,
    UnavailableError,
)
from layered_store.interface import Op
from layered_store.layer import AroundLayer

SCRAPE = 0.25
KEY = base64.urlsafe_b64encode(bytes(range(32))).decode()
LIMIT = 1.0
"""The longest time limit of the stack."""


@dataclass(eq=False, repr=False)
class Switch(AroundLayer):
    """Works, or hangs, or fails, as told."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mode = "works"

    async def around(
        self, op: Op, method: Callable[..., Awaitable[Any]], /, *args: Any, **kwargs: Any
    ) -> Any:
        if self.mode == "hangs":
            await asyncio.sleep(30)
        if self.mode == "fails":
            raise UnavailableError("switched off")
        return await method(*args, **kwargs)

    async def health_report(self) -> HealthReport:
        report = await super().health_report()
        if self.mode == "works":
            return report
        return HealthReport(self.name, HealthStatus.UNHEALTHY, 0.0, "", report.children)


class Load:
    """Stacks under a steady load: three tiers, one with a secondary store, some that change."""

    def __init__(self, redis_url: str, sqlite_url: str) -> None:
        self.registry = CollectorRegistry()
        self.database = Switch(SQLStore(sqlite_url))
        self.primary = Switch(MemoryStore())
        self.deletes = True
        self.users = Metrics(
            Cached(
                CircuitBreaker(
                    Timeout(RedisStore(redis_url), seconds=0.2),
                    minimum_calls=5,
                    # The calls that went well before an outage do not keep it closed for long.
                    window=5.0,
                    open_for=1.0,
                ),
                fallback=Retry(Timeout(self.database, seconds=LIMIT), base_delay=0.02),
                ttl=0.4,
                max_entries=60,
            ),
            name="users",
            registry=self.registry,
        )
        self.replica = Metrics(
            Fallback(self.primary, secondary=MemoryStore()), name="replica", registry=self.registry
        )
        self.change = Metrics(
            Ramp(
                Shadow(
                    Compressed(Encrypted(MemoryStore(), keys=[KEY]), threshold=1),
                    candidate=MemoryStore(),
                ),
                alternative=MemoryStore(),
                share=0.5,
            ),
            name="change",
            registry=self.registry,
        )
        self.rest = Metrics(ReadOnly(MemoryStore()), name="rest", registry=self.registry)
        self._random = random.Random(7)
        self._written = 0

    async def run(self) -> None:
        """Call both stacks until cancelled; errors are part of the scenario."""
        await asyncio.gather(
            *(self._repeat(self._read, 0.01) for _ in range(3)),
            *(self._repeat(self._write, 0.03) for _ in range(4)),
            self._repeat(self._erase, 0.1),
            self._repeat(self._check, 0.2),
            self._repeat(self._move, 0.05),
            self._repeat(self._read_replica, 0.05),
        )

    async def _repeat(self, call: Callable[[], Awaitable[None]], pause: float) -> None:
        while True:
            with suppress(StoreError):
                await call()
            await asyncio.sleep(pause)

    async def _read(self) -> None:
        hot = f"hot-{self._random.randrange(20)}"
        await self.users.get_latest(hot)
        await self.users.get_latest_many([hot, f"u-{self._random.randrange(300)}"])

    async def _read_replica(self) -> None:
        # On its own, so that the hung database of the other stack does not hold it up.
        await self.replica.get_latest("hot-1")

    async def _write(self) -> None:
        self._written += 1
        user = f"hot-{self._written % 20}" if self._written % 3 else f"u-{self._written % 3_000}"
        await self.users.upsert_latest(StateSnapshot(user, axes={"warmth": 0.5}))

    async def _erase(self) -> None:
        if self.deletes:
            await self.users.delete(f"u-{self._written % 3_000}")

    async def _move(self) -> None:
        state = StateSnapshot(f"u-{self._random.randrange(20)}", axes={"warmth": 0.5})
        await self.change.upsert_latest(state)
        await self.change.get_latest(state.user_id)
        await self.rest.upsert_latest(state)

    async def _check(self) -> None:
        await self.users.health_report()
        await self.replica.health_report()


class Prometheus:
    """Asks a running server."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1"

    async def ask(self, path: str, **parameters: str) -> Any:
        return await asyncio.to_thread(self._ask, path, parameters)

    def _ask(self, path: str, parameters: dict[str, str]) -> Any:
        url = f"{self._url}/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=20) as reply:
            answer = json.loads(reply.read())
        assert answer["status"] == "success", answer
        return answer["data"]

    async def values(self, expr: str) -> list[dict[str, Any]]:
        """Return the series of an expression that have a value now."""
        data = await self.ask("query", query=expr)
        assert data["resultType"] == "vector"
        return [each for each in data["result"] if each["value"][1] != "NaN"]

    async def alerts(self, state: str = "firing") -> set[str]:
        data = await self.ask("alerts")
        return {each["labels"]["alertname"] for each in data["alerts"] if each["state"] == state}

    async def answering(self) -> set[tuple[str, str, str]]:
        """Return the panels' expressions that have at least one series now."""
        queries = {place: shortened(expr) for place, expr in expressions().items()}
        found = await asyncio.gather(*(self.values(expr) for expr in queries.values()))
        return {place for place, series in zip(queries, found, strict=True) if series}


def seconds(text: str) -> float:
    return float(text[:-1]) * {"s": 1, "m": 60, "h": 3600}[text[-1]]


def shortened(text: str) -> str:
    """Make minutes of rules and panels fractions of a second, and fill in the variables."""
    text = text.replace("$__rate_interval", "5m").replace("$stack", ".*")

    def window(found: re.Match[str]) -> str:
        return f"[{min(8.0, max(2.0, seconds(found[1]) / 200)) * 1000:.0f}ms]"

    def short(found: re.Match[str]) -> str:
        return f"{found[1]}{seconds(found[2]) / 200 * 1000:.0f}ms"

    text = re.sub(r"\[(\d+[smh])\]", window, text)
    text = re.sub(r"(offset |for: )(\d+[smh])", short, text)
    return re.sub(r"interval: \d+[smh]", f"interval: {SCRAPE * 1000:.0f}ms", text)


def configure(folder: Path, port: int) -> None:
    """Write a Prometheus configuration with the committed rules, their times shortened."""
    for path in RULES:
        (folder / path.name).write_text(shortened(path.read_text()))
    config = {
        "global": {
            "scrape_interval": "250ms",
            "scrape_timeout": "250ms",
            "evaluation_interval": "250ms",
        },
        "rule_files": [path.name for path in RULES],
        "scrape_configs": [
            {"job_name": "test", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
        ],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))


@dataclass
class Scene:
    """A running scenario.

    Args:
        load: what calls the stacks.
        prometheus: what scrapes them.
        redis: the server of the cache tier.
    """

    load: Load
    prometheus: Prometheus
    redis: Server

    async def firing(self, *alerts: str, within: float = 30.0) -> set[str]:
        """Wait until each of these alerts has fired; return all that did."""
        clock = asyncio.get_running_loop().time
        until = clock() + within
        fired: set[str] = set()
        while True:
            fired |= await self.prometheus.alerts()
            if fired >= set(alerts):
                return fired
            assert clock() < until, f"silent: {set(alerts) - fired}"
            await asyncio.sleep(SCRAPE)

    async def fired(self, seconds: float) -> set[str]:
        """Return all alerts that fire within so many seconds."""
        clock = asyncio.get_running_loop().time
        until = clock() + seconds
        fired: set[str] = set()
        while clock() < until:
            fired |= await self.prometheus.alerts()
            await asyncio.sleep(SCRAPE)
        return fired

    async def silent(self, within: float = 30.0) -> None:
        """Wait until no alert is firing or pending."""
        clock = asyncio.get_running_loop().time
        until = clock() + within
        while True:
            now = await self.prometheus.alerts() | await self.prometheus.alerts("pending")
            if not now:
                return
            assert clock() < until, f"not silent: {now}"
            await asyncio.sleep(SCRAPE)


async def begin(
    stack: AsyncExitStack,
    redis: Server,
    sqlite_url: str,
    folder: Path,
    start: Callable[[Path], Server],
) -> Scene:
    """Start the load, its ``/metrics`` and Prometheus; all end with ``stack``."""
    load = Load(f"redis://127.0.0.1:{redis.port}/0", sqlite_url)
    web, thread = start_http_server(0, addr="127.0.0.1", registry=load.registry)

    def stop() -> None:
        web.shutdown()
        web.server_close()
        thread.join()

    stack.callback(stop)
    for store in (load.users, load.replica, load.change, load.rest):
        opened: StateStore = store
        await stack.enter_async_context(opened)
    configure(folder, web.server_port)
    server = start(folder)
    running = asyncio.ensure_future(load.run())

    async def end() -> None:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running

    stack.push_async_callback(end)
    return Scene(load, Prometheus(server.port), redis)
