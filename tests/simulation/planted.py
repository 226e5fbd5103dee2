"""Faults planted in the shipped code, each a step of the protocol left out or done wrong.

A simulation that finds none of them proves nothing.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from layered_store.coherence.guarded.erasing import GuardedErasures
from layered_store.coherence.guarded.leases import Leases
from layered_store.coherence.guarded.reading import GuardedReads
from layered_store.coherence.guarded.repair import Repair
from layered_store.coherence.guarded.seen import Seen
from layered_store.coherence.guarded.writing import GuardedWrites
from layered_store.coherence.local import LocalCopies
from layered_store.coherence.redis_tier import RedisTier, scripts
from layered_store.coherence.redis_tier.connection import Connection
from layered_store.flights import AGAIN, Flight
from layered_store.holdings import Holdings
from layered_store.layers.cached import Cached
from layered_store.stores.erasures import KnownErasures
from layered_store.stores.memory import MemoryStore
from tests.simulation import plan
from tests.simulation.shapes import CLOCK

__all__ = [
    "FAULTS",
    "LATE_BURIALS",
    "LATE_STAMPS",
    "NO_REPAIRS",
    "SILENT_WRITERS",
    "SLOW_FILLS",
    "VERSIONED_FILLS",
    "Fault",
]


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        name: short.
        shape: the stack in which it shows.
        rules: the rules of which it may break one.
        plant: enters the patches into an exit stack.
        first: a seed that shows it; None: no test runs it, since others cover it as well.
    """

    name: str
    shape: str
    rules: tuple[str, ...]
    plant: Callable[[contextlib.ExitStack], None]
    first: int | None = None

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        """Break the code inside the block."""
        with contextlib.ExitStack() as stack:
            self.plant(stack)
            yield


def _method(owner: Any, name: str, new: Any) -> Callable[[contextlib.ExitStack], None]:
    return lambda stack: stack.enter_context(patch.object(owner, name, new))


def _script(name: str, *edits: tuple[str, str]) -> Callable[[contextlib.ExitStack], None]:
    def plant(stack: contextlib.ExitStack) -> None:
        # What is there now may have been changed by the weather.
        source = scripts.SCRIPTS[name]
        for before, after in edits:
            assert before in source, (name, before)
            source = source.replace(before, after)
        stack.enter_context(patch.dict(scripts.SCRIPTS, {name: source}))

    return plant


def _both(
    *plants: Callable[[contextlib.ExitStack], None],
) -> Callable[[contextlib.ExitStack], None]:
    def plant(stack: contextlib.ExitStack) -> None:
        for each in plants:
            each(stack)

    return plant


async def _nothing(*_: Any, **__: Any) -> None:
    return None


def _always_leased(self: Cached, until: float) -> None:
    self._trust.lease(math.inf)


async def _keep_first(self: Cached, snapshot: Any) -> None:
    self._held.detach(snapshot.user_id)
    self._held.keep(snapshot.user_id, snapshot)
    await self.inner.upsert_latest(snapshot)


_land = Flight.land


def _cancel_followers(self: Cached, user_id: str, flight: Any) -> None:
    for future in flight.waiters or ():
        future.cancel()
    _land(flight, AGAIN)
    self._held.leave(user_id, flight)


_fill = RedisTier.fill


async def _fill_late(self: RedisTier, user_id: str, record: Any, ticket: Any) -> None:
    await CLOCK.sleep(0.7)
    await _fill(self, user_id, record, ticket)


_OLDER = """
if r and r ~= ARGV[1] and string.sub(r, 4, 4) ~= 'T'
  and version(r) >= version(ARGV[3]) then return 0 end
"""
_BURY_ALWAYS = """
elseif g then
  redis.call('SET', KEYS[1], ARGV[2] .. string.sub(g, 1, 16) .. ARGV[3], 'PX', ARGV[4])
elseif r then"""

SLOW_FILLS = _method(RedisTier, "fill", _fill_late)
"""Not a fault: readers that take their time between the database and the copy."""

_repair = Repair._pass


async def _repair_late(self: Repair) -> None:
    if self.watch.repaired and CLOCK.monotonic() < 5.0:
        await CLOCK.sleep(6.0)
    await _repair(self)


async def _put_nowhere(self: GuardedWrites, user_id: str, record: Any, ticket: Any) -> None:
    self.backlog.add(user_id)


NO_REPAIRS = _both(
    _method(Repair, "_pass", _repair_late), _method(GuardedWrites, "_put", _put_nowhere)
)
"""Not a fault: writers whose copies never arrive, and repairs that come after seconds only."""



def _plan(**weights: float) -> Callable[[contextlib.ExitStack], None]:
    """Have some things go wrong more often, or never."""
    kinds = {name.replace("_", " "): weight for name, weight in weights.items()}
    changed = {name: (weight, plan._KINDS[name][1]) for name, weight in kinds.items()}
    return lambda stack: stack.enter_context(patch.dict(plan._KINDS, changed))


