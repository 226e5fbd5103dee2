"""The checker of the chaos runs finds each thing it is there to find, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from .checker import Stored, check


def upsert(call: int, state: int, start: float, end: float, outcome: str = "ok") -> list[list[Any]]:
    return [["U", call, "u", state, start], ["u", call, end, outcome]]


def stored_as(call: int, state: int, version: int) -> list[Any]:
    return ["v", call, "u", state, version]


def delete(call: int, version: int, start: float, end: float) -> list[list[Any]]:
    return [
        ["D", call, "u", start],
        ["E", call, "u"],
        ["e", call, "u", version],
        ["d", call, end, "ok"],
    ]


def read(start: float, state: int | None) -> list[Any]:
    return ["r", "u", start, start + 0.1, state, "ok"]


WRITTEN = [
    *upsert(1, 11, 1, 2), stored_as(1, 11, 101),
    *upsert(2, 12, 3, 4), stored_as(2, 12, 102),
]  # fmt: skip
ERASED = [*WRITTEN, *delete(3, 103, 5, 6)]
AT_END = Stored(102, 12, [12, 11])
GONE = Stored(103, None, [])

CASES = {
    "": ({1: [*WRITTEN, read(5, 12)], 2: [read(1.5, 11), read(1.6, 11), read(5, 12)]}, AT_END),
    "went backwards: own write": ({1: [*WRITTEN, read(4.5, 11)]}, AT_END),
    "went backwards: own read": ({1: WRITTEN, 2: [read(3.5, 12), read(4, 11)]}, AT_END),
    "absent though never deleted": ({1: [*WRITTEN, read(5, None)]}, AT_END),
    "too stale": ({1: WRITTEN, 2: [read(20, 11)]}, AT_END),
    "erased readable": ({1: ERASED, 2: [read(6.5, 12)]}, GONE),
    "a state from nowhere": ({1: WRITTEN, 2: [read(5, 99)]}, AT_END),
    "written twice": ({1: [*WRITTEN, stored_as(2, 12, 105)]}, Stored(105, 12, [12, 11])),
    "history doubled": ({1: WRITTEN}, Stored(102, 12, [12, 12, 11])),
    "lost": ({1: WRITTEN}, Stored(101, 11, [11])),
    "lost from the history": ({1: WRITTEN}, Stored(102, 12, [12])),
    "not converged": ({1: [*WRITTEN, ["f", "u", 11]]}, AT_END),
    "erased but in the history": ({1: ERASED}, Stored(103, None, [12])),
    "history out of order": ({1: [*WRITTEN, ["h", "u", 5, 6, [11, 12], "ok"]]}, AT_END),
    "dropped though no erasure": (
        {1: [*ERASED, *upsert(4, 13, 7, 8), ["e", 4, "u", 103]]},
        Stored(103, None, []),
    ),
}


@pytest.mark.parametrize("rule", CASES)
def test_each_rule_bites(rule: str) -> None:
    """A history that breaks one rule is told by its name; a good one is not."""
    histories, stored = CASES[rule]
    found = check(histories, {"u": stored}, bound=6.0).violations
    if not rule:
        assert found == []
    else:
        assert any(each.startswith(rule.partition(":")[0]) for each in found), found


def test_what_is_allowed() -> None:
    """A failed write may show or not, an erased user is absent, a cancelled delete may count."""
    ambiguous = [
        *upsert(5, 15, 7, 8, "StoreTimeoutError"), stored_as(0, 15, 104),
        ["D", 6, "u", 9], ["E", 6, "u"], ["d", 6, 10, "cancelled"],
    ]  # fmt: skip
    histories = {
        1: [*ERASED, read(6.5, None), *ambiguous, read(8.5, 15)],
        2: [read(4.5, 12), read(5.5, None), read(8.5, 15), read(12, None)],
    }
    report = check(histories, {"u": Stored(105, None, [])}, bound=6.0)
    assert report.violations == []
    assert report.figures["calls"] == 11
