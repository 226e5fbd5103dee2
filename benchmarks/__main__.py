"""Run the benchmarks: ``python -m benchmarks [--quick] [--only ROW] [--scale]``."""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import platform
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from benchmarks import (
    codec,
    hits,
    memory,
    misses,
    plot,
    ratios,
    scale,
    scrape,
    sql,
    stampede,
)
from benchmarks.figures import Result, contenders_table, figures_table
from benchmarks.setting import Setting

_PARTS = {
    "1": hits,
    "2": hits,
    "3": misses,
    "4": misses,
    "5": misses,
    "6": misses,
    "7": stampede,
    "8": sql,
    "9": sql,
    "10": codec,
    "11": memory,
    "12": ratios,
    "13": scrape,
    "14": scale,
}
_PEERS = (
    "layered-store", "redis", "hiredis", "coredis", "aiosqlite", "asyncpg", "sqlalchemy",
    "cachetools", "async-lru", "theine", "aiocache", "cashews", "py-key-value-aio", "msgspec",
    "pydantic", "prometheus-client", "uvloop",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Measure, print tables, write JSON, Markdown and a plot."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="only check that all runs; figures mean little"
    )
    parser.add_argument(
        "--only", action="append", choices=list(_PARTS), help="a row of the table of targets"
    )
    parser.add_argument(
        "--scale", action="store_true", help="row 14 too, with a million users: takes minutes"
    )
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio")
    parser.add_argument("--out", type=Path, help="folder for results.json, .md and .svg")
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    rows = given.only or [row for row in _PARTS if row != "14" or given.scale]
    parts = list(dict.fromkeys(_PARTS[row] for row in rows))
    results: list[Result] = []
    for part in parts:
        begun = time.monotonic()
        results += _measure(part, Setting(quick=given.quick), given.loop)
        name = part.__name__.rpartition(".")[2]
        print(f"{name}: {time.monotonic() - begun:.0f} s", file=sys.stderr)
    machine = _machine(given.loop)
    text = _text(results, machine, given.quick)
    print(text)
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        found = {"machine": machine, "results": [result.as_dict() for result in results]}
        (given.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
        (given.out / "results.md").write_text(text)
        (given.out / "results.svg").write_text(plot.draw(results))
    return 0


def _measure(part: Any, setting: Setting, loop: str) -> list[Result]:
    factory = None
    if loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    try:
        with asyncio.Runner(loop_factory=factory) as runner:
            found: list[Result] = runner.run(part.run(setting))
            return found
    finally:
        setting.close()


def _machine(loop: str) -> dict[str, Any]:
    versions = {}
    for name in _PEERS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "load": [round(each, 1) for each in os.getloadavg()],
        "loop": loop,
        "versions": versions,
    }


def _text(results: list[Result], machine: dict[str, Any], quick: bool) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    parts = [
        f"Python {machine['python']} ({machine['loop']}), {machine['system']}, load average"
        f" {machine['load'][0]}; {versions}.",
        figures_table(results),
    ]
    if quick:
        parts.insert(0, "**Quick run: it shows that all works; its figures mean little.**")
    for result in results:
        parts += [f"### {result.title}", contenders_table(result)]
        if result.note:
            parts.append(result.note)
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
