"""One process of the fleet: a three-tier stack under a random load, every call written down.

Run as ``python -m tests.chaos.worker '{...}'``; on standard input it takes ``rest`` (end the load)
and ``final`` (read every user), on standard output it prints what it did.
"""

from __future__ import annotations

import asyncio
import contextvars
import faulthandler
import json
import random
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from layered_store import (
    Cached,
    CircuitBreaker,
    Metrics,
    RedisStore,
    Retry,
    SQLStore,
    StateSnapshot,
    StateStore,
    StoreError,
    Timeout,
)

from .history import Journal
from .planted import plant

_call: contextvars.ContextVar[int] = contextvars.ContextVar("call", default=0)


def state_of(snapshot: StateSnapshot | None) -> int | None:
    """Return the number that an upsert of this run carries."""
    return None if snapshot is None else snapshot.updated_at_unix_ms


class TracedSQLStore(SQLStore):
    """Writes down what the system of record says, before anybody else hears of it."""

    journal: Journal

    def _said(self, user_id: str, record: Any) -> None:
        if record.snapshot is not None:
            self.journal("v", _call.get(), user_id, state_of(record.snapshot), record.version)

    async def read(self, user_id: str) -> Any:
        record = await super().read(user_id)
        self._said(user_id, record)
        return record

    async def read_many(self, user_ids: Sequence[str]) -> Any:
        records = await super().read_many(user_ids)
        for user_id, record in records.items():
            self._said(user_id, record)
        return records

    async def write(self, snapshot: StateSnapshot) -> Any:
        record = await super().write(snapshot)
        self._said(snapshot.user_id, record)
        return record

    async def write_many(self, snapshots: Sequence[StateSnapshot]) -> Any:
        records = await super().write_many(snapshots)
        for user_id, record in records.items():
            self._said(user_id, record)
        return records

    async def erase(self, user_id: str, tiers: Sequence[str] = ()) -> int:
        self.journal("E", _call.get(), user_id)
        version = await super().erase(user_id, tiers)
        self.journal("e", _call.get(), user_id, version)
        return version


def build(options: dict[str, Any], journal: Journal) -> StateStore:
    """Return the stack of one process."""
    redis = RedisStore(options["redis"], timeout=1.0, connect_timeout=1.0)
    limit = options["sql_timeout"]
    sql = TracedSQLStore(options["sql"], history_limit=None, timeout=limit, pool_size=8)
    sql.journal = journal
    tier = Retry(CircuitBreaker(Timeout(redis, seconds=0.25), open_for=0.5), attempts=2)
    return Metrics(
        Cached(
            tier,
            fallback=Retry(sql, attempts=3, time_limit=2.5 * limit),
            ttl=60.0,
            negative_ttl=5.0,
            refresh_ahead=0.5,
        ),
        name="chaos",
    )


