"""Links to Redis, without a server."""

from __future__ import annotations

import asyncio
from typing import Any

from layered_store.clock import SYSTEM_CLOCK
from layered_store.errors import ClosedError
from layered_store.stores.redis.address import Address
from layered_store.stores.redis.failures import NotSentError
from layered_store.stores.redis.links import LaneLink, Limits
from layered_store.testing.clock import FakeClock


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


async def test_whoever_waits_for_a_connection_waits_in_order_and_in_time() -> None:
    """What was cancelled or waited too long is never sent; the rest keeps its order."""
    address = Address()
    clock = FakeClock()
    link = LaneLink(address, Limits(1.0, 1.0, 1, clock))
    gate = asyncio.Event()

    async def open_lane() -> Exception | None:
        await gate.wait()
        return None

    link._open_lane = open_lane  # type: ignore[method-assign]
    early = link.send_now(b"early")
    await clock.advance(1.5)
    gone, kept, read = link.send_now(b"gone"), link.send_now(b"kept"), link.read_now(b"key")
    gone.cancel()
    await clock.advance(0.6)
    failure = early.result()
    assert isinstance(failure, NotSentError)
    assert isinstance(failure.__cause__, TimeoutError)
    lane = Kept()
    link._lanes.append(lane)  # type: ignore[arg-type]
    gate.set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert lane.sent == [(b"kept", [kept]), (b"key", read)]
    link._lanes.clear()
    late = link.send_now(b"late")
    await link.aclose()
    assert isinstance(late.result().__cause__, ClosedError)
    assert isinstance(link.send_now(b"later").result().__cause__, ClosedError)


async def test_who_comes_late_into_an_attempt_has_the_next_one_too() -> None:
    """A server that came back during a hung attempt is not reported as hung to late comers."""
    clock = FakeClock()
    link = LaneLink(Address(), Limits(1.0, 1.0, 1, clock))
    attempts = 0

    async def open_lane() -> Exception | None:
        nonlocal attempts
        attempts += 1
        try:
            async with clock.timeout(1.0):
                await asyncio.Event().wait()
        except TimeoutError as exc:
            return exc
        return None

    link._open_lane = open_lane  # type: ignore[method-assign]
    first = link.send_now(b"first")
    await clock.advance(0.4)
    early = link.send_now(b"early")
    await clock.advance(0.4)
    late, later = link.send_now(b"late"), link.read_now(b"later")
    await clock.advance(0.3)
    assert attempts == 2
    for future in (first, early):
        assert isinstance(future.result().__cause__, TimeoutError)
    assert not late.done() and not later.done()
    await clock.advance(1.0)
    for future in (late, later):
        assert isinstance(future.result().__cause__, TimeoutError)
    assert attempts == 2
    await link.aclose()


class Kept:
    """A lane that keeps what it is given."""

    open = True
    pending = ()

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def put(self, futures: Any, data: bytes) -> None:
        self.sent.append((data, futures))

    def put_read(self, future: Any, key: bytes) -> None:
        self.sent.append((key, future))
