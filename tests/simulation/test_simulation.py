"""Ten thousand runs over all shapes break no rule, and planted faults are found."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from itertools import chain

import pytest

from tests.simulation.__main__ import run_chunk
from tests.simulation.planted import (
    FAULTS,
    LATE_BURIALS,
    LATE_STAMPS,
    NO_REPAIRS,
    SILENT_WRITERS,
    SLOW_FILLS,
    VERSIONED_FILLS,
    Fault,
)
from tests.simulation.scenario import run_seed
from tests.simulation.shapes import SHAPES

SEEDS = int(os.environ.get("LAYERED_STORE_SIMULATION_SEEDS", "10000"))
CHUNK = 100
TESTED = [fault for fault in FAULTS.values() if fault.first is not None]


@pytest.mark.timeout(1500)
def test_no_rule_is_broken() -> None:
    """Whatever is delayed, dropped, killed or lost, in any order of the tasks."""
    with ProcessPoolExecutor(2) as pool:
        chunks = [
            pool.submit(run_chunk, range(at, min(at + CHUNK, SEEDS)), None)
            for at in range(0, SEEDS, CHUNK)
        ]
        reports = list(chain.from_iterable(chunk.result() for chunk in chunks))
    failed = [report for report in reports if report.failure]
    shown = "".join(
        f"\n{report.failure}\nrepeat it: python -m tests.simulation --replay {report.seed}"
        f" --shape {report.shape}"
        for report in failed[:3]
    )
    assert not failed, f"{len(failed)} of {len(reports)} runs broke a rule:{shown}"
    assert len(reports) == SEEDS
    assert len({report.shape for report in reports}) == min(SEEDS, len(SHAPES))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", TESTED, ids=lambda fault: fault.name)
def test_a_planted_fault_is_found(fault: Fault) -> None:
    """Within a thousand seeds, under a rule that it breaks; the one that showed it goes first."""
    with fault.planted():
        for seed in chain((fault.first or 0,), range(1_000)):
            report = run_seed(seed, SHAPES[fault.shape])
            if report.rule in fault.rules:
                return
    pytest.fail(f"{fault.name} was not found")


def test_each_step_of_the_protocol_is_among_them() -> None:
    """What a simulation has to find before its silence means anything."""
    assert {fault.name for fault in TESTED} >= {
        "no floor",
        "no token",
        "no version guard",
        "DEL instead of tombstone",
        "no stamp",
        "no lease",
        "no erasure wait",
        "L1 set before the record",
        "follower cancelled with leader",
        "repair silent",
        "repair anchored at now",
        "L1 kept after channel loss",
        "double history append",
        "stale served after erasure",
        "negative mark survives an upsert",
    }


@pytest.mark.parametrize(
    ("weather", "shape"),
    [
        pytest.param(SLOW_FILLS, "without_l1", id="late fills"),
        pytest.param(NO_REPAIRS, "without_l1", id="no repairs"),
        pytest.param(SILENT_WRITERS, "three_tiers", id="silent writers"),
        pytest.param(LATE_STAMPS, "without_l1", id="late stamps"),
        pytest.param(LATE_BURIALS, "without_l1", id="late burials"),
    ],
)
def test_what_some_faults_are_planted_with_breaks_no_rule(
    weather: Callable[[ExitStack], None], shape: str
) -> None:
    """It makes the missing step matter, and is no fault in itself."""
    with ExitStack() as stack:
        weather(stack)
        assert not [seed for seed in range(40) if run_seed(seed, SHAPES[shape]).failure]


def test_tombstones_alone_keep_the_erased_out() -> None:
    """Where fills look at versions only, and nothing is evicted: a DEL is then not enough."""
    with ExitStack() as stack:
        VERSIONED_FILLS(stack)
        for seed in range(60):
            report = run_seed(seed, SHAPES["without_l1"])
            assert report.rule != "erased", report.failure
