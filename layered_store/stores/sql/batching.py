"""Calls that wait together share one round trip.

A lone call leaves at the end of the turn of the event loop in which it was made. Calls of the same
turn, and those that come while as many batches are out as may be, leave together in the next one.
Each call has a future of its own; a failure is the future's *result*, so that one whose caller is
gone does not complain that nobody looked.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from layered_store.errors import ClosedError, StoreError, StoreTimeoutError
from layered_store.running import spawn

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Container, Sequence

    from layered_store.clock import Clock, TimerHandle
    from layered_store.stores.sql.session import Session

__all__ = ["MAX_BATCH", "Batch", "Batcher", "Reads", "Writes", "one_by_one", "own_error"]

T = TypeVar("T")

MAX_BATCH: Final = 500
"""Most calls in one batch: a transaction must not hold its locks for long."""

_STRIKES: Final = 2
"""Failures in a row that are not about one call; then the others are not tried any more."""

_WORTH_SPLITTING: Final = 16
"""Fewer calls than this are never spread over several batches."""

_DOUBLES: Final = 16
"""Further writes of users already in a batch that may wait for the next one."""

# What is called for, and the future of the caller.
Entry = tuple[Any, asyncio.Future[Any]]


class Batch:
    """Calls that went out together.

    Args:
        entries: what was called for and by whom.
    """

    __slots__ = ("_part", "_session", "_stands", "cut_off", "entries", "task")

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = entries
        self.cut_off = False
        self.task: asyncio.Task[None] | None = None
        # What it does now, in one session or as a batch of its own, and whether anything that it
        # did before was committed.
        self._session: Session | None = None
        self._part: Batch | None = None
        self._stands = False

    @property
    def wanted(self) -> bool:
        """Whether anybody still waits for it."""
        return any(not future.done() for _, future in self.entries)

    @property
    def sent(self) -> bool:
        """Whether a commit was sent: what some of it wrote stands, or may."""
        return (
            self._stands
            or (self._session is not None and self._session.sent)
            or (self._part is not None and self._part.sent)
        )

    def goes_on_in(self, session: Session) -> Session:
        """Note the session of what is done next; return it."""
        self._stands, self._session = self.sent, session
        return session

    def part(self, entries: list[Entry]) -> Batch:
        """Return a batch of some of the calls, which is done next."""
        self._stands, self._part = self.sent, Batch(entries)
        return self._part


class Batcher(ABC):
    """The calls of one kind in one event loop.

    Args:
        run: does a batch and returns one result per entry, an exception object for those that
            failed; when it raises, all failed.
        alone: whether calls that failed together with this error should each be tried alone.
        clock: source of time.
        limit: seconds that a call may take, the wait for its batch included.
        out: most batches under way.
        stoppable: whether a batch that nobody waits for is cancelled.
        stop: cancels its task.
        expired: told when calls got no answer within the limit, with when the first of them began.
    """

    writes = False

    def __init__(
        self,
        run: Callable[[Batch], Awaitable[Sequence[Any]]],
        alone: Callable[[Exception], bool],
        clock: Clock,
        limit: float,
        *,
        out: int,
        stoppable: bool,
        stop: Callable[[asyncio.Task[None]], object] = asyncio.Task.cancel,
        expired: Callable[[float], object] | None = None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.waiting: deque[Entry] = deque()
        self.out: set[Batch] = set()
        self._run = run
        self._alone = alone
        self._clock = clock
        self._limit = limit
        self._stop = stop
        self._expired = expired
        self._most = out
        self._stoppable = stoppable
        self._scheduled = False
        self._deadline = 0.0
        self._calls: deque[tuple[asyncio.Future[Any], float]] = deque()
        self._timer: TimerHandle | None = None

    def submit(self, what: Any) -> asyncio.Future[Any]:
        """Queue a call; the future's result is its result or an exception object."""
        future = self.loop.create_future()
        if not self._scheduled:
            # Calls of one turn of the event loop also share one deadline.
            self._scheduled = True
            self._deadline = self._clock.monotonic() + self._limit
            self.loop.call_soon(self._flush)
        self.waiting.append((what, future))
        self._calls.append((future, self._deadline))
        if self._timer is None:
            self._timer = self._clock.call_later(self._limit, self._watch)
        return future

    def left(self) -> None:
        """Note that a caller was cancelled: a batch that nobody waits for any more is cut off."""
        if not self._stoppable:
            return
        for batch in self.out:
            if batch.task is not None and not batch.cut_off and not batch.wanted:
                # Once: psycopg then asks the server to stop, and must not be cut off in that.
                batch.cut_off = True
                self._stop(batch.task)

    async def drain(self) -> None:
        """Wait until nothing is under way."""
        while self.waiting or self.out:
            tasks = [batch.task for batch in self.out if batch.task is not None]
            if tasks:
                await asyncio.wait(tasks)
            await self._clock.sleep(0)

    def close(self) -> None:
        """Fail what still waits, and cut off what is under way."""
        unfinished = dict(self._calls)
        unknown = self._unknown_of(unfinished)
        for future in unfinished:
            if not future.done():
                future.set_result(
                    ClosedError(
                        "this store was closed; build a new one", outcome_unknown=future in unknown
                    )
                )
        self.waiting.clear()
        self._calls.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.left()

    def _flush(self) -> None:
        self._scheduled = False
        while self.waiting and (free := self._most - len(self.out)) > 0:
            # Split: the server works on one part while this process answers the other.
            share = max(_WORTH_SPLITTING, -(-len(self.waiting) // free))
            entries = self._take(min(share, MAX_BATCH))
            if not entries:
                return
            batch = Batch(entries)
            self.out.add(batch)
            batch.task = spawn(self._do(batch))
            batch.task.add_done_callback(partial(self._ended, batch))

    @abstractmethod
    def _take(self, most: int) -> list[Entry]:
        """Take the next batch off the queue, of at most so many users' calls."""

    async def _do(self, batch: Batch) -> None:
        results: Sequence[Any]
        try:
            results = await self._run(batch)
        except Exception as exc:  # noqa: BLE001  handed to those who wait
            results = await self._each(batch, exc)
        for (_, future), result in zip(batch.entries, results, strict=True):
            _answer(future, result)

    def _ended(self, batch: Batch, _: object) -> None:
        """Let the next ones go; a callback, since a task that was cut off may never have begun.

        It runs after those who were answered: they may have called again, and go along.
        """
        self.out.discard(batch)
        for _, future in batch.entries:
            if not future.done():  # cut off from outside, as at the end of the event loop
                future.cancel()
        calls = self._calls
        while calls and calls[0][0].done():
            calls.popleft()
        if self.waiting and not self._scheduled:
            self._flush()

    async def _each(self, batch: Batch, error: Exception) -> list[Any]:
        async def run(entries: list[Entry]) -> Sequence[Any]:
            future = entries[0][1]
            if future.done():
                return [None]
            try:
                results = await self._run(batch.part(entries))
            except Exception as exc:
                _answer(future, exc)
                raise
            # At once: nobody is out of time for the others that are made behind it.
            _answer(future, results[0])
            return results

        return await one_by_one(batch.entries, run, error, self._alone)

    def _watch(self) -> None:
        """Give up the calls that wait too long."""
        self._timer = None
        calls = self._calls
        while calls and calls[0][0].done():
            calls.popleft()
        if not calls:
            return
        left = calls[0][1] - self._clock.monotonic()
        if left > 0:
            self._timer = self._clock.call_later(left, self._watch)
            return
        # When this process was too busy to look, the answer may be here, unread: two more turns of
        # the loop read it.
        self.loop.call_soon(self.loop.call_soon, self._expire)

    def _expire(self) -> None:
        now = self._clock.monotonic()
        calls = self._calls
        over: dict[asyncio.Future[Any], float] = {}
        while calls and (calls[0][0].done() or calls[0][1] <= now):
            future, deadline = calls.popleft()
            if not future.done():
                over[future] = deadline - self._limit
        unknown = self._unknown_of(over)
        for future in over:
            future.set_result(
                StoreTimeoutError(
                    f"no answer within {self._limit:g} s", outcome_unknown=future in unknown
                )
            )
        begun = next(iter(over.values()), None)
        self.left()
        if begun is not None and self._expired is not None:
            self._expired(begun)
        if calls:
            if self._timer is not None:  # of a call that came since: others wait longer than it
                self._timer.cancel()
            self._watch()

    def _unknown_of(self, over: Container[asyncio.Future[Any]]) -> set[asyncio.Future[Any]]:
        """Return the calls that stand or may, though those who are over are told."""
        return {
            future
            for batch in self.out
            if self.writes and self._may_commit(batch, over)
            for _, future in batch.entries
        }

    def _may_commit(self, batch: Batch, over: Container[asyncio.Future[Any]]) -> bool:
        if not self._stoppable or batch.sent:
            return True
        # It is not cut off while others wait for it.
        return any(not future.done() and future not in over for _, future in batch.entries)


class Reads(Batcher):
    """Reads by digest; the same digest is asked for once per batch."""

    def _take(self, most: int) -> list[Entry]:
        waiting = self.waiting
        if len(waiting) <= most:
            entries = [entry for entry in waiting if not entry[1].done()]
            waiting.clear()
            return entries
        entries = []
        while waiting and len(entries) < most:
            entry = waiting.popleft()
            if not entry[1].done():
                entries.append(entry)
        return entries


class Writes(Batcher):
    """Changes of users, each with a ``digest``: those of one user go in their order.

    A batch holds one kind of them, and nothing of a user of whom another batch is out.
    """

    writes = True
    one_each = False
    """Whether a batch holds one write per user while that leaves few behind."""

    def _take(self, most: int) -> list[Entry]:
        barred = {what.digest for batch in self.out for what, _ in batch.entries}
        entries: list[Entry] = []
        doubles: list[Entry] = []
        later: list[Entry] = []
        taken: set[bytes] = set()
        waiting = self.waiting
        while waiting and len(taken) < most and len(entries) + len(doubles) < MAX_BATCH:
            entry = waiting.popleft()
            what, future = entry
            if future.done():
                continue
            if what.digest in barred or (entries and type(what) is not type(entries[0][0])):
                barred.add(what.digest)
                later.append(entry)
            elif self.one_each and what.digest in taken:
                doubles.append(entry)
            else:
                taken.add(what.digest)
                entries.append(entry)
        if len(doubles) > _DOUBLES:
            entries += doubles
        else:
            later[:0] = doubles
        waiting.extendleft(reversed(later))
        return entries


async def one_by_one(
    items: Sequence[T],
    run: Callable[[list[T]], Awaitable[Sequence[Any]]],
    error: Exception,
    concerns_one: Callable[[Exception], bool],
) -> list[Any]:
    """Do what failed together one by one, so that nobody fails for another's sake.

    Args:
        items: what failed.
        run: does some of them and returns their results.
        error: what they failed with.
        concerns_one: whether an error is about one item; two others in a row end it.

    Returns:
        The results, an exception object for each that failed.
    """
    if len(items) == 1 or isinstance(error, StoreTimeoutError) or _unknown(error):
        return [error] * len(items)
    results: list[Any] = []
    strikes = 0
    for item in items:
        if strikes == _STRIKES:
            results.append(error)
            continue
        try:
            results += await run([item])
            strikes = 0
        except Exception as exc:  # noqa: BLE001  handed to the one who waits
            results.append(exc)
            strikes = 0 if concerns_one(exc) else strikes + 1
            error = exc
    return results


def _answer(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)


def _unknown(error: Exception) -> bool:
    return isinstance(error, StoreError) and error.outcome_unknown


def own_error(error: Exception, operation: str, layer: str) -> Exception:
    """Return an error that many share as one of this caller's own."""
    if not isinstance(error, StoreError):
        return error
    twin = error.fresh()
    twin.operation = operation
    twin.layer = layer
    return twin
