"""What a process does when a step on its shared tier fails, and how it begins and ends."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from loops import AskedLoop

from layered_store.coherence.contract import (
    TRUST_SECONDS,
    CacheTier,
    Change,
    Holders,
    Notice,
    Pass,
    Ticket,
    TierRead,
    Versioned,
)
from layered_store.coherence.guarded import GuardedCopies, backlog, repair, seen
from layered_store.coherence.guarded.erasing import MARGIN_SECONDS
from layered_store.coherence.guarded.leases import LEASE_SECONDS
from layered_store.coherence.guarded.startup import READY_SECONDS
from layered_store.coherence.guarded.watch import Watch
from layered_store.coherence.outcomes import QUARANTINE_SECONDS
from layered_store.errors import (
    ClosedError,
    ErasureIncompleteError,
    OverloadedError,
    StoreError,
    StoreTimeoutError,
    UnavailableError,
)
from layered_store.snapshot import StateSnapshot
from layered_store.stores.memory import MemoryStore
from layered_store.testing.clock import FakeClock, settle

TICKET = Ticket(b"t", b"g" * 16)
SECRET = "marked-value"


class Tier(CacheTier):
    """Copies in a dict; a step named in ``fails`` raises what stands there."""

    digest = MemoryStore.digest
    tier_name = "tier"
    has_channel = True

    def __init__(self) -> None:
        self.copies: dict[str, Versioned] = {}
        self.fails: dict[str, Exception] = {}
        self.log: list[str] = []
        self.tickets_come_with_reads = False
        self.trusted = self.echoes = True
        self.notices: asyncio.Queue[Notice | Exception] = asyncio.Queue()
        self.cursor = ""
        # Who holds leases when a user is buried, and later.
        self.at_burial = self.later = Holders(10.0, 10.0, {})
        self.put_with: list[Ticket | None] = []
        self.acknowledged: list[float] = []
        self.repaired: list[bytes] = []
        self.trusted_for: list[float] = []

    def _step(self, name: str) -> None:
        self.log.append(name)
        if name in self.fails:
            raise self.fails[name]

    async def read(self, user_id: str) -> TierRead:
        self._step("read")
        found = self.copies.get(user_id)
        ticket = TICKET if self.tickets_come_with_reads and found is None else None
        return TierRead(found, ticket, trusted=True) if self.trusted else TierRead()

    async def read_many(self, user_ids: Sequence[str]) -> Mapping[str, TierRead]:
        self._step("read_many")
        return {user_id: await self.read(user_id) for user_id in user_ids}

    async def read_stale(self, user_id: str, seconds: float) -> Versioned | None:
        self._step("read_stale")
        return self.copies.get(user_id)

    async def ticket(self, user_id: str) -> Ticket | None:
        self._step("ticket")
        return TICKET if self.trusted else None

    async def fill(self, user_id: str, record: Versioned, ticket: Ticket) -> None:
        self._step("fill")
        self.copies[user_id] = record

    async def put(self, user_id: str, record: Versioned, ticket: Ticket | None) -> None:
        self._step("put")
        self.put_with.append(ticket)
        self.copies[user_id] = record

    async def bury(self, user_id: str, version: int, me: str) -> Holders:
        self._step("bury")
        self.copies[user_id] = Versioned(version, None)
        return self.at_burial

    async def holders(self, user_id: str, me: str) -> Holders:
        self._step("holders")
        return self.later

    async def begin(self, me: str, head: str) -> Pass | None:
        self._step("begin")
        self.cursor = self.cursor or head
        return Pass(0.0, b"g" * 16, self.cursor, False, me)

    async def renew(self, generation: bytes, head: str) -> None:
        self._step("renew")

    async def repair(self, changes: Sequence[Change]) -> Sequence[Change]:
        self._step("repair")
        self.repaired += [change.digest for change in changes]
        return changes

    async def stamp(self, begun: Pass, cursor: str, seconds: float) -> bool:
        self._step("stamp")
        self.cursor = cursor
        self.trusted_for.append(seconds)
        return True

    async def ping(self, me: str, seconds: float, seen: float, number: int) -> float:
        self._step("ping")
        self.acknowledged.append(seen)
        if self.echoes:
            self.notices.put_nowait(Notice(b"", number, echo=me))
        return 1.0 if self.trusted else 0.0

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[AsyncIterator[Notice]]:
        self._step("listen")

        async def told() -> AsyncIterator[Notice]:
            while True:
                notice = await self.notices.get()
                if isinstance(notice, Exception):
                    raise notice
                yield notice

        yield told()


class Cache:
    """A cache that keeps what it is told."""

    def __init__(self) -> None:
        self.leased = float("-inf")
        self.told: list[Notice] = []

    def invalidate(self, notice: Notice) -> None:
        self.told.append(notice)

    def distrust(self) -> None:
        pass

    def lease(self, until: float) -> None:
        self.leased = until

    def hear(self, until: float) -> None:
        pass


class World:
    """A guard with its tier, its authority and its clock."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.tier = Tier()
        self.authority = MemoryStore(clock=self.clock)
        self.guard = GuardedCopies(self.tier, self.authority, self.clock)

    async def begin(self) -> World:
        await self.guard.upsert_latest(state("first"))
        self.tier.log.clear()
        return self


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = await World().begin()
    yield world
    world.tier.fails.clear()
    await world.guard.aclose()


def state(user_id: str = "u-1", at: int = 1) -> StateSnapshot:
    return StateSnapshot(user_id, at)


CALLS: dict[str, tuple[str, Callable[[GuardedCopies], Coroutine[Any, Any, object]]]] = {
    "the read": ("read", lambda guard: guard.get_latest("u-1")),
    "the ticket of a read": ("ticket", lambda guard: guard.get_latest("u-1")),
    "the read of several": ("read_many", lambda guard: guard.get_latest_many(["u-1", "u-2"])),
    "the ticket of a write": ("ticket", lambda guard: guard.upsert_latest(state())),
    "the write": ("put", lambda guard: guard.upsert_latest(state())),
    "the write of several": ("put", lambda guard: guard.upsert_latest_many([state()])),
    "the erasure": ("bury", lambda guard: guard.delete("u-1")),
}


