"""Writes the dashboards: ``python grafana/build.py``. Edit this file, not the JSON.

Each panel is one line here; places and ids follow from the order. A test compares the committed
files with what this writes, and runs every expression on a real Prometheus.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "dashboards"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24
SCHEMA = 39  # Grafana 10.4 and later
RATE = "[$__rate_interval]"
HERE = 'stack=~"$stack"'
"""The label matcher of every selector."""

HEALTH = {"0": ("unhealthy", "red"), "1": ("degraded", "orange"), "2": ("healthy", "green")}
CIRCUIT = {"0": ("closed", "green"), "1": ("half open", "orange"), "2": ("open", "red")}
UP = {"0": ("lost", "red"), "1": ("up", "green")}


@dataclass
class Panel:
    """One panel.

    Args:
        title: what it shows.
        description: how to read it, and what to do when it looks bad.
        queries: expressions by their legend.
        unit: Grafana's name of the unit.
        kind: Grafana's type of panel.
        width: columns of 24.
        height: rows.
        values: texts and colours for values that are states.
        top: the end of the axis, when it has a natural one.
        stacked: whether the series add up to something.
    """

    title: str
    description: str
    queries: dict[str, str]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 12
    height: int = 8
    values: dict[str, tuple[str, str]] = field(default_factory=dict)
    top: float | None = None
    stacked: bool = False


def rate(metric: str, by: str, matchers: str = "") -> str:
    inside = f"{HERE}, {matchers}" if matchers else HERE
    return f"sum by ({by}) (rate({metric}{{{inside}}}{RATE}))"


def gauge(metric: str, how: str, by: str, matchers: str = "") -> str:
    inside = f"{HERE}, {matchers}" if matchers else HERE
    return f"{how} by ({by}) ({metric}{{{inside}}})"


def quantile(share: float, by: str, matchers: str = "") -> str:
    buckets = rate("layered_store_operation_duration_seconds_bucket", f"{by}, le", matchers)
    return f"histogram_quantile({share}, {buckets})"


OPERATIONS = "layered_store_operations_total"
READS = "layered_store_reads_total"
ANSWERED = 'result=~"hit|negative_hit|stale"'
FINE = 'outcome=~"ok|invalid|cancelled"'
CACHES = 'layer=~"[0-9]+[.](cached|write_through)"'


def hit_ratio(by: str, matchers: str = "") -> str:
    some = f"{matchers}, {ANSWERED}" if matchers else ANSWERED
    return f"{rate(READS, by, some)} / ({rate(READS, by, matchers)} > 0)"


def failure_ratio(by: str) -> str:
    return f"1 - {rate(OPERATIONS, by, FINE)} / ({rate(OPERATIONS, by)} > 0)"


OVERVIEW = [
    Panel(
        "Calls",
        "Calls per second at the top of each stack, hits included.",
        {"{{stack}}": rate(OPERATIONS, "stack")},
        "ops",
        "stat",
        width=4,
        height=4,
    ),
    Panel(
        "Calls that fail",
        "Share of calls that ended unavailable, timed out, rejected or in an error. Refused"
        " arguments and cancelled calls do not count.",
        {"{{stack}}": failure_ratio("stack")},
        "percentunit",
        "stat",
        width=4,
        height=4,
    ),
    Panel(
        "Hits in process",
        "Share of reads that the in-process cache answered.",
        {"{{stack}}": hit_ratio("stack", 'layer=~".*[.]cached"')},
        "percentunit",
        "stat",
        width=4,
        height=4,
    ),
    Panel(
        "Slowest 1 % of reads",
        "99 % of single reads took less than this.",
        {"{{stack}}": quantile(0.99, "stack", 'operation="get_latest"')},
        "s",
        "stat",
        width=4,
        height=4,
    ),
    Panel(
        "Worst breaker",
        "The worst state of all circuit breakers of a stack.",
        {"{{stack}}": gauge("layered_store_circuit_state", "max", "stack")},
        "short",
        "stat",
        width=4,
        height=4,
        values=CIRCUIT,
    ),
    Panel(
        "Pending repairs",
        "Users whose copy in the cache tier is outdated, and not read until it is repaired.",
        {"{{stack}}": gauge("layered_store_pending_repairs", "sum", "stack")},
        "short",
        "stat",
        width=4,
        height=4,
    ),
    Panel(
        "Hit ratio by tier",
        "Share of the reads of each tier that it answered itself, known absences and stale answers"
        " included. A tier that fails answers nothing, so an outage shows as a fall.",
        {"{{stack}} {{layer}}": hit_ratio("stack, layer", CACHES)},
        "percentunit",
        top=1,
    ),
    Panel(
        "Latency of reads",
        "Half, 90 % and 99 % of single reads took less than this. In-process hits are sampled and"
        " weighted; everything else is timed.",
        {
            f"{{{{stack}}}} p{share * 100:g}": quantile(share, "stack", 'operation="get_latest"')
            for share in (0.5, 0.9, 0.99)
        },
        "s",
    ),
    Panel(
        "Calls by outcome",
        "Every call has exactly one outcome.",
        {"{{stack}} {{outcome}}": rate(OPERATIONS, "stack, outcome")},
        "ops",
        stacked=True,
    ),
    Panel(
        "Failing reads by tier",
        "Reads that a tier could not answer. At a cache tier the system of record answered in its"
        " place; at the top the caller got an error.",
        {"{{stack}} {{layer}}": rate(READS, "stack, layer", 'result="error"')},
        "ops",
    ),
    Panel(
        "Circuit breakers",
        "Open: calls of that backend are refused without asking it.",
        {"{{stack}} {{layer}}": gauge("layered_store_circuit_state", "max", "stack, layer")},
        "short",
        "state-timeline",
        values=CIRCUIT,
    ),
    Panel(
        "Pending repairs over time",
        "Grows while the cache tier is away and falls to 0 soon after it is back.",
        {"{{stack}} {{layer}}": gauge("layered_store_pending_repairs", "sum", "stack, layer")},
    ),
    Panel(
        "Calls in flight",
        "Calls that wait for a backend. If the number grows without more calls, a backend hangs.",
        {"{{stack}}": gauge("layered_store_operations_in_flight", "sum", "stack")},
    ),
    Panel(
        "Health",
        "The whole stack as of its last health check: degraded means that it serves although a"
        " part is down, unhealthy that its system of record is down.",
        {"{{stack}}": gauge("layered_store_health_status", "min", "stack", 'layer=~"0[.].*"')},
        "short",
        "state-timeline",
        values=HEALTH,
    ),
]

STACK = [
    Panel(
        "Calls by operation",
        "Calls per second at the top of the stack.",
        {"{{operation}}": rate(OPERATIONS, "operation")},
        "ops",
        stacked=True,
    ),
    Panel(
        "Failing calls by operation",
        "Share of the calls of each operation that failed.",
        {"{{operation}}": failure_ratio("operation")},
        "percentunit",
    ),
    Panel(
        "Slowest 1 % by operation",
        "99 % of the calls took less than this. The dashed line is how long one attempt may take"
        " at the slowest backend.",
        {
            "{{operation}}": quantile(0.99, "operation"),
            "time limit": gauge("layered_store_call_limit_seconds", "max", "stack"),
        },
        "s",
    ),
    Panel(
        "Where single reads spend their time",
        "How many reads fell into each bucket: in-process hits below 0.1 ms, the cache tier about"
        " 1 ms, the database above.",
        {
            "{{le}}": rate(
                "layered_store_operation_duration_seconds_bucket", "le", 'operation="get_latest"'
            )
        },
        "ops",
        "heatmap",
    ),
    Panel(
        "Reads by tier and result",
        "Each user read at a tier counts once, by result. A read that a tier answers does not"
        " reach the tiers below.",
        {"{{layer}} {{result}}": rate(READS, "layer, result")},
        "ops",
    ),
    Panel(
        "Reads that shared a load",
        "Callers that waited for another caller's load of the same user.",
        {"{{layer}}": rate("layered_store_read_waits_total", "layer")},
        "ops",
    ),
    Panel(
        "Users in the in-process cache",
        "Bounded by max_entries. At the bound, evictions follow.",
        {"{{layer}}": gauge("layered_store_cache_entries", "sum", "layer")},
    ),
    Panel(
        "Evictions",
        "Entries removed because the cache was full (size) or their TTL was over (expired). If"
        " there are many by size while the hit ratio is low, raise max_entries.",
        {"{{layer}} {{reason}}": rate("layered_store_cache_evictions_total", "layer, reason")},
        "ops",
    ),
    Panel(
        "Retries",
        "Repeated attempts (success, failure, cancelled), and calls that were given up because"
        " attempts or time (exhausted) or the retry budget (budget) ran out.",
        {
            "{{layer}} {{operation}} {{outcome}}": rate(
                "layered_store_retries_total", "layer, operation, outcome"
            )
        },
        "ops",
    ),
    Panel(
        "Circuit breakers of the stack",
        "Open: calls of that backend are refused without asking it.",
        {"{{layer}}": gauge("layered_store_circuit_state", "max", "layer")},
        "short",
        "state-timeline",
        values=CIRCUIT,
    ),
    Panel(
        "Reads from a secondary store",
        "Reads that Fallback sent to its secondary store while the first was unavailable.",
        {"{{layer}} {{operation}}": rate("layered_store_fallbacks_total", "layer, operation")},
        "ops",
    ),
    Panel(
        "Health of each block",
        "As of the last health check.",
        {"{{layer}}": gauge("layered_store_health_status", "min", "layer")},
        "short",
        "state-timeline",
        values=HEALTH,
    ),
    Panel(
        "Time since the last health check",
        "The health shown is of that moment. Let a readiness probe ask for it regularly.",
        {
            "{{stack}}": "time() - "
            + gauge("layered_store_health_checked_timestamp_seconds", "max", "stack")
        },
        "s",
    ),
    Panel(
        "Bad records and late writes",
        "Records that could not be read back, and snapshots that were older than the stored one"
        " (order by snapshot time only).",
        {
            "{{layer}} corrupt": rate("layered_store_corrupt_records_total", "layer"),
            "{{layer}} stale write": rate("layered_store_stale_writes_total", "layer"),
        },
        "ops",
    ),
]

COHERENCE = [
    Panel(
        "Invalidation channel",
        "Whether messages about writes of other processes arrive. Without them, in-process caches"
        " stop answering within a second and reads go to the cache tier.",
        {"{{stack}} {{layer}}": gauge("layered_store_channel_up", "min", "stack, layer")},
        "short",
        "state-timeline",
        values=UP,
    ),
    Panel(
        "Losses of the channel",
        "How often the subscription broke, per minute.",
        {
            "{{stack}} {{layer}}": "60 * "
            + rate("layered_store_channel_losses_total", "stack, layer")
        },
        "cpm",
    ),
    Panel(
        "Entries dropped in process",
        "By reason: the process's own writes, messages over the channel, or distrust after the"
        " channel was lost.",
        {
            "{{stack}} {{layer}} {{reason}}": rate(
                "layered_store_invalidations_total", "stack, layer, reason"
            )
        },
        "ops",
    ),
    Panel(
        "Failed steps on the cache tier",
        "Steps that failed on the cache tier while the system of record served the caller.",
        {
            "{{stack}} {{layer}} {{step}}": rate(
                "layered_store_tier_failures_total", "stack, layer, step"
            )
        },
        "ops",
    ),
    Panel(
        "Copies to be repaired",
        "Users whose copy in the cache tier is known to be outdated. It is not read until it is"
        " repaired.",
        {"{{stack}} {{layer}}": gauge("layered_store_pending_repairs", "sum", "stack, layer")},
    ),
    Panel(
        "Copies repaired",
        "Outdated copies that a repair pass removed, per second.",
        {"{{stack}} {{layer}}": rate("layered_store_repairs_total", "stack, layer")},
        "ops",
    ),
    Panel(
        "Erasures by outcome",
        "Calls of delete. If the outcome is not ok, the caller has to repeat the call.",
        {"{{stack}} {{outcome}}": rate(OPERATIONS, "stack, outcome", 'operation="delete"')},
        "ops",
        stacked=True,
    ),
    Panel(
        "Incomplete erasures",
        "Deletes that reached the system of record but not every tier, in the last hour.",
        {
            "{{stack}} {{layer}}": "sum by (stack, layer)"
            f" (increase(layered_store_erasures_incomplete_total{{{HERE}}}[1h]))"
        },
    ),
    Panel(
        "Duration of erasures",
        "A delete waits until no other process can show the user any more: up to the lease (1 s)"
        " when one of them does not answer.",
        {
            f"{{{{stack}}}} p{share * 100:g}": quantile(share, "stack", 'operation="delete"')
            for share in (0.5, 0.99)
        },
        "s",
    ),
    Panel(
        "Hit ratio of the shared tier",
        "Share of its reads that the cache tier answered. 0 while it is distrusted or away.",
        {"{{stack}} {{layer}}": hit_ratio("stack, layer", 'layer=~".*[.]write_through"')},
        "percentunit",
        top=1,
    ),
]

CHANGES = [
    Panel(
        "Shadow: answers compared",
        "Answers of the candidate, compared with those of the store in use. Anything but same is"
        " a reason not to switch yet. Dropped ones were not asked, so that calls to the candidate"
        " do not pile up.",
        {
            "{{stack}} {{layer}} {{result}}": rate(
                "layered_store_shadow_comparisons_total", "stack, layer, result"
            )
        },
        "ops",
        width=8,
    ),
    Panel(
        "Shadow: mirrored writes",
        "Writes that were mirrored to the candidate, by outcome.",
        {
            "{{stack}} {{layer}} {{outcome}}": rate(
                "layered_store_shadow_writes_total", "stack, layer, outcome"
            )
        },
        "ops",
        width=8,
    ),
    Panel(
        "Shadow: calls pending",
        "Calls to the candidate that wait or run. If it stays at max_pending, the candidate cannot"
        " keep up.",
        {"{{stack}} {{layer}}": gauge("layered_store_shadow_pending", "sum", "stack, layer")},
        width=8,
    ),
    Panel(
        "Ramp: share of users",
        "The share of the users that goes the other way.",
        {"{{stack}} {{layer}}": gauge("layered_store_ramp_share", "max", "stack, layer")},
        "percentunit",
        width=8,
        top=1,
    ),
    Panel(
        "Ramp: reads by way",
        "Users read through the ramp: the old way (inner) and the other one.",
        {
            "{{stack}} {{layer}} {{side}}": rate(
                "layered_store_ramp_reads_total", "stack, layer, side"
            )
        },
        "ops",
        width=8,
        stacked=True,
    ),
    Panel(
        "Ramp: users the alternative missed",
        "Users whose latest write did not reach the alternative; they are read the old way.",
        {"{{stack}} {{layer}}": gauge("layered_store_ramp_behind", "sum", "stack, layer")},
        width=8,
    ),
    Panel(
        "Refused writes",
        "Writes that a read-only layer refused: somebody still writes to a store that should not"
        " change.",
        {"{{stack}} {{layer}}": rate("layered_store_refused_writes_total", "stack, layer")},
        "ops",
        width=8,
    ),
    Panel(
        "Compression",
        "Bytes of states per second, before and after compression.",
        {
            "{{stack}} {{layer}} {{stage}}": rate(
                "layered_store_compression_bytes_total", "stack, layer, stage"
            )
        },
        "Bps",
        width=8,
    ),
    Panel(
        "Reads with an old key",
        "Records that were encrypted with another key than the one that writes now. When it has"
        " been 0 for as long as states are kept, you can remove the old key.",
        {"{{stack}} {{layer}}": rate("layered_store_old_key_reads_total", "stack, layer")},
        "ops",
        width=8,
    ),
]


def placed(panels: list[Panel]) -> Iterator[tuple[Panel, dict[str, int]]]:
    """Give panels their places, row by row."""
    x = y = tallest = 0
    for panel in panels:
        if x + panel.width > COLUMNS:
            x, y, tallest = 0, y + tallest, 0
        yield panel, {"x": x, "y": y, "w": panel.width, "h": panel.height}
        x += panel.width
        tallest = max(tallest, panel.height)


def defaults(panel: Panel) -> dict[str, Any]:
    """Return how the values of a panel look."""
    found: dict[str, Any] = {"unit": panel.unit, "color": {"mode": "palette-classic"}}
    found["min"] = 0
    if panel.top is not None:
        found["max"] = panel.top
    if panel.values:
        found["color"] = {"mode": "thresholds"}
        found["mappings"] = [
            {
                "type": "value",
                "options": {
                    value: {"text": text, "color": colour, "index": index}
                    for index, (value, (text, colour)) in enumerate(panel.values.items())
                },
            }
        ]
    if panel.kind == "timeseries":
        found["custom"] = {
            "drawStyle": "line",
            "fillOpacity": 30 if panel.stacked else 8,
            "lineWidth": 1,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        }
    return found


def look(panel: Panel) -> dict[str, Any]:
    """Return the options of a panel's type."""
    if panel.kind == "stat":
        return {
            "colorMode": "value",
            "graphMode": "none" if panel.values else "area",
            "textMode": "auto",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        }
    if panel.kind == "state-timeline":
        return {
            "showValue": "auto",
            "mergeValues": True,
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        }
    if panel.kind == "heatmap":
        return {
            "calculate": False,
            "yAxis": {"unit": "s"},
            "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64},
            "cellValues": {"unit": panel.unit},
            "legend": {"show": True},
        }
    return {
        "legend": {
            "displayMode": "table",
            "placement": "bottom",
            "showLegend": True,
            "calcs": ["lastNotNull", "max"],
        },
        "tooltip": {"mode": "multi", "sort": "desc"},
    }


