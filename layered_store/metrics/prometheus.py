"""The adapter to ``prometheus_client``: one collector for each registry."""

from __future__ import annotations

import logging
import threading
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from layered_store.errors import ConfigError
from layered_store.layers.metrics import Metrics, blocks_below
from layered_store.metrics.catalogue import CATALOGUE, DURATION_BUCKETS
from layered_store.stack import walk

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from layered_store.metrics.timings import Durations

__all__ = ["export", "exposition"]

_log = logging.getLogger("layered_store")

_HEALTHY: Final = CATALOGUE["health"].at_rest
_OUTDATED_SECONDS: Final = 300.0
"""What one stack found out about the health counts so long beside a later check of another one."""

_BOUNDS: Final = (*(repr(bound) for bound in DURATION_BUCKETS), "+Inf")
_exporters: weakref.WeakKeyDictionary[Any, Exporter] = weakref.WeakKeyDictionary()
_lock: Final = threading.Lock()

Labels = tuple[str, ...]
Key = tuple[str, Labels]
"""A key of the catalogue and the values of its labels."""
_Counts = tuple[dict[Key, float], "dict[Labels, Durations]"]


def export(metrics: Metrics, registry: Any) -> Exporter:
    """Export a ``Metrics`` layer through a registry, the client's default one when None."""
    import prometheus_client  # noqa: PLC0415  an optional driver

    registry = prometheus_client.REGISTRY if registry is None else registry
    if isinstance(registry, type) or not hasattr(registry, "register"):
        raise ConfigError(
            "must be a prometheus_client.CollectorRegistry", option="registry", layer="Metrics"
        )
    with _lock:
        exporter = _exporters.get(registry)
        if exporter is None:
            if _several_processes():
                from layered_store.metrics.multiprocess import (  # noqa: PLC0415  imports this one
                    MultiprocessExporter,
                )

                exporter = MultiprocessExporter()
            else:
                exporter = Exporter()
            registry.register(exporter)
            _exporters[registry] = exporter
        exporter.add(metrics)
    return exporter


def exposition(registry: Any = None, accept: str = "") -> tuple[bytes, str]:
    """Return what a ``/metrics`` endpoint answers, and its content type.

    In multiprocess mode it is that of all processes. OpenMetrics, with exemplars, when the caller
    asks for it.

    Args:
        registry: the registry to read; None takes the client's default one.
        accept: the request's ``Accept`` header.
    """
    import prometheus_client  # noqa: PLC0415  an optional driver
    from prometheus_client.exposition import choose_encoder  # noqa: PLC0415

    registry = prometheus_client.REGISTRY if registry is None else registry
    if _several_processes():
        from layered_store.metrics.multiprocess import AllProcesses  # noqa: PLC0415

        exporter = _exporters.get(registry)
        if exporter is not None:
            list(exporter.collect())  # hands over what this process counted
        registry = prometheus_client.CollectorRegistry()
        registry.register(AllProcesses())
    try:
        encode, content_type = choose_encoder(accept)
    except TypeError:  # a version that is no number: the client compares it all the same
        encode, content_type = choose_encoder("")
    return encode(registry), content_type


def _several_processes() -> bool:
    """Tell whether the client shares its figures over files: it decides when it is imported."""
    from prometheus_client import values  # noqa: PLC0415

    return values.ValueClass is not values.MutexValue


