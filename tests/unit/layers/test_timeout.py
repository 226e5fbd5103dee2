"""Timeout: its own expiry, and everybody else's."""

import asyncio
import threading
from datetime import timedelta
from typing import Any, ClassVar

import pytest

from layered_store.errors import ConfigError, StoreTimeoutError
from layered_store.interface import Op
from layered_store.layers.cached import Cached
from layered_store.layers.timeout import Timeout
from layered_store.snapshot import StateSnapshot
from layered_store.stores.memory import MemoryStore
from layered_store.testing.clock import FakeClock
from layered_store.testing.scripted import Gate, Scripted, Takes

STATE = StateSnapshot("u-1", 1, axes={"warmth": 0.5})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("seconds", 0),
        ("seconds", -1),
        ("seconds", None),
        ("seconds", "50ms"),
        ("seconds", True),
        ("seconds", float("nan")),
        ("seconds", float("inf")),
        ("clock", "now"),
        ("inner", None),
    ],
)
def test_a_wrong_option_is_refused_by_name(option: str, value: object) -> None:
    """Each wrong value is a ConfigError that names class and option."""
    arguments: dict[str, Any] = {"inner": Scripted(), "seconds": 1.0, option: value}
    with pytest.raises(ConfigError, match=f"Timeout.{option}") as caught:
        Timeout(**arguments)
    assert caught.value.option == option


@pytest.mark.parametrize(
    ("method", "args", "unknown"),
    [
        ("get_latest", ("u-1",), False),
        ("get_history", ("u-1", 3), False),
        ("get_latest_many", (["u-1"],), False),
        ("upsert_latest", (STATE,), True),
        ("upsert_latest_many", ([STATE],), True),
        ("delete", ("u-1",), True),
    ],
)
async def test_a_slow_call_ends_at_the_limit(
    method: str, args: tuple[object, ...], unknown: bool
) -> None:
    """At the limit, not before, the call is cancelled; a write says its outcome is unknown."""
    clock = FakeClock()
    gate = Gate()
    timeout = Timeout(Scripted(gate), seconds=timedelta(seconds=2), clock=clock)
    task = asyncio.create_task(getattr(timeout, method)(*args))
    await clock.advance(1.99)
    assert not task.done()
    await clock.advance(0.02)
    error = task.exception()
    assert isinstance(error, StoreTimeoutError)
    assert (error.operation, error.layer) == (Op(method), "Timeout")
    assert error.outcome_unknown is unknown
    assert error.retryable
    assert "u-1" not in str(error)
    assert gate.cancelled
    assert clock.pending == 0


async def test_a_quick_call_leaves_no_timer() -> None:
    """An answer within the limit comes through, and nothing waits for longer than that."""
    clock = FakeClock()
    timeout = Timeout(Scripted(Takes(clock, 0.5, STATE)), seconds=1, clock=clock)
    task = asyncio.create_task(timeout.get_latest("u-1"))
    await clock.advance(0.5)
    assert await task == STATE
    await clock.advance(2)  # the timer that calls share
    assert clock.pending == 0


async def test_an_error_below_comes_through() -> None:
    """Whatever the store raises in time is not changed."""
    error = ValueError("bug")
    with pytest.raises(ValueError, match="bug") as caught:
        await Timeout(Scripted(error), seconds=1, clock=FakeClock()).get_latest("u-1")
    assert caught.value is error


@pytest.mark.parametrize("error", [TimeoutError("inner"), StoreTimeoutError("inner")])
async def test_a_timeout_of_the_store_is_not_taken_for_its_own(error: Exception) -> None:
    """A TimeoutError from below before the limit is the store's."""
    with pytest.raises(TimeoutError) as caught:
        await Timeout(Scripted(error), seconds=1, clock=FakeClock()).upsert_latest(STATE)
    assert caught.value is error


async def test_what_the_store_makes_of_the_expiry_is_kept_when_it_says_more() -> None:
    """A store that answers its cancellation with a StoreError of its own is believed."""
    told = StoreTimeoutError("told by the backend")

    class Telling(Scripted):
        async def get_latest(self, user_id: str) -> StateSnapshot | None:
            try:
                return await super().get_latest(user_id)
            except asyncio.CancelledError:
                raise told from None

    clock = FakeClock()
    task = asyncio.create_task(Timeout(Telling(Gate()), seconds=1, clock=clock).get_latest("u-1"))
    await clock.advance(1)
    assert task.exception() is told


async def test_the_callers_cancellation_stays_one() -> None:
    """A cancelled caller sees CancelledError, not a time limit."""
    clock = FakeClock()
    gate = Gate()
    task = asyncio.create_task(Timeout(Scripted(gate), seconds=1, clock=clock).get_latest("u-1"))
    await gate.entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gate.cancelled
    await clock.advance(2)  # the timer that calls share
    assert clock.pending == 0


async def test_cancellation_wins_over_expiry() -> None:
    """A caller cancelled while the expired call still ends: its wish is not lost."""
    caller: list[asyncio.Task[Any]] = []

    class Late(Scripted):
        async def get_latest(self, user_id: str) -> StateSnapshot | None:
            try:
                return await super().get_latest(user_id)
            finally:
                caller[0].cancel()

    clock = FakeClock()
    task = asyncio.create_task(Timeout(Late(Gate()), seconds=1, clock=clock).get_latest("u-1"))
    caller.append(task)
    await clock.advance(1)
    assert task.cancelled()


