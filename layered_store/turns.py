"""One write of a user at a time, in the order in which they came."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from layered_store.errors import StoreTimeoutError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from layered_store.interface import Op

__all__ = ["Together", "Turn", "Turns", "timed_out", "unsent"]


class Turn:
    """What is under way for one user.

    The call that has the turn works ``with`` it: its error is noted, and the turn passed on.

    When a store hangs, those who wait do not run into the time limit one after the other: when the
    call that has the turn timed out, those who waited already when it was given the turn fail too.
    When it was a second store that hangs, which calls can do without, they skip that one.

    Args:
        turns: those of all users.
        user_id: whose.
        loop: the event loop on which it is.

    Attributes:
        holders: how many calls there are, those that wait too.
        busy: whether one of them has the turn.
        taken: how often it was taken.
        spared: whether the one that has it passes the second store by.
    """

    __slots__ = (
        "_came",
        "_had",
        "_hung",
        "_spare",
        "_turns",
        "_waiting",
        "busy",
        "holders",
        "loop",
        "spared",
        "taken",
        "user_id",
    )

    def __init__(self, turns: Turns[Any], user_id: str, loop: asyncio.AbstractEventLoop) -> None:
        self._turns = turns
        self.user_id = user_id
        self.loop = loop
        self.holders = 0
        self.busy = False
        self.taken = 0
        # Who waits, by the place in which they came; a cancelled one is not kept.
        self._waiting: OrderedDict[asyncio.Future[bool], int] = OrderedDict()
        self._came = 0
        # Up to which place they had come when the turn was given last.
        self._had = 0
        self._hung = self.spared = False
        # Up to which place those had come who pass the second store by.
        self._spare = 0

    async def take(self) -> bool:
        """Wait until those before are done; tell whether this call has the turn."""
        came = 0
        if self.busy:
            turn = self.loop.create_future()
            came = self._came = self._came + 1
            self._waiting[turn] = came
            try:
                given = await turn
            except BaseException:
                self._waiting.pop(turn, None)
                if turn.done() and not turn.cancelled() and turn.result():
                    self.pass_on()
                raise
            if not given:
                return False
        self.have(came)
        return True

    def have(self, came: int = 0) -> None:
        """Take it at once, since it is nobody's, or was given to who came in this place."""
        self.busy, self._had, self._hung = True, self._came, False
        self.spared = 0 < came <= self._spare
        self.taken += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        self.end(exc)

    def end(self, exc: BaseException | None = None) -> None:
        """Pass it on, after noting what the call that has it raised."""
        if exc is not None:
            self.failed(exc)
        self.pass_on()
        self._turns.leave(self)

    def failed(self, exc: BaseException) -> None:
        """Note what the call that has the turn raised."""
        self._hung |= isinstance(exc, TimeoutError)

    def second_failed(self, exc: BaseException) -> None:
        """Note what the second store raised, unless it was not asked."""
        # One that is spared must spare nobody: while others wait, it would never be tried again.
        if not self.spared and timed_out(exc):
            self._spare = self._had

    def pass_on(self) -> None:
        """Give the turn straight to the one that waits longest, so that nobody cuts in."""
        while self._waiting:
            turn, came = self._waiting.popitem(last=False)
            if turn.done():
                continue
            given = not (self._hung and came <= self._had)
            turn.set_result(given)
            if given:
                return
        self.busy = False


def timed_out(exc: BaseException) -> bool:
    """Tell whether a store that got no answer in time is the reason of an error."""
    return isinstance(exc, TimeoutError) or isinstance(exc.__cause__, TimeoutError)


def unsent(op: Op | None, layer: str, user_id: str | None = None) -> StoreTimeoutError:
    """Return the error of a write that was spared a store that hangs."""
    return StoreTimeoutError(
        "an earlier write of the same user got no answer in time; this one was not sent",
        operation=op,
        layer=layer,
        user_id=user_id,
    )


T = TypeVar("T", bound=Turn)


class Turns(Generic[T]):
    """The turns of all users of whom something is under way.

    Args:
        new: makes the turn of a user on an event loop.
        layer: whose they are, for errors.

    Attributes:
        users: by id; nothing is kept of the others.
    """

    def __init__(
        self, new: Callable[[Turns[T], str, asyncio.AbstractEventLoop], T], layer: str
    ) -> None:
        self._new = new
        self._layer = layer
        self.users: dict[str, T] = {}

    def enter(self, user_id: str, op: Op | None = None) -> T:
        """Hold the turn of a user in view without taking it; end with :meth:`leave`.

        Args:
            user_id: whose.
            op: of whom, for errors.

        Raises:
            UnsupportedError: another event loop, which still runs, has the user.
        """
        loop = asyncio.get_running_loop()
        turn = self.users.get(user_id)
        if turn is None:
            # In one step, since a loop of another thread may come by.
            turn = self.users.setdefault(user_id, self._new(self, user_id, loop))
        if turn.loop is not loop:
            if not turn.loop.is_closed():
                raise UnsupportedError(
                    "one user is written from two event loops at the same time; use one stack per"
                    " loop",
                    operation=op,
                    layer=self._layer,
                    user_id=user_id,
                )
            # What that loop left behind will never end.
            turn = self.users[user_id] = self._new(self, user_id, loop)
        turn.holders += 1
        return turn

    def leave(self, turn: T) -> None:
        """End what :meth:`enter` began."""
        turn.holders -= 1
        if not turn.holders and self.users.get(turn.user_id) is turn:
            del self.users[turn.user_id]

    async def begin(self, user_id: str, op: Op | None = None) -> T:
        """Wait for the user's turn and take it, to work ``with`` it.

        Args:
            user_id: whose.
            op: of whom, for errors.

        Raises:
            StoreTimeoutError: what is written hangs.
        """
        turn = self.enter(user_id, op)
        try:
            if not await turn.take():
                raise unsent(op, self._layer, user_id)
        except BaseException:
            self.leave(turn)
            raise
        return turn

    async def begin_all(self, users: Iterable[str], op: Op | None = None) -> Together[T]:
        """Take the turns of several users, each named once, as :meth:`begin` does of one."""
        together: Together[T] = Together()
        try:
            # In one order everywhere, so that two batches never wait for each other.
            for user_id in sorted(users):
                together[user_id] = await self.begin(user_id, op)
        except BaseException as exc:
            together.end(exc)
            raise
        return together


class Together(dict[str, T]):
    """The turns of several users, by user, that one call has: it works ``with`` all of them."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        self.end(exc)

    def end(self, exc: BaseException | None = None) -> None:
        """Pass all of them on, after noting what the call raised."""
        for turn in self.values():
            turn.end(exc)
