"""Look at the installed wheel, in an environment without extras: ``python -I wheel.py``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

CHECK = """
import sys
import layered_store
assert not {"redis", "sqlalchemy", "prometheus_client"} & set(sys.modules), sorted(sys.modules)
for name in layered_store.__all__:
    getattr(layered_store, name)
"""


def main() -> None:
    """Exit with a message when the wheel is not what it should be."""
    files = {str(file) for file in importlib.metadata.files("layered-store") or ()}
    assert "layered_store/py.typed" in files, "the wheel has no py.typed"
    strangers = [name for name in files if not name.startswith(("layered_store", "../"))]
    assert not strangers, f"the wheel holds {strangers}"
    here = importlib.util.find_spec("layered_store")
    assert here and here.origin, "not installed"
    assert "site-packages" in Path(here.origin).parts, f"imported from {here.origin}"
    for extra in ("click", "asyncpg", "starlette", "opentelemetry"):
        assert importlib.util.find_spec(extra) is None, f"{extra} came without its extra"
    subprocess.run([sys.executable, "-I", "-c", CHECK], check=True)  # noqa: S603
    shown = subprocess.run(  # noqa: S603
        [sys.executable, "-I", "-m", "layered_store", "show"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode != 0
    assert "layered-store[cli]" in shown.stderr, shown.stderr
    assert "Traceback" not in shown.stderr, shown.stderr
    print(f"wheel of {len(files)} files: py.typed, imports without extras, says what is missing")


if __name__ == "__main__":
    main()
