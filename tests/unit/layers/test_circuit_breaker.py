"""CircuitBreaker: when it opens, who may try, what counts."""

import asyncio
import random
from datetime import timedelta
from typing import Any

import pytest

from layered_store.circuit import CircuitState, _Window
from layered_store.errors import (
    CircuitOpenError,
    ConfigError,
    CorruptDataError,
    OverloadedError,
    StoreTimeoutError,
    UnavailableError,
    ValidationError,
)
from layered_store.health import HealthStatus
from layered_store.interface import Op
from layered_store.layers.cached import Cached
from layered_store.layers.circuit_breaker import CircuitBreaker
from layered_store.layers.retry import Retry
from layered_store.layers.timeout import Timeout
from layered_store.snapshot import StateSnapshot
from layered_store.stats import Sample
from layered_store.stores.memory import MemoryStore
from layered_store.testing.clock import FakeClock
from layered_store.testing.scripted import Gate, Scripted

STATE = StateSnapshot("u-1", 1, axes={"warmth": 0.5})
CLOSED, HALF_OPEN, OPEN = CircuitState.CLOSED, CircuitState.HALF_OPEN, CircuitState.OPEN


def down() -> UnavailableError:
    return UnavailableError("down")


async def call(breaker: CircuitBreaker, times: int = 1) -> list[type[BaseException] | None]:
    """Read so many times and return what kinds of errors came out."""
    kinds: list[type[BaseException] | None] = []
    for _ in range(times):
        try:
            await breaker.get_latest("u-1")
        except Exception as exc:  # noqa: BLE001
            kinds.append(type(exc))
        else:
            kinds.append(None)
    return kinds


async def opened(
    *steps: object, clock: FakeClock, **options: Any
) -> tuple[CircuitBreaker, Scripted]:
    """Return a breaker that just opened, with the steps its store follows next."""
    inner = Scripted(down(), down(), *steps)
    breaker = CircuitBreaker(inner, minimum_calls=2, clock=clock, **options)
    await call(breaker, 2)
    assert breaker.state is OPEN
    inner.calls.clear()
    return breaker, inner


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("failure_share", 0),
        ("failure_share", 1.1),
        ("failure_share", "half"),
        ("failure_share", float("nan")),
        ("minimum_calls", 0),
        ("minimum_calls", 2.5),
        ("window", 0),
        ("window", "30s"),
        ("window", None),
        ("open_for", 0),
        ("open_for", None),
        ("max_open_for", 1.0),
        ("max_open_for", 0),
        ("random", random),
        ("clock", None),
        ("inner", 1),
    ],
)
def test_a_wrong_option_is_refused_by_name(option: str, value: object) -> None:
    """Each wrong value is a ConfigError that names class and option."""
    arguments: dict[str, Any] = {"inner": Scripted(), option: value}
    with pytest.raises(ConfigError, match=f"CircuitBreaker.{option}") as caught:
        CircuitBreaker(**arguments)
    assert caught.value.option == option


async def test_it_opens_at_the_failure_share() -> None:
    """Half of the calls failing opens it, fewer do not."""
    inner = Scripted(*[None] * 6, *[down() for _ in range(6)])
    breaker = CircuitBreaker(inner, failure_share=0.5, minimum_calls=5, clock=FakeClock())
    await call(breaker, 11)
    assert breaker.state is CLOSED
    await call(breaker)
    assert breaker.state is OPEN


@pytest.mark.parametrize(("share", "calls", "failures"), [(0.07, 100, 7), (0.28, 25, 7)])
async def test_it_opens_at_any_share_exactly(share: float, calls: int, failures: int) -> None:
    """No rounding of the share makes it wait for one failure more."""
    inner = Scripted(*[None] * (calls - failures), *[down() for _ in range(failures)])
    options: dict[str, Any] = {"failure_share": share, "minimum_calls": calls}
    breaker = CircuitBreaker(inner, clock=FakeClock(), **options)
    await call(breaker, calls - 1)
    assert breaker.state is CLOSED
    await call(breaker)
    assert breaker.state is OPEN


