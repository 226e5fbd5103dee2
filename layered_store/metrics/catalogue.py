"""Every metric once: its name, type, help, labels and buckets.

Blocks count under the short keys (:class:`layered_store.stats.Sample`); adapters, dashboards and
docs take all else from here. Labels have few values and never a user id.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["CATALOGUE", "DURATION_BUCKETS", "OUTCOMES", "Metric"]

DURATION_BUCKETS: Final = (
    # A hit in process takes under a microsecond; the finest buckets tell hits from the rest.
    0.000001,
    0.00001,
    # Redis on the same network: a fifth of a millisecond to a few.
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    # A database: milliseconds to tens of them.
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    # Retries and time limits.
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
)
"""Upper bounds in seconds."""

OUTCOMES: Final = (
    "ok",
    "invalid",
    "unavailable",
    "timeout",
    "rejected",
    "error",
    "cancelled",
)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric family.

    Args:
        name: in Prometheus, without the ``_total`` of counters.
        kind: counter, gauge or histogram.
        help: one sentence.
        labels: beyond ``stack`` (always) and ``layer`` (where ``per_layer``).
        per_layer: whether it belongs to one block of the stack.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    per_layer: bool = True

    @property
    def all_labels(self) -> tuple[str, ...]:
        """All label names, in their order."""
        return ("stack", *(("layer",) if self.per_layer else ()), *self.labels)


CATALOGUE: Final[dict[str, Metric]] = {
    "operations": Metric(
        "layered_store_operations",
        "counter",
        "Operations that ended at this point of the stack, by outcome.",
        ("operation", "outcome"),
        per_layer=False,
    ),
    "operation_duration": Metric(
        "layered_store_operation_duration_seconds",
        "histogram",
        "How long operations took; in-process hits are sampled and weighted.",
        ("operation",),
        per_layer=False,
    ),
    "operations_in_flight": Metric(
        "layered_store_operations_in_flight",
        "gauge",
        "Operations that are under way.",
        per_layer=False,
    ),
    "reads": Metric(
        "layered_store_reads", "counter", "Reads of users a tier answered, by result.", ("result",)
    ),
    "read_waits": Metric(
        "layered_store_read_waits", "counter", "Reads that shared another caller's load."
    ),
    "cache_entries": Metric(
        "layered_store_cache_entries", "gauge", "Users kept in the in-process cache."
    ),
    "cache_evictions": Metric(
        "layered_store_cache_evictions",
        "counter",
        "Entries that the in-process cache gave up, by reason.",
        ("reason",),
    ),
    "invalidations": Metric(
        "layered_store_invalidations",
        "counter",
        "Entries dropped since they may be old, by reason.",
        ("reason",),
    ),
    "retries": Metric(
        "layered_store_retries",
        "counter",
        "Calls that were tried more than once, by how it ended.",
        ("operation", "outcome"),
    ),
    "circuit_state": Metric(
        "layered_store_circuit_state", "gauge", "Circuit breaker: 0 closed, 1 half open, 2 open."
    ),
    "fallbacks": Metric(
        "layered_store_fallbacks",
        "counter",
        "Reads that the secondary store answered.",
        ("operation",),
    ),
    "pending_repairs": Metric(
        "layered_store_pending_repairs", "gauge", "Users of the cache tier still to be repaired."
    ),
    "corrupt_records": Metric(
        "layered_store_corrupt_records",
        "counter",
        "Stored records that could not be read back or belong to another user.",
    ),
    "stale_writes": Metric(
        "layered_store_stale_writes",
        "counter",
        "Snapshots that were ignored since a newer one was stored (order by snapshot time).",
    ),
    "health": Metric(
        "layered_store_health_status",
        "gauge",
        "Health at the last check: 0 unhealthy, 1 degraded, 2 healthy.",
    ),
}
