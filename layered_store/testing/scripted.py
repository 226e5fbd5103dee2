"""An inner store whose every call does what a script says."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

from layered_store.interface import Op, StateStore
from layered_store.snapshot import StateSnapshot

if TYPE_CHECKING:
    from collections.abc import Iterable

    from layered_store.clock import Clock

__all__ = ["Gate", "Scripted", "Takes"]


class Gate:
    """A step that holds its call until the test decides how it ends.

    Example::

        gate = Gate()
        task = asyncio.create_task(layer_around(Scripted(gate)).get_latest("u-1"))
        await gate.entered.wait()
        gate.open(snapshot)
    """

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.cancelled = False
        self._opened = asyncio.Event()
        self._result: object = None

    def open(self, result: object = None) -> None:
        """Let the call return ``result``, or raise it when it is an exception."""
        self._result = result
        self._opened.set()

    @property
    def opened(self) -> bool:
        """Whether the call may go on."""
        return self._opened.is_set()

    async def pass_through(self) -> Any:
        """Wait for :meth:`open`."""
        self.entered.set()
        try:
            await self._opened.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        if isinstance(self._result, BaseException):
            raise self._result
        return self._result


class Takes:
    """A step that takes so many seconds of a clock and then ends.

    Args:
        clock: whose seconds.
        seconds: how many.
        result: what is returned then, or raised when it is an exception.
    """

    def __init__(self, clock: Clock, seconds: float, result: object = None) -> None:
        self._clock = clock
        self._seconds = seconds
        self._result = result

    async def pass_through(self) -> Any:
        """Wait for the time to be over."""
        await self._clock.sleep(self._seconds)
        return self._result


class Scripted(StateStore):
    """Answers each call by the next step of its script; past the end, as an empty store.

    Args:
        steps: an exception is raised, a :class:`Gate` or :class:`Takes` is waited for, anything
            else is returned.
        healthy: what the health check says.
        snapshot_type: the class of the snapshots it claims to keep.

    Attributes:
        calls: the operations that were called, in their order.
        inside: how many calls are running.
        most_inside: the highest ``inside`` ever was.
    """

    def __init__(
        self,
        *steps: object,
        healthy: bool = True,
        snapshot_type: type[StateSnapshot] = StateSnapshot,
    ) -> None:
        self.steps = list(steps)
        self.healthy = healthy
        self.calls: list[Op] = []
        self.inside = self.most_inside = 0
        self._snapshot_type = snapshot_type

    async def _step(self, op: Op, past_end: object = None) -> Any:
        self.calls.append(op)
        result = self.steps.pop(0) if self.steps else past_end
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        try:
            if isinstance(result, Gate | Takes):
                result = await result.pass_through()
        finally:
            self.inside -= 1
        if isinstance(result, BaseException):
            raise result
        return result

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:  # noqa: ARG002
        await self._step(Op.UPSERT_LATEST)

    async def get_latest(self, user_id: str) -> StateSnapshot | None:  # noqa: ARG002
        return cast("StateSnapshot | None", await self._step(Op.GET_LATEST))

    async def delete(self, user_id: str) -> None:  # noqa: ARG002
        await self._step(Op.DELETE)

    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:  # noqa: ARG002
        return cast("list[StateSnapshot]", await self._step(Op.GET_HISTORY, []))

    async def get_latest_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        list(user_ids)
        return cast("dict[str, StateSnapshot]", await self._step(Op.GET_LATEST_MANY, {}))

    async def upsert_latest_many(self, snapshots: Iterable[StateSnapshot]) -> None:
        list(snapshots)
        await self._step(Op.UPSERT_LATEST_MANY)

    async def health_check(self) -> bool:
        return self.healthy

    @property
    def snapshot_type(self) -> type[StateSnapshot]:
        return self._snapshot_type