VERSIONED_FILLS = _both(
    SLOW_FILLS,
    _script("FILL", ("if r ~= ARGV[1] then return 0 end", _OLDER)),
    _script("BURY", ("elseif r then", _BURY_ALWAYS)),
    _plan(redis_evicts=0, redis_flushes=0, redis_crashes=0),
)
"""Fills that only look at versions, as most caches have them, and tombstones that are always left:
no erased user is shown, as long as nothing is evicted. It shows what a tombstone is good for. The
shipped fills need their token, which a DEL takes away as well as a tombstone does."""

SILENT_WRITERS = _both(
    _method(GuardedWrites, "_put", _put_nowhere), _plan(redis_flushes=30, redis_crashes=0)
)
"""Not a fault: writers whose copies never arrive, a server that is emptied under its channel."""

_stamp = RedisTier.stamp


async def _stamp_late(self: RedisTier, begun: Any, cursor: str, seconds: float) -> bool:
    if CLOCK.monotonic() < 5.0 and int(CLOCK.monotonic() * 1e4) % 3 == 0:
        await CLOCK.sleep(3.0)
    return await _stamp(self, begun, cursor, seconds)


LATE_STAMPS = _both(
    _method(RedisTier, "stamp", _stamp_late), _method(GuardedWrites, "_put", _put_nowhere)
)
"""Not a fault: repairers that stop between what they looked at and what they vouch for."""

_bury = RedisTier.bury


async def _bury_late(self: RedisTier, user_id: str, version: int, me: str) -> Any:
    await CLOCK.sleep(0.7)
    return await _bury(self, user_id, version, me)


LATE_BURIALS = _both(
    _method(RedisTier, "bury", _bury_late), _method(GuardedWrites, "_put", _put_nowhere)
)
"""Not a fault: erasures that reach the tier when their users were written again."""

_begin = RedisTier.begin


async def _begin_now(self: RedisTier, me: str, head: str) -> Any:
    begun = await _begin(self, me, head)
    return None if begun is None else begun._replace(cursor=head)


def _distrust_leases_only(self: Leases) -> None:
    for cache in self.caches:
        cache.lease(float("-inf"))


_write = MemoryStore._write


def _write_again(self: MemoryStore, snapshot: Any, order: int, write_id: bytes) -> Any:
    row = self._users.get(snapshot.user_id)
    if row is not None:
        row.write_ids.clear()
    return _write(self, snapshot, order, write_id)


_erase = MemoryStore.erase


async def _erase_again(self: MemoryStore, user_id: str, tiers: Any = ()) -> int:
    row = self._users.get(user_id)
    if row is not None:
        row.erase_ids.clear()
    return await _erase(self, user_id, tiers)


_keep = Holdings.keep


def _keep_for_ever(self: Holdings, user_id: str, value: Any, *rest: Any) -> None:
    if value is not None:
        self.__dict__.setdefault("graves", {})[user_id] = value
    _keep(self, user_id, value, *rest)


async def _from_the_grave(self: Cached, user_id: str, exc: Exception) -> Any:
    return self._held.__dict__.get("graves", {}).get(user_id)


_remove = Holdings.remove


def _remove_but_absent(self: Holdings, user_id: str) -> bool:
    entry = self.entries.get(user_id)
    return False if entry is not None and entry.value is None else _remove(self, user_id)


def _leave_flights(self: Holdings, user_id: str, reason: str = "write") -> None:
    if self.remove(user_id):
        self.removals["invalidations", reason] += 1


_fail_write = Holdings.write_failed


def _no_quarantine(self: Holdings, user_id: str, exc: BaseException) -> None:
    _fail_write(self, user_id, exc)
    self.quarantine.clear()


_doubt = LocalCopies.doubt


def _no_doubt(self: LocalCopies, user_id: str, *, quarantine: bool = False) -> None:
    _doubt(self, user_id)
    self._doubtful[user_id] = 0.0


_server_run = Connection.server_run


async def _same_server(self: Connection) -> Any:
    return (await _server_run(self))._replace(run_id="0" * 40)


async def _fill_anything(self: GuardedReads, user_id: str, record: Any, ticket: Any) -> None:
    with contextlib.suppress(Exception):
        if record.version:
            await self.tier.fill(user_id, record, ticket)


_believes = Seen.believes


def _believe_any(self: Seen, user_id: str, version: int) -> bool:
    return _believes(self, user_id, max(version, self._floors.get(user_id, (0, 0.0))[0]))


_STAMP_LEFT = "math.min(tonumber(ARGV[4]) - now(), tonumber(ARGV[6]))"

