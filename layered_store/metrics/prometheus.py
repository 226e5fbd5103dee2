"""The adapter to ``prometheus_client``: one collector for each registry."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, Final

from layered_store.errors import ConfigError
from layered_store.layers.metrics import blocks_below
from layered_store.metrics.catalogue import CATALOGUE, DURATION_BUCKETS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from layered_store.layers.metrics import Metrics

__all__ = ["export"]

_log = logging.getLogger("layered_store")

_FLUSH_SECONDS: Final = 5.0
_BOUNDS: Final = (*(repr(bound) for bound in DURATION_BUCKETS), "+Inf")
_exporters: weakref.WeakKeyDictionary[Any, Exporter] = weakref.WeakKeyDictionary()
_STATES: Final = frozenset({"circuit_state", "health"})
_lock: Final = threading.Lock()


def export(metrics: Metrics, registry: Any) -> Exporter:
    """Export a ``Metrics`` layer through a registry, the client's default one when None."""
    import prometheus_client  # noqa: PLC0415  an optional driver

    registry = prometheus_client.REGISTRY if registry is None else registry
    if not hasattr(registry, "register"):
        raise ConfigError(
            "must be a prometheus_client.CollectorRegistry", option="registry", layer="Metrics"
        )
    with _lock:
        exporter = _exporters.get(registry)
        if exporter is None:
            multiprocess = "PROMETHEUS_MULTIPROC_DIR" in os.environ
            exporter = MultiprocessExporter() if multiprocess else Exporter()
            registry.register(exporter)
            _exporters[registry] = exporter
        exporter.add(metrics)
    return exporter


class Exporter:
    """A collector that reads what the stacks counted, when it is asked."""

    def __init__(self) -> None:
        self._stacks: list[weakref.ref[Metrics]] = []
        self._warned: set[str] = set()

    def add(self, metrics: Metrics) -> None:
        """Export one more stack; those of one name are added up."""
        self._stacks = [ref for ref in self._stacks if ref() is not None]
        self._stacks.append(weakref.ref(metrics))

    def closed(self, metrics: Metrics) -> None:
        """Stop exporting a stack."""
        self._stacks = [ref for ref in self._stacks if ref() not in (None, metrics)]

    def describe(self) -> Iterable[Any]:
        """Tell the registry nothing, so that it does not collect when this is registered."""
        return []

    def collect(self) -> Iterator[Any]:
        """Yield all families; what the client calls at a scrape."""
        from prometheus_client.core import (  # noqa: PLC0415
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
        )

        classes = {
            "counter": CounterMetricFamily,
            "gauge": GaugeMetricFamily,
            "histogram": HistogramMetricFamily,
        }
        families = {
            key: classes[metric.kind](metric.name, metric.help, labels=metric.all_labels)
            for key, metric in CATALOGUE.items()
        }
        for (key, labels), value in self.figures().items():
            families[key].add_metric(labels, value)
        for labels, (cumulative, seconds) in self.timings().items():
            buckets = list(zip(_BOUNDS, cumulative, strict=True))
            families["operation_duration"].add_metric(labels, buckets, seconds)
        yield from families.values()

    def figures(self) -> dict[tuple[str, tuple[str, ...]], float]:
        """Return every counter and gauge of the open stacks, by key and label values."""
        totals: dict[tuple[str, tuple[str, ...]], float] = {}
        for key, labels, value in self._figures():
            # A state is that of the stack built last; all else adds up.
            known = 0.0 if key in _STATES else totals.get((key, labels), 0.0)
            totals[key, labels] = known + value
        return totals

    def _figures(self) -> Iterator[tuple[str, tuple[str, ...], float]]:
        for metrics in self._open():
            stack = metrics.name
            for sample in metrics.samples():
                yield sample.metric, (stack, *sample.labels), sample.value
            for layer, level in metrics.health_levels().items():
                yield "health", (stack, layer), level
            for layer, store in blocks_below(metrics):
                try:
                    samples = list(store.samples())
                except Exception as exc:  # noqa: BLE001  one block must not break the scrape
                    self._warn(layer, type(exc).__name__)
                    continue
                for sample in samples:
                    metric = CATALOGUE.get(sample.metric)
                    if metric is None or len(metric.labels) != len(sample.labels):
                        self._warn(layer, "unknown metric")
                        continue
                    yield sample.metric, (stack, layer, *sample.labels), sample.value

    def timings(self) -> dict[tuple[str, ...], tuple[list[int], float]]:
        """Return the histograms of all operations: cumulative counts and seconds, by labels."""
        totals: dict[tuple[str, ...], tuple[list[int], float]] = {}
        for metrics in self._open():
            for operation, cumulative, seconds in metrics.durations():
                labels = (metrics.name, operation)
                if labels in totals:
                    counts, sum_before = totals[labels]
                    cumulative = [a + b for a, b in zip(counts, cumulative, strict=True)]  # noqa: PLW2901
                    seconds += sum_before  # noqa: PLW2901
                totals[labels] = (cumulative, seconds)
        return totals

    def _open(self) -> list[Metrics]:
        return [metrics for ref in list(self._stacks) if (metrics := ref()) is not None]

    def _warn(self, layer: str, problem: str) -> None:
        if layer not in self._warned:
            self._warned.add(layer)
            _log.warning("metrics of %s are left out: %s", layer, problem)


