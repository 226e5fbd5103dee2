"""What the committed dashboards and rules hold, for the tests."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from layered_store.metrics.catalogue import CATALOGUE

GRAFANA = Path(__file__).parents[2] / "grafana"
DASHBOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))
RULES = [GRAFANA / "alerts" / name for name in ("recording.yml", "alerts.yml")]

SERIES = {name for metric in CATALOGUE.values() for name in metric.series}
"""The names that queries may use."""


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def panels(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = load(path)["panels"]
    return found


def expressions() -> dict[tuple[str, str, str], str]:
    """Return every panel's expressions by dashboard, title and legend."""
    return {
        (path.stem, panel["title"], target["legendFormat"]): target["expr"]
        for path in DASHBOARDS
        for panel in panels(path)
        for target in panel["targets"]
    }


def metric_names(text: str) -> set[str]:
    """Return the metrics that a text names; recorded ones have colons."""
    return set(re.findall(r"\blayered_store[_:][a-z0-9_:]+", text))
