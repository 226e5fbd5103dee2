"""WriteThrough above a tier and an origin with versions: every operation takes their way.

The rules of that way are judged by the simulation and on Redis; here, that nothing passes it by.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from layered_store.call import current_call
from layered_store.coherence.contract import (
    TRUST_SECONDS,
    Authority,
    CacheTier,
    Change,
    Holders,
    Invalidations,
    Notice,
    Pass,
    Ticket,
    TierRead,
    Versioned,
)
from layered_store.errors import (
    ClosedError,
    ConfigError,
    CorruptDataError,
    ErasureIncompleteError,
    UnavailableError,
)
from layered_store.health import HealthReport, HealthStatus
from layered_store.identity import digest_function
from layered_store.interface import StateStore
from layered_store.layers.cached import Cached
from layered_store.layers.retry import Retry
from layered_store.layers.write_through import WriteThrough
from layered_store.snapshot import StateSnapshot
from layered_store.stack import describe, staleness
from layered_store.stores.memory import MemoryStore
from layered_store.stores.redis import RedisStore
from layered_store.testing.clock import FakeClock, settle


def state(value: float = 0.5, user_id: str = "u-1") -> StateSnapshot:
    return StateSnapshot(user_id, 0, axes={"a": value})


OLD, NEW = state(0.1), state(0.2)
TICKET = Ticket(b"token", b"generation")


class Shelf(CacheTier):
    """A tier that is trusted always and never forgets, for one process."""

    digest = MemoryStore.digest
    tier_name = "shelf"
    has_channel = False

    def __init__(self) -> None:
        self.copies: dict[str, Versioned] = {}
        self.calls: list[str] = []
        self.error: Exception | None = None
        self.messages: asyncio.Queue[Notice] = asyncio.Queue()
        self.gone: list[Change] = []
        self.cursor = ""

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if self.error is not None:
            raise self.error

    async def read(self, user_id: str) -> TierRead:
        self._called("read")
        return TierRead(self.copies.get(user_id), TICKET, trusted=True)

    async def read_many(self, user_ids: Sequence[str]) -> Mapping[str, TierRead]:
        self._called("read_many")
        return {each: TierRead(self.copies.get(each), TICKET, trusted=True) for each in user_ids}

    async def read_stale(self, user_id: str, seconds: float) -> Versioned | None:  # noqa: ARG002
        return self.copies.get(user_id)

    async def ticket(self, user_id: str) -> Ticket | None:  # noqa: ARG002
        self._called("ticket")
        return TICKET

    async def fill(self, user_id: str, record: Versioned, ticket: Ticket) -> None:  # noqa: ARG002
        self._called("fill")
        self.copies[user_id] = record

    async def put(self, user_id: str, record: Versioned, ticket: Ticket | None) -> None:  # noqa: ARG002
        self._called("put")
        self.copies[user_id] = record

    async def bury(self, user_id: str, version: int, me: str) -> Holders:  # noqa: ARG002
        self._called("bury")
        self.copies[user_id] = Versioned(version, None)
        return Holders(1.0, 100.0, {})

    async def holders(self, user_id: str, me: str) -> Holders:  # noqa: ARG002
        return Holders(1.0, 100.0, {})

    async def begin(self, me: str, head: str) -> Pass | None:
        self._called("begin")
        return Pass(0.0, b"generation", self.cursor or head, fresh=False, owner=me)

    async def renew(self, generation: bytes, head: str) -> None: ...

    async def repair(self, changes: Sequence[Change]) -> Sequence[Change]:
        self.gone += changes
        return changes

    async def stamp(self, begun: Pass, cursor: str, seconds: float) -> bool:  # noqa: ARG002
        self.cursor = cursor
        return True

    async def ping(self, me: str, seconds: float, seen: float, number: int) -> float:  # noqa: ARG002
        if seconds > 0:
            self.messages.put_nowait(Notice(b"", number, echo=me))
        return TRUST_SECONDS

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[AsyncIterator[Notice]]:
        async def notices() -> AsyncIterator[Notice]:
            while True:
                notice = await self.messages.get()
                if notice.version < 0:
                    raise UnavailableError("the channel broke")
                yield notice

        yield notices()


class Speaking(Shelf):
    """One with an invalidation channel."""

    has_channel = True


class Holder(MemoryStore):
    """The store that offers a tier; its own operations are not to be used."""

    def __init__(self, tier: Shelf) -> None:
        super().__init__()
        self.tier = tier

    def capability(self, kind: Any) -> Any:
        return self.tier if kind is CacheTier else None

    async def _never(self, *_: object) -> Any:
        raise AssertionError("the store was asked past its tier")

    get_latest = get_latest_many = upsert_latest = upsert_latest_many = delete = _never


def build(
    tier: Shelf | None = None, origin: StateStore | None = None
) -> tuple[WriteThrough, Shelf, Any, FakeClock]:
    clock, tier = FakeClock(), tier or Shelf()
    record: Any = MemoryStore(clock=clock) if origin is None else origin
    return WriteThrough(Holder(tier), origin=record, clock=clock), tier, record, clock


def sampled(store: StateStore) -> dict[tuple[str, ...], float]:
    return {(s.metric, *s.labels): s.value for s in store.samples()}


async def test_every_operation_goes_by_the_versions() -> None:
    """Reads come from the copies, writes number them, an erasure leaves a tombstone: and each of
    them passes by what is kept for tiers without versions."""
    store, tier, origin, _ = build()
    await store.upsert_latest(OLD)
    assert tier.copies["u-1"] == await origin.read("u-1")
    await store.upsert_latest_many([NEW, state(0.3, "u-2")])
    assert tier.copies["u-1"].version == 2
    assert tier.copies["u-2"].snapshot == state(0.3, "u-2")
    await origin.upsert_latest(state(0.9))  # past the stack: only the copy can tell
    assert await store.get_latest("u-1") == NEW
    found = await store.get_latest_many(["u-2", "u-1"])
    assert list(found.items()) == [("u-2", state(0.3, "u-2")), ("u-1", NEW)]
    await store.delete("u-1")
    assert tier.copies["u-1"].snapshot is None
    assert await origin.get_latest("u-1") is None
    assert await store.get_latest("u-1") is None
    assert await store.get_latest_many(["u-1"]) == {}
    assert store._copies._turns.users == {}
    assert store._copies.pending == 0
    await store.aclose()


async def test_a_write_is_one_call_for_origin_and_tier() -> None:
    """Begun before either is asked: what erases in between wins."""
    begun: list[Any] = []

    class Noting(MemoryStore):
        async def write(self, snapshot: StateSnapshot) -> Versioned:
            begun.append(current_call())
            return await super().write(snapshot)

        async def write_many(self, snapshots: Sequence[StateSnapshot]) -> Mapping[str, Versioned]:
            begun.append(current_call())
            return await super().write_many(snapshots)

        async def erase(self, user_id: str, tiers: Sequence[str] = ()) -> int:
            begun.append(current_call())
            return await super().erase(user_id, tiers)

    class Asked(Shelf):
        async def ticket(self, user_id: str) -> Ticket | None:
            begun.append(current_call())
            return await super().ticket(user_id)

        async def bury(self, user_id: str, version: int, me: str) -> Holders:
            begun.append(current_call())
            return await super().bury(user_id, version, me)

    store, _, _, _ = build(Asked(), Noting())
    await store.upsert_latest(OLD)
    assert len(begun) == 2
    assert begun[0] is begun[1]
    begun.clear()
    await store.upsert_latest_many([NEW])
    assert len(begun) == 2
    assert begun[0] is begun[1]
    begun.clear()
    await store.delete("u-1")
    assert len(begun) == 2
    assert begun[0] is begun[1]
    await store.aclose()


async def test_opening_has_the_copies_repaired() -> None:
    """So that the first call is answered from them; closing ends all that runs."""
    before = asyncio.all_tasks()
    store, tier, _, _ = build()
    async with store:
        assert tier.calls == ["read", "begin"]  # the first shows that somebody is there
        assert asyncio.all_tasks() > before
    await settle()
    assert asyncio.all_tasks() == before
    for call in (store.get_latest("u-1"), store.upsert_latest(OLD), store.delete("u-1")):
        with pytest.raises(ClosedError):
            await call


async def test_while_it_closes_nothing_begins() -> None:
    """The tier is told first that nothing is held here any more, which takes its time."""
    leaving, gate = asyncio.Event(), asyncio.Event()

    class Slow(Speaking):
        async def ping(self, me: str, seconds: float, seen: float, number: int) -> float:
            if seconds < 0:
                leaving.set()
                await gate.wait()
            return await super().ping(me, seconds, seen, number)

    store, _, _, clock = build(Slow())
    cache = Cached(store, clock=clock)
    await cache.get_latest("u-1")
    closing = asyncio.create_task(store.aclose())
    await leaving.wait()
    with pytest.raises(ClosedError):
        await store.get_latest("u-1")
    gate.set()
    await closing
    await cache.aclose()


async def test_it_closes_at_the_very_moment_when_the_channel_breaks() -> None:
    """The listener that tidies up after a loss is cancelled, and does not begin again."""
    tidying, gate = asyncio.Event(), asyncio.Event()

    class Hanging(Speaking):
        async def ping(self, me: str, seconds: float, seen: float, number: int) -> float:
            if number > 1:
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    tidying.set()
                    await gate.wait()
                    raise
            return await super().ping(me, seconds, seen, number)

    store, tier, _, clock = build(Hanging())
    cache = Cached(store, clock=clock)
    await cache.get_latest("u-1")
    await clock.advance(1)
    tier.messages.put_nowait(Notice(b"", -1))
    await tidying.wait()
    closing = asyncio.create_task(cache.aclose())
    await settle()
    gate.set()
    await settle()
    await clock.advance(5)
    assert closing.done()
    await closing


async def test_the_channel_of_the_tier_is_offered_to_the_cache_above() -> None:
    """Where there is one, and nothing else is; a cache without one says for how long it is old."""
    store, tier, _, clock = build(Speaking())
    assert store.capability(Invalidations) is store._guard
    assert store.capability(CacheTier) is None
    assert store.capability(WriteThrough) is store
    cache = Cached(store, ttl=600, clock=clock)
    await cache.upsert_latest(OLD)
    await settle()
    tier.calls.clear()
    assert await cache.get_latest("u-1") == OLD
    assert tier.calls == []
    figures = sampled(store)
    assert figures["channel_up",] == 1
    assert (await cache.health_report()).status is HealthStatus.HEALTHY
    tier.messages.put_nowait(Notice(b"", -1))
    await settle()
    figures = sampled(store)
    assert (figures["channel_up",], figures["channel_losses",]) == (0, 1)
    (report,) = (await cache.health_report()).children
    assert report.status is HealthStatus.DEGRADED
    assert "channel" in report.message
    await cache.aclose()
    quiet, _, _, _ = build()
    assert quiet.capability(Invalidations) is None
    assert ("channel_up",) not in sampled(quiet)
    plain = WriteThrough(MemoryStore(), origin=MemoryStore())
    assert plain.capability(Invalidations) is None
    assert plain.capability(CacheTier) is None


async def test_its_figures_are_those_of_the_versions() -> None:
    """Reads, failures of the tier, copies behind, and what was repaired."""
    store, tier, origin, clock = build()
    await store.upsert_latest(OLD)
    await store.get_latest("u-1")
    await store.get_latest("nobody")
    figures = sampled(store)
    assert (figures["reads", "hit"], figures["reads", "miss"]) == (1, 1)
    assert (figures["pending_repairs",], figures["tier_failures", "write"]) == (0, 0)
    tier.error = UnavailableError("away")
    await store.upsert_latest(NEW)
    figures = sampled(store)
    assert figures["pending_repairs",] == 1
    assert figures["tier_failures", "write"] >= 1
    tier.error = None
    await clock.advance(1)
    figures = sampled(store)
    assert figures["repairs",] == len(tier.gone) > 0
    assert figures["pending_repairs",] == 0
    assert figures["channel_losses",] == 0
    await store.aclose()
    await origin.aclose()


def test_it_says_how_far_processes_agree() -> None:
    """With versions within seconds; without, not at all."""
    store, _, _, _ = build()
    assert store.staleness == (TRUST_SECONDS, "")
    assert staleness(store)[0] == TRUST_SECONDS
    assert "versioned: other processes' writes show at once, after 2 s" in str(describe(store))
    plain = WriteThrough(MemoryStore(), origin=MemoryStore())
    assert plain.staleness == (math.inf, "the cache tier has no versions")
    assert [block.path for block in describe(plain)] == ["", "inner", "origin"]
    assert list(plain.children()) == ["inner", "origin"]


async def test_an_erasure_that_misses_the_tier_is_an_event_once_and_its_end_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By the layer's name, with the tiers that are left, without the user."""
    caplog.set_level(logging.INFO, logger="layered_store")
    store, tier, _, _ = build()
    await store.upsert_latest(OLD)
    tier.error = UnavailableError("away")
    for _ in range(2):
        with pytest.raises(ErasureIncompleteError) as caught:
            await store.delete("u-1")
        assert caught.value.pending == ("shelf",)
        assert (caught.value.layer, caught.value.operation) == ("WriteThrough", "delete")
    tier.error = None
    await store.delete("u-1")
    await store.delete("u-1")
    told = [r.getMessage() for r in caplog.records if "erasure" in r.getMessage()]
    assert len(told) == 2
    assert all("WriteThrough" in line and "u-1" not in line for line in told)
    assert "erasure_incomplete" in told[0]
    assert "shelf" in told[0]
    assert "erasure_complete" in told[1]
    assert sampled(store)["erasures_incomplete",] == 2
    await store.aclose()