class MultiprocessExporter(Exporter):
    """Hands what was counted to the client's own metric objects, which its files are made of."""

    def __init__(self) -> None:
        super().__init__()
        import prometheus_client as client  # noqa: PLC0415

        private = client.CollectorRegistry()
        self._objects: dict[str, Any] = {}
        for key, metric in CATALOGUE.items():
            given: dict[str, Any] = {"registry": private}
            if metric.kind == "gauge":
                # Sums over live processes, except states, of which the worst one counts.
                mode = {"health": "livemin", "circuit_state": "livemax"}.get(key, "livesum")
                cls: Any = client.Gauge
                given["multiprocess_mode"] = mode
            elif metric.kind == "counter":
                cls = client.Counter
            else:
                cls = client.Histogram
                given["buckets"] = DURATION_BUCKETS
            self._objects[key] = cls(metric.name, metric.help, metric.all_labels, **given)
        self._handed: dict[tuple[str, tuple[str, ...]], float] = {}
        self._handed_timings: dict[tuple[str, ...], tuple[list[int], float]] = {}
        self._flushing = threading.Lock()
        self._start()
        os.register_at_fork(after_in_child=self._forked)
        atexit.register(self.flush)

    def collect(self) -> Iterator[Any]:
        """Hand over; the files are read by the client's ``MultiProcessCollector``."""
        self.flush()
        return iter(())

    def closed(self, metrics: Metrics) -> None:
        self.flush()
        super().closed(metrics)
        with self._flushing:
            for key in [key for key in self._handed if key[1][0] == metrics.name]:
                del self._handed[key]
            for labels in [key for key in self._handed_timings if key[0] == metrics.name]:
                del self._handed_timings[labels]

    def flush(self) -> None:
        """Hand over what was counted since the last time."""
        with self._flushing:
            for (key, labels), value in self.figures().items():
                child = self._objects[key].labels(*labels)
                if CATALOGUE[key].kind == "gauge":
                    child.set(value)
                    continue
                delta = value - self._handed.get((key, labels), 0.0)
                if delta > 0:
                    child.inc(delta)
                    self._handed[key, labels] = value
            for labels, (cumulative, seconds) in self.timings().items():
                counts = [
                    upper - lower
                    for upper, lower in zip(cumulative, [0, *cumulative], strict=False)
                ]
                before, before_seconds = self._handed_timings.get(labels, ([0] * len(counts), 0.0))
                child = self._objects["operation_duration"].labels(*labels)
                for cell, count, known in zip(child._buckets, counts, before, strict=True):  # noqa: SLF001  the client has no way to add many observations at once
                    cell.inc(count - known)
                child._sum.inc(seconds - before_seconds)  # noqa: SLF001
                self._handed_timings[labels] = (counts, seconds)

    def _start(self) -> None:
        thread = threading.Thread(target=self._flush_for_ever, daemon=True)
        thread.name = "layered_store-metrics"
        thread.start()

    def _flush_for_ever(self) -> None:
        pause = threading.Event()
        while not pause.wait(_FLUSH_SECONDS):
            self.flush()

    def _forked(self) -> None:
        # The parent hands over what was counted before; the child begins from there.
        self._flushing = threading.Lock()
        for (key, labels), value in self.figures().items():
            self._handed[key, labels] = value
        for labels, (cumulative, seconds) in self.timings().items():
            counts = [
                upper - lower for upper, lower in zip(cumulative, [0, *cumulative], strict=False)
            ]
            self._handed_timings[labels] = (counts, seconds)
        self._start()
