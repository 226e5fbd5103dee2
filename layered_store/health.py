"""Health: what a stack says about itself, and the probe that asks a backend."""

from __future__ import annotations

import asyncio
import json
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from layered_store.clock import SYSTEM_CLOCK, Clock
from layered_store.errors import StoreError, StoreTimeoutError
from layered_store.running import spawn

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

__all__ = [
    "PROBE_SECONDS",
    "HealthReport",
    "HealthStatus",
    "SharedProbe",
    "SharedReport",
    "reporting",
]

PROBE_SECONDS: Final = 1.0
"""Time limit of one backend's probe unless the backend says otherwise."""

reporting: ContextVar[object] = ContextVar("layered_store_reporting", default=None)
"""The store whose health report is made, which may ask for its health check."""


class HealthStatus(StrEnum):
    """How well a block can serve."""

    HEALTHY = "healthy"
    DEGRADED = "degraded"
    UNHEALTHY = "unhealthy"

    @property
    def level(self) -> int:
        """0 unhealthy, 1 degraded, 2 healthy: the value of the health metric."""
        return _LEVELS[self]


_LEVELS: Final = {HealthStatus.UNHEALTHY: 0, HealthStatus.DEGRADED: 1, HealthStatus.HEALTHY: 2}


@dataclass(frozen=True, slots=True)
class HealthReport:
    """The health of one block and of the blocks below it.

    Args:
        name: the block's name.
        status: healthy, degraded or unhealthy.
        latency_ms: how long the probes took, in milliseconds.
        message: the reason when not healthy, else empty; holds no user data and no secret.
        children: the reports of the blocks below, in their order.
    """

    name: str
    status: HealthStatus
    latency_ms: float = 0.0
    message: str = ""
    children: tuple[HealthReport, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain dicts, lists, strings and numbers."""
        return {
            "name": self.name,
            "status": self.status.value,
            "latency_ms": round(self.latency_ms, 3),
            "message": self.message,
            "children": [child.to_dict() for child in self.children],
        }

    def to_json(self) -> str:
        """Return the report as one line of JSON."""
        return json.dumps(self.to_dict(), separators=(",", ":"))


class SharedReport:
    """Has a report made at most once at a time, for all who ask meanwhile.

    A caller's cancellation leaves it to the others and ends it when nobody waits.
    """

    def __init__(self) -> None:
        self._running: dict[asyncio.AbstractEventLoop, _Making] = {}

    async def share(self, make: Callable[[], Coroutine[Any, Any, HealthReport]]) -> HealthReport:
        """Return the report that is made now, or is begun now."""
        loop = asyncio.get_running_loop()
        making = self._running.get(loop)
        # An eager task that is done already is an answer of before this call.
        if making is None or making.task.done():
            task = spawn(make())
            making = self._running[loop] = _Making(task)
            task.add_done_callback(self._ended)
        making.waiting += 1
        try:
            return await asyncio.shield(making.task)
        finally:
            making.waiting -= 1
            if not making.waiting and not making.task.done():
                self._ended(making.task)
                making.task.cancel()

    def _ended(self, task: asyncio.Task[HealthReport]) -> None:
        """Forget what is made; the next one may be under way by then."""
        loop = task.get_loop()
        making = self._running.get(loop)
        if making is not None and making.task is task:
            del self._running[loop]


class SharedProbe(SharedReport):
    """Asks one backend for its health, at most once at a time and never for long.

    Args:
        name: the backend's name, for the report.
        limit: seconds until a silent backend counts as unhealthy.
        clock: source of time.
    """

    def __init__(
        self, name: str, limit: float = PROBE_SECONDS, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        super().__init__()
        self._name = name
        self._limit = limit
        self._clock = clock

    async def run(self, check: Callable[[], Awaitable[bool]]) -> HealthReport:
        """Return the report of a probe that runs now or is started now."""
        return await self.share(lambda: self._probe(check))

    async def _probe(self, check: Callable[[], Awaitable[bool]]) -> HealthReport:
        started = self._clock.monotonic()
        message = ""
        try:
            async with self._clock.timeout(self._limit):
                healthy = await check()
            if not healthy:
                message = "the health check said no"
        except StoreTimeoutError as exc:  # the backend's own limit, which is the shorter one
            healthy, message = False, str(exc)
        except TimeoutError:
            healthy, message = False, f"no answer within {self._limit:g} s"
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Nobody cancelled this probe: something below did, such as a driver that gave up.
            healthy, message = False, "the health check was cancelled below"
        except StoreError as exc:
            healthy, message = False, str(exc)
        except Exception as exc:  # noqa: BLE001  a third party's check may raise anything
            # Its text may hold anything, so only the kind of error is told.
            healthy, message = False, type(exc).__name__
        status = HealthStatus.HEALTHY if healthy else HealthStatus.UNHEALTHY
        elapsed = (self._clock.monotonic() - started) * 1000
        return HealthReport(self._name, status, elapsed, message)


@dataclass(slots=True)
class _Making:
    task: asyncio.Task[HealthReport]
    waiting: int = 0
