"""Bulkhead: places, the queue, and what cancellation does to both."""

import asyncio
import random
from datetime import timedelta
from typing import Any

import pytest

from layered_store.errors import ClosedError, ConfigError, OverloadedError, UnavailableError
from layered_store.interface import Op
from layered_store.layers.bulkhead import Bulkhead
from layered_store.layers.cached import Cached
from layered_store.layers.retry import Retry
from layered_store.snapshot import StateSnapshot
from layered_store.stores.memory import MemoryStore
from layered_store.testing.clock import FakeClock, settle
from layered_store.testing.scripted import Gate, Scripted

STATE = StateSnapshot("u-1", 1, axes={"warmth": 0.5})


def read(bulkhead: Bulkhead) -> asyncio.Task[StateSnapshot | None]:
    return asyncio.create_task(bulkhead.get_latest("u-1"))


async def all_places_free(bulkhead: Bulkhead, inner: Scripted) -> None:
    """Check that as many calls as allowed can be inside again, and no more."""
    gates = [Gate() for _ in range(bulkhead.max_in_flight)]
    inner.steps[:] = gates
    tasks = [read(bulkhead) for _ in gates]
    await settle()
    assert all(gate.entered.is_set() for gate in gates)
    assert inner.inside == bulkhead.max_in_flight
    extra = read(bulkhead)
    await settle()
    assert inner.inside == bulkhead.max_in_flight
    extra.cancel()
    for gate in gates:
        gate.open()
    await asyncio.wait([*tasks, extra])
    assert inner.inside == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_in_flight", 0),
        ("max_in_flight", 1.5),
        ("max_in_flight", None),
        ("max_in_flight", True),
        ("max_waiting", -1),
        ("max_waiting", None),
        ("max_wait", 0),
        ("max_wait", "1s"),
        ("clock", 3),
        ("inner", MemoryStore),
    ],
)
def test_a_wrong_option_is_refused_by_name(option: str, value: object) -> None:
    """Each wrong value is a ConfigError that names class and option."""
    arguments: dict[str, Any] = {
        "inner": Scripted(),
        "max_in_flight": 1,
        "max_waiting": 1,
        option: value,
    }
    with pytest.raises(ConfigError, match=f"Bulkhead.{option}") as caught:
        Bulkhead(**arguments)
    assert caught.value.option == option


def test_a_time_to_wait_without_a_queue_is_refused() -> None:
    """``max_wait`` means nothing when nobody may wait."""
    with pytest.raises(ConfigError, match="max_waiting above 0") as caught:
        Bulkhead(Scripted(), max_in_flight=1, max_wait=1)
    assert (caught.value.option, caught.value.layer) == ("max_wait", "Bulkhead")


@pytest.mark.parametrize(
    ("method", "args"),
    [
        ("get_latest", ("u-1",)),
        ("upsert_latest", (STATE,)),
        ("delete", ("u-1",)),
        ("get_history", ("u-1", 3)),
        ("get_latest_many", (["u-1"],)),
        ("upsert_latest_many", ([STATE],)),
    ],
)
async def test_one_too_many_is_refused_at_once(method: str, args: tuple[object, ...]) -> None:
    """Without a queue, whatever the operation; the store is not asked."""
    gate = Gate()
    inner = Scripted(gate)
    bulkhead = Bulkhead(inner, max_in_flight=1)
    task = read(bulkhead)
    await gate.entered.wait()
    with pytest.raises(OverloadedError) as caught:
        await getattr(bulkhead, method)(*args)
    assert (caught.value.operation, caught.value.layer) == (Op(method), "Bulkhead")
    assert caught.value.retryable
    assert len(inner.calls) == 1
    gate.open(STATE)
    assert await task == STATE
    await getattr(bulkhead, method)(*args)


