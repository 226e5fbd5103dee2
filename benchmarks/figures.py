"""What a benchmark gives: figures with their targets, and tables of all contenders."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import median, quantiles
from typing import Any

__all__ = ["Figure", "Result", "Spread", "spread"]


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{number(self.middle)} ({number(self.low)}-{number(self.high)})"


def spread(values: list[float]) -> Spread:
    """Return the median and the quartiles of some measurements."""
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    low, _, high = quantiles(values, n=4, method="inclusive")
    return Spread(median(values), low, high)


def number(value: float) -> str:
    """Return a number with three digits that tell."""
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


@dataclass(frozen=True)
class Figure:
    """One measured value beside its target.

    Args:
        row: of the table of targets.
        what: what was measured.
        value: median and quartiles.
        unit: of the value; ``x`` is a ratio.
        at_most: the target, if the value should be small.
        at_least: the target, if it should be large.
    """

    row: int
    what: str
    value: Spread
    unit: str = "x"
    at_most: float | None = None
    at_least: float | None = None

    @property
    def target(self) -> str:
        if self.at_most is not None:
            return f"<= {number(self.at_most)}"
        return "" if self.at_least is None else f">= {number(self.at_least)}"

    @property
    def met(self) -> bool | None:
        if self.at_most is not None:
            return self.value.middle <= self.at_most
        return None if self.at_least is None else self.value.middle >= self.at_least


@dataclass
class Result:
    """Everything that one benchmark found.

    Args:
        title: what it is about.
        figures: values with targets.
        columns: heads of the table of contenders; the first is the contender.
        rows: the table.
        note: how it was measured.
    """

    title: str
    figures: list[Figure] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    rows: list[list[Any]] = field(default_factory=list)
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        found = asdict(self)
        for figure, plain in zip(self.figures, found["figures"], strict=True):
            plain["met"] = figure.met
        return found


def figures_table(results: list[Result]) -> str:
    """Return the table of targets in Markdown."""
    lines = ["| row | what | measured (quartiles) | target | |", "| --- | --- | --- | --- | --- |"]
    for result in results:
        for figure in result.figures:
            mark = {True: "met", False: "**missed**", None: ""}[figure.met]
            value = f"{figure.value}{'' if figure.unit == 'x' else ' ' + figure.unit}"
            cells = (figure.row, figure.what, value, figure.target, mark)
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def contenders_table(result: Result) -> str:
    """Return the table of one benchmark in Markdown."""
    lines = ["| " + " | ".join(result.columns) + " |", "|" + " --- |" * len(result.columns)]
    for row in result.rows:
        cells = (number(cell) if isinstance(cell, float) else str(cell) for cell in row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
