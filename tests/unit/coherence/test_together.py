"""Doing several things at once."""

from __future__ import annotations

import asyncio

import pytest

from layered_store.coherence.together import together


async def test_a_large_batch_runs_in_parts() -> None:
    """However many there are, the event loop holds a bounded number of tasks; all are done."""
    running = most = 0

    async def work(number: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return number

    assert await together(map(work, range(5_000))) == list(range(5_000))
    assert 256 <= most <= 2_048
    assert await together(map(work, ())) == []


async def test_a_failure_is_told_when_all_have_ended() -> None:
    """Also those of the parts behind it: each step was tried for each user."""
    ended = []

    async def work(number: int) -> None:
        await asyncio.sleep(0)
        ended.append(number)
        if number in (10, 4_000):
            raise ValueError(number)

    with pytest.raises(ValueError, match="^10$"):
        await together(map(work, range(5_000)))
    assert sorted(ended) == list(range(5_000))


async def test_what_is_left_need_not_be_tried_after_a_failure() -> None:
    """Of reads that failed those behind them would fail too, each part after a wait of its own."""
    ended = []

    async def work(number: int) -> None:
        await asyncio.sleep(0)
        ended.append(number)
        if number >= 10:
            raise ValueError(number)

    with pytest.raises(ValueError, match="^10$"):
        await together(map(work, range(5_000)), whatever_fails=False)
    assert 256 <= len(ended) <= 2_048
    assert await together(map(work, range(9)), whatever_fails=False) == [None] * 9
