"""Health: the rules of the contract as a truth table, and the probe."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from layered_store import (
    Bulkhead,
    Cached,
    CircuitBreaker,
    Fallback,
    HealthReport,
    HealthStatus,
    Layer,
    MemoryStore,
    Metrics,
    Ramp,
    Retry,
    Shadow,
    StateSnapshot,
    StateStore,
    StoreTimeoutError,
    Timeout,
    UnavailableError,
    WriteThrough,
)
from layered_store.health import SharedProbe
from layered_store.testing import FakeClock, Faults, Recorded, Scripted

HEALTHY, DEGRADED, UNHEALTHY = HealthStatus.HEALTHY, HealthStatus.DEGRADED, HealthStatus.UNHEALTHY
LEVELS = {"h": HEALTHY, "d": DEGRADED, "u": UNHEALTHY}


class Is(Scripted):
    """A store that is as healthy as it is told."""

    def __init__(self, letter: str) -> None:
        super().__init__()
        self.letter = letter

    async def health_report(self) -> HealthReport:
        status = LEVELS[self.letter]
        return HealthReport("Is", status, 1.5, "" if status is HEALTHY else "as told")


def over(build: Callable[..., StateStore], letters: str) -> StateStore:
    return build(*(Is(letter) for letter in letters))


LAYERS: dict[str, Callable[..., StateStore]] = {
    "Layer": Layer,
    "Cached": Cached,
    "Retry": Retry,
    "Timeout": lambda inner: Timeout(inner, seconds=1),
    "CircuitBreaker": CircuitBreaker,
    "Bulkhead": lambda inner: Bulkhead(inner, max_in_flight=1),
    "Metrics": lambda inner: Metrics(inner, name="m", registry=CollectorRegistry()),
    "Faults": Faults,
    "Recorded": Recorded,
}
TIERS: dict[str, Callable[..., StateStore]] = {
    "WriteThrough": lambda tier, origin: WriteThrough(tier, origin=origin),
    "Cached(fallback=)": lambda tier, origin: Cached(tier, fallback=origin),
}

# Tier and origin (or inner and secondary) below, and what stands above them.
WRITE_THROUGH = {
    "hh": "h",
    "hd": "d",
    "hu": "u",
    "dh": "d",
    "dd": "d",
    "du": "u",
    "uh": "d",
    "ud": "d",
    "uu": "u",
}
FALLBACK = {
    "hh": "h",
    "hd": "d",
    "hu": "d",
    "dh": "d",
    "dd": "d",
    "du": "d",
    "uh": "d",
    "ud": "d",
    "uu": "u",
}


async def check(store: StateStore, expected: str) -> HealthReport:
    report = await store.health_report()
    assert report.status is LEVELS[expected]
    assert await store.health_check() is (expected != "u")
    return report


@pytest.mark.parametrize("below", "hdu")
@pytest.mark.parametrize("name", LAYERS)
async def test_a_layer_is_as_healthy_as_what_it_wraps(name: str, below: str) -> None:
    """Status and latency come from below, whose report is the only child."""
    report = await check(over(LAYERS[name], below), below)
    assert [child.name for child in report.children] == ["Is"]
    assert report.latency_ms == 1.5


@pytest.mark.parametrize("below", WRITE_THROUGH)
@pytest.mark.parametrize("name", TIERS)
async def test_tiers(name: str, below: str) -> None:
    """Unhealthy with its origin; degraded, with a reason, when only the cache tier is down."""
    report = await check(over(TIERS[name], below), WRITE_THROUGH[below])
    if name == "Cached(fallback=)":
        assert report.name == "Cached"
        report = report.children[0]
    assert [child.status for child in report.children] == [LEVELS[letter] for letter in below]
    if below[1] == "u":
        assert report.message == "the system of record is down"
    elif below[0] == "u":
        assert report.message == "the cache tier is down"


@pytest.mark.parametrize("below", FALLBACK)
async def test_fallback(below: str) -> None:
    """Degraded, with a reason, when one side is down; unhealthy when both are."""
    report = await check(
        over(lambda inner, second: Fallback(inner, secondary=second), below), FALLBACK[below]
    )
    assert [child.status for child in report.children] == [LEVELS[letter] for letter in below]
    assert bool(report.message) is ("u" in below)


@pytest.mark.parametrize(("below", "expected"), [("h", "d"), ("d", "d"), ("u", "u")])
async def test_open_breaker(below: str, expected: str) -> None:
    """An open breaker is degraded with the reason, or as bad as what is below; probes pass."""
    store = Is(below)
    store.steps = [UnavailableError("gone")] * 10
    breaker = CircuitBreaker(store, minimum_calls=1, failure_share=0.1)
    for _ in range(3):
        with pytest.raises(Exception):  # noqa: B017, PT011  gone, then open
            await breaker.get_latest("u-1")
    report = await check(breaker, expected)
    assert report.children[0].status is LEVELS[below]
    if below == "h":
        assert "open" in report.message


async def test_not_answered_from_a_cache() -> None:
    """A warm cache says nothing of the backend: the probe goes there."""
    below = Faults(MemoryStore())
    stack = Cached(below, stale_if_error=60)
    await stack.upsert_latest(StateSnapshot("u-1"))
    assert await stack.health_check()
    with below.outage():
        assert await stack.get_latest("u-1") is not None
        assert not await stack.health_check()


# The probe


class Asked:
    """A health check that can be held, and counts."""

    def __init__(self, answer: Any = True) -> None:
        self.answer = answer
        self.asked = self.ended = 0
        self.gate = asyncio.Event()

    async def __call__(self) -> bool:
        self.asked += 1
        try:
            await self.gate.wait()
        finally:
            self.ended += 1
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer  # type: ignore[no-any-return]


async def test_shared_by_all_who_ask() -> None:
    """Concurrent callers share one probe; the next one is new."""
    probe, check = SharedProbe("X"), Asked()
    callers = [asyncio.create_task(probe.run(check)) for _ in range(50)]
    await asyncio.sleep(0.001)
    assert check.asked == 1
    check.gate.set()
    reports = await asyncio.gather(*callers)
    assert {report.status for report in reports} == {HEALTHY}
    await probe.run(check)
    assert check.asked == 2


async def test_the_report_is_shared_too() -> None:
    """Concurrent checks of a stack have its report made once; the next one is new."""

    class Held(Layer):
        made = 0
        begun, gate = asyncio.Event(), asyncio.Event()

        async def health_report(self) -> HealthReport:
            self.made += 1
            self.begun.set()
            await self.gate.wait()
            return await super().health_report()

    stack = Held(Cached(MemoryStore()))
    first, *others = [asyncio.create_task(stack.health_check()) for _ in range(100)]
    await stack.begun.wait()
    first.cancel()
    await asyncio.wait([first])
    stack.gate.set()
    assert all(await asyncio.gather(*others))
    assert stack.made == 1
    assert await stack.health_check()
    assert stack.made == 2


async def test_one_prober_is_cancelled() -> None:
    """The others get their answer."""
    probe, check = SharedProbe("X"), Asked()
    first, second = (asyncio.create_task(probe.run(check)) for _ in range(2))
    await asyncio.sleep(0.001)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert not check.ended
    check.gate.set()
    assert (await second).status is HEALTHY
    assert check.asked == 1


async def test_all_probers_are_cancelled() -> None:
    """Nobody waits, so the probe ends; who comes afterwards starts another."""
    probe, check = SharedProbe("X"), Asked()
    callers = [asyncio.create_task(probe.run(check)) for _ in range(3)]
    await asyncio.sleep(0.001)
    for caller in callers:
        caller.cancel()
    await asyncio.wait(callers)
    await asyncio.sleep(0.001)
    assert check.ended == 1
    check.gate.set()
    assert (await probe.run(check)).status is HEALTHY
    assert (check.asked, check.ended) == (2, 2)


async def test_a_probe_begun_while_another_is_cut_off_is_shared_too() -> None:
    """The end of the one before does not make it forgotten."""
    probe, check = SharedProbe("X"), Asked()
    cut_off = asyncio.create_task(probe.run(check))
    await asyncio.sleep(0.001)
    cut_off.cancel()
    callers = [asyncio.create_task(probe.run(check))]
    await asyncio.sleep(0.001)
    callers.append(asyncio.create_task(probe.run(check)))
    await asyncio.sleep(0.001)
    assert check.asked == 2
    check.gate.set()
    for report in await asyncio.gather(*callers):
        assert report.status is HEALTHY
    assert not probe._running


async def test_bounded() -> None:
    """A silent backend is unhealthy after the time limit, 1 s unless told otherwise."""
    clock = FakeClock()
    for limit, options in ((1.0, {}), (0.2, {"limit": 0.2})):
        probe, check = SharedProbe("X", clock=clock, **options), Asked()
        caller = asyncio.create_task(probe.run(check))
        await clock.advance(limit - 0.01)
        assert not caller.done()
        await clock.advance(0.02)
        assert caller.done()
        report = await caller
        assert report == HealthReport("X", UNHEALTHY, pytest.approx(limit * 1000), report.message)
        assert report.message == f"no answer within {limit:g} s"
        assert check.ended


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (False, "the health check said no"),
        (None, "the health check said no"),
        (UnavailableError("refused", layer="RedisStore"), "RedisStore: refused"),
        (OSError("marked 4711"), "OSError"),
        (RuntimeError("marked 4711"), "RuntimeError"),
        (TimeoutError("marked"), "no answer within 1 s"),
        (StoreTimeoutError("no answer in 0.3 s", layer="SQLStore"), "SQLStore: no answer in 0.3 s"),
        (asyncio.CancelledError(), "the health check was cancelled below"),
    ],
)
async def test_never_raises(answer: Any, message: str) -> None:
    """Whatever the check does is a report, which shows nothing of a foreign error's text."""
    probe, check = SharedProbe("X"), Asked(answer)
    check.gate.set()
    report = await probe.run(check)
    assert report.status is UNHEALTHY
    assert report.message == message


