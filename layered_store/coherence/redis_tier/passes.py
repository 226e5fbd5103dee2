"""The steps of a repair pass, each on all buckets of a store."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from layered_store.coherence.contract import Pass
from layered_store.coherence.together import together

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from layered_store.coherence.contract import Change
    from layered_store.coherence.redis_tier.buckets import Bucket
    from layered_store.coherence.redis_tier.loading import Scripts
    from layered_store.stores.redis.store import RedisStore

__all__ = ["RepairPasses"]

_LOCK_MS: Final = 750
"""How long one process repairs alone: three passes."""

_REPAIR_KEYS: Final = 500
"""How many copies one script repairs: about 1 ms of the server."""

_GENERATION_BYTES: Final = 16


class _Part(NamedTuple):
    """What one bucket told when a pass began.

    Args:
        bucket: which one.
        began: its server's clock, in milliseconds.
        generation: its generation.
        cursor: up to where it was repaired.
        number: of the pass that left the cursor; 0 when the generation is new.
    """

    bucket: Bucket
    began: int
    generation: bytes
    cursor: str
    number: int


@dataclass(slots=True)
class _UnderWay:
    """The pass under way.

    Args:
        owner: who began it.
        began: when, on our own clock.
        parts: what the buckets told.
    """

    owner: str
    began: float
    parts: list[_Part]

    @property
    def next_number(self) -> int:
        """The number of the cursor that is stored next: higher than those of all buckets."""
        return max(part.number for part in self.parts) + 1


class RepairPasses:
    """Repairs the buckets of a store together.

    In a cluster each bucket keeps a repair record of its own: nodes are lost and come back one by
    one. A pass replays from the oldest cursor of all.

    Args:
        store: whose copies are repaired.
        buckets: of the store, by name.
        scripts: the steps.
    """

    def __init__(
        self, store: RedisStore, buckets: Mapping[str, Bucket], scripts: Scripts
    ) -> None:
        self._store = store
        self._buckets = buckets
        self._scripts = scripts
        # Of whichever stack over this store began one last: there is one at a time.
        self._under_way: _UnderWay | None = None

    async def begin(self, me: str, head: str) -> Pass | None:
        """See :meth:`CacheTier.begin`; who holds the first bucket's lock repairs them all."""
        started = self._store.clock.monotonic()

        async def ask(bucket: Bucket) -> _Part | None:
            keys = (bucket.guard, bucket.repair, bucket.lock)
            args = (me, head, _LOCK_MS, _new_generation(), bucket.channel)
            reply = await self._scripts.run(bucket, "BEGIN", keys, *args)
            if not reply:
                return None
            began, generation, cursor, number = reply
            # Another program's need not be text; the authority knows no such cursor either.
            return _Part(bucket, int(began), generation, cursor.decode(errors="replace"), number)

        first, *others = self._buckets.values()
        parts = [await ask(first)]
        if parts[0] is not None:
            parts += await together(map(ask, others))
        told = [part for part in parts if part is not None]
        if len(told) < len(self._buckets):
            return None
        # A new generation begins at the head; of the others the oldest cursor counts, and the
        # number of the pass that left it tells which that is.
        known = [part for part in told if part.number]
        oldest = min(known or told, key=lambda part: part.number)
        self._under_way = _UnderWay(me, started, told)
        generation = b"".join(part.generation for part in told)
        began = min(part.began for part in told) / 1000
        return Pass(began, generation, oldest.cursor, not known, me)

    async def renew(self, generation: bytes, head: str) -> None:
        """See :meth:`CacheTier.renew`."""
        size = _GENERATION_BYTES
        old = [generation[at : at + size] for at in range(0, len(generation), size)]
        number = 1 if self._under_way is None else self._under_way.next_number

        async def renew(bucket: Bucket, before: bytes) -> None:
            keys = (bucket.guard, bucket.repair)
            args = (before, _new_generation(), head, number, bucket.channel)
            await self._scripts.run(bucket, "RENEW", keys, *args)

        await together(map(renew, self._buckets.values(), old))

    async def repair(self, changes: Sequence[Change]) -> Sequence[Change]:
        """See :meth:`CacheTier.repair`."""
        by_bucket: dict[Bucket, list[Change]] = {}
        for change in changes:
            bucket = self._buckets[self._store.bucket_of(change.digest)]
            by_bucket.setdefault(bucket, []).append(change)

        async def repair(bucket: Bucket, group: list[Change]) -> list[Change]:
            args: list[Any] = [bucket.channel]
            for change in group:
                args += [change.version, int(change.erased), change.digest]
            keys = [self._store.key(change.digest) for change in group]
            return [group[at] for at in await self._scripts.run(bucket, "REPAIR", keys, *args)]

        # Scripts of bounded length: a server does nothing else meanwhile.
        groups = [
            (bucket, group[at : at + _REPAIR_KEYS])
            for bucket, group in by_bucket.items()
            for at in range(0, len(group), _REPAIR_KEYS)
        ]
        acted = await together(repair(*group) for group in groups)
        return [change for group in acted for change in group]

    async def stamp(self, begun: Pass, cursor: str, seconds: float) -> bool:
        """See :meth:`CacheTier.stamp`."""
        under_way = self._under_way
        if under_way is None or under_way.owner != begun.owner:
            return False
        number = under_way.next_number
        # On our own clock too, since those of the servers may have been set back meanwhile.
        left = max(0.0, seconds - (self._store.clock.monotonic() - under_way.began))

        async def stamp(part: _Part) -> bool:
            bucket = part.bucket
            keys = (bucket.guard, bucket.repair, bucket.lock)
            # Each on the clock of its own server.
            until = part.began + int(seconds * 1000)
            reply = await self._scripts.run(
                bucket,
                "STAMP",
                keys,
                begun.owner,
                part.generation,
                cursor,
                until,
                number,
                int(left * 1000),
                _LOCK_MS,
                part.number,
            )
            return bool(reply)

        stamped = all(await together(map(stamp, under_way.parts)))
        # Each cursor has a number of its own: a bucket that loses its newest must not look like
        # one that has it.
        under_way.parts = [part._replace(number=number) for part in under_way.parts]
        return stamped


def _new_generation() -> bytes:
    # Not two zeros in front: that is how a record tells that no tier wrote it.
    return b"\x01" + os.urandom(_GENERATION_BYTES)[1:]
