"""The three-tier stack under load, with two outages, drawn as one HTML page.

``python examples/observed.py`` starts a redis-server of its own, calls the stack for 20 seconds,
cuts Redis off and then the database, and writes ``observed.html``: hit ratio by tier, latency,
breakers, errors and pending repairs over time. ``--redis redis://host:port/0`` uses that server
instead; it is reached through a small proxy, which is what is cut.
"""

from __future__ import annotations

import argparse
import asyncio
import html
import math
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry

from layered_store import (
    Cached,
    CircuitBreaker,
    HealthReport,
    HealthStatus,
    Metrics,
    RedisStore,
    Retry,
    SQLStore,
    StateSnapshot,
    StoreError,
    Timeout,
    UnavailableError,
    describe,
)
from layered_store.interface import Op
from layered_store.layer import AroundLayer

USERS = 400
EVERY = 0.2  # seconds from one look at the metrics to the next
WINDOW = 5  # looks that a ratio or quantile is taken over
REDIS_AWAY = (0.30, 0.55)  # shares of the running time
DATABASE_AWAY = (0.75, 0.85)

Series = dict[str, list[tuple[float, float]]]
Look = dict[tuple[str, ...], float]


# The scenario


class Cut(AroundLayer):
    """A switch in front of the database: while it is off, the database is away."""

    away = False

    async def around(
        self, op: Op, method: Callable[..., Awaitable[Any]], /, *args: Any, **kwargs: Any
    ) -> Any:
        if self.away:
            raise UnavailableError("cut off by the script", operation=op, layer="Cut")
        return await method(*args, **kwargs)

    async def health_report(self) -> HealthReport:
        report = await super().health_report()
        if not self.away:
            return report
        return HealthReport("Cut", HealthStatus.UNHEALTHY, 0.0, "cut off", report.children)


class Proxy:
    """A TCP proxy in front of Redis that can be cut."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._open: set[asyncio.StreamWriter] = set()
        self.away = False
        self.port = 0

    async def start(self) -> asyncio.Server:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        return server

    def cut(self, away: bool) -> None:
        self.away = away
        for writer in self._open if away else ():
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.away:
            writer.transport.abort()
            return
        behind, ahead = await asyncio.open_connection(*self._target)
        self._open |= {writer, ahead}
        await asyncio.gather(self._pump(reader, ahead), self._pump(behind, writer))
        self._open -= {writer, ahead}

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65_536):
                sink.write(data)
                await sink.drain()
        sink.close()


@contextmanager
def redis_server() -> Iterator[tuple[str, int]]:
    """Run a redis-server of one's own; yields its host and port."""
    binary = shutil.which("redis-server")
    if binary is None:
        sys.exit("no redis-server on the PATH; install one or pass --redis redis://host:port/0")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder],
            stdout=subprocess.DEVNULL,
        )
        try:
            for _ in range(100):
                with suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
                    break
                time.sleep(0.05)
            yield "127.0.0.1", port
        finally:
            process.terminate()
            process.wait()


async def load(stack: Metrics, seed: int) -> None:
    """Call the stack as an application would: mostly reads, of few users most often."""
    chance = random.Random(seed)
    number = 0
    while True:
        number += 1
        user = f"u-{int(USERS * chance.random() ** 3)}"
        kind = chance.random()
        with suppress(StoreError):
            if kind < 0.9:
                await stack.get_latest(user)
            elif kind < 0.99:
                await stack.upsert_latest(StateSnapshot(user, axes={"warmth": chance.random()}))
            else:
                await stack.delete(user)
        await asyncio.sleep(0.002 * (number % 4 == 0))


def look(registry: CollectorRegistry) -> Look:
    """Return every figure by name and labels, as a scrape would see it."""
    return {
        (sample.name.removeprefix("layered_store_"), *sample.labels.values()): sample.value
        for family in registry.collect()
        for sample in family.samples
    }


