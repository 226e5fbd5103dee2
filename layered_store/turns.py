"""One write of a user at a time, in the order in which they came."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar

from layered_store.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Turn", "Turns"]


class Turn:
    """What is under way for one user.

    Args:
        loop: the event loop on which it is.

    Attributes:
        holders: how many calls there are, those that wait too.
        busy: whether one of them has the turn.
    """

    __slots__ = ("_waiting", "busy", "holders", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.holders = 0
        self.busy = False
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def take(self) -> None:
        """Wait until those before are done."""
        if self.busy:
            turn = self.loop.create_future()
            self._waiting.append(turn)
            try:
                await turn
            except BaseException:
                if turn.done() and not turn.cancelled():
                    self.pass_on()
                raise
        self.busy = True

    def pass_on(self) -> None:
        """Give the turn straight to the one that waits longest, so that nobody cuts in."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.busy = False


T = TypeVar("T", bound=Turn)


class Turns(Generic[T]):
    """The turns of all users of whom something is under way.

    Args:
        new: makes the turn of a user on an event loop.
        layer: whose they are, for errors.

    Attributes:
        users: by id; nothing is kept of the others.
    """

    def __init__(self, new: Callable[[str, asyncio.AbstractEventLoop], T], layer: str) -> None:
        self._new = new
        self._layer = layer
        self.users: dict[str, T] = {}

    def enter(self, user_id: str) -> T:
        """Hold the turn of a user in view without taking it; end with :meth:`leave`.

        Raises:
            UnsupportedError: another event loop, which still runs, has the user.
        """
        loop = asyncio.get_running_loop()
        turn = self.users.get(user_id)
        if turn is not None and turn.loop is not loop:
            if not turn.loop.is_closed():
                raise UnsupportedError(
                    "one user is written from two event loops at the same time; use one stack per"
                    " loop",
                    layer=self._layer,
                )
            turn = None  # what that loop left behind will never end
        if turn is None:
            turn = self.users[user_id] = self._new(user_id, loop)
        turn.holders += 1
        return turn

    def leave(self, user_id: str, turn: T) -> None:
        """End what :meth:`enter` began."""
        turn.holders -= 1
        if not turn.holders and self.users.get(user_id) is turn:
            del self.users[user_id]

    async def begin(self, user_id: str) -> T:
        """Wait for the user's turn and take it; end with :meth:`end`."""
        turn = self.enter(user_id)
        try:
            await turn.take()
        except BaseException:
            self.leave(user_id, turn)
            raise
        return turn

    def end(self, user_id: str, turn: T) -> None:
        """Pass the turn on."""
        turn.pass_on()
        self.leave(user_id, turn)
