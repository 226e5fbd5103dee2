"""The bench of the laws of layers: stores that fail, hang and answer late when they are told to."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from layered_store.errors import UnavailableError
from layered_store.interface import Op, StateStore
from layered_store.snapshot import StateSnapshot
from layered_store.stores.memory import MemoryStore
from layered_store.testing.report import Broken

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

    from layered_store.coherence.contract import Versioned

__all__ = [
    "READS",
    "WRITES",
    "Bench",
    "Inner",
    "PlainInner",
    "VersionedInner",
    "end",
    "settle",
    "soon",
]

READS: Final = (Op.GET_LATEST, Op.GET_LATEST_MANY)
WRITES: Final = (Op.UPSERT_LATEST, Op.UPSERT_LATEST_MANY, Op.DELETE)

_END_SECONDS: Final = 5.0
_TURNS: Final = 30
_SOON_SECONDS: Final = 2.0
_SOON_TRIES: Final = 40


class Inner:
    """What a law can do to the store below the layer, and what that store saw."""

    def __init__(self) -> None:
        self.healthy = True
        self.opened = self.closed = self.inside = 0
        self.seen: list[Op] = []
        self.entered = asyncio.Event()
        self._fails: tuple[frozenset[Op], BaseException, bool] | None = None
        self._once = False
        self._holds: frozenset[Op] = frozenset()
        self._gate: asyncio.Event | None = None
        self._before = False

    def behave(self) -> None:
        """End all faults."""
        self._fails = None
        self.release()

    def fail(
        self,
        *ops: Op,
        error: BaseException | None = None,
        after: bool = False,
        once: bool = False,
    ) -> None:
        """Let calls of these operations fail, or the next one, before or after they took effect."""
        error = error or UnavailableError("out of order, for the check", layer="inner")
        self._fails = (frozenset(ops), error, after)
        self._once = once

    def hold(self, *ops: Op, before: bool = False) -> None:
        """Keep calls of these operations inside until release.

        With their answer in hand, or ``before`` they took effect.
        """
        self._holds, self._gate, self._before = frozenset(ops), asyncio.Event(), before
        self.entered.clear()

    def release(self) -> None:
        """Let the calls that are held go on."""
        if self._gate is not None:
            self._gate.set()
        self._holds, self._gate = frozenset(), None

    async def step(self, op: Op, call: Callable[[], Awaitable[Any]]) -> Any:
        """Do one operation as the law wants it."""
        self.seen.append(op)
        self._fail_if_told(op, after=False)
        self.inside += 1
        try:
            if self._before:
                await self._wait_if_held(op)
                return await call()
            result = await call()
            await self._wait_if_held(op)
        finally:
            self.inside -= 1
        self._fail_if_told(op, after=True)
        return result

    async def _wait_if_held(self, op: Op) -> None:
        if op in self._holds and self._gate is not None:
            gate = self._gate
            self.entered.set()
            await gate.wait()

    def _fail_if_told(self, op: Op, *, after: bool) -> None:
        if self._fails is None or op not in self._fails[0] or self._fails[2] is not after:
            return
        error = self._fails[1]
        if self._once:
            self._fails = None
        raise error


class _Told(StateStore):
    """What both kinds of stores have in common."""

    law: Inner

    async def health_check(self) -> bool:
        return self.law.healthy

    async def open(self) -> None:
        self.law.opened += 1


class VersionedInner(_Told, MemoryStore):
    """A system of record; an upsert and its ``write`` are one operation, and so are the others."""

    def __init__(self, snapshot_type: type[StateSnapshot] = StateSnapshot) -> None:
        super().__init__(snapshot_type=snapshot_type)
        self.law = Inner()

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        get = super().get_latest
        return await self.law.step(Op.GET_LATEST, lambda: get(user_id))  # type: ignore[no-any-return]

    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        get = super().get_history
        return await self.law.step(Op.GET_HISTORY, lambda: get(user_id, limit))  # type: ignore[no-any-return]

    async def read(self, user_id: str) -> Versioned:
        read = super().read_many
        found = await self.law.step(Op.GET_LATEST, lambda: read([user_id]))
        return found[user_id]  # type: ignore[no-any-return]

    async def read_many(self, user_ids: Sequence[str]) -> Mapping[str, Versioned]:
        read = super().read_many
        return await self.law.step(Op.GET_LATEST_MANY, lambda: read(user_ids))  # type: ignore[no-any-return]

    async def write(self, snapshot: StateSnapshot) -> Versioned:
        write = super().write
        return await self.law.step(Op.UPSERT_LATEST, lambda: write(snapshot))  # type: ignore[no-any-return]

    async def write_many(self, snapshots: Sequence[StateSnapshot]) -> Mapping[str, Versioned]:
        write = super().write_many
        return await self.law.step(Op.UPSERT_LATEST_MANY, lambda: write(snapshots))  # type: ignore[no-any-return]

    async def erase(self, user_id: str, tiers: Sequence[str] = ()) -> int:
        erase = super().erase
        return await self.law.step(Op.DELETE, lambda: erase(user_id, tiers))  # type: ignore[no-any-return]

    async def aclose(self) -> None:
        self.law.closed += 1
        await super().aclose()


class PlainInner(_Told):
    """The same without versions, as a third party's store is."""

    def __init__(self, snapshot_type: type[StateSnapshot] = StateSnapshot) -> None:
        self.law = Inner()
        # In a tuple, since this is no layer.
        self._kept = (MemoryStore(snapshot_type=snapshot_type),)

    @property
    def snapshot_type(self) -> type[StateSnapshot]:
        return self._kept[0].snapshot_type

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        kept = self._kept[0]
        await self.law.step(Op.UPSERT_LATEST, lambda: kept.upsert_latest(snapshot))

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        kept = self._kept[0]
        return await self.law.step(Op.GET_LATEST, lambda: kept.get_latest(user_id))  # type: ignore[no-any-return]

    async def delete(self, user_id: str) -> None:
        kept = self._kept[0]
        await self.law.step(Op.DELETE, lambda: kept.delete(user_id))

    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        kept = self._kept[0]
        return await self.law.step(Op.GET_HISTORY, lambda: kept.get_history(user_id, limit))  # type: ignore[no-any-return]

    async def get_latest_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        kept, wanted = self._kept[0], list(user_ids)
        return await self.law.step(Op.GET_LATEST_MANY, lambda: kept.get_latest_many(wanted))  # type: ignore[no-any-return]

    async def upsert_latest_many(self, snapshots: Iterable[StateSnapshot]) -> None:
        kept, batch = self._kept[0], list(snapshots)
        await self.law.step(Op.UPSERT_LATEST_MANY, lambda: kept.upsert_latest_many(batch))

    async def aclose(self) -> None:
        self.law.closed += 1
        await self._kept[0].aclose()


