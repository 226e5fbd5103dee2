"""Copies in a tier without versions: kept in step with the origin by this one process.

Any store can be the tier and any the origin. One process then behaves like one store, whatever its
tasks do at the same time. Other processes that write the same tier are not seen: that takes a tier
and an origin with versions (:mod:`layered_store.coherence.guarded`).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Final, NamedTuple

from layered_store.call import call_continues, current_call
from layered_store.checks import is_state_of
from layered_store.coherence.outcomes import (
    CALLER_ERRORS,
    QUARANTINE_SECONDS,
    after_commit,
    may_take_effect,
)
from layered_store.errors import ErasureIncompleteError, UnsupportedError
from layered_store.interface import Op
from layered_store.stack import tier_name
from layered_store.turns import Together, Turn, Turns, timed_out, unsent

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterable, Sequence

    from layered_store.clock import Clock
    from layered_store.interface import StateStore
    from layered_store.snapshot import StateSnapshot

__all__ = ["LocalCopies"]

_MAX_DOUBTFUL: Final = 100_000
"""How many users' doubtful copies are noted; beyond, all but the copies known to be right are."""


class _Copy(Turn):
    """What is under way for one user: at most one change of the copy at a time.

    Attributes:
        unsettled: whether an earlier write could still take effect when this change began.
    """

    __slots__ = ("unsettled",)

    def __init__(
        self, turns: Turns[_Copy], user_id: str, loop: asyncio.AbstractEventLoop
    ) -> None:
        super().__init__(turns, user_id, loop)
        self.unsettled = False


class CopyRead(NamedTuple):
    """What a tier answered about one user.

    Args:
        snapshot: the copy; None when there is none that may be believed.
        fillable: whether what the origin says may be stored now.
        failed: whether the tier could not be read.
    """

    snapshot: StateSnapshot | None
    fillable: bool
    failed: bool = False


class CopiesRead(NamedTuple):
    """What a tier answered about several users; see :class:`CopyRead`.

    Args:
        found: the copies by user id.
        fillable: whether what the origin says of the others may be stored now.
        failed: how many could not be read.
    """

    found: dict[str, StateSnapshot]
    fillable: bool
    failed: int = 0


