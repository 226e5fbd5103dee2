"""The adapter to the client's multiprocess mode, in which processes share files.

Nothing is added to a call: what the layers counted is handed to the client's own metric objects,
which write those files, at each scrape, four times a second, when a stack is closed and when the
process ends.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
import weakref
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from layered_store.errors import ConfigError
from layered_store.metrics.catalogue import CATALOGUE, DURATION_BUCKETS
from layered_store.metrics.prometheus import Exporter, Key, Labels, combined

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from layered_store.layers.metrics import Metrics

__all__ = ["AllProcesses", "MultiprocessExporter"]

_log = logging.getLogger("layered_store")

_FLUSH_SECONDS: Final = 0.25
"""A scrape sees other processes as they were at most so long ago."""


@dataclass(slots=True)
class _Handed:
    """What one stack has handed over so far."""

    counters: dict[Key, float] = field(default_factory=dict)
    cells: dict[Labels, list[int]] = field(default_factory=dict)
    seconds: dict[Labels, float] = field(default_factory=dict)


class MultiprocessExporter(Exporter):
    """Hands what was counted to the client's own metric objects, which its files are made of."""

    def __init__(self) -> None:
        super().__init__()
        import prometheus_client as client  # noqa: PLC0415  an optional driver

        # Now, since a fork while the thread below imports it leaves the child half of a module.
        import prometheus_client.multiprocess  # noqa: PLC0415

        if not Path(_folder()).is_dir():
            raise ConfigError(
                "PROMETHEUS_MULTIPROC_DIR is not a folder; create it, empty, before the start",
                option="registry",
                layer="Metrics",
            )

        # Only their files are read, so they belong to no registry that is scraped.
        private = client.CollectorRegistry()
        self._objects: dict[str, Any] = {}
        for key, metric in CATALOGUE.items():
            given: dict[str, Any] = {"registry": private}
            if metric.kind == "gauge":
                cls: Any = client.Gauge
                # "live": of the processes that are alive; counters stay when one dies.
                given["multiprocess_mode"] = f"live{metric.over}"
            elif metric.kind == "counter":
                cls = client.Counter
            else:
                cls = client.Histogram
                given["buckets"] = DURATION_BUCKETS
            self._objects[key] = cls(metric.name, metric.help, metric.all_labels, **given)
        self._handed: weakref.WeakKeyDictionary[Metrics, _Handed] = weakref.WeakKeyDictionary()
        self._gauges: dict[Key, float] = {}
        self._flushing = threading.Lock()
        self._start()
        os.register_at_fork(after_in_child=self._forked)
        # Not in the midst of a hand-over: the child would find the client's own lock held for ever.
        held, free = self._flushing.acquire, self._flushing.release
        os.register_at_fork(before=held, after_in_parent=free, after_in_child=free)
        atexit.register(self._end)

    def collect(self) -> Iterator[Any]:
        """Hand over; the files are read by the client's ``MultiProcessCollector``."""
        self.flush()
        return iter(())

    def closed(self, metrics: Metrics) -> None:
        with self._flushing:
            if metrics in self.open_stacks():
                self._hand_over(metrics)
            super().closed(metrics)
            self._flush()

    def flush(self) -> None:
        """Hand over what was counted since the last time."""
        with self._flushing:
            self._flush()
        _forget_dead_processes()

    def last_check(self, stack: str) -> float:
        times: list[float] = [super().last_check(stack)]
        for family in AllProcesses("gauge_livemax_*.db").collect():
            if family.name == CATALOGUE["health_checked"].name:
                times += [each.value for each in family.samples if each.labels["stack"] == stack]
        return max(times)

    def _flush(self) -> None:
        gauges: dict[Key, float] = {}
        for metrics in self.open_stacks():
            for key, value in self._hand_over(metrics).items():
                gauges[key] = combined(key, gauges.get(key), value)
        for key in self._gauges.keys() - gauges.keys():
            # Files cannot forget a series, so it gets a value that changes nothing.
            gauges[key] = CATALOGUE[key[0]].at_rest
        for (name, labels), value in gauges.items():
            if self._gauges.get((name, labels)) != value:
                self._objects[name].labels(*labels).set(value)
        self._gauges = gauges

    def _hand_over(self, metrics: Metrics) -> dict[Key, float]:
        """Add what a stack counted since the last time to the files; return its gauges."""
        handed = self._handed.setdefault(metrics, _Handed())
        gauges: dict[Key, float] = {}
        for key, value in self.figures(metrics):
            name, labels = key
            if CATALOGUE[name].kind == "gauge":
                gauges[key] = value
                continue
            known = handed.counters.get(key)
            if known is None or value > known:
                self._objects[name].labels(*labels).inc(max(0.0, value - (known or 0.0)))
                handed.counters[key] = value
        for operation, (counts, seconds) in metrics.durations():
            labels = (metrics.name, operation)
            cells = [upper - lower for upper, lower in zip(counts, [0, *counts], strict=False)]
            before = handed.cells.get(labels, [0] * len(cells))
            if cells == before:
                continue
            child = self._objects["operation_duration"].labels(*labels)
            for bucket, now, known in zip(child._buckets, cells, before, strict=True):  # noqa: SLF001  the client has no way to add many observations at once
                if now != known:
                    bucket.inc(now - known)
            child._sum.inc(seconds - handed.seconds.get(labels, 0.0))  # noqa: SLF001
            handed.cells[labels], handed.seconds[labels] = cells, seconds
        return gauges

    def _start(self) -> None:
        thread = threading.Thread(target=self._flush_for_ever, daemon=True)
        thread.name = "layered_store-metrics"
        thread.start()

    def _flush_for_ever(self) -> None:
        while True:
            time.sleep(_FLUSH_SECONDS)
            try:
                self.flush()
            except Exception as exc:  # noqa: BLE001  the disk may be full now and not later
                self._warn("the folder of several processes", type(exc).__name__)

    def _forked(self) -> None:
        # The parent hands over what was counted before; the child begins from there. The client
        # begins its file with a 0 for each series of the parent, closed stacks included.
        self._gauges = dict.fromkeys(self._gauges, nan)
        for metrics in self.open_stacks():
            handed = self._handed[metrics] = _Handed()
            for key, value in self.figures(metrics):
                handed.counters[key] = value
            for operation, (counts, seconds) in metrics.durations():
                labels = (metrics.name, operation)
                handed.cells[labels] = [
                    upper - lower for upper, lower in zip(counts, [0, *counts], strict=False)
                ]
                handed.seconds[labels] = seconds
        self._start()

    def _end(self) -> None:
        from prometheus_client.multiprocess import mark_process_dead  # noqa: PLC0415

        with contextlib.suppress(Exception):  # the folder may be gone already
            self.flush()
            mark_process_dead(os.getpid())  # type: ignore[no-untyped-call]


