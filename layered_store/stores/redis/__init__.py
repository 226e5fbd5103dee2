"""The backend that keeps states in Redis: see :class:`RedisStore`."""

from __future__ import annotations

from layered_store.stores.redis.scripts import RedisScript
from layered_store.stores.redis.store import RedisStore

__all__ = ["RedisScript", "RedisStore"]
