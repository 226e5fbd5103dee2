"""Retry, call by call against a scripted store."""

import asyncio
import random
from datetime import timedelta
from typing import Any

import pytest

from layered_store.call import call_begins, current_call
from layered_store.errors import (
    CircuitOpenError,
    ConfigError,
    CorruptDataError,
    ErasureIncompleteError,
    OverloadedError,
    StoreError,
    StoreTimeoutError,
    UnavailableError,
    ValidationError,
)
from layered_store.interface import Op
from layered_store.layers.cached import Cached
from layered_store.layers.retry import Retry
from layered_store.snapshot import StateSnapshot
from layered_store.stats import Sample
from layered_store.stores.memory import MemoryStore
from layered_store.testing.clock import FakeClock
from layered_store.testing.scripted import Gate, Scripted, Takes

STATE = StateSnapshot("u-1", 1, axes={"warmth": 0.5})


def down() -> UnavailableError:
    return UnavailableError("down")


class Longest(random.Random):
    """Draws the upper end of every range."""

    def uniform(self, a: float, b: float) -> float:  # noqa: ARG002
        return b


def at_once(inner: Any, **options: Any) -> Retry:
    return Retry(inner, base_delay=0.0, max_delay=0.0, **options)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("attempts", 0),
        ("attempts", 2.0),
        ("attempts", True),
        ("base_delay", -0.1),
        ("base_delay", "50ms"),
        ("base_delay", float("nan")),
        ("max_delay", 0.01),
        ("max_delay", float("inf")),
        ("max_delay", None),
        ("time_limit", 0),
        ("time_limit", "10s"),
        ("budget", -0.1),
        ("budget", 1.5),
        ("budget", "none"),
        ("burst", 0),
        ("burst", 1.5),
        ("random", 7),
        ("clock", 7),
        ("inner", Scripted),
    ],
)
def test_a_wrong_option_is_refused_by_name(option: str, value: object) -> None:
    """Each wrong value is a ConfigError that names class and option."""
    arguments: dict[str, Any] = {"inner": Scripted(), option: value}
    with pytest.raises(ConfigError, match=f"Retry.{option}") as caught:
        Retry(**arguments)
    assert caught.value.option == option


async def test_a_success_is_one_call() -> None:
    """A call that succeeds is made once and waits for nothing."""
    inner = Scripted(STATE)
    assert await Retry(inner, clock=FakeClock()).get_latest("u-1") == STATE
    assert inner.calls == [Op.GET_LATEST]


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
async def test_every_operation_is_repeated(method: str, args: tuple[object, ...]) -> None:
    """Whatever the operation, a retryable error is followed by another attempt."""
    inner = Scripted(down(), down())
    await getattr(at_once(inner), method)(*args)
    assert inner.calls == [Op(method)] * 3


@pytest.mark.parametrize(
    "error", [down(), StoreTimeoutError("slow"), OverloadedError("full"), ErasureIncompleteError()]
)
async def test_retryable_errors_are_repeated(error: StoreError) -> None:
    """Whether to repeat is read from the error, not from a list of classes."""
    inner = Scripted(error)
    await at_once(inner).delete("u-1")
    assert len(inner.calls) == 2


@pytest.mark.parametrize(
    "error",
    [
        CircuitOpenError(retry_after=1),
        ValidationError("bad"),
        CorruptDataError("bad"),
        UnavailableError("wrong password", retryable=False),
        RuntimeError("bug"),
        ConnectionError("not ours"),
    ],
)
async def test_other_errors_are_raised_at_once(error: Exception) -> None:
    """An error that repeating cannot cure, and one that is no StoreError, ends the call."""
    inner = Scripted(error)
    with pytest.raises(type(error)) as caught:
        await at_once(inner).get_latest("u-1")
    assert caught.value is error
    assert len(inner.calls) == 1


async def test_an_open_circuit_is_not_repeated_even_if_it_says_so() -> None:
    """CircuitOpenError ends the call whatever its ``retryable`` says."""
    error = CircuitOpenError(retry_after=0)
    error.retryable = True
    inner = Scripted(error)
    with pytest.raises(CircuitOpenError):
        await at_once(inner).get_latest("u-1")
    assert len(inner.calls) == 1