async def run(seconds: float, host: str, port: int, folder: Path) -> tuple[list[Look], str]:
    """Run the scenario; return what the metrics said over time, and the stack's description."""
    proxy = Proxy(host, port)
    server = await proxy.start()
    registry = CollectorRegistry()
    switch = Cut(SQLStore(f"sqlite+aiosqlite:///{folder}/states.db"))
    database = Metrics(switch, name="database", registry=registry)
    stack = Metrics(
        Cached(
            CircuitBreaker(
                Timeout(RedisStore(f"redis://127.0.0.1:{proxy.port}/0"), seconds=0.2),
                minimum_calls=5,
                window=2.0,
                open_for=0.5,
            ),
            fallback=Retry(
                CircuitBreaker(
                    Timeout(database, seconds=1.0), minimum_calls=10, window=1.0, open_for=0.3
                )
            ),
            ttl=2.0,
            max_entries=200,
        ),
        name="states",
        registry=registry,
    )
    looks: list[Look] = []
    async with AsyncExitStack() as closing:
        closing.push_async_callback(server.wait_closed)
        closing.callback(server.close)
        closing.callback(lambda: proxy.cut(True))
        await closing.enter_async_context(stack)
        for number in range(USERS):
            await stack.upsert_latest(StateSnapshot(f"u-{number}", axes={"warmth": 0.5}))
        callers = [asyncio.create_task(load(stack, seed)) for seed in range(6)]
        begun = time.monotonic()
        while (passed := time.monotonic() - begun) < seconds:
            proxy_away = REDIS_AWAY[0] <= passed / seconds < REDIS_AWAY[1]
            if proxy_away is not proxy.away:
                proxy.cut(proxy_away)
            switch.away = DATABASE_AWAY[0] <= passed / seconds < DATABASE_AWAY[1]
            if len(looks) % 3 == 0:
                await stack.health_report()
            looks.append({("time",): passed, **look(registry)})
            await asyncio.sleep(EVERY)
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
    return looks, str(describe(stack))


# From figures to series


class Looks:
    """Rates, ratios and quantiles of what was looked at, as PromQL would have them."""

    def __init__(self, looks: list[Look]) -> None:
        self._looks = looks
        self.pairs = [
            (looks[max(0, index - WINDOW)], now) for index, now in enumerate(looks) if index
        ]

    def labels(self, name: str, place: int) -> list[str]:
        return sorted({key[place] for key in self._looks[-1] if key[0] == name})

    def gauge(self, *key: str) -> list[tuple[float, float]]:
        return [(now["time",], now[key]) for now in self._looks if key in now]

    def rate(self, *key: str) -> list[tuple[float, float]]:
        return [
            (
                now["time",],
                (now.get(key, 0.0) - then.get(key, 0.0)) / (now["time",] - then["time",]),
            )
            for then, now in self.pairs
        ]

    def failures(self, stack: str) -> list[tuple[float, float]]:
        """Return how many calls failed, per second, at one place of the stack."""
        rates = [
            self.rate("operations_total", stack, operation, outcome)
            for operation in self.labels("operations_total", 2)
            for outcome in ("unavailable", "timeout", "rejected", "error")
        ]
        return [(each[0][0], sum(value for _, value in each)) for each in zip(*rates, strict=True)]

    def share(
        self, name: str, middle: tuple[str, ...], last: set[str]
    ) -> list[tuple[float, float]]:
        """Return the share of the label values ``last`` among all of a counter."""
        found = []
        for then, now in self.pairs:
            part = whole = 0.0
            for key, value in now.items():
                if key[0] == name and key[1:-1] == middle:
                    grown = value - then.get(key, 0.0)
                    whole += grown
                    part += grown if key[-1] in last else 0.0
            if whole:
                found.append((now["time",], part / whole))
        return found

    def quantile(self, q: float, operation: str) -> list[tuple[float, float]]:
        """Return a quantile of the duration of an operation, interpolated within its bucket."""
        name = "operation_duration_seconds_bucket"
        found = []
        for then, now in self.pairs:
            cells = [
                (float(key[-1]), value - then.get(key, 0.0))
                for key, value in now.items()
                if key[:3] == (name, "states", operation)
            ]
            total = cells[-1][1] if cells else 0.0
            lower, below = 0.0, 0.0
            for bound, count in cells:
                if total and count >= q * total:
                    if math.isinf(bound):
                        bound = lower
                    inside = (q * total - below) / (count - below) if count > below else 1.0
                    found.append((now["time",], lower + (bound - lower) * inside))
                    break
                lower, below = bound, count
        return found


