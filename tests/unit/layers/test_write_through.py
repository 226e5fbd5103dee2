"""WriteThrough without versions below: a tier that may fail, an origin that decides."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from layered_store.coherence.contract import CacheTier
from layered_store.coherence.outcomes import QUARANTINE_SECONDS
from layered_store.errors import (
    ClosedError,
    ConfigError,
    ErasureIncompleteError,
    OverloadedError,
    StoreError,
    StoreTimeoutError,
    UnavailableError,
    ValidationError,
)
from layered_store.health import HealthReport, HealthStatus
from layered_store.interface import Op, StateStore
from layered_store.layer import Layer
from layered_store.layers.bulkhead import Bulkhead
from layered_store.layers.cached import Cached
from layered_store.layers.prefixed import Prefixed
from layered_store.layers.ramp import Ramp
from layered_store.layers.timeout import Timeout
from layered_store.layers.write_through import WriteThrough
from layered_store.snapshot import StateSnapshot
from layered_store.stack import describe
from layered_store.stores.memory import MemoryStore
from layered_store.testing.clock import FakeClock, settle
from layered_store.testing.faults import Faults
from layered_store.testing.scripted import Gate, Scripted


def state(value: float = 0.5, user_id: str = "u-1") -> StateSnapshot:
    return StateSnapshot(user_id, 0, axes={"a": value})


OLD, NEW = state(0.1), state(0.2)


class Tier(StateStore):
    """A cache tier of two methods and delete, that can be switched off."""

    def __init__(self) -> None:
        self.states: dict[str, StateSnapshot] = {}
        self.up = True
        self.calls: list[Op] = []

    def _check(self, op: Op) -> None:
        self.calls.append(op)
        if not self.up:
            raise UnavailableError("the tier is down")

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        self._check(Op.UPSERT_LATEST)
        self.states[snapshot.user_id] = snapshot

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        self._check(Op.GET_LATEST)
        return self.states.get(user_id)

    async def delete(self, user_id: str) -> None:
        self._check(Op.DELETE)
        self.states.pop(user_id, None)


class Other(StateSnapshot, frozen=True):
    """Another class of snapshots."""


@pytest.mark.parametrize(
    ("option", "value"), [("origin", None), ("origin", MemoryStore), ("inner", "redis")]
)
def test_a_wrong_option_is_refused_by_name(option: str, value: object) -> None:
    """Each wrong value is a ConfigError that names class and option."""
    arguments: dict[str, Any] = {"inner": Tier(), "origin": MemoryStore(), option: value}
    with pytest.raises(ConfigError, match=f"WriteThrough.{option}"):
        WriteThrough(**arguments)


def test_a_store_in_front_of_itself_is_refused() -> None:
    """Each fill would be one more entry of the user's history."""
    store = MemoryStore()
    with pytest.raises(ConfigError, match=r"WriteThrough\.origin: must be another store"):
        WriteThrough(store, origin=store)


def test_both_must_keep_the_same_snapshots() -> None:
    """A copy of another class is no copy."""
    with pytest.raises(ConfigError, match="WriteThrough.snapshot_type") as caught:
        WriteThrough(Tier(), origin=MemoryStore(snapshot_type=Other))
    assert caught.value.option == "snapshot_type"


class Digested(Tier):
    """A tier that knows versions, keyed by a digest."""

    def __init__(self, fingerprint: str) -> None:
        super().__init__()
        self.fingerprint = fingerprint

    def capability(self, kind: type[Any]) -> Any:
        return self if kind is CacheTier else super().capability(kind)

    @property
    def digest(self) -> Any:
        return self


def test_both_must_be_keyed_by_the_same_digest() -> None:
    """Else no version of one side would be found on the other; an origin without versions has no
    digest to compare."""
    with pytest.raises(ConfigError, match="same digest_key=") as caught:
        WriteThrough(Digested("other"), origin=MemoryStore())
    assert (caught.value.option, caught.value.layer) == ("digest_key", "WriteThrough")
    assert "no versions" in str(describe(WriteThrough(Digested("other"), origin=Scripted())))


def test_a_prefix_around_one_side_is_told_as_what_it_is() -> None:
    """Neither side has a digest_key= that could be changed."""
    with pytest.raises(ConfigError, match=r"Prefixed.* around both alike, or around this layer"):
        WriteThrough(Digested(""), origin=Prefixed(MemoryStore(), prefix="acme"))


