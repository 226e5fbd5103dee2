"""Faults: what is injected, when, and what it looks like from above."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from layered_store import (
    ConfigError,
    CorruptDataError,
    HealthStatus,
    MemoryStore,
    Op,
    StateSnapshot,
    StoreError,
    Timeout,
    UnavailableError,
    WriteThrough,
)
from layered_store.coherence.contract import (
    Authority,
    CacheTier,
    Holders,
    Notice,
    Pass,
    Ticket,
    TierRead,
    Versioned,
)
from layered_store.identity import digest_function
from layered_store.testing import FakeClock, Fault, Faults, Recorded

STATE = StateSnapshot("u-1", axes={"a": 0.5})


async def outcomes(store: Faults, calls: int = 200) -> list[str]:
    found = []
    for number in range(calls):
        try:
            if number % 2:
                await store.upsert_latest(STATE)
            else:
                await store.get_latest("u-1")
            found.append("ok")
        except StoreError as exc:
            found.append(f"{exc.operation} {exc.outcome_unknown}")
    return found


async def test_same_seed_same_faults() -> None:
    """The seed and the calls decide everything; another seed gives another run."""
    runs = [
        await outcomes(Faults(MemoryStore(), seed=seed, error=0.2, error_after=0.2))
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]
    again = Faults(MemoryStore(), seed=2, error=0.2, error_after=0.2)
    await outcomes(again, 17)
    again.reset()
    assert await outcomes(again) == runs[2]
    again.reset(1)
    assert await outcomes(again) == runs[0]


async def test_shares_are_kept() -> None:
    """Each fault comes about as often as its share says, and is counted."""
    store = Faults(MemoryStore(), seed=3, error=0.1, error_after=0.3)
    found = await outcomes(store, 2_000)
    failed = sum(each != "ok" for each in found)
    assert 700 < failed < 900
    assert sum(store.injected.values()) == failed
    assert store.injected["get_latest", "error"] + store.injected["upsert_latest", "error"] > 120


async def test_shares_by_operation() -> None:
    """A mapping hits the operations that it names and no other."""
    store = Faults(MemoryStore(), error={"upsert_latest": 1.0}, corrupt={"get_history": 1.0})
    with pytest.raises(UnavailableError):
        await store.upsert_latest(STATE)
    await store.inner.upsert_latest(STATE)
    assert await store.get_latest("u-1") == STATE
    with pytest.raises(CorruptDataError):
        await store.get_history("u-1", 5)


async def test_shares_and_delay_may_be_set_at_any_time() -> None:
    """What is refused leaves them as they were."""
    clock = FakeClock()
    store = Faults(MemoryStore(clock=clock), clock=clock, error=1.0)
    with pytest.raises(UnavailableError):
        await store.get_latest("u-1")
    store.error = 0.0
    assert await store.get_latest("u-1") is None
    store.error = {"delete": 1.0}
    assert await store.get_latest("u-1") is None
    with pytest.raises(UnavailableError):
        await store.delete("u-1")
    for option, bad in (("error", 1.5), ("slow", 0.5), ("delay", -1)):
        with pytest.raises(ConfigError, match=option if option == "delay" else "share"):
            setattr(store, option, bad)
    assert (store.error, store.slow, store.delay) == ({"delete": 1.0}, 0.0, 0.1)
    assert await store.get_latest("u-1") is None
    store.slow, store.delay = {"get_latest": 1.0}, 8.0
    slow = asyncio.create_task(store.get_latest("u-1"))
    await clock.advance(7.9)
    assert not slow.done()
    await clock.advance(0.1)
    assert await slow is None


async def test_error_before_and_after() -> None:
    """Before, nothing took effect and the error says so; after, it did, and that is unknown."""
    store = Faults(MemoryStore())
    store.fail()
    with pytest.raises(UnavailableError) as before:
        await store.upsert_latest(STATE)
    assert before.value.retryable
    assert not before.value.outcome_unknown
    assert await store.get_latest("u-1") is None
    store.fail(fault="error_after")
    with pytest.raises(UnavailableError) as after:
        await store.upsert_latest(STATE)
    assert after.value.outcome_unknown
    assert await store.get_latest("u-1") == STATE
    store.fail(fault="error_after")
    with pytest.raises(UnavailableError) as read:
        await store.get_latest("u-1")
    assert not read.value.outcome_unknown


async def test_script() -> None:
    """Scripted faults come in their order, for their operations only, with their error."""
    store = Faults(MemoryStore())
    store.fail(2, operations=["delete"])
    with pytest.raises(UnavailableError):
        await store.delete("u-1")
    with pytest.raises(UnavailableError):
        await store.delete("u-1")
    await store.delete("u-1")
    store.fail(1, error=RuntimeError("a bug"), operations="get_latest")
    with pytest.raises(RuntimeError, match="a bug"):
        await store.get_latest("u-1")
    store.fail(5)
    store.recover()
    assert await store.get_latest("u-1") is None


async def test_slow_takes_its_time() -> None:
    """A slow call takes ``delay`` longer on the clock, and then has the right answer."""
    clock = FakeClock()
    store = Faults(MemoryStore(), slow=1.0, delay=2, clock=clock)
    await store.inner.upsert_latest(STATE)
    task = asyncio.create_task(store.get_latest("u-1"))
    await clock.advance(1.9)
    assert not task.done()
    await clock.advance(0.2)
    assert await task == STATE


@pytest.mark.parametrize("fault", ["hang", "hang_after"])
async def test_hang(fault: str) -> None:
    """A call that hangs ends when it is cancelled or cut off; the rest is as the fault says."""
    clock = FakeClock()
    store = Faults(MemoryStore(), clock=clock)
    store.fail(2, fault=fault)
    task = asyncio.create_task(Timeout(store, seconds=1, clock=clock).upsert_latest(STATE))
    await clock.advance(0.9)
    assert not task.done()
    await clock.advance(0.2)
    with pytest.raises(TimeoutError):
        await task
    assert (await store.inner.get_latest("u-1") == STATE) is (fault == "hang_after")
    hung = asyncio.create_task(store.get_latest("u-1"))
    await clock.advance(1_000)
    assert not hung.done()
    hung.cancel()
    with pytest.raises(asyncio.CancelledError):
        await hung


async def test_outage() -> None:
    """During an outage everything fails, health included; afterwards all is as before."""
    store = Faults(MemoryStore())
    await store.upsert_latest(STATE)
    with store.outage():
        assert store.is_down
        for call in (
            store.get_latest("u-1"),
            store.upsert_latest(STATE),
            store.delete("u-1"),
            store.get_history("u-1", 1),
            store.get_latest_many(["u-1"]),
            store.upsert_latest_many([STATE]),
            store.open(),
        ):
            with pytest.raises(UnavailableError):
                await call
        report = await store.health_report()
        assert report.status is HealthStatus.UNHEALTHY
        assert "injected" in report.message
        assert [child.name for child in report.children] == ["MemoryStore"]
        assert not await store.health_check()
    assert not store.is_down
    assert await store.get_latest("u-1") == STATE
    assert await store.health_check()
    store.outage()
    store.recover()
    assert await store.get_latest("u-1") == STATE


async def test_outage_of_some_operations() -> None:
    """An outage of writes leaves reads and health alone."""
    store = Faults(MemoryStore())
    with store.outage(operations=["upsert_latest"]):
        assert await store.get_latest("u-1") is None
        assert await store.health_check()
        with pytest.raises(UnavailableError):
            await store.upsert_latest(STATE)


async def test_outage_within_an_outage() -> None:
    """The one around goes on when the one inside ends, unless somebody called recover()."""
    store = Faults(MemoryStore())
    with store.outage():
        with store.outage("hang", operations=["delete"]):
            await store.get_latest("u-1")
        with pytest.raises(UnavailableError):
            await store.get_latest("u-1")
        with store.outage("hang"):
            store.recover()
        await store.get_latest("u-1")
    assert not store.is_down
    await store.get_latest("u-1")


async def test_an_error_of_the_tests_own() -> None:
    """As an object or as its class."""
    store = Faults(MemoryStore())
    for error in (KeyError("mine"), KeyError):
        store.fail(error=error)
        with pytest.raises(KeyError):
            await store.get_latest("u-1")


async def test_hanging_outage() -> None:
    """A backend that never answers: calls and probes wait; the end of the outage ends them."""
    clock = FakeClock()
    store = Faults(MemoryStore(clock=clock), clock=clock)
    store.outage("hang")
    call = asyncio.create_task(store.upsert_latest(STATE))
    probe = asyncio.create_task(store.health_report())
    await clock.advance(0.9)
    assert not call.done()
    assert not probe.done()
    await clock.advance(0.2)
    assert (await probe).message == "no answer within 1 s"
    store.recover()
    with pytest.raises(UnavailableError) as failed:
        await call
    assert failed.value.outcome_unknown


async def test_close_ends_what_hangs() -> None:
    """Nothing is left waiting when the stack is closed."""
    store = Faults(MemoryStore())
    store.outage("hang")
    call = asyncio.create_task(store.get_latest("u-1"))
    await asyncio.sleep(0)
    await store.aclose()
    with pytest.raises(UnavailableError):
        await call


async def test_corrupt_system_of_record() -> None:
    """A damaged record of a system of record is CorruptDataError, for that user alone."""
    store = Faults(MemoryStore(), corrupt=1.0)
    assert await store.get_latest("absent") is None
    assert await store.get_history("absent", 5) == []
    await store.upsert_latest(STATE)
    for read in (
        store.get_latest("u-1"),
        store.get_history("u-1", 5),
        store.get_latest_many(["u-1"]),
    ):
        with pytest.raises(CorruptDataError):
            await read
    authority = store.capability(Authority)
    assert authority is not None
    with pytest.raises(CorruptDataError):
        await authority.read("u-1")


class Tier(CacheTier):
    """A cache tier that answers what it is told, and notes what it is asked."""

    digest = digest_function()
    tier_name = "tier"
    has_channel = True

    def __init__(self, found: Versioned | None = None) -> None:
        self.found = found
        self.asked: list[str] = []
        self.messages: asyncio.Queue[Notice] = asyncio.Queue()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    async def read(self, user_id: str) -> TierRead:
        self.asked.append("read")
        return TierRead(self.found, trusted=True)

    async def read_many(self, user_ids: Any) -> Any:
        return {user_id: TierRead(self.found, trusted=True) for user_id in user_ids}

    async def ticket(self, user_id: str) -> Ticket | None:
        return None

    async def fill(self, user_id: str, record: Versioned, ticket: Ticket) -> None: ...
    async def put(self, user_id: str, record: Versioned, ticket: Ticket | None) -> None: ...
    async def read_stale(self, user_id: str, seconds: float) -> Versioned | None:
        return None

    async def bury(self, user_id: str, version: int, me: str) -> Holders:
        return Holders(0, 0, {})

    async def holders(self, user_id: str, me: str) -> Holders:
        return Holders(0, 0, {})

    async def begin(self, me: str, head: str) -> Pass | None:
        return None

    async def renew(self, generation: bytes, head: str) -> None: ...
    async def repair(self, changes: Any) -> Any:
        return ()

    async def stamp(self, begun: Pass, cursor: str, seconds: float) -> bool:
        return False

    async def ping(self, me: str, seconds: float, seen: float, number: int) -> float:
        self.asked.append("ping")
        return 1.0

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[AsyncIterator[Notice]]:
        async def notices() -> AsyncIterator[Notice]:
            while True:
                yield await self.messages.get()

        yield notices()


class TierStore(MemoryStore):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.tier = Tier(Versioned(3, STATE))

    def capability(self, kind: Any) -> Any:
        return self.tier if kind is CacheTier else None


async def test_capabilities_fail_too() -> None:
    """What stands for an operation meets its faults; the rest of a tier meets outages."""
    store = Faults(TierStore(), error={"get_latest": 1.0})
    tier = store.capability(CacheTier)
    assert tier is not None
    assert tier.tier_name == "tier"
    assert tier.digest is store.inner.tier.digest  # type: ignore[attr-defined]
    with pytest.raises(UnavailableError):
        await tier.read("u-1")
    assert await tier.ping("me", 1, 0, 1) == 1.0
    with store.outage():
        with pytest.raises(UnavailableError):
            await tier.ping("me", 1, 0, 1)
        with pytest.raises(UnavailableError):
            async with tier.listen():
                pass


async def test_channel_breaks_in_an_outage() -> None:
    """A subscription that stands delivers until the outage, and then ends by raising."""
    store = Faults(TierStore())
    tier = store.capability(CacheTier)
    assert tier is not None
    messages = store.inner.tier.messages  # type: ignore[attr-defined]
    async with tier.listen() as notices:
        messages.put_nowait(Notice(b"d", 1))
        assert (await anext(notices)).version == 1
        store.outage()
        messages.put_nowait(Notice(b"d", 2))
        with pytest.raises(UnavailableError):
            await anext(notices)


async def test_corrupt_tier() -> None:
    """A damaged copy in a cache tier is not found, and nothing is raised."""
    store = Faults(TierStore(), corrupt=1.0)
    tier = store.capability(CacheTier)
    assert tier is not None
    assert (await tier.read("u-1")).found is None
    assert (await tier.read("u-1")).trusted
    assert (await tier.read_many(["u-1"]))["u-1"].found is None
    await store.inner.upsert_latest(STATE)
    assert await store.get_latest("u-1") is None
    assert await store.get_latest_many(["u-1"]) == {}
    assert await store.get_history("u-1", 1) == []


async def test_below_write_through() -> None:
    """Faults of the origin reach it through its versions, which WriteThrough calls directly."""
    origin = Faults(Recorded(MemoryStore()))
    stack = WriteThrough(MemoryStore(), origin=origin)
    origin.fail(1, operations=["upsert_latest"])
    with pytest.raises(UnavailableError):
        await stack.upsert_latest(STATE)
    assert origin.inner.operations == []  # type: ignore[attr-defined]
    await stack.upsert_latest(STATE)
    assert await stack.get_latest("u-1") == STATE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"error": 1.5}, "Faults.error: must be a share from 0 to 1"),
        ({"error": -0.1}, "Faults.error: must be a share from 0 to 1"),
        ({"error": True}, "Faults.error"),
        ({"error": float("nan")}, "Faults.error"),
        ({"slow": {"get_latest": 2}}, "Faults.slow: must be a share"),
        ({"hang": {"get_lates": 0.5}}, "Faults.hang: must be names of operations: delete, get_"),
        ({"error": 0.6, "slow": 0.6}, "at most 1 together"),
        ({"seed": 1.5}, "Faults.seed: must be an int"),
        ({"delay": -1}, "Faults.delay: must be a finite number of seconds"),
        ({"clock": None}, "Faults.clock: must be a Clock"),
        ({"corrupt": {"upsert_latest": 0.1}}, "Faults.corrupt: must name a read"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    """Each wrong option is a ConfigError that names it and its range."""
    with pytest.raises(ConfigError) as refused:
        Faults(MemoryStore(), **options)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda store: store.fail(0), "Faults.times"),
        (lambda store: store.fail(1, fault="explode"), "Faults.fault: must be one of 'error'"),
        (lambda store: store.fail(1, operations=["get"]), "Faults.operations"),
        (lambda store: store.outage("slow"), "Faults.fault: must be one of 'error', 'hang'"),
        (lambda store: store.outage(operations=["x"]), "Faults.operations"),
        (lambda store: store.fail(fault="corrupt", operations=["delete"]), "must name a read"),
        (lambda store: store.fail(error="gone"), "Faults.error: must be an exception"),
        (lambda store: store.fail(fault="slow", error=KeyError()), "Faults.error"),
    ],
)
def test_bad_scripts(call: Callable[[Faults], object], message: str) -> None:
    """A script that cannot work is refused when it is written."""
    with pytest.raises(ConfigError) as refused:
        call(Faults(MemoryStore()))
    assert message in str(refused.value)


def test_every_fault_has_an_option() -> None:
    """The shares are named as the faults are."""
    for fault in Fault:
        assert getattr(Faults(MemoryStore()), fault.value) == 0.0
    assert set(Op) == {Op(op) for op in Faults(MemoryStore())._shares}  # noqa: SLF001