async def test_the_last_error_is_raised_with_the_number_of_attempts() -> None:
    """After ``attempts`` tries the last error comes out, with a note and no user data."""
    errors = [UnavailableError(f"down {n}") for n in range(4)]
    inner = Scripted(*errors)
    with pytest.raises(UnavailableError, match="down 3") as caught:
        await at_once(inner, attempts=4).get_latest("u-secret")
    assert caught.value is errors[3]
    assert caught.value.__notes__ == ["layered_store: 4 attempts were made"]


async def test_a_call_that_was_tried_once_has_no_note() -> None:
    """One attempt is what everybody expects; nothing is said about it."""
    with pytest.raises(UnavailableError) as caught:
        await Retry(Scripted(down()), attempts=1).get_latest("u-1")
    assert not hasattr(caught.value, "__notes__")


async def test_waits_grow_from_base_to_max_delay() -> None:
    """The ranges of the waits are base_delay times 1, 2, 4, ... up to max_delay."""
    clock = FakeClock()
    inner = Scripted(*[down() for _ in range(5)])
    retry = Retry(
        inner,
        attempts=6,
        base_delay=timedelta(seconds=1),
        max_delay=5,
        time_limit=None,
        random=Longest(),
        clock=clock,
    )
    task = asyncio.create_task(retry.get_latest("u-1"))
    seen = []
    for wait in (1, 2, 4, 5, 5):
        await clock.advance(wait - 0.01)
        seen.append(len(inner.calls))
        await clock.advance(0.01 + 1e-9)
    assert seen == [1, 2, 3, 4, 5]
    assert await task is None


async def test_waits_are_drawn_from_the_whole_range() -> None:
    """Full jitter: over many calls the first wait is spread over 0 to base_delay."""
    waits = []

    class Noting(FakeClock):
        def sleep(self, seconds: float) -> Any:
            waits.append(seconds)
            return super().sleep(0)

    for seed in range(300):
        retry = Retry(Scripted(down()), base_delay=1, random=random.Random(seed), clock=Noting())
        await retry.get_latest("u-1")
    assert len(waits) == 300
    assert min(waits) < 0.02
    assert max(waits) > 0.98
    assert 0.45 < sum(waits) / len(waits) < 0.55


async def test_no_wait_goes_past_the_time_limit() -> None:
    """A wait that would end at the limit, or past it, is not begun: the call fails now."""
    for limit in (4.5, 5.0):
        clock = FakeClock()
        retry = Retry(
            Scripted(Takes(clock, 3.0, down())),
            base_delay=2.0,
            max_delay=2.0,
            time_limit=limit,
            random=Longest(),
            clock=clock,
        )
        task = asyncio.create_task(retry.get_latest("u-1"))
        await clock.advance(3.0)
        assert task.done()
        assert isinstance(task.exception(), UnavailableError)
        assert clock.pending == 0


async def test_no_attempt_begins_after_the_time_limit() -> None:
    """When the event loop comes back late from a wait, the call ends without another attempt."""

    class Late(FakeClock):
        async def _sleep(self, seconds: float) -> None:
            self.set(self.monotonic() + seconds + 100)

    inner = Scripted(error := down())
    retry = Retry(inner, base_delay=1, time_limit=5, clock=Late())
    with pytest.raises(UnavailableError) as caught:
        await retry.upsert_latest(STATE)
    assert caught.value is error
    assert len(inner.calls) == 1
    assert list(retry.samples()) == [Sample("retries", 1, ("upsert_latest", "exhausted"))]


async def test_a_cancelled_repeat_is_counted_as_such() -> None:
    """It is load like any other, but no failure."""
    gate = Gate()
    retry = at_once(Scripted(down(), gate))
    task = asyncio.create_task(retry.get_latest("u-1"))
    await gate.entered.wait()
    task.cancel()
    await asyncio.wait([task])
    assert list(retry.samples()) == [Sample("retries", 1, ("get_latest", "cancelled"))]


