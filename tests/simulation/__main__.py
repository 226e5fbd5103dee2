"""``python -m tests.simulation``: run many seeds, or show one."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from tests.simulation.scenario import Report, run_seed
from tests.simulation.shapes import SHAPES

_CHUNK = 50


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1_000, help="how many seeds to run")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--shape", choices=SHAPES, help="one stack; default: by seed, all in turn")
    parser.add_argument("--jobs", type=int, default=2, help="processes to run them in")
    parser.add_argument("--replay", type=int, metavar="SEED", help="run one seed and print it all")
    parser.add_argument(
        "--plant", help="a fault of tests.simulation.planted to break the code with"
    )
    given = parser.parse_args()
    if given.replay is not None:
        return _replay(given.replay, given.shape, given.plant)
    return _run_all(given)


def _replay(seed: int, shape: str | None, plant: str | None) -> int:
    with _planted(plant):
        report = run_seed(seed, SHAPES[shape] if shape else None, traced=True)
    print(f"seed {seed}, shape {report.shape}")
    print("plan:", *(report.plan or ["nothing goes wrong"]), sep="\n  ")
    print("schedule:", *report.log, sep="\n")
    print("history:", *report.history, sep="\n  ")
    print(f"{report.calls} calls, {report.steps} steps: {report.failure or 'all rules held'}")
    return 1 if report.failure else 0


def _planted(plant: str | None):  # type: ignore[no-untyped-def]
    from contextlib import nullcontext

    if plant is None:
        return nullcontext()
    from tests.simulation.planted import FAULTS

    return FAULTS[plant].planted()


def run_chunk(seeds: range, shape: str | None, plant: str | None = None) -> list[Report]:
    """Run some seeds; reports of those that held are kept short."""
    reports = []
    with _planted(plant):
        for seed in seeds:
            report = run_seed(seed, SHAPES[shape] if shape else None)
            report.history = []
            reports.append(report)
    return reports


def _run_all(given: argparse.Namespace) -> int:
    began = time.monotonic()
    end = given.start + given.seeds
    chunks = [range(at, min(at + _CHUNK, end)) for at in range(given.start, end, _CHUNK)]
    done = calls = steps = 0
    shapes: Counter[str] = Counter()
    failures: list[Report] = []
    with ProcessPoolExecutor(given.jobs) as pool:
        futures = [pool.submit(run_chunk, chunk, given.shape, given.plant) for chunk in chunks]
        for future in futures:
            for report in future.result():
                done += 1
                calls += report.calls
                steps += report.steps
                shapes[report.shape] += 1
                if report.failure:
                    failures.append(report)
                    print(f"\nseed {report.seed} ({report.shape}): {report.failure}", flush=True)
            seconds = time.monotonic() - began
            print(
                f"\r{done} of {given.seeds} seeds, {calls} calls, {steps} steps, "
                f"{len(failures)} failed, {done / seconds:.1f} seeds/s",
                end="",
                file=sys.stderr,
                flush=True,
            )
    print(file=sys.stderr)
    rules = Counter(report.rule for report in failures)
    print(
        f"{done} seeds over {len(shapes)} shapes, {calls} calls, {steps} steps in "
        f"{time.monotonic() - began:.0f} s: {len(failures)} failed {dict(rules) or ''}"
    )
    if failures:
        first = failures[0]
        print(f"repeat one: python -m tests.simulation --replay {first.seed} --shape {first.shape}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
