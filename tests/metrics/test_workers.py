"""Multiprocess mode, with real worker processes and a real scrape."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from servers import free_port

HERE = Path(__file__).parent
WORKERS = 4
LAG = 0.25
"""A scrape sees other workers as they were at most so many seconds ago."""

Figures = dict[tuple[str, ...], float]


@contextmanager
def serving(command: list[str], environment: dict[str, str]) -> Iterator[str]:
    """Run a server; yields its address."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", *(part.format(port=port) for part in command)],
        cwd=HERE,
        env={**os.environ, "PYTHONPATH": f"{HERE.parents[1]}:{HERE}", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 30
        while True:
            try:
                ask(f"{url}/pid")
                break
            except OSError:
                if time.monotonic() > until or process.poll() is not None:
                    os.killpg(process.pid, signal.SIGKILL)
                    assert process.stdout is not None
                    pytest.fail(process.stdout.read().decode()[-3000:])
                time.sleep(0.1)
        yield url
        process.terminate()
        process.wait(20)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]


def ask(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=20) as reply:
            return str(reply.read().decode())
    except urllib.error.HTTPError as exc:
        exc.close()
        return str(exc.code)


def workload(url: str) -> Counter[str]:
    """Ask from many connections; returns what was asked, and which workers there are."""
    paths = [f"/put/u-{n % 20}" for n in range(60)]
    paths += [f"/get/u-{n % 25}" for n in range(300)] + ["/get/not%20an%20id"] * 15
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda path: ask(url + path), paths))
    return Counter(path.split("/")[1] for path in paths)


def workers(url: str) -> set[int]:
    with ThreadPoolExecutor(16) as pool:
        return {int(text) for text in pool.map(lambda _: ask(f"{url}/pid"), range(100))}


def all_workers(url: str) -> set[int]:
    """Wait until all of them answer."""
    until = time.monotonic() + 30
    while len(found := workers(url)) < WORKERS:
        assert time.monotonic() < until, f"only {len(found)} workers answer"
        time.sleep(0.2)
    return found


def scrape(url: str) -> Figures:
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(ask(f"{url}/metrics"))
        for sample in family.samples
        if sample.name.startswith("layered_store_")
    }


def totals(figures: Figures) -> Figures:
    """Return what does not depend on which worker answered what."""
    kept: Figures = Counter()  # type: ignore[assignment]
    for key, value in figures.items():
        if key[:2] == ("layered_store_reads_total", "1.cached"):
            kept[key[:2]] += value  # each worker has a cache of its own
        elif key[0].endswith(("operations_total", "duration_seconds_count", "in_flight")):
            kept[key] = value
    return kept


UVICORN = ["uvicorn", "worker_app:app", "--port", "{port}", "--log-level", "warning"]
GUNICORN = [
    "gunicorn",
    "worker_app:app",
    "-b",
    "127.0.0.1:{port}",
    "-k",
    "asgi",
    "--log-level",
    "warning",
]


@pytest.fixture(scope="module")
def of_one_process() -> Figures:
    """What one process without multiprocess mode shows for the workload."""
    with serving(UVICORN, {}) as url:
        workload(url)
        return totals(scrape(url))


@pytest.mark.parametrize(
    "command",
    [[*UVICORN, "--workers", str(WORKERS)], [*GUNICORN, "--workers", str(WORKERS)]],
    ids=["uvicorn", "gunicorn"],
)
def test_four_workers_show_the_totals_of_one_process(
    command: list[str], of_one_process: Figures, tmp_path: Path
) -> None:
    """Counters and histograms are those of all workers, whoever answers the scrape.

    A worker that is killed leaves its counters and takes its gauges along.
    """
    if command[0] == "gunicorn":
        pytest.importorskip("gunicorn.workers.gasgi")
    with serving(command, {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}) as url:
        pids = all_workers(url)
        asked = workload(url)
        time.sleep(LAG + 0.5)
        figures = scrape(url)
        assert totals(figures) == of_one_process
        assert of_one_process["layered_store_reads_total", "1.cached"] == asked["get"] - 15
        name = "layered_store_operation_duration_seconds"
        cells = [
            value
            for key, value in figures.items()
            if key[0] == f"{name}_bucket" and "get_latest" in key
        ]
        assert cells == sorted(cells)
        assert cells[-1] == asked["get"]
        assert figures[f"{name}_sum", "get_latest", "users"] > 0
        entries = figures["layered_store_cache_entries", "1.cached", "users"]
        assert entries > 0

        for pid in list(pids)[1:]:
            os.kill(pid, signal.SIGKILL)
        all_workers(url)  # the server replaces them
        time.sleep(LAG + 0.5)
        figures = scrape(url)
        assert totals(figures) == of_one_process
        assert figures["layered_store_cache_entries", "1.cached", "users"] < entries
        live = {path.stem.rpartition("_")[2] for path in tmp_path.glob("gauge_live*.db")}
        assert live == {str(pid) for pid in workers(url)}