async def test_it_does_not_open_below_the_minimum() -> None:
    """Too few calls say nothing, even if all failed."""
    inner = Scripted(*[down() for _ in range(5)])
    breaker = CircuitBreaker(inner, minimum_calls=5, clock=FakeClock())
    await call(breaker, 4)
    assert breaker.state is CLOSED
    await call(breaker)
    assert breaker.state is OPEN


async def test_a_success_alone_never_opens_it() -> None:
    """The call that reaches the minimum must have failed itself."""
    inner = Scripted(down(), down(), None)
    breaker = CircuitBreaker(inner, minimum_calls=3, clock=FakeClock())
    assert await call(breaker, 3) == [UnavailableError, UnavailableError, None]
    assert breaker.state is CLOSED


async def test_old_failures_leave_the_window() -> None:
    """What is older than the window does not count, in steps of a tenth."""
    clock = FakeClock(start=0.0)
    inner = Scripted(*[down() for _ in range(20)])
    breaker = CircuitBreaker(inner, minimum_calls=4, window=timedelta(seconds=10), clock=clock)
    await call(breaker, 3)
    await clock.advance(10.0)
    await call(breaker, 3)
    assert breaker.state is CLOSED
    await clock.advance(9.0)
    await call(breaker)
    assert breaker.state is OPEN


async def test_failures_leave_the_window_with_their_calls() -> None:
    """What is gone counts neither as a call nor as a failure."""
    clock = FakeClock(start=0.0)
    inner = Scripted(*[down() for _ in range(3)], None, None, None, down())
    breaker = CircuitBreaker(inner, minimum_calls=4, window=10, clock=clock)
    await call(breaker, 3)
    await clock.advance(10.0)
    await call(breaker, 4)
    assert breaker.state is CLOSED  # one of four failed


def test_hits_are_spread_over_the_time_since_the_last_call() -> None:
    """They leave the window as time goes by; those of a long silence are mostly gone."""
    window = _Window(10.0)
    window.add(0.0, 0, failed=True)
    assert (window.calls, window.failures) == (1, 1)
    window.add(3.5, 8, failed=False)  # two hits in each of the parts 0 to 3
    assert (window.calls, window.failures) == (10, 1)
    window.add(3.7, 1, failed=True)
    assert (window.calls, window.failures) == (12, 2)
    window.add(10.5, 0, failed=True)  # part 0 is gone: a failed call and two hits
    assert (window.calls, window.failures) == (10, 2)
    window.add(109.5, 100, failed=False)  # one in each of a hundred parts
    assert (window.calls, window.failures) == (11, 0)
    window.clear()
    window.add(500.0, 6, failed=False)  # nobody knows since when: all are new
    assert (window.calls, window.failures) == (7, 0)


def test_a_moment_before_the_last_one_counts_with_that() -> None:
    """As when calls of two threads are counted in another order than they read the clock."""
    window = _Window(10.0)
    window.add(5.0, 0, failed=True)
    window.add(4.0, 3, failed=True)
    window.add(2.0, 2, failed=False)
    assert (window.calls, window.failures) == (8, 2)
    window.add(14.5, 0, failed=False)
    assert (window.calls, window.failures) == (9, 2)
    window.add(15.0, 0, failed=False)
    assert (window.calls, window.failures) == (2, 0)


async def test_a_long_silence_empties_the_window() -> None:
    """After any time without calls nothing of before is left."""
    clock = FakeClock()
    breaker = CircuitBreaker(Scripted(*[down() for _ in range(8)]), minimum_calls=4, clock=clock)
    await call(breaker, 3)
    await clock.advance(1e7)
    await call(breaker, 3)
    assert breaker.state is CLOSED


