"""Row 11: memory of cached entries, and what the garbage collector makes of them."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, Result, spread
from benchmarks.setting import Setting, encoded, user

__all__ = ["run"]


async def run(setting: Setting) -> list[Result]:
    """Measure each representation in a process of its own."""
    entries = setting.some(100_000, 5_000)
    rows = []
    for kind in ("Cached", "dict of dicts", "pydantic models in a dict"):
        found = await asyncio.to_thread(_child, kind, entries)
        if found is not None:
            rows.append([kind, *found])
    own = rows[0]
    figures = [
        Figure(11, "bytes per L1 entry of 23 axes", spread([own[1]]), "bytes", 2_100),
        Figure(11, f"gc pass over {entries:,} entries", spread([own[2]]), "ms", 15),
    ]
    columns = ["what is kept", "bytes per entry", "gc pass ms"]
    return [Result("Memory of entries, key included", figures, columns, rows)]


def _child(kind: str, entries: int) -> list[float] | None:
    command = [sys.executable, "-m", "benchmarks.memory", kind, str(entries)]
    done = subprocess.run(command, capture_output=True, check=False)  # noqa: S603
    return json.loads(done.stdout) if done.returncode == 0 else None


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def _keep(kind: str, entries: int) -> Any:
    if kind == "Cached":
        from layered_store import Cached, StateSnapshot
        from layered_store.codec import SnapshotCodec
        from layered_store.interface import StateStore

        class Source(StateStore):
            """Decodes, as a backend does."""

            async def get_latest(self, user_id: str) -> StateSnapshot | None:
                return codec.decode(data[int(user_id[5:]) % len(data)].replace(
                    b"user-0000000", user_id.encode()
                ), user_id)  # fmt: skip

            async def upsert_latest(self, snapshot: StateSnapshot) -> None:
                raise NotImplementedError

        codec = SnapshotCodec(StateSnapshot)
        data = [encoded(user(0))]
        cached = Cached(Source(), max_entries=entries, ttl=3600)

        async def fill() -> None:
            for number in range(entries):
                await cached.get_latest(user(number))

        before = _start()
        asyncio.run(fill())
        return before, cached
    before = _start()
    text = encoded(user(0))[1:]
    import msgspec

    if kind == "dict of dicts":
        kept: Any = {user(n): msgspec.msgpack.decode(text) for n in range(entries)}
        return before, kept
    import pydantic

    model = pydantic.create_model(
        "Model",
        user_id=(str, ...),
        updated_at_unix_ms=(int, ...),
        source=(str, ...),
        confidence=(float, ...),
        axes=(dict[str, float], ...),
    )
    before = _start()
    return before, {
        user(n): model.model_validate(msgspec.msgpack.decode(text)) for n in range(entries)
    }


def _start() -> int:
    gc.collect()
    return _resident()


if __name__ == "__main__":
    count = int(sys.argv[2])
    start, held = _keep(sys.argv[1], count)
    gc.collect()
    size = (_resident() - start) / count
    passes = []
    for _ in range(5):
        begun = time.process_time()
        gc.collect()
        passes.append((time.process_time() - begun) * 1e3)
    empty_gc = 0.0
    assert held is not None
    print(json.dumps([size, max(empty_gc, min(passes))]))