async def test_every_answer_is_counted_once() -> None:
    """Hits of the tier, misses and errors of it; what the origin failed on is an error."""
    tier, origin = Tier(), MemoryStore()
    store = WriteThrough(tier, origin=origin)

    def counted() -> dict[str, float]:
        kinds = {"hit", "miss", "error"}
        return {
            s.labels[0]: s.value
            for s in store.samples()
            if s.metric == "reads" and s.value and s.labels[0] in kinds
        }

    await store.upsert_latest_many([state(0.1), state(0.2, "u-2")])
    await store.get_latest("u-1")
    assert counted() == {"hit": 1}
    assert len(await store.get_latest_many(["u-1", "u-2", "nobody"])) == 2
    assert counted() == {"hit": 3, "miss": 1}
    tier.up = False
    await store.get_latest_many(["u-1", "u-2"])
    assert counted() == {"hit": 3, "miss": 1, "error": 2}
    await store.get_latest("u-1")
    assert counted() == {"hit": 3, "miss": 1, "error": 3}
    tier.up = True
    await origin.aclose()
    tier.states.clear()
    with pytest.raises(ClosedError):
        await store.get_latest("nobody")
    with pytest.raises(ClosedError):
        await store.get_latest_many(["no", "body"])
    assert counted()["miss"] == 1
    assert store._copies._turns.users == {}


async def test_a_batch_that_the_tier_has_does_not_reach_the_origin() -> None:
    """And of another one only those that are missing, which are then copied."""
    asked: list[list[str]] = []

    class Noting(MemoryStore):
        async def get_latest_many(self, user_ids: Any) -> dict[str, StateSnapshot]:
            asked.append(list(user_ids))
            return await super().get_latest_many(asked[-1])

    tier, origin = Tier(), Noting()
    store = WriteThrough(tier, origin=origin)
    await store.upsert_latest_many([state(0.1), state(0.2, "u-2")])
    await store.get_latest_many(["u-1", "u-2"])
    assert asked == []
    await origin.upsert_latest(state(0.3, "u-3"))
    await store.get_latest_many(["u-1", "u-3", "u-4"])
    assert asked == [["u-3", "u-4"]]
    assert set(tier.states) == {"u-1", "u-2", "u-3"}
    assert store._copies._turns.users == {}


@pytest.mark.parametrize("operation", ["upsert_latest", "upsert_latest_many", "delete"])
async def test_whatever_the_write_was_its_unknown_outcome_bars_the_copy(operation: str) -> None:
    """For as long as it may still take effect; a refused one bars it until the next read."""
    argument: Any = {"upsert_latest": NEW, "upsert_latest_many": [NEW], "delete": "u-1"}[operation]
    for error, barred in (
        (StoreTimeoutError(outcome_unknown=True), True),
        (OverloadedError("full"), False),
    ):
        clock, tier = FakeClock(), Tier()
        store = WriteThrough(tier, origin=Scripted(None, error, OLD, OLD), clock=clock)
        await store.upsert_latest(OLD)
        with pytest.raises(type(error)):
            await getattr(store, operation)(argument)
        assert await store.get_latest("u-1") == OLD  # the origin's
        tier.calls.clear()
        await store.get_latest("u-1")
        assert (Op.GET_LATEST in tier.calls) is not barred


async def test_while_a_write_is_under_way_its_copy_is_not_read() -> None:
    """Of each kind of write: the origin may have changed already."""
    for operation in ("upsert_latest", "upsert_latest_many", "delete"):
        argument: Any = {"upsert_latest": NEW, "upsert_latest_many": [NEW]}.get(operation, "u-1")
        gate, tier = Gate(), Tier()
        store = WriteThrough(tier, origin=Scripted(None, gate, NEW))
        await store.upsert_latest(OLD)
        write = asyncio.create_task(getattr(store, operation)(argument))
        await gate.entered.wait()
        assert await store.get_latest("u-1") == NEW
        gate.open()
        await write


async def test_the_health_report_takes_as_long_as_its_slower_side() -> None:
    """And has the lower status of the two."""

    class Took(Tier):
        def __init__(self, latency: float, status: HealthStatus) -> None:
            super().__init__()
            self.latency, self.status = latency, status

        async def health_report(self) -> HealthReport:
            return HealthReport("Took", self.status, self.latency)

    good, fair = HealthStatus.HEALTHY, HealthStatus.DEGRADED
    for one, two in ((Took(1, good), Took(3, fair)), (Took(3, fair), Took(1, good))):
        report = await WriteThrough(one, origin=two).health_report()
        assert (report.status, report.latency_ms) == (fair, 3)