async def test_while_open_the_store_is_not_asked() -> None:
    """Every operation is refused with the time to come again."""
    clock = FakeClock()
    breaker, inner = await opened(clock=clock, open_for=timedelta(seconds=5))
    await clock.advance(2)
    for operation in (
        breaker.get_latest("u-1"),
        breaker.upsert_latest(STATE),
        breaker.delete("u-1"),
        breaker.get_history("u-1", 1),
        breaker.get_latest_many(["u-1"]),
        breaker.upsert_latest_many([STATE]),
    ):
        with pytest.raises(CircuitOpenError) as caught:
            await operation
        assert caught.value.retry_after == pytest.approx(3.0)
        assert caught.value.layer == "CircuitBreaker"
        assert not caught.value.retryable
    assert inner.calls == []


async def test_a_successful_trial_closes_it() -> None:
    """After ``open_for`` one call is tried; its success lets all pass, with an empty window."""
    clock = FakeClock()
    breaker, _ = await opened(None, down(), clock=clock, open_for=5)
    await clock.advance(4.99)
    assert await call(breaker) == [CircuitOpenError]
    await clock.advance(0.01)
    assert await call(breaker) == [None]
    assert breaker.state is CLOSED
    assert await call(breaker) == [UnavailableError]
    assert breaker.state is CLOSED


async def test_a_failed_trial_opens_it_again() -> None:
    """One failure is enough, and the time begins anew."""
    clock = FakeClock()
    breaker, inner = await opened(down(), clock=clock, open_for=5)
    await clock.advance(5)
    assert await call(breaker) == [UnavailableError]
    await clock.advance(4.9)
    assert await call(breaker) == [CircuitOpenError]
    await clock.advance(0.2)
    assert await call(breaker) == [None]
    assert breaker.state is CLOSED
    assert len(inner.calls) == 2


async def test_exactly_one_trial_at_a_time() -> None:
    """A thousand callers at the moment of recovery: one passes, the rest are refused at once."""
    clock = FakeClock()
    gate = Gate()
    breaker, inner = await opened(gate, clock=clock)
    await clock.advance(5)
    callers = [asyncio.create_task(breaker.get_latest("u-1")) for _ in range(1000)]
    await gate.entered.wait()
    await clock.advance(3600)
    assert breaker.state is HALF_OPEN
    refused = [task for task in callers if task.done()]
    assert len(refused) == 999
    assert all(isinstance(task.exception(), CircuitOpenError) for task in refused)
    gate.open(STATE)
    await asyncio.wait(callers)
    assert len(inner.calls) == 1
    assert breaker.state is CLOSED


async def test_a_cancelled_trial_frees_its_place() -> None:
    """It neither closes nor opens the circuit; the next call is the trial."""
    clock = FakeClock()
    gate = Gate()
    breaker, inner = await opened(gate, clock=clock)
    await clock.advance(5)
    task = asyncio.create_task(breaker.get_latest("u-1"))
    await gate.entered.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert breaker.state is HALF_OPEN
    assert await call(breaker) == [None]
    assert breaker.state is CLOSED
    assert len(inner.calls) == 2


@pytest.mark.parametrize(
    ("options", "limit"), [({}, 30), ({"window": 2}, 5), ({"open_for": 40}, 40)]
)
async def test_a_trial_that_hangs_counts_as_failed(
    options: dict[str, Any], limit: float, caplog: pytest.LogCaptureFixture
) -> None:
    """With no limit below; its caller goes on, and what comes of it changes nothing any more."""
    caplog.set_level("INFO", logger="layered_store")
    clock = FakeClock()
    gate = Gate()
    breaker, inner = await opened(gate, STATE, clock=clock, **options)
    await clock.advance(breaker.open_for)
    trial = asyncio.create_task(breaker.get_latest("u-1"))
    await gate.entered.wait()
    await clock.advance(limit - 0.1)
    assert await call(breaker) == [CircuitOpenError]
    assert breaker.state is HALF_OPEN
    await clock.advance(0.1)
    with pytest.raises(CircuitOpenError) as refused:
        await breaker.get_latest("u-1")
    assert breaker.state is OPEN
    assert refused.value.retry_after == breaker.open_for
    gate.open(None)
    assert await trial is None
    assert breaker.state is OPEN
    await clock.advance(breaker.open_for)
    assert await call(breaker) == [None]
    assert breaker.state is CLOSED
    assert len(inner.calls) == 2
    told = [record.event for record in caplog.records]  # type: ignore[attr-defined]
    assert told == ["circuit_opened", "circuit_half_open"] * 2 + ["circuit_closed"]


