"""A layer that makes the store below it fail, by chance or by script."""

from __future__ import annotations

import asyncio
import inspect
import random as _random
from collections import Counter, deque
from collections.abc import Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple, ParamSpec, TypeVar

import msgspec

from layered_store.clock import SYSTEM_CLOCK, Clock
from layered_store.coherence.contract import CacheTier, Capability, TierRead, Versioned
from layered_store.coherence.views import as_it_is, through, viewed
from layered_store.errors import ConfigError, CorruptDataError, UnavailableError
from layered_store.health import HealthReport, HealthStatus, SharedProbe
from layered_store.interface import Op, ability_of
from layered_store.layer import AroundLayer
from layered_store.options import Seconds, check_a, check_choice, check_count, check_seconds

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
    from types import TracebackType

    from layered_store.coherence.contract import Notice

__all__ = ["Fault", "Faults"]

P = ParamSpec("P")
T = TypeVar("T")
C = TypeVar("C")

Shares = float | Mapping[str, float]
"""A share of the calls from 0 to 1, or one for each operation by its name."""


class Fault(StrEnum):
    """What can go wrong with one call."""

    ERROR = "error"
    """It fails before it reaches the store."""
    ERROR_AFTER = "error_after"
    """It takes effect, and then its answer is lost."""
    SLOW = "slow"
    """It takes ``delay`` longer."""
    HANG = "hang"
    """It never reaches the store and never ends."""
    HANG_AFTER = "hang_after"
    """It takes effect, and then never ends."""
    CORRUPT = "corrupt"
    """The record that it reads is damaged."""


_FAULTS: Final = tuple(Fault)
_LIVE: Final = frozenset({*(fault.value for fault in Fault), "delay"})
"""Options that a test may change at any time."""
_OUTAGES: Final = (Fault.ERROR, Fault.HANG)
_READS: Final = frozenset({Op.GET_LATEST, Op.GET_LATEST_MANY, Op.GET_HISTORY})
_ONLY_READS: Final = "must name a read: a write meets no record that could be damaged"


class _Script(NamedTuple):
    """Faults that a test asked for: the next so many calls of these operations."""

    fault: Fault
    operations: frozenset[str]
    error: BaseException | type[BaseException] | None


