"""Listing the users of one Redis server, page by page."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from layered_store.codec import CodecError, SnapshotCodec
from layered_store.enumerable import UserPage
from layered_store.stores.redis.record import FILLED, STATE, unpack

if TYPE_CHECKING:
    from layered_store.stores.redis.store import RedisStore

__all__ = ["list_users"]


async def list_users(store: RedisStore, head: bytes, cursor: str, limit: int) -> UserPage:
    """Return the users found by one step of SCAN; a page may be empty or name a user again.

    Args:
        store: where they are.
        head: what the keys of all records begin with.
        cursor: Redis's own, which stays good as long as the server runs; empty begins.
        limit: about how many keys to look at.
    """
    # What stands for itself in a key may be a wildcard in a pattern.
    pattern = re.sub(rb"([*?\[\]\\^-])", rb"\\\1", head) + b"*"
    reply = await store.command(
        "SCAN", cursor or "0", "MATCH", pattern, "COUNT", limit, operation="users", write=False
    )
    after, keys = bytes(reply[0]).decode(), reply[1]
    values = await store.command("MGET", *keys, operation="users", write=False) if keys else ()
    codec = SnapshotCodec(store.snapshot_type)
    users = []
    for key, value in zip(keys, values, strict=True):
        record = None if value is None else unpack(value)
        if record is None or record.kind not in (STATE, FILLED):
            continue
        try:
            user_id = codec.decode(record.body).user_id
        except CodecError:
            continue  # counted when it is read
        if store.key(store.digest(user_id)) == bytes(key):
            users.append(user_id)
    return UserPage(users, None if after == "0" else after)