# Without versions on one side


async def test_an_origin_with_versions_above_a_plain_tier_says_what_stands() -> None:
    """When another state won, the copy is that one, of a batch too."""

    class Losing(MemoryStore):
        async def write(self, snapshot: StateSnapshot) -> Versioned:  # noqa: ARG002
            return Versioned(7, NEW)

        async def write_many(self, snapshots: Sequence[StateSnapshot]) -> Mapping[str, Versioned]:
            return {each.user_id: Versioned(7, NEW) for each in snapshots}

    tier = MemoryStore()
    store = WriteThrough(tier, origin=Losing())
    await store.upsert_latest(OLD)
    assert await tier.get_latest("u-1") == NEW
    await tier.delete("u-1")
    await store.upsert_latest_many([OLD])
    assert await tier.get_latest("u-1") == NEW


async def test_what_was_written_is_in_the_tier_and_counts_as_found() -> None:
    """Also above an origin without versions, which says nothing of what it holds."""

    class Record(StateStore):
        async def get_latest(self, user_id: str) -> StateSnapshot | None:
            raise AssertionError("the tier has it")

        async def upsert_latest(self, snapshot: StateSnapshot) -> None: ...

    tier = MemoryStore()
    store = WriteThrough(tier, origin=Record())
    await store.upsert_latest(OLD)
    assert await tier.get_latest("u-1") == OLD
    await store.upsert_latest_many([NEW, state(0.3, "u-2")])
    assert await tier.get_latest("u-1") == NEW
    assert len(await store.get_latest_many(["u-1", "u-2"])) == 2
    counted = {k[1]: v for k, v in sampled(store).items() if k[0] == "reads" and v}
    assert counted == {"hit": 2}


