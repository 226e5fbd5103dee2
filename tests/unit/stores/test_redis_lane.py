"""A lane over a pair of sockets whose other end is in the test's hand."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from redis_peer import peer

from layered_store.stores.redis.address import Address
from layered_store.stores.redis.failures import (
    ConnectionLostError,
    GarbageError,
    NotSentError,
    ReplyError,
)
from layered_store.stores.redis.lane import Lane
from layered_store.stores.redis.links import LaneLink, Limits
from layered_store.testing.clock import settle

PING = b"*1\r\n$4\r\nPING\r\n"
PUSH = b">2\r\n$10\r\ninvalidate\r\n$3\r\nkey\r\n"


async def test_a_message_between_replies_is_no_reply() -> None:
    """What the server pushes on its own, also before the lane began, answers nobody."""
    async with peer() as other:
        other.connection._reader._buffer += PUSH
        lane = other.lane()
        assert lane.open
        call = lane.send(PING)
        await other.hear(len(PING))
        await other.say(PUSH + b"+PONG\r\n")
        assert await call == b"PONG"
        await lane.aclose()


async def test_what_came_before_any_question_ends_the_lane() -> None:
    """A reply that nobody asked for would answer the first caller with another's data."""
    async with peer() as other:
        other.connection._reader._buffer += b"$5\r\nother\r\n"
        lane = other.lane()
        assert not lane.open
        assert isinstance(await lane.send(PING), NotSentError)
        assert other.changes == [False]


async def test_a_connection_that_was_lost_meanwhile_is_no_lane() -> None:
    """Calls that came to it were not sent, and say so."""
    async with peer() as other:
        other.connection._writer.close()
        lane = other.lane()
        assert not lane.open
        results = await asyncio.gather(lane.send(PING), lane.read(b"key"))
        for result in results:
            assert isinstance(result, NotSentError)
            assert isinstance(result.__cause__, ConnectionLostError)


async def test_reads_of_the_turn_in_which_a_lane_ends_were_not_sent() -> None:
    """What left before has an unknown end; a cancelled reader is left alone."""
    async with peer() as other:
        lane = other.lane()
        sent = lane.send(PING)
        await other.hear(len(PING))
        read, gone = lane.read(b"a"), lane.read(b"b")
        several = [asyncio.get_running_loop().create_future() for _ in range(2)]
        lane.put(several, PING + PING)
        gone.cancel()
        lane.close()
        assert isinstance(sent.result(), ConnectionLostError)
        for unsent in (read, *several):
            assert isinstance(unsent.result(), NotSentError)
        assert gone.cancelled()


async def test_a_connection_that_is_reset_fails_its_calls_at_once() -> None:
    """No end of the stream comes before it; nobody waits for the time limit."""
    async with peer() as other:
        lane = other.lane()
        call = lane.send(PING)
        await settle()
        other.end.close()  # with what was sent unread in it
        async with asyncio.timeout(5):
            result = await call
        assert isinstance(result, ConnectionResetError | ConnectionLostError)
        assert not lane.open
        assert other.changes == [False]


async def test_many_reads_of_a_turn_do_not_all_wait_for_its_end() -> None:
    """A server that has nothing else to do gets the first ones at once, and the others as one."""
    async with peer() as other:
        lane = other.lane()
        keys = [b"k%02d" % number for number in range(100)]
        reads = [lane.read(key) for key in keys]
        assert len(lane.pending) == 1, "the turn is not over"
        first, rest = keys[:32], keys[32:]
        for some in (first, rest):
            command = b"*%d\r\n$4\r\nMGET\r\n" % (len(some) + 1)
            command += b"".join(b"$3\r\n%b\r\n" % key for key in some)
            assert await other.hear(len(command)) == command
            await other.say(b"*%d\r\n" % len(some) + b"".join(b"+%b\r\n" % key for key in some))
        assert await asyncio.gather(*reads) == keys
        call = lane.send(PING)
        await asyncio.sleep(0)
        more = [lane.read(key) for key in keys]
        assert len(lane.pending) == 1, "it is busy: more reads in one command are cheaper"
        await asyncio.sleep(0)
        assert len(lane.pending) == 2
        lane.close()
        await asyncio.gather(call, *more)


