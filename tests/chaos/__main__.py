"""``python -m tests.chaos --operations 100000``: the long form of the chaos test."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time

from .planted import PLANTED
from .run import SQL, Plan, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--operations", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=5, help="processes at a time")
    parser.add_argument("--clients", type=int, default=8, help="concurrent callers in each")
    parser.add_argument("--users", type=int, default=200)
    parser.add_argument("--think", type=float, default=0.015, help="mean pause of a caller, s")
    parser.add_argument("--seconds", type=float, default=1_200.0, help="at most")
    parser.add_argument("--sql", choices=tuple(SQL), default="postgres")
    parser.add_argument("--redis", choices=("single", "cluster", "sentinel"), default="single")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100_000)
    parser.add_argument("--fault", action="append", dest="faults", help="only these faults")
    parser.add_argument("--plant", choices=tuple(PLANTED), default="", help="what to break")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    plan = Plan(**vars(options), say=lambda text: print(text, flush=True))
    report = asyncio.run(run(plan))
    for name, value in report.figures.items():
        print(f"{name}: {value}")
    for violation in report.violations[:50]:
        print(f"VIOLATION {violation}")
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