async def test_reads_fill_the_tier_and_writes_go_to_both() -> None:
    """The origin's state is copied on a miss, replaced by a write, removed by a delete."""
    tier, origin = Tier(), MemoryStore()
    store = WriteThrough(tier, origin=origin)
    await origin.upsert_latest(OLD)
    assert await store.get_latest("u-1") == OLD
    assert tier.states == {"u-1": OLD}
    await store.upsert_latest(NEW)
    assert tier.states == {"u-1": NEW}
    assert await origin.get_latest("u-1") == NEW
    assert await store.get_history("u-1", 9) == [NEW, OLD]
    await store.upsert_latest_many([state(0.3), state(0.4, "u-2"), state(0.5)])
    assert tier.states == {"u-1": state(0.5), "u-2": state(0.4, "u-2")}
    tier.states.clear()
    assert set(await store.get_latest_many(["u-1", "u-2", "u-3"])) == {"u-1", "u-2"}
    assert set(tier.states) == {"u-1", "u-2"}
    await store.delete("u-1")
    assert set(tier.states) == {"u-2"}
    assert await store.get_history("u-1", 9) == []


async def test_a_write_is_acknowledged_by_the_origin_alone() -> None:
    """A failing origin fails the write; a failing tier does not, and is not read for that user."""
    tier, origin = Tier(), MemoryStore()
    store = WriteThrough(tier, origin=origin)
    await store.upsert_latest(OLD)
    tier.up = False
    await store.upsert_latest(NEW)
    assert await store.get_latest("u-1") == NEW
    tier.up = True
    assert tier.states == {"u-1": OLD}
    assert await store.get_latest("u-1") == NEW
    assert tier.states == {"u-1": NEW}
    before = len(tier.calls)
    assert await store.get_latest("u-1") == NEW
    assert tier.calls[before:] == [Op.GET_LATEST]


async def test_a_failing_write_of_the_origin_leaves_no_copy_to_be_read() -> None:
    """Its outcome is unknown: until it must have ended, nobody reads or fills the copy."""
    clock, tier = FakeClock(), Tier()
    down = StoreTimeoutError(outcome_unknown=True)
    origin = Scripted(None, down, OLD, NEW, NEW)
    store = WriteThrough(tier, origin=origin, clock=clock)
    await store.upsert_latest(OLD)
    with pytest.raises(StoreTimeoutError):
        await store.upsert_latest(NEW)
    assert await store.get_latest("u-1") == OLD
    assert await store.get_latest("u-1") == NEW
    assert tier.states == {"u-1": OLD}
    await clock.advance(5)
    assert await store.get_latest("u-1") == NEW
    assert tier.states == {"u-1": NEW}


async def test_a_refused_write_leaves_the_copy_alone_for_no_longer_than_a_read() -> None:
    """A refusal took no effect: the next read may fill again."""
    tier = Tier()
    store = WriteThrough(tier, origin=Scripted(None, OverloadedError(), OLD))
    await store.upsert_latest(OLD)
    with pytest.raises(OverloadedError):
        await store.upsert_latest(NEW)
    assert await store.get_latest("u-1") == OLD
    assert store._copies.pending == 0


@pytest.mark.parametrize("way", ["one", "many"])
async def test_a_write_that_an_origin_behind_a_layer_refused_is_not_put_in_the_tier(
    way: str,
) -> None:
    """It began before the user was erased, and must not bring the user back."""
    gate = Gate()

    class Slow(Layer):
        async def delete(self, user_id: str) -> None:
            await gate.pass_through()
            await super().delete(user_id)

    tier, origin = Tier(), MemoryStore()
    store = WriteThrough(tier, origin=Slow(origin))
    await store.upsert_latest(OLD)
    erasure = asyncio.create_task(store.delete("u-1"))
    await gate.entered.wait()
    write = asyncio.create_task(
        store.upsert_latest(NEW) if way == "one" else store.upsert_latest_many([NEW])
    )
    await settle()
    gate.open()
    await asyncio.gather(erasure, write)
    assert await origin.get_latest("u-1") is None
    assert tier.states == {}
    assert await store.get_latest("u-1") is None
    await store.upsert_latest(NEW)
    assert tier.states == {"u-1": NEW}
    assert store._copies.pending == 0


