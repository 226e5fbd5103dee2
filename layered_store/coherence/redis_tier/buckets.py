"""What the protocol keeps in Redis beside the users' records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from layered_store.stores.redis.store import RedisStore

__all__ = ["Bucket", "buckets_of"]


@dataclass(eq=False, frozen=True, slots=True)
class Bucket:
    """The keys and the channel of one bucket: in a cluster, all in its slot.

    Args:
        name: of the bucket, as the store knows it.
        guard: its generation and server run, while it is trusted.
        register: who holds a lease.
        repair: up to where it was repaired.
        lock: who repairs it.
        channel: where its changes are told.
    """

    name: str
    guard: bytes
    register: bytes
    repair: bytes
    lock: bytes
    channel: bytes


def buckets_of(store: RedisStore) -> dict[str, Bucket]:
    """Return the buckets of a store by name, in its order."""
    return {
        name: Bucket(
            name,
            guard=store.bucket_key(name, "guard"),
            register=store.bucket_key(name, "leases"),
            repair=store.bucket_key(name, "repair"),
            lock=store.bucket_key(name, "repairer"),
            channel=store.bucket_key(name, "channel"),
        )
        for name in store.buckets
    }
