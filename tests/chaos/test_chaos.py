"""The short form of the chaos run; the long one is ``python -m tests.chaos``."""

from __future__ import annotations

import os

import pytest
from servers import ServerMissingError

from .run import Plan, run


@pytest.mark.timeout(300)
@pytest.mark.parametrize("sql", ["postgres", "sqlite"])
async def test_no_fault_breaks_a_promise(sql: str) -> None:
    """Under every kind of fault no acknowledged write is lost or doubled, nobody reads an erased
    user, no process goes backwards or shows what is older than the bound, and all agree at last.
    """
    plan = Plan(operations=8_000, seconds=25, workers=4, sql=sql, seed=11, say=print)
    try:
        report = await run(plan)
    except ServerMissingError as exc:
        if os.environ.get("LAYERED_STORE_REQUIRE_SERVERS") == "1":
            raise
        pytest.skip(str(exc))
    print(report.figures)
    assert report.violations == []
    assert report.figures["calls"] > 100
    assert sum(report.figures["faults"].values()) >= 10