async def test_a_retry_is_cut_off_at_the_time_limit() -> None:
    """A retry that hangs ends at the limit; for a write the outcome is then unknown."""
    clock = FakeClock()
    gate = Gate()
    retry = at_once(Scripted(down(), gate), time_limit=5, clock=clock)
    task = asyncio.create_task(retry.upsert_latest(STATE))
    await clock.advance(4.9)
    assert not task.done()
    await clock.advance(0.2)
    error = task.exception()
    assert isinstance(error, StoreTimeoutError)
    assert error.outcome_unknown
    assert (error.operation, error.layer) == (Op.UPSERT_LATEST, "Retry")
    assert gate.cancelled
    assert clock.pending == 0


async def test_without_time_limit_a_retry_may_take_as_long_as_it_likes() -> None:
    """``time_limit=None`` is no limit."""
    clock = FakeClock()
    retry = at_once(Scripted(down(), Takes(clock, 1e6, STATE)), time_limit=None, clock=clock)
    task = asyncio.create_task(retry.get_latest("u-1"))
    await clock.advance(1e6)
    assert await task == STATE


async def test_a_timeout_of_the_store_is_not_taken_for_the_time_limit() -> None:
    """A builtin TimeoutError from a retry comes out as it is, before the limit."""
    error = TimeoutError("the store's own")
    with pytest.raises(TimeoutError) as caught:
        await at_once(Scripted(down(), error), clock=FakeClock()).get_latest("u-1")
    assert caught.value is error


async def test_the_stores_own_error_at_the_time_limit_is_kept() -> None:
    """Cut off, it may know more of what became of the call than this layer does."""

    class Knows(Scripted):
        async def upsert_latest(self, snapshot: StateSnapshot) -> None:
            try:
                await super().upsert_latest(snapshot)
            except asyncio.CancelledError:
                raise StoreTimeoutError("rolled back") from None

    clock = FakeClock()
    retry = at_once(Knows(down(), Gate()), attempts=2, time_limit=5, clock=clock)
    task = asyncio.create_task(retry.upsert_latest(STATE))
    await clock.advance(5)
    error = task.exception()
    assert isinstance(error, StoreTimeoutError)
    assert error.message == "rolled back"
    assert not error.outcome_unknown


async def test_a_subclass_that_looks_at_every_call_sees_reads_too() -> None:
    """``get_latest`` is written out for speed; not past an ``around`` of one's own."""
    seen = []

    class Watching(Retry):
        async def around(self, op: Any, method: Any, /, *args: Any, **kwargs: Any) -> Any:
            seen.append(op)
            return await super().around(op, method, *args, **kwargs)

    inner = Scripted(down(), STATE)
    assert await Watching(inner, base_delay=0.0).get_latest("u-1") == STATE
    assert seen == [Op.GET_LATEST]
    plain = at_once(Scripted(down(), STATE))
    plain.around = None  # type: ignore[method-assign, assignment]
    assert await plain.get_latest("u-1") == STATE  # one coroutine less


async def test_the_budget_stops_a_retry_storm() -> None:
    """With everything failing, calls cost at most ``budget`` retries each, after the burst."""
    inner = Scripted(*[down() for _ in range(5000)])
    retry = at_once(inner, attempts=3, budget=0.1, burst=10)
    for _ in range(1000):
        with pytest.raises(UnavailableError):
            await retry.get_latest("u-1")
    # 10 from the burst and one for every tenth call.
    assert 1105 <= len(inner.calls) <= 1110
    counts = {sample.labels[1]: sample.value for sample in retry.samples()}
    assert counts["failure"] == len(inner.calls) - 1000
    assert counts["budget"] + counts["exhausted"] == 1000
    assert counts["budget"] > 900


async def test_the_budget_fills_again_by_successes() -> None:
    """Ten calls earn one retry when each earns a tenth, whatever they do."""
    for operation in ("get_latest", "delete"):
        retry = at_once(inner := Scripted(down(), down()), attempts=2, budget=0.1, burst=1)
        call = getattr(retry, operation)
        with pytest.raises(UnavailableError):
            await call("u-1")
        inner.steps.append(down())
        with pytest.raises(UnavailableError):
            await call("u-1")
        assert len(inner.calls) == 3
        for _ in range(8):
            await call("u-1")
        inner.steps.append(down())
        await call("u-1")
        assert not inner.steps
        assert len(inner.calls) == 3 + 8 + 2


