"""A deadline for each call."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, ParamSpec, TypeVar

from layered_store.clock import SYSTEM_CLOCK, Clock
from layered_store.deadlines import Deadlines
from layered_store.errors import StoreError, StoreTimeoutError
from layered_store.hotpath import HotPath, hot_path_of
from layered_store.layer import AroundLayer
from layered_store.options import Seconds, check_a, check_seconds
from layered_store.running import running_loop

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from layered_store.interface import Op

__all__ = ["Timeout"]

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(eq=False, repr=False)
class Timeout(AroundLayer):
    """End each call below that takes longer than ``seconds``.

    A write that is cut off may have taken effect: its error has ``outcome_unknown`` set. A hit in
    a cache below never waits, so it is not timed.

    Args:
        inner: the store to call.
        seconds: the longest a call may take, above 0.
        clock: source of time.

    Raises:
        ConfigError: ``seconds`` is not a duration above 0.
        StoreTimeoutError: from any operation, when the time ran out.

    Order:
        Below ``Retry`` and ``CircuitBreaker`` it limits one attempt, and the breaker sees that it
        failed. Around ``Retry`` it limits all attempts together. Right:
        ``Retry(CircuitBreaker(Timeout(store, seconds=0.05)))``. Wrong:
        ``Timeout(CircuitBreaker(store), seconds=0.05)``: the breaker sees a cancelled call, which
        is no failure, and never opens.

    Cancellation:
        A caller's cancellation passes through as such, also when the time runs out in the same
        turn of the event loop. At the limit the call below is cancelled and awaited to its end,
        so nothing of it goes on in the background.
    """

    seconds: Seconds = field(kw_only=True)
    clock: Clock = field(default=SYSTEM_CLOCK, kw_only=True, repr=False)

    kind: ClassVar[str] = "timeout"

    def __post_init__(self) -> None:
        self._seconds = check_seconds(self.seconds, "seconds", self)
        check_a(self.clock, Clock, "clock", self)
        self._deadlines: dict[asyncio.AbstractEventLoop, Deadlines] = {}
        super().__post_init__()

    async def around(
        self, op: Op, method: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        loop = running_loop()
        deadlines = self._deadlines.get(loop) or self._deadlines_of(loop)
        call = deadlines.begin()
        try:
            return await method(*args, **kwargs)
        except asyncio.CancelledError as exc:
            if not deadlines.end(call):
                raise
            raise self._over(op) from exc
        except TimeoutError as exc:
            # The store's own time limit, or a StoreError that tells more than ours would.
            if isinstance(exc, StoreError) or not call.expired:
                raise
            raise self._over(op) from exc
        finally:
            deadlines.end(call)

    def _deadlines_of(self, loop: asyncio.AbstractEventLoop) -> Deadlines:
        # Of all that are known in one step, since a loop of another thread may come by.
        for other in tuple(self._deadlines):
            if other.is_closed():
                self._deadlines.pop(other, None)
        return self._deadlines.setdefault(loop, Deadlines(loop, self._seconds, self.clock))

    def _over(self, op: Op) -> StoreTimeoutError:
        return StoreTimeoutError(
            f"no answer within {self._seconds:g} s",
            operation=op,
            layer=self.name,
            outcome_unknown=op.is_write,
        )

    def hot_path(self) -> HotPath | None:
        return hot_path_of(self.inner)