@pytest.mark.parametrize("way", ["one", "many"])
async def test_an_erasure_that_misses_the_tier_says_so_and_is_never_shown(way: str) -> None:
    """The error names the tier, the copy is not read, and repeating the delete completes it."""
    tier, origin = Tier(), MemoryStore()
    store = WriteThrough(tier, origin=origin)
    await store.upsert_latest(NEW)
    tier.up = False
    with pytest.raises(ErasureIncompleteError) as caught:
        await store.delete("u-1")
    assert caught.value.pending == ("Tier",)
    assert (caught.value.layer, caught.value.operation) == ("WriteThrough", "delete")
    assert caught.value.retryable
    assert "u-1" not in str(caught.value)
    tier.up = True
    assert tier.states == {"u-1": NEW}
    if way == "one":
        assert await store.get_latest("u-1") is None
    else:
        assert await store.get_latest_many(["u-1"]) == {}
    await store.delete("u-1")
    assert tier.states == {}


async def test_an_erasure_that_misses_the_origin_fails_as_the_origin_did() -> None:
    """Nothing was promised, and the copy is not believed any more."""
    tier = Tier()
    store = WriteThrough(tier, origin=Scripted(None, UnavailableError("origin"), None))
    await store.upsert_latest(NEW)
    with pytest.raises(UnavailableError, match="origin"):
        await store.delete("u-1")
    assert await store.get_latest("u-1") is None


async def test_reads_go_on_while_the_tier_is_down() -> None:
    """Alone and in bulk; the errors are counted as such and never as misses."""
    tier, origin = Tier(), MemoryStore()
    store = WriteThrough(tier, origin=origin)
    await origin.upsert_latest(NEW)
    tier.up = False
    assert await store.get_latest("u-1") == NEW
    assert await store.get_latest_many(["u-1", "u-2"]) == {"u-1": NEW}
    reads = {s.labels[0]: s.value for s in store.samples() if s.metric == "reads"}
    assert {result: count for result, count in reads.items() if count} == {"error": 3}


async def test_a_burst_while_the_tier_is_down_passes_a_bulkhead_in_order() -> None:
    """An origin that does not bound itself is given a limit: the rest wait, nobody is refused."""
    tier, inside, most = Tier(), 0, 0
    tier.up = False

    class Origin(MemoryStore):
        async def get_latest(self, user_id: str) -> StateSnapshot | None:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0)
            inside -= 1
            return await super().get_latest(user_id)

    origin = Bulkhead(Origin(), max_in_flight=8, max_waiting=10_000)
    store = WriteThrough(tier, origin=origin)
    found = await asyncio.gather(*(store.get_latest(f"u-{n}") for n in range(10_000)))
    assert found == [None] * 10_000
    assert most == 8


@pytest.mark.parametrize("write", ["upsert", "delete"])
async def test_a_fill_that_began_before_a_write_never_lands_after_it(write: str) -> None:
    """The reader gets what it read; the copy is the writer's."""
    tier, gate = Tier(), Gate()
    store = WriteThrough(tier, origin=Scripted(gate))
    early = asyncio.create_task(store.get_latest("u-1"))
    await gate.entered.wait()
    await (store.upsert_latest(NEW) if write == "upsert" else store.delete("u-1"))
    gate.open(OLD)
    assert await early == OLD
    assert tier.states == ({"u-1": NEW} if write == "upsert" else {})


@pytest.mark.parametrize("write", ["upsert", "delete"])
async def test_a_fill_that_began_during_a_write_never_lands_after_it(write: str) -> None:
    """It may have read the origin before the write took effect."""
    tier, writing, reading = Tier(), Gate(), Gate()
    store = WriteThrough(tier, origin=Scripted(writing, reading))
    call = store.upsert_latest(NEW) if write == "upsert" else store.delete("u-1")
    written = asyncio.create_task(call)
    await writing.entered.wait()
    early = asyncio.create_task(store.get_latest("u-1"))
    await reading.entered.wait()
    writing.open()
    await written
    reading.open(OLD)
    assert await early == OLD
    assert tier.states == ({"u-1": NEW} if write == "upsert" else {})


