"""The checkers see what they are there for, and nothing where nothing is."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest

from tests.simulation.checks import Violation, check_fleet, check_register
from tests.simulation.history import Call
from tests.simulation.scenario import _World, run_seed
from tests.simulation.shapes import SHAPES
from tests.simulation.sql_model import Commit


def call(
    kind: str, value: int | None, began: int, ended: int, process: str = "P0", outcome: str = "ok"
) -> Call:
    return Call(process, kind, "ann", value, began, began / 10, ended, ended / 10, outcome)


def commit(order: int, value: int | None, by: int) -> Commit:
    return Commit(order, order / 10, order, value, by)


def test_a_register_may_overlap_but_not_go_back() -> None:
    """A read beside a write may see either state; after it, only the new one."""
    write = call("upsert", 1, 2, 6)
    check_register([write, call("read", None, 3, 4)])
    check_register([write, call("read", 1, 3, 4)])
    with pytest.raises(Violation, match="register"):
        check_register([write, call("read", None, 7, 8)])
    with pytest.raises(Violation, match="register"):
        check_register([write, call("read", 1, 3, 4), call("read", None, 5, 7)])


def test_a_write_beside_an_erasure_that_never_returned_may_be_dropped() -> None:
    """The deleter died after its commit: it is under way for ever. One that returned is not."""
    died = Call("P0", "delete", "ann", None, 2, 0.2)
    write = call("upsert", 1, 5, 8)
    check_fleet([died, write], [commit(3, None, 2)], 2.0)
    with pytest.raises(Violation, match="lost"):
        check_fleet([call("delete", None, 2, 4), write], [commit(3, None, 2)], 2.0)


def test_a_write_that_failed_may_happen_later_or_never() -> None:
    """Its outcome is unknown, so both are explained; to be undone is not."""
    failed = call("upsert", 1, 2, 3, outcome="StoreTimeoutError")
    check_register([failed, call("read", None, 4, 5), call("read", 1, 6, 7)])
    check_register([failed, call("read", None, 4, 5)])
    with pytest.raises(Violation, match="register"):
        check_register([failed, call("read", 1, 4, 5), call("read", None, 6, 7)])


@pytest.mark.parametrize(
    ("rule", "calls", "commits"),
    [
        (
            "erased",
            [call("delete", None, 2, 4), call("read", 1, 5, 6, "P1")],
            [commit(1, 1, 0), commit(3, None, 2)],
        ),
        (
            "own writes",
            [call("upsert", 2, 2, 4), call("read", 1, 5, 6)],
            [commit(1, 1, 0), commit(3, 2, 2)],
        ),
        (
            "monotonic",
            [call("read", 2, 4, 5), call("read", 1, 6, 7)],
            [commit(1, 1, 0), commit(3, 2, 2)],
        ),
        (
            "stale",
            [call("read", 1, 60, 61)],
            [commit(1, 1, 0), commit(3, 2, 2)],
        ),
        ("lost", [call("upsert", 9, 2, 4)], [commit(1, 1, 0)]),
        ("invented", [call("read", 7, 2, 3)], [commit(1, 1, 0)]),
        ("doubled", [], [commit(1, 1, 0), commit(3, 1, 0)]),
    ],
)
def test_each_rule_of_the_fleet_bites(rule: str, calls: list[Call], commits: list[Commit]) -> None:
    """What breaks a rule is found under its name."""
    writes = [call("upsert", each.value, 0, 0, "W", "lost reply") for each in commits if each.value]
    with pytest.raises(Violation) as caught:
        check_fleet([*writes, *calls], commits, bound=2.0)
    assert caught.value.rule == rule


def test_a_read_in_time_is_no_violation() -> None:
    """Another process may show what was replaced less than the bound ago."""
    commits = [commit(1, 1, 0), commit(3, 2, 0)]
    writes = [call("upsert", each, 0, 0, "W", "lost reply") for each in (1, 2)]
    check_fleet([*writes, call("read", 1, 4, 5), call("read", 2, 6, 7)], commits, bound=2.0)


def test_a_write_that_began_before_an_erasure_outlives_it_by_a_documented_limit_only() -> None:
    """Its process heard of the database first after somebody had set the clock forward."""
    calls = [call("upsert", 1, 2, 9), call("delete", None, 3, 5, "P1")]
    commits = [commit(4, None, 3), commit(6, 1, 2)]
    with pytest.raises(Violation, match="late"):
        check_fleet(calls, commits, 2.0)
    check_fleet(calls, commits, 2.0, may_be_late={1})


@pytest.mark.parametrize(
    ("at", "step", "heard", "excused"),
    [
        (0.45, 20.0, 0.6, True),
        (0.45, 0.1, 0.6, False),  # by less than what lies between the write and the erasure
        (0.45, -20.0, 0.6, False),  # set back
        (0.35, 20.0, 0.6, False),  # before the erasure
        (0.45, 20.0, 0.42, False),  # after its process had heard of the database
    ],
)
def test_a_write_outlives_an_erasure_only_where_the_clock_was_set_before_its_process_heard(
    at: float, step: float, heard: float, excused: bool
) -> None:
    """It began at 0.2, the erasure was committed at 0.4."""
    world = SimpleNamespace(sql={"P0": SimpleNamespace(heard=heard)}, sql_sets=[(at, step)])
    commits = [commit(4, None, 3), commit(6, 1, 2)]
    late = call("upsert", 1, 2, 9)
    assert _World.could_not_know(world, late, commits) is excused  # type: ignore[arg-type]


def test_nothing_of_a_run_is_left_half_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this one a process is killed that is dead already; no other takes its place unseen."""
    said: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", lambda about: said.append(about.exc_value))
    report = run_seed(6109, SHAPES["cluster"])
    kills = [event for event in report.plan if event.kind == "process killed"]
    assert len(kills) == 2
    assert kills[1].at < kills[0].at + kills[0].seconds
    run_seed(2, SHAPES["cluster"])  # what is left of a run lives until the next one
    gc.collect()
    assert said == []


@pytest.mark.parametrize("shape", ["three_tiers", "memory"])
def test_a_seed_is_the_same_run_each_time(shape: str) -> None:
    """So a failure can be looked at again."""
    first, second = (run_seed(7, SHAPES[shape], traced=True) for _ in range(2))
    assert first.failure is None
    assert first.calls > 10
    assert (first.steps, first.log) == (second.steps, second.log)
    assert list(map(str, first.history)) == list(map(str, second.history))
