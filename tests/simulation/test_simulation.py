"""Ten thousand runs over all shapes break no rule, and planted faults are found."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from itertools import chain

import pytest

from tests.simulation.__main__ import run_chunk
from tests.simulation.planted import FAULTS, NO_REPAIRS, SLOW_FILLS, Fault
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


@pytest.mark.parametrize("weather", [SLOW_FILLS, NO_REPAIRS], ids=["late fills", "no repairs"])
def test_what_some_faults_are_planted_with_breaks_no_rule(
    weather: Callable[[ExitStack], None],
) -> None:
    """It makes the missing step matter, and is no fault in itself."""
    with ExitStack() as stack:
        weather(stack)
        assert not [seed for seed in range(60) if run_seed(seed, SHAPES["without_l1"]).failure]