class Load:
    """Random calls of several clients through one stack."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.journal = Journal(options["journal"])
        if options["plant"]:
            plant(options["plant"])
        self.store = build(options, self.journal)
        self.random = random.Random(options["seed"])
        self.users = [f"user-{number}" for number in range(options["users"])]
        self.think = options["think"]
        self.clients = options["clients"]
        self.number = options["worker"]
        self.resting = asyncio.Event()
        self.calls = 0
        self._next = 0
        self.slowest: dict[str, float] = {}

    def user(self) -> str:
        """Return a user, some far more often than others."""
        return self.users[int(len(self.users) * self.random.random() ** 2)]

    def snapshot(self, user: str) -> StateSnapshot:
        self._next += 1
        state = self.number * 10_000_000 + self._next
        return StateSnapshot(user, state, axes={"chaos": self.random.random()})

    async def client(self) -> None:
        while not self.resting.is_set():
            dice = self.random.random()
            leaves = self.random.random() < 0.02
            limit = self.random.choice((0.001, 0.005, 0.02)) if leaves else None
            if dice < 0.66:
                await self.read(limit)
            elif dice < 0.71:
                await self.read_many(limit)
            elif dice < 0.73:
                await self.history(limit)
            elif dice < 0.93:
                await self.upsert(limit)
            elif dice < 0.96:
                await self.upsert_many(limit)
            else:
                await self.delete(limit)
            await asyncio.sleep(self.random.expovariate(1 / self.think))

    async def attempt(self, name: str, work: Any, limit: float | None) -> tuple[str, Any]:
        """Return the outcome of a call and what it gave."""
        self.calls += 1
        start = time.monotonic()
        outcome, result = "ok", None
        try:
            # Not a time limit of the stack's: a caller who goes away in the middle.
            task = asyncio.ensure_future(work)
            if limit is not None:
                asyncio.get_running_loop().call_later(limit, task.cancel)
            result = await task
        except asyncio.CancelledError:
            outcome = "cancelled"
        except StoreError as exc:
            outcome = type(exc).__name__
        _call.set(0)
        took = time.monotonic() - start
        self.slowest[name] = max(took, self.slowest.get(name, 0.0))
        return outcome, result

    async def read(self, limit: float | None) -> None:
        user, start = self.user(), time.monotonic()
        outcome, found = await self.attempt("read", self.store.get_latest(user), limit)
        self.journal("r", user, start, time.monotonic(), state_of(found), outcome)

    async def read_many(self, limit: float | None) -> None:
        users, start = list({self.user() for _ in range(5)}), time.monotonic()
        outcome, found = await self.attempt("read_many", self.store.get_latest_many(users), limit)
        end = time.monotonic()
        for user in users:
            self.journal("r", user, start, end, state_of((found or {}).get(user)), outcome)

    async def history(self, limit: float | None) -> None:
        user, start = self.user(), time.monotonic()
        outcome, found = await self.attempt("history", self.store.get_history(user, 20), limit)
        states = [state_of(each) for each in found or ()]
        self.journal("h", user, start, time.monotonic(), states, outcome)

    def begin(self) -> int:
        call = self.number * 10_000_000 + self.calls
        _call.set(call)
        return call

    async def upsert(self, limit: float | None) -> None:
        snapshot, call = self.snapshot(self.user()), self.begin()
        self.journal("U", call, snapshot.user_id, state_of(snapshot), time.monotonic())
        outcome, _ = await self.attempt("upsert", self.store.upsert_latest(snapshot), limit)
        self.journal("u", call, time.monotonic(), outcome)

    async def upsert_many(self, limit: float | None) -> None:
        users = list({self.user() for _ in range(4)})
        batch, call = [self.snapshot(user) for user in users], self.begin()
        for snapshot in batch:
            self.journal("U", call, snapshot.user_id, state_of(snapshot), time.monotonic())
        outcome, _ = await self.attempt(
            "upsert_many", self.store.upsert_latest_many(batch), limit
        )
        self.journal("u", call, time.monotonic(), outcome)

    async def delete(self, limit: float | None) -> None:
        user, call = self.user(), self.begin()
        self.journal("D", call, user, time.monotonic())
        outcome, _ = await self.attempt("delete", self.store.delete(user), limit)
        self.journal("d", call, time.monotonic(), outcome)

    async def final(self) -> None:
        """Read everybody, both ways, after the servers were whole for a while."""
        for user in self.users:
            self.journal("f", user, state_of(await self.store.get_latest(user)))
        found = await self.store.get_latest_many(self.users)
        for user in self.users:
            self.journal("f", user, state_of(found.get(user)))
        for user, snapshot in found.items():
            assert snapshot.user_id == user

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        stdin = asyncio.StreamReader()
        commands, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin
        )
        loop.add_signal_handler(signal.SIGUSR1, _show_tasks)
        faulthandler.register(signal.SIGUSR2)
        unhandled: list[str] = []
        loop.set_exception_handler(
            lambda _, context: unhandled.append(
                f"{context['message']}: {context.get('exception')!r} {context.get('future')!r}"
            )
        )
        print("ready", flush=True)
        # Opens itself: a worker may be born into an outage.
        try:
            clients = [asyncio.create_task(self.client()) for _ in range(self.clients)]
            progress = asyncio.create_task(self.report())
            while line := await stdin.readline():
                if line == b"rest\n":
                    self.resting.set()
                    await asyncio.gather(*clients)
                    print("rested", flush=True)
                elif line == b"final\n":
                    await self.final()
                    break
            progress.cancel()
            await asyncio.gather(progress, return_exceptions=True)
            figures: dict[str, Any] = {}
            for place, block in self.blocks():
                for sample in block.samples():
                    figures["/".join((place, sample.metric, *sample.labels))] = sample.value
            self.journal("m", {"figures": figures, "slowest": self.slowest})
        finally:
            await self.store.aclose()
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        self.journal("m", {"unhandled": unhandled, "tasks_left": len(left)})
        commands.close()
        print("done", flush=True)

    def blocks(self) -> list[tuple[str, StateStore]]:
        found: list[tuple[str, StateStore]] = []

        def walk(place: str, block: StateStore) -> None:
            found.append((place, block))
            for role, child in block.children().items():
                walk(f"{place}.{role}", child)

        walk("stack", self.store)
        return found

    async def report(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            print(f"calls {self.calls}", flush=True)


def _show_tasks() -> None:
    """Print where every task stands: what to look at when a worker does not come to rest."""
    for task in asyncio.all_tasks():
        task.print_stack(file=sys.stderr)


if __name__ == "__main__":
    asyncio.run(Load(json.loads(sys.argv[1])).run())