async def test_the_budget_never_holds_more_than_the_burst() -> None:
    """A long quiet time does not save up retries."""
    inner = Scripted(*[None] * 500, *[down() for _ in range(10)])
    retry = at_once(inner, attempts=20, budget=1.0, burst=2)
    for _ in range(500):
        await retry.get_latest("u-1")
    with pytest.raises(UnavailableError):
        await retry.get_latest("u-1")
    assert len(inner.calls) == 500 + 3


async def test_without_budget_all_attempts_are_made() -> None:
    """``budget=None`` never refuses a retry."""
    inner = Scripted(*[down() for _ in range(300)])
    retry = at_once(inner, attempts=3, budget=None, burst=1)
    for _ in range(100):
        with pytest.raises(UnavailableError):
            await retry.get_latest("u-1")
    assert len(inner.calls) == 300


async def test_two_layers_share_no_budget() -> None:
    """Each Retry has its own bucket."""
    for _ in range(2):
        inner = Scripted(down())
        await at_once(inner, burst=1, budget=0).get_latest("u-1")
        assert len(inner.calls) == 2


async def test_cancellation_passes_through_an_attempt_and_a_wait() -> None:
    """A cancelled call ends at once, is not repeated and leaves no timer."""
    clock = FakeClock()
    gate = Gate()
    inner = Scripted(gate)
    retry = Retry(inner, base_delay=1, clock=clock, random=Longest())
    task = asyncio.create_task(retry.get_latest("u-1"))
    await gate.entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(inner.calls) == 1
    inner.steps.append(down())
    task = asyncio.create_task(retry.get_latest("u-1"))
    await clock.advance(0.5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await clock.advance(10)
    assert len(inner.calls) == 2
    assert clock.pending == 0


async def test_all_attempts_of_a_write_have_one_write_id() -> None:
    """The backend can tell a repeated write from a new one."""
    seen = []

    class Noting(Scripted):
        async def upsert_latest(self, snapshot: StateSnapshot) -> None:
            seen.append(current_call().write_id)
            await super().upsert_latest(snapshot)

    retry = at_once(Noting(down(), down()))
    await retry.upsert_latest(STATE)
    await retry.upsert_latest(STATE)
    assert len(seen) == 4
    assert seen[0] == seen[1] == seen[2] != seen[3]


async def test_a_repeated_write_that_took_effect_is_stored_once() -> None:
    """When the first attempt took effect and its reply was lost, the history has one entry."""

    class Lossy(MemoryStore):
        lost = False

        async def upsert_latest(self, snapshot: StateSnapshot) -> None:
            await super().upsert_latest(snapshot)
            if not self.lost:
                self.lost = True
                raise UnavailableError("reply lost", outcome_unknown=True)

    store = Lossy()
    await at_once(store).upsert_latest(STATE)
    assert await store.get_history("u-1", 10) == [STATE]


@pytest.mark.parametrize("last", [CircuitOpenError(retry_after=1), OverloadedError("full")])
async def test_a_refused_repeat_does_not_say_that_nothing_happened(last: StoreError) -> None:
    """A write that may have taken effect, then a refusal: the first error comes out."""
    first = StoreTimeoutError("cut off", outcome_unknown=True)
    retry = at_once(Scripted(first, last), attempts=2)
    with pytest.raises(StoreTimeoutError) as caught:
        await retry.upsert_latest(STATE)
    assert caught.value is first
    assert caught.value.outcome_unknown
    assert caught.value.__cause__ is last


async def test_of_several_failures_the_most_doubtful_is_told() -> None:
    """Before a refusal: one whose outcome is unknown, else the last; its own cause stays."""
    cause = OSError("reset")
    unknown = StoreTimeoutError("cut off", outcome_unknown=True)
    unknown.__cause__ = cause
    plain = down()
    for steps, told in (([plain, unknown], unknown), ([unknown, plain], unknown), ([plain], plain)):
        retry = at_once(Scripted(*steps, OverloadedError("full")), attempts=len(steps) + 1)
        with pytest.raises(UnavailableError) as caught:
            await retry.upsert_latest(STATE)
        assert caught.value is told
        assert caught.value.outcome_unknown is (told is unknown)
    assert unknown.__cause__ is cause


@pytest.mark.parametrize("last", [down(), OverloadedError("full")])
async def test_an_erasure_done_in_part_is_not_hidden_by_a_later_failure(last: StoreError) -> None:
    """The system of record had erased the user; whoever repeated it in vain must not deny that."""
    owed = ErasureIncompleteError(pending=("RedisStore",))
    retry = at_once(Scripted(owed, down(), last), attempts=3)
    with pytest.raises(StoreError) as caught:
        await retry.delete("u-1")
    assert caught.value is owed or caught.value.outcome_unknown
    if isinstance(last, OverloadedError):
        assert caught.value is owed


@pytest.mark.parametrize(
    "first",
    [
        UnavailableError("cut off", outcome_unknown=True),
        StoreTimeoutError("cut off", outcome_unknown=True),
        StoreTimeoutError("no answer"),
    ],
)
async def test_an_unknown_outcome_stays_unknown(first: StoreError) -> None:
    """Unknown, then a plain failure: the error raised still says that the write may stand."""
    last = down()
    retry = at_once(Scripted(first, last), attempts=2)
    with pytest.raises(UnavailableError, match="may or may not") as caught:
        await retry.upsert_latest(STATE)
    assert caught.value is last
    assert caught.value.outcome_unknown
    assert caught.value.__notes__ == ["layered_store: 2 attempts were made"]
    with pytest.raises(UnavailableError) as caught:
        await at_once(Scripted(down(), down()), attempts=2).upsert_latest(STATE)
    assert not caught.value.outcome_unknown  # both surely failed


@pytest.mark.parametrize("between", [0, 1, 2])
async def test_a_repeat_that_went_well_leaves_the_doubt_about_an_attempt_without_answer(
    between: int,
) -> None:
    """It may still take effect, whatever failed after it: who keeps the copy has to know."""
    for first, unsure in ((StoreTimeoutError("no answer"), True), (down(), False)):
        retry = at_once(Scripted(first, *(down() for _ in range(between)), None), attempts=4)
        with call_begins() as call:
            await retry.upsert_latest(STATE)
        assert call.unsure is unsure


async def test_a_refused_repeat_of_a_read_is_raised() -> None:
    """A read leaves no doubt behind: its last error comes out."""
    retry = at_once(Scripted(down(), CircuitOpenError(retry_after=1)))
    with pytest.raises(CircuitOpenError):
        await retry.get_latest("u-1")


async def test_retries_are_counted_by_operation_and_outcome() -> None:
    """Every repeat counts once; a call given up counts why."""
    retry = at_once(Scripted(down(), None, down(), down(), down(), down()), burst=4, budget=0)
    await retry.upsert_latest(STATE)
    with pytest.raises(UnavailableError):
        await retry.get_latest("u-1")
    assert set(retry.samples()) == {
        Sample("retries", 1, ("upsert_latest", "success")),
        Sample("retries", 2, ("get_latest", "failure")),
        Sample("retries", 1, ("get_latest", "exhausted")),
    }


async def test_a_refusal_by_the_budget_is_counted() -> None:
    """The outcome ``budget`` tells that the bucket was empty."""
    retry = at_once(Scripted(down(), down(), down()), burst=1, budget=0)
    with pytest.raises(UnavailableError):
        await retry.get_latest("u-1")
    assert set(retry.samples()) == {
        Sample("retries", 1, ("get_latest", "failure")),
        Sample("retries", 1, ("get_latest", "budget")),
    }


async def test_a_hit_below_passes_without_the_layer() -> None:
    """The hot path of a cache below is offered unchanged; without one there is none."""
    cached = Cached(MemoryStore())
    await cached.upsert_latest(STATE)
    retry = Retry(cached)
    path, below = retry.hot_path(), cached.hot_path()
    assert path is not None
    assert below is not None
    assert (path.entries, path.trust, path.observers) == (
        below.entries,
        below.trust,
        below.observers,
    )
    assert "get_latest" in vars(retry)
    assert await retry.get_latest("u-1") == STATE
    assert Retry(MemoryStore()).hot_path() is None
