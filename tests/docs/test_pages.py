"""The code of README, CONTRIBUTING and docs/ runs, on real servers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from blocks import ROOT, blocks, pages

REDIS = "redis://127.0.0.1:6379/0"
POSTGRES = "postgresql+asyncpg://app@127.0.0.1/app"
MYSQL = "mysql+aiomysql://app@127.0.0.1/app"
"""What pages write where a reader has servers of their own."""

STACK = """
[store]
use = "sql"
url = "sqlite+aiosqlite:///states.db"
layers = [{ use = "metrics", name = "user_state" }, { use = "cached", ttl = "60s" }]
"""
"""The ``stack.toml`` of a page that has none of its own."""

PAGES = [page for page in pages() if any(block.comment != "not run" for block in blocks(page))]


def names(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_every_block_of_the_page_runs(
    page: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Every block runs to its end, in the order of the page, and prints what the page shows."""
    text = page.read_text()
    placeholders = {"127.0.0.1:8080": f"127.0.0.1:{free_port()}"}
    environment = dict(os.environ)
    if REDIS in text or "REDIS_URL" in text:
        environment["REDIS_URL"] = placeholders[REDIS] = request.getfixturevalue("redis_url")
    if POSTGRES in text:
        placeholders[POSTGRES] = request.getfixturevalue("postgres_url")
    if MYSQL in text:
        placeholders[MYSQL] = request.getfixturevalue("mysql_url")
    placeholders["8080"] = placeholders["127.0.0.1:8080"].rpartition(":")[2]
    environment["DATABASE_URL"] = "sqlite+aiosqlite:///database.db"
    environment["PATH"] = f"{sysconfig.get_path('scripts')}:{environment['PATH']}"
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    )
    (tmp_path / "stack.toml").write_text(STACK)
    done = subprocess.run(  # noqa: S603
        [
            sys.executable,
            str(Path(__file__).with_name("run_page.py")),
            page,
            json.dumps(placeholders),
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-1000:]


@pytest.mark.parametrize("page", pages(), ids=names)
def test_what_does_not_run_says_why(page: Path) -> None:
    """A block that is not run has a reason of several words, and few are."""
    skipped = [block for block in blocks(page) if block.comment == "not run"]
    for block in skipped:
        assert block.text, f"{page.name}:{block.line}"
        assert len(block.text.split()) >= 3, f"{page.name}:{block.line}: {block.text}"
    assert len(skipped) <= 3


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