class Exporter:
    """A collector that reads what the stacks counted, when it is asked."""

    def __init__(self) -> None:
        self._stacks: list[weakref.ref[Metrics]] = []
        # A Metrics inside another one of the same name would count every call twice.
        self._inside: weakref.WeakKeyDictionary[Metrics, weakref.ref[Metrics]] = (
            weakref.WeakKeyDictionary()
        )
        self._warned: set[str] = set()
        # What closed stacks counted whose name open ones still have: a sum that fell would look to
        # Prometheus like a restart, after which all that is left of it is new.
        self._past: dict[Key, float] = {}
        self._past_durations: dict[Labels, Durations] = {}
        # What the last scrape showed of stacks that share a name: nobody tells when one is let go.
        self._shown: dict[weakref.ref[Metrics], _Counts] = {}
        # Who scrapes may do so in another thread, and threads have stacks of their own.
        self._changing = threading.Lock()

    def add(self, metrics: Metrics) -> None:
        """Export one more stack; those of one name are added up."""
        for place in walk(metrics.inner):
            inner = place.store
            if isinstance(inner, Metrics) and inner.name == metrics.name:
                self._warn(place.label, "a Metrics above has the same name; name them apart")
                self._inside[inner] = weakref.ref(metrics)
        with self._changing:
            self._stacks = [ref for ref in self._stacks if ref() is not None]
            self._stacks.append(weakref.ref(metrics))

    def closed(self, metrics: Metrics) -> None:
        """Stop exporting a stack; its counts stay as long as another one of its name is open."""
        with self._changing:
            exported = metrics in self.open_stacks()
            self._stacks = [ref for ref in self._stacks if ref() not in (None, metrics)]
            self._shown.pop(weakref.ref(metrics), None)
            names = {each.name for each in self.open_stacks()}
            if exported:
                self._keep(_counts(metrics, self.figures(metrics)))
            for key in [key for key in self._past if key[1][0] not in names]:
                del self._past[key]
            for gone in [labels for labels in self._past_durations if labels[0] not in names]:
                del self._past_durations[gone]

    def _keep(self, counts: _Counts) -> None:
        """Go on showing what a stack counted that is no more."""
        counters, durations = counts
        for key, value in counters.items():
            self._past[key] = self._past.get(key, 0) + value
        for labels, each in durations.items():
            self._past_durations[labels] = summed(self._past_durations.get(labels), each)

    def open_stacks(self) -> list[Metrics]:
        """Return the stacks to export now."""
        alive = [metrics for ref in list(self._stacks) if (metrics := ref()) is not None]
        return [
            metrics
            for metrics in alive
            if (above := self._inside.get(metrics)) is None or above() not in alive
        ]

    def describe(self) -> Iterable[Any]:
        """Tell the registry nothing, so that it does not collect when this is registered."""
        return []

    def collect(self) -> Iterator[Any]:
        """Yield all families; what the client calls at a scrape. Nothing while no stack is open."""
        with self._changing:
            stacks = self.open_stacks()
            for ref in [ref for ref in self._shown if ref() is None]:
                self._keep(self._shown.pop(ref))
            names = Counter(metrics.name for metrics in stacks)
            figures = {key: value for key, value in self._past.items() if key[1][0] in names}
            durations = {
                labels: each for labels, each in self._past_durations.items() if labels[0] in names
            }
        if not stacks:
            return
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
        exemplars: dict[Labels, dict[int, Any]] = {}
        labels: Labels
        for metrics in stacks:
            own = list(self.figures(metrics))
            if names[metrics.name] > 1:
                self._shown[weakref.ref(metrics)] = _counts(metrics, own)
            for key, value in own:
                figures[key] = combined(key, figures.get(key), value)
            for operation, each in metrics.durations():
                labels = (metrics.name, operation)
                durations[labels] = summed(durations.get(labels), each)
                exemplars.setdefault(labels, {}).update(metrics.exemplars(operation))
        for (name, labels), value in figures.items():
            families[name].add_metric(labels, value)
        for labels, (counts, seconds) in durations.items():
            buckets = _buckets(counts, exemplars.get(labels, {}))
            families["operation_duration"].add_metric(labels, buckets, seconds)
        yield from families.values()

    def figures(self, metrics: Metrics) -> Iterator[tuple[Key, float]]:
        """Yield every counter and gauge of one stack."""
        stack = metrics.name
        for sample in metrics.samples():
            yield (sample.metric, (stack, *sample.labels)), sample.value
        if not self._outdated(metrics):
            for layer, level in metrics.health_levels().items():
                yield ("health", (stack, layer)), level
        for layer, store in blocks_below(metrics):
            try:
                samples = list(store.samples())
            except Exception as exc:  # noqa: BLE001  one block must not break the scrape
                self._warn(layer, type(exc).__name__)
                continue
            for name, value, labels in samples:
                metric = CATALOGUE.get(name)
                if metric is None or not metric.per_layer or len(metric.labels) != len(labels):
                    self._warn(layer, "a figure that is not in the catalogue")
                    continue
                yield (name, (stack, layer, *labels)), value

    def _outdated(self, metrics: Metrics) -> bool:
        """Tell whether its health is bad news that a check of another stack of its name overrules.

        Who was asked once, in an outage, and never again would else say for ever that it goes on.
        """
        if all(level == _HEALTHY for level in metrics.health_levels().values()):
            return False
        checked = metrics.last_health_check()
        # Nobody's can be so much newer yet; of several processes, files would have to tell.
        if metrics.clock.time() - checked <= _OUTDATED_SECONDS:
            return False
        return self.last_check(metrics.name) - checked > _OUTDATED_SECONDS

    def last_check(self, stack: str) -> float:
        """Return when the health was last checked by any of the stacks of a name."""
        stacks = (each for each in self.open_stacks() if each.name == stack)
        return max((each.last_health_check() for each in stacks), default=0.0)

    def _warn(self, layer: str, problem: str) -> None:
        if layer not in self._warned:
            self._warned.add(layer)
            _log.warning("metrics of %s are left out: %s", layer, problem)


def _counts(metrics: Metrics, figures: Iterable[tuple[Key, float]]) -> _Counts:
    """Return what a stack has counted and timed so far, without its gauges."""
    counters = {key: value for key, value in figures if CATALOGUE[key[0]].kind == "counter"}
    return counters, {(metrics.name, operation): each for operation, each in metrics.durations()}


def combined(key: Key, known: float | None, value: float) -> float:
    """Return one figure out of those of two stacks of one name."""
    if known is None:
        return value
    over = CATALOGUE[key[0]].over
    if over == "sum":
        return known + value
    return max(known, value) if over == "max" else min(known, value)


def summed(known: Durations | None, value: Durations) -> Durations:
    """Return one histogram out of those of two stacks of one name."""
    if known is None:
        return value
    return [a + b for a, b in zip(known[0], value[0], strict=True)], known[1] + value[1]


def _buckets(counts: list[int], exemplars: dict[int, Any]) -> list[Any]:
    if not exemplars:
        return list(zip(_BOUNDS, counts, strict=True))
    from prometheus_client.samples import Exemplar  # noqa: PLC0415

    buckets: list[Any] = []
    for cell, (bound, count) in enumerate(zip(_BOUNDS, counts, strict=True)):
        each = exemplars.get(cell)
        if each is None:
            buckets.append((bound, count))
        else:
            given = Exemplar(dict(each.labels), each.value, each.timestamp)
            buckets.append((bound, count, given))
    return buckets