def panel_json(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    targets = [
        {
            "refId": chr(ord("A") + index),
            "datasource": SOURCE,
            "expr": expr,
            "legendFormat": legend,
            "format": "heatmap" if panel.kind == "heatmap" else "time_series",
            "instant": False,
            "range": True,
        }
        for index, (legend, expr) in enumerate(panel.queries.items())
    ]
    overrides = []
    if "time limit" in panel.queries:
        dashed = {"id": "custom.lineStyle", "value": {"fill": "dash", "dash": [8, 6]}}
        overrides.append(
            {"matcher": {"id": "byName", "options": "time limit"}, "properties": [dashed]}
        )
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults(panel), "overrides": overrides},
        "options": look(panel),
        "targets": targets,
    }


def variables(*, several: bool) -> list[dict[str, Any]]:
    """Return the dashboard's variables: the Prometheus to ask, and the stacks to show."""
    query = "label_values(layered_store_operations_in_flight, stack)"
    stack: dict[str, Any] = {
        "name": "stack",
        "label": "Stack",
        "type": "query",
        "datasource": SOURCE,
        "definition": query,
        "query": {"query": query, "refId": "stack"},
        "refresh": 2,
        "sort": 1,
        "multi": several,
        "includeAll": several,
        "hide": 0,
    }
    if several:
        stack["allValue"] = ".*"
        stack["current"] = {"text": ["All"], "value": ["$__all"], "selected": True}
    source = {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
        "refresh": 1,
        "hide": 0,
    }
    return [source, stack]


