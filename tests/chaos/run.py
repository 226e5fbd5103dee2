"""A run: servers, proxies, a fleet of worker processes, faults, and the verdict."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))

import redis  # noqa: E402
from servers import (  # noqa: E402
    Cluster,
    SentinelGroup,
    Server,
    start_mysql,
    start_pgbouncer,
    start_postgres,
    start_redis,
)

from layered_store import SQLStore  # noqa: E402

from .checker import Report, Stored, check  # noqa: E402
from .history import read  # noqa: E402
from .proxy import Mode, Proxy  # noqa: E402

_COMPLAINTS = {
    "Traceback": "complaint of a worker",
    "Warning": "complaint of a worker",
    "user-": "a user id in a log",
}
"""What no worker may print."""

_SILENT_SECONDS = 30.0
"""After which a worker that says nothing hangs; none is stopped for so long."""

_START_SECONDS = 120.0
"""How long a worker may take to start, on a machine that has much else to do."""

_SLOTS = (0, 8_000, 16_383)
"""Of each primary of a cluster one slot, which no run moves."""

_DRIVER_NOISE = "unexpected connection_lost() call"
"""What asyncpg leaves behind when a connection is cut while it is being made."""


_POSTGRES = "tester@127.0.0.1:{port}/postgres"
_MYSQL = "root@127.0.0.1:{port}/chaos"

SQL: dict[str, tuple[Callable[[], Server] | None, str]] = {
    "sqlite": (None, "sqlite+aiosqlite:///{folder}/states.db"),
    "postgres": (start_postgres, "postgresql+asyncpg://" + _POSTGRES),
    "psycopg": (start_postgres, "postgresql+psycopg://" + _POSTGRES),
    "pgbouncer": (start_postgres, "postgresql+asyncpg://" + _POSTGRES),
    "mysql": (start_mysql, "mysql+aiomysql://" + _MYSQL),
    "asyncmy": (start_mysql, "mysql+asyncmy://" + _MYSQL),
}
"""The systems of record: what starts their server, and how it is reached."""


@dataclass
class Plan:
    """What a run does.

    Args:
        operations: calls in all, at least; the run goes on until they were made.
        seconds: the longest that the load may last.
        workers: processes at a time.
        clients: concurrent callers in each.
        users: how many users they share.
        think: mean pause of a caller between two calls, in seconds.
        seed: of the load and of the faults; real processes do not repeat exactly.
        sql: the system of record; a key of :data:`SQL`.
        redis: ``single``, ``cluster`` (three primaries with a replica each) or ``sentinel`` (three
            Sentinels, a primary and a replica).
        faults: names of faults; None: all that fit.
        sql_timeout: time limit of the system of record, in seconds.
        plant: a fault to plant in the shipped code; the run must then find it.
        bound: seconds after which every process must show an acknowledged write.
    """

    operations: int = 100_000
    seconds: float = 1_200.0
    workers: int = 5
    clients: int = 8
    users: int = 200
    think: float = 0.015
    seed: int = 1
    sql: str = "postgres"
    redis: str = "single"
    faults: list[str] | None = None
    sql_timeout: float = 2.0
    plant: str = ""
    # Trust 2 s, which a lease never outlives, and half as much again for what nobody thought of.
    bound: float = 3.0
    say: Callable[[str], None] = field(default=lambda text: None)


def tree(pid: int) -> list[int]:
    """Return a process and all below it."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found, new = {pid}, {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return sorted(found)


