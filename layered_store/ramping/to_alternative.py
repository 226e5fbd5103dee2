"""The share reads a second store, which follows every write and erasure of all users."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

from layered_store.call import call_continues, current_call
from layered_store.coherence.outcomes import (
    Erasures,
    erased_in_part,
    erased_nowhere,
    may_take_effect,
    not_happened,
)
from layered_store.errors import UnavailableError
from layered_store.operations import Op
from layered_store.ramping.ways import Ways
from layered_store.turns import Turn, Turns, unsent

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from layered_store.call import Call
    from layered_store.interface import StateStore
    from layered_store.snapshot import StateSnapshot

__all__ = ["ToAlternative"]

_MAX_BEHIND: Final = 100_000
"""How many users may be behind at the alternative before it answers for nobody."""


class _Write(Turn):
    """The writes of one user that are under way or wait: one at a time.

    Args:
        turns: those of all users.
        user_id: whose.
        loop: the event loop on which they are.
        to_other: the side that answers reads meanwhile, whatever the share becomes.
    """

    __slots__ = ("to_other",)

    def __init__(
        self, turns: Turns[_Write], user_id: str, loop: asyncio.AbstractEventLoop, *, to_other: bool
    ) -> None:
        super().__init__(turns, user_id, loop)
        self.to_other = to_other


class ToAlternative(Ways):
    """``inner`` acknowledges; whoever the alternative missed a write of is read from ``inner``.

    Attributes:
        turns: the writes under way.
        behind: whom the alternative missed a write of.
        calls: writes and erasures under way, and how many erasures were incomplete.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.turns = Turns(self._new_turn, self.block.name)
        self.behind: OrderedDict[str, None] = OrderedDict()
        self._all_behind = False
        self.calls = Erasures(self.clock)

    def _new_turn(
        self, turns: Turns[_Write], user_id: str, loop: asyncio.AbstractEventLoop
    ) -> _Write:
        # Until the end, reads stay on the side they are on.
        return _Write(turns, user_id, loop, to_other=self.takes(user_id))

    def takes(self, user_id: str) -> bool:
        turn = self.turns.users.get(user_id)
        if turn is not None:
            return turn.to_other
        return (
            self.in_share(user_id)
            and not self._all_behind
            and user_id not in self.behind
            and not self.doubted(user_id)
        )

    # Reading: whom the alternative does not have was not written since the ramp began

    async def latest_of_share(self, user_id: str) -> StateSnapshot | None:
        found = await self.latest_of(self.other, user_id)
        if found is None:
            found = await self.latest_of(self.inner, user_id)
            if self.midway(user_id):
                again = await self.latest_of(self.other, user_id)
                return found if again is None else again
        return found

    async def history_of_share(self, user_id: str, limit: int) -> list[StateSnapshot]:
        found = await self.history_of(self.other, user_id, limit)
        if not found and limit:
            found = await self.history_of(self.inner, user_id, limit)
            if self.midway(user_id):
                return await self.history_of(self.other, user_id, limit) or found
        return found

    def answered(
        self, asked: Collection[str], found: Mapping[str, StateSnapshot]
    ) -> Collection[str]:
        del asked
        return found

    def midway(self, user_id: str) -> bool:
        turn = self.turns.users.get(user_id)
        return turn is not None and turn.to_other

    # Writing

    async def write(self, batch: Sequence[StateSnapshot], op: Op, call: Call) -> None:
        """Write to ``inner``, which acknowledges, then to the alternative."""
        users = {snapshot.user_id for snapshot in batch}
        with self.calls.call(), await self.turns.begin_all(users, op) as turns:
            # What an earlier write may still do, on either side, could come after this one.
            settled = [user_id for user_id in turns if not self.doubted(user_id)]
            try:
                await _upsert(self.inner, batch, op)
            except BaseException as exc:
                if not not_happened(exc):
                    self._fall_behind(turns)
                if may_take_effect(exc):
                    self.doubt(turns)
                raise
            in_share = any(map(self.in_share, turns))
            if call.superseded:
                # An erasure or a newer state won in inner; who knows what would here.
                self._fall_behind(turns)
                return
            own = call.again()
            try:
                await self._follow(batch, op, own, turns.values())
            except Exception as exc:
                self._fall_behind(turns)
                if may_take_effect(exc):
                    self.doubt(turns)
                if in_share:
                    raise self._unknown(exc, op) from exc
            except BaseException:
                self._fall_behind(turns)
                self.doubt(turns)  # cut off, it may still take effect
                raise
            else:
                if own.superseded:  # it has something else for the latest state
                    self._fall_behind(turns)
                else:
                    self._catch_up(settled)

    async def _follow(
        self, batch: Sequence[StateSnapshot], op: Op, call: Call, turns: Collection[_Write]
    ) -> None:
        """Write to the alternative, unless one of the users is spared it."""
        if any(turn.spared for turn in turns):
            raise unsent(op, self.block.name)
        try:
            with call_continues(call):
                await _upsert(self.other, batch, op)
        except Exception as exc:
            for turn in turns:
                turn.second_failed(exc)
            raise

    def _unknown(self, exc: Exception, op: Op) -> UnavailableError:
        return UnavailableError(
            "inner took the write, the alternative did not; repeat it",
            operation=op,
            layer=self.block.name,
            retryable=getattr(exc, "retryable", False),
            outcome_unknown=True,
        )

    async def erase(self, user_id: str) -> None:
        """Erase in ``inner``, then in the alternative."""
        with self.calls.by(self.block), await self.turns.begin(user_id, Op.DELETE) as turn:
            settled = not self.doubted(user_id)
            failures: list[tuple[Exception, StateStore]] = []
            # Until both have erased, only inner tells the truth.
            self._fall_behind([user_id])
            for store in (self.inner, self.other):
                try:
                    if store is self.inner:
                        await store.delete(user_id)
                    else:
                        await self._erase_other(user_id, turn)
                except BaseException as exc:
                    if store is self.inner:
                        turn.failed(exc)
                    else:
                        turn.second_failed(exc)
                    if may_take_effect(exc):
                        self.doubt([user_id])
                    if not isinstance(exc, Exception):
                        raise
                    # Whatever it was, the other must erase.
                    failures.append((exc, store))
            if erased_nowhere(failures, of=2):
                raise failures[0][0]
            if failures:
                raise erased_in_part(failures, self.block.name, user_id) from failures[0][0]
            if settled:
                self._catch_up([user_id])

    async def _erase_other(self, user_id: str, turn: _Write) -> None:
        if turn.spared:
            raise unsent(Op.DELETE, self.block.name, user_id)
        # Inner may have erased again what was written since an earlier attempt.
        with call_continues(current_call(self.clock).anew()):
            await self.other.delete(user_id)

    def _fall_behind(self, users: Iterable[str]) -> None:
        for user_id in users:
            self.behind[user_id] = None
            self.turns.users[user_id].to_other = False
        if len(self.behind) > _MAX_BEHIND:
            self._all_behind = True

    def _catch_up(self, users: Iterable[str]) -> None:
        for user_id in users:
            self.behind.pop(user_id, None)

    async def end(self) -> None:
        await self.calls.end()


async def _upsert(store: StateStore, batch: Sequence[StateSnapshot], op: Op) -> None:
    if op is Op.UPSERT_LATEST:
        await store.upsert_latest(batch[0])
    else:
        await store.upsert_latest_many(batch)