async def test_a_long_command_leaves_at_once_when_the_server_is_idle() -> None:
    """It is read there while the rest of the turn is still running; later ones go together."""
    async with peer() as other:
        lane = other.lane()
        writes: list[bytes] = []
        transport = lane._transport
        lane._transport = SimpleNamespace(write=writes.append)  # type: ignore[assignment]
        long = b"*2\r\n$3\r\nGET\r\n$1100\r\n" + b"k" * 1100 + b"\r\n"
        calls = [lane.send(command) for command in (long, PING, long)]
        assert writes == [long]
        await asyncio.sleep(0)
        assert writes == [long, PING + long]
        lane._transport = transport
        lane.close()
        await asyncio.gather(*calls)


async def test_a_full_socket_holds_back_and_keeps_the_order() -> None:
    """Calls made while the server takes no more leave once it does, in their order."""
    async with peer() as other:
        lane = other.lane()
        big = b"x" * (8 << 20)
        first = lane.send(big)
        await asyncio.sleep(0)
        held = [lane.send(b"second"), lane.read(b"third")]
        await asyncio.sleep(0)
        assert not first.done()
        rest = b"second*2\r\n$3\r\nGET\r\n$5\r\nthird\r\n"
        assert (await other.hear(len(big) + len(rest))).endswith(rest)
        await other.say(b"+1\r\n+2\r\n$1\r\n3\r\n")
        assert await asyncio.gather(first, *held) == [b"1", b"2", b"3"]
        await lane.aclose()


async def test_what_a_full_socket_held_back_was_not_sent() -> None:
    """When the connection is lost then, only what had begun to leave has an unknown end."""
    async with peer() as other:
        lane = other.lane()
        first = lane.send(b"x" * (8 << 20))
        await asyncio.sleep(0)
        held = [lane.send(PING), lane.read(b"key")]
        await asyncio.sleep(0)
        lane.close()
        assert isinstance(await first, ConnectionLostError)
        for call in held:
            assert isinstance(await call, NotSentError)


async def test_a_socket_that_empties_with_nothing_held_back_sends_nothing() -> None:
    """And the lane goes on to write at once."""
    async with peer() as other:
        lane = other.lane()
        big = b"x" * (8 << 20)
        first = lane.send(big)
        await other.hear(len(big))
        await asyncio.sleep(0)
        second = lane.send(PING)
        assert await other.hear(len(PING)) == PING
        await other.say(b"+1\r\n+2\r\n")
        assert await asyncio.gather(first, second) == [b"1", b"2"]
        await lane.aclose()


async def test_all_who_wait_for_the_end_of_the_calls_are_told() -> None:
    """Two that close at once both go on when the last reply is there."""
    async with peer() as other:
        lane = other.lane()
        call = lane.send(PING)
        waiters = [asyncio.create_task(lane.drain()) for _ in range(2)]
        await other.hear(len(PING))
        assert not any(waiter.done() for waiter in waiters)
        await other.say(b"+PONG\r\n")
        await asyncio.gather(call, *waiters)
        again = lane.send(PING)
        later = asyncio.create_task(lane.drain())
        await other.hear(len(PING))
        assert not later.done()
        await other.say(b"+PONG\r\n")
        await asyncio.gather(again, later)
        read = lane.read(b"key")
        assert not lane.idle, "it has not left yet"
        last = asyncio.create_task(lane.drain())
        await settle()
        assert not last.done()
        await other.say(b"$-1\r\n")
        await asyncio.gather(read, last)
        await lane.aclose()


