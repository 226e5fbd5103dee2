"""The newest version that a process has seen of each user: it shows no older copy."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from layered_store.coherence.outcomes import Doubts, not_happened

if TYPE_CHECKING:
    from collections.abc import Iterable

    from layered_store.clock import Clock
    from layered_store.coherence.guarded.watch import Signal

__all__ = ["FLOOR_SECONDS", "Seen"]

FLOOR_SECONDS: Final = 30.0
"""How long a process remembers the versions it has seen; far longer than a repair takes."""

_MANY: Final = 100_000
_NEEDED_SECONDS: Final = 5.0
"""How long those of so many users are remembered at least. A copy that is believed lags by no more
than the trust in the tier lasts, 2 s, and 2 s more where the tier's clock was set back."""

_NO_FLOOR: Final = (0, 0.0)


class Seen:
    """The *floor* of each user, the highest version seen, and the users in doubt.

    A user is in doubt while a write of theirs may still take effect: it is not known when, nor
    under which version, so no copy is believed and each read asks the authority.

    Args:
        clock: source of time.
        repair_now: has the next repair pass begin at once.
    """

    def __init__(self, clock: Clock, repair_now: Signal) -> None:
        self._monotonic = clock.monotonic
        self._repair_now = repair_now
        # Whoever forgets what is old: event loops of several threads; and calls that the collector
        # ends in the midst of others of their thread.
        self._lock = threading.RLock()
        # Versions, and until when they are remembered.
        self._floors: OrderedDict[str, tuple[int, float]] = OrderedDict()
        # Until when those would be remembered that were forgotten early.
        self._forgotten = float("-inf")
        # Until when a write may still take effect.
        self._doubtful = Doubts()

    def floor(self, user_id: str) -> int:
        """Return the highest version that was seen of a user."""
        return self._floors.get(user_id, _NO_FLOOR)[0]

    def raise_floor(self, user_id: str, version: int) -> None:
        """Note what the authority has, or a copy that was believed; 0: it knows no such user."""
        now, floors = self._monotonic(), self._floors
        with self._lock:
            if version:
                known = floors.get(user_id, _NO_FLOOR)[0]
                floors[user_id] = (max(known, version), now + FLOOR_SECONDS)
                floors.move_to_end(user_id)
            else:
                floors.pop(user_id, None)
            ended = now
            if len(floors) > _MANY:
                ended += FLOOR_SECONDS - _NEEDED_SECONDS
            while floors and (until := floors[first := next(iter(floors))][1]) <= ended:
                del floors[first]
                if until > now:
                    self._forgotten = until
                    if len(floors) <= _MANY:
                        break
            if self._doubtful:
                self._doubtful.end(now)

    def allows(self, user_id: str, version: int) -> bool:
        """Tell whether a copy of a tier that is trusted no more is not older than what was seen."""
        if user_id not in self._floors:
            return self._monotonic() >= self._forgotten
        return version >= self.floor(user_id)

    def believes(self, user_id: str, version: int) -> bool:
        """Tell whether a copy is not older than what was seen; note it as seen."""
        if version < self._floors.get(user_id, _NO_FLOOR)[0]:
            return False
        if self._doubtful and self._doubtful.get(user_id, 0.0) > self._monotonic():
            return False
        self.raise_floor(user_id, version)
        return True

    def doubt(self, user_ids: Iterable[str], exc: BaseException) -> None:
        """Believe no copies of these users for a while, unless what was raised undid the write."""
        if not_happened(exc):
            return
        now = self._monotonic()
        with self._lock:
            self._doubtful.add(user_ids, now)
            self._doubtful.end(now)
        self._repair_now.set()  # the other processes follow with the next pass

    def begin_anew(self) -> None:
        """In a child of ``os.fork``: the lock may be held by a thread that is not here."""
        self._lock = threading.RLock()
