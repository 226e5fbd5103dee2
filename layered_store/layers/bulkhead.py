"""A limit on how many calls are inside the store at once."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, ParamSpec, TypeVar

from layered_store.clock import SYSTEM_CLOCK, Clock
from layered_store.errors import ClosedError, ConfigError, OverloadedError
from layered_store.hotpath import Barrier, HotPath, hot_path_of
from layered_store.layer import AroundLayer
from layered_store.options import Seconds, check_a, check_count, check_seconds

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from layered_store.interface import Op

__all__ = ["Bulkhead"]

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(eq=False, repr=False)
class Bulkhead(AroundLayer):
    """Let at most ``max_in_flight`` calls into ``inner`` at once, and ``max_waiting`` wait.

    Waiting calls enter in the order in which they came. Any further call is refused at once. A
    refused call never reached ``inner``, so it may be repeated. Hits of a cache below occupy no
    place as long as one is free.

    Args:
        inner: the store to protect.
        max_in_flight: calls allowed inside at once; at least 1.
        max_waiting: calls that may wait for a place; 0 refuses at once.
        max_wait: seconds a call may wait, above 0; None waits as long as it takes. Needs
            ``max_waiting`` above 0.
        clock: source of time.

    Raises:
        ConfigError: an option is out of its range.
        OverloadedError: from any operation, when no place is free and the queue is full, or when
            the wait took ``max_wait``.
        ClosedError: from any operation, when a second event loop calls while calls of the first
            are inside.

    Order:
        Close to the backend, inside ``Retry`` (a waiting retry then holds no place) and below
        ``Timeout`` only when the wait should count towards its limit.

    Cancellation:
        A call cancelled while it waits leaves the queue, and a place that was just handed to it
        goes to the next. A call cancelled inside frees its place when ``inner`` let go of it.
    """

    max_in_flight: int = field(kw_only=True)
    max_waiting: int = field(default=0, kw_only=True)
    max_wait: Seconds | None = field(default=None, kw_only=True)
    clock: Clock = field(default=SYSTEM_CLOCK, kw_only=True, repr=False)

    kind: ClassVar[str] = "bulkhead"

    def __post_init__(self) -> None:
        check_count(self.max_in_flight, "max_in_flight", self)
        check_count(self.max_waiting, "max_waiting", self, minimum=0)
        self._max_wait = check_seconds(self.max_wait, "max_wait", self, optional=True)
        if self._max_wait is not None and not self.max_waiting:
            raise ConfigError(
                "needs max_waiting above 0; without it nobody waits",
                option="max_wait",
                layer=self.name,
            )
        check_a(self.clock, Clock, "clock", self)
        self._in_flight = 0
        self._queue: deque[asyncio.Future[None]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._barrier = Barrier()
        super().__post_init__()

    async def around(
        self, op: Op, method: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._move_to(loop, op)
        # No await between check and count: no other task can slip in.
        if self._in_flight < self.max_in_flight:
            self._in_flight += 1
            if self._in_flight == self.max_in_flight:
                self._barrier.put(up=True)
        else:
            await self._wait(op, loop)
        try:
            return await method(*args, **kwargs)
        finally:
            if loop is self._loop:  # else the count began anew without this call
                self._release()

    async def _wait(self, op: Op, loop: asyncio.AbstractEventLoop) -> None:
        """Return with a place, or raise without one."""
        if len(self._queue) >= self.max_waiting:
            raise OverloadedError(
                f"{self.max_in_flight} calls are inside and {len(self._queue)} wait",
                operation=op,
                layer=self.name,
            )
        turn: asyncio.Future[None] = loop.create_future()
        self._queue.append(turn)
        limit = self.clock.timeout(self._max_wait)
        try:
            async with limit:
                await turn
        except BaseException as exc:
            if turn.done() and not turn.cancelled():
                # The place came in the same turn of the loop as the end of the wait: pass it on.
                self._release()
            else:
                with contextlib.suppress(ValueError):
                    self._queue.remove(turn)
            if isinstance(exc, TimeoutError):
                raise OverloadedError(
                    f"no place became free within {self._max_wait:g} s",
                    operation=op,
                    layer=self.name,
                ) from exc
            raise

    def _release(self) -> None:
        """Hand the place to whoever waits longest, or free it."""
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._in_flight -= 1
        self._barrier.put(up=self._in_flight >= self.max_in_flight)

    def _move_to(self, loop: asyncio.AbstractEventLoop, op: Op) -> None:
        """Serve another event loop from now on, when the last one is done with this layer."""
        last = self._loop
        if last is not None and not last.is_closed() and self._in_flight:
            raise ClosedError(
                "this block serves calls of another event loop; build one stack per event loop",
                operation=op,
                layer=self.name,
            )
        self._loop = loop
        self._in_flight = 0
        self._queue.clear()
        self._barrier.put(up=False)

    def hot_path(self) -> HotPath | None:
        path = hot_path_of(self.inner)
        if path is not None:
            # Asked when this layer is built and by each one above.
            self._barrier.stand_on(path)
        return path
