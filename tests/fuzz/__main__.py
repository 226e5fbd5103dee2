"""``python -m tests.fuzz TARGET``: fuzz one target, guided by the branches it reaches.

Needs ``pip install atheris`` (Linux; no wheels for every Python). A finding is written to a file
whose bytes fail when given to the target again, and ends the run with code 77.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import atheris

with atheris.instrument_imports(include=["layered_store"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--runs", type=int, default=-1, help="inputs to try; default: no end")
    parser.add_argument("--seed", type=int, default=1, help="of the mutations")
    parser.add_argument("--findings", type=Path, default=Path(), help="folder for what fails")
    given = parser.parse_args()
    target = TARGETS[given.target]
    with TemporaryDirectory() as corpus:
        for number, sample in enumerate(target.samples):
            Path(corpus, str(number)).write_bytes(sample)
        atheris.Setup(
            [
                sys.argv[0],
                f"-runs={given.runs}",
                f"-seed={given.seed}",
                f"-artifact_prefix={given.findings}/",
                "-max_len=2048",
                corpus,
            ],
            target.run,
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main()
