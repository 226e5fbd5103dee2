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
        over: how a gauge of several processes, or of several stacks of one name, becomes one.
        at_rest: a gauge's value for a stack that is closed, in multiprocess mode, where a series
            cannot be taken away: one that changes nothing over processes.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    per_layer: bool = True
    over: Literal["sum", "max", "min"] = "sum"
    at_rest: float = 0.0

    @property
    def all_labels(self) -> tuple[str, ...]:
        """All label names, in their order."""
        return ("stack", *(("layer",) if self.per_layer else ()), *self.labels)

    @property
    def series(self) -> tuple[str, ...]:
        """The names of its series, as queries write them."""
        if self.kind == "counter":
            return (f"{self.name}_total",)
        if self.kind == "histogram":
            return (f"{self.name}_bucket", f"{self.name}_count", f"{self.name}_sum")
        return (self.name,)


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
        "layered_store_reads",
        "counter",
        "Users that were read at a tier, by result; cancelled and refused reads count as none.",
        ("result",),
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
        "Repeated attempts by how they ended (success, failure, cancelled), and failed calls that"
        " were not repeated since attempts or time (exhausted) or the retry budget (budget) ran"
        " out.",
        ("operation", "outcome"),
    ),
    "circuit_state": Metric(
        "layered_store_circuit_state",
        "gauge",
        "Circuit breaker: 0 closed, 1 half open, 2 open.",
        over="max",
    ),
    "fallbacks": Metric(
        "layered_store_fallbacks",
        "counter",
        "Reads that the secondary store was asked for.",
        ("operation",),
    ),
    "pending_repairs": Metric(
        "layered_store_pending_repairs", "gauge", "Users of the cache tier still to be repaired."
    ),
    "repairs": Metric(
        "layered_store_repairs", "counter", "Users of the cache tier that were repaired."
    ),
    "tier_failures": Metric(
        "layered_store_tier_failures",
        "counter",
        "Steps on the cache tier that failed while the system of record served the caller, by"
        " step (read, write, erase, ping, repair).",
        ("step",),
    ),
    "channel_up": Metric(
        "layered_store_channel_up",
        "gauge",
        "Whether the invalidation channel works: its echo came back within the lease.",
        over="min",
        at_rest=1.0,
    ),
    "channel_losses": Metric(
        "layered_store_channel_losses",
        "counter",
        "How often the invalidation channel broke.",
    ),
    "erasures_incomplete": Metric(
        "layered_store_erasures_incomplete",
        "counter",
        "Deletes that could not finish in every tier.",
    ),
    "corrupt_records": Metric(
        "layered_store_corrupt_records",
        "counter",
        "Stored records that could not be read back or belong to another user.",
    ),
    "shadow_comparisons": Metric(
        "layered_store_shadow_comparisons",
        "counter",
        "Answers of a shadow's candidate that were compared, by result (same, missing, extra,"
        " older, newer, value, history, error, dropped).",
        ("result",),
    ),
    "shadow_writes": Metric(
        "layered_store_shadow_writes",
        "counter",
        "Writes that were mirrored to a shadow's candidate, by outcome (ok, error, dropped).",
        ("outcome",),
    ),
    "shadow_pending": Metric(
        "layered_store_shadow_pending",
        "gauge",
        "Calls of a shadow's candidate that wait or run.",
    ),
    "ramp_share": Metric(
        "layered_store_ramp_share",
        "gauge",
        "Share of the users that a ramp sends the other way.",
        over="max",
    ),
    "ramp_reads": Metric(
        "layered_store_ramp_reads",
        "counter",
        "Users that were read through a ramp, by the way they went (inner, other).",
        ("side",),
    ),
    "ramp_behind": Metric(
        "layered_store_ramp_behind",
        "gauge",
        "Users whose latest write a ramp's alternative missed.",
    ),
    "refused_writes": Metric(
        "layered_store_refused_writes", "counter", "Writes that a read-only layer refused."
    ),
    "compression_bytes": Metric(
        "layered_store_compression_bytes",
        "counter",
        "Bytes of states that were worth compressing, before and after.",
        ("stage",),
    ),
    "old_key_reads": Metric(
        "layered_store_old_key_reads",
        "counter",
        "Records that were read with another key than the one that writes now.",
    ),
    "stale_writes": Metric(
        "layered_store_stale_writes",
        "counter",
        "Snapshots that were ignored since a newer one was stored (order by snapshot time).",
    ),
    "call_limit": Metric(
        "layered_store_call_limit_seconds",
        "gauge",
        "How long one attempt may take: the longest of the limits on the ways to the backends.",
        per_layer=False,
        over="max",
    ),
    "health": Metric(
        "layered_store_health_status",
        "gauge",
        "Health at the last check: 0 unhealthy, 1 degraded, 2 healthy.",
        over="min",
        at_rest=2.0,
    ),
    "health_checked": Metric(
        "layered_store_health_checked_timestamp_seconds",
        "gauge",
        "When the health was last checked, in seconds since 1970.",
        per_layer=False,
        over="max",
    ),
}
