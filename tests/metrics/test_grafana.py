"""Dashboards and rules: their structure, and that they name only what is exported."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from committed_dashboards import (
    DASHBOARDS,
    GRAFANA,
    RULES,
    SERIES,
    expressions,
    load,
    metric_names,
    panels,
)

ROOT = GRAFANA.parent
UNITS = {"short", "ops", "percentunit", "s", "cpm", "Bps"}
RECORDED = set(re.findall(r"record: (\S+)", RULES[0].read_text()))
ALERTS = re.findall(r"alert: (\S+)", RULES[1].read_text())


def test_the_script_writes_what_is_committed() -> None:
    """Edit grafana/build.py, run it, commit both."""
    built = runpy.run_path(str(GRAFANA / "build.py"))["dashboards"]()
    assert built == {path.name: path.read_text() for path in DASHBOARDS}
    assert set(built) == {"overview.json", "stack.json", "coherence.json", "changes.json"}


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_whole(path: Path) -> None:
    """Ids, titles and variables, as Grafana 10 and 11 want them."""
    board = load(path)
    assert board["schemaVersion"] == 39
    assert re.fullmatch(r"layered-store-[a-z]+", board["uid"])
    assert board["description"]
    variables = {each["name"]: each for each in board["templating"]["list"]}
    assert list(variables) == ["datasource", "stack"]
    assert variables["datasource"]["type"] == "datasource"
    query = variables["stack"]["query"]["query"]
    assert metric_names(query) <= SERIES
    assert len({panel["id"] for panel in panels(path)}) == len(panels(path))
    assert len({panel["title"] for panel in panels(path)}) == len(panels(path))


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_no_two_panels_overlap_and_rows_are_full(path: Path) -> None:
    """Every place of the grid belongs to at most one panel; none hangs over the edge."""
    taken: dict[tuple[int, int], int] = {}
    for panel in panels(path):
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["id"]) == panel["id"]
    height = max(y for _, y in taken) + 1
    assert len(taken) == 24 * height


@pytest.mark.parametrize(
    ("board", "panel"),
    [(path.stem, panel) for path in DASHBOARDS for panel in panels(path)],
    ids=lambda value: value if isinstance(value, str) else value["title"],
)
def test_a_panel_can_be_read(board: str, panel: dict[str, Any]) -> None:
    """Title, description, unit, legend; queries through the variables."""
    assert len(panel["title"]) > 3
    assert panel["description"].endswith(".")
    assert len(panel["description"]) > 20
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    assert panel["type"] in {"timeseries", "stat", "state-timeline", "heatmap"}
    assert panel["datasource"]["uid"] == "${datasource}"
    refs = [target["refId"] for target in panel["targets"]]
    assert refs == [chr(ord("A") + index) for index in range(len(refs))]
    assert refs
    for target in panel["targets"]:
        assert target["datasource"]["uid"] == "${datasource}"
        names = metric_names(target["expr"])
        assert names
        assert names <= SERIES, f"not in the catalogue: {names - SERIES}"
        selectors = re.findall(r"layered_store\w+(\{[^}]*\})?", target["expr"])
        assert all('stack=~"$stack"' in selector for selector in selectors)
        assert set(re.findall(r"}\[([^]]*)\]", target["expr"])) <= {"$__rate_interval", "1h"}
        # A legend tells apart what the expression keeps apart.
        kept = re.search(r"sum by \(([^)]*)\)|(?:max|min) by \(([^)]*)\)", target["expr"])
        assert kept is not None
        labels = {each.strip() for each in (kept[1] or kept[2]).split(",")}
        told = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        if panel["type"] != "heatmap" and target["legendFormat"] != "time limit":
            assert told == labels - {"le"}
    if panel["fieldConfig"]["defaults"].get("mappings"):
        assert panel["type"] in {"stat", "state-timeline"}


def test_a_share_of_nothing_is_left_out() -> None:
    """While nobody calls, a panel of shares is empty; it would show NaN."""
    shares = [expr for expr in expressions().values() if " / " in expr]
    assert shares
    for expr in shares:
        assert re.search(r" / \(sum by .* > 0\)$", expr), expr


def test_every_metric_is_on_a_dashboard() -> None:
    """What is exported can be seen; histograms by their buckets."""
    shown = {name for expr in expressions().values() for name in metric_names(expr)}
    assert {
        name for name in SERIES if not name.endswith(("_seconds_count", "_seconds_sum"))
    } == shown


def test_rules_name_only_what_is_exported_or_recorded() -> None:
    """A metric that was renamed is found here."""
    for path in (*RULES, GRAFANA / "alert_tests.yml"):
        text = re.sub(r"#.*", "", path.read_text())
        names = {name for name in metric_names(text) if not name.startswith("layered_store_alerts")}
        assert names <= SERIES | RECORDED, f"not in the catalogue: {names - SERIES - RECORDED}"


def test_every_alert_says_what_to_do() -> None:
    """In its runbook text and, at more length, in docs/runbook.md under its name."""
    assert len(ALERTS) == 9
    runbook = (ROOT / "docs" / "runbook.md").read_text()
    blocks = RULES[1].read_text().split("- alert: ")[1:]
    for name, block in zip(ALERTS, blocks, strict=True):
        for key in ("summary", "description", "runbook", "runbook_url"):
            assert re.search(rf'^ +{key}: "[^"]{{15,}}"$', block, re.MULTILINE), (name, key)
        assert f"docs/runbook.md#{name.lower()}" in block
        assert f"\n## {name}\n" in runbook
        assert re.search(r"severity: (warning|critical)", block)


def test_docs_name_only_what_is_exported() -> None:
    """The pages on metrics know the catalogue, all of it, and nothing else."""
    for page in ("metrics.md", "runbook.md", "layers/metrics.md"):
        names = metric_names((ROOT / "docs" / page).read_text())
        known = SERIES | RECORDED | {name.removesuffix("_bucket") for name in SERIES}
        assert names <= known, (page, names - known)
    text = (ROOT / "docs" / "metrics.md").read_text()
    for name in SERIES:
        if not name.endswith(("_count", "_sum")):
            row = f"| `{name.removesuffix('_bucket')}` |"
            assert text.count(row) == 1, name


def test_the_compose_file_mounts_what_is_there() -> None:
    """Rules, dashboards and provisioning are found where the configurations look for them."""
    yaml = pytest.importorskip("yaml")
    compose = yaml.safe_load((GRAFANA / "docker-compose.yml").read_text())
    mounts = {}
    for service in compose["services"].values():
        for volume in service["volumes"]:
            source, target = volume.split(":")[:2]
            if source.startswith("."):
                assert (GRAFANA / source).exists(), source
                mounts[target] = GRAFANA / source
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert ":latest" not in service["image"]
    rules = yaml.safe_load((GRAFANA / "prometheus.yml").read_text())["rule_files"]
    assert [(mounts["/etc/prometheus/alerts"].parent / rule).name for rule in rules] == [
        path.name for path in RULES
    ]
    provisioning = mounts["/etc/grafana/provisioning"]
    source = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    boards = yaml.safe_load((provisioning / "dashboards" / "layered_store.yml").read_text())
    assert boards["providers"][0]["options"]["path"] in mounts
    home = compose["services"]["grafana"]["environment"]
    path = Path(home["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (mounts[str(path.parent)] / path.name).exists()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool on the PATH")
@pytest.mark.parametrize(
    "command",
    [
        ["check", "rules", *map(str, RULES)],
        ["test", "rules", str(GRAFANA / "alert_tests.yml")],
        ["check", "config", str(GRAFANA / "prometheus.yml")],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_promtool_agrees(command: list[str]) -> None:
    """Rules parse, each alert fires in its scenario and stays silent in the healthy one."""
    done = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