async def test_probes_run_side_by_side() -> None:
    """Four silent backends cost one time limit together, not four."""
    clock = FakeClock()
    silent = [Faults(MemoryStore(), clock=clock) for _ in range(4)]
    for store in silent:
        store.outage("hang")
    stack = Fallback(
        WriteThrough(silent[0], origin=silent[1]), secondary=Cached(silent[2], fallback=silent[3])
    )
    asking = asyncio.create_task(stack.health_report())
    await clock.advance(1.01)
    assert asking.done()
    report = await asking
    assert report.status is UNHEALTHY
    assert 1_000 <= report.latency_ms < 1_020


def test_two_event_loops() -> None:
    """Each event loop has a probe of its own, one after the other and at once."""
    store = MemoryStore()
    for _ in range(2):
        assert asyncio.run(store.health_check())
        assert asyncio.run(store.health_report()).status is HEALTHY

    async def both() -> None:
        there = await asyncio.gather(
            asyncio.to_thread(lambda: asyncio.run(store.health_report())), store.health_report()
        )
        assert [report.status for report in there] == [HEALTHY, HEALTHY]

    asyncio.run(both())


async def test_a_store_of_two_methods() -> None:
    """What a third party did not write is healthy, and bounded all the same."""

    class Two(StateStore):
        async def upsert_latest(self, snapshot: StateSnapshot) -> None: ...
        async def get_latest(self, user_id: str) -> StateSnapshot | None: ...

    class Down(Two):
        async def health_check(self) -> bool:
            raise ConnectionError("no")

    assert await Two().health_check() is True
    assert (await Two().health_report()).to_dict()["status"] == "healthy"
    assert (await Down().health_report()).message == "ConnectionError"
    assert not await Layer(Down()).health_check()


