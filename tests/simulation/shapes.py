"""The stacks that are simulated, and what is asked of each."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from layered_store.coherence import tombstones
from layered_store.coherence.redis_tier import tier
from layered_store.interface import StateStore
from layered_store.layers.bulkhead import Bulkhead
from layered_store.layers.cached import Cached
from layered_store.layers.circuit_breaker import CircuitBreaker
from layered_store.layers.fallback import Fallback
from layered_store.layers.metrics import Metrics
from layered_store.layers.retry import Retry
from layered_store.layers.timeout import Timeout
from layered_store.layers.write_through import WriteThrough
from layered_store.stores import memory
from layered_store.testing.explore import LoopClock
from tests.simulation.clocks import ProcessClock
from tests.simulation.loop import Process
from tests.simulation.network import Network
from tests.simulation.redis_model import ModelRedis, Nodes
from tests.simulation.sql_model import Database, PlainStore, SqlStore

__all__ = ["SHAPES", "Parts", "Shape"]

CLOCK = LoopClock()


@dataclass
class Parts:
    """What a process builds its stack from.

    Args:
        process: the process.
        network: its way to the servers.
        redis: the servers of the shared cache tier.
        database: the system of record.
        chance: decides what layers leave to chance.
    """

    process: Process
    network: Network
    redis: Nodes
    database: Database
    chance: random.Random
    sql: Any = None

    @property
    def clock(self) -> ProcessClock:
        """The process's clock."""
        return self.process.clock

    def tier(self, **options: Any) -> ModelRedis:
        """Return this process's store in the shared Redis."""
        return ModelRedis(self.redis, self.network, self.process, **options)

    def origin(self) -> SqlStore:
        """Return this process's system of record."""
        self.sql = SqlStore(self.database, self.network, self.process)
        return self.sql

    def plain(self) -> PlainStore:
        """Return the database as a store without versions."""
        self.sql = PlainStore(self.database, self.network, self.process)
        return self.sql

    def cached(self, inner: StateStore, **options: Any) -> Cached:
        """Return a cache whose chance is the run's."""
        return Cached(inner, clock=self.clock, random=self.chance, **options)


@dataclass(frozen=True)
class Shape:
    """A stack and what is asked of it.

    Args:
        name: what ``--shape`` takes.
        build: makes the stack of one process.
        processes: how many there are.
        bound: how old an answer may be, in seconds; None: the callers' view alone is checked, and
            must be that of one variable per user.
        batches: share of calls that are batches.
        servers: what may fail; see :func:`draw_plan`.
        slowest: how long something may hold up a call, in seconds.
        nodes: how many servers Redis is: several are a cluster.
        weight: how often it comes in a round of all shapes.
        patches: entered into an exit stack for the length of a run.
    """

    name: str
    build: Callable[[Parts], StateStore] = field(repr=False)
    processes: int = 3
    bound: float | None = 2.0
    batches: float = 0.1
    servers: tuple[str, ...] = ("redis", "sql", "clocks")
    slowest: float = 2.5
    nodes: int = 1
    weight: int = 1
    patches: Callable[[contextlib.ExitStack], None] = field(default=lambda _: None, repr=False)


def _resilient(parts: Parts, store: StateStore, seconds: float) -> StateStore:
    return Retry(
        CircuitBreaker(
            Timeout(store, seconds=seconds, clock=parts.clock),
            minimum_calls=5,
            open_for=0.5,
            clock=parts.clock,
            random=parts.chance,
        ),
        attempts=3,
        clock=parts.clock,
        random=parts.chance,
    )


def _three_tiers(parts: Parts) -> StateStore:
    return parts.cached(parts.tier(), fallback=parts.origin(), ttl=60)


def _without_l1(parts: Parts) -> StateStore:
    return WriteThrough(parts.tier(), origin=parts.origin(), clock=parts.clock)


def _resilient_legs(parts: Parts) -> StateStore:
    origin = Bulkhead(_resilient(parts, parts.origin(), 0.4), max_in_flight=8, max_waiting=100)
    tier = _resilient(parts, parts.tier(), 0.1)
    return Metrics(
        parts.cached(WriteThrough(tier, origin=origin, clock=parts.clock), ttl=60),
        name="simulated",
        clock=parts.clock,
    )


