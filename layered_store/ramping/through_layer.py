"""The share goes through a layer; both ways end in ``inner``."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from layered_store.call import call_continues
from layered_store.coherence.outcomes import not_happened
from layered_store.errors import StoreError
from layered_store.operations import Op
from layered_store.ramping.ways import Ways

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from layered_store.call import Call
    from layered_store.interface import StateStore
    from layered_store.snapshot import StateSnapshot

__all__ = ["ThroughLayer"]


class ThroughLayer(Ways):
    """Reads and writes of the share go through a layer that may hold something of its users.

    Args:
        was_in_share: whether a user ever was; such users go on writing through the layer.

    Attributes:
        direct: writes under way that pass the layer by.
        pins: writes under way through the layer: how many, and whether reads go there meanwhile.
    """

    def __init__(self, *args: Any, was_in_share: Callable[[str], bool]) -> None:
        super().__init__(*args)
        self.was_in_share = was_in_share
        self.direct: Counter[str] = Counter()
        self.pins: dict[str, tuple[int, bool]] = {}

    def takes(self, user_id: str) -> bool:
        if user_id in self.direct or self.doubted(user_id):
            return False
        pin = self.pins.get(user_id)
        return self.in_share(user_id) if pin is None else pin[1]

    async def write(self, batch: Sequence[StateSnapshot], op: Op, call: Call) -> None:
        with self._writing({each.user_id: None for each in batch}) as ways:
            if op is Op.UPSERT_LATEST:
                await ways[batch[0].user_id].upsert_latest(batch[0])
            else:
                await self._divide(batch, ways, call)

    async def erase(self, user_id: str) -> None:
        with self._writing([user_id]) as ways:
            await ways[user_id].delete(user_id)

    @contextmanager
    def _writing(self, users: Iterable[str]) -> Iterator[dict[str, StateStore]]:
        """Give the way of each user's write.

        While a write passes the layer by, so do the user's reads: the layer would not hear of it.
        Further writes of the user do too, or the layer could keep what lost against the first.
        While one goes through it, reads stay on their side: inner may have it before the layer.
        """
        with self.lock:
            ways = {user_id: self._way(user_id) for user_id in users}
            direct = [user_id for user_id, way in ways.items() if way is self.inner]
            pinned = [user_id for user_id, way in ways.items() if way is not self.inner]
            for user_id in pinned:
                count, through = self.pins.get(user_id) or (0, self.takes(user_id))
                self.pins[user_id] = (count + 1, through)
            self.direct.update(direct)
        try:
            yield ways
        except BaseException as exc:
            if not not_happened(exc):
                self.doubt(direct)
            raise
        finally:
            with self.lock:
                for user_id in pinned:
                    count, through = self.pins.pop(user_id)
                    if count > 1:
                        self.pins[user_id] = (count - 1, through)
                for user_id in direct:
                    self.direct[user_id] -= 1
                    if not self.direct[user_id]:
                        del self.direct[user_id]

    def _way(self, user_id: str) -> StateStore:
        """Return the way of a user's write that begins now."""
        passes_by = (
            not self.was_in_share(user_id) or user_id in self.direct or self.doubted(user_id)
        )
        return self.inner if passes_by else self.other

    async def _divide(
        self, batch: Sequence[StateSnapshot], ways: Mapping[str, StateStore], call: Call
    ) -> None:
        """Write each user of a batch on the user's way."""
        stored = False
        for way in (self.inner, self.other):
            part = {i: each for i, each in enumerate(batch) if ways[each.user_id] is way}
            if len(part) == len(batch):
                await way.upsert_latest_many(batch)
                return
            if part:
                own = call.of(part)
                try:
                    with call_continues(own):
                        await way.upsert_latest_many(list(part.values()))
                except StoreError as exc:
                    exc.outcome_unknown |= stored
                    raise
                stored = True
                call.superseded |= own.superseded
                call.unsure |= own.unsure
