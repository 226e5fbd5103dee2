"""One write of a user at a time."""

from __future__ import annotations

import asyncio
import threading

import pytest

from layered_store.errors import StoreTimeoutError, UnavailableError, UnsupportedError
from layered_store.interface import Op
from layered_store.testing.clock import settle
from layered_store.turns import Turn, Turns


def new() -> Turns[Turn]:
    return Turns(Turn, "Layer")


async def test_who_came_first_goes_first_and_nobody_cuts_in() -> None:
    """Also one that comes in the very moment in which the turn is passed on."""
    turns, order = new(), []

    async def write(name: str) -> None:
        turn = await turns.begin("u")
        order.append(name)
        await asyncio.sleep(0)
        turn.end()

    first = await turns.begin("u")
    waiting = [asyncio.create_task(write(name)) for name in "abc"]
    await asyncio.sleep(0)
    first.end()
    await asyncio.gather(write("late"), *waiting)
    assert order == ["a", "b", "c", "late"]
    assert turns.users == {}


async def test_users_do_not_wait_for_each_other() -> None:
    """Each has turns of its own."""
    turns = new()
    one, other = await turns.begin("u"), await turns.begin("v")
    one.end()
    other.end()
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
        first.end()
        cancelled.cancel()
    else:
        cancelled.cancel()
        first.end()
    (await next_one).end()
    assert cancelled.cancelled()
    assert turns.users == {}


async def test_behind_a_store_that_hangs_nobody_waits_for_all_before() -> None:
    """Who waited for a whole try fails with it; who came during it may try, in turn."""
    turns = new()
    before = [asyncio.create_task(turns.begin("u", Op.DELETE)) for _ in range(9)]
    await settle()
    first = await before[0]
    first.failed(StoreTimeoutError("no answer"))
    first.end()  # the others came while it tried
    await settle()
    later = [asyncio.create_task(turns.begin("u")) for _ in range(2)]
    second = await before[1]
    await settle()
    second.failed(StoreTimeoutError("no answer"))
    second.end()
    for task in before[2:]:
        with pytest.raises(StoreTimeoutError, match="was not sent") as caught:
            await task
        error = caught.value
        assert (error.layer, error.operation, error.user_id) == ("Layer", Op.DELETE, "u")
        assert error.retryable and not error.outcome_unknown
    third = await later[0]
    third.failed(UnavailableError("refused, which takes no time"))
    third.end()
    (await later[1]).end()
    assert turns.users == {}


async def test_what_is_raised_with_turns_is_noted_and_they_are_passed_on() -> None:
    """Of one user or of several."""
    turns = new()
    before: list[asyncio.Task[Turn]] = []
    with pytest.raises(StoreTimeoutError, match="no answer"), await turns.begin("b"):
        before = [asyncio.create_task(turns.begin("b")) for _ in range(2)]
        await settle()
        raise StoreTimeoutError("no answer")
    many = asyncio.create_task(turns.begin_all(["b", "a"], Op.UPSERT_LATEST_MANY))
    alone = asyncio.create_task(turns.begin("a"))
    await settle()
    assert turns.users["a"].busy  # in the order of their names
    with pytest.raises(StoreTimeoutError, match="no answer"), await before[0]:
        raise StoreTimeoutError("no answer")
    with pytest.raises(StoreTimeoutError, match="was not sent"):
        await before[1]
    with await many as both:
        assert list(both) == ["a", "b"]
        assert not alone.done()
    (await alone).end()
    assert turns.users == {}


async def test_who_is_cancelled_as_it_is_refused_gives_away_nobodys_turn() -> None:
    """Another call has it already, and the next one waits for that."""
    turns = new()
    before = [asyncio.create_task(turns.begin("u")) for _ in range(3)]
    await settle()
    first = await before[0]
    first.failed(StoreTimeoutError("no answer"))
    first.end()
    second = await before[1]
    later = [asyncio.create_task(turns.begin("u")) for _ in range(2)]
    await settle()
    second.failed(StoreTimeoutError("no answer"))
    second.end()
    before[2].cancel()  # it was refused and does not know yet
    await settle()
    assert before[2].cancelled()
    assert [task.done() for task in later] == [True, False]
    for task in later:
        (await task).end()
    assert turns.users == {}


async def test_nothing_is_kept_of_who_left_the_queue() -> None:
    """However long the one before it takes."""
    turns = new()
    first = await turns.begin("u")
    for _ in range(3):
        waiting = asyncio.create_task(turns.begin("u"))
        await settle()
        waiting.cancel()
        await asyncio.wait([waiting])
    assert not first._waiting
    first.end()
    assert turns.users == {}


async def test_who_only_looks_on_takes_no_turn() -> None:
    """Nor is it forgotten while somebody looks on."""
    turns = new()
    seen = turns.enter("u")
    turn = await turns.begin("u")
    assert turn is seen and seen.busy
    turn.end()
    assert turns.users == {"u": seen} and not seen.busy
    turns.leave(seen)
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
    turn.end()  # late, as a coroutine that is collected does
    assert turns.users == {"u": after}
    after.end()
    assert turns.users == {}
    other.close()


async def test_of_two_event_loops_that_come_at_once_one_is_refused() -> None:
    """In whatever moment the other thread comes; the turn is with one of them."""
    other = asyncio.new_event_loop()
    had: list[Turn] = []

    def interrupted(turns: Turns[Turn], user: str, loop: asyncio.AbstractEventLoop) -> Turn:
        turn = Turn(turns, user, loop)
        if loop is not other:
            begin = turns.begin(user)
            thread = threading.Thread(target=lambda: had.append(other.run_until_complete(begin)))
            thread.start()
            thread.join()
        return turn

    turns = Turns(interrupted, "Layer")
    with pytest.raises(UnsupportedError, match="use one stack per loop"):
        await turns.begin("u")
    assert turns.users == {"u": had[0]}
    had[0].end()
    assert turns.users == {}
    other.close()