async def test_no_more_than_allowed_are_ever_inside() -> None:
    """Many callers, three places: three inside at most, all served."""
    gates = [Gate() for _ in range(20)]
    inner = Scripted(*gates)
    bulkhead = Bulkhead(inner, max_in_flight=3, max_waiting=17)
    tasks = [read(bulkhead) for _ in gates]
    for gate in gates:
        await gate.entered.wait()
        gate.open()
    await asyncio.gather(*tasks)
    assert inner.most_inside == 3
    await all_places_free(bulkhead, inner)


async def test_those_who_wait_enter_in_their_order() -> None:
    """First come, first served; a newcomer does not overtake."""
    entered = []

    class Noting(Scripted):
        async def get_latest(self, user_id: str) -> StateSnapshot | None:
            entered.append(user_id)
            return await super().get_latest(user_id)

    gate = Gate()
    bulkhead = Bulkhead(Noting(gate), max_in_flight=1, max_waiting=3)

    async def first() -> None:
        await bulkhead.get_latest("a")
        # Before the place reaches "b", somebody new asks: it is not up for grabs.
        await bulkhead.get_latest("f")

    tasks = [asyncio.create_task(first())]
    await gate.entered.wait()
    for name in ("b", "c", "d"):
        tasks.append(asyncio.create_task(bulkhead.get_latest(name)))  # type: ignore[arg-type]
        await settle()
    with pytest.raises(OverloadedError):
        await bulkhead.get_latest("e")
    gate.open()
    await asyncio.gather(*tasks)
    assert entered == ["a", "b", "c", "d", "f"]


async def test_errors_and_cancellations_free_the_place() -> None:
    """However a call ends, its place is free."""
    gate = Gate()
    inner = Scripted(UnavailableError("down"), gate)
    bulkhead = Bulkhead(inner, max_in_flight=1)
    with pytest.raises(UnavailableError):
        await bulkhead.get_latest("u-1")
    task = read(bulkhead)
    await gate.entered.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    await all_places_free(bulkhead, inner)


async def test_a_cancelled_waiter_leaves_the_queue() -> None:
    """Its place in the queue is free at once, and nobody hands it a permit."""
    gate = Gate()
    inner = Scripted(gate)
    bulkhead = Bulkhead(inner, max_in_flight=1, max_waiting=1)
    first = read(bulkhead)
    await gate.entered.wait()
    waiter = read(bulkhead)
    await settle()
    waiter.cancel()
    await asyncio.wait([waiter])
    assert waiter.cancelled()
    second = read(bulkhead)
    await settle()
    assert not second.done()
    gate.open()
    await asyncio.gather(first, second)
    assert len(inner.calls) == 2
    await all_places_free(bulkhead, inner)


async def read_then_cancel(
    bulkhead: Bulkhead, waiters: list[asyncio.Task[StateSnapshot | None]]
) -> None:
    """Cancel the waiter in the turn in which the place was handed to it, before it runs."""
    await bulkhead.get_latest("u-1")
    waiters[0].cancel()


async def test_a_place_handed_to_a_cancelled_waiter_goes_on() -> None:
    """Cancelled in the very turn in which it was given the place: the next one gets it."""
    gate = Gate()
    inner = Scripted(gate)
    bulkhead = Bulkhead(inner, max_in_flight=1, max_waiting=3)
    waiters: list[asyncio.Task[StateSnapshot | None]] = []
    first = asyncio.create_task(read_then_cancel(bulkhead, waiters))
    await gate.entered.wait()
    waiters += [read(bulkhead), read(bulkhead)]
    waiter, second = waiters
    await settle()
    gate.open()
    await asyncio.wait_for(asyncio.wait([first, waiter, second]), 1)
    assert waiter.cancelled()
    assert not second.cancelled()
    assert len(inner.calls) == 2
    await all_places_free(bulkhead, inner)