# Drawing

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 620, 256, 62, 22, 14, 26
COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2")
STATES = {
    "good": ("#86c99b", "closed / up / healthy"),
    "middle": ("#f2c063", "half open / degraded"),
    "bad": ("#dd6b63", "open / lost / unhealthy"),
}


class Plot:
    """One figure with a time axis, as SVG."""

    def __init__(self, seconds: float, low: float, high: float, log: bool = False) -> None:
        self._seconds, self._low, self._high, self._log = seconds, low, high, log
        self.parts: list[str] = []

    def x(self, passed: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * passed / self._seconds

    def y(self, value: float) -> float:
        low, high = self._low, self._high
        if self._log:
            value, low, high = (math.log10(max(each, self._low)) for each in (value, low, high))
        share = (min(value, high) - low) / (high - low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    def frame(self, ticks: dict[float, str]) -> None:
        for name, (begin, end) in {
            "Redis away": REDIS_AWAY,
            "database away": DATABASE_AWAY,
        }.items():
            x, right = self.x(begin * self._seconds), self.x(end * self._seconds)
            self.parts.append(
                f'<rect class="away" x="{x:.1f}" y="{TOP}" width="{right - x:.1f}"'
                f' height="{HEIGHT - TOP - BOTTOM}"><title>{name}</title></rect>'
                f'<text class="away" x="{(x + right) / 2:.1f}" y="{TOP - 7}">{name}</text>'
            )
        for value, text in ticks.items():
            y = self.y(value)
            self.parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}">{text}</text>'
            )
        step = 5 if self._seconds > 12 else 2
        for passed in range(0, int(self._seconds) + 1, step):
            self.parts.append(
                f'<text class="time" x="{self.x(passed):.1f}" y="{HEIGHT - 8}">{passed} s</text>'
            )

    def lines(self, series: Series) -> None:
        for colour, (name, points) in zip(COLOURS, series.items(), strict=False):
            path = " ".join(f"{self.x(at):.1f},{self.y(value):.1f}" for at, value in points)
            self.parts.append(
                f'<polyline data-series="{html.escape(name)}" points="{path}" stroke="{colour}">'
                f"<title>{html.escape(name)}</title></polyline>"
            )

    def bars(self, rows: dict[str, list[tuple[float, str]]]) -> None:
        """Draw states as one row of coloured bars each."""
        tall = (HEIGHT - TOP - BOTTOM - 4) / len(rows)
        for number, (name, points) in enumerate(rows.items()):
            y = TOP + 4 + number * tall
            self.parts.append(f'<text class="row" x="{LEFT + 4}" y="{y + 11:.1f}">{name}</text>')
            ends = [at for at, _ in points[1:]] + [self._seconds]
            for (at, state), end in zip(points, ends, strict=True):
                colour, meaning = STATES[state]
                x, right = self.x(at), self.x(min(end, self._seconds))
                self.parts.append(
                    f'<rect data-state="{state}" x="{x:.1f}" y="{y + 15:.1f}" fill="{colour}"'
                    f' width="{max(0.0, right - x) + 0.4:.1f}" height="{tall - 21:.1f}">'
                    f"<title>{name}: {meaning}</title></rect>"
                )


def figure(name: str, title: str, note: str, plot: Plot, legend: dict[str, str]) -> str:
    keys = "".join(
        f'<span><i style="background:{colour}"></i>{html.escape(text)}</span>'
        for text, colour in legend.items()
    )
    return (
        f'<figure data-plot="{name}"><figcaption><b>{title}</b><small>{note}</small></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">'
        f'{"".join(plot.parts)}</svg><p class="legend">{keys}</p></figure>'
    )


def nice(high: float) -> dict[float, str]:
    """Return about four ticks from 0 to above ``high``."""
    step = 10 ** math.floor(math.log10(max(high, 1e-9)))
    step = next(step * each for each in (0.25, 0.5, 1, 2.5) if high / (step * each) <= 5)
    count = max(1, math.ceil(high / step - 1e-9))
    return {step * each: f"{step * each:g}" for each in range(count + 1)}