FAULTS = {
    fault.name: fault
    for fault in (
        Fault(
            "no floor",
            "without_l1",
            ("own writes", "monotonic"),
            _both(
                _method(Seen, "floor", lambda self, user_id: 0),
                _method(Seen, "believes", _believe_any),
            ),
            first=49,
        ),
        Fault(
            "no token",
            "without_l1",
            ("stale", "erased", "monotonic", "own writes", "converged"),
            # Other nets hold unless the fill is late; being late is no fault in itself.
            _both(SLOW_FILLS, _script("FILL", ("if r ~= ARGV[1] then return 0 end", ""))),
            first=12,
        ),
        Fault(
            "no version guard",
            "without_l1",
            ("stale", "erased", "converged", "monotonic", "own writes"),
            _script("PUT", ("if version(r) < tonumber(ARGV[1]) or", "if true or")),
            first=1551,
        ),
        Fault(
            "DEL instead of tombstone",
            "without_l1",
            ("erased",),
            _both(
                VERSIONED_FILLS,
                _script(
                    "BURY",
                    ("local copy =", "redis.call('DEL', KEYS[1]) r = nil g = nil local copy ="),
                ),
            ),
            first=11,
        ),
        Fault(
            "late burial in empty ground",
            "without_l1",
            ("stale", "converged"),
            _both(LATE_BURIALS, _script("BURY", ("elseif r then", _BURY_ALWAYS))),
            first=5,
        ),
        Fault(
            "late writes pass erasures",
            "without_l1",
            ("late",),
            _method(KnownErasures, "before", lambda *_: False),
            first=1,
        ),
        Fault(
            "no stamp",
            "without_l1",
            ("stale", "erased"),
            # While repairs come, they hide that nothing ends the trust.
            _both(
                NO_REPAIRS,
                _script("STAMP", ("'PX', text(left))", "'PX', 3600000)")),
                _method(scripts, "source", functools.partial(scripts.source, longest=1e6)),
            ),
            first=99,
        ),
        Fault(
            "no lease",
            "three_tiers",
            ("stale", "erased"),
            _method(Cached, "lease", _always_leased),
            first=51,
        ),
        Fault(
            "no erasure wait",
            "three_tiers",
            ("erased",),
            _method(GuardedErasures, "_wait_for_leases", _nothing),
            first=4,
        ),
        Fault(
            "L1 set before the record",
            "memory",
            ("register",),
            _method(Cached, "upsert_latest", _keep_first),
            first=45,
        ),
        Fault(
            "follower cancelled with leader",
            "memory",
            ("cancelled",),
            _method(Cached, "_abandoned", _cancel_followers),
            first=1,
        ),
        Fault(
            "repair silent",
            "three_tiers",
            ("stale",),
            _script("REPAIR", ("tell(ARGV[1], v, erased, digest)", "")),
            first=26,
        ),
        Fault(
            "repair anchored at now",
            "without_l1",
            ("stale", "erased", "converged"),
            _method(RedisTier, "begin", _begin_now),
            first=5,
        ),
        Fault(
            "L1 kept after channel loss",
            "three_tiers",
            ("stale", "erased", "monotonic"),
            _method(Leases, "distrust", _distrust_leases_only),
            first=10,
        ),
        Fault(
            "double history append",
            "resilient",
            ("doubled", "history"),
            _method(MemoryStore, "_write", _write_again),
            first=5,
        ),
        Fault(
            "stale served after erasure",
            "options",
            ("erased", "own writes", "monotonic"),
            _both(
                _method(Holdings, "keep", _keep_for_ever), _method(Cached, "_old", _from_the_grave)
            ),
            first=12,
        ),
        Fault(
            "negative mark survives an upsert",
            "memory",
            ("register",),
            _method(Holdings, "remove", _remove_but_absent),
            first=18,
        ),
        Fault(
            "loads outlive writes",
            "memory",
            ("register", "one load"),
            _method(Holdings, "detach", _leave_flights),
            first=250,
        ),
        Fault(
            "no quarantine",
            "memory",
            ("register",),
            _method(Holdings, "write_failed", _no_quarantine),
        ),
        Fault(
            "no quarantine in the tier",
            "unversioned",
            ("register",),
            _method(LocalCopies, "doubt", _no_doubt),
            first=150,
        ),
        Fault(
            "new generation silent",
            "three_tiers",
            ("stale", "erased", "monotonic"),
            _both(SILENT_WRITERS, _script("BEGIN", ("tell(ARGV[5], '0', '0', '')", ""))),
            first=19,
        ),
        Fault(
            "loads joined without a lease",
            "three_tiers",
            ("stale", "erased", "monotonic"),
            _method(Cached, "_joinable", lambda self, flight: True),
        ),
        Fault(
            "repeated erasure erases again",
            "nested",
            ("register",),
            _method(MemoryStore, "erase", _erase_again),
            first=181,
        ),
        Fault(
            "a paused repairer vouches for the past",
            "without_l1",
            ("stale", "erased"),
            _both(
                LATE_STAMPS,
                _script(
                    "STAMP",
                    ("if holder and holder ~= ARGV[1] then return 0 end", ""),
                    ("or (known[2] or '0') ~= ARGV[8]", ""),
                    (_STAMP_LEFT, "2000"),
                ),
            ),
        ),
        Fault(
            "a restored server is believed",
            "without_l1",
            ("stale", "erased", "monotonic", "converged"),
            _method(Connection, "server_run", _same_server),
        ),
        Fault(
            "erasures are filled and not told",
            "three_tiers",
            ("stale", "erased"),
            _method(GuardedReads, "_fill", _fill_anything),
        ),
        Fault(
            "debts are never paid",
            "without_l1",
            ("debts",),
            _method(MemoryStore, "settle", _nothing),
            first=0,
        ),
    )
}
"""By name."""
