"""The worked example of an application's test suite passes as a user runs it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from blocks import ROOT

EXAMPLE = ROOT / "examples" / "testing_an_app"


def test_testing_an_app(tmp_path: Path) -> None:
    """app.py and stack.toml pass test_app.py in a folder of their own, and nothing sleeps."""
    folder = shutil.copytree(EXAMPLE, tmp_path / "project")
    kept = {key: value for key, value in os.environ.items() if not key.endswith("_URL")}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider"],
        cwd=folder,
        env=kept | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "6 passed" in done.stdout
    assert "sleep" not in (folder / "test_app.py").read_text()
