"""Links to Redis, without a server."""

from __future__ import annotations

import asyncio
from typing import Any

from layered_store.clock import SYSTEM_CLOCK
from layered_store.stores.redis.links import LaneLink, Limits


async def test_a_lane_that_is_lost_at_once_does_not_stop_the_loop() -> None:
    """Who comes right after a connection was made, and finds it gone, has another one made."""
    address: Any = None
    link = LaneLink(address, Limits(1.0, 1.0, 1, SYSTEM_CLOCK))
    refused = OSError("refused")
    answers = [None, refused]

    async def open_lane() -> Exception | None:
        return answers.pop(0)

    link._open_lane = open_lane  # type: ignore[method-assign]
    link._connect()
    # Begins in the same turn of the loop, after the connection was made, before anybody is told.
    found = await asyncio.create_task(link.call(("PING",)))
    assert isinstance(found, Exception) and found.__cause__ is refused
    assert not answers