async def test_a_trial_that_says_nothing_frees_its_place() -> None:
    """A refused argument is no verdict on the store."""
    clock = FakeClock()
    breaker, _ = await opened(ValidationError("bad"), clock=clock)
    await clock.advance(5)
    assert await call(breaker, 2) == [ValidationError, None]
    assert breaker.state is CLOSED


@pytest.mark.parametrize("late", [None, down()])
async def test_late_results_change_nothing(late: object) -> None:
    """A call that began before the circuit opened neither closes nor re-opens it."""
    clock = FakeClock()
    gates = [Gate() for _ in range(3)]
    inner = Scripted(*gates, down(), down(), Gate())
    breaker = CircuitBreaker(inner, minimum_calls=2, clock=clock)
    tasks = [asyncio.create_task(breaker.get_latest("u-1")) for _ in gates]
    await gates[2].entered.wait()
    await call(breaker, 2)
    assert breaker.state is OPEN
    await clock.advance(2)
    gates[0].open(late)
    await asyncio.wait(tasks[:1])
    assert breaker.state is OPEN
    await clock.advance(2.9)
    assert await call(breaker) == [CircuitOpenError]
    await clock.advance(0.1)
    trial = asyncio.create_task(breaker.get_latest("u-1"))
    await clock.advance(0)
    gates[1].open(late)
    await asyncio.wait(tasks[1:2])
    assert breaker.state is HALF_OPEN
    trial.cancel()
    await asyncio.wait([trial])
    assert await call(breaker) == [None]
    gates[2].open(late)
    await asyncio.wait(tasks)
    assert breaker.state is CLOSED


async def test_a_late_failure_does_not_count_after_recovery() -> None:
    """Failures of an earlier era do not open a circuit that closed since."""
    clock = FakeClock()
    gates = [Gate() for _ in range(10)]
    inner = Scripted(*gates, down(), down())
    breaker = CircuitBreaker(inner, minimum_calls=2, clock=clock)
    tasks = [asyncio.create_task(breaker.get_latest("u-1")) for _ in gates]
    await gates[-1].entered.wait()
    await call(breaker, 2)
    await clock.advance(5)
    assert await call(breaker) == [None]
    for gate in gates:
        gate.open(down())
    await asyncio.wait(tasks)
    assert breaker.state is CLOSED


@pytest.mark.parametrize(
    "error",
    [down(), StoreTimeoutError("slow"), RuntimeError("bug"), ConnectionError("not ours")],
)
async def test_what_counts_as_a_failure(error: Exception) -> None:
    """Unavailability, its subclasses and whatever nobody expected."""
    breaker = CircuitBreaker(Scripted(error), minimum_calls=1, clock=FakeClock())
    assert await call(breaker) == [type(error)]
    assert breaker.state is OPEN


@pytest.mark.parametrize(
    "error",
    [
        ValidationError("bad"),
        CorruptDataError("bad"),
        OverloadedError("full"),
        CircuitOpenError("below"),
    ],
)
async def test_what_does_not_count(error: Exception) -> None:
    """Refusals and bad data neither open it nor dilute the failures."""
    inner = Scripted(*[error] * 50, down())
    breaker = CircuitBreaker(inner, minimum_calls=1, failure_share=1.0, clock=FakeClock())
    await call(breaker, 50)
    assert breaker.state is CLOSED
    await call(breaker)
    assert breaker.state is OPEN


