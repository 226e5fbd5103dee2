"""Calls that share a round trip: under many interleavings, faults and cancellations."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from layered_store.errors import ClosedError, StoreError, StoreTimeoutError, UnavailableError
from layered_store.stores.sql.batching import MAX_BATCH, Batch, Reads, Writes, own_error
from layered_store.stores.sql.session import Session
from layered_store.testing.clock import FakeClock
from layered_store.testing.explore import explore

if TYPE_CHECKING:
    from layered_store.testing.explore import Schedule


@dataclass(frozen=True)
class Put:
    """One write of the model."""

    digest: bytes
    value: int


@dataclass(frozen=True)
class Drop:
    """One erasure of the model."""

    digest: bytes
    value: int


@dataclass
class Backend:
    """A table that batches are done on; notes what came in and when."""

    clock: Any = None
    random: Any = None
    log: dict[bytes, list[int]] = field(default_factory=lambda: defaultdict(list))
    batches: list[list[Any]] = field(default_factory=list)
    busy: set[bytes] = field(default_factory=set)
    most: int = 0
    under_way: int = 0
    poison: frozenset[int] = frozenset()
    failing: float = 0.0

    async def run(self, batch: Batch) -> list[Any]:
        items = [what for what, _ in batch.entries]
        self.batches.append(items)
        users = {item.digest for item in items}
        assert not users & self.busy, "two batches with one user were out"
        assert len({type(item) for item in items}) == 1
        self.busy |= users
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            if self.random is not None:
                await self.clock.sleep(self.random.choice((0.0, 0.01, 0.02)))
            if self.poison & {item.value for item in items}:
                raise StoreError("one of them is bad")
            if self.random is not None and self.random.random() < self.failing:
                raise UnavailableError("the connection is gone")
            for item in items:
                self.log[item.digest].append(item.value)
            return [item.value * 10 for item in items]
        finally:
            self.under_way -= 1
            self.busy -= users


def about_one(error: Exception) -> bool:
    return not isinstance(error, UnavailableError)


def writes(backend: Backend, clock: Any, **options: Any) -> Writes:
    return Writes(
        backend.run, about_one, clock, options.pop("limit", 5.0),
        out=options.pop("out", 2), stoppable=True,
    )  # fmt: skip


async def test_a_lone_call_goes_at_once_and_alone() -> None:
    """It does not wait for company: no timer, no other call, one batch of one."""
    backend = Backend()
    batcher = writes(backend, FakeClock())
    assert await batcher.submit(Put(b"u", 1)) == 10
    assert backend.batches == [[Put(b"u", 1)]]


async def test_calls_of_one_turn_share_a_batch_of_bounded_size() -> None:
    """As many as there are, up to the bound; each gets its own result."""
    backend = Backend()
    batcher = writes(backend, FakeClock())
    count = 2 * MAX_BATCH + 7
    futures = [batcher.submit(Put(str(n).encode(), n)) for n in range(count)]
    assert [await future for future in futures] == [n * 10 for n in range(count)]
    assert sorted(map(len, backend.batches)) == [7, MAX_BATCH, MAX_BATCH]
    await batcher.drain()
    assert not batcher._calls, "nothing is kept of calls that ended"
    assert not batcher.out


@pytest.mark.parametrize(("out", "sizes"), [(1, [64]), (2, [32, 32]), (3, [22, 21, 21])])
async def test_a_crowd_is_spread_over_the_batches_that_may_be_out(
    out: int, sizes: list[int]
) -> None:
    """The server works on one part while this process answers another; a few stay together."""
    backend = Backend()
    batcher = writes(backend, FakeClock(), out=out)
    for future in [batcher.submit(Put(str(n).encode(), n)) for n in range(64)]:
        await future
    assert [len(items) for items in backend.batches] == sizes
    await batcher.drain()
    for future in [batcher.submit(Put(str(n).encode(), n)) for n in range(16)]:
        await future
    assert len(backend.batches[-1]) == 16


async def test_reads_of_one_user_keep_their_places() -> None:
    """The same user may be asked for many times in a batch; what runs it sees each caller."""
    seen: list[list[Any]] = []

    async def run(batch: Batch) -> list[Any]:
        seen.append([what for what, _ in batch.entries])
        return [what * 2 for what, _ in batch.entries]

    reads = Reads(run, about_one, FakeClock(), 5.0, out=1, stoppable=True)
    futures = [reads.submit(n % 2) for n in range(6)]
    assert [await future for future in futures] == [0, 2, 0, 2, 0, 2]
    assert seen == [[0, 1, 0, 1, 0, 1]]


def test_batched_is_as_one_after_another() -> None:
    """Whatever the order of tasks: own results, each user's writes in the order of the calls.

    Some calls are poisoned, some are cancelled at any moment, writes and erasures are mixed.
    """

    async def scenario(schedule: Schedule) -> None:
        random = schedule.random
        backend = Backend(schedule.clock, random, poison=frozenset({13, 17}))
        batcher = writes(backend, schedule.clock, out=random.choice((1, 2, 4)))
        batcher.one_each = random.random() < 0.5
        called: dict[bytes, list[int]] = defaultdict(list)
        cancelled: set[int] = set()

        async def call(value: int) -> None:
            digest = random.choice((b"a", b"b", b"c"))
            kind = Drop if random.random() < 0.2 else Put
            called[digest].append(value)
            try:
                result = await batcher.submit(kind(digest, value))
            except asyncio.CancelledError:
                cancelled.add(value)
                batcher.left()
                raise
            if value in backend.poison:
                assert isinstance(result, StoreError), result
            else:
                assert result == value * 10

        tasks = [asyncio.create_task(call(n), name=f"call {n}") for n in range(24)]
        for task in random.sample(tasks, 6):
            await schedule.clock.sleep(random.choice((0.0, 0.0, 0.01)))
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert result is None or isinstance(result, asyncio.CancelledError), result
        await batcher.drain()
        assert backend.most <= 4
        for digest, log in backend.log.items():
            places = [called[digest].index(value) for value in log]
            assert places == sorted(places), (called[digest], log)
            assert len(set(log)) == len(log), "done twice"
        done = {value for log in backend.log.values() for value in log}
        expected = {value for values in called.values() for value in values}
        assert expected - done <= cancelled | backend.poison

    explore(scenario, schedules=400)


def test_a_dead_backend_is_not_tried_for_each_call() -> None:
    """When the connection is gone, a group of hundreds costs a few more tries, not hundreds."""

    async def scenario(schedule: Schedule) -> None:
        backend = Backend(schedule.clock, schedule.random, failing=1.0)
        batcher = writes(backend, schedule.clock)
        futures = [batcher.submit(Put(str(n).encode(), n)) for n in range(300)]
        for future in futures:
            assert isinstance(await future, UnavailableError)
        assert len(backend.batches) == 6  # two halves, each as a whole and two calls alone

    explore(scenario, schedules=5)


async def test_an_unknown_outcome_is_not_tried_again() -> None:
    """After a commit that was cut off, whoever called decides."""
    tries = 0

    async def run(batch: Batch) -> list[Any]:
        nonlocal tries
        tries += 1
        raise UnavailableError("cut off", outcome_unknown=True)

    batcher = Writes(run, lambda _: True, FakeClock(), 5.0, out=1, stoppable=True)
    futures = [batcher.submit(Put(str(n).encode(), n)) for n in range(3)]
    for future in futures:
        error = await future
        assert isinstance(error, UnavailableError)
        assert error.outcome_unknown
    assert tries == 1


async def test_each_call_has_its_own_time_limit() -> None:
    """A batch that hangs fails its calls in time and is cut off; those behind it fail in time too.

    The wait in the queue counts.
    """
    clock = FakeClock()
    cut = asyncio.Event()

    async def hang(batch: Batch) -> list[Any]:
        try:
            return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]
        except asyncio.CancelledError:
            cut.set()
            raise

    batcher = Writes(hang, about_one, clock, 2.0, out=1, stoppable=True)
    first = batcher.submit(Put(b"a", 1))
    await asyncio.sleep(0)
    await clock.advance(1.0)
    second = batcher.submit(Put(b"b", 2))
    await clock.advance(1.0)
    await asyncio.wait([first])
    assert isinstance(first.result(), StoreTimeoutError)
    assert not second.done()
    await cut.wait()
    await clock.advance(1.0)
    await asyncio.wait([second])
    assert isinstance(second.result(), StoreTimeoutError)
    assert not second.result().outcome_unknown
    await batcher.drain()


async def test_a_call_after_a_quiet_time_has_its_limit_still() -> None:
    """And whoever is told of calls that got no answer learns when the first of them began."""
    clock, told = FakeClock(), []

    async def run(batch: Batch) -> list[Any]:
        if batch.entries[0][0].value:
            await asyncio.Event().wait()
        return [1 for _ in batch.entries]

    batcher = Writes(
        run, about_one, clock, 2.0, out=1, stoppable=True, expired=told.append
    )  # fmt: skip
    for _ in range(2):
        assert await batcher.submit(Put(b"u", 0)) == 1
        await clock.advance(10.0)
    assert told == []
    begun = clock.monotonic()
    hangs = batcher.submit(Put(b"u", 1))
    await clock.advance(1.0)
    later = batcher.submit(Put(b"v", 1))
    await clock.advance(1.0)
    assert isinstance(await hangs, StoreTimeoutError)
    assert told == [begun]
    assert not later.done()
    await clock.advance(1.0)
    assert isinstance(await later, StoreTimeoutError)
    await batcher.drain()


@pytest.mark.parametrize(
    ("stoppable", "committing", "unknown"),
    [(True, False, False), (True, True, True), (False, False, True)],
)
async def test_a_write_out_of_time_is_unknown_once_it_may_be_committed(
    *, stoppable: bool, committing: bool, unknown: bool
) -> None:
    """Before, it is cut off; in a thread that nobody can stop it may always be."""
    clock = FakeClock()
    session = Session(None, None, clock, committing=committing)  # type: ignore[arg-type]

    async def hang(batch: Batch) -> list[Any]:
        batch.goes_on_in(session)
        await clock.sleep(9.0)
        return [1]

    batcher = Writes(hang, about_one, clock, 2.0, out=1, stoppable=stoppable)
    call = batcher.submit(Put(b"a", 1))
    await asyncio.sleep(0)
    await clock.advance(2.0)
    await asyncio.wait([call])
    assert isinstance(call.result(), StoreTimeoutError)
    assert call.result().outcome_unknown is unknown
    await clock.advance(7.0)
    await batcher.drain()


async def test_a_call_that_is_over_while_its_batch_goes_on_may_take_effect() -> None:
    """Others wait for the batch still, and what it commits is not theirs alone."""
    clock = FakeClock()
    gates = [asyncio.Event(), asyncio.Event()]

    async def run(batch: Batch) -> list[Any]:
        await gates[len(stored)].wait()
        stored.append([what.value for what, _ in batch.entries])
        return [1 for _ in batch.entries]

    stored: list[list[int]] = []
    batcher = Writes(run, about_one, clock, 2.0, out=1, stoppable=True)
    batcher.submit(Put(b"a", 1))
    await asyncio.sleep(0)
    await clock.advance(0.5)
    early = batcher.submit(Put(b"b", 2))
    await asyncio.sleep(0)
    await clock.advance(1.0)
    late = batcher.submit(Put(b"c", 3))
    gates[0].set()
    await clock.advance(1.0)
    told = await early
    assert isinstance(told, StoreTimeoutError)
    assert told.outcome_unknown
    gates[1].set()
    assert await late == 1
    assert stored == [[1], [2, 3]]


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("ended", [False, True])
async def test_a_call_that_is_over_may_stand_once_a_commit_was_sent(
    *, alone: bool, ended: bool
) -> None:
    """Also when that was of a part of the batch, or when more is done behind it."""
    clock = FakeClock()

    async def run(batch: Batch) -> list[Any]:
        if alone and len(batch.entries) > 1:
            raise StoreError("one of them is bad")
        if alone and batch.entries[0][0].value == 1:
            return [1]
        session = batch.goes_on_in(Session(None, None, clock))  # type: ignore[arg-type]
        session.committing = True
        if ended:
            session.committing, session.committed = False, True
            batch.goes_on_in(Session(None, None, clock))  # type: ignore[arg-type]
        return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

    batcher = Writes(run, about_one, clock, 2.0, out=1, stoppable=True)
    futures = [batcher.submit(Put(bytes([n]), n)) for n in (1, 2)]
    await asyncio.sleep(0)
    await clock.advance(2.0)
    if alone:
        assert await futures.pop(0) == 1  # told as it went
    for future in futures:
        told = await future
        assert isinstance(told, StoreTimeoutError)
        assert told.outcome_unknown
    await batcher.drain()


async def test_what_is_made_one_by_one_is_told_as_it_went() -> None:
    """What is stored already is not out of time with the rest, and a commit cut off is unknown."""
    clock = FakeClock()

    async def run(batch: Batch) -> list[Any]:
        if len(batch.entries) > 1:
            raise UnavailableError("the write and an erasure met")
        ((what, _),) = batch.entries
        session = Session(None, None, clock, committing=True)  # type: ignore[arg-type]
        batch.goes_on_in(session)
        if what.value == 2:
            await clock.sleep(9.0)
        session.committing = False
        return [what.value]

    batcher = Writes(run, about_one, clock, 2.0, out=1, stoppable=True)
    first, second, third = (batcher.submit(Put(b"%d" % n, n)) for n in (1, 2, 3))
    async with asyncio.timeout(5):
        assert await first == 1
    await clock.advance(2.0)
    await asyncio.wait([second, third])
    assert isinstance(second.result(), StoreTimeoutError)
    assert second.result().outcome_unknown
    assert isinstance(third.result(), StoreTimeoutError)
    await batcher.drain()


async def test_a_batch_that_nobody_waits_for_is_cut_off() -> None:
    """Only then: while one caller is left, it goes on."""
    gate = asyncio.get_running_loop().create_future()
    ended: list[str] = []

    async def run(batch: Batch) -> list[Any]:
        try:
            await asyncio.shield(gate)
        except asyncio.CancelledError:
            ended.append("cut")
            raise
        return [1 for _ in batch.entries]

    batcher = Writes(run, about_one, FakeClock(), 5.0, out=1, stoppable=True)

    async def call(digest: bytes) -> Any:
        try:
            return await batcher.submit(Put(digest, 1))
        except asyncio.CancelledError:
            batcher.left()
            raise

    first, second = (asyncio.create_task(call(digest)) for digest in (b"a", b"b"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    await asyncio.sleep(0)
    assert not ended
    second.cancel()
    await asyncio.wait([second])
    await batcher.drain()
    assert ended == ["cut"]
    gate.cancel()


async def test_a_batch_that_cannot_be_stopped_goes_on_though_nobody_waits() -> None:
    """As in a thread, where it ends as it would have."""
    gate, stopped = asyncio.Event(), []

    async def run(batch: Batch) -> list[Any]:
        await gate.wait()
        return [1]

    batcher = Writes(
        run, about_one, FakeClock(), 5.0, out=1, stoppable=False, stop=stopped.append
    )  # fmt: skip
    batcher.submit(Put(b"u", 1))
    await asyncio.sleep(0)
    (future,) = [future for batch in batcher.out for _, future in batch.entries]
    future.cancel()
    batcher.left()
    gate.set()
    await batcher.drain()
    assert stopped == []


async def test_a_batch_is_cut_off_once() -> None:
    """However many leave: what a driver does to stop the server's work is not cut off in turn.

    psycopg's request to cancel, when interrupted, ends pgbouncer 1.18 (its issue 801).
    """
    ended: list[str] = []
    stopped = asyncio.Event()

    async def run(batch: Batch) -> list[Any]:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cut")
            await stopped.wait()
            ended.append("stopped")
        return []

    batcher = Reads(run, about_one, FakeClock(), 5.0, out=1, stoppable=True)
    batcher.submit(b"a").cancel()
    future = batcher.submit(b"b")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    future.cancel()
    for _ in range(3):
        batcher.left()
        await asyncio.sleep(0)
    assert ended == ["cut"]
    stopped.set()
    await batcher.drain()
    assert ended == ["cut", "stopped"]


async def test_what_still_waits_at_the_end_is_told() -> None:
    """``close`` leaves no caller behind."""
    batcher = writes(Backend(), FakeClock())
    future = batcher.submit(Put(b"u", 1))
    batcher.close()
    assert isinstance(await future, ClosedError)


async def test_what_is_under_way_at_the_end_is_cut_off_and_told_whether_it_may_stand() -> None:
    """``close`` comes when those who wait have waited long enough."""
    ended: list[str] = []

    async def run(batch: Batch) -> list[Any]:
        session = batch.goes_on_in(Session(None, None, FakeClock()))  # type: ignore[arg-type]
        session.committing = batch.entries[0][0].value == 2
        try:
            return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]
        except asyncio.CancelledError:
            ended.append("cut")
            raise

    batcher = Writes(run, about_one, FakeClock(), 5.0, out=2, stoppable=True)
    futures = []
    for number in (1, 2):
        futures.append(batcher.submit(Put(bytes([number]), number)))
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    batcher.close()
    await batcher.drain()
    told = [future.result() for future in futures]
    assert all(isinstance(error, ClosedError) for error in told)
    assert [error.outcome_unknown for error in told] == [False, True]
    assert ended == ["cut", "cut"]


async def test_many_writes_of_one_user_do_not_go_one_by_one() -> None:
    """With one write per user and batch, a crowd around one user still shares batches."""
    backend = Backend()
    batcher = writes(backend, FakeClock())
    batcher.one_each = True
    futures = [batcher.submit(Put(b"u", n)) for n in range(100)]
    for future in futures:
        await future
    assert len(backend.batches) == 1
    assert backend.log[b"u"] == list(range(100))
    futures = [batcher.submit(Put(b"u", n)) for n in range(4)]
    for future in futures:
        await future
    assert [len(items) for items in backend.batches[1:]] == [1, 1, 1, 1]


@pytest.mark.parametrize("out", [1, 3])
async def test_only_a_few_batches_are_out(out: int) -> None:
    """Calls that come while all are out join the next batch."""
    gate = asyncio.get_running_loop().create_future()
    sizes: list[int] = []

    async def run(batch: Batch) -> list[Any]:
        sizes.append(len(batch.entries))
        await gate
        return [None for _ in batch.entries]

    batcher = Writes(run, about_one, FakeClock(), 5.0, out=out, stoppable=True)
    futures = []
    for n in range(10):
        futures.append(batcher.submit(Put(str(n).encode(), n)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert len(batcher.out) == out
    gate.set_result(None)
    for future in futures:
        await future
    assert sizes == [1] * out + [10 - out]


async def test_closing_waits_for_what_was_queued_in_the_same_turn() -> None:
    """It has not left yet, and is done all the same."""
    backend = Backend()
    batcher = writes(backend, FakeClock())
    call = batcher.submit(Put(b"u", 1))
    await batcher.drain()
    assert call.result() == 10
    await batcher.drain()


async def test_of_many_reads_those_whose_caller_left_are_not_done() -> None:
    """Their places in the batch go to others."""
    seen: list[list[Any]] = []

    async def run(batch: Batch) -> list[Any]:
        seen.append([what for what, _ in batch.entries])
        return [what for what, _ in batch.entries]

    reads = Reads(run, about_one, FakeClock(), 5.0, out=1, stoppable=True)
    futures = [reads.submit(n) for n in range(MAX_BATCH + 2)]
    futures[0].cancel()
    futures[MAX_BATCH].cancel()
    await reads.drain()
    assert seen == [[*range(1, MAX_BATCH), MAX_BATCH + 1]]


@pytest.mark.parametrize("kind", [Reads, Writes])
async def test_a_call_that_was_cancelled_before_it_left_is_not_done(kind: Any) -> None:
    """However many of those that wait are."""
    seen: list[Any] = []

    async def run(batch: Batch) -> list[Any]:
        seen.extend(what for what, _ in batch.entries)
        return [1 for _ in batch.entries]

    batcher = kind(run, about_one, FakeClock(), 5.0, out=2, stoppable=True)
    calls = [Put(b"%d" % n, n) for n in range(40)]
    futures = [batcher.submit(call) for call in calls]
    for future in futures[1:]:
        future.cancel()
    await batcher.drain()
    assert seen == calls[:1]
    assert futures[0].result() == 1


async def test_what_is_no_error_of_ours_reaches_each_caller_as_it_is() -> None:
    """A driver's that nobody translated, or a mistake."""
    error = KeyError("x")

    async def run(batch: Batch) -> list[Any]:
        raise error

    batcher = Writes(run, about_one, FakeClock(), 5.0, out=1, stoppable=True)
    futures = [batcher.submit(Put(b"%d" % n, n)) for n in range(3)]
    await batcher.drain()
    assert [future.result() for future in futures] == [error] * 3