async def test_what_the_origin_gives_is_a_miss_and_must_be_the_users() -> None:
    """Another user's state is an error, and no copy is made of it."""

    class Mixed(MemoryStore):
        async def get_latest(self, user_id: str) -> StateSnapshot | None:
            return OLD if user_id == "u-1" else state(0.3, "somebody-else")

    tier = MemoryStore()
    store = WriteThrough(tier, origin=Mixed())
    assert await store.get_latest("u-1") == OLD
    with pytest.raises(CorruptDataError) as caught:
        await store.get_latest("u-2")
    assert (caught.value.user_id, caught.value.layer) == ("u-2", "WriteThrough")
    assert await tier.get_latest("u-2") is None
    counted = {k[1]: v for k, v in sampled(store).items() if k[0] == "reads" and v}
    assert counted.pop("miss") == 1
    assert sum(counted.values()) == 1
    assert store._copies._turns.users == {}


async def test_all_that_an_erasure_left_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """The origin may be a stack of its own, with several tiers."""
    caplog.set_level(logging.INFO, logger="layered_store")

    class Partly(MemoryStore):
        async def delete(self, user_id: str) -> None:  # noqa: ARG002
            raise ErasureIncompleteError("left", pending=["one", "two"])

    store = WriteThrough(MemoryStore(), origin=Partly())
    with pytest.raises(ErasureIncompleteError):
        await store.delete("u-1")
    assert "pending=one,two" in caplog.text