async def test_cancellations_are_no_failures() -> None:
    """Cancelled calls leave the circuit as it was."""
    gates = [Gate() for _ in range(50)]
    breaker = CircuitBreaker(Scripted(*gates), minimum_calls=1, clock=FakeClock())
    tasks = [asyncio.create_task(breaker.get_latest("u-1")) for _ in gates]
    await gates[-1].entered.wait()
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert all(task.cancelled() for task in tasks)
    assert breaker.state is CLOSED


async def test_trials_that_fail_in_a_row_come_less_often() -> None:
    """With ``max_open_for`` the time grows: drawn from open_for to 2, 4, ... times as much."""
    ranges = []

    class Noting(random.Random):
        def uniform(self, a: float, b: float) -> float:
            ranges.append((a, b))
            return b

    clock = FakeClock()
    breaker, inner = await opened(
        *[down() for _ in range(4)],
        None,
        *[down() for _ in range(3)],
        clock=clock,
        open_for=5,
        max_open_for=30,
        random=Noting(),
    )
    for wait in (5, 10, 20, 30):
        await clock.advance(wait - 0.5)
        assert await call(breaker) == [CircuitOpenError]
        await clock.advance(0.5)
        assert await call(breaker) == [UnavailableError]
    assert ranges == [(5, 10), (5, 20), (5, 30), (5, 30)]
    await clock.advance(30)
    assert await call(breaker, 3) == [None, UnavailableError, UnavailableError]
    await clock.advance(5)
    assert await call(breaker) == [UnavailableError]
    assert ranges[4:] == [(5, 10)]
    assert not inner.steps


async def test_it_never_grows_unless_asked() -> None:
    """By default every wait is ``open_for``, however many trials failed."""
    clock = FakeClock()
    breaker, _ = await opened(*[down() for _ in range(100)], clock=clock, open_for=5)
    for _ in range(100):
        await clock.advance(5)
        assert await call(breaker) == [UnavailableError]


async def test_the_state_is_a_metric() -> None:
    """0 closed, 1 half open, 2 open."""
    clock = FakeClock()
    assert list(CircuitBreaker(Scripted()).samples()) == [Sample("circuit_state", 0)]
    gate = Gate()
    breaker, _ = await opened(gate, clock=clock)
    assert list(breaker.samples()) == [Sample("circuit_state", 2)]
    await clock.advance(5)
    task = asyncio.create_task(breaker.get_latest("u-1"))
    await gate.entered.wait()
    assert list(breaker.samples()) == [Sample("circuit_state", 1)]
    gate.open()
    await task
    assert list(breaker.samples()) == [Sample("circuit_state", 0)]


async def test_health_is_asked_below_and_says_why_it_is_degraded() -> None:
    """An open or half-open circuit is degraded; an unhealthy store stays unhealthy."""
    clock = FakeClock()
    breaker, inner = await opened(ValidationError("no verdict"), clock=clock, open_for=5)
    report = await breaker.health_report()
    assert report.status is HealthStatus.DEGRADED
    assert "circuit is open" in report.message
    assert report.message == "the circuit is open; one call is tried in 5 s"
    assert breaker._circuit.retry_after == 5.0
    assert [child.name for child in report.children] == ["Scripted"]
    assert await breaker.health_check()
    inner.healthy = False
    assert (await breaker.health_report()).status is HealthStatus.UNHEALTHY
    inner.healthy = True
    await clock.advance(5)
    assert "next call is a trial" in (await breaker.health_report()).message
    await call(breaker)
    report = await breaker.health_report()
    assert report.status is HealthStatus.DEGRADED
    assert report.message == "the circuit is half open; the next call is a trial"
    assert breaker._circuit.retry_after == 0.0
    inner.steps.insert(0, gate := Gate())
    trial = asyncio.create_task(breaker.get_latest("u-1"))
    await gate.entered.wait()
    report = await breaker.health_report()
    assert report.message == "the circuit is half open; one call is being tried"
    gate.open()
    await trial
    report = await breaker.health_report()
    assert (report.status, report.message) == (HealthStatus.HEALTHY, "")


