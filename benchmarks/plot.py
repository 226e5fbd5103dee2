"""The plot of the README: each figure beside its target, as SVG written by hand."""

from __future__ import annotations

from html import escape
from math import log10
from typing import TYPE_CHECKING

from benchmarks.figures import number

if TYPE_CHECKING:
    from benchmarks.figures import Figure, Result

__all__ = ["draw"]

_LINE, _LEFT, _WIDTH, _RIGHT = 22, 400, 420, 160
_GOOD, _BAD, _INK, _PALE = "#2a7f62", "#b5542c", "#333", "#ddd"


def draw(results: list[Result]) -> str:
    """Return a plot of how much better than its target each figure is.

    The bar is the factor by which the target is surpassed, on a scale of logarithms: at the line
    in the middle it is just met.
    """
    shown = [
        (figure, _surplus(figure))
        for result in results
        for figure in result.figures
        if (figure.at_most or figure.at_least) and figure.value.middle > 0
    ]
    height = 60 + _LINE * len(shown)
    width = _LEFT + _WIDTH + _RIGHT
    middle = _LEFT + _WIDTH / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        f' font-family="sans-serif" font-size="12" fill="{_INK}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{middle}" y="18" text-anchor="middle">better than its target,'
        " times (quartiles)</text>",
    ]
    for factor in (0.1, 0.5, 1, 2, 10):
        x = middle + _place(factor)
        parts.append(f'<path d="M{x:.0f} 40V{height - 12}" stroke="{_PALE}"/>')
        parts.append(f'<text x="{x:.0f}" y="34" text-anchor="middle">{factor:g}</text>')
    for index, (figure, surplus) in enumerate(shown):
        y = 44 + index * _LINE
        color = _GOOD if figure.met else _BAD
        end = middle + _place(surplus)
        parts.append(
            f'<rect x="{min(middle, end):.1f}" y="{y}" width="{abs(end - middle) or 1:.1f}"'
            f' height="{_LINE - 8}" fill="{color}"/>'
        )
        low, high = sorted(_place(each) for each in _quartiles(figure))
        parts.append(
            f'<path d="M{middle + low:.1f} {y + 7}H{middle + high:.1f}" stroke="{_INK}"/>'
        )
        text = escape(f"{figure.row}  {figure.what}")
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 12}" text-anchor="end">{text}</text>')
        unit = "" if figure.unit == "x" else f" {figure.unit}"
        value = escape(f"{number(figure.value.middle)}{unit} ({figure.target})")
        parts.append(f'<text x="{_LEFT + _WIDTH + 6}" y="{y + 12}">{value}</text>')
    return "\n".join(parts) + "\n</svg>\n"


def _surplus(figure: Figure) -> float:
    return _against(figure, figure.value.middle)


def _quartiles(figure: Figure) -> list[float]:
    return [_against(figure, value) for value in (figure.value.low, figure.value.high)]


def _against(figure: Figure, value: float) -> float:
    value = max(value, 1e-9)
    if figure.at_most is not None:
        return figure.at_most / value
    assert figure.at_least is not None
    return value / figure.at_least


def _place(factor: float) -> float:
    """Return how far from the middle a factor stands; a decade is half of the plot."""
    reach = _WIDTH / 2
    return max(-reach, min(reach, log10(max(factor, 1e-9)) * reach))
