"""One write of a user at a time."""

from __future__ import annotations

import asyncio

import pytest

from layered_store.errors import UnsupportedError
from layered_store.turns import Turn, Turns


def new() -> Turns[Turn]:
    return Turns(lambda _, loop: Turn(loop), "Layer")


async def test_who_came_first_goes_first_and_nobody_cuts_in() -> None:
    """Also one that comes in the very moment in which the turn is passed on."""
    turns, order = new(), []

    async def write(name: str) -> None:
        turn = await turns.begin("u")
        order.append(name)
        await asyncio.sleep(0)
        turns.end("u", turn)

    first = await turns.begin("u")
    waiting = [asyncio.create_task(write(name)) for name in "abc"]
    await asyncio.sleep(0)
    turns.end("u", first)
    await asyncio.gather(write("late"), *waiting)
    assert order == ["a", "b", "c", "late"]
    assert turns.users == {}


async def test_users_do_not_wait_for_each_other() -> None:
    """Each has turns of its own."""
    turns = new()
    one, other = await turns.begin("u"), await turns.begin("v")
    turns.end("u", one)
    turns.end("v", other)
    assert turns.users == {}


@pytest.mark.parametrize("given", [False, True], ids=["while it waits", "as it is given"])
async def test_who_is_cancelled_keeps_no_turn(given: bool) -> None:
    """The next one has it."""
    turns = new()
    first = await turns.begin("u")
    cancelled = asyncio.create_task(turns.begin("u"))
    next_one = asyncio.create_task(turns.begin("u"))
    await asyncio.sleep(0)
    if given:
        turns.end("u", first)
        cancelled.cancel()
    else:
        cancelled.cancel()
        turns.end("u", first)
    turns.end("u", await next_one)
    assert cancelled.cancelled()
    assert turns.users == {}


async def test_who_only_looks_on_takes_no_turn() -> None:
    """Nor is it forgotten while somebody looks on."""
    turns = new()
    seen = turns.enter("u")
    turn = await turns.begin("u")
    assert turn is seen and seen.busy
    turns.end("u", turn)
    assert turns.users == {"u": seen} and not seen.busy
    turns.leave("u", seen)
    assert turns.users == {}


def test_two_event_loops_cannot_write_one_user() -> None:
    """The error names the layer and the remedy; what a closed one left behind is in nobody's
    way."""
    turns = new()
    one, other = asyncio.new_event_loop(), asyncio.new_event_loop()
    turn = one.run_until_complete(turns.begin("u"))
    with pytest.raises(UnsupportedError, match="use one stack per loop") as caught:
        other.run_until_complete(turns.begin("u"))
    assert caught.value.layer == "Layer"
    one.close()
    after = other.run_until_complete(turns.begin("u"))
    turns.end("u", turn)  # late, as a coroutine that is collected does
    assert turns.users == {"u": after}
    turns.end("u", after)
    assert turns.users == {}
    other.close()