@pytest.mark.parametrize("write", ["upsert", "delete"])
async def test_a_write_that_meets_a_fill_is_what_the_tier_has_afterwards(write: str) -> None:
    """However slowly the tier takes what was read before."""
    gate = Gate()

    class Slow(Tier):
        async def upsert_latest(self, snapshot: StateSnapshot) -> None:
            if snapshot == OLD:
                await gate.pass_through()
            await super().upsert_latest(snapshot)

    tier, origin = Slow(), MemoryStore()
    await origin.upsert_latest(OLD)
    store = WriteThrough(tier, origin=origin)
    reading = asyncio.create_task(store.get_latest("u-1"))
    await gate.entered.wait()
    call = store.upsert_latest(NEW) if write == "upsert" else store.delete("u-1")
    writing = asyncio.create_task(call)
    await settle()
    gate.open()
    assert await reading == OLD
    await writing
    assert tier.states == ({"u-1": NEW} if write == "upsert" else {})


async def test_overlapping_writes_leave_origin_and_tier_with_one_winner() -> None:
    """The second waits for the first, so both sides see one order."""
    tier, gate = Tier(), Gate()
    origin = Scripted(gate)
    store = WriteThrough(tier, origin=origin)
    first = asyncio.create_task(store.upsert_latest(OLD))
    await gate.entered.wait()
    second = asyncio.create_task(store.upsert_latest(NEW))
    await settle()
    assert origin.calls == [Op.UPSERT_LATEST]
    gate.open()
    await asyncio.gather(first, second)
    assert tier.states == {"u-1": NEW}


async def test_batches_of_the_same_users_never_wait_for_each_other() -> None:
    """Turns are taken in one order, however the batches name their users."""
    store = WriteThrough(Tier(), origin=MemoryStore())
    users = [f"u-{index}" for index in range(20)]
    batches = [[state(user_id=user) for user in users[::step]] for step in (1, -1)] * 10
    await asyncio.wait_for(asyncio.gather(*map(store.upsert_latest_many, batches)), 5)
    assert not store._copies._turns.users


async def test_a_cancelled_writer_lets_the_next_one_in() -> None:
    """Waiting or writing: no turn is lost."""
    gate = Gate()
    store = WriteThrough(Tier(), origin=Scripted(gate))
    tasks = [asyncio.create_task(store.upsert_latest(OLD)) for _ in range(3)]
    await gate.entered.wait()
    tasks[1].cancel()
    await settle()
    tasks[0].cancel()
    await asyncio.wait_for(tasks[2], 1)
    assert not store._copies._turns.users


@pytest.mark.parametrize(
    "build",
    [
        lambda origin: WriteThrough(Tier(), origin=origin),
        lambda inner: Ramp(inner, alternative=MemoryStore()),
    ],
    ids=["write_through", "ramp"],
)
@pytest.mark.parametrize("first", ["upsert", "batch", "delete"])
async def test_the_waits_of_one_users_writers_do_not_add_up(build: Any, first: str) -> None:
    """Behind a store that hangs each fails within a few of its time limits, however many wait."""
    clock, faults = FakeClock(), Faults(MemoryStore())
    stack = build(Timeout(faults, seconds=1.0, clock=clock))
    kinds = {
        "upsert": lambda: stack.upsert_latest(NEW),
        "batch": lambda: stack.upsert_latest_many([state(user_id="u-0"), NEW]),
        "delete": lambda: stack.delete("u-1"),
    }
    with faults.outage("hang"):
        calls = [asyncio.create_task(kinds[first]()) for _ in range(2)]
        await settle()
        calls += [asyncio.create_task(kind()) for kind in kinds.values() for _ in range(20)]
        await settle()
        for _ in range(3):  # batches wait for two users
            await clock.advance(1.0)
        assert all(call.done() for call in calls)
    errors = [call.exception() for call in calls]
    unsent = [each for each in errors if isinstance(each, StoreTimeoutError) and each.user_id]
    assert len(unsent) >= len(calls) - 3
    assert not any(each.outcome_unknown for each in unsent)
    await stack.upsert_latest(NEW)
    assert await stack.get_latest("u-1") == NEW


async def test_a_tier_that_hangs_costs_a_batch_one_time_limit() -> None:
    """However many users it has; those that were not tried are read from the origin."""
    clock, faults, origin = FakeClock(), Faults(MemoryStore()), MemoryStore()
    stack = WriteThrough(Timeout(faults, seconds=1.0, clock=clock), origin=origin, clock=clock)
    users = [f"u-{number}" for number in range(20)]
    old, new = ([state(value, user) for user in users] for value in (0.1, 0.2))
    await stack.upsert_latest_many(old)
    with faults.outage("hang"):
        call = asyncio.create_task(stack.upsert_latest_many(new))
        await settle()
        await clock.advance(1.0)
        assert call.done()
    assert await stack.get_latest_many(users) == dict(zip(users, new, strict=True))
    await clock.advance(QUARANTINE_SECONDS)
    assert await stack.get_latest_many(users) == dict(zip(users, new, strict=True))
    assert stack._copies.pending == 0
    assert await faults.inner.get_latest_many(users) == dict(zip(users, new, strict=True))