async def test_a_layer_whose_report_asks_for_its_own_check() -> None:
    """It is told of what is below, and does not wait for itself."""

    class Asks(Layer):
        async def health_report(self) -> HealthReport:
            return HealthReport("asks", HEALTHY if await self.health_check() else UNHEALTHY)

    for store, healthy in ((MemoryStore(), True), (Reports(None), False)):
        layer = Asks(store)
        async with asyncio.timeout(5):
            assert await layer.health_check() is healthy
            assert (await layer.health_report()).status is (HEALTHY if healthy else UNHEALTHY)


async def test_a_closed_store_is_not_healthy() -> None:
    """It cannot serve any more."""
    store = MemoryStore()
    await store.aclose()
    assert not await store.health_check()
    assert not await Layer(store).health_check()


def test_report_as_data() -> None:
    """Plain dicts, lists, strings and numbers, the tree in its order."""
    report = HealthReport(
        "Top", DEGRADED, 1.23456, "why", (HealthReport("A", HEALTHY), HealthReport("B", UNHEALTHY))
    )
    assert report.to_dict() == {
        "name": "Top",
        "status": "degraded",
        "latency_ms": 1.235,
        "message": "why",
        "children": [
            {"name": "A", "status": "healthy", "latency_ms": 0.0, "message": "", "children": []},
            {"name": "B", "status": "unhealthy", "latency_ms": 0.0, "message": "", "children": []},
        ],
    }
    assert json.loads(report.to_json()) == report.to_dict()
    assert "\n" not in report.to_json()
    assert [status.level for status in (UNHEALTHY, DEGRADED, HEALTHY)] == [0, 1, 2]


