"""One run: processes, clients, faults, then peace, and what must hold at the end."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import itertools
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from layered_store.errors import StoreError
from layered_store.interface import StateStore
from layered_store.layers.cached import Cached
from layered_store.layers.write_through import WriteThrough
from layered_store.snapshot import StateSnapshot
from layered_store.stack import find, walk
from layered_store.testing.explore import LoopClock, Schedule
from tests.simulation.checks import Violation, check_fleet, check_register
from tests.simulation.clocks import DRIFT, ProcessClock
from tests.simulation.history import Call, History
from tests.simulation.loop import Process, SimLoop
from tests.simulation.network import Network
from tests.simulation.plan import Event, draw_plan
from tests.simulation.redis_model import Nodes
from tests.simulation.shapes import SHAPES, Parts, Shape
from tests.simulation.sql_model import CALL, Commit, Database

__all__ = ["Report", "run_seed", "shape_of"]

CLOCK = LoopClock()
USERS = ("ann", "bob")
_ROUND = [
    shape
    for turn in range(max(shape.weight for shape in SHAPES.values()))
    for shape in SHAPES.values()
    if turn < shape.weight
]
MAX_STEPS = 400_000
SLEEP_SECONDS = 30.0
"""How long a process may sleep: longer than a token, a quarantine, a trust and a lock live."""

PEACE_SECONDS = 7.0
"""Longer than a quarantine and a trust together."""

_ROUND_TRIP = 0.05


@dataclass
class Report:
    """What one run was and did.

    Args:
        seed: repeats it.
        shape: the stack.
        plan: what went wrong.
        calls: how many calls were made.
        steps: how many steps the loop took.
        failure: the rule that was broken and how; None when all held.
        log: what happened, when it was traced.
    """

    seed: int
    shape: str
    plan: list[Event] = field(default_factory=list)
    calls: int = 0
    steps: int = 0
    failure: str | None = None
    rule: str | None = None
    log: list[str] = field(default_factory=list)
    history: list[Call] = field(default_factory=list)


def shape_of(seed: int) -> Shape:
    """Return the shape that a seed runs when none is asked for."""
    return _ROUND[seed % len(_ROUND)]


def run_seed(seed: int, shape: Shape | None = None, *, traced: bool = False) -> Report:
    """Run one seed and check it.

    Args:
        seed: decides everything.
        shape: the stack; None takes the seed's own.
        traced: keep a log of all that happens.
    """
    shape = shape or shape_of(seed)
    report = Report(seed, shape.name)
    schedule = Schedule(seed, random.Random(f"{shape.name} {seed}"))
    loop = SimLoop(schedule, MAX_STEPS, traced=traced)
    world = _World(loop, shape, schedule.random, report, traced=traced)
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    collects = gc.isenabled()
    gc.disable()
    try:
        with contextlib.ExitStack() as stack:
            shape.patches(stack)
            loop.run(world.run())
        if loop.unheard:
            context = loop.unheard[0][1]
            exc = context.get("exception")
            raise Violation("unheard", f"{context.get('message')}: {exc!r}")
    except Violation as exc:
        report.failure, report.rule = str(exc), exc.rule
    except Exception as exc:
        report.failure, report.rule = f"{type(exc).__name__}: {exc}", "crashed"
        if traced:
            import traceback

            report.log.append(traceback.format_exc())
    finally:
        world.end()
        logging.disable(level)
        if collects:
            gc.enable()
    report.steps = loop.steps
    report.calls = len(world.history.calls)
    report.history = world.history.calls
    return report


class _World:
    def __init__(
        self,
        loop: SimLoop,
        shape: Shape,
        chance: random.Random,
        report: Report,
        *,
        traced: bool,
    ) -> None:
        self.loop = loop
        self.shape = shape
        self.chance = chance
        self.report = report
        self.traced = traced
        self.alone = shape.bound is None
        faults = chance.choice((0.0, 0.02, 0.06))
        self.network = Network(loop, chance, faults, self.note)
        self.network.slowest = shape.slowest
        self.orders = itertools.count(1)
        self.nodes = Nodes(self.network, chance, shape.nodes)
        self.database = Database(self.orders, chance)
        self.history = History(self.orders)
        self.values = itertools.count(1)
        self.processes: list[Process] = []
        self.stacks: list[StateStore] = []
        self.parts: list[Parts] = []
        self.dead: list[tuple[Process, StateStore]] = []
        self.starts = 0
        # The database as each process has it, by its name; when its clock was set, by how much.
        self.sql: dict[str, Any] = {}
        self.sql_sets: list[tuple[float, float]] = []
        self.over = self.ended = False
        self.broken: Violation | None = None
        self.clients: list[asyncio.Task[Any]] = []

    def note(self, line: str) -> None:
        if self.traced:
            self.report.log.append(f"{self.loop.time():8.4f}  {line}")

    # The run

    async def run(self) -> None:
        for index in range(self.shape.processes):
            self.processes.append(None)  # type: ignore[arg-type]
            self.stacks.append(None)  # type: ignore[arg-type]
            self.parts.append(None)  # type: ignore[arg-type]
            self.start(index)
        plan = draw_plan(self.chance, self.shape.processes, self.shape.servers, one=self.alone)
        self.report.plan = plan
        events = [asyncio.ensure_future(self.happen(event)) for event in plan]
        await asyncio.sleep(5.0)
        self.over = True
        await asyncio.gather(*events)
        self.make_peace()
        for _ in range(400):
            if all(client.done() for client in self.clients):
                break
            await asyncio.sleep(0.05)
        else:
            raise Violation("bounded", "a call did not end in 20 s")
        await asyncio.sleep(PEACE_SECONDS)
        self.ended = True
        if self.broken is not None:
            raise self.broken
        await self.check_converged()
        self.check_history()
        self.check_books()
        if not self.alone:
            await self.check_one_load()
        await self.check_clean_ends()

    def start(self, index: int) -> None:
        self.starts += 1
        clock = ProcessClock(self.chance)
        process = Process(self.loop, f"P{index}.{self.starts}", clock)
        with self.loop.inside(process):
            parts = Parts(process, self.network, self.nodes, self.database, self.chance)
            stack = self.shape.build(parts)
        self.sql[process.name] = parts.sql
        self.processes[index], self.stacks[index], self.parts[index] = process, stack, parts
        clients = 2 if not self.alone else 4
        calls = 10 if not self.alone else 8
        for _ in range(clients):
            self.clients.append(process.spawn(self.client(process, stack, calls), "client"))

    async def client(
        self, process: Process, stack: StateStore, calls: int, *, late: bool = False
    ) -> None:
        chance = self.chance
        for _ in range(calls):
            await asyncio.sleep(chance.choice((0.0, 0.002, 0.05, 0.3, 1.0)) * chance.random())
            if self.over and not late:
                return
            if chance.random() < 0.12:
                await self.cancelled(process, self.one_call(process, stack, leaves=True))
            else:
                await self.one_call(process, stack)

    async def cancelled(self, process: Process, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        await asyncio.sleep(self.chance.choice((0.0, 0.001, 0.004, 0.05)) * self.chance.random())
        task.cancel()
        await asyncio.wait((task,))

    async def one_call(self, process: Process, stack: StateStore, *, leaves: bool = False) -> None:
        chance = self.chance
        draw = chance.random()
        kind = "read" if draw < 0.55 else "upsert" if draw < 0.86 else "delete"
        users = [chance.choice(USERS)]
        batch = kind != "delete" and chance.random() < self.shape.batches
        if batch:
            users = list(USERS)
        calls = [
            self.history.begin(
                process.name, kind, user, next(self.values) if kind == "upsert" else None
            )
            for user in users
        ]
        CALL.set(calls[0].began)
        self.note(f"{process}: {kind} {' '.join(users)} {calls[0].value or ''} begins")
        results: dict[str, int | None] = {}
        outcome = "pending"
        try:
            if kind == "read":
                if batch:
                    found = await stack.get_latest_many(users)
                    results = {user: _value(found.get(user), user) for user in users}
                else:
                    results = {users[0]: _value(await stack.get_latest(users[0]), users[0])}
            elif kind == "upsert":
                states = [StateSnapshot(call.user, call.value or 0) for call in calls]
                if batch:
                    await stack.upsert_latest_many(states)
                else:
                    await stack.upsert_latest(states[0])
            else:
                await stack.delete(users[0])
            outcome = "ok"
        except StoreError as exc:
            outcome = type(exc).__name__
        except asyncio.CancelledError:
            outcome = "cancelled"
            if not leaves and not self.ended:
                self.broken = Violation("cancelled", f"nobody cancelled this: {calls[0]}")
            raise
        finally:
            if outcome == "pending":
                outcome = "crashed"
            for call in calls:
                self.history.end(call, outcome, results.get(call.user))
            self.note(f"{process}: {kind} {' '.join(users)} ends: {outcome} {results or ''}")

    # What goes wrong

    async def happen(self, event: Event) -> None:
        kind, network = event.kind, self.network
        redis = self.nodes.servers[int(event.draw * 997) % len(self.nodes.servers)]
        if kind == "redis crashes":
            await asyncio.sleep(max(0.0, event.at - event.loses))
            dump = redis.copy()
            await asyncio.sleep(min(event.at, event.loses))
        else:
            await asyncio.sleep(event.at)
        self.note(f"*** {event}")
        process = self.processes[event.process]
        if kind in ("redis refuses", "sql refuses"):
            server = redis if kind.startswith("redis") else self.database
            server.mode = "refuse"
            if server is redis:
                for connection in list(redis.connections):
                    connection.break_off()
            await asyncio.sleep(event.seconds)
            server.mode = "up"
        elif kind in ("redis stops", "sql stops"):
            server = redis if kind.startswith("redis") else self.database
            server.stop()
            await asyncio.sleep(event.seconds)
            server.resume()
        elif kind == "redis crashes":
            redis.crash()
            await asyncio.sleep(min(event.seconds, 1.0) if event.draw < 0.5 else 0.01)
            redis.start(dump)
        elif kind == "redis evicts":
            for key in list(redis.data):
                if self.chance.random() < 0.4:
                    redis.evict(key)
        elif kind == "redis flushes":
            redis.data.clear()
        elif kind == "redis forgets scripts":
            redis.scripts.clear()
        elif kind in ("channel half open", "channel kicked"):
            for connection in list(redis.connections):
                if connection.listens and self.chance.random() < 0.6:
                    if kind == "channel kicked":
                        connection.break_off()
                    else:
                        connection.half_open = True
        elif kind in ("cut from redis", "cut from sql"):
            server = redis if kind.endswith("redis") else self.database
            servers = [server.name]
            if server is redis and event.draw < 0.6:
                servers = [each.name for each in self.nodes.servers]
            names = [process.name]
            if event.draw < 0.3:
                names.append(self.chance.choice(self.processes).name)
            for way in itertools.product(names, servers):
                network.cuts[way] = "refuse" if event.draw < 0.5 else "silent"
            await asyncio.sleep(event.seconds)
            for way in itertools.product(names, servers):
                network.cuts.pop(way, None)
        elif kind == "process killed":
            if not process.alive:
                return  # it is started again once only
            self.kill(event.process)
            await asyncio.sleep(event.seconds)
            self.start(event.process)
        elif kind == "process stops":
            process.stop()
            await asyncio.sleep(event.seconds)
            process.resume()
        elif kind == "process sleeps":
            process.stop()
            await asyncio.sleep(SLEEP_SECONDS * (0.3 + event.draw))
            process.resume()
            # What it had in hand, it goes on with; the others find what that did.
            for each, stack in zip(self.processes, self.stacks, strict=True):
                late = each.spawn(self.client(each, stack, 2, late=True), "client")
                self.clients.append(late)
        elif kind == "redis clock set":
            redis.clock.set(event.sets)
        elif kind == "sql clock set":
            self.database.clock.set(event.sets)
            self.sql_sets.append((CLOCK.monotonic(), event.sets))
        elif kind == "host clock set":
            process.clock.wall.set(event.sets)
        elif kind == "redis slot moved":
            bucket = self.chance.choice(sorted(self.nodes.owners))
            self.nodes.move(bucket, self.chance.choice(self.nodes.servers))
        else:
            raise AssertionError(kind)
        self.note(f"*** over: {event}")

    def kill(self, index: int) -> None:
        process, stack = self.processes[index], self.stacks[index]
        process.kill()
        self.dead.append((process, stack))
        for connection in self.connections():
            if connection._process is process:
                connection.break_off()
        self.clients = [client for client in self.clients if client not in process.tasks]

    def connections(self) -> list[Any]:
        """Return all connections to any Redis."""
        return [each for server in self.nodes.servers for each in server.connections]

    def make_peace(self) -> None:
        self.note("*** peace")
        self.network.faults = 0.0
        self.network.cuts.clear()
        assert all(each.mode == "up" for each in (*self.nodes.servers, self.database))

    # What must hold at the end

    async def check_converged(self) -> None:
        """Every process reads the latest state, and no call of the history broke a rule."""
        calls = []
        for process, stack in zip(self.processes, self.stacks, strict=True):
            calls.append(process.spawn(self.read_all(process, stack), "reader"))
        await asyncio.wait(calls)
        for user in USERS:
            mine = [call for call in self.history.calls if call.user == user]
            for call in mine[-2 * len(self.processes) :]:
                if call.kind == "read" and not call.ok and call.began > self.quiet:
                    raise Violation("converged", f"a read failed in peace: {call}")
            if self.alone:
                check_register(mine)
                continue
            assert self.shape.bound is not None
            commits = self.database.commits.get(user, [])
            written = {commit.value for commit in commits}
            late = {call.value for call in mine if self.could_not_know(call, commits)} & written
            mine = [c for c in mine if c.value in late or not self.could_not_know(c, commits)]
            check_fleet(mine, commits, self.shape.bound * (1 + 2 * DRIFT), late)
            latest = commits[-1].value if commits else None
            for call in mine:
                if call.outcome == "ok" and call.began > self.quiet and call.value != latest:
                    raise Violation("converged", f"the latest is {latest}, not as read: {call}")

    def could_not_know(self, call: Call, commits: Sequence[Commit]) -> bool:
        """Tell whether a documented limit lets this write be dropped, or outlive an erasure.

        A process that first hears of the database after its clock was set takes an erasure of
        before for more recent than it is by that step, set back, or less recent, set forward.
        """
        heard = getattr(self.sql[call.process], "heard", None)
        if call.kind != "upsert" or heard is None:
            return False
        dropped = call.value not in {commit.value for commit in commits}
        return any(
            commit.value is None
            and commit.time < at < heard
            and (
                step < 0 and call.began_at + step < commit.time + _ROUND_TRIP
                if dropped
                else call.began_at < commit.time < call.began_at + step + _ROUND_TRIP
            )
            for at, step in self.sql_sets
            for commit in commits
        )

    async def read_all(self, process: Process, stack: StateStore) -> None:
        self.quiet = getattr(self, "quiet", next(self.orders))
        for user in USERS:
            call = self.history.begin(process.name, "read", user)
            try:
                found = await stack.get_latest(user)
            except StoreError as exc:
                self.history.end(call, type(exc).__name__)
                continue
            self.history.end(call, "ok", _value(found, user))

    def check_history(self) -> None:
        """The history holds what was committed since the last erasure, each write once."""
        if self.shape.servers == ("redis",):
            return
        for user, commits in self.database.commits.items():
            kept: list[int | None] = []
            for commit in commits:
                kept = [] if commit.value is None else [*kept, commit.value]
            row = self.database.store._users.get(user)
            stored = [] if row is None else [state.updated_at_unix_ms for state in row.history]
            if stored != kept[::-1]:
                raise Violation("history", f"{stored} is stored of {kept[::-1]}")
            if len(stored) != len(set(stored)):
                raise Violation("history", "a write stands in the history twice")

    def check_books(self) -> None:
        """Nothing is kept of users for whom nothing is under way."""
        for stack in self.stacks:
            for cache in find(stack, Cached):
                left = {
                    "flights": len(cache._flights),
                    "writing": len(cache._held.writing),
                    "refreshes": len(cache._refreshes),
                    "index": len(set(cache._held.by_digest.values()) - set(cache._entries)),
                }
                if any(left.values()):
                    raise Violation("books", f"a cache still keeps {left}")
            for block in find(stack, WriteThrough):
                if block._copies._turns.users:
                    raise Violation("books", "a write-through still keeps turns of users")
                guard = block._guard
                if guard is not None and guard.pending:
                    raise Violation("books", f"{guard.pending} users count as unrepaired")
        if self.shape.bound is None:
            return
        for user, row in self.database.store._users.items():
            if row.debts:
                raise Violation("debts", f"the erasure of {user} is still owed to {row.debts}")

    async def check_one_load(self) -> None:
        """Ten readers of a user that is not held cost one read of the database."""
        for process, stack, parts in zip(self.processes, self.stacks, self.parts, strict=True):
            caches = find(stack, Cached)
            if not caches:
                continue
            for server in self.nodes.servers:
                for key in [key for key in server.data if b":s:" in key]:
                    server.evict(key)
            for cache in caches:
                cache.distrust()
            before = dict(parts.sql.loads)
            reads = [process.spawn(_plain_read(stack, USERS[0])) for _ in range(10)]
            await asyncio.wait(reads)
            loads = parts.sql.loads.get(USERS[0], 0) - before.get(USERS[0], 0)
            if loads != 1:
                raise Violation("one load", f"ten readers caused {loads} loads")

    async def check_clean_ends(self) -> None:
        """A closed stack leaves no task behind."""
        for process, stack in zip(self.processes, self.stacks, strict=True):
            closing = process.spawn(_close_twice(stack), "closing")
            await asyncio.wait((closing,))
            closing.result()
            await asyncio.sleep(0.01)
            left = process.running()
            if left:
                names = ", ".join(task.get_name() for task in left)
                raise Violation("clean ends", f"tasks are left after aclose: {names} {left[0]!r}")

    def end(self) -> None:
        for process, _ in self.dead:
            self.loop.bury(process)
        for process in self.processes:
            if process is not None:
                process.kill()
                self.loop.bury(process)


def _value(snapshot: StateSnapshot | None, user: str) -> int | None:
    if snapshot is None:
        return None
    if snapshot.user_id != user:
        raise Violation("right person", "a state of another user was returned")
    return snapshot.updated_at_unix_ms


async def _plain_read(stack: StateStore, user: str) -> None:
    await stack.get_latest(user)


async def _close_twice(stack: StateStore) -> None:
    await stack.aclose()
    await stack.aclose()


def blocks(stack: StateStore) -> list[str]:
    """Return the kinds of blocks of a stack."""
    return [type(place.store).__name__ for place in walk(stack)]
