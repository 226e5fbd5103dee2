"""A ``cachetools`` cache that several threads use: one that ``Cached`` was given."""

from __future__ import annotations

import threading
from typing import Any

from cachetools import Cache

__all__ = ["GivenCache"]


class GivenCache:
    """Lets one thread at a time into a ``cachetools`` cache.

    Those have no locks, and change themselves also when they are only looked at: to find a key is
    to note its use, and ``len`` takes out what expired. Metrics are scraped in another thread than
    the event loop's.

    Args:
        cache: the one that was given.
    """

    __slots__ = ("_cache", "_lock")

    def __init__(self, cache: Cache[Any, Any]) -> None:
        self._cache = cache
        # As that of ``Holdings``.
        self._lock = threading.RLock()

    def get(self, key: str) -> Any:
        with self._lock:
            return self._cache.get(key)

    def look(self, key: str) -> Any:
        """Return what is held, or None; it does not count as used."""
        with self._lock:
            # The base's method: those of the cache's own class would note the use.
            return Cache.__getitem__(self._cache, key) if key in self._cache else None

    def put(self, key: str, value: object) -> None:
        """Keep a value; what is larger than the cache takes is left out, and the old one too."""
        with self._lock:
            try:
                self._cache[key] = value
            except ValueError:
                self._cache.pop(key, None)

    def pop(self, key: str) -> Any:
        with self._lock:
            return self._cache.pop(key, None)

    def clear(self) -> None:
        with self._lock:
            self._cache.clear()

    def __contains__(self, key: object) -> bool:
        with self._lock:
            return key in self._cache

    def __len__(self) -> int:
        with self._lock:
            return len(self._cache)