def line_figure(name: str, title: str, note: str, seconds: float, series: Series) -> str:
    ticks = nice(max((value for points in series.values() for _, value in points), default=1.0))
    plot = Plot(seconds, 0.0, max(ticks))
    plot.frame(ticks)
    plot.lines(series)
    return figure(name, title, note, plot, dict(zip(series, COLOURS, strict=False)))


TIERS = {"1.cached": "in process", "2.write_through": "Redis"}


def page(looks: list[Look], description: str, seconds: float) -> str:
    """Return the whole page."""
    data = Looks(looks)
    answered = {"hit", "negative_hit", "stale"}
    hits = {tier: data.share("reads_total", ("states", layer), answered)
            for layer, tier in TIERS.items()}  # fmt: skip
    plot = Plot(seconds, 0.0, 1.0)
    plot.frame({share / 4: f"{share * 25} %" for share in range(5)})
    plot.lines(hits)
    figures = [
        figure(
            "hit-ratio",
            "Hit ratio by tier",
            "of the reads that reach a tier, how many it answers",
            plot,
            dict(zip(hits, COLOURS, strict=False)),
        )
    ]
    latency = {f"p{q * 100:g}": data.quantile(q, "get_latest") for q in (0.5, 0.9, 0.99)}
    decades = ("0.1 µs", "1 µs", "10 µs", "100 µs", "1 ms", "10 ms", "100 ms", "1 s", "10 s")
    plot = Plot(seconds, 1e-7, 10.0, log=True)
    plot.frame({10.0 ** (index - 7): text for index, text in enumerate(decades)})
    plot.lines(latency)
    figures.append(
        figure(
            "latency",
            "Latency of reads",
            "half, 90 % and 99 % of single reads were faster",
            plot,
            dict(zip(latency, COLOURS, strict=False)),
        )
    )
    figures.append(state_figure(data, seconds))
    failing = {
        "in-process cache": data.rate("reads_total", "states", "1.cached", "error"),
        "Redis": data.rate("reads_total", "states", "2.write_through", "error"),
        "database": data.failures("database"),
        "what callers see": data.failures("states"),
    }
    figures.append(
        line_figure(
            "errors",
            "Errors per second",
            "while Redis fails, the database answers in its place",
            seconds,
            failing,
        )
    )
    pending = {"users behind in Redis": data.gauge("pending_repairs", "states", "2.write_through")}
    figures.append(
        line_figure(
            "pending-repairs",
            "Pending repairs",
            "written while Redis was away; not read there until repaired",
            seconds,
            pending,
        )
    )
    calls = {
        operation.replace("_", " "): data.rate(
            "operation_duration_seconds_count", "states", operation
        )
        for operation in data.labels("operation_duration_seconds_count", 2)
    }
    figures.append(
        line_figure("calls", "Calls per second", "by operation, hits included", seconds, calls)
    )
    return PAGE.format(
        tiles=tiles(looks), figures="\n".join(figures), stack=html.escape(description)
    )


def state_figure(data: Looks, seconds: float) -> str:
    def states(key: tuple[str, ...], names: dict[float, str]) -> list[tuple[float, str]]:
        return [(at, names[value]) for at, value in data.gauge(*key)]

    circuit = {0.0: "good", 1.0: "middle", 2.0: "bad"}
    health = {0.0: "bad", 1.0: "middle", 2.0: "good"}
    redis, database = data.labels("circuit_state", 2)
    rows = {
        "breaker of Redis": states(("circuit_state", "states", redis), circuit),
        "breaker of the database": states(("circuit_state", "states", database), circuit),
        "invalidation channel": states(
            ("channel_up", "states", "2.write_through"), {0.0: "bad", 1.0: "good"}
        ),
        "health of the stack": states(("health_status", "states", "0.metrics"), health),
    }
    plot = Plot(seconds, 0.0, 1.0)
    plot.frame({})
    plot.bars(rows)
    legend = {text: colour for colour, text in STATES.values()}
    return figure("breakers", "Breakers and health", "what the stack knows", plot, legend)