async def test_a_tier_whose_writes_hang_costs_a_read_of_many_one_time_limit() -> None:
    """What was not tried is filled by another reader."""
    clock, faults, origin = FakeClock(), Faults(MemoryStore()), MemoryStore()
    stack = WriteThrough(Timeout(faults, seconds=1.0, clock=clock), origin=origin, clock=clock)
    users = [f"u-{number}" for number in range(20)]
    await origin.upsert_latest_many([state(user_id=user) for user in users])
    with faults.outage("hang", operations=["upsert_latest"]):
        call = asyncio.create_task(stack.get_latest_many(users))
        await settle()
        await clock.advance(1.0)
        assert call.done()
        assert list(call.result()) == users
    assert not stack._copies._turns.users
    await clock.advance(QUARANTINE_SECONDS)
    await stack.get_latest_many(users)
    assert len(await faults.inner.get_latest_many(users)) == len(users)


@pytest.mark.parametrize(
    ("build", "raised"),
    [
        (lambda second: WriteThrough(second, origin=MemoryStore()), 0),
        (lambda second: Ramp(MemoryStore(), alternative=second), 0),
        (lambda second: Ramp(MemoryStore(), alternative=second, share=1.0), 20),
    ],
    ids=["write_through", "ramp", "ramp, in the share"],
)
async def test_a_second_store_that_hangs_is_waited_for_twice_at_most(
    build: Any, raised: int
) -> None:
    """By the writers of one user together: the write stands, or fails, without it."""
    clock, faults = FakeClock(), Faults(MemoryStore())
    stack = build(Timeout(faults, seconds=1.0, clock=clock))
    with faults.outage("hang"):
        calls = [
            asyncio.create_task(stack.upsert_latest(state(n / 100))) for n in range(20)
        ]
        await settle()
        for _ in range(2):
            await clock.advance(1.0)
        assert all(call.done() for call in calls)
    errors = [error for call in calls if (error := call.exception()) is not None]
    assert len(errors) == raised
    assert all(isinstance(e, UnavailableError) and e.outcome_unknown for e in errors)
    assert await stack.get_latest("u-1") == state(0.19)
    await stack.upsert_latest(NEW)
    assert await stack.get_latest("u-1") == NEW


@pytest.mark.parametrize(
    "build",
    [
        lambda second: WriteThrough(second, origin=MemoryStore()),
        lambda second: Ramp(MemoryStore(), alternative=second),
    ],
    ids=["write_through", "ramp"],
)
async def test_erasures_wait_twice_at_most_for_a_second_store_that_hangs(build: Any) -> None:
    """Each erases in the first one, and says that the second may still hold the user."""
    clock, faults = FakeClock(), Faults(MemoryStore())
    stack = build(Timeout(faults, seconds=1.0, clock=clock))
    await stack.upsert_latest(OLD)
    with faults.outage("hang"):
        calls = [asyncio.create_task(stack.delete("u-1")) for _ in range(20)]
        calls.append(asyncio.create_task(stack.upsert_latest(NEW)))
        calls.append(asyncio.create_task(stack.delete("u-1")))
        await settle()
        await clock.advance(1.0)
        assert await stack.get_latest("u-1") is None
        await clock.advance(1.0)
        assert all(call.done() for call in calls)
    errors = [error for call in calls if (error := call.exception()) is not None]
    assert len(errors) == 21
    for error in errors:
        assert isinstance(error, ErasureIncompleteError)
        assert error.pending == ("MemoryStore",)
    assert await stack.get_latest("u-1") is None
    await stack.delete("u-1")
    assert await faults.inner.get_latest("u-1") is None


