"""What a process keeps of a write whose reply came late."""

from __future__ import annotations

from typing import Any

from layered_store.call import call_begins
from layered_store.coherence.contract import CacheTier, Versioned
from layered_store.coherence.guarded import GuardedCopies
from layered_store.errors import UnavailableError
from layered_store.snapshot import StateSnapshot
from layered_store.stores.memory import MemoryStore
from layered_store.testing.clock import FakeClock


class Overtaken(MemoryStore):
    """Another process writes, and this one reads that, before the reply to a write comes."""

    guard: GuardedCopies

    async def write(self, snapshot: StateSnapshot) -> Versioned:
        record = await super().write(snapshot)
        if snapshot.updated_at_unix_ms == 1:
            await super().write(StateSnapshot("u-1", 2))
            found = await self.guard.get_latest("u-1")
            assert found is not None and found.updated_at_unix_ms == 2
        return record


class Away(CacheTier):
    """A tier that cannot be reached."""

    digest = MemoryStore.digest
    tier_name = "away"
    has_channel = False


async def _unreachable(*_: Any, **__: Any) -> Any:
    raise UnavailableError("away")


for _name in CacheTier.__abstractmethods__ - {"digest", "tier_name", "has_channel"}:
    setattr(Away, _name, _unreachable)
Away.__abstractmethods__ = frozenset()


async def test_a_write_that_was_overtaken_is_not_known_as_the_latest() -> None:
    """So that no cache above keeps it: this process has shown a later state already."""
    clock = FakeClock()
    authority = Overtaken(clock=clock)
    guard = authority.guard = GuardedCopies(Away(), authority, clock)
    with call_begins(clock) as call:
        await guard.upsert_latest(StateSnapshot("u-1", 1))
    assert call.version == 0
    with call_begins(clock) as call:
        await guard.upsert_latest(StateSnapshot("u-1", 3))
    assert call.version == 3
    await guard.aclose()