async def test_reads_that_failed_are_counted_with_their_kind() -> None:
    """One by one and in a batch; nothing that was not found is a hit."""

    class Broken(MemoryStore):
        async def get_latest(self, user_id: str) -> StateSnapshot | None:  # noqa: ARG002
            raise CorruptDataError("unreadable")

        async def get_latest_many(self, user_ids: Any) -> dict[str, StateSnapshot]:  # noqa: ARG002
            raise CorruptDataError("unreadable")

    store = WriteThrough(MemoryStore(), origin=Broken())
    with pytest.raises(CorruptDataError):
        await store.get_latest("u-1")
    with pytest.raises(CorruptDataError):
        await store.get_latest_many(["u-1", "u-2"])
    counted = {key: value for key, value in sampled(store).items() if key[0] == "reads"}
    assert sum(counted.values()) == 3
    assert counted["reads", "hit"] == counted["reads", "miss"] == 0


@pytest.mark.parametrize("operation", ["upsert_latest", "upsert_latest_many", "delete"])
async def test_a_copy_is_doubtful_before_the_origin_is_asked(operation: str) -> None:
    """A write that never comes back leaves it so: a process that is stopped there reads no copy."""
    argument: Any = {"upsert_latest": NEW, "upsert_latest_many": [NEW]}.get(operation, "u-1")
    doubtful: list[int] = []

    class Looking(MemoryStore):
        async def _look(self, *_: object) -> Any:
            doubtful.append(store._copies.pending)
            raise UnavailableError("refused", outcome_unknown=False)

        write = write_many = delete = _look

    store = WriteThrough(MemoryStore(), origin=Looking())
    with pytest.raises(UnavailableError):
        await getattr(store, operation)(argument)
    assert doubtful == [1]