async def test_probes_do_not_move_the_circuit() -> None:
    """Health checks are no trials and no successes."""
    clock = FakeClock()
    breaker, _ = await opened(clock=clock, open_for=5)
    await clock.advance(6)
    await breaker.health_check()
    assert breaker.state is OPEN


async def test_a_hung_store_opens_it_through_a_timeout_below() -> None:
    """Timeouts below count; afterwards a hung store costs nothing."""
    clock = FakeClock()
    inner = Scripted(*[Gate() for _ in range(3)])
    stack = Retry(
        CircuitBreaker(Timeout(inner, seconds=0.05, clock=clock), minimum_calls=3, clock=clock),
        base_delay=0,
        clock=clock,
    )
    task = asyncio.create_task(stack.get_latest("u-1"))
    await clock.advance(0.16)
    assert isinstance(task.exception(), StoreTimeoutError)
    with pytest.raises(CircuitOpenError):
        await stack.get_latest("u-1")
    assert len(inner.calls) == 3


async def hit_and_miss(
    clock: FakeClock, *, minimum_calls: int = 2
) -> tuple[CircuitBreaker, Scripted]:
    """Return a breaker around a cache that holds u-1, over a store that then fails."""
    inner = Scripted(STATE, *[down() for _ in range(50)])
    breaker = CircuitBreaker(Cached(inner, clock=clock), minimum_calls=minimum_calls, clock=clock)
    await breaker.get_latest("u-1")
    return breaker, inner


async def test_hits_are_refused_while_open() -> None:
    """A cached user is refused like any other, at every fused path, and answered afterwards."""
    clock = FakeClock()
    breaker, inner = await hit_and_miss(clock)
    outer = Retry(Timeout(breaker, seconds=60, clock=clock), clock=clock)
    assert await outer.get_latest("u-1") == STATE
    while breaker.state is CLOSED:
        with pytest.raises(UnavailableError):
            await breaker.get_history("u-1", 1)
    for stack in (breaker, outer):
        with pytest.raises(CircuitOpenError):
            await stack.get_latest("u-1")
    await clock.advance(5)
    assert await outer.get_latest("u-1") == STATE
    assert breaker.state is CLOSED
    calls = len(inner.calls)
    assert await outer.get_latest("u-1") == await breaker.get_latest("u-1") == STATE
    assert len(inner.calls) == calls


async def test_a_layer_put_around_an_open_breaker_is_refused_too() -> None:
    """The hot path is built late; hits are refused all the same."""
    clock = FakeClock()
    breaker, _ = await hit_and_miss(clock)
    while breaker.state is CLOSED:
        await asyncio.gather(breaker.get_history("u-1", 1), return_exceptions=True)
    outer = Retry(breaker, clock=clock)
    with pytest.raises(CircuitOpenError):
        await outer.get_latest("u-1")
    await clock.advance(5)
    assert await outer.get_latest("u-1") == STATE
    path = breaker.hot_path()
    assert path is not None
    assert path.trust.until == float("inf")


async def test_hits_count_as_successes() -> None:
    """A hundred hits keep ten failures below the share; without them it opens."""
    clock = FakeClock()
    breaker, _ = await hit_and_miss(clock, minimum_calls=10)
    outer = Retry(breaker, clock=clock, attempts=1)
    for _ in range(50):
        await breaker.get_latest("u-1")
        await outer.get_latest("u-1")
    for _ in range(20):
        with pytest.raises(UnavailableError):
            await breaker.get_history("u-1", 1)
    assert breaker.state is CLOSED


