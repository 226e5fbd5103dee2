"""A database over the network: the shipped memory store, with a log of what it committed."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import itertools
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from layered_store.call import _current, current_call, next_order
from layered_store.coherence import Authority, Change, Changes, Versioned, tombstones
from layered_store.errors import StoreTimeoutError, UnavailableError
from layered_store.identity import digest_function
from layered_store.interface import StateStore
from layered_store.snapshot import StateSnapshot
from layered_store.stores import erasures
from layered_store.stores.erasures import KnownErasures
from layered_store.stores.memory import MemoryStore
from layered_store.testing.explore import LoopClock
from tests.simulation.clocks import WallClock
from tests.simulation.loop import Process
from tests.simulation.network import CutError, Network, Server

__all__ = ["CALL", "Commit", "Database", "PlainStore", "SqlStore"]

CALL: contextvars.ContextVar[int] = contextvars.ContextVar("call", default=0)
"""The call of the history that is under way."""

CLOCK = LoopClock()


class Commit(NamedTuple):
    """One thing that was committed.

    Args:
        order: its place among all events of the run.
        time: when.
        version: the version it has.
        value: which write it was; None for an erasure.
        call: the call that did it, by its place among all events.
    """

    order: int
    time: float
    version: int
    value: int | None
    call: int


@dataclass
class Database(Server):
    """What all processes reach under one address.

    Args:
        orders: numbers the events of the run.
        chance: decides how wrong its clock is.
    """

    orders: itertools.count[int]
    chance: random.Random

    def __post_init__(self) -> None:
        super().__init__("sql")
        self.clock = WallClock(self.chance)
        self.store = MemoryStore(clock=CLOCK, history_limit=None)
        # By user: the tombstone's version, and when it was made on this server's clock.
        self.erased: dict[str, tuple[int, int]] = {}
        self.commits: dict[str, list[Commit]] = {}
        self.seen: dict[str, int] = {}

    def do(
        self,
        context: contextvars.Context,
        method: str,
        *args: Any,
        decide: Callable[[], list[StateSnapshot]] | None = None,
    ) -> Any:
        """Run a method of the store, which never waits, and note what it committed.

        Args:
            context: of whoever sent it.
            method: of the store.
            args: its arguments.
            decide: tells which of the snapshots to write did not begin before an erasure, in place
                of the store, which knows the true order.
        """
        if decide is not None:
            return self._write(context, args[0], decide())
        result = context.run(_at_once, getattr(self.store, method)(*args))
        if method == "erase":
            user, version = args[0], result
            if self.erased.get(user, (0, 0))[0] != version:
                self.erased[user] = (version, self.now_us())
        if method in ("write", "write_many", "erase"):
            subject = args[0]
            if method == "write":
                users = [subject.user_id]
            elif method == "erase":
                users = [subject]
            else:
                users = list(dict.fromkeys(each.user_id for each in subject))
            for user in users:
                self._note(user, context.get(CALL, 0))
        return result

    def _write(
        self,
        context: contextvars.Context,
        snapshots: list[StateSnapshot],
        kept: list[StateSnapshot],
    ) -> Mapping[str, Versioned]:
        call = context.run(current_call, CLOCK)
        call.order = sys.maxsize  # decided already
        context.run(_current.set, call)
        wanted = {snapshot.user_id: snapshot for snapshot in snapshots}
        store = self.store
        results: dict[str, Versioned] = {}
        for index, snapshot in enumerate(snapshots):
            user = snapshot.user_id
            if snapshot in kept:
                write_id = call.id_of(snapshot) if len(snapshots) == 1 else call.part(index)
                results[user] = store._write(snapshot, call.order, write_id)
            else:
                row = store._users[user]
                results[user] = Versioned(row.version, row.snapshot)
        if any(results[user].snapshot is not snapshot for user, snapshot in wanted.items()):
            call.superseded = True
        for user in wanted:
            self._note(user, context.get(CALL, 0))
        return results

    def now_us(self) -> int:
        """Return what this server takes for the time."""
        return int(self.clock.time() * 1e6)

    def _note(self, user: str, call: int) -> None:
        row = self.store._users.get(user)
        before = self.seen.get(user, 0)
        if row is None or row.version == before:
            return
        self.seen[user] = row.version
        log = self.commits.setdefault(user, [])
        now = CLOCK.monotonic()
        if row.snapshot is None:
            log.append(Commit(next(self.orders), now, row.version, None, call))
            return
        # A batch may hold several states of one user: each is a version of its own. The first after
        # a forgotten tombstone skips some.
        new = row.version - before
        for state in reversed(list(itertools.islice(row.history, new))):
            value = state.updated_at_unix_ms
            log.append(Commit(next(self.orders), now, row.version, value, call))


def _at_once(work: Any) -> Any:
    try:
        work.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("the memory store waited")


class _Client(StateStore):
    def __init__(
        self, database: Database, network: Network, process: Process, limit: float = 1.0
    ) -> None:
        self._database = database
        self._network = network
        self._process = process
        self._limit = limit
        self.loads: dict[str, int] = {}

    @property
    def name(self) -> str:
        return "SqlModel"

    async def _do(
        self,
        method: str,
        *args: Any,
        writes: bool = False,
        decide: Callable[[], list[StateSnapshot]] | None = None,
        times: list[int] | None = None,
    ) -> Any:
        context = contextvars.copy_context()
        call = current_call(self._process.clock)
        # What is sent stays as it is, also when it arrives after its caller has left.
        sent = copy.copy(call)
        context.run(_current.set, sent)
        label = f"sql {method}"

        def work() -> Any:
            if times is not None:
                times.append(self._database.now_us())
            return self._database.do(context, method, *args, decide=decide)

        try:
            async with asyncio.timeout(self._limit):
                reply = await self._network.call(self._process, self._database, label, work)
                call.superseded = call.superseded or sent.superseded
                return reply
        except TimeoutError as exc:
            raise StoreTimeoutError(
                "no answer", operation=method, layer="SqlModel", outcome_unknown=writes
            ) from exc
        except CutError as exc:
            raise UnavailableError(
                "cut off", operation=method, layer="SqlModel", outcome_unknown=writes
            ) from exc

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        await self._do("write", snapshot, writes=True)

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        self.loads[user_id] = self.loads.get(user_id, 0) + 1
        return (await self._do("read", user_id)).snapshot

    async def delete(self, user_id: str) -> None:
        await self._do("erase", user_id, writes=True)

    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        return await self._do("get_history", user_id, limit)

    async def get_latest_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        return await self._do("get_latest_many", list(user_ids))

    async def upsert_latest_many(self, snapshots: Iterable[StateSnapshot]) -> None:
        await self._do("write_many", list(snapshots), writes=True)


class PlainStore(_Client):
    """The database for a stack that knows of no versions."""


class SqlStore(_Client, Authority):
    """The database as a system of record.

    Whether a write began before an erasure is decided by the shipped code from what the clocks of
    both sides say, not by the order in which things happened.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._known = KnownErasures(self._process.clock)
        self.heard: float | None = None  # when this process first learned the database's time

    @property
    def digest(self) -> digest_function:
        return self._database.store.digest

    async def read(self, user_id: str) -> Versioned:
        self.loads[user_id] = self.loads.get(user_id, 0) + 1
        return await self._do("read", user_id)

    async def read_many(self, user_ids: Sequence[str]) -> Mapping[str, Versioned]:
        return await self._do("read_many", user_ids)

    async def write(self, snapshot: StateSnapshot) -> Versioned:
        records = await self.write_many([snapshot])
        return records[snapshot.user_id]

    async def write_many(self, snapshots: Sequence[StateSnapshot]) -> Mapping[str, Versioned]:
        clock, store = self._process.clock, self._database.store
        call = current_call(clock)
        started, sent = call.began(clock), clock.monotonic()
        if started < sent - tombstones.LATEST_SECONDS:
            raise tombstones.too_late()
        def decide() -> list[StateSnapshot]:
            """Return those that did not begin before an erasure."""
            began = erasures.Began()
            began.learn(sent, clock.monotonic() + self._network.latency(), self._database.now_us())
            self._learn(began)
            kept = []
            for snapshot in snapshots:
                user = snapshot.user_id
                late = False
                version, erased_at = self._database.erased.get(user, (-1, 0))
                row = store._users.get(user)
                if row is not None and row.erased_version == version:
                    digest = store.digest(user)
                    known = self._known.knows(digest, version, call.order)
                    if known is None:
                        self._known.saw(digest, version)
                        known = self._known.before(started, erased_at, began)
                    if known is None:
                        raise UnavailableError("too close together")
                    late = known
                if not late:
                    kept.append(snapshot)
            return kept

        return await self._do("write_many", list(snapshots), writes=True, decide=decide)

    async def erase(self, user_id: str, tiers: Sequence[str] = ()) -> int:
        version: int = await self._do("erase", user_id, tiers, writes=True)
        self._known.made(self.digest(user_id), version, next_order())
        return version

    async def settle(self, digest: bytes, version: int, tier: str) -> None:
        await self._do("settle", digest, version, tier)

    async def debts(self, user_id: str) -> Sequence[str]:
        return await self._do("debts", user_id)

    async def owing(self, tier: str, limit: int) -> Sequence[Change]:
        return await self._do("owing", tier, limit)

    async def head(self) -> str:
        return await self._watching("head")

    async def changes(self, cursor: str, limit: int) -> Changes:
        return await self._watching("changes", cursor, limit)

    async def covers(self, cursor: str) -> bool:
        return await self._watching("covers", cursor)

    def _learn(self, began: erasures.Began) -> None:
        if self.heard is None:
            self.heard = CLOCK.monotonic()
        self._known.learn(began)

    async def _watching(self, method: str, *args: Any) -> Any:
        """Ask what is answered together with the server's time."""
        began, clock = erasures.Began(), self._process.clock
        sent, times = clock.monotonic(), []
        found = await self._do(method, *args, times=times)
        began.learn(sent, clock.monotonic(), times[0])
        self._learn(began)
        return found