async def test_of_two_states_of_health_the_worse_is_told() -> None:
    """By their rank, not by their name."""

    class Of(MemoryStore):
        def __init__(self, status: HealthStatus) -> None:
            super().__init__()
            self.status = status

        async def health_report(self) -> HealthReport:
            return HealthReport("Of", self.status, 0.0)

    for tier in HealthStatus:
        for origin in (HealthStatus.HEALTHY, HealthStatus.DEGRADED):
            report = await WriteThrough(Of(tier), origin=Of(origin)).health_report()
            worse = {tier, origin} - {HealthStatus.HEALTHY}
            assert report.status is (HealthStatus.DEGRADED if worse else HealthStatus.HEALTHY)


def test_what_is_refused_is_refused_by_name() -> None:
    """An origin that is none, a clock that is none, and sides that are keyed differently."""
    for options, option in (
        ({"origin": None}, "origin"),
        ({"origin": MemoryStore(), "clock": 5}, "clock"),
    ):
        arguments: Any = options
        with pytest.raises(ConfigError) as caught:
            WriteThrough(MemoryStore(), **arguments)
        assert caught.value.option == option

    class Mood(StateSnapshot):
        mood: str = ""

    with pytest.raises(ConfigError) as caught:
        WriteThrough(MemoryStore(), origin=MemoryStore(snapshot_type=Mood))
    assert (caught.value.option, caught.value.layer) == ("snapshot_type", "WriteThrough")

    class Elsewhere(Shelf):
        digest = digest_function(b"elsewhere")

    with pytest.raises(ConfigError) as caught:
        build(Elsewhere())
    assert caught.value.option == "digest_key"


class Counts(StateStore):
    """Counts its calls on the way to the class it is joined to."""

    calls: int

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        self.calls += 1
        return await super().get_latest(user_id)  # type: ignore[safe-super]