class Reports(MemoryStore):
    """A store from elsewhere that says how it is in one way only."""

    def __init__(self, says: object) -> None:
        super().__init__()
        self.says = says

    async def health_check(self) -> bool:
        return await StateStore.health_check(self)

    async def health_report(self) -> Any:
        if isinstance(self.says, Exception):
            raise self.says
        if self.says == "hangs":
            await asyncio.Event().wait()
        return self.says


async def test_a_report_that_adds_to_the_provided_one_does_not_ask_itself_for_ever() -> None:
    """The provided report asks the provided check, which asks the store's own report."""

    class Adds(MemoryStore):
        async def health_check(self) -> bool:
            return await StateStore.health_check(self)

        async def health_report(self) -> HealthReport:
            below = await StateStore.health_report(self)
            return HealthReport("mine", min(below.status, DEGRADED, key=lambda s: s.level))

    for store in (Adds(), Layer(Adds())):
        assert await store.health_check() is True
        report = await store.health_report()
        assert report.status is DEGRADED


FINE = HealthReport("fine", DEGRADED, 1.0, "slow")


@pytest.mark.parametrize(
    ("says", "status", "message"),
    [
        (FINE, DEGRADED, "slow"),
        (UnavailableError("no route"), UNHEALTHY, "no route"),
        (KeyError("u-1"), UNHEALTHY, "KeyError"),
        (None, UNHEALTHY, "health_report() returned no HealthReport"),
        (
            HealthReport("x", "healthy"),  # type: ignore[arg-type]
            UNHEALTHY,
            "health_report() returned no HealthReport",
        ),
        ("hangs", UNHEALTHY, "no answer within 0.01 s"),
    ],
)
async def test_a_report_from_elsewhere_never_breaks_the_tree(
    says: object, status: HealthStatus, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it raises, and however long it hangs; the check says the same as the report."""
    monkeypatch.setattr("layered_store.interface.PROBE_SECONDS", 0.01)
    worst = status is UNHEALTHY
    assert await Reports(says).health_check() is not worst
    for layer in (Layer, CircuitBreaker, Cached):
        stack: StateStore = layer(Reports(says))
        report = await stack.health_report()
        assert (report.status, report.children[0].message) == (status, message)
        assert await stack.health_check() is not worst
    pairs: tuple[StateStore, ...] = (
        Fallback(Reports(says), secondary=MemoryStore()),
        WriteThrough(Reports(says), origin=MemoryStore()),
        Shadow(Reports(FINE), candidate=Reports(says)),
        Ramp(Reports(FINE), alternative=Reports(says)),
    )
    for pair in pairs:
        assert (await pair.health_report()).status is DEGRADED
