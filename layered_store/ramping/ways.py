"""The two ways of a ``Ramp``: which one a user's reads go now, and reading on it."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import Counter
from typing import TYPE_CHECKING

from layered_store.checks import check_history, check_state, check_states, states_by_user
from layered_store.coherence.outcomes import Doubts

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from layered_store.call import Call
    from layered_store.clock import Clock
    from layered_store.interface import StateStore
    from layered_store.operations import Op
    from layered_store.snapshot import StateSnapshot

__all__ = ["Ways"]


class Ways(ABC):
    """Sends each user one way or the other, so that no read goes back behind a write.

    Args:
        block: the layer it works for, for errors.
        inner: the way of everybody else.
        other: the way of the share.
        in_share: whether a user is in the share now.
        clock: source of time.

    Attributes:
        reads: how many went each way.
        doubtful: users of whom a write may still take effect, and until when.
        lock: held while what is kept of users is changed.
    """

    def __init__(
        self,
        block: StateStore,
        inner: StateStore,
        other: StateStore,
        in_share: Callable[[str], bool],
        clock: Clock,
    ) -> None:
        self.block = block
        self.inner = inner
        self.other = other
        self.in_share = in_share
        self.clock = clock
        self.reads: Counter[str] = Counter({"inner": 0, "other": 0})
        self.doubtful = Doubts()
        # What is kept of users is changed by event loops of several threads; as in ``Holdings``.
        self.lock = threading.RLock()

    @abstractmethod
    def takes(self, user_id: str) -> bool:
        """Tell whether reads of a user go the other way now."""

    @abstractmethod
    async def write(self, batch: Sequence[StateSnapshot], op: Op, call: Call) -> None:
        """Store snapshots, of one user or of several."""

    @abstractmethod
    async def erase(self, user_id: str) -> None:
        """Erase a user."""

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        if not self.takes(user_id):
            self.reads["inner"] += 1
            found = await self.latest_of(self.inner, user_id)
            if not self.takes(user_id):
                return found
            # The share rose meanwhile: a write under way may stand in inner alone, and the next
            # read would show what was before it.
        self.reads["other"] += 1
        return await self.latest_of_share(user_id)

    async def latest_of_share(self, user_id: str) -> StateSnapshot | None:
        """Return the latest state of a user whose reads go the other way."""
        return await self.latest_of(self.other, user_id)

    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        if self.takes(user_id):
            return await self.history_of_share(user_id, limit)
        return await self.history_of(self.inner, user_id, limit)

    async def history_of_share(self, user_id: str, limit: int) -> list[StateSnapshot]:
        """Return the history of a user whose reads go the other way."""
        return await self.history_of(self.other, user_id, limit)

    async def get_latest_many(self, wanted: Sequence[str]) -> dict[str, StateSnapshot]:
        other = {user_id: None for user_id in wanted if self.takes(user_id)}
        found: dict[str, StateSnapshot] = {}
        if other:
            self.reads["other"] += len(other)
            found.update(states_by_user(await self.other.get_latest_many([*other]), self.block))
        answered = self.answered(other, found)
        rest = [user_id for user_id in wanted if user_id not in answered]
        if rest:
            self.reads["inner"] += len(wanted) - len(other)
            found.update(states_by_user(await self.inner.get_latest_many(rest), self.block))
        # As a single read does.
        again = [
            user_id
            for user_id in rest
            if (self.midway(user_id) if user_id in other else self.takes(user_id))
        ]
        if again:
            found.update(states_by_user(await self.other.get_latest_many(again), self.block))
        return check_states(found, wanted, self.block)

    def answered(
        self, asked: Collection[str], found: Mapping[str, StateSnapshot]
    ) -> Collection[str]:
        """Return whom the other way answered for, of those that it was asked for."""
        del found
        return asked

    def midway(self, user_id: str) -> bool:
        """Tell whether inner may show a write that the next read, of the other side, does not."""
        del user_id
        return False

    async def end(self) -> None:  # noqa: B027  most take no steps on both
        """Wait for the writes and erasures under way that take steps on both stores."""

    async def latest_of(self, store: StateStore, user_id: str) -> StateSnapshot | None:
        return check_state(await store.get_latest(user_id), user_id, self.block)

    async def history_of(
        self, store: StateStore, user_id: str, limit: int
    ) -> list[StateSnapshot]:
        found = await store.get_history(user_id, limit)
        return check_history(found, user_id, self.block.name)

    def doubted(self, user_id: str) -> bool:
        """Tell whether a write that one of the two ways missed may still take effect."""
        if not self.doubtful:
            return False
        with self.lock:
            self.doubtful.end(self.clock.monotonic())
            return user_id in self.doubtful

    def doubt(self, users: Iterable[str]) -> None:
        """Note that a write of these users may still take effect."""
        now = self.clock.monotonic()
        with self.lock:
            self.doubtful.add(users, now)
            self.doubtful.end(now)