async def test_a_place_handed_to_the_last_waiter_that_is_cancelled_is_freed() -> None:
    """The same with nobody behind: the place is free again."""
    gate = Gate()
    inner = Scripted(gate)
    bulkhead = Bulkhead(inner, max_in_flight=1, max_waiting=1)
    waiters: list[asyncio.Task[StateSnapshot | None]] = []
    first = asyncio.create_task(read_then_cancel(bulkhead, waiters))
    await gate.entered.wait()
    waiters.append(waiter := read(bulkhead))
    await settle()
    gate.open()
    await asyncio.wait([first, waiter])
    assert waiter.cancelled()
    assert len(inner.calls) == 1
    await all_places_free(bulkhead, inner)


async def test_a_place_is_not_handed_to_one_who_was_just_cancelled() -> None:
    """Cancelled in the turn in which a place gets free, just before: the next one gets it."""
    waiters: list[asyncio.Task[StateSnapshot | None]] = []

    class Cancelling(Scripted):
        async def get_latest(self, user_id: str) -> StateSnapshot | None:
            found = await super().get_latest(user_id)
            if len(self.calls) == 1:
                waiters[0].cancel()
            return found

    gate = Gate()
    inner = Cancelling(gate)
    bulkhead = Bulkhead(inner, max_in_flight=1, max_waiting=2)
    first = read(bulkhead)
    await gate.entered.wait()
    waiters += [read(bulkhead), read(bulkhead)]
    await settle()
    gate.open()
    await asyncio.wait_for(asyncio.wait([first, *waiters]), 1)
    assert first.exception() is None
    assert waiters[0].cancelled()
    assert waiters[1].exception() is None
    await all_places_free(bulkhead, inner)


async def test_a_wait_that_is_thrown_away_leaves_the_queue() -> None:
    """A caller that is closed where it waits, without a cancellation, gets no place."""
    gate = Gate()
    inner = Scripted(gate)
    bulkhead = Bulkhead(inner, max_in_flight=1, max_waiting=1)
    first = read(bulkhead)
    await gate.entered.wait()
    waiter = bulkhead.get_latest("u-1")
    waiter.send(None)
    waiter.close()
    extra = read(bulkhead)
    await settle()
    assert inner.inside == 1
    gate.open()
    await asyncio.gather(first, extra)
    await all_places_free(bulkhead, inner)


async def test_a_wait_that_takes_too_long_is_refused() -> None:
    """After ``max_wait`` the waiter gives up and leaves the queue; no timer is left."""
    clock = FakeClock()
    gate = Gate()
    inner = Scripted(gate)
    bulkhead = Bulkhead(
        inner, max_in_flight=1, max_waiting=1, max_wait=timedelta(seconds=2), clock=clock
    )
    first = read(bulkhead)
    await gate.entered.wait()
    waiter = read(bulkhead)
    await clock.advance(1.9)
    assert not waiter.done()
    await clock.advance(0.2)
    error = waiter.exception()
    assert isinstance(error, OverloadedError)
    assert (error.operation, error.layer) == (Op.GET_LATEST, "Bulkhead")
    assert clock.pending == 0
    gate.open()
    await first
    assert len(inner.calls) == 1
    await all_places_free(bulkhead, inner)


async def test_the_wait_limit_is_over_once_inside() -> None:
    """``max_wait`` limits the wait, not the call."""
    clock = FakeClock()
    gates = [Gate(), Gate()]
    bulkhead = Bulkhead(Scripted(*gates), max_in_flight=1, max_waiting=1, max_wait=2, clock=clock)
    tasks = [read(bulkhead), read(bulkhead)]
    await clock.advance(1)
    gates[0].open()
    await gates[1].entered.wait()
    await clock.advance(100)
    assert not tasks[1].done()
    gates[1].open(STATE)
    assert await tasks[1] == STATE