async def test_a_batch_that_the_end_of_the_loop_cuts_off_leaves_nobody_waiting() -> None:
    """Its callers are cancelled as well, and its place is free."""
    gate = asyncio.Event()

    async def run(batch: Batch) -> list[Any]:
        await gate.wait()
        return [None for _ in batch.entries]

    reads = Reads(run, about_one, FakeClock(), 5.0, out=1, stoppable=True)
    first = reads.submit(1)
    await asyncio.sleep(0)
    second = reads.submit(2)
    (batch,) = reads.out
    assert batch.task is not None
    batch.task.cancel()
    gate.set()
    await reads.drain()
    assert first.cancelled()
    assert second.result() is None


def test_a_shared_error_is_each_callers_own() -> None:
    """With the caller's operation; what is no StoreError is handed on as it is."""
    shared = UnavailableError("away", operation="read", layer="x", outcome_unknown=True)
    mine = own_error(shared, "delete", "SQLStore")
    assert isinstance(mine, UnavailableError) and mine is not shared
    assert (mine.operation, mine.layer, mine.outcome_unknown) == ("delete", "SQLStore", True)
    assert shared.operation == "read"
    other = KeyError("x")
    assert own_error(other, "delete", "SQLStore") is other


async def test_calls_that_come_do_not_keep_others_waiting() -> None:
    """One that comes while the first is given up has its own time limit, and the second its own."""

    class Busy(Reads):
        def _watch(self) -> None:
            super()._watch()
            self.loop.call_soon(self.submit, b"third")

    async def hangs(_: Batch) -> list[Any]:
        await asyncio.Event().wait()
        return []

    clock = FakeClock()
    batcher = Busy(hangs, about_one, clock, 5.0, out=1, stoppable=True)
    first = batcher.submit(b"first")
    await clock.advance(1)
    second = batcher.submit(b"second")
    await clock.advance(4)
    assert isinstance(first.result(), StoreTimeoutError)
    assert not second.done()
    await clock.advance(1)
    assert isinstance(second.result(), StoreTimeoutError)
    batcher.close()