class LocalCopies:
    """Keeps the copies of users in ``tier``, one change of a user at a time.

    Reads pass the tier by while a write of their user is under way, so that nobody who saw the
    origin's new state sees the tier's old one afterwards. A copy whose change failed is doubtful:
    it is not read until a later change of it succeeds. A tier from elsewhere may raise anything:
    whatever it is, the origin serves the caller.

    Args:
        tier: the store that holds the copies.
        clock: source of time.
    """

    def __init__(self, tier: StateStore, clock: Clock) -> None:
        self._tier = tier
        self._clock = clock
        self._turns = Turns(_Copy, "WriteThrough")
        # Doubtful copies, and until when nothing may be stored over them.
        self._doubtful: OrderedDict[str, float] = OrderedDict()
        # Once some had to be forgotten: until when nothing may be stored over those, and the users
        # whose copies were put right since. All others are doubtful.
        self._forgotten_until: float | None = None
        self._right: OrderedDict[str, None] = OrderedDict()
        # Steps on the tier that failed and that no caller was told of, by what was tried.
        self.failures: Counter[str] = Counter()

    @property
    def pending(self) -> int:
        """How many users' copies are doubtful now."""
        return len(self._doubtful)

    def usable(self, user_id: str) -> bool:
        """Tell whether the tier may be asked for a user now."""
        return self._doubted_until(user_id) is None and not self._changes(user_id)

    def _changes(self, user_id: str) -> bool:
        """Tell whether the copy of a user is being changed."""
        turn = self._turns.users.get(user_id)
        return turn is not None and turn.busy

    def _doubted_until(self, user_id: str) -> float | None:
        """Return until when nothing may be stored over a doubtful copy; None when it is not one."""
        until = self._doubtful.get(user_id)
        return self._forgotten_until if until is None and user_id not in self._right else until

    async def read(self, user_id: str) -> CopyRead:
        """Return the copy, if there is one that may be believed."""
        if not self.usable(user_id):
            doubted = self._doubted_until(user_id) is not None
            return CopyRead(None, fillable=doubted)
        try:
            snapshot = await self._tier.get_latest(user_id)
        except CALLER_ERRORS:
            raise
        except Exception:  # noqa: BLE001  see the class
            self.failures["read"] += 1
            return CopyRead(None, fillable=False, failed=True)
        if snapshot is not None and not is_state_of(snapshot, user_id):
            self.failures["read"] += 1
            snapshot = None  # no copy of this user: a miss, and what fills it replaces it
        return CopyRead(snapshot, fillable=True)

    async def read_many(self, user_ids: Sequence[str]) -> CopiesRead:
        """Return the copies that are there and may be believed."""
        asked = tuple(user_id for user_id in user_ids if self.usable(user_id))
        try:
            found = await self._tier.get_latest_many(asked)
            # A write may have begun meanwhile; its reader goes to the origin.
            usable = {
                key: found[key] for key in asked if key in found and self._believed(key, found[key])
            }
        except CALLER_ERRORS:
            raise
        except Exception:  # noqa: BLE001  see the class
            self.failures["read"] += 1
            return CopiesRead({}, fillable=False, failed=len(asked))
        return CopiesRead(usable, fillable=True)

    def _believed(self, user_id: str, copy: object) -> bool:
        right = is_state_of(copy, user_id)
        if copy is not None and not right:
            self.failures["read"] += 1
        return right and self.usable(user_id)

    def _settled(self, user_id: str) -> bool:
        """Tell whether no earlier write can take effect any more."""
        return (self._doubted_until(user_id) or 0.0) <= self._clock.monotonic()

    def watch(self, user_id: str) -> tuple[_Copy, int] | None:
        """Begin a read of the origin whose answer may be stored; end it with :meth:`fill`.

        None says that it may not: the copy is being changed, an earlier write could take effect
        after the read, or another event loop reads or writes the user just now, whose turns are not
        kept here.
        """
        if self._changes(user_id) or not self._settled(user_id):
            return None
        try:
            copy = self._turns.enter(user_id)
        except UnsupportedError:
            return None
        return copy, copy.taken

    async def fill(
        self, user_id: str, snapshot: StateSnapshot | None, mark: tuple[_Copy, int] | None
    ) -> bool:
        """Make the copy what the origin said, unless a write came since ``watch``.

        Of an absent user only a doubtful copy is removed: a write that got no answer may have put
        it there after the erasure.

        Returns:
            False when the tier hangs.
        """
        if mark is None:
            return True
        copy, taken = mark
        try:
            if copy.busy or copy.taken != taken:
                return True
            if snapshot is None and self._doubted_until(user_id) is None:
                return True
            copy.have()
            copy.unsettled = False
            try:
                if snapshot is None:
                    await self.bury(user_id)
                else:
                    await self._store(user_id, snapshot)
            except CALLER_ERRORS:
                raise
            except Exception as exc:  # noqa: BLE001
                # Counted, and the copy is doubtful: the caller has its answer all the same.
                return not timed_out(exc)
            finally:
                copy.pass_on()
            return True
        finally:
            self._turns.leave(copy)

    def unwatch(self, mark: tuple[_Copy, int] | None) -> None:
        """End a read of the origin that gave nothing to store."""
        if mark is not None:
            self._turns.leave(mark[0])

    async def begin(self, user_id: str, op: Op) -> _Copy:
        """Wait for the user's turn, to write ``with`` it; readers pass the copy by meanwhile.

        Raises:
            StoreTimeoutError: the origin hangs.
        """
        copy = await self._turns.begin(user_id, op)
        self._begun(copy)
        return copy

    async def begin_all(self, users: Iterable[str], op: Op) -> Together[_Copy]:
        """Wait for the turns of several users; see :meth:`begin`."""
        copies = await self._turns.begin_all(users, op)
        for copy in copies.values():
            self._begun(copy)
        return copies

    def _begun(self, copy: _Copy) -> None:
        copy.unsettled = not self._settled(copy.user_id)
        # Until the copy was changed with success, nobody may read it.
        self.doubt(copy.user_id)

    async def put(self, user_id: str, snapshot: StateSnapshot | None) -> bool:
        """Within a write: make the copy what the origin holds now; trouble leaves it doubtful.

        Returns:
            False when the tier hangs; the copies of the caller's other users are then better left
            doubtful than tried one by one.
        """
        turn = self._turns.users[user_id]
        if turn.spared:
            return True
        try:
            if snapshot is None:
                await self.bury(user_id)
            else:
                await self._store(user_id, snapshot)
        except CALLER_ERRORS as exc:
            raise after_commit(exc) from exc
        except Exception as exc:  # noqa: BLE001
            # Acknowledged by the origin; the copy is not read until it is repaired.
            turn.second_failed(exc)
            return not timed_out(exc)
        return True

    async def bury(self, user_id: str) -> None:
        """Within a write: remove the copy.

        Raises:
            ErasureIncompleteError: it may still be there.
        """
        self.doubt(user_id)
        turn = self._turns.users[user_id]
        try:
            if turn.spared:
                raise unsent(Op.DELETE, "WriteThrough", user_id)
            # The origin may have erased again what was written since an earlier attempt.
            with call_continues(current_call(self._clock).anew()):
                await self._tier.delete(user_id)
        except CALLER_ERRORS as exc:
            raise after_commit(exc) from exc
        except Exception as exc:
            self.failures["erase"] += 1
            turn.second_failed(exc)
            raise ErasureIncompleteError(
                "the user is erased in the system of record, but a cache tier could not be"
                " reached; repeat the delete",
                pending=(tier_name(self._tier),),
                operation=Op.DELETE,
                layer="WriteThrough",
                user_id=user_id,
            ) from exc
        self._clear(user_id)

    def doubt(self, user_id: str, *, quarantine: bool = False) -> None:
        """Do not read the copy of a user until a change of it succeeds.

        Args:
            user_id: whose copy.
            quarantine: a write of the origin may still take effect, so for a while (5 s) no reader
                may store what it finds there.
        """
        until = self._doubted_until(user_id) or 0.0
        if quarantine:
            until = self._clock.monotonic() + QUARANTINE_SECONDS
        self._doubtful[user_id] = until
        self._right.pop(user_id, None)
        if len(self._doubtful) > _MAX_DOUBTFUL:
            _, until = self._doubtful.popitem(last=False)
            self._forgotten_until = max(until, self._forgotten_until or 0.0)

    async def _store(self, user_id: str, snapshot: StateSnapshot) -> None:
        self.doubt(user_id)
        call = current_call(self._clock)
        # Begun when the caller began, so that an erasure elsewhere wins; its outcome is the tier's.
        own = call.again()
        try:
            with call_continues(own):
                await self._tier.upsert_latest(snapshot)
        except BaseException as exc:
            if isinstance(exc, Exception):
                self.failures["write"] += 1
            if may_take_effect(exc):
                # It may still arrive, and would then put what is old over what is new.
                self.doubt(user_id, quarantine=True)
            raise
        if own.superseded:
            # The tier erased after the caller began, and so kept what it had: not what stands.
            call.superseded = True
            return
        if own.unsure:
            self.doubt(user_id, quarantine=True)
            return
        self._clear(user_id)

    def _clear(self, user_id: str) -> None:
        """Believe the copy again, unless an earlier write may have come after this change."""
        copy = self._turns.users.get(user_id)
        if (copy is not None and copy.unsettled) or not self._settled(user_id):
            return
        self._doubtful.pop(user_id, None)
        if self._forgotten_until is not None:
            self._right[user_id] = None
            if len(self._right) > _MAX_DOUBTFUL:
                self._right.popitem(last=False)
