"""Panels and alerts on a real Prometheus, over a stack whose tiers go away and come back."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from committed_dashboards import RULES, expressions
from outage_scenario import begin
from prometheus_client import generate_latest
from servers import Server

ALERTS = set(re.findall(r"alert: (\S+)", RULES[1].read_text()))
RECORDED = re.findall(r"record: (\S+)", RULES[0].read_text())

REDIS_OUTAGE = {
    "LayeredStoreBreakerOpen",
    "LayeredStoreCallsFail",  # of deletes
    "LayeredStoreChannelLost",
    "LayeredStoreErasureIncomplete",
    "LayeredStoreHitRatioCollapsed",
    "LayeredStorePendingRepairsGrowing",
}
DATABASE_OUTAGE = {
    "LayeredStoreCallsFail",
    "LayeredStoreOriginUnhealthy",
    "LayeredStoreRetryStorm",
    "LayeredStoreSlow",
}

ONLY_IN_AN_OUTAGE = {"Retries"}
"""Panels whose series appear with the first failure."""


@pytest.mark.timeout(240)
async def test_every_panel_answers_and_every_alert_fires_in_its_scenario(
    redis_server: Callable[..., Server],
    prometheus_server: Callable[[Path], Server],
    sqlite_url: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Healthy: all panels, no alert. Redis killed, then the database hung: each its alerts."""
    assert REDIS_OUTAGE | DATABASE_OUTAGE == ALERTS
    folder = tmp_path_factory.mktemp("prometheus")
    folder.chmod(0o755)
    async with AsyncExitStack() as stack:
        scene = await begin(stack, redis_server(), sqlite_url, folder, prometheus_server)
        prometheus = scene.prometheus

        # Healthy.
        await asyncio.sleep(5)
        await scene.silent()
        assert await scene.fired(seconds=6) == set()
        shown = await prometheus.answering()
        quiet = {place for place in expressions() if place not in shown}
        assert {title for _, title, _ in quiet} <= ONLY_IN_AN_OUTAGE
        for name in RECORDED:
            if "retries" not in name:
                assert await prometheus.values(name), name
        fine = await prometheus.values("layered_store:operations:failure_ratio_rate5m")
        shares = {each["metric"]["stack"]: float(each["value"][1]) for each in fine}
        assert shares.pop("rest") == 1.0  # it is read-only, and written to
        assert set(shares.values()) == {0.0}
        rules = (await prometheus.ask("rules"))["groups"]
        assert all(rule["health"] == "ok" for group in rules for rule in group["rules"])

        # The cache tier is killed: the system of record carries on.
        scene.redis.kill()
        firing = await scene.firing(*REDIS_OUTAGE)
        assert firing == REDIS_OUTAGE
        shown |= await prometheus.answering()

        # It comes back and is repaired: all alerts end.
        scene.load.deletes = False  # an erasure may wait for a second after the restart
        scene.redis.start()
        await scene.silent()

        # The database hangs, and the primary of the other stack fails.
        scene.load.database.mode = "hangs"
        scene.load.primary.mode = "fails"
        firing = await scene.firing(*DATABASE_OUTAGE)
        assert firing & (ALERTS - DATABASE_OUTAGE - {"LayeredStoreHitRatioCollapsed"}) == set()
        shown |= await prometheus.answering()
        for name in RECORDED:
            assert await prometheus.values(name), name
        fallen = await prometheus.values('rate(layered_store_fallbacks_total{stack="replica"}[2s])')
        assert max(float(each["value"][1]) for each in fallen) > 0

        scene.load.database.mode = scene.load.primary.mode = "works"
        await scene.silent()
        assert shown == set(expressions())

        # What it scraped is well formed.
        if shutil.which("promtool"):
            done = await asyncio.to_thread(
                subprocess.run,
                ["promtool", "check", "metrics"],
                input=generate_latest(scene.load.registry),
                capture_output=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr.decode()
