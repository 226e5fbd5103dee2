"""The pages of blocks agree with the code: headings, options, defaults, metrics."""

from __future__ import annotations

import dataclasses
import inspect
import re
from datetime import timedelta
from pathlib import Path

import pytest
from blocks import ROOT

import layered_store
from layered_store import StateStore
from layered_store.metrics.catalogue import CATALOGUE
from layered_store.stack import kind_of

HEADINGS = [
    "What it does",
    "Usage",
    "Options",
    "Order",
    "Errors",
    "Metrics",
    "When not to use it",
]
PUBLIC = [getattr(layered_store, name) for name in layered_store.__all__]
CLASSES = {
    cls.__name__: cls
    for cls in PUBLIC
    if inspect.isclass(cls)
    and issubclass(cls, StateStore)
    and dataclasses.is_dataclass(cls)
    and "kind" in vars(cls)
}
CLASSES["SyncStore"] = layered_store.SyncStore
UNITS = {"s": 1, "min": 60, "h": 3600, "days": 86400}


def page_of(name: str) -> Path:
    """Return the page of a block, by its stem."""
    if name == "SyncStore":
        return ROOT / "docs" / "sync_store.md"
    cls = CLASSES[name]
    folder = "layers" if issubclass(cls, layered_store.Layer) else "stores"
    return ROOT / "docs" / folder / f"{kind_of(cls.__new__(cls))}.md"


def rows(page: Path) -> dict[str, str]:
    """Return the options table of a page: the default by the option's name."""
    text = page.read_text().split("\n## Options\n")[1].split("\n## ")[0]
    table = {}
    for line in text.splitlines():
        if line.startswith("| `"):
            names, default = [cell.strip() for cell in line.strip("|").split(" | ")[:2]]
            for name in re.findall(r"`(\w+)`", names):
                table[name] = default
    return table


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_the_page_has_the_headings_of_all(name: str) -> None:
    """Who knows one page knows them all."""
    text = page_of(name).read_text()
    assert text.startswith(f"# {name}\n")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == HEADINGS


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_the_page_lists_every_option_with_its_default(name: str) -> None:
    """The table holds the constructor's options, no other, and their defaults."""
    table = rows(page_of(name))
    parameters = inspect.signature(CLASSES[name]).parameters
    assert set(table) | {"inner"} == set(parameters) | {"inner"}
    for option, shown in table.items():
        default = parameters[option].default
        if default is inspect.Parameter.empty:
            assert shown == "must be given", option
        elif not shown.startswith(("the machine", "empty")):
            assert value_of(shown) == plain(default), f"{option}: {shown}"


def plain(default: object) -> object:
    if isinstance(default, timedelta):
        return default.total_seconds()
    return default.__name__ if inspect.isclass(default) else default


def value_of(shown: str) -> object:
    """Return what a cell stands for: a literal in backticks, or a number with its unit."""
    if match := re.fullmatch(r"`(.+)`", shown):
        names = {"None": None, "True": True, "False": False}
        text = match[1]
        if text in names:
            return names[text]
        return text.strip('"') if text.startswith('"') or text.isidentifier() else eval(text)  # noqa: S307
    if match := re.fullmatch(r"([\d .]+?)(?: (s|min|h|days))?", shown):
        return float(match[1].replace(" ", "")) * UNITS.get(match[2] or "s", 1)
    return shown


def test_pages_name_only_metrics_that_exist() -> None:
    """Every metric in README and docs is in the catalogue."""
    known = set()
    for metric in CATALOGUE.values():
        ends = {"counter": ["_total"], "histogram": ["", "_bucket", "_count", "_sum"]}
        known |= {metric.name + end for end in ends.get(metric.kind, [""])}
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        if "notes" in page.parts:
            continue
        for name in re.findall(r"\blayered_store_[a-z_]+\b", page.read_text()):
            if name.startswith(("layered_store_latest", "layered_store_history")):
                continue  # tables
            if name == "layered_store_":
                continue
            assert name in known, f"{page.relative_to(ROOT)}: {name}"


M = layered_store.MemoryStore
BUILT = [
    M(),
    layered_store.SQLStore("sqlite://", order="snapshot_time"),
    layered_store.RedisStore("redis://127.0.0.1:1/0"),
    layered_store.Bulkhead(M(), max_in_flight=1),
    layered_store.Cached(M()),
    layered_store.CircuitBreaker(M()),
    layered_store.Compressed(M()),
    layered_store.Encrypted(M(), keys=[bytes(32)]),
    layered_store.Fallback(M(), secondary=M()),
    layered_store.Prefixed(M(), prefix="p"),
    layered_store.Ramp(M(), alternative=M()),
    layered_store.ReadOnly(M()),
    layered_store.Retry(M()),
    layered_store.Shadow(M(), candidate=M()),
    layered_store.Timeout(M(), seconds=1),
    layered_store.WriteThrough(layered_store.RedisStore("redis://127.0.0.1:1/0"), origin=M()),
]


@pytest.mark.parametrize("block", BUILT, ids=lambda block: type(block).__name__)
def test_the_page_names_every_metric_of_its_block(block: StateStore) -> None:
    """The catalogue says of all other metrics that each is told of on a block's page."""
    told = page_of(type(block).__name__).read_text().split("\n## Metrics\n")[1].split("\n## ")[0]
    for sample in block.samples():
        assert CATALOGUE[sample.metric].series[0] in told


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.stem)
def test_tables_are_whole(page: Path) -> None:
    """Each begins with a head, has rows as wide as that, and tells of each name once."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        cells = [re.sub(r"`[^`]*`", "code", line).split("|") for line in table.splitlines()]
        assert re.fullmatch(r"[|: -]+", table.splitlines()[1]), table
        assert {len(row) for row in cells} == {len(cells[0])}, table
        names = re.findall(r"^\| ([`[].*?) \|", table, flags=re.MULTILINE)
        assert len(names) == len(set(names)), table