def dashboard(
    name: str, title: str, description: str, panels: list[Panel], *, several: bool
) -> dict[str, Any]:
    return {
        "uid": f"layered-store-{name}",
        "title": title,
        "description": description,
        "tags": ["layered_store"],
        "schemaVersion": SCHEMA,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "links": [
            {
                "title": "layered_store",
                "type": "dashboards",
                "tags": ["layered_store"],
                "asDropdown": True,
                "includeVars": True,
                "keepTime": True,
            }
        ],
        "templating": {"list": variables(several=several)},
        "panels": [
            panel_json(number, panel, place)
            for number, (panel, place) in enumerate(placed(panels), 1)
        ],
    }


def dashboards() -> dict[str, str]:
    """Return every dashboard's text by its file name."""
    built = {
        "overview": dashboard(
            "overview",
            "layered_store / Overview",
            "All stacks: whether calls succeed, how fast, from which tier, and what is broken.",
            OVERVIEW,
            several=True,
        ),
        "stack": dashboard(
            "stack",
            "layered_store / One stack",
            "One stack in depth: operations, tiers, cache, retries, breakers, health.",
            STACK,
            several=False,
        ),
        "coherence": dashboard(
            "coherence",
            "layered_store / Coherence and erasure",
            "Whether processes agree (channel, repairs, outdated copies), and whether erasures are"
            " complete.",
            COHERENCE,
            several=True,
        ),
        "changes": dashboard(
            "changes",
            "layered_store / Moving to something else",
            "Changes under way: shadows, ramps, read-only stores, compression, new keys.",
            CHANGES,
            several=True,
        ),
    }
    return {f"{name}.json": json.dumps(each, indent=2) + "\n" for name, each in built.items()}


def main() -> None:
    for name, text in dashboards().items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    main()