@pytest.mark.parametrize("case", CALLS)
async def test_a_closed_tier_is_told_and_is_no_outage(case: str, world: World) -> None:
    """It is a mistake of the program's, which the system of record must not hide."""
    step, call = CALLS[case]
    world.tier.fails[step] = ClosedError("this store was closed")
    with pytest.raises(ClosedError) as told:
        await call(world.guard)
    assert told.value.outcome_unknown == (step in ("put", "bury")), "the write is committed"
    assert not world.guard.failures
    del world.tier.fails[step]
    await call(world.guard)


async def test_a_tier_that_was_closed_before_a_fill_is_told(world: World) -> None:
    """Also when the answer is there already."""
    await world.authority.upsert_latest(state())
    world.tier.fails["fill"] = ClosedError("this store was closed")
    with pytest.raises(ClosedError):
        await world.guard.get_latest("u-1")
    assert not world.guard.failures


async def test_what_was_committed_when_the_stack_was_closed_is_not_told_as_refused(
    world: World,
) -> None:
    """A write is acknowledged, an erasure says what it did not reach, a read has its answer."""
    closed = ClosedError("this store was closed")
    world.tier.fails = {"put": closed, "bury": closed, "fill": closed}
    committed, go_on = asyncio.Event(), asyncio.Event()

    class Slow(MemoryStore):
        """Answers when the stack was closed."""

        async def write(self, snapshot: StateSnapshot) -> Versioned:
            record = await super().write(snapshot)
            await answer()
            return record

        async def erase(self, user_id: str, tiers: Sequence[str] = ()) -> int:
            version = await super().erase(user_id, tiers)
            await answer()
            return version

        async def read(self, user_id: str) -> Versioned:
            record = await super().read(user_id)
            await answer()
            return record

    async def answer() -> None:
        committed.set()
        await go_on.wait()

    slow = Slow(clock=world.clock)
    guard = GuardedCopies(world.tier, slow, world.clock)
    await MemoryStore.write(slow, state("u-3"))
    calls = [
        asyncio.ensure_future(guard.upsert_latest(state("u-1"))),
        asyncio.ensure_future(guard.delete("u-2")),
        asyncio.ensure_future(guard.get_latest("u-3")),
    ]
    await committed.wait()
    await asyncio.sleep(0)
    await guard.aclose()
    go_on.set()
    written, erased, read = await asyncio.gather(*calls, return_exceptions=True)
    assert written is None
    assert isinstance(erased, ErasureIncompleteError)
    assert read == state("u-3")
    assert not guard.failures


async def test_a_ticket_that_comes_with_a_read_is_the_one_that_fills(world: World) -> None:
    """No other is asked for, by one read and by a read of several."""
    await world.authority.upsert_latest_many([state("u-1"), state("u-2"), state("u-3")])
    world.tier.tickets_come_with_reads = True
    assert await world.guard.get_latest("u-1") == state("u-1")
    found = await world.guard.get_latest_many(["u-2", "u-3"])
    assert found == {user: state(user) for user in ("u-2", "u-3")}
    assert "ticket" not in world.tier.log
    assert {"u-1", "u-2", "u-3"} <= world.tier.copies.keys()


def settling_fails_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    real, failing = world.authority.settle, [True]

    async def settle(digest: bytes, version: int, tier: str) -> None:
        if failing:
            failing.clear()
            raise UnavailableError("away")
        await real(digest, version, tier)

    monkeypatch.setattr(world.authority, "settle", settle)