class Refuses(MemoryStore):
    """Fails each write, as a test's stand-in for a database that is away."""

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        raise UnavailableError("away", operation="upsert_latest")


async def test_no_ability_goes_past_an_operation_that_a_subclass_changed() -> None:
    """It is as it would be without versions: the operation itself is called."""

    class Counting(Counts, MemoryStore):
        calls = 0

    origin = Counting()
    assert origin.capability(Authority) is None
    stack = WriteThrough(MemoryStore(), origin=origin)
    await stack.upsert_latest(NEW)
    assert await stack.get_latest("u-1") == NEW
    await stack.get_latest("nobody")
    assert origin.calls == 1  # the other read was a hit
    for around in (Refuses(), Retry(Refuses(), attempts=1), Cached(Refuses())):
        with pytest.raises(UnavailableError):
            await WriteThrough(MemoryStore(), origin=around).upsert_latest(NEW)


async def test_nor_past_one_of_a_layer_that_treats_all_alike() -> None:
    """A subclass of it is asked itself, unless it says again what it does around each."""

    class CountingRetry(Counts, Retry):
        calls = 0

    layer = CountingRetry(MemoryStore())
    assert Retry(MemoryStore()).capability(Authority) is not None
    assert layer.capability(Authority) is None
    await WriteThrough(MemoryStore(), origin=layer).get_latest("u-1")
    assert layer.calls == 1


def test_an_ability_of_a_subclass_stays_when_it_goes_past_nothing() -> None:
    """What it changed beside the operations, or the ability's own method, passes by nobody."""

    class Changed(MemoryStore):
        async def write(self, snapshot: StateSnapshot) -> Versioned:
            return await super().write(snapshot)

        async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
            return await super().get_history(user_id, limit)

    class Redis(RedisStore):
        async def get_latest(self, user_id: str) -> StateSnapshot | None:
            return await super().get_latest(user_id)

    url = "redis://127.0.0.1:1/0"
    assert Changed().capability(Authority) is not None
    assert RedisStore(url).capability(CacheTier) is not None
    assert Redis(url).capability(CacheTier) is None


def test_an_ability_may_be_joined_to_a_store() -> None:
    """By a class that is no store itself, whichever of them comes first."""

    class Numbered(Authority):
        digest = MemoryStore.digest
        read, read_many, write = MemoryStore.read, MemoryStore.read_many, MemoryStore.write
        write_many, erase, settle = MemoryStore.write_many, MemoryStore.erase, MemoryStore.settle
        debts, owing, head = MemoryStore.debts, MemoryStore.owing, MemoryStore.head
        changes, covers = MemoryStore.changes, MemoryStore.covers

    class Plain(StateStore):
        async def get_latest(self, user_id: str) -> StateSnapshot | None:
            raise NotImplementedError

        async def upsert_latest(self, snapshot: StateSnapshot) -> None:
            raise NotImplementedError

    for bases in ((Plain, Numbered), (Numbered, Plain)):
        joined: Any = type("Joined", bases, {})()
        assert joined.capability(Authority) is joined


@pytest.mark.parametrize("hangs", [False, True])
async def test_closing_waits_for_erasures_under_way(hangs: bool) -> None:
    """They take steps on both sides; one that hangs is given 5 s, and new ones are refused."""
    gate = asyncio.Event()

    class Slow(Shelf):
        async def bury(self, user_id: str, version: int, me: str) -> Holders:
            await gate.wait()
            return await super().bury(user_id, version, me)

    store, tier, origin, clock = build(Slow())
    await store.upsert_latest(NEW)
    erasing = asyncio.create_task(store.delete("u-1"))
    await settle()
    closing = asyncio.create_task(store.aclose())
    await settle()
    with pytest.raises(ClosedError):
        await store.delete("u-1")
    assert not closing.done()
    assert await origin.health_check()
    if hangs:
        await clock.advance(5.1)
        await closing
        assert not erasing.done()
    gate.set()
    await asyncio.gather(erasing, closing)
    assert tier.copies["u-1"].snapshot is None
    assert not await origin.health_check()
    await store.aclose()