@dataclass(eq=False, repr=False)
class Faults(AroundLayer):
    """Make calls to ``inner`` fail, hang, drag or read damaged records.

    By chance: each fault has a share of the calls, for all operations or by operation. One number
    is drawn for every call, so the same seed and calls give the same faults; the shares and the
    delay may be set at any time, ``redis.error = 0.0``. By script:
    :meth:`fail` for the next calls, :meth:`outage` until :meth:`recover`. Example::

        redis = Faults(MemoryStore(), seed=7, error=0.1, slow={"get_latest": 0.5}, delay=0.2)
        redis.fail(2, fault="error_after", operations=["upsert_latest"])
        with redis.outage("hang"):
            ...

    What a damaged record looks like is up to ``inner``: a cache tier does not find it, a system of
    record raises CorruptDataError. Capabilities pass through, so it works below ``WriteThrough``
    too: an outage then also silences the invalidation channel.

    Args:
        inner: the store that shall seem to fail.
        seed: of the choice of faults.
        error: share of calls that fail before they reach ``inner``.
        error_after: share of calls that take effect and then fail; a write's error has
            ``outcome_unknown`` set.
        slow: share of calls that take ``delay`` longer, half before and half after.
        hang: share of calls that never reach ``inner`` nor end, unless cancelled or by
            :meth:`recover`.
        hang_after: share of calls that take effect and then never end, unless likewise.
        corrupt: share of reads that meet a damaged record.
        delay: how many seconds longer a slow call takes.
        plays: the kind of store that ``inner`` stands for, such as ``"redis"``: what a path
            (:func:`record`) calls it.
        clock: source of time.

    Raises:
        ConfigError: a share is out of its range, or those of one operation are more than 1
            together.
        UnavailableError: from any operation, as an injected fault.
        CorruptDataError: from a read of a system of record, as an injected fault.

    Order:
        Directly around the store that shall seem to fail, below its ``Timeout``, ``Retry`` and
        ``CircuitBreaker``.

    Attributes:
        injected: how often each ``(operation, fault)`` came, to assert that it did.
    """

    seed: int = field(default=0, kw_only=True)
    error: Shares = field(default=0.0, kw_only=True)
    error_after: Shares = field(default=0.0, kw_only=True)
    slow: Shares = field(default=0.0, kw_only=True)
    hang: Shares = field(default=0.0, kw_only=True)
    hang_after: Shares = field(default=0.0, kw_only=True)
    corrupt: Shares = field(default=0.0, kw_only=True)
    delay: Seconds = field(default=0.1, kw_only=True)
    plays: str = field(default="", kw_only=True)
    clock: Clock = field(default=SYSTEM_CLOCK, kw_only=True, repr=False)

    kind: ClassVar[str] = "faults"
    stands_in: ClassVar[bool] = True  # a path names the store whose failure it plays

    def __setattr__(self, name: str, value: Any) -> None:
        before = self.__dict__.get(name)
        super().__setattr__(name, value)
        if name in _LIVE and "_shares" in self.__dict__:
            try:
                self._take_shares()
            except ConfigError:
                super().__setattr__(name, before)
                raise

    def __post_init__(self) -> None:
        if type(self.seed) is not int:
            raise ConfigError("must be an int", option="seed", layer=self.name)
        self._take_shares()
        check_a(self.plays, str, "plays", self)
        check_a(self.clock, Clock, "clock", self)
        self._random = _random.Random(self.seed)  # noqa: S311
        self._script: deque[_Script] = deque()
        self._outage: tuple[Fault, frozenset[str]] | None = None
        self._hung: set[asyncio.Future[None]] = set()
        self.injected: Counter[tuple[str, str]] = Counter()
        super().__post_init__()
        self._probe = SharedProbe(self.name, clock=self.clock)

    def _take_shares(self) -> None:
        """Check the shares and the delay, and have the next call meet them."""
        shares = {op: self._shares_of(op) for op in Op}
        self._delay = check_seconds(self.delay, "delay", self, positive=False)
        self._shares = shares

    def _shares_of(self, op: Op) -> dict[Fault, float]:
        """Return how often each fault meets ``op``, checked."""
        shares = {}
        for fault in _FAULTS:
            given: Any = getattr(self, fault.value)
            if isinstance(given, Mapping):
                names = check_operations(given, fault.value, self)
                if fault is Fault.CORRUPT and names - _READS:
                    raise ConfigError(_ONLY_READS, option=fault.value, layer=self.name)
                given = given.get(op.value, 0.0)
            usual = isinstance(given, int | float) and not isinstance(given, bool)
            if not usual or not 0.0 <= given <= 1.0:
                raise ConfigError(
                    "must be a share from 0 to 1, or shares by the name of the operation",
                    option=fault.value,
                    layer=self.name,
                )
            shares[fault] = float(given)
        if sum(shares.values()) > 1.0 + 1e-9:
            raise ConfigError(
                f"the shares of {op.value} must be at most 1 together; lower one of them",
                option="error",
                layer=self.name,
            )
        return shares

    # Scripted faults

    def fail(
        self,
        times: int = 1,
        *,
        fault: str = Fault.ERROR,
        operations: Iterable[str] | None = None,
        error: BaseException | type[BaseException] | None = None,
    ) -> None:
        """Let the next calls fail; called again, those come after.

        Args:
            times: how many calls.
            fault: which :class:`Fault`, such as ``"error_after"``.
            operations: only calls of these operations; None is any.
            error: what they raise instead of UnavailableError, for the faults ``"error"`` and
                ``"error_after"``.
        """
        check_count(times, "times", self)
        check_fault(fault, _FAULTS, self)
        names = check_operations(operations, "operations", self)
        if fault == Fault.CORRUPT and not names & _READS:
            raise ConfigError(_ONLY_READS, option="operations", layer=self.name)
        if error is not None and (
            fault not in (Fault.ERROR, Fault.ERROR_AFTER) or not _can_be_raised(error)
        ):
            raise ConfigError(
                "must be an exception, and only for the faults 'error' and 'error_after'; the"
                " others raise none of the test's",
                option="error",
                layer=self.name,
            )
        self._script.extend([_Script(Fault(fault), names, error)] * times)

    def outage(
        self, fault: str = Fault.ERROR, *, operations: Iterable[str] | None = None
    ) -> _Outage:
        """Let every call fail from now until :meth:`recover`, or while the ``with`` block runs.

        The health check fails as well, and so do a tier's channel and repair.

        Args:
            fault: ``"error"`` for a backend that refuses, ``"hang"`` for one that never answers.
            operations: only calls of these operations, and nothing else; None is everything.
        """
        check_fault(fault, _OUTAGES, self)
        before = self._outage
        self._outage = (Fault(fault), check_operations(operations, "operations", self))
        return _Outage(self, self._outage, before)

    def recover(self) -> None:
        """End the outage and forget what :meth:`fail` still had in store.

        Calls that hang end now, with UnavailableError.
        """
        self._outage = None
        self._script.clear()
        for future in list(self._hung):
            loop = future.get_loop()
            if not loop.is_closed():
                loop.call_soon_threadsafe(_end, future)

    @property
    def is_down(self) -> bool:
        """Whether everything fails now."""
        return self._outage is not None and len(self._outage[1]) == len(Op)

    def reset(self, seed: int | None = None) -> None:
        """Begin the faults by chance anew, from ``seed`` or from the one it was built with."""
        self._random = _random.Random(self.seed if seed is None else seed)  # noqa: S311

    # As a layer

    async def around(
        self, op: Op, method: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        fault, error = self._choose(op)
        if fault is None:
            return await method(*args, **kwargs)
        self.injected[op.value, fault.value] += 1
        if fault is Fault.ERROR:
            raise error or self._unavailable(op, unknown=False)
        if fault is Fault.HANG:
            await self._hang(op)
        if fault is Fault.SLOW:
            await self.clock.sleep(self._delay / 2)
        result = await method(*args, **kwargs)
        if fault is Fault.SLOW:
            await self.clock.sleep(self._delay / 2)
        elif fault is Fault.HANG_AFTER:
            await self._hang(op)
        elif fault is Fault.ERROR_AFTER:
            raise error or self._unavailable(op, unknown=op.is_write)
        elif fault is Fault.CORRUPT:
            return self._corrupted(op, result)  # type: ignore[no-any-return]
        return result

    async def health_report(self) -> HealthReport:
        if not self.is_down:
            return await super().health_report()
        probe, below = await asyncio.gather(
            self._probe.run(self._probe_outage), self.inner.health_report()
        )
        return HealthReport(
            self.name, HealthStatus.UNHEALTHY, probe.latency_ms, probe.message, (below,)
        )

    async def open(self) -> None:
        await self.lost()
        await super().open()

    async def aclose(self) -> None:
        self.recover()
        await super().aclose()

    def capability(self, kind: type[C]) -> C | None:
        if isinstance(self, kind):
            return self
        target = ability_of(self.inner, kind)
        if target is None or not issubclass(kind, Capability):
            return None
        return _faulty(kind)(self, target)  # type: ignore[no-any-return]

    async def lost(self) -> None:
        """Do nothing, or what a call outside the operations meets during an outage."""
        if self.is_down:
            assert self._outage is not None
            if self._outage[0] is Fault.HANG:
                await self._hang(None)
            raise self._unavailable(None, unknown=False)

    def _choose(self, op: Op) -> tuple[Fault | None, BaseException | type[BaseException] | None]:
        """Return what this call meets; the drawn number is used up in any case."""
        drawn = self._random.random()
        if self._outage is not None and op.value in self._outage[1]:
            return self._outage[0], None
        for step in self._script:
            if op.value in step.operations and (step.fault is not Fault.CORRUPT or op in _READS):
                self._script.remove(step)
                return step.fault, step.error
        for fault, share in self._shares[op].items():
            if drawn < share:
                # Only what is read can be damaged.
                return (None if fault is Fault.CORRUPT and op not in _READS else fault), None
            drawn -= share
        return None, None

    def _unavailable(self, op: Op | None, *, unknown: bool) -> UnavailableError:
        return UnavailableError(
            "injected fault", operation=op, layer=self.name, outcome_unknown=unknown
        )

    async def _hang(self, op: Op | None) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._hung.add(future)
        try:
            await future
        finally:
            self._hung.discard(future)
        raise self._unavailable(op, unknown=op is not None and op.is_write)

    async def _probe_outage(self) -> bool:
        await self.lost()
        return True

    def _corrupted(self, op: Op, result: Any) -> Any:
        """Return what a damaged record looks like, or raise."""
        if isinstance(result, TierRead):
            return msgspec.structs.replace(result, found=None)
        if isinstance(result, Mapping) and any(isinstance(v, TierRead) for v in result.values()):
            return {key: self._corrupted(op, value) for key, value in result.items()}
        if result in (None, [], {}) or (isinstance(result, Versioned) and result.snapshot is None):
            return result  # there is no record that could be damaged
        if ability_of(self.inner, CacheTier) is None:
            raise CorruptDataError("injected fault", operation=op, layer=self.name)
        return None if op is Op.GET_LATEST else type(result)()


class _Outage:
    """Ends an outage at the end of a ``with`` block; one around it goes on."""

    def __init__(self, faults: Faults, outage: object, before: Any) -> None:
        self._faults = faults
        self._own = outage
        self._before = before

    def __enter__(self) -> Faults:
        return self._faults

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        goes_on = self._before if self._faults._outage is self._own else None  # noqa: SLF001
        self._faults.recover()
        self._faults._outage = goes_on  # noqa: SLF001


def check_fault(fault: object, known: tuple[Fault, ...], owner: object) -> None:
    """Refuse what is not one of the ``known`` faults, by its name or as itself."""
    plain = fault.value if isinstance(fault, Fault) else fault
    check_choice(plain, "fault", owner, tuple(each.value for each in known))


def check_operations(names: Iterable[str] | None, option: str, owner: object) -> frozenset[str]:
    """Return the operations' names as a set, all of them for None; refuse an unknown one."""
    known = frozenset(op.value for op in Op)
    if names is None:
        return known
    chosen = frozenset([names] if isinstance(names, str) else names)
    if not chosen <= known:
        raise ConfigError(
            f"must be names of operations: {', '.join(sorted(known))}",
            option=option,
            layer=type(owner).__name__,
        )
    return frozenset(str(name) for name in chosen)


def _can_be_raised(error: object) -> bool:
    return isinstance(error, BaseException) or (
        isinstance(error, type) and issubclass(error, BaseException)
    )


def _end(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


@cache
def _faulty(kind: type[Capability]) -> Any:
    """Return a subclass of a capability whose methods meet the faults, built once per kind.

    Methods that stand for an operation meet all of them, others only outages.
    """

    def upkeep(method: str) -> Any:
        async def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            await self.layer.lost()
            return await getattr(self.target, method)(*args, **kwargs)

        return call

    def subscription(method: str) -> Any:
        @asynccontextmanager
        async def call(self: Any) -> AsyncIterator[Any]:
            await self.layer.lost()
            async with getattr(self.target, method)() as notices:
                yield _delivered(self.layer, notices)

        return call

    def member(method: str) -> Any:
        op = kind.operations.get(method)
        if op is not None:
            return through(method, op)
        if inspect.iscoroutinefunction(getattr(kind, method)):
            return upkeep(method)
        return subscription(method) if method == "listen" else as_it_is(method)

    return viewed(kind, member)


async def _delivered(layer: Faults, notices: AsyncIterator[Notice]) -> AsyncIterator[Notice]:
    """Yield messages until an outage: then the connection breaks, or nothing comes any more."""
    async for notice in notices:
        await layer.lost()
        yield notice
