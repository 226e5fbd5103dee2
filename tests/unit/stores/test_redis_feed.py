"""A feed over a pair of sockets whose other end is in the test's hand."""

from __future__ import annotations

import asyncio

import pytest
from redis_peer import Peer, peer

from layered_store.stores.redis.failures import ConnectionLostError, GarbageError, ReplyError
from layered_store.stores.redis.feed import Feed


async def heard(feed: Feed, count: int) -> list[object]:
    """Return so many things that the server says."""
    said: list[object] = []
    while len(said) < count:
        said += await feed.next(1.0)
    return said


async def test_all_that_was_said_comes_in_its_order_whole_and_once() -> None:
    """Also what the driver had read before, and what comes in pieces."""
    async with peer() as other:
        other.connection._reader._buffer += b":1\r\n$3\r\nt"
        feed = other.feed()
        assert await feed.next(1.0) == [1]
        await other.say(b"wo\r\n:3\r\n:4")
        assert await heard(feed, 2) == [b"two", 3]
        await other.say(b"\r\n")
        assert await heard(feed, 1) == [4]
        feed.send(b"PING\r\n")
        assert await other.hear(6) == b"PING\r\n"
        feed.close()


async def test_silence_is_told_when_its_time_is_over_and_the_feed_goes_on() -> None:
    """By the clock that was given."""
    async with peer() as other:
        feed = other.feed()
        waiting = asyncio.ensure_future(feed.next(2.0))
        await asyncio.sleep(0)
        await other.clock.advance(1.9)
        assert not waiting.done()
        await other.clock.advance(0.2)
        with pytest.raises(TimeoutError):
            await waiting
        await other.say(b":1\r\n")
        assert await feed.next(2.0) == [1]
        feed.close()


async def test_a_process_that_stood_still_hears_on() -> None:
    """Nor did it ask anything meanwhile: that a server was silent then tells nothing."""
    async with peer() as other:
        feed = other.feed()
        waiting = asyncio.ensure_future(feed.next(2.0))
        await asyncio.sleep(0)
        other.clock.set(other.clock.monotonic() + 10.0)
        await other.clock.advance(0)
        assert not waiting.done()
        await other.say(b":1\r\n")
        assert await waiting == [1]
        feed.close()


async def hang_up(other: Peer) -> None:
    other.end.close()


@pytest.mark.parametrize(
    ("end", "error"),
    [
        (hang_up, ConnectionLostError),
        (lambda other: other.say(b"SSH-2.0\r\n"), GarbageError),
        (lambda other: other.say(b"-NOPERM this user has no permissions\r\n"), ReplyError),
    ],
    ids=["hung up", "no Redis", "refused"],
)
async def test_the_end_is_told_to_who_waits(end: object, error: type[Exception]) -> None:
    """Nobody waits on a connection that says no more."""
    async with peer() as other:
        feed = other.feed()
        waiting = asyncio.ensure_future(feed.next(5.0))
        await asyncio.sleep(0)
        await end(other)  # type: ignore[operator]
        with pytest.raises(error):
            await waiting
        feed.close()


async def test_what_was_said_before_the_end_is_still_heard() -> None:
    """The last messages count like all others."""
    async with peer() as other:
        feed = other.feed()
        await other.say(b":1\r\n:2\r\n")
        assert await heard(feed, 1) == [1, 2]
        await other.say(b":3\r\n")
        await hang_up(other)
        assert await heard(feed, 1) == [3]
        with pytest.raises(ConnectionLostError):
            await feed.next(1.0)


async def test_a_connection_that_was_lost_meanwhile_says_so_at_once() -> None:
    async with peer() as other:
        other.connection._writer.close()
        with pytest.raises(ConnectionLostError):
            await other.feed().next(1.0)