def _options(parts: Parts) -> StateStore:
    return parts.cached(
        parts.tier(),
        fallback=parts.origin(),
        ttl=1.5,
        max_entries=2,
        negative_ttl=1.0,
        stale_if_error=3.0,
        refresh_ahead=0.4,
        ttl_jitter=0.3,
    )


def _two_levels(parts: Parts) -> StateStore:
    inner = parts.cached(parts.tier(), fallback=parts.origin(), ttl=60)
    # Its entries end, and come again, many times in a run.
    return parts.cached(inner, ttl=0.3, max_entries=2)


def _in_memory(parts: Parts) -> StateStore:
    return parts.cached(parts.plain(), ttl=0.5, negative_ttl=0.3, refresh_ahead=0.5)


def _unversioned(parts: Parts) -> StateStore:
    # A tier without versions in front of a store without versions, one process.
    tier = Timeout(_Hidden(parts.tier()), seconds=0.2, clock=parts.clock)
    origin = Retry(parts.plain(), attempts=2, clock=parts.clock, random=parts.chance)
    return parts.cached(WriteThrough(tier, origin=origin, clock=parts.clock), ttl=0.5)


def _two_levels_alone(parts: Parts) -> StateStore:
    inner = Retry(
        parts.cached(parts.plain(), ttl=2.0, negative_ttl=2.0),
        attempts=2,
        clock=parts.clock,
        random=parts.chance,
    )
    return parts.cached(inner, ttl=1.0)


def _redis_alone(parts: Parts) -> StateStore:
    return parts.cached(
        _resilient(parts, parts.tier(history_limit=100), 0.3), ttl=0.5, negative_ttl=0.2
    )


def _fallback(parts: Parts) -> StateStore:
    # Both sides show the same database: one over a worse way, so that the rules stay checkable.
    secondary = SqlStore(parts.database, parts.network, parts.process)
    return Fallback(_resilient(parts, parts.origin(), 0.2), secondary=secondary)


class _Hidden(StateStore):
    """A store that tells nobody what else it can do."""

    def __init__(self, store: StateStore) -> None:
        self._store = store
        self.get_latest = store.get_latest  # type: ignore[method-assign]
        self.upsert_latest = store.upsert_latest  # type: ignore[method-assign]
        self.delete = store.delete  # type: ignore[method-assign]
        self.get_latest_many = store.get_latest_many  # type: ignore[method-assign]
        self.aclose = store.aclose  # type: ignore[method-assign]

    async def get_latest(self, user_id: str) -> Any:
        raise NotImplementedError

    async def upsert_latest(self, snapshot: Any) -> None:
        raise NotImplementedError


def _short_lives(stack: contextlib.ExitStack) -> None:
    # A week in three seconds; what may be late by how much stays in proportion to what is slow.
    for owner, name, value in (
        (memory, "TOMBSTONE_SECONDS", 3.0),
        (tombstones, "LATEST_SECONDS", 1.5),
        (tier, "_COPY_MS", 3_000),
    ):
        stack.enter_context(patch.object(owner, name, value))


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("three_tiers", _three_tiers),
        Shape("without_l1", _without_l1, weight=2),
        Shape("resilient", _resilient_legs),
        Shape("options", _options, bound=2.0 + 1.5 + 3.0),
        Shape("batches", _three_tiers, batches=0.7),
        Shape("two_levels", _two_levels),
        Shape("cluster", _three_tiers, servers=("redis", "sql", "cluster", "clocks"), nodes=2),
        Shape("forgetful", _three_tiers, slowest=1.0, patches=_short_lives),
        Shape("memory", _in_memory, processes=1, bound=None, servers=("sql",), weight=2),
        Shape("unversioned", _unversioned, processes=1, bound=None, batches=0.3, weight=2),
        Shape("nested", _two_levels_alone, processes=1, bound=None, servers=("sql",), weight=2),
        # A Redis of its own knows a repeat among a user's last 16 writes, so none comes late
        # by more than a few.
        Shape(
            "redis",
            _redis_alone,
            processes=1,
            bound=None,
            servers=("redis",),
            slowest=0.1,
            weight=2,
        ),
        Shape("fallback", _fallback, processes=1, bound=None, servers=("sql",)),
    )
}
"""By name."""