class Bench:
    """A layer on the bench, and the store below it.

    Args:
        layer: the layer.
        inner: the store below.
        behind: another way to the same states, behind the layer's back: a second layer of its kind
            around ``inner``, since a layer may keep them there in a form of its own.
    """

    def __init__(
        self, layer: StateStore, inner: VersionedInner | PlainInner, behind: StateStore
    ) -> None:
        self.layer = layer
        self.inner = inner
        self.behind = behind
        self.law = inner.law

    def state(self, user_id: str, number: int = 0) -> StateSnapshot:
        """Return a snapshot of the class that the layer takes."""
        share = (number % 11) / 10
        return self.layer.snapshot_type(
            user_id=user_id, updated_at_unix_ms=number, axes={"a": share}
        )

    def calls(self, user_id: str) -> dict[Op, Callable[[], Awaitable[Any]]]:
        """Return one call of each operation."""
        layer, state = self.layer, self.state(user_id, 7)
        return {
            Op.GET_LATEST: lambda: layer.get_latest(user_id),
            Op.UPSERT_LATEST: lambda: layer.upsert_latest(state),
            Op.DELETE: lambda: layer.delete(user_id),
            Op.GET_HISTORY: lambda: layer.get_history(user_id, 5),
            Op.GET_LATEST_MANY: lambda: layer.get_latest_many([user_id]),
            Op.UPSERT_LATEST_MANY: lambda: layer.upsert_latest_many([state]),
        }

    async def reached(self, task: asyncio.Future[Any]) -> bool:
        """Wait until a held call is inside the store below, or ended without getting there."""
        entered = asyncio.ensure_future(self.law.entered.wait())
        await asyncio.wait({entered, task}, return_when=asyncio.FIRST_COMPLETED)
        entered.cancel()
        return self.law.entered.is_set()


async def soon(holds: Callable[[], Awaitable[bool]]) -> bool:
    """Tell whether something holds within two seconds."""
    for _ in range(_SOON_TRIES):
        if await holds():
            return True
        await asyncio.sleep(_SOON_SECONDS / _SOON_TRIES)
    return False


async def settle() -> None:
    """Let every task come to where it waits."""
    for _ in range(_TURNS):
        await asyncio.sleep(0)


async def end(task: asyncio.Future[Any], what: str) -> Any:
    """Return the result of a call that must end; None when it raised."""
    done, _ = await asyncio.wait({task}, timeout=_END_SECONDS)
    if not done:
        task.cancel()
        raise Broken(f"{what} did not end within {_END_SECONDS:g} s")
    return None if task.cancelled() or task.exception() is not None else task.result()