def tiles(looks: list[Look]) -> str:
    first, last = looks[0], looks[-1]

    def grown(name: str, *some: str) -> float:
        return sum(
            value - first.get(key, 0.0)
            for key, value in last.items()
            if key[0] == name and all(each in key for each in some)
        )

    calls = grown("operations_total")
    reads = grown("reads_total", "1.cached")
    failed = sum(
        grown("operations_total", outcome)
        for outcome in ("unavailable", "timeout", "rejected", "error")
    )
    shown = {
        "calls": f"{calls:,.0f}",
        "answered in process": f"{grown('reads_total', '1.cached', 'hit') / reads:.1%}",
        "calls that failed": f"{failed:,.0f}",
        "reads Redis failed on": f"{grown('reads_total', '2.write_through', 'error'):,.0f}",
        "copies repaired": f"{grown('repairs_total'):,.0f}",
    }
    return "".join(f"<div><b>{value}</b>{text}</div>" for text, value in shown.items())


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>layered_store, observed</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; color: #1f2937; background: #f6f7f9; margin: 0 }}
main {{ max-width: 1320px; margin: 0 auto; padding: 22px 26px }}
h1 {{ font-size: 23px; margin: 0 }} header p {{ margin: 4px 0 16px; color: #4b5563 }}
.tiles {{ display: flex; gap: 14px; margin-bottom: 16px }}
.tiles div {{ flex: 1; background: #fff; border: 1px solid #e2e5ea; border-radius: 8px;
  padding: 9px 14px; color: #4b5563; font-size: 13px }}
.tiles b {{ display: block; font-size: 21px; color: #111827 }}
.grid {{ display: grid; grid-template-columns: 1fr 1fr; gap: 14px }}
figure {{ margin: 0; background: #fff; border: 1px solid #e2e5ea; border-radius: 8px;
  padding: 12px 14px 8px }}
figcaption small {{ color: #6b7280; margin-left: 9px; font-size: 13px }}
svg {{ width: 100%; height: auto; display: block }}
svg text {{ font-size: 11.5px; fill: #6b7280 }}
text.tick {{ text-anchor: end }} text.time {{ text-anchor: middle }}
text.away {{ text-anchor: middle; fill: #9a5b52; font-size: 11px }}
text.row {{ fill: #374151 }}
rect.away {{ fill: #dd6b63; opacity: .09 }}
line.grid {{ stroke: #e9ebef }}
polyline {{ fill: none; stroke-width: 2; stroke-linejoin: round }}
.legend {{ margin: 3px 0 2px {left}px; font-size: 13px; color: #374151 }}
.legend span {{ margin-right: 16px; white-space: nowrap }}
.legend i {{ display: inline-block; width: 11px; height: 11px; border-radius: 3px;
  margin-right: 5px; vertical-align: -1px }}
pre {{ background: #fff; border: 1px solid #e2e5ea; border-radius: 8px; padding: 12px 14px;
  font-size: 12.5px; overflow-x: auto }}
</style></head><body><main>
<header><h1>Per-user state in three tiers, under load</h1>
<p>In-process cache, Redis, database. Redis is cut off first, then the database; the shaded parts
show when.</p></header>
<div class="tiles">{tiles}</div>
<div class="grid">
{figures}
</div>
<pre>{stack}</pre>
</main></body></html>
""".replace("{left}", "44")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--redis", metavar="URL", help="a server to use, redis://host:port/0")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to run (20)")
    parser.add_argument("--out", type=Path, default=Path("observed.html"), help="where to write")
    given = parser.parse_args()
    if not 5 <= given.seconds <= 600:
        parser.error("--seconds must be from 5 to 600")
    address = urlsplit(given.redis) if given.redis else None
    if address is not None and (address.scheme != "redis" or not address.hostname):
        parser.error("--redis must be like redis://host:port/0")
    with tempfile.TemporaryDirectory() as folder:
        if address is not None:
            place = (address.hostname or "", address.port or 6379)
            looks, stack = asyncio.run(run(given.seconds, *place, Path(folder)))
        else:
            with redis_server() as place:
                looks, stack = asyncio.run(run(given.seconds, *place, Path(folder)))
    given.out.write_text(page(looks, stack, given.seconds), encoding="utf-8")
    print(f"{len(looks)} looks in {given.seconds:g} s; open {given.out}")


if __name__ == "__main__":
    main()