@pytest.mark.parametrize(("inner", "outer", "layer"), [(1, 2, "inside"), (2, 1, "outside")])
async def test_nested_limits_keep_apart(inner: float, outer: float, layer: str) -> None:
    """The shorter limit ends the call and is the one named, whichever it is."""

    class Inside(Timeout):
        pass

    clock = FakeClock()
    stack = Timeout(
        Inside(Scripted(Gate()), seconds=inner, clock=clock), seconds=outer, clock=clock
    )
    task = asyncio.create_task(stack.get_latest("u-1"))
    await clock.advance(1)
    error = task.exception()
    assert isinstance(error, StoreTimeoutError)
    assert error.layer == ("Inside" if layer == "inside" else "Timeout")
    await clock.advance(2)  # the timer that calls share
    assert clock.pending == 0


async def test_it_works_on_the_real_clock() -> None:
    """The machine's clock ends a hung call as well."""
    with pytest.raises(StoreTimeoutError):
        await Timeout(Scripted(Gate()), seconds=0.001).get_latest("u-1")


async def test_health_is_not_limited() -> None:
    """Probes have a limit of their own and do not pass through this layer."""
    timeout = Timeout(Scripted(healthy=False), seconds=1)
    assert not await timeout.health_check()


async def test_a_hit_below_passes_without_the_layer() -> None:
    """The hot path of a cache below is offered unchanged; without one there is none."""
    cached = Cached(MemoryStore())
    await cached.upsert_latest(STATE)
    timeout = Timeout(cached, seconds=1)
    assert timeout.hot_path() == cached.hot_path()
    assert await timeout.get_latest("u-1") == STATE
    assert Timeout(MemoryStore(), seconds=1).hot_path() is None


async def test_calls_under_way_share_a_timer() -> None:
    """Each has its own time all the same, whichever of them end before."""
    clock = FakeClock()
    gates = [Gate() for _ in range(4)]
    timeout = Timeout(Scripted(*gates), seconds=1, clock=clock)
    calls = []
    for _ in range(4):
        calls.append(asyncio.create_task(timeout.get_latest("u-1")))
        await clock.advance(0.2)
    assert clock.pending == 1
    gates[0].open(STATE)
    calls[1].cancel()
    await clock.advance(0.59)
    assert [call.done() for call in calls] == [True, True, False, False]
    await clock.advance(0.02)
    assert [call.done() for call in calls] == [True, True, True, False]
    assert isinstance(calls[2].exception(), StoreTimeoutError)
    await clock.advance(0.2)
    assert isinstance(calls[3].exception(), StoreTimeoutError)
    assert clock.pending == 0


async def test_a_later_call_has_its_whole_time() -> None:
    """Though the timer is still that of one that has ended."""
    clock = FakeClock()
    timeout = Timeout(Scripted(STATE, Gate()), seconds=1, clock=clock)
    assert await timeout.get_latest("u-1") == STATE
    await clock.advance(0.5)
    call = asyncio.create_task(timeout.get_latest("u-1"))
    await clock.advance(0.9)
    assert not call.done()
    await clock.advance(0.2)
    assert isinstance(call.exception(), StoreTimeoutError)


class Hanging(MemoryStore):
    """Never answers; notes which users' calls have ended."""

    ended: ClassVar[list[int]] = []

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.append(int(user_id))
        return None


async def test_many_calls_run_out_at_once() -> None:
    """Behind a store that hangs, in the order in which they began."""
    clock = FakeClock()
    Hanging.ended.clear()
    timeout = Timeout(Hanging(), seconds=1, clock=clock)
    calls = [asyncio.create_task(timeout.get_latest(str(number))) for number in range(1_000)]
    await clock.advance(1)
    assert Hanging.ended == list(range(1_000))
    assert all(isinstance(call.exception(), StoreTimeoutError) for call in calls)
    assert [call.cancelling() for call in calls] == [0] * 1_000


async def test_a_call_that_answers_its_cancellation_is_not_cancelled_later() -> None:
    """What the limit did to its task is taken back also when the call went well."""

    class Stubborn(MemoryStore):
        async def get_latest(self, user_id: str) -> StateSnapshot | None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                return STATE
            return None

    clock = FakeClock()
    timeout = Timeout(Stubborn(), seconds=1, clock=clock)

    async def caller() -> int:
        assert await timeout.get_latest("u-1") == STATE
        await asyncio.sleep(0)
        task = asyncio.current_task()
        assert task is not None
        return task.cancelling()

    task = asyncio.create_task(caller())
    await clock.advance(1)
    assert task.result() == 0


def test_each_event_loop_has_timers_of_its_own() -> None:
    """One that is closed with calls under way takes none of another's with it."""
    timeout = Timeout(Hanging(), seconds=0.02)
    for _ in range(2):
        with pytest.raises(StoreTimeoutError):
            asyncio.run(timeout.get_latest("1"))
    assert len(timeout._deadlines) == 1

    async def left_behind() -> None:
        task = asyncio.create_task(timeout.get_latest("1"))
        await asyncio.sleep(0)
        assert not task.done()

    asyncio.run(left_behind())
    asyncio.run(asyncio.sleep(0.03))


def test_event_loops_of_several_threads_may_come_at_once() -> None:
    """One that comes while another looks for those that are closed fails nobody's call."""
    timeout = Timeout(MemoryStore(), seconds=1)
    another = threading.Thread(target=lambda: asyncio.run(timeout.get_latest("1")))

    class Loop(asyncio.SelectorEventLoop):
        def is_closed(self) -> bool:
            closed = super().is_closed()
            if closed and another.ident is None:
                another.start()
                another.join()
            return closed

    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(timeout.get_latest("1"))
    assert asyncio.run(timeout.get_latest("1")) is None
    assert another.ident is not None
