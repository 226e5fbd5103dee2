"""How fast another process sees a write: two processes over one Redis, run by

    python -m benchmarks.delivery [--writes 2000] [--redis URL] [--sql URL]

The writer notes when ``upsert_latest`` returned and the reader when its own in-process cache first
shows the state; both read CLOCK_MONOTONIC, one clock on one machine. Printed are the delivery time
of the invalidation (p50, p99, worst), counted from the moment the write returned, and the worst
staleness: for how long after that a read that *began* later still showed the state before. A state
that is shown before its write returned counts as 0.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

USER = "delivery"


async def _read(redis: str, sql: str, writes: int) -> None:
    """Read without a pause; print when each state was first and last seen."""
    from layered_store import Cached, RedisStore, SQLStore

    first: dict[int, float] = {}
    last: dict[int, float] = {}
    async with Cached(RedisStore(redis), fallback=SQLStore(sql)) as stack:
        while await stack.get_latest(USER) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        print("ready", flush=True)
        shown, turns = 0, 0
        while shown < writes:
            began = time.monotonic()
            found = await stack.get_latest(USER)
            assert found is not None
            shown = found.updated_at_unix_ms
            if shown not in first:
                first[shown] = time.monotonic()
            last[shown] = began
            turns += 1
            # A hit does not suspend: the loop must get to hear the channel.
            await asyncio.sleep(0)
        hits = sum(s.value for s in stack.samples() if (s.metric, s.labels) == ("reads", ("hit",)))
    print(json.dumps({"first": first, "last": last, "hits": hits / turns}))


async def _write(redis: str, sql: str, writes: int, reader: subprocess.Popen[bytes]) -> None:
    from layered_store import Cached, RedisStore, SQLStore, StateSnapshot

    assert reader.stdout is not None
    returned: dict[int, float] = {}
    async with Cached(RedisStore(redis), fallback=SQLStore(sql)) as stack:
        await stack.upsert_latest(StateSnapshot(USER, 0))
        await asyncio.to_thread(reader.stdout.readline)
        await asyncio.sleep(1.0)
        for number in range(1, writes + 1):
            await stack.upsert_latest(StateSnapshot(USER, number))
            returned[number] = time.monotonic()
            await asyncio.sleep(0.002)
    seen = json.loads(await asyncio.to_thread(reader.stdout.readline))
    first = {int(number): at for number, at in seen["first"].items()}
    last = {int(number): at for number, at in seen["last"].items()}
    times = []
    worst = 0.0
    for number, at in returned.items():
        arrived = min((when for shown, when in first.items() if shown >= number), default=at)
        times.append(max(0.0, arrived - at))
        before = max((when for shown, when in last.items() if shown < number), default=at)
        worst = max(worst, before - at)
    times.sort()
    print(f"writes {writes}, reads answered in the process {seen['hits']:.1%}")
    print(
        f"delivery p50 {times[len(times) // 2] * 1e6:.0f} us,"
        f" p99 {times[int(len(times) * 0.99)] * 1e6:.0f} us, worst {times[-1] * 1e3:.2f} ms"
    )
    print(f"worst staleness {max(0.0, worst) * 1e3:.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--writes", type=int, default=2_000)
    parser.add_argument("--redis", help="a URL; without one a server is started")
    parser.add_argument("--sql", help="a URL; without one an SQLite file is used")
    parser.add_argument("--read", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        asyncio.run(_read(options.redis, options.sql, options.writes))
        return
    server = None
    with tempfile.TemporaryDirectory() as folder:
        redis, sql = options.redis, options.sql or f"sqlite+aiosqlite:///{folder}/states.db"
        if redis is None:
            from servers import start_redis

            server = start_redis()
            redis = f"redis://127.0.0.1:{server.port}/0"
        command = [sys.executable, "-m", "benchmarks.delivery", "--read"]
        command += ["--redis", redis, "--sql", sql, "--writes", str(options.writes)]
        reader = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
        try:
            asyncio.run(_write(redis, sql, options.writes, reader))
        finally:
            reader.kill()
            reader.wait()
            if server is not None:
                server.close()


if __name__ == "__main__":
    main()