class AllProcesses:
    """Reads what all processes wrote, as the client's ``MultiProcessCollector`` does.

    A file that is still empty is passed over: its process has begun to make it just now, or died
    while it did, and the client would fail on it. So is one that cannot be read, of another version
    of the client or written by two containers at once, which is told in the log: the figures of the
    other processes must not go with it.

    Args:
        files: which files to read; all by default.
    """

    def __init__(self, files: str = "*.db") -> None:
        self._files = files

    def collect(self) -> Iterable[Any]:
        """Return the figures of all processes, those of one series added up."""
        from prometheus_client.multiprocess import MultiProcessCollector  # noqa: PLC0415

        files = [str(path) for path in Path(_folder()).glob(self._files) if _size(path)]
        merge: Callable[[list[str]], Iterable[Any]] = MultiProcessCollector.merge
        try:
            return merge(files)
        except Exception:  # noqa: BLE001  almost any, from what stands where a length should
            return merge([file for file in files if _readable(file, merge)])


_unreadable: Final[set[str]] = set()
"""Files of which it was told in the log: once each."""


def _readable(file: str, merge: Callable[[list[str]], Iterable[Any]]) -> bool:
    try:
        merge([file])
    except Exception as exc:  # noqa: BLE001
        if file not in _unreadable:
            _unreadable.add(file)
            name, kind = Path(file).name, type(exc).__name__
            _log.warning("metrics in %s cannot be read and are left out: %s", name, kind)
        return False
    return True


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # a gauge of a process that was forgotten just now
        return 0


def _folder() -> str:
    return os.environ.get("PROMETHEUS_MULTIPROC_DIR", "")


def _forget_dead_processes() -> None:
    """Take away the gauges of processes that ended without doing so, killed ones for example.

    The client leaves that to a hook of gunicorn, which other servers do not have.
    """
    folder = _folder()
    from prometheus_client.multiprocess import mark_process_dead  # noqa: PLC0415

    for path in Path(folder).glob("gauge_live*_*.db"):
        pid = path.stem.rpartition("_")[2]
        if not pid.isdigit():
            continue
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            with contextlib.suppress(OSError):
                mark_process_dead(int(pid), folder)  # type: ignore[no-untyped-call]
        except (OSError, OverflowError):
            continue