def send(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


class Worker:
    """One process of the fleet, with proxies of its own."""

    def __init__(
        self, number: int, process: Any, proxies: dict[str, Proxy], log: Path
    ) -> None:
        self.number = number
        self.log = log
        self.process = process
        self.proxies = proxies
        self.calls = 0
        self.heard = time.monotonic()
        self.ready = asyncio.Event()
        self.said: asyncio.Queue[str] = asyncio.Queue()
        self.reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while line := await self.process.stdout.readline():
            self.heard = time.monotonic()
            text = line.decode().strip()
            if text == "ready":
                self.ready.set()
            elif text.startswith("calls "):
                self.calls = int(text[6:])
            else:
                self.said.put_nowait(text)
        self.ready.set()
        self.said.put_nowait("ended")

    async def tell(self, command: str, answer: str, seconds: float) -> None:
        """Send a command and wait for the answer."""
        try:
            self.process.stdin.write(command.encode() + b"\n")
            await self.process.stdin.drain()
            async with asyncio.timeout(seconds):
                said = await self.said.get()
        except ConnectionError:
            said = "nothing, it is dead"
        except TimeoutError:
            said = f"nothing within {seconds:g} s; {await self.diagnose()}"
        if said != answer:
            text = self.log.read_text(errors="replace")[-20_000:]
            raise RuntimeError(f"worker {self.number} said {said!r} to {command!r}\n{text}")


    async def diagnose(self) -> str:
        """Have the worker write into its log where it stands; return its state."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        self.process.send_signal(signal.SIGUSR2)
        self.process.send_signal(signal.SIGUSR1)
        await asyncio.sleep(2.0)
        return next(line for line in status.splitlines() if line.startswith("State"))


class Fleet:
    """Servers and processes of one run."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.random = random.Random(plan.seed)
        self.folder = Path(tempfile.mkdtemp(prefix="layered_store-chaos-"))
        self.redis: Server | None = None
        self.group: Cluster | SentinelGroup | None = None
        self.database: Server | None = None
        self.bouncer: Server | None = None
        self.workers: list[Worker] = []
        self.gone = 0
        self.started = 0
        self.dump: bytes | None = None
        self.done: dict[str, int] = {}
        # A server is under one fault at a time.
        self.busy = {"redis": asyncio.Lock(), "sql": asyncio.Lock()}

    async def start(self) -> None:
        if self.plan.redis == "single":
            self.redis = await asyncio.to_thread(start_redis)
        else:
            kind = Cluster if self.plan.redis == "cluster" else SentinelGroup
            self.group = await asyncio.to_thread(kind)
        launch, _ = SQL[self.plan.sql]
        if launch is not None:
            self.database = await asyncio.to_thread(launch)
        if launch is start_mysql:
            await asyncio.to_thread(self._create_database)
        if self.plan.sql == "pgbouncer":
            assert self.database is not None
            self.bouncer = await asyncio.to_thread(start_pgbouncer, self.database.port)
        async with SQLStore(self.sql_url()) as store:
            await store.head()  # the tables are made by one
        for _ in range(self.plan.workers):
            await self.spawn()
        for worker in self.workers:
            await worker.ready.wait()

    def _create_database(self) -> None:
        import pymysql

        assert self.database is not None
        connection = pymysql.connect(host="127.0.0.1", port=self.database.port, user="root")
        with connection, connection.cursor() as cursor:
            cursor.execute("CREATE DATABASE chaos CHARACTER SET utf8mb4")

    def sql_url(self, port: int | None = None) -> str:
        own = self.database.port if self.database is not None else 0
        return SQL[self.plan.sql][1].format(port=port or own, folder=self.folder)

    async def spawn(self) -> None:
        """Start one more worker."""
        self.started += 1
        number = self.started
        proxies = {}
        if self.redis is not None:
            proxies["redis"] = Proxy(self.redis.port)
        if self.database is not None:
            proxies["sql"] = Proxy((self.bouncer or self.database).port)
        for proxy in proxies.values():
            await proxy.start()
        if self.group is not None:
            redis_url = self.group.url
        else:
            redis_url = f"redis://127.0.0.1:{proxies['redis'].port}/0"
        options = {
            "worker": number,
            "seed": self.plan.seed * 1_000 + number,
            "redis": redis_url,
            "sql": self.sql_url(proxies["sql"].port if "sql" in proxies else None),
            "journal": str(self.folder / f"{number}.journal"),
            "users": self.plan.users,
            "clients": self.plan.clients,
            "think": self.plan.think,
            "sql_timeout": self.plan.sql_timeout,
            "plant": self.plan.plant,
        }
        log_path = self.folder / f"{number}.log"
        with log_path.open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-W", "default", "-m", "tests.chaos.worker", json.dumps(options)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                cwd=TESTS.parent,
                env={**os.environ, "PYTHONPATH": str(TESTS.parent)},
            )
        self.workers.append(Worker(number, process, proxies, log_path))

    @property
    def calls(self) -> int:
        return self.gone + sum(worker.calls for worker in self.workers)

    def faults(self) -> dict[str, Callable[[], Awaitable[None]]]:
        """Return every fault that fits the plan, by name."""
        found: dict[str, Callable[[], Awaitable[None]]] = {
            "worker killed": self.kill_worker,
            "worker stopped": self.stop_worker,
        }
        behind = [name for name in ("redis", "sql") if name in self.workers[0].proxies]
        for server in behind:
            for mode in ("delay", "swallow", "deaf", "refuse", "reset"):
                found[f"{server} {mode}"] = functools.partial(self.through_proxy, server, mode)
        if self.redis is not None:
            found |= {
                "redis killed, empty": lambda: self.restart_redis("empty"),
                "redis killed, older dump": lambda: self.restart_redis("older"),
                "redis killed, newest dump": lambda: self.restart_redis("newest"),
            }
        found |= {
            "redis stopped": self.stop_redis,
            "redis flushed": lambda: self.command("FLUSHALL"),
            "redis scripts flushed": lambda: self.command("SCRIPT", "FLUSH"),
            "redis subscribers killed": lambda: self.command("CLIENT", "KILL", "TYPE", "pubsub"),
            "redis clients killed": lambda: self.command("CLIENT", "KILL", "TYPE", "normal"),
        }
        if self.group is not None:
            found["redis primary killed"] = self.kill_primary
        if isinstance(self.group, Cluster):
            found["redis slot moved"] = self.move_slot
        if self.database is not None:
            found |= {"sql killed": self.kill_database, "sql stopped": self.stop_database}
        if self.plan.faults is not None:
            found = {name: found[name] for name in self.plan.faults}
        return found

    async def through_proxy(self, server: str, mode: str) -> None:
        # Now and then all processes lose the server, mostly some do.
        count = self.random.choice((1, 1, 2, len(self.workers)))
        hit = [w.proxies[server] for w in self.random.sample(self.workers, count)]
        if mode == "reset":
            for proxy in hit:
                proxy.reset()
            return
        seconds = self.random.uniform(0.3, 4.0)
        for proxy in hit:
            await proxy.set(Mode(mode), self.random.choice((0.002, 0.02, 0.3)))
        await asyncio.sleep(seconds)
        for proxy in hit:
            await proxy.set(Mode.PASS)

    async def restart_redis(self, what: str) -> None:
        async with self.busy["redis"]:
            assert self.redis is not None
            dump = self.redis.folder / "dump.rdb"
            older = self.dump
            if what != "empty":
                with contextlib.suppress(redis.RedisError):
                    await asyncio.to_thread(self._ask, "SAVE")
                    self.dump = dump.read_bytes()
            if what == "newest":
                await asyncio.sleep(self.random.uniform(0.0, 1.0))  # what it loses
            await asyncio.to_thread(self.redis.kill)
            if what == "empty":
                dump.unlink(missing_ok=True)
            elif what == "older" and older is not None:
                dump.write_bytes(older)
            await asyncio.sleep(self.random.choice((0.0, 0.0, 0.5, 3.0)))
            await asyncio.to_thread(self.redis.start)

    def _primaries(self) -> list[Server]:
        """Return the servers that take writes now."""
        if self.redis is not None:
            return [self.redis]
        if isinstance(self.group, Cluster):
            return list({id(each): each for each in map(self.group.owner, _SLOTS)}.values())
        assert self.group is not None
        return [self.group.primary()]

    async def stop_redis(self) -> None:
        async with self.busy["redis"]:
            server = self.random.choice(await asyncio.to_thread(self._primaries))
            server.stop()
            await asyncio.sleep(self.random.uniform(0.2, 4.0))
            server.cont()

    async def kill_primary(self) -> None:
        """End a primary, wait until its replica took over, and bring it back as a replica."""
        async with self.busy["redis"]:
            server = self.random.choice(await asyncio.to_thread(self._primaries))
            await asyncio.to_thread(server.kill)
            for _ in range(100):
                await asyncio.sleep(0.1)
                with contextlib.suppress(Exception):
                    if server not in await asyncio.to_thread(self._primaries):
                        break
            else:
                raise RuntimeError("no replica took over")
            await asyncio.sleep(self.random.uniform(0.0, 1.0))
            await asyncio.to_thread(server.start)
            await asyncio.sleep(2.0)  # until it has the data again

    async def move_slot(self) -> None:
        async with self.busy["redis"]:
            assert isinstance(self.group, Cluster)
            bucket = self.random.choice("0123456789abcdef")
            with contextlib.suppress(redis.RedisError):
                slot = await asyncio.to_thread(self.group.slot, f"{{{bucket}}}")
                await asyncio.to_thread(self.group.move, slot)

    async def command(self, *words: str) -> None:
        async with self.busy["redis"]:
            for server in await asyncio.to_thread(self._primaries):
                with contextlib.suppress(redis.RedisError):
                    await asyncio.to_thread(self._ask, *words, server=server)

    def _ask(self, *words: str, server: Server | None = None) -> Any:
        target = server or self.redis
        assert target is not None
        with redis.Redis(port=target.port, socket_timeout=5, protocol=2) as client:
            return client.execute_command(*words)

    async def kill_database(self) -> None:
        async with self.busy["sql"]:
            database = self.database
            assert database is not None and database.process is not None
            send(tree(database.process.pid), signal.SIGKILL)
            await asyncio.to_thread(database.process.wait)
            await asyncio.sleep(self.random.choice((0.0, 0.5, 2.0)))
            for _ in range(50):
                # Its shared memory is in use until the last of its processes is gone.
                with contextlib.suppress(RuntimeError):
                    await asyncio.to_thread(database.start)
                    return
                await asyncio.sleep(0.2)
            raise RuntimeError("the database did not come back")

    async def stop_database(self) -> None:
        async with self.busy["sql"]:
            assert self.database is not None and self.database.process is not None
            pids = tree(self.database.process.pid)
            send(pids, signal.SIGSTOP)
            await asyncio.sleep(self.random.uniform(0.2, 3.0))
            send(pids, signal.SIGCONT)

    async def kill_worker(self) -> None:
        worker = self.random.choice(self.workers)
        self.workers.remove(worker)
        worker.process.kill()
        await worker.process.wait()
        await worker.reading
        self.gone += worker.calls
        for proxy in worker.proxies.values():
            await proxy.close()
        await self.spawn()

    async def stop_worker(self) -> None:
        worker = self.random.choice(self.workers)
        with contextlib.suppress(ProcessLookupError):
            worker.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(self.random.uniform(0.3, 4.0))
        with contextlib.suppress(ProcessLookupError):
            worker.process.send_signal(signal.SIGCONT)

    async def attack(self) -> None:
        """One fault after the other, now and then two at a time, each at least once in its turn."""
        faults = self.faults()
        running: set[asyncio.Task[None]] = set()
        order: list[str] = []
        try:
            while True:
                await asyncio.sleep(self.random.uniform(0.1, 1.0))
                running = {task for task in running if not _ended(task)}
                if len(running) >= 2:
                    continue
                if not order:
                    order = self.random.sample(list(faults), len(faults))
                name = order.pop()
                self.done[name] = self.done.get(name, 0) + 1
                running.add(asyncio.create_task(faults[name]()))
        finally:
            # Whatever is broken is made whole by the fault itself.
            for task in running:
                await task

    async def load(self) -> None:
        """Let the workers work under attack until the calls are made."""
        plan, start, said = self.plan, time.monotonic(), 0.0
        attack = asyncio.create_task(self.attack())
        while self.calls < plan.operations and time.monotonic() - start < plan.seconds:
            await asyncio.sleep(0.2)
            if attack.done():
                attack.result()
            for worker in self.workers:
                silent = time.monotonic() - worker.heard
                if silent > (_SILENT_SECONDS if worker.ready.is_set() else _START_SECONDS):
                    state = await worker.diagnose()
                    text = worker.log.read_text(errors="replace")[-20_000:]
                    raise RuntimeError(f"worker {worker.number} is silent ({state})\n{text}")
            if time.monotonic() - said > 5:
                said = time.monotonic()
                plan.say(
                    f"{said - start:5.0f} s  {self.calls:7d} calls  {sum(self.done.values()):4d}"
                    f" faults  {self.started} processes"
                )
        attack.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await attack

    async def finish(self) -> Report:
        """Let everything come to rest, read everything, and judge."""
        for worker in self.workers:
            await worker.tell("rest", "rested", 60)
        await asyncio.sleep(3.5)  # trust, and what a repair takes
        for worker in self.workers:
            await worker.tell("final", "done", 60)
            await worker.process.wait()
        stored = {}
        async with SQLStore(self.sql_url(), history_limit=None) as store:
            users = [f"user-{number}" for number in range(self.plan.users)]
            for user, record in (await store.read_many(users)).items():
                history = await store.get_history(user, 10**6)
                stored[user] = Stored(
                    record.version,
                    None if record.snapshot is None else record.snapshot.updated_at_unix_ms,
                    [each.updated_at_unix_ms for each in history],
                )
        histories = {
            number: read(self.folder / f"{number}.journal")
            for number in range(1, self.started + 1)
        }
        report = check(histories, stored, bound=self.plan.bound)
        report.figures["faults"] = dict(sorted(self.done.items()))
        self._look_at_workers(report, histories)
        return report

    def _look_at_workers(self, report: Report, histories: dict[int, list[list[Any]]]) -> None:
        slowest: dict[str, float] = {}
        hits = misses = 0
        for entries in histories.values():
            for entry in entries:
                if entry[0] != "m":
                    continue
                for name, seconds in entry[1].get("slowest", {}).items():
                    slowest[name] = round(max(seconds, slowest.get(name, 0.0)), 2)
                figures = entry[1].get("figures", {})
                hits += figures.get("stack.inner/reads/hit", 0)
                misses += figures.get("stack.inner/reads/miss", 0)
                for message in entry[1].get("unhandled", ()):
                    if _DRIVER_NOISE in message:
                        continue
                    report.broken("unhandled in the event loop", "-", message)
                if entry[1].get("tasks_left", 0):
                    report.broken("left tasks behind", "-", str(entry[1]))
        report.figures["slowest call (s)"] = slowest
        report.figures["L1 hits"] = f"{hits} of {hits + misses} reads of those that ended"
        for worker in self.workers:
            if worker.process.returncode != 0:
                report.broken("worker failed", "-", f"{worker.number}: {worker.process.returncode}")
        for number in range(1, self.started + 1):
            text = (self.folder / f"{number}.log").read_text(errors="replace")
            for word, rule in _COMPLAINTS.items():
                if word in text:
                    at = text.index(word)
                    report.broken(rule, "-", text[max(0, at - 200) : at + 2_000])
        report.figures["violations"] = len(report.violations)

    async def close(self) -> None:
        for worker in self.workers:
            with contextlib.suppress(ProcessLookupError):
                worker.process.kill()
            await worker.process.wait()
            await worker.reading
            for proxy in worker.proxies.values():
                await proxy.close()
        for server in (self.redis, self.bouncer, self.database):
            if server is not None:
                if server.process is not None:
                    send(tree(server.process.pid), signal.SIGCONT)
                server.close()
        if self.group is not None:
            self.group.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _ended(task: asyncio.Task[None]) -> bool:
    if not task.done():
        return False
    task.result()
    return True


async def run(plan: Plan) -> Report:
    """Do what the plan says; return the verdict."""
    fleet = Fleet(plan)
    try:
        await fleet.start()
        await fleet.load()
        return await fleet.finish()
    finally:
        await fleet.close()
