"""Leave a failing store alone for a while."""

from __future__ import annotations

import random as _random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Final, ParamSpec, TypeVar

from layered_store.circuit import Circuit, CircuitState
from layered_store.clock import SYSTEM_CLOCK, Clock
from layered_store.errors import CircuitOpenError, ConfigError, StoreError, UnavailableError
from layered_store.events import log_event
from layered_store.health import HealthReport, HealthStatus
from layered_store.hotpath import Barrier, HitCount, HotPath, hot_path_of
from layered_store.interface import report_of
from layered_store.layer import AroundLayer
from layered_store.options import Seconds, check_a, check_count, check_seconds, check_share
from layered_store.stack import id_of
from layered_store.stats import Sample

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from layered_store.interface import Op

__all__ = ["Circuit", "CircuitBreaker", "CircuitState"]

P = ParamSpec("P")
T = TypeVar("T")

_EVENTS: Final = {
    CircuitState.CLOSED: "circuit_closed",
    CircuitState.HALF_OPEN: "circuit_half_open",
    CircuitState.OPEN: "circuit_opened",
}


@dataclass(eq=False, repr=False)
class CircuitBreaker(AroundLayer):
    """Refuse calls for a while after too many failed, then try one.

    A failing store then costs its callers nothing, and their calls do not keep it from recovering.
    Failures are :class:`UnavailableError` with its subclasses and unexpected exceptions. Anything
    else, such as a refused argument or a cancelled call, says nothing about the store and is not
    counted. Health probes are not refused.

    Args:
        inner: the store to protect.
        failure_share: the circuit opens at this share of failed calls; above 0, at most 1.
        minimum_calls: the circuit does not open before this many calls are in the window; at least
            1.
        window: seconds over which calls are counted; it moves in steps of a tenth.
        open_for: seconds from opening until one call is tried.
        max_open_for: when trials fail in a row, the time until the next is drawn from ``open_for``
            to twice, four times, ... as much, up to this many seconds. None: always ``open_for``.
        random: source of that jitter.
        clock: source of time.

    Raises:
        ConfigError: an option is out of its range.
        CircuitOpenError: from any operation while the circuit is open, or half open with a trial
            under way; ``retry_after`` tells when to try again. The call did not reach ``inner``.

    Order:
        Around ``Timeout``, so that a hung store counts as failed and a trial ends; below ``Retry``,
        which never repeats a refusal. One breaker for each backend. Right:
        ``Retry(CircuitBreaker(Timeout(store, seconds=0.05)))``. Wrong:
        ``CircuitBreaker(WriteThrough(cache, origin=db))``: the tiers fail separately.

    Cancellation:
        A cancelled call is no failure; a cancelled trial leaves its place to the next call. A trial
        that has not ended after ``window`` seconds (``open_for`` where that is longer) counts as
        failed, and goes on for its caller.
    """

    failure_share: float = field(default=0.5, kw_only=True)
    minimum_calls: int = field(default=10, kw_only=True)
    window: Seconds = field(default=30.0, kw_only=True)
    open_for: Seconds = field(default=5.0, kw_only=True)
    max_open_for: Seconds | None = field(default=None, kw_only=True)
    random: _random.Random = field(default_factory=_random.Random, kw_only=True, repr=False)
    clock: Clock = field(default=SYSTEM_CLOCK, kw_only=True, repr=False)

    kind: ClassVar[str] = "circuit_breaker"

    def __post_init__(self) -> None:
        failure_share = check_share(self.failure_share, "failure_share", self, zero=False)
        minimum_calls = check_count(self.minimum_calls, "minimum_calls", self)
        window = check_seconds(self.window, "window", self)
        open_for = check_seconds(self.open_for, "open_for", self)
        longest = check_seconds(self.max_open_for, "max_open_for", self, optional=True)
        if longest is not None and longest < open_for:
            raise ConfigError(
                f"must be at least open_for ({open_for:g} s), or None",
                option="max_open_for",
                layer=self.name,
            )
        check_a(self.random, _random.Random, "random", self)
        check_a(self.clock, Clock, "clock", self)
        self._circuit = Circuit(
            failure_share=failure_share,
            minimum_calls=minimum_calls,
            window=window,
            open_for=open_for,
            max_open_for=open_for if longest is None else longest,
            monotonic=self.clock.monotonic,
            random=self.random,
        )
        self._told = CircuitState.CLOSED
        self._barrier = Barrier()
        self._hit_counts: list[HitCount] = []
        self._hits_seen = 0
        super().__post_init__()

    async def around(
        self, op: Op, method: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        era = self._circuit.admit()
        if self._circuit.state is not self._told:
            self._tell()
        if era is None:
            raise CircuitOpenError(
                self._reason(),
                retry_after=self._circuit.retry_after,
                operation=op,
                layer=self.name,
            )
        failed: bool | None = None
        try:
            result = await method(*args, **kwargs)
            failed = False
        except UnavailableError:
            failed = True
            raise
        except StoreError:
            raise
        except Exception:
            failed = True
            raise
        finally:
            self._settle(era, failed=failed)
        return result

    def _settle(self, era: int, *, failed: bool | None) -> None:
        hits = sum(count.read() for count in self._hit_counts) if self._hit_counts else 0
        self._circuit.settle(era, failed=failed, hits=hits - self._hits_seen)
        self._hits_seen = hits
        if self._circuit.state is not self._told:
            self._tell()
        self._barrier.put(up=self._circuit.state is not CircuitState.CLOSED)

    def _tell(self) -> None:
        """Log the new state."""
        self._told = self._circuit.state
        after = round(self._circuit.retry_after, 3)
        facts: dict[str, str | float] = {"retry_after": after} if after else {}
        log_event(_EVENTS[self._told], layer=id_of(self) or self.name, **facts)

    @property
    def state(self) -> CircuitState:
        """Whether calls pass now."""
        return self._circuit.state

    def _reason(self) -> str:
        if self._circuit.state is CircuitState.OPEN:
            after = self._circuit.retry_after
            return (
                f"the circuit is open; one call is tried in {after:.3g} s"
                if after
                else "the circuit is open; the next call is a trial"
            )
        if self._circuit.trying:
            return "the circuit is half open; one call is being tried"
        return "the circuit is half open; the next call is a trial"

    async def health_report(self) -> HealthReport:
        below = await report_of(self.inner)
        status, message = below.status, ""
        if self._circuit.state is not CircuitState.CLOSED:
            status = min(status, HealthStatus.DEGRADED, key=lambda each: each.level)
            message = self._reason()
        return HealthReport(self.name, status, below.latency_ms, message, (below,))

    def samples(self) -> Iterable[Sample]:
        yield Sample("circuit_state", int(self._circuit.state))

    def hot_path(self) -> HotPath | None:
        path = hot_path_of(self.inner)
        if path is not None:
            # Asked when this layer is built and by each one above.
            self._barrier.stand_on(path)
            path.observers += (self,)
        return path

    def attach_hits(self, count: HitCount) -> None:
        self._hit_counts.append(count)
