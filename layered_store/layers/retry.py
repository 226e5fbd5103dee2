"""Repeat what failed in passing, without making an outage worse."""

from __future__ import annotations

import asyncio
import random as _random
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, ParamSpec, TypeVar

from layered_store.call import current_call
from layered_store.checks import not_of_user
from layered_store.clock import SYSTEM_CLOCK, Clock
from layered_store.coherence.outcomes import may_take_effect, not_happened
from layered_store.errors import (
    CircuitOpenError,
    ConfigError,
    ErasureIncompleteError,
    StoreError,
    StoreTimeoutError,
)
from layered_store.hotpath import HotPath, hot_path_of
from layered_store.interface import Op
from layered_store.layer import AroundLayer, Layer
from layered_store.options import Seconds, check_a, check_count, check_seconds, check_share
from layered_store.stats import Sample

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from layered_store.snapshot import StateSnapshot

__all__ = ["Retry"]

P = ParamSpec("P")
T = TypeVar("T")


class _Budget:
    """A bucket of tokens: each call puts a part of one in, each retry takes a whole one out.

    Args:
        share: what a call puts in; None never refuses.
        burst: how many tokens it holds at most, and at first.
    """

    __slots__ = ("_share", "burst", "tokens")

    def __init__(self, share: float | None, burst: int) -> None:
        self._share = share
        self.burst = float(burst)
        self.tokens = self.burst

    def earn(self) -> None:
        if self._share is not None and self.tokens < self.burst:
            self.tokens = min(self.burst, self.tokens + self._share)

    def spend(self) -> bool:
        if self._share is None:
            return True
        # Ten deposits of 0.1 add up to a little less than 1.
        if self.tokens < 1.0 - 1e-9:
            return False
        self.tokens = max(0.0, self.tokens - 1.0)
        return True


