"""The users whose copies are known to be behind."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from layered_store.coherence.contract import TRUST_SECONDS

if TYPE_CHECKING:
    from layered_store.clock import Clock
    from layered_store.identity import digest_function

__all__ = ["MAX_UNREPAIRED", "Backlog"]

MAX_UNREPAIRED: Final = 100_000
"""How many users that are behind in the tier are counted; the repair does not depend on it."""


class Backlog:
    """Counts the users whose copies this process could not bring up to date.

    Only the metrics need them: the repair finds its work in the log of the authority's changes.

    Args:
        digest: of the authority and the tier.
        clock: source of time.
    """

    def __init__(self, digest: digest_function, clock: Clock) -> None:
        self._digest = digest
        self._monotonic = clock.monotonic
        # Whoever forgets what is old: event loops of several threads; and calls that the collector
        # ends in the midst of others of their thread.
        self._lock = threading.RLock()
        # By digest, and since when.
        self._users: OrderedDict[bytes, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._users)

    def add(self, user_id: str) -> None:
        """Note that the copy of a user may be behind."""
        digest = self._digest(user_id)
        with self._lock:
            self._users.pop(digest, None)
            self._users[digest] = self._monotonic()
            if len(self._users) > MAX_UNREPAIRED:
                self._users.popitem(last=False)

    def discard(self, user_id: str) -> None:
        """Note that the copy of a user is not behind any more."""
        if self._users:
            with self._lock:
                self._users.pop(self._digest(user_id), None)

    def tier_trusted(self) -> None:
        """Note that the tier is trusted: the pass behind it began at most so long ago, anywhere."""
        if self._users:
            self.repaired(self._monotonic() - TRUST_SECONDS)

    def repaired(self, since: float) -> None:
        """Forget what fell behind before ``since``: a pass that began then has repaired it."""
        with self._lock:
            while self._users and next(iter(self._users.values())) < since:
                self._users.popitem(last=False)

    def begin_anew(self) -> None:
        """In a child of ``os.fork``: the lock may be held by a thread that is not here."""
        self._lock = threading.RLock()
