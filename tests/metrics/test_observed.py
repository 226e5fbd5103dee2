"""The example that draws itself: it runs, and its plots hold data when a browser renders them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 10
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1320,1200",
]
MEASURE = """
<script>
for (const line of document.querySelectorAll("polyline")) {
  const box = line.getBBox(), at = line.getBoundingClientRect();
  line.setAttribute("data-drawn", [line.points.numberOfItems, line.getTotalLength(), box.height,
    at.width, getComputedStyle(line).stroke].join("|"));
}
for (const bar of document.querySelectorAll("rect[data-state]"))
  bar.setAttribute("data-drawn", bar.getBoundingClientRect().width);
</script>
"""
PLOTS = {
    "hit-ratio": ["in process", "Redis"],
    "latency": ["p50", "p90", "p99"],
    "errors": ["in-process cache", "Redis", "database", "what callers see"],
    "pending-repairs": ["users behind in Redis"],
    "calls": ["delete", "get latest", "upsert latest"],
}


def browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    if os.environ.get("LAYERED_STORE_REQUIRE_SERVERS") == "1":
        pytest.fail("no chromium on the PATH", pytrace=False)
    pytest.skip("no chromium on the PATH")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a short run, with a redis-server of its own."""
    if shutil.which("redis-server") is None:
        pytest.skip("no redis-server on the PATH")
    path = tmp_path_factory.mktemp("observed") / "observed.html"
    done = subprocess.run(
        [
            *(sys.executable, "-W", "error", str(ROOT / "examples" / "observed.py")),
            *("--seconds", str(SECONDS), "--out", str(path)),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "never retrieved" not in done.stderr
    assert f"open {path}" in done.stdout
    return path


@pytest.fixture(scope="module")
def drawn(page: Path) -> str:
    """The page as the browser holds it, with what it measured of each line."""
    binary = browser()
    copy = page.with_name("measured.html")
    copy.write_text(page.read_text().replace("</body>", MEASURE + "</body>"))
    profile = page.with_name("profile")
    profile.mkdir()
    done = subprocess.run(
        [binary, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", copy.as_uri()],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def figure(dom: str, name: str) -> str:
    found = re.search(rf'<figure data-plot="{name}">.*?</figure>', dom, re.DOTALL)
    assert found is not None, name
    return found[0]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", PLOTS)
def test_the_lines_of_a_plot_are_drawn(drawn: str, name: str) -> None:
    """Each series is a line over the whole time; those that the outages move do move."""
    lines = re.findall(
        r'<polyline data-series="([^"]*)"[^>]*data-drawn="([^"]*)"', figure(drawn, name)
    )
    assert [series for series, _ in lines] == PLOTS[name]
    heights = []
    for series, measured in lines:
        points, length, height, width, stroke = measured.split("|")
        assert int(points) > SECONDS, series
        assert float(length) >= float(width) > 300, series
        assert stroke.startswith("rgb"), series
        heights.append(float(height))
    assert max(heights) > 50


@pytest.mark.timeout(240)
def test_breakers_and_health_are_drawn(drawn: str) -> None:
    """Four rows over the whole time, with both the good and the bad of it."""
    text = figure(drawn, "breakers")
    for row in ("breaker of Redis", "breaker of the database", "invalidation channel", "health"):
        bars = re.findall(
            rf'data-state="(\w+)"[^>]*data-drawn="([^"]*)"[^>]*><title>{row}[^<]*</title>', text
        )
        assert sum(float(width) for _, width in bars) > 300
        assert {"good", "bad"} <= {state for state, _ in bars} or row == "breaker of Redis"


@pytest.mark.timeout(240)
def test_the_page_stands_alone_and_tells_of_no_user(page: Path) -> None:
    """Nothing is loaded from elsewhere; both outages are marked on each plot."""
    text = page.read_text()
    assert not re.search(r"(src|href)=|@import|url\(", text)
    assert text.count("<title>Redis away</title>") == text.count("<figure") == 6
    assert not re.search(r"\bu-\d+\b", text)


def test_the_picture_of_the_readme_is_small() -> None:
    """It is made of this page, by hand, when the page changes."""
    picture = ROOT / "docs" / "images" / "observed.png"
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size < 200_000


def test_wrong_arguments_are_refused_by_name() -> None:
    """Before anything is started."""
    for arguments, name in ((["--seconds", "1"], "--seconds"), (["--redis", "x"], "--redis")):
        done = subprocess.run(
            [sys.executable, str(ROOT / "examples" / "observed.py"), *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 2
        assert name in done.stderr