async def test_no_place_is_lost_under_any_mixture() -> None:
    """Random ends, cancellations and time-outs: afterwards every place is free."""
    for seed in range(60):
        rng = random.Random(seed)
        clock = FakeClock()
        inner = Scripted()
        bulkhead = Bulkhead(inner, max_in_flight=2, max_waiting=4, max_wait=1, clock=clock)
        gates = [Gate() for _ in range(30)]
        inner.steps[:] = gates
        tasks = []
        for _gate in gates:
            tasks.append(read(bulkhead))
            for _ in range(rng.randrange(3)):
                await asyncio.sleep(0)
            held = [each for each in gates if each.entered.is_set() and not each.opened]
            if held and rng.random() < 0.5:
                rng.choice(held).open()
            if rng.random() < 0.5:
                rng.choice(tasks).cancel()
            if rng.random() < 0.1:
                await clock.advance(rng.random() * 2)
        for gate in gates:
            if not gate.opened:
                gate.open()
        await asyncio.wait(tasks)
        assert inner.most_inside <= 2
        await all_places_free(bulkhead, inner)


def test_one_event_loop_after_another_works() -> None:
    """What a loop left behind when it ended does not hold places in the next."""
    bulkhead = Bulkhead(MemoryStore(), max_in_flight=1, max_waiting=1)
    for _ in range(3):
        assert asyncio.run(bulkhead.get_latest("u-1")) is None


async def test_two_event_loops_at_once_are_refused_with_the_remedy() -> None:
    """A call from another loop while calls are inside says what to do."""
    gate = Gate()
    bulkhead = Bulkhead(Scripted(gate), max_in_flight=2)
    task = read(bulkhead)
    await gate.entered.wait()

    def other() -> None:
        asyncio.run(bulkhead.get_latest("u-1"))

    with pytest.raises(ClosedError, match="one stack per event loop") as caught:
        await asyncio.to_thread(other)
    assert (caught.value.operation, caught.value.layer) == (Op.GET_LATEST, "Bulkhead")
    gate.open(STATE)
    assert await task == STATE
    # Nobody is inside any more: now another loop may come, and this one come back.
    await asyncio.to_thread(other)
    assert await bulkhead.get_latest("u-1") is None


def test_what_a_closed_event_loop_left_inside_holds_no_place() -> None:
    """Calls of a loop that was closed under them count no more, nor when they are thrown away."""
    other = StateSnapshot("u-2", 1)
    inner = Scripted(other)
    bulkhead = Bulkhead(Cached(inner), max_in_flight=1, max_waiting=1)
    outer = Retry(bulkhead, attempts=1)
    assert asyncio.run(outer.get_latest("u-2")) == other
    loop = asyncio.new_event_loop()
    # Driven by hand: a task that is thrown away while it waits would complain.
    left = [bulkhead.get_history("u-1", 1), bulkhead.get_history("u-1", 1)]

    async def begin() -> None:
        inner.steps.append(Gate())
        for call in left:
            call.send(None)

    loop.run_until_complete(begin())
    loop.close()

    async def next_loop() -> None:
        assert await outer.get_latest("u-2") == other  # the hit asks for no place again
        await bulkhead.get_history("u-1", 1)
        for call in left:
            call.close()
        await all_places_free(bulkhead, inner)

    asyncio.run(next_loop())


async def test_hits_need_a_place_while_none_is_free() -> None:
    """A cached user is refused like any other while the bulkhead is full, and answered after."""
    gate = Gate()
    inner = Scripted(STATE, gate)
    bulkhead = Bulkhead(Cached(inner), max_in_flight=1)
    await bulkhead.get_latest("u-1")
    outer = Retry(bulkhead, attempts=1)
    assert await outer.get_latest("u-1") == STATE
    task = asyncio.create_task(bulkhead.get_history("u-1", 1))
    await gate.entered.wait()
    late = Retry(bulkhead, attempts=1)
    for stack in (bulkhead, outer, late):
        with pytest.raises(OverloadedError):
            await stack.get_latest("u-1")
    gate.open([])
    await task
    for stack in (bulkhead, outer, late):
        assert await stack.get_latest("u-1") == STATE
    path = bulkhead.hot_path()
    assert path is not None
    assert path.trust.until == float("inf")
    assert Bulkhead(MemoryStore(), max_in_flight=1).hot_path() is None