@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
async def test_a_second_store_that_hung_is_tried_again_while_others_wait(many: bool) -> None:
    """Though there are always some behind the writes that are spared it."""
    clock = FakeClock()
    inner, faults = Faults(MemoryStore(), slow=1.0, delay=1.0, clock=clock), Faults(MemoryStore())
    stack = Ramp(inner, alternative=Timeout(faults, seconds=5.0, clock=clock), share=1.0)
    users = ("u-0", "u-1", "u-2")

    def begin(number: int) -> asyncio.Task[None]:
        # Each shares a user with the next, and none with the one after that.
        states = [state(user_id=users[number % 3]), state(user_id=users[(number + 1) % 3])]
        write = stack.upsert_latest_many(states) if many else stack.upsert_latest(NEW)
        return asyncio.create_task(write)

    with faults.outage("hang"):
        calls = [begin(number) for number in range(9)]
        await clock.advance(12.5)
    for number in range(30):
        calls.append(begin(number))
        await clock.advance(0.9)
    await clock.advance(30.0)
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(results[0], UnavailableError)
    assert results[-10:] == [None] * 10


async def test_a_copy_that_the_tier_did_not_take_is_not_believed() -> None:
    """The tier erased after the write began and holds a later one's state; the origin decides."""
    gate = asyncio.Event()

    class Slow(MemoryStore):
        async def write(self, snapshot: StateSnapshot) -> Any:
            await gate.wait()
            return await super().write(snapshot)

    tier, origin = MemoryStore(), Slow()
    cache = Cached(WriteThrough(tier, origin=origin), ttl=60)
    task = asyncio.create_task(cache.upsert_latest(NEW))
    await settle()
    await tier.delete("u-1")
    await tier.upsert_latest(OLD)
    gate.set()
    await task
    assert await origin.get_latest("u-1") == NEW
    assert await tier.get_latest("u-1") == OLD
    for _ in range(2):
        assert await cache.inner.get_latest("u-1") == NEW
        assert await cache.get_latest("u-1") == NEW
        assert await tier.get_latest("u-1") == NEW


async def test_a_write_that_was_erased_before_it_returned_is_not_cached() -> None:
    """By another stack over the same stores: after the origin had it, and before the tier did."""
    gate = Gate()

    class Slow(MemoryStore):
        async def write(self, snapshot: StateSnapshot) -> Any:
            record = await super().write(snapshot)
            await gate.pass_through()
            return record

    tier, origin = MemoryStore(), Slow()
    cache = Cached(WriteThrough(tier, origin=origin), ttl=60)
    writing = asyncio.create_task(cache.upsert_latest(NEW))
    await gate.entered.wait()
    await WriteThrough(tier, origin=origin).delete("u-1")
    gate.open()
    await writing
    assert await cache.get_latest("u-1") is None


async def test_doubts_are_bounded() -> None:
    """More doubtful users than can be kept apart: every copy is doubtful until it is put right, so
    that the tier is of use again after a long outage."""
    clock, tier = FakeClock(), Tier()
    store = WriteThrough(tier, origin=MemoryStore(clock=clock), clock=clock)
    await store.upsert_latest(OLD)
    store._copies.doubt("x-0", quarantine=True)
    for index in range(1, 100_001):
        store._copies.doubt(f"x-{index}")
    assert store._copies.pending == 100_000
    for _ in range(2):
        before = len(tier.calls)
        assert await store.get_latest("u-1") == OLD
        # A write of one of those that were forgotten may still take effect.
        assert tier.calls[before:] == []
    await clock.advance(QUARANTINE_SECONDS)
    assert await store.get_latest("u-1") == OLD
    assert tier.calls[before:] == [Op.UPSERT_LATEST]
    assert await store.get_latest("u-1") == OLD
    assert tier.calls[before + 1 :] == [Op.GET_LATEST]
    for index in range(100_001):
        store._copies._clear(f"y-{index}")
    assert len(store._copies._right) == 100_000


@pytest.mark.parametrize(
    ("tier", "origin", "status"),
    [
        (True, True, HealthStatus.HEALTHY),
        (False, True, HealthStatus.DEGRADED),
        (True, False, HealthStatus.UNHEALTHY),
        (False, False, HealthStatus.UNHEALTHY),
    ],
)
@pytest.mark.parametrize("form", ["write_through", "cached"])
async def test_health(form: str, tier: bool, origin: bool, status: HealthStatus) -> None:
    """Unhealthy when the origin is, degraded when only the tier is."""
    inner, record = Scripted(healthy=tier), Scripted(healthy=origin)
    store = (
        WriteThrough(inner, origin=record)
        if form == "write_through"
        else Cached(inner, fallback=record)
    )
    report = await store.health_report()
    assert report.status is status
    assert await store.health_check() is (status is not HealthStatus.UNHEALTHY)


