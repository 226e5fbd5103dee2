"""What a cache holds of users, and whether more may be kept.

Entries, the loads under way, the writes under way and the users in doubt belong together: a write
takes away what is cached and what is being loaded, and what a load found is kept only if nothing of
that came in between. All of it changes under one lock, since event loops of several threads may
share a cache. It is one that its thread may take again: a call that was left behind when its event
loop was closed ends when the garbage collector comes upon it, which may be in the midst of another.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import msgspec

from layered_store.coherence.outcomes import Doubts, not_happened
from layered_store.eviction import Node, S3FIFOCache
from layered_store.given_cache import GivenCache

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cachetools import Cache

    from layered_store.coherence.contract import Notice
    from layered_store.flights import Flight
    from layered_store.snapshot import StateSnapshot

__all__ = ["LEFT_OUT", "NEVER", "Entry", "Holdings", "Writers"]

NEVER: Final = -math.inf
"""As ``Entry.expires``: the hot path never answers with it."""

LEFT_OUT: Final = -1
"""In place of a version: of a user whom a batch left out, absent or with an unreadable record."""

_INDEX_ROOM: Final = 64
"""How many more users are found by digest than a given cache holds before it is asked for whom."""


class Entry(Node, gc=False):
    """What is kept of one user.

    Args:
        expires: until when the hot path may answer with it; minus infinity for an absent user.
        deadline: until when it answers at all.
        version: of the write that left it; 0 when it was read, ``LEFT_OUT`` when a batch was.
        digest: the user's, under an invalidation channel.
    """

    expires: float = 0.0
    deadline: float = 0.0
    version: int = 0
    digest: bytes | None = None


class Writers(msgspec.Struct, eq=False):
    """The writes of one user that are under way.

    Args:
        count: how many.
        overlapped: whether two of them ever ran at the same time.
        noticed: the highest version that the channel told of meanwhile.
        before: what was kept when the first began, unless a load ended meanwhile.
    """

    count: int = 0
    overlapped: bool = False
    noticed: int = 0
    before: Entry | None = None


class Holdings:
    """Entries, loads and writes of one cache.

    Args:
        store: where the entries are: an S3-FIFO cache of its own, or the one that was ``given``.
        given: whether ``store`` is the caller's.
        lifetime: of an entry, in seconds.
        negative_lifetime: of an absent user's; 0 keeps none.
        stale: seconds for which an expired entry stays.
        refresh_ahead: share of the lifetime in which the hot path answers; None is all of it.
        jitter: makes a lifetime shorter by chance; None leaves it.
        monotonic: the clock.

    Attributes:
        entries: by user id.
        flights: the current load of each user.
        writing: who is being written.
        quarantine: until when nothing may be kept of a user; looked at when a load or a write
            begins, so whoever stands here when one ends began before that.
        by_digest: whom a notice of the channel is about.
        key_of: the digest of a user, once there is a channel.
        removals: how many entries went, by metric and reason.
    """

    def __init__(
        self,
        store: Cache[Any, Any],
        *,
        given: bool,
        lifetime: float,
        negative_lifetime: float,
        stale: float,
        refresh_ahead: float | None,
        jitter: Callable[[float], float] | None,
        monotonic: Callable[[], float],
    ) -> None:
        self.lock = threading.RLock()
        self.s3 = store if isinstance(store, S3FIFOCache) else None
        self.store: Any = store if self.s3 is not None else GivenCache(store)
        self.entries: Mapping[str, Entry]
        self.entries = self.s3.nodes if self.s3 is not None else self.store  # type: ignore[assignment]
        self.flights: dict[str, Flight] = {}
        self.writing: dict[str, Writers] = {}
        # Ordered: a plain dict takes ever longer to find its first key after many deletions.
        self.quarantine = Doubts()
        self.by_digest: dict[bytes, str] = {}
        self.key_of: Callable[[str], bytes] | None = None
        self.removals: Counter[tuple[str, str]] = Counter()
        self._given = given
        self._lifetime = lifetime
        self._negative_lifetime = negative_lifetime
        self._stale = stale
        self._refresh_ahead = refresh_ahead
        self._jitter = jitter
        self._monotonic = monotonic
        self._index_room = _INDEX_ROOM
        # Our own is changed under our own lock only.
        self._put: Callable[[Entry], None] = (
            self._put_elsewhere if self.s3 is None else self.s3.put if given else self.s3.insert
        )

    def follow(self, key_of: Callable[[str], bytes]) -> None:
        """Keep everybody found by digest from here on."""
        self.key_of = key_of
        if not self._given and self.s3 is not None:
            self.s3.on_evict = self._on_evict

    # Loads

    def take_off(self, user_id: str, flight: Flight) -> None:
        """Make a load the current one of its user."""
        with self.lock:
            if self.quarantine:
                self._end_quarantines()
            self.flights[user_id] = flight
            if self.key_of is not None:
                flight.digest = self.key_of(user_id)
                self.by_digest[flight.digest] = user_id

    def landed(
        self, user_id: str, flight: Flight, value: StateSnapshot | None, version: int = 0
    ) -> None:
        """Keep what a load found, unless a write, an erasure or a notice came in between."""
        with self.lock:
            current = self.flights.pop(user_id, None)
            if current is flight:
                self.keep(user_id, value, version, flight.digest)
            else:
                self.overtaken(user_id, current, value)

    def overtaken(
        self, user_id: str, current: Flight | None, value: StateSnapshot | None
    ) -> None:
        """Take out what another load left here, if this one found something else. Under the lock.

        It may be newer, and read before the channel told of it; whoever sees it must not see the
        older one afterwards.
        """
        self.saw(user_id)
        if current is not None:
            if self.doubtful(user_id):
                # It may have read before what this one saw took effect: nobody may join it now.
                self._unindex(user_id)
                return
            self.flights[user_id] = current
        if self.key_of is None:
            return
        entry = self.entries.get(user_id)
        if entry is not None and entry.value != value:
            self.remove(user_id)
            self._unindex(user_id)

    def leave(self, user_id: str, flight: Flight) -> bool:
        """End a load that keeps nothing; tell whether it was still current."""
        with self.lock:
            if self.flights.get(user_id) is not flight:
                return False
            del self.flights[user_id]
            self._unindex(user_id)
            return True

    # Writes

    def write_begins(self, user_id: str) -> None:
        """Take away what is cached or being loaded: from here on it may be old."""
        with self.lock:
            before = None if user_id in self.flights else self.look(user_id)
            self.detach(user_id)
            writers = self.writing.get(user_id)
            if writers is None:
                writers = self.writing[user_id] = Writers(before=before)
                if self.key_of is not None:
                    self.by_digest[self.key_of(user_id)] = user_id
            else:
                writers.overlapped = True
            writers.count += 1
            if self.quarantine:
                self._end_quarantines()
                # An earlier write may take effect after this one, and before this one ends.
                writers.overlapped |= user_id in self.quarantine

    def write_ends(
        self, user_id: str, snapshot: StateSnapshot | None, version: int, *, kept: bool = True
    ) -> None:
        """Keep what was written, if this write alone knows what the store holds now."""
        with self.lock:
            self.detach(user_id)
            writers = self._end(user_id)
            known = kept and not writers.overlapped and writers.noticed <= version
            if known and (version or self.key_of is None):
                self.keep(user_id, snapshot, version)
            # Only now: whoever has a notice looks here first, without the lock.
            self._unindex(user_id)

    def write_failed(self, user_id: str, exc: BaseException, *, erasing: bool = False) -> None:
        """Keep what was there if nothing happened; for a while nothing, if something still may."""
        with self.lock:
            happened = not not_happened(exc)
            known = not happened and not erasing and user_id not in self.flights
            self.detach(user_id)
            writers = self._end(user_id)
            if known and not writers.overlapped:
                self._put_back(writers)
            self._unindex(user_id)
            if not happened:
                return
            self.quarantine.add((user_id,), self._monotonic())
            self._end_quarantines()

    def _put_back(self, writers: Writers) -> None:
        old = writers.before
        if old is None or writers.noticed > old.version or not self._lifetime:
            return
        # A new one: in its queue the old one stands as taken out.
        self._put(
            Entry(old.key, old.value, 0, 0, old.expires, old.deadline, old.version, old.digest)
        )

    def _end(self, user_id: str) -> Writers:
        writers = self.writing[user_id]
        writers.count -= 1
        if not writers.count:
            del self.writing[user_id]
        return writers

    def detach(self, user_id: str, reason: str = "write") -> None:
        """Take away a user's entry and load. Under the lock."""
        self.flights.pop(user_id, None)
        if self.remove(user_id):
            self.removals["invalidations", reason] += 1

    def doubtful(self, user_id: str) -> bool:
        """Tell whether a user is being written, or was and nobody knows with what outcome."""
        return user_id in self.writing or user_id in self.quarantine

    def saw(self, user_id: str) -> None:
        """Note that a load told somebody what it found, perhaps while the user is written.

        What was kept before the write may be older than that.
        """
        if (writers := self.writing.get(user_id)) is not None:
            writers.before = None

    # The invalidation channel

    def invalidate(self, notice: Notice) -> None:
        """Take away what is older than another process's write."""
        user_id = self.by_digest.get(notice.digest)
        if user_id is None:
            return
        with self.lock:
            if (writers := self.writing.get(user_id)) is not None:
                writers.noticed = max(writers.noticed, notice.version)
            entry = self.entries.get(user_id)
            if entry is not None and entry.version >= notice.version:
                return
            self.detach(user_id, "channel")
            self._unindex(user_id)

    def distrust(self) -> None:
        """Take away everything: notices may have been missed."""
        with self.lock:
            self.removals["invalidations", "distrust"] += len(self.entries)
            self.flights.clear()
            self.store.clear()
            for writers in self.writing.values():
                writers.overlapped = True
            self.by_digest = {
                digest: user_id
                for digest, user_id in self.by_digest.items()
                if user_id in self.writing
            }

    # Entries; all of this under the lock

    def keep(
        self,
        user_id: str,
        value: StateSnapshot | None,
        version: int = 0,
        digest: bytes | None = None,
    ) -> None:
        """Store what a load or a lone write found, unless something makes it doubtful."""
        lifetime = self._lifetime if value is not None else self._negative_lifetime
        if not lifetime or self.writing or self.quarantine:
            # Before quarantines end: what comes now was read or written under them.
            doubtful = self.doubtful(user_id)
            self._end_quarantines()
            if not lifetime or doubtful:
                self.saw(user_id)
                self.remove(user_id)
                self._unindex(user_id, digest)
                return
        if self._jitter is not None:
            lifetime = self._jitter(lifetime)
        now = self._monotonic()
        expires = deadline = now + lifetime
        if value is None:
            expires = NEVER
        elif self._refresh_ahead is not None:
            expires = now + lifetime * self._refresh_ahead
        if self.key_of is not None:
            if digest is None:
                digest = self.key_of(user_id)
            if self._given and len(self.by_digest) >= self._index_room:
                self._tidy_index(user_id)
            self.by_digest[digest] = user_id
        entry = Entry(user_id, value, 0, 0, expires, deadline, version, digest)
        if self.s3 is not None and self.s3.first_deadline() + self._stale <= now:
            self._sweep(self.s3, now, user_id)
        self._put(entry)

    def _put_elsewhere(self, entry: Entry) -> None:
        self.store.put(entry.key, entry)

    def remove(self, user_id: str) -> bool:
        """Take away a user's entry; tell whether there was one."""
        if self.s3 is not None:
            return self.s3.remove(user_id) is not None
        return self.store.pop(user_id) is not None

    def look(self, user_id: str) -> Entry | None:
        """Return a user's entry; it does not count as used."""
        return self.s3.nodes.get(user_id) if self.s3 is not None else self.store.look(user_id)  # type: ignore[return-value]

    def close(self) -> None:
        """Drop everything, and keep nothing of what still lands."""
        self._lifetime = self._negative_lifetime = 0.0
        with self.lock:
            self.store.clear()
            self.by_digest.clear()

    def _sweep(self, s3: S3FIFOCache, now: float, coming: str) -> None:
        """Take out what expired at the heads of the queues; notices still find who is coming."""
        for old in list(s3.oldest()):
            if old.deadline + self._stale <= now:  # type: ignore[attr-defined]
                s3.remove(old.key)
                self.removals["cache_evictions", "expired"] += 1
                if old.key != coming:
                    self._unindex(old.key, old.digest)  # type: ignore[attr-defined]

    def _end_quarantines(self) -> None:
        """Forget the users whose time is over.

        A load that began before is taken out: it may have read what was there before.
        """
        for user_id in self.quarantine.end(self._monotonic()):
            self.flights.pop(user_id, None)
            self._unindex(user_id)

    def _on_evict(self, node: Node) -> None:
        self._unindex(node.key, node.digest)  # type: ignore[attr-defined]

    def _unindex(self, user_id: str, digest: bytes | None = None) -> None:
        """Forget the digest of a user of whom nothing is held, loaded or written."""
        if (
            self.key_of is not None
            and user_id not in self.entries
            and user_id not in self.flights
            and user_id not in self.writing
        ):
            self.by_digest.pop(digest or self.key_of(user_id), None)

    def _tidy_index(self, coming: str) -> None:
        """Forget the digests of users whom a given cache gave up: it does not say whom."""
        for digest, user_id in list(self.by_digest.items()):
            if user_id != coming:
                self._unindex(user_id, digest)
        self._index_room = 2 * len(self.by_digest) + _INDEX_ROOM