async def test_an_erasure_that_cannot_be_noted_as_paid_is_done_and_noted_later(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user is gone everywhere; the next pass pays the debt again and notes it."""
    await world.guard.upsert_latest(state())
    settling_fails_once(world, monkeypatch)
    await world.guard.delete("u-1")
    assert await world.guard.get_latest("u-1") is None
    assert await world.authority.debts("u-1") == ["tier"]
    await world.clock.advance(1.0)
    assert await world.authority.debts("u-1") == []


async def test_what_asks_for_a_look_at_the_debts_during_a_pass_is_not_forgotten_by_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass settles what it came upon; what was left behind meanwhile is looked for by the
    next."""
    real_settle, real_owing = world.authority.settle, world.authority.owing
    looks: list[str] = []

    async def settle(digest: bytes, version: int, tier: str) -> None:
        if digest == world.authority.digest("u-2"):
            raise UnavailableError("away")
        await real_settle(digest, version, tier)
        looks.clear()
        await world.guard.delete("u-2")

    async def owing(tier: str, limit: int) -> Sequence[Change]:
        looks.append(tier)
        return await real_owing(tier, limit)

    await world.authority.erase("u-1", ("tier",))  # by a process that died
    monkeypatch.setattr(world.authority, "settle", settle)
    monkeypatch.setattr(world.authority, "owing", owing)
    await world.clock.advance(0.3)
    assert "tier" in looks


async def test_a_pass_that_could_not_settle_looks_for_the_debt_later(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No replay comes upon it again."""
    settling_fails_once(world, monkeypatch)
    await world.authority.erase("u-1", ("tier",))  # by a process that died
    await world.clock.advance(0.3)
    assert await world.authority.debts("u-1") == ["tier"]
    await world.clock.advance(0.3)
    assert await world.authority.debts("u-1") == []


async def test_a_pass_settles_what_it_came_upon_at_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many erasures may be owed after an outage: one by one they would outlast the stamp."""
    users = [f"u-{number}" for number in range(20)]
    real, under_way = world.authority.settle, asyncio.Barrier(len(users))

    async def settle(digest: bytes, version: int, tier: str) -> None:
        await under_way.wait()
        await real(digest, version, tier)

    monkeypatch.setattr(world.authority, "settle", settle)
    for user in users:
        await world.authority.erase(user, ("tier",))  # by processes that found the tier away
    await world.clock.advance(0.3)
    for user in users:
        assert await world.authority.debts(user) == []


@pytest.mark.parametrize("fails", [(), ("repair",), ("settle",)], ids=["", "repair", "settle"])
async def test_what_was_owed_before_this_process_came_is_cleaned_and_then_settled(
    fails: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No replay comes upon it. A debt is settled by nothing else, and one that could not be paid
    is paid later.
    """
    world = World()
    tier, authority = world.tier, world.authority
    await authority.upsert_latest(state())
    await authority.erase("u-1", ("tier",))  # by a process that died
    real, settled_after = authority.settle, []

    async def settle(digest: bytes, version: int, name: str) -> None:
        if "settle" in fails:
            raise UnavailableError("away")
        settled_after.append(list(tier.repaired))
        await real(digest, version, name)

    monkeypatch.setattr(authority, "settle", settle)
    if "repair" in fails:
        tier.fails["repair"] = UnavailableError("away")
    await world.begin()
    await world.clock.advance(1.0)
    if fails:
        assert await authority.debts("u-1") == ["tier"]
        tier.fails.clear()
        fails = ()
        await world.clock.advance(1.0)
    assert await authority.debts("u-1") == []
    digest = authority.digest("u-1")
    assert all(digest in repaired for repaired in settled_after)
    assert settled_after
    await world.guard.aclose()


async def test_a_tier_is_trusted_when_the_last_page_was_replayed_and_not_before(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page before it moves the cursor, so that a long way back is gone once."""
    monkeypatch.setattr(repair, "PAGE", 2)
    users = [f"u-{number}" for number in range(5)]
    for user in users:
        await world.authority.upsert_latest(state(user))  # by another process
    world.tier.trusted_for.clear()
    await world.clock.advance(0.3)
    assert world.tier.trusted_for == [0.0, 0.0, TRUST_SECONDS]
    assert world.tier.repaired[-5:] == [world.authority.digest(user) for user in users]


WRITES: dict[str, Callable[[GuardedCopies], Coroutine[Any, Any, object]]] = {
    "a write": lambda guard: guard.upsert_latest(state(at=2)),
    "a batch": lambda guard: guard.upsert_latest_many([state(at=2)]),
    "an erasure": lambda guard: guard.delete("u-1"),
}


@pytest.mark.parametrize("write", WRITES)
async def test_a_copy_that_is_older_than_what_this_process_wrote_is_not_shown(
    write: str, world: World
) -> None:
    """Though the tier is trusted, by one read and by a read of several."""
    guard, tier = world.guard, world.tier
    await guard.upsert_latest(state())
    old = tier.copies["u-1"]
    await WRITES[write](guard)
    left = None if write == "an erasure" else state(at=2)
    tier.copies["u-1"] = old
    assert await guard.get_latest("u-1") == left
    tier.copies["u-1"] = old
    assert (await guard.get_latest_many(["u-1"])).get("u-1") == left


async def test_a_copy_that_is_older_than_one_that_was_shown_is_not_shown(world: World) -> None:
    """Of another process's write, which this one has read from the tier."""
    guard, tier = world.guard, world.tier
    await guard.upsert_latest(state())
    old = tier.copies["u-1"]
    tier.copies["u-1"] = await world.authority.write(state(at=2))
    assert await guard.get_latest("u-1") == state(at=2)
    tier.copies["u-1"] = old
    assert await guard.get_latest("u-1") == state(at=2)


@pytest.mark.parametrize(
    ("error", "believed"),
    [
        (UnavailableError("cut off"), False),
        (asyncio.CancelledError(), False),
        (OverloadedError("full"), True),
    ],
    ids=["cut off", "cancelled", "refused"],
)
@pytest.mark.parametrize("write", WRITES)
async def test_while_a_write_may_take_effect_no_copy_of_the_user_is_believed(
    write: str, error: BaseException, believed: bool, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For 5 s; one that was refused changes nothing."""
    guard, tier, authority = world.guard, world.tier, world.authority
    await guard.upsert_latest(state())

    async def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        for step in ("write", "write_many", "erase"):
            patch.setattr(authority, step, fail)
        with pytest.raises(type(error)):
            await WRITES[write](guard)
    await authority.write(state(at=3))  # what was on its way
    assert await guard.get_latest("u-1") == state(at=1 if believed else 3)
    assert guard.reads.hit == believed
    await world.clock.advance(QUARANTINE_SECONDS)
    tier.copies["u-1"] = await authority.read("u-1")
    assert await guard.get_latest("u-1") == state(at=3)
    assert guard.reads.hit == believed + 1


@pytest.mark.parametrize("form", ["single", "batch"])
async def test_reads_are_counted_by_how_they_ended(form: str, world: World) -> None:
    """What the tier has is a hit, an erased user a negative one; its failure is no miss."""
    guard, tier, counts = world.guard, world.tier, world.guard.reads

    async def read() -> tuple[int, ...]:
        before = counts.hit, counts.negative_hit, counts.miss, counts.error
        if form == "single":
            await guard.get_latest("u-1")
        else:
            await guard.get_latest_many(["u-1"])
        after = counts.hit, counts.negative_hit, counts.miss, counts.error
        return tuple(now - then for now, then in zip(after, before, strict=True))

    assert await read() == (0, 0, 1, 0)
    await guard.upsert_latest(state())
    assert await read() == (1, 0, 0, 0)
    await guard.delete("u-1")
    assert await read() == (0, 1, 0, 0)
    tier.copies.clear()
    tier.fails["ticket"] = UnavailableError("away")
    assert await read() == (0, 0, 0, 1)
    tier.fails = {"read": UnavailableError("away"), "begin": UnavailableError("away")}
    assert await read() == (0, 0, 0, 1)
    assert guard.failures["read"] == 2
    assert await read() == (0, 0, 0, 1)  # it is passed by
    world.authority.read = world.authority.read_many = refused  # type: ignore[method-assign]
    with pytest.raises(UnavailableError):
        await read()
    assert counts.error == 4


async def refused(*_: object) -> Any:
    raise UnavailableError("down")


LEASE = LEASE_SECONDS + MARGIN_SECONDS


@pytest.mark.parametrize(
    ("burial", "later", "waits"),
    [
        (Holders(10.0, 10.0, {}), None, 0.0),
        (Holders(10.0, 10.0, {"x": (10.5, 10.0)}), None, 0.0),
        (Holders(10.0, 10.0, {"x": (10.5, 9.9)}), Holders(10.1, 10.1, {"x": (11, 10.0)}), 0.02),
        (Holders(10.0, 10.0, {"x": (10.5, 9.9)}), Holders(10.1, 10.1, {"x": (11, 9.9)}), LEASE),
        (Holders(10.0, 10.0, {"x": (10.5, 9.9)}), Holders(9.0, 10.0, {"x": (11, 10.0)}), LEASE),
        (Holders(10.0, 10.0, {"x": (10.5, 9.9)}), Holders(10.1, 10.1, {}), LEASE),
        (Holders(10.0, 10.0, {"x": (10.5, 9.9)}), None, LEASE),
        (Holders(10.0, 0.4, {}), None, LEASE - 0.4),
        (Holders(10.0, -3.0, {}), None, LEASE),
    ],
    ids=[
        "nobody holds a lease",
        "all had seen it",
        "acknowledged",
        "not acknowledged",
        "a clock set back",
        "gone from the register",
        "nobody to ask",
        "a young register",
        "a register of the future",
    ],
)
async def test_an_erasure_waits_for_whoever_may_still_answer_and_no_longer(
    burial: Holders, later: Holders | None, waits: float, world: World
) -> None:
    """Until they acknowledged the message, or for one lease on its own clock."""
    tier, clock = world.tier, world.clock
    tier.at_burial = burial
    if later is not None:
        tier.later = later
    else:
        tier.fails["holders"] = UnavailableError("away")
    erasing = asyncio.create_task(world.guard.delete("u-1"))
    await settle()
    if waits:
        await clock.advance(waits - 0.001)
        assert not erasing.done()
        await clock.advance(0.002)
    assert erasing.done()
    await erasing


@pytest.mark.parametrize("reached", [False, True])
async def test_the_caches_of_this_process_are_told_of_an_erasure_at_once(
    reached: bool, world: World
) -> None:
    """Whether or not the tier is reached."""
    cache = Cache()
    world.guard.attach(cache)
    await world.guard.upsert_latest(state())
    if not reached:
        world.tier.fails["bury"] = UnavailableError("away")
    try:
        await world.guard.delete("u-1")
    except ErasureIncompleteError:
        assert not reached
    digest = world.authority.digest("u-1")
    assert [notice.digest for notice in cache.told if notice.erased] == [digest]


async def test_an_erasure_that_was_cancelled_while_it_waited_is_settled_by_the_next_pass(
    world: World,
) -> None:
    """Which begins at once; until then the user counts as behind."""
    world.tier.at_burial = world.tier.later = Holders(10.0, 10.0, {"x": (10.5, 9.9)})
    erasing = asyncio.create_task(world.guard.delete("u-1"))
    await settle()
    erasing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await erasing
    assert world.guard.pending == 1
    assert await world.authority.debts("u-1") == ["tier"]
    await world.clock.advance(0.06)
    assert world.guard.pending == 0
    assert await world.authority.debts("u-1") == []


@pytest.mark.parametrize("case", CALLS)
async def test_whatever_is_called_first_the_tier_is_repaired_from_then_on(case: str) -> None:
    """Until a pass was made, no copy is believed."""
    world = World()
    await CALLS[case][1](world.guard)
    await world.clock.advance(0.3)
    assert world.tier.log.count("stamp") >= 2
    await world.guard.aclose()


async def test_a_pass_that_hangs_costs_the_first_calls_a_second_and_the_others_nothing() -> None:
    """They go on without the tier, which is trusted later."""
    world = World()

    async def begin(me: str, head: str) -> None:
        await asyncio.Event().wait()

    world.tier.begin = begin  # type: ignore[assignment, method-assign]
    first = asyncio.create_task(world.guard.get_latest("u-1"))
    await world.clock.advance(READY_SECONDS - 0.01)
    assert not first.done()
    await world.clock.advance(0.02)
    assert first.done()
    for _ in range(3):
        call = asyncio.create_task(world.guard.get_latest_many(["u-1"]))
        await settle()
        assert call.done()
    await world.guard.aclose()


@pytest.mark.parametrize("first", ["repaired", "leased"])
async def test_the_first_callers_go_on_when_there_was_a_pass_and_a_lease(first: str) -> None:
    """Whichever comes first; where nobody follows the channel a pass is enough."""
    watch = Watch(FakeClock())
    watch.begin(asyncio.get_running_loop())
    assert watch.ready is not None
    watch.listening = True
    watch.note(repaired=first == "repaired", leased=first == "leased")
    assert not watch.ready.is_set()
    watch.note(repaired=first == "leased", leased=first == "repaired")
    assert watch.ready.is_set()
    watch = Watch(FakeClock())
    watch.begin(asyncio.get_running_loop())
    assert watch.ready is not None
    watch.note(repaired=True)
    assert watch.ready.is_set()


@pytest.mark.parametrize("write", ["a write", "a batch"])
async def test_a_write_raises_the_copy_once_with_the_ticket_from_before_it(
    write: str, world: World
) -> None:
    """So that there is a copy to read, unless somebody else changed the user meanwhile."""
    world.tier.put_with.clear()
    await WRITES[write](world.guard)
    assert world.tier.put_with == [TICKET]


@pytest.mark.parametrize("form", ["single", "batch"])
async def test_without_a_ticket_nothing_is_filled(form: str, world: World) -> None:
    """The tier ceased to be trusted between the read and the ticket; the answer is there."""
    await world.authority.upsert_latest(state())

    async def none(user_id: str) -> None:
        pass

    world.tier.ticket = none  # type: ignore[method-assign]
    if form == "single":
        assert await world.guard.get_latest("u-1") == state()
    else:
        assert await world.guard.get_latest_many(["u-1"]) == {"u-1": state()}
    assert "fill" not in world.tier.log


@pytest.mark.parametrize("form", ["single", "batch"])
async def test_a_fill_that_fails_costs_nobody_an_answer(form: str, world: World) -> None:
    """It is counted."""
    await world.authority.upsert_latest(state())
    world.tier.fails["fill"] = UnavailableError("away")
    if form == "single":
        assert await world.guard.get_latest("u-1") == state()
    else:
        assert await world.guard.get_latest_many(["u-1"]) == {"u-1": state()}
    assert world.guard.failures == {"write": 1}


@pytest.mark.parametrize("form", ["single", "batch"])
async def test_an_authority_that_went_back_is_asked_no_more_than_twice(
    form: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when it was restored from a backup: what it says then is the answer."""
    for _ in range(3):
        await world.guard.upsert_latest(state(at=2))
    world.tier.copies.clear()
    asked: list[object] = []

    async def read(user_id: str) -> Versioned:
        asked.append(user_id)
        await asyncio.sleep(0)
        return Versioned(1, state())

    async def read_many(user_ids: Sequence[str]) -> Mapping[str, Versioned]:
        return {user_id: await read(user_id) for user_id in user_ids}

    monkeypatch.setattr(world.authority, "read", read)
    monkeypatch.setattr(world.authority, "read_many", read_many)
    async with asyncio.timeout(5):
        if form == "single":
            assert await world.guard.get_latest("u-1") == state()
        else:
            assert await world.guard.get_latest_many(["u-1"]) == {"u-1": state()}
    assert len(asked) <= 2


async def test_a_pass_that_another_process_makes_is_left_to_it(world: World) -> None:
    """Nothing is replayed or stamped without the turn."""

    async def another(me: str, head: str) -> None:
        world.tier.log.append("begin")

    world.tier.begin = another  # type: ignore[assignment, method-assign]
    await world.clock.advance(0.3)
    world.tier.log.clear()
    await world.authority.upsert_latest(state())
    await world.clock.advance(1.0)
    assert set(world.tier.log) == {"begin"}


@pytest.mark.parametrize("way", ["fresh", "unknown cursor"])
async def test_a_new_generation_has_debts_looked_for(
    way: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins at the head, so no replay comes upon erasures of before; nor is anything stamped
    by the pass that finds a cursor which the authority does not cover.
    """
    looks: list[str] = []
    real = world.authority.owing

    async def owing(tier: str, limit: int) -> Sequence[Change]:
        looks.append(tier)
        return await real(tier, limit)

    monkeypatch.setattr(world.authority, "owing", owing)
    await world.clock.advance(1.0)
    assert looks == []  # once was enough
    world.tier.log.clear()
    begin = world.tier.begin

    async def fresh(me: str, head: str) -> Pass | None:
        begun = await begin(me, head)
        return begun and begun._replace(fresh=True)

    async def covers(cursor: str) -> bool:
        return False

    with monkeypatch.context() as patch:
        if way == "fresh":
            patch.setattr(world.tier, "begin", fresh)
        else:
            patch.setattr(world.authority, "covers", covers)
        await world.clock.advance(0.3)
        assert ("renew" in world.tier.log) is (way != "fresh")
        assert ("stamp" in world.tier.log) is (way == "fresh")
    assert looks


async def test_one_failure_now_and_then_is_no_outage(world: World) -> None:
    """A connection that was lost is made anew; the tier is asked by the next call."""
    for _ in range(5):
        world.tier.fails["read"] = UnavailableError("lost")
        await world.guard.get_latest("u-1")
        del world.tier.fails["read"]
        world.tier.log.clear()
        await world.guard.get_latest("u-1")
        assert "read" in world.tier.log
        await world.clock.advance(0.3)
    assert world.guard.trouble == ""


async def test_a_tier_that_answers_pings_and_no_calls_is_told_as_trouble(world: World) -> None:
    """Until a ping or a pass reaches it again; then it is asked by the next call."""
    for step in ("read", "begin"):
        world.tier.fails[step] = StoreTimeoutError("no answer")
    await world.guard.get_latest("u-1")
    assert "passed by" in world.guard.trouble
    await world.clock.advance(0.3)
    assert world.guard.failures["repair"] > 0
    world.tier.log.clear()
    await world.guard.get_latest("u-1")
    assert "read" not in world.tier.log
    world.guard.attach(Cache())
    await world.guard.get_latest("u-1")
    await world.clock.advance(0.3)
    world.tier.log.clear()
    await world.guard.get_latest("u-1")
    assert "read" in world.tier.log


async def test_a_write_that_is_cancelled_after_its_commit_is_repaired_at_once(
    world: World,
) -> None:
    """Its copy is behind, and nobody else knows."""
    hangs = asyncio.Event()

    async def put(user_id: str, record: Versioned, ticket: Ticket | None) -> None:
        hangs.set()
        await asyncio.Event().wait()

    world.tier.put = put  # type: ignore[method-assign]
    writing = asyncio.create_task(world.guard.upsert_latest(state()))
    await hangs.wait()
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert world.guard.pending == 1
    await world.clock.advance(0.06)
    assert world.guard.pending == 0
    assert world.authority.digest("u-1") in world.tier.repaired


async def test_each_ping_acknowledges_the_latest_message_that_was_taken_in(world: World) -> None:
    """Whoever erases waits for that; a message that comes again takes nothing back."""
    cache = Cache()
    world.guard.attach(cache)
    await world.guard.get_latest("u-1")
    for sent in (5.0, 7.0, 6.0):
        world.tier.notices.put_nowait(Notice(b"digest", 7, sent=sent))
    await world.clock.advance(0.4)
    assert world.tier.acknowledged[-1] == 7.0


@pytest.mark.parametrize(
    "notice", [Notice(b"digest", 7, erased=True), Notice(b"", 0)], ids=["erasure", "generation"]
)
async def test_what_somebody_waits_for_is_answered_by_a_ping_at_once(
    notice: Notice, world: World
) -> None:
    """An erasure, and a new generation, after which there is no lease until then."""
    cache = Cache()
    world.guard.attach(cache)
    await world.guard.get_latest("u-1")
    await world.clock.advance(0.4)
    world.tier.log.clear()
    world.tier.notices.put_nowait(notice)
    await world.clock.advance(0)
    assert "ping" in world.tier.log
    assert cache.leased > world.clock.monotonic()


async def test_a_tier_that_hangs_does_not_keep_from_closing() -> None:
    """Leaving the register of leases is tried for a moment."""
    world = World()
    world.guard.attach(Cache())
    await world.guard.get_latest("u-1")
    await world.clock.advance(0.4)

    async def ping(me: str, seconds: float, seen: float, number: int) -> float:
        await asyncio.Event().wait()
        return 0.0

    world.tier.ping = ping  # type: ignore[method-assign]
    closing = asyncio.create_task(world.guard.aclose())
    await settle()
    await world.clock.advance(0.3)
    assert closing.done()


async def test_an_empty_batch_that_fails_puts_nobody_in_doubt(world: World) -> None:
    """The error is that of the system of record."""

    async def refuse(snapshots: Sequence[StateSnapshot]) -> Mapping[str, Versioned]:
        raise UnavailableError("down")

    world.authority.write_many = refuse  # type: ignore[method-assign]
    with pytest.raises(UnavailableError):
        await world.guard.upsert_latest_many([])


async def test_what_is_noted_as_behind_is_bounded(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long outage costs no memory without end; the repair finds the rest in the log."""
    monkeypatch.setattr(backlog, "MAX_UNREPAIRED", 3)
    for step in ("put", "begin", "ping"):
        world.tier.fails[step] = UnavailableError("away")
    for number in range(10):
        await world.guard.upsert_latest(state(f"u-{number}"))
    assert world.guard.pending == 3


async def test_what_is_behind_counts_until_the_tier_is_trusted_again(world: World) -> None:
    """That the tier answers says nothing yet; that another process repaired it shows by trust."""
    world.guard.attach(Cache())
    for step in ("put", "begin"):
        world.tier.fails[step] = UnavailableError("away")
    world.tier.trusted = False
    await world.guard.upsert_latest(state())
    for _ in range(10):
        await world.clock.advance(0.5)
        await world.guard.get_latest("u-1")
    assert "ping" in world.tier.log
    assert world.guard.pending == 1
    world.tier.trusted = True
    await world.clock.advance(0.5)
    assert world.guard.pending == 0


@pytest.mark.parametrize("way", ["read", "batch", "write"])
async def test_trust_in_an_answer_tells_that_another_process_repaired_what_is_behind(
    way: str, world: World
) -> None:
    """The pass behind it may have begun 2 s ago, so no sooner than that after the write."""
    calls: dict[str, Callable[[], Coroutine[Any, Any, object]]] = {
        "read": lambda: world.guard.get_latest("u-2"),
        "batch": lambda: world.guard.get_latest_many(["u-2"]),
        "write": lambda: world.guard.upsert_latest(state("u-2")),
    }
    refused = OverloadedError("full")  # which is no outage
    world.tier.fails = {"put": refused, "begin": refused}
    await world.guard.upsert_latest(state())
    world.tier.fails = {"begin": refused}
    await world.clock.advance(1.9)
    await calls[way]()
    assert world.guard.pending == 1
    await world.clock.advance(0.2)
    await calls[way]()
    assert world.guard.pending == 0


async def test_a_later_write_that_reaches_the_tier_leaves_the_user_behind_no_more(
    world: World,
) -> None:
    """Whoever fell behind twice counts once, since the last time."""
    refused = OverloadedError("full")
    for _ in range(2):
        world.tier.fails = {"put": refused, "begin": refused}
        await world.guard.upsert_latest(state())
        await world.clock.advance(1.1)
    assert world.guard.pending == 1
    await world.guard.get_latest("u-2")
    assert world.guard.pending == 1
    del world.tier.fails["put"]
    await world.guard.upsert_latest(state())
    assert world.guard.pending == 0


async def test_a_stale_copy_is_never_older_than_what_was_seen(world: World) -> None:
    """Nor one of an erased user; and what is given is counted."""
    guard, tier = world.guard, world.tier
    await guard.upsert_latest(state())
    assert await guard.stale("u-1", 60) == state()
    assert guard.reads.stale == 1
    seen = tier.copies["u-1"].version
    tier.copies["u-1"] = Versioned(seen - 1, state())
    assert await guard.stale("u-1", 60) is None
    tier.copies["u-1"] = Versioned(seen + 1, None)
    assert await guard.stale("u-1", 60) is None
    assert await guard.stale("nobody", 60) is None
    assert guard.reads.stale == 1


async def test_what_was_seen_of_very_many_users_is_forgotten_earlier(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not before a copy that is believed can be no older; one of a tier that was trusted is none
    then, as it may be."""
    monkeypatch.setattr(seen, "_MANY", 60)
    for number in range(100):
        await world.guard.upsert_latest(state(f"u-{number}"))
        await world.clock.advance(0.1)
    floors = world.guard._seen._floors
    assert list(floors) == [f"u-{number}" for number in range(40, 100)]
    monkeypatch.setattr(seen, "_MANY", 20)
    await world.guard.upsert_latest(state("u-99"))
    assert list(floors) == [f"u-{number}" for number in range(51, 100)]
    world.tier.copies["u-1"] = world.tier.copies["u-99"] = Versioned(0, state())
    assert await world.guard.stale("u-1", 60) is None
    assert await world.guard.stale("u-99", 60) is None
    world.tier.copies["u-99"] = await world.authority.read("u-99")
    assert await world.guard.stale("u-99", 60) == state("u-99")
    await world.clock.advance(25)
    assert await world.guard.stale("u-1", 60) == state()
    await world.guard.upsert_latest(state("u-99"))
    await world.clock.advance(29)
    await world.guard.upsert_latest(state("u-98"))
    assert set(floors) == {"u-99", "u-98"}


async def test_a_stale_copy_that_cannot_be_had_is_no_error(world: World) -> None:
    """The tier is asked until it is known to be away, and then no more."""
    for step in ("read_stale", "begin", "ping"):
        world.tier.fails[step] = UnavailableError("away")
    for _ in range(3):
        assert await world.guard.stale("u-1", 60) is None
    assert world.tier.log.count("read_stale") == 2
    assert world.guard.failures["read"] == 2


async def test_a_third_partys_repair_that_fails_goes_on(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """What is no StoreError is counted and logged by its class, without its text."""
    world.tier.fails["begin"] = KeyError(SECRET)
    with caplog.at_level(logging.WARNING, "layered_store"):
        await world.clock.advance(1.0)
    assert world.guard.failures["repair"] >= 1
    assert "KeyError" in caplog.text and SECRET not in caplog.text
    world.tier.log.clear()
    del world.tier.fails["begin"]
    await world.clock.advance(1.0)
    assert "stamp" in world.tier.log


async def test_a_third_partys_channel_that_fails_is_listened_to_again(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """No cache answers meanwhile; after that it is given a lease again."""
    cache = Cache()
    world.tier.fails["listen"] = KeyError(SECRET)
    world.guard.attach(cache)
    with caplog.at_level(logging.WARNING, "layered_store"):
        await world.guard.get_latest("u-1")
        await world.clock.advance(1.0)
    assert "KeyError" in caplog.text and SECRET not in caplog.text
    assert cache.leased == float("-inf")
    assert world.guard.channel_up is False
    del world.tier.fails["listen"]
    await world.clock.advance(2.0)
    assert cache.leased > world.clock.monotonic()
    assert world.guard.channel_up is True


async def test_a_third_partys_ping_that_fails_is_made_again(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """The channel stands meanwhile, so nothing else would begin the pings anew."""
    cache = Cache()
    world.guard.attach(cache)
    await world.guard.get_latest("u-1")
    world.tier.fails["ping"] = KeyError(SECRET)
    with caplog.at_level(logging.WARNING, "layered_store"):
        await world.clock.advance(2.0)
    assert "KeyError" in caplog.text and SECRET not in caplog.text
    assert world.guard.failures["ping"] >= 1
    assert cache.leased < world.clock.monotonic()
    del world.tier.fails["ping"]
    await world.clock.advance(1.0)
    assert cache.leased > world.clock.monotonic()
    assert world.tier.log.count("listen") == 1


async def test_a_channel_that_is_heard_is_up_also_while_the_tier_is_not_believed(
    world: World,
) -> None:
    """No lease is given while the system of record is away, for no pass can be made: that is no
    fault of the channel's, and whoever is told so looks at the wrong server."""
    cache = Cache()
    world.guard.attach(cache)
    await world.guard.get_latest("u-1")
    await world.clock.advance(1.0)
    assert world.guard.trouble == ""
    world.tier.trusted = False
    await world.clock.advance(2.0)
    assert cache.leased <= world.clock.monotonic()
    assert world.guard.channel_up is True
    assert world.guard.trouble == "the cache tier waits for its repair: caches above do not answer"
    world.tier.trusted, world.tier.echoes = True, False
    await world.clock.advance(2.0)
    assert world.guard.channel_up is False
    assert "channel" in world.guard.trouble


async def test_a_channel_on_which_nothing_is_heard_never_stood(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """A replica takes subscriptions and hands on what others' primary says, which ends each: that
    is no news each time, and not tried for ever as fast as can be."""
    caplog.set_level(logging.INFO, "layered_store")
    world.guard.attach(Cache())
    await world.guard.get_latest("u-1")
    await world.clock.advance(0.5)
    world.tier.echoes = False
    for _ in range(300):
        world.tier.notices.put_nowait(UnavailableError("of another server"))
        await world.clock.advance(0.1)
    assert caplog.text.count("channel_lost") == world.guard.channel_losses == 1
    assert "channel_back" not in caplog.text
    assert world.tier.log.count("listen") < 40
    world.tier.echoes = True
    while not world.tier.notices.empty():
        world.tier.notices.get_nowait()
    await world.clock.advance(2.0)
    assert caplog.text.count("channel_back") == 1
    assert world.guard.channel_up is True


async def test_a_tier_that_refuses_calls_alone_is_tried_again_less_and_less_often(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """Pings and passes come through all the time: each would have the next calls fail."""
    caplog.set_level(logging.INFO, "layered_store")

    async def calls(seconds: int) -> None:
        for _ in range(seconds * 20):
            await world.guard.get_latest("u-1")
            await world.guard.get_latest("u-2")
            await world.clock.advance(0.05)

    world.tier.fails["read"] = UnavailableError("refused")
    await calls(60)
    assert 1 < caplog.text.count("tier_lost") < 30
    del world.tier.fails["read"]
    await calls(10)
    world.tier.log.clear()
    await calls(1)
    assert world.tier.log.count("read") == 40
    # It stayed, so the next time counts as the first: it is back with the next pass.
    world.tier.fails["read"] = UnavailableError("refused")
    await calls(1)
    del world.tier.fails["read"]
    await calls(1)
    assert world.guard.trouble == ""


async def test_an_echo_of_before_the_channel_was_lost_renews_no_lease(world: World) -> None:
    """A ping may be so late that it is published over the next subscription: what was told between
    it and the pings of now has not been received."""
    cache, sent = Cache(), []

    async def ping(me: str, seconds: float, seen: float, number: int) -> float:
        sent.append((me, number))
        return 1.0

    world.tier.ping = ping  # type: ignore[method-assign]
    world.guard.attach(cache)
    reading = asyncio.create_task(world.guard.get_latest("u-1"))
    await world.clock.advance(0.5)
    late = list(sent)
    assert late
    world.tier.notices.put_nowait(KeyError("lost"))
    await world.clock.advance(0.5)
    assert world.tier.log.count("listen") == 2
    for me, number in late:
        world.tier.notices.put_nowait(Notice(b"", number, echo=me))
    await world.clock.advance(0.5)
    assert len(sent) > len(late)
    assert cache.leased == float("-inf")
    me, number = sent[-1]
    world.tier.notices.put_nowait(Notice(b"", number, echo=me))
    await world.clock.advance(0)
    assert cache.leased > world.clock.monotonic()
    await reading


async def test_a_cache_that_comes_later_is_followed_from_the_next_call_on(world: World) -> None:
    """It is told what others write, and once it left, no more."""
    cache = Cache()
    for _ in range(2):
        await world.guard.upsert_latest(state())  # until all is steady
    world.guard.attach(cache)
    assert "listen" not in world.tier.log
    assert world.guard.channel_up is None
    await world.guard.get_latest("u-1")
    await world.clock.advance(0.5)
    assert cache.leased > world.clock.monotonic()
    notice = Notice(b"digest", 7)
    world.tier.notices.put_nowait(notice)
    await world.clock.advance(0)
    assert cache.told == [notice]
    world.guard.detach(cache)
    world.tier.notices.put_nowait(notice)
    await world.clock.advance(0)
    assert cache.told == [notice]


async def test_a_tier_without_a_channel_keeps_nobody_waiting() -> None:
    """A cache above it is never leased; that it is not listened to is no loss."""
    world = World()
    world.tier.has_channel = False  # type: ignore[misc]
    cache = Cache()
    world.guard.attach(cache)
    before = world.clock.monotonic()
    await world.begin()
    assert world.clock.monotonic() == before
    await world.clock.advance(2.0)
    assert "listen" not in world.tier.log and "ping" not in world.tier.log
    assert cache.leased == float("-inf")
    assert world.guard.channel_up is None
    await world.guard.aclose()


async def test_after_closing_a_call_starts_nothing() -> None:
    """Neither tasks nor a pass that nobody would make; the system of record still answers."""
    world = World()
    await world.guard.aclose()
    tasks = asyncio.all_tasks()
    world.tier.fails["put"] = UnavailableError("away")
    await world.guard.upsert_latest(state())
    assert await world.authority.get_latest("u-1") == state()
    await world.clock.advance(1.0)
    assert asyncio.all_tasks() == tasks
    assert "begin" not in world.tier.log


async def elsewhere(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run something on an event loop of another thread."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(work())
        except BaseException as exc:
            failed.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    await asyncio.to_thread(thread.join)
    assert not failed, failed


async def test_trouble_on_another_loop_is_repaired_by_the_one_that_keeps_watch(
    world: World,
) -> None:
    """At once, not when the next pass is due."""
    await world.clock.advance(0.1)
    world.tier.log.clear()
    world.tier.fails["put"] = UnavailableError("away")

    await elsewhere(lambda: world.guard.upsert_latest(state()))
    assert await world.authority.get_latest("u-1") == state()
    del world.tier.fails["put"]
    await world.clock.advance(0)
    assert "begin" in world.tier.log


async def test_of_two_event_loops_that_come_at_the_same_time_one_keeps_watch() -> None:
    """The other one begins nothing; its passes and pings would wait on what is not its own."""
    world = World()
    threads: list[threading.Thread] = []
    tasks: list[int] = []

    async def call() -> None:
        await world.guard.get_latest("u-1")
        tasks.append(len(asyncio.all_tasks()))

    def meanwhile() -> None:
        if not threads:
            threads.append(threading.Thread(target=asyncio.run, args=(call(),)))
            threads[0].start()
            threads[0].join(0.2)  # it cannot end before, when one waits for the other

    world.guard._watch.loop = AskedLoop(meanwhile)
    await world.begin()
    await asyncio.to_thread(threads[0].join)
    assert tasks == [1]
    assert world.guard._watch.loop is asyncio.get_running_loop()
    await world.clock.advance(1.0)
    assert "stamp" in world.tier.log
    await world.guard.aclose()


async def test_closing_on_another_loop_ends_what_keeps_watch() -> None:
    """The tasks end on their own loop; none is left."""
    before = asyncio.all_tasks()
    world = await World().begin()
    assert asyncio.all_tasks() != before
    await elsewhere(world.guard.aclose)
    for _ in range(5):
        await asyncio.sleep(0)
    assert asyncio.all_tasks() == before


def test_closing_after_the_loop_is_closed_is_silent() -> None:
    """Its tasks ended with it."""

    async def begin() -> World:
        return await World().begin()

    world = asyncio.run(begin())
    asyncio.run(world.guard.aclose())


@pytest.mark.parametrize("which", ["all", "the repair", "the channel"])
async def test_what_others_cancel_begins_anew_on_the_next_call(which: str, world: World) -> None:
    """As some do with all tasks of their event loop. Not at once: it may be about to end, and what
    tidies up there must leave no task behind."""
    cache = Cache()
    before = asyncio.all_tasks()
    world.guard.attach(cache)
    await world.guard.get_latest("u-1")
    await world.clock.advance(0.5)
    repair, channel = world.guard._watch._tasks
    elsewhere = before - {repair}
    others = asyncio.all_tasks() - elsewhere
    running = {"all": others, "the repair": {repair}, "the channel": {channel}}[which]
    for task in running:
        task.cancel()
    await world.clock.advance(0.9)
    left = asyncio.all_tasks()
    assert which != "all" or left < before
    world.tier.log.clear()
    await world.guard.get_latest("u-1")
    assert asyncio.all_tasks() == left
    await world.clock.advance(0.1)
    reading = asyncio.create_task(world.guard.get_latest("u-1"))
    await world.clock.advance(0)
    await reading
    assert "begin" in world.tier.log and "listen" in world.tier.log
    assert cache.leased > world.clock.monotonic()
    assert len(asyncio.all_tasks() - elsewhere) == len(others)
    steady = asyncio.all_tasks()
    await world.clock.advance(5)
    await world.guard.get_latest("u-1")
    assert cache.leased > world.clock.monotonic()
    assert asyncio.all_tasks() == steady


@pytest.mark.parametrize("gives_up", [False, True])
async def test_closing_ends_also_when_a_driver_loses_a_cancellation(
    world: World, *, gives_up: bool
) -> None:
    """As redis-py does while it sends; and when whoever closes is cancelled meanwhile."""
    lost: list[str] = []

    class Losing(Tier):
        @asynccontextmanager
        async def listen(self) -> AsyncIterator[AsyncIterator[Notice]]:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                lost.append("lost")
            async with super().listen() as notices:
                yield notices

    guard = GuardedCopies(Losing(), world.authority, world.clock)
    guard.attach(Cache())
    starting = asyncio.create_task(guard.upsert_latest(state()))
    await world.clock.advance(1.5)
    await starting
    before = asyncio.all_tasks()
    closing = asyncio.create_task(guard.aclose())
    await world.clock.advance(0.1)
    assert lost and not closing.done()
    if gives_up:
        closing.cancel()
        await settle()
        assert closing.cancelled()
        closing = asyncio.create_task(guard.aclose())
        await settle()
        assert not closing.done()
    await world.clock.advance(0.2)
    assert closing.done()
    assert asyncio.all_tasks() < before


async def test_one_read_of_several_that_fails_leaves_none_running(world: World) -> None:
    """The first failure is raised when all have ended."""
    world.tier.fails["put"] = ClosedError("this store was closed")
    with pytest.raises(StoreError):
        await world.guard.upsert_latest_many([state("u-1"), state("u-2")])
    assert world.tier.log.count("put") == 2


class Meanwhile(OrderedDict[str, tuple[int, float]]):
    """Has something done in another thread whenever somebody looks for its oldest entry."""

    done: Callable[[], None] | None = None
    thread = threading.Thread()

    def __iter__(self) -> Iterator[str]:
        found = super().__iter__()
        done, self.done = self.done, None
        if done is not None:
            self.thread = threading.Thread(target=done)
            self.thread.start()
            self.thread.join(0.2)  # it cannot end before, when one waits for the other
        return found


async def test_event_loops_of_two_threads_forget_what_is_old_at_the_same_time(
    world: World,
) -> None:
    """What one of them was told of is not raised as an error by the other."""
    guard, seen = world.guard, world.guard._seen
    seen._floors = floors = Meanwhile(seen._floors)
    floors.done = lambda: seen.raise_floor("u-2", 7)
    await guard.upsert_latest(state())
    floors.thread.join()
    assert seen.floor("u-2") == 7
    assert seen.floor("u-1") > 0