async def test_a_reply_that_lay_unread_when_its_time_was_up_counts() -> None:
    """And the call after it has its own limit still."""
    async with peer() as other:
        lane = other.lane()
        early = lane.send(PING)
        await other.hear(len(PING))
        await other.clock.advance(0.5)
        late = lane.send(PING)
        await other.hear(len(PING))
        other.end.send(b"+PONG\r\n")
        other.clock.set(other.clock.monotonic() + 0.5)
        assert lane._timer is not None
        lane._timer.cancel()
        lane._watch()  # the timer comes first: this process was too busy to read before
        assert await early == b"PONG"
        await other.clock.advance(0.49)
        assert lane.open and not late.done()
        await other.clock.advance(0.02)
        assert isinstance(late.result(), TimeoutError)
        assert not lane.open


async def test_a_refusal_of_the_server_marks_the_lane() -> None:
    """Only those that another connection may not meet; the call has the code and no text."""
    async with peer() as other:
        lane = other.lane()
        for reply, code, outdated in (
            (b"-OOM command not allowed\r\n", "OOM", False),
            (b"-READONLY You can't write\r\n", "READONLY", True),
        ):
            call = lane.send(PING)
            await other.hear(len(PING))
            await other.say(reply)
            result = await call
            assert isinstance(result, ReplyError)
            assert (result.code, str(result)) == (code, code)
            assert lane.outdated is outdated
        await lane.aclose()


@pytest.mark.parametrize("answered", [False, True])
async def test_a_lane_that_is_given_no_more_calls_is_closed_with_its_link(
    *, answered: bool
) -> None:
    """After a failover; what is under way there may go on, and its link waits for it."""
    async with peer() as other:
        link = LaneLink(Address(), Limits(1.0, 1.0, 1, other.clock))
        lane = Lane(other.connection, other.clock, 1.0, link._changed)
        link._lanes.append(lane)
        calls = [link.send_now(PING), link.send_now(PING)]
        await other.hear(2 * len(PING))
        await other.say(b"-READONLY\r\n")
        await calls[0]
        assert link._lanes == [] and lane.open
        closing = asyncio.create_task(link.aclose())
        await settle()
        assert not closing.done()
        if answered:
            await other.say(b"+PONG\r\n")
            assert await calls[1] == b"PONG"
        else:
            await other.clock.advance(1.0)
        await asyncio.wait_for(closing, 5)
        assert calls[1].done()
        assert not lane.open and not link._retiring
        assert await other.hear_the_end()


async def test_bytes_that_are_no_reply_end_the_lane() -> None:
    """The calls under way fail: nothing tells any more which answer is whose."""
    async with peer() as other:
        lane = other.lane()
        calls = [lane.send(PING), lane.send(PING)]
        await other.hear(2 * len(PING))
        await other.say(b"+PONG\r\nHTTP/1.1 200 OK\r\n")
        assert await calls[0] == b"PONG"
        assert isinstance(await calls[1], GarbageError)
        assert not lane.open


@pytest.mark.parametrize(
    ("keys", "reply"),
    [
        ((b"a",), b"*0\r\n"),
        ((b"a",), b"*1\r\n$1\r\nx\r\n"),
        ((b"a",), b":1\r\n"),
        ((b"a", b"b"), b"*1\r\n$-1\r\n"),
        ((b"a", b"b", b"a"), b"*5\r\n:1\r\n:1\r\n:1\r\n:1\r\n:1\r\n"),
        ((b"a", b"b"), b"*-1\r\n"),
        ((b"a", b"b"), b"+OK\r\n"),
    ],
)
async def test_a_reply_to_another_question_ends_the_lane(
    keys: tuple[bytes, ...], reply: bytes
) -> None:
    """Nobody waits for ever for what was lost in it, and an absent answer is no absent user."""
    async with peer() as other:
        lane = other.lane()
        reads = [lane.read(key) for key in keys]
        heard = await other.hear(10)
        call = lane.send(PING)
        while not heard.endswith(PING):
            heard += await other.hear(1)
        await other.say(reply)
        results = await asyncio.wait_for(asyncio.gather(*reads, call), 5)
        assert all(isinstance(result, GarbageError) for result in results), results
        assert not lane.open