async def test_bad_arguments_reach_neither_side() -> None:
    """Validation comes first."""
    tier, origin = Tier(), Scripted()
    store = WriteThrough(tier, origin=origin)
    for call in (
        store.get_latest("a b"),
        store.get_latest_many(["u-1", ""]),
        store.delete(""),
        store.upsert_latest(StateSnapshot("u-1", axes={"a": 7})),
        store.upsert_latest_many([NEW, StateSnapshot("", axes={})]),
    ):
        with pytest.raises(ValidationError):
            await call
    assert (tier.calls, origin.calls) == ([], [])


async def test_closing_closes_both_even_when_one_fails() -> None:
    """And twice is fine."""

    class Failing(Tier):
        async def aclose(self) -> None:
            raise UnavailableError("cannot close")

    origin = MemoryStore()
    store = WriteThrough(Failing(), origin=origin)
    with pytest.raises(UnavailableError):
        await store.aclose()
    for closed in (store, origin):
        with pytest.raises(ClosedError):
            await closed.get_latest("u-1")


async def test_opening_needs_the_origin_only() -> None:
    """A tier that is away comes up later; a mistake is told at once."""

    class Opening(Scripted):
        def __init__(self, error: Exception | None) -> None:
            super().__init__()
            self.error = error

        async def open(self) -> None:
            if self.error is not None:
                raise self.error

    async with WriteThrough(Opening(UnavailableError()), origin=Opening(None)):
        pass
    for tier, origin in ((None, UnavailableError()), (ZeroDivisionError(), None)):
        with pytest.raises((StoreError, ZeroDivisionError)):
            await WriteThrough(Opening(tier), origin=Opening(origin)).open()


def test_describe_says_how_far_it_holds() -> None:
    """Without versions below, within this process only."""
    assert "this process" in str(describe(WriteThrough(Tier(), origin=MemoryStore())))


@pytest.mark.parametrize("error", [KeyError("x"), ConnectionResetError(), TimeoutError()])
async def test_whatever_a_tier_from_elsewhere_raises_the_origin_serves(error: Exception) -> None:
    """A driver's error that nobody translated: writes are acknowledged, an erasure says so."""

    class Elsewhere(Tier):
        def _check(self, op: Op) -> None:
            self.calls.append(op)
            if not self.up:
                raise error

    clock, tier, origin = FakeClock(), Elsewhere(), MemoryStore()
    stack = WriteThrough(Timeout(tier, seconds=1), origin=origin, clock=clock)
    await stack.upsert_latest(OLD)
    tier.up = False
    await stack.upsert_latest(NEW)
    await stack.upsert_latest_many([state(0.3, "u-2")])
    assert await stack.get_latest("u-1") == NEW
    assert set(await stack.get_latest_many(["u-1", "u-2", "u-3"])) == {"u-1", "u-2"}
    with pytest.raises(ErasureIncompleteError) as caught:
        await stack.delete("u-2")
    assert caught.value.pending == ("Elsewhere",)
    assert caught.value.__cause__ is error
    assert await origin.get_latest("u-2") is None
    failed = {s.labels[0]: s.value for s in stack.samples() if s.metric == "tier_failures"}
    assert failed == {"read": 1, "write": 2, "erase": 1, "ping": 0, "repair": 0}
    tier.up = True
    assert await stack.get_latest("u-1") == NEW  # not what the tier missed
    await clock.advance(QUARANTINE_SECONDS)
    await stack.delete("u-2")
    assert await stack.get_latest("u-1") == NEW
    assert tier.states == {"u-1": NEW}


@pytest.mark.parametrize("answer", [None, [], 5, {"u-1": {"user_id": "u-1"}}, {"u-1": OLD, "x": 1}])
async def test_a_batch_from_elsewhere_that_makes_no_sense_is_a_miss(answer: object) -> None:
    """The origin answers for all whom the tier did not."""

    class Elsewhere(Tier):
        async def get_latest_many(self, user_ids: Any) -> Any:
            return answer

    stack = WriteThrough(Elsewhere(), origin=MemoryStore())
    await stack.upsert_latest_many([OLD, state(0.3, "u-2")])
    found = await stack.get_latest_many(["u-1", "u-2"])
    assert list(found) == ["u-1", "u-2"]
    assert all(type(snapshot) is StateSnapshot for snapshot in found.values())