@dataclass(eq=False, repr=False)
class Retry(AroundLayer):
    """Repeat a call while its error says that repeating may help.

    The n-th wait is drawn evenly from 0 to ``base_delay * 2**(n - 1)``, at most ``max_delay``, so
    that callers who failed together do not come back together. A budget shared by all calls of
    this layer stops retries when most calls fail: a dead backend then gets 10 % more load, not
    three times as much. A repeated upsert keeps its write id, so that its first attempt and its
    second are stored once.

    What is raised in the end is the last error; for a write, one that never hides that an earlier
    attempt may have taken effect.

    Args:
        inner: the store to call.
        attempts: tries in all, the first included; at least 1.
        base_delay: longest first wait, in seconds; 0 repeats at once.
        max_delay: longest wait, in seconds; at least ``base_delay``.
        time_limit: seconds from the call's begin after which no retry goes on: none begins or
            waits past it, and one under way is cut off. The first attempt is bounded by what is
            below. None means no limit.
        budget: retries allowed per call in the long run, from 0 (only the burst) to 1; None means
            no budget.
        burst: retries that may come at once before the budget counts; at least 1.
        random: source of the waits.
        clock: source of time.

    Raises:
        ConfigError: an option is out of its range.
        StoreTimeoutError: from any operation, when a retry was cut off at ``time_limit``.

    Order:
        Around ``CircuitBreaker`` and ``Timeout``, below ``Cached``; once on each way down, since
        nested retries multiply. Right: ``Cached(Retry(Timeout(store, seconds=0.05)))``. Wrong:
        ``Retry(WriteThrough(cache, origin=db))``: a failure of one tier repeats the work of both.

    Cancellation:
        Passes through at once, also while waiting.

    Source:
        "Exponential Backoff And Jitter", AWS Architecture Blog, 2015 (full jitter). Retry budgets:
        Finagle's ``RetryBudget``; "Site Reliability Engineering", chapter 21 (10 % per client).
    """

    attempts: int = field(default=3, kw_only=True)
    base_delay: Seconds = field(default=0.05, kw_only=True)
    max_delay: Seconds = field(default=1.0, kw_only=True)
    time_limit: Seconds | None = field(default=10.0, kw_only=True)
    budget: float | None = field(default=0.1, kw_only=True)
    burst: int = field(default=10, kw_only=True)
    random: _random.Random = field(default_factory=_random.Random, kw_only=True, repr=False)
    clock: Clock = field(default=SYSTEM_CLOCK, kw_only=True, repr=False)

    kind: ClassVar[str] = "retry"

    def __post_init__(self) -> None:
        check_count(self.attempts, "attempts", self)
        self._base_delay = check_seconds(self.base_delay, "base_delay", self, positive=False)
        self._max_delay = check_seconds(self.max_delay, "max_delay", self, positive=False)
        if self._max_delay < self._base_delay:
            raise ConfigError(
                f"must be at least base_delay ({self._base_delay:g} s)",
                option="max_delay",
                layer=self.name,
            )
        self._time_limit = check_seconds(self.time_limit, "time_limit", self, optional=True)
        if self.budget is not None:
            check_share(self.budget, "budget", self)
        check_count(self.burst, "burst", self)
        check_a(self.random, _random.Random, "random", self)
        check_a(self.clock, Clock, "clock", self)
        self._monotonic = self.clock.monotonic
        self._budget = _Budget(self.budget, self.burst)
        self._counts: Counter[tuple[str, str]] = Counter()
        self._whole = type(self).around is Retry.around
        super().__post_init__()

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        if not self._whole:
            return await super().get_latest(user_id)
        # ``around``, written out for what is called most: it costs a miss two coroutines less.
        budget = self._budget
        if budget.tokens < budget.burst:
            budget.earn()
        started = self._monotonic()
        try:
            found = await self.inner.get_latest(user_id)
            if found is not None and getattr(found, "user_id", None) != user_id:
                raise not_of_user(user_id, Op.GET_LATEST, self.name)
            return found
        except StoreError as exc:
            error = exc
        try:
            return await self._again(
                Op.GET_LATEST, started, error, Layer.get_latest, self, user_id
            )
        finally:
            del error  # it holds this frame, and all that the caller gave

    async def around(
        self, op: Op, method: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        self._budget.earn()
        started = self._monotonic()
        try:
            return await method(*args, **kwargs)
        except StoreError as exc:
            error = exc
        # Outside the except block, so that an error of a retry does not drag the first along.
        try:
            return await self._again(op, started, error, method, *args, **kwargs)
        finally:
            del error  # it holds this frame, and all that the caller gave

    async def _again(
        self,
        op: Op,
        started: float,
        error: StoreError,
        method: Callable[P, Awaitable[T]],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        doubt: StoreError | None = None
        made = 1
        longest = self._base_delay
        while True:
            if op.is_write and not not_happened(error):
                doubt = error if doubt is None or not _did_something(doubt) else doubt
            delay = self.random.uniform(0.0, longest)
            longest = min(longest * 2.0, self._max_delay)
            if not self._may_repeat(op, error, made, delay, self._left(started)):
                break
            if delay > 0.0:
                await self.clock.sleep(delay)
            left = self._left(started)
            if left is not None and left <= 0.0:
                # The event loop came back late; an attempt would be cut off as it begins.
                self._counts[op, "exhausted"] += 1
                break
            made += 1
            outcome = "failure"
            try:
                result = await self._attempt(op, left, method, *args, **kwargs)
                outcome = "success"
            except StoreError as exc:
                error = exc
            except asyncio.CancelledError:
                outcome = "cancelled"
                raise
            finally:
                self._counts[op, outcome] += 1
            if outcome == "success":
                if doubt is not None and may_take_effect(doubt):
                    # A tier that cannot tell a repeat may show the first attempt late.
                    current_call(self.clock).unsure = True
                return result
        try:
            raise _told(error, doubt, made)
        finally:
            del error, doubt

    def _may_repeat(
        self, op: Op, error: StoreError, made: int, delay: float, left: float | None
    ) -> bool:
        """Decide whether to wait ``delay`` and repeat what failed with ``error``."""
        if not error.retryable or isinstance(error, CircuitOpenError):
            return False
        if made >= self.attempts or (left is not None and delay >= left):
            self._counts[op, "exhausted"] += 1
            return False
        if not self._budget.spend():
            self._counts[op, "budget"] += 1
            return False
        return True

    def _left(self, started: float) -> float | None:
        if self._time_limit is None:
            return None
        return self._time_limit - (self._monotonic() - started)

    async def _attempt(
        self,
        op: Op,
        left: float | None,
        method: Callable[P, Awaitable[T]],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        if left is None:
            return await method(*args, **kwargs)
        limit = self.clock.timeout(left)
        try:
            async with limit as timer:
                return await method(*args, **kwargs)
        except TimeoutError as exc:
            if isinstance(exc, StoreError) or not timer.expired():
                raise
            raise StoreTimeoutError(
                f"the time limit of {self._time_limit:g} s for all attempts is over",
                operation=op,
                layer=self.name,
                outcome_unknown=op.is_write,
            ) from exc

    def samples(self) -> Iterable[Sample]:
        for labels, value in list(self._counts.items()):
            yield Sample("retries", value, (str(labels[0]), labels[1]))

    def hot_path(self) -> HotPath | None:
        return hot_path_of(self.inner)


def _did_something(exc: StoreError) -> bool:
    """Tell whether an attempt of a write that raised this may have changed what is stored."""
    return may_take_effect(exc) or isinstance(exc, ErasureIncompleteError)


def _told(error: StoreError, doubt: StoreError | None, made: int) -> StoreError:
    """Return the error to raise after ``made`` attempts.

    Args:
        error: of the last attempt.
        doubt: of an attempt that may have taken effect, for a write.
        made: how many attempts there were.
    """
    if doubt is not None and doubt is not error:
        if not_happened(error):
            # "Refused, nothing happened" is true of the last attempt only.
            doubt.__cause__ = doubt.__cause__ or error
            error = doubt
        elif _did_something(doubt):
            error.outcome_unknown = True
    if made > 1:
        error.add_note(f"layered_store: {made} attempts were made")
    return error