async def test_old_hits_leave_the_window() -> None:
    """Hits of before the window do not hide failures of now."""
    clock = FakeClock()
    cached = Cached(Scripted(STATE, *[down() for _ in range(50)]), ttl=1e6, clock=clock)
    breaker = CircuitBreaker(cached, minimum_calls=10, window=10, clock=clock)
    for _ in range(1000):
        await breaker.get_latest("u-1")
    await clock.advance(10_000)
    for _ in range(10):
        with pytest.raises(UnavailableError):
            await breaker.get_history("u-1", 1)
    assert breaker.state is OPEN


async def test_without_a_cache_below_there_is_no_hot_path() -> None:
    """A store that offers none gives none."""
    assert CircuitBreaker(MemoryStore()).hot_path() is None


async def test_a_refusal_says_what_was_refused_and_for_how_long() -> None:
    """Operation and layer, as every error; a trial under way has no end that could be told."""
    clock = FakeClock()
    gate = Gate()
    breaker, _ = await opened(gate, clock=clock, open_for=5)
    await clock.advance(2)
    with pytest.raises(CircuitOpenError) as caught:
        await breaker.delete("u-1")
    assert (caught.value.operation, caught.value.layer) == (Op.DELETE, "CircuitBreaker")
    assert caught.value.retry_after == 3.0
    await clock.advance(3)
    trial = asyncio.create_task(breaker.get_latest("u-1"))
    await gate.entered.wait()
    with pytest.raises(CircuitOpenError) as caught:
        await breaker.delete("u-1")
    assert caught.value.retry_after == 0.0
    gate.open()
    await trial


async def test_each_failed_trial_in_a_row_may_double_the_wait() -> None:
    """2, 4 and 8 times, as drawn at the upper end."""

    class Longest(random.Random):
        def uniform(self, a: float, b: float) -> float:  # noqa: ARG002
            return b

    clock = FakeClock()
    breaker, _ = await opened(
        down(), down(), down(), clock=clock, open_for=5, max_open_for=1000, random=Longest()
    )
    for wait in (5, 10, 20, 40):
        with pytest.raises(CircuitOpenError) as caught:
            await breaker.delete("u-1")
        assert caught.value.retry_after == wait
        await clock.advance(wait)
        if wait < 40:
            assert await call(breaker) == [UnavailableError]


async def test_a_trial_that_hangs_may_double_the_wait_as_one_that_fails() -> None:
    """And its late answer neither closes the circuit nor counts."""

    class Longest(random.Random):
        def uniform(self, a: float, b: float) -> float:  # noqa: ARG002
            return b

    clock, gate = FakeClock(), Gate()
    breaker, _ = await opened(
        gate, None, clock=clock, window=10, open_for=5, max_open_for=1000, random=Longest()
    )
    await clock.advance(5)
    trial = asyncio.create_task(breaker.get_latest("u-1"))
    await gate.entered.wait()
    await clock.advance(10)
    with pytest.raises(CircuitOpenError) as caught:
        await breaker.delete("u-1")
    assert caught.value.retry_after == 10
    gate.open()
    await trial
    assert await call(breaker) == [CircuitOpenError]
    await clock.advance(10)
    assert await call(breaker) == [None]


@pytest.mark.parametrize("window", [1e-320, 1e308])
async def test_a_window_of_any_length_counts(window: float) -> None:
    """Calls of one moment are in it however short it is."""
    breaker, _ = await opened(clock=FakeClock(), window=window)
    assert await call(breaker) == [CircuitOpenError]


async def test_its_log_lines_name_the_block_of_the_config(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By its id where it has one, else by its class."""
    breaker, _ = await opened(clock=FakeClock(), open_for=2)
    breaker.block_id = "guard"  # type: ignore[attr-defined]
    breaker._tell()
    assert [record.facts for record in caplog.records] == [  # type: ignore[attr-defined]
        {"layer": "CircuitBreaker", "retry_after": 2.0},
        {"layer": "guard", "retry_after": 2.0},
    ]
