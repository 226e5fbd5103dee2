"""The application's tests: the stack of production, without its servers and without waiting.

Run them with ``pytest examples/testing_an_app``.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from app import Greeter

from layered_store import ErasureIncompleteError, HealthStatus, MemoryStore, load_stack
from layered_store.testing import on_clock, record

pytest_plugins = ["layered_store.testing.plugin"]  # fake_clock and faults

STACK = Path(__file__).with_name("stack.toml")


class World:
    """Production's stack on a clock that stands still, with memory in place of both servers."""

    def __init__(self, clock, faults):
        self.clock = clock
        self.redis = faults(MemoryStore(clock=clock), plays="redis")
        self.database = faults(MemoryStore(clock=clock), plays="sql")
        stack = load_stack(STACK, overrides={"cache": self.redis, "truth": self.database})
        self.stack = on_clock(stack, clock)
        self.app = Greeter(self.stack)

    async def during(self, seconds, call):
        """Run a call while the clock moves, and return what it returned."""
        task = asyncio.ensure_future(call)
        await self.clock.advance(seconds)
        return await task


@pytest.fixture
def world(fake_clock, faults):
    return World(fake_clock, faults)


async def test_greets_as_people_like_it(world):
    assert await world.app.greet("ada") == "Hello."
    await world.app.rate("ada", 0.9)
    assert await world.app.greet("ada") == "Hey, good to see you!"
    await world.app.forget("ada")
    assert await world.app.greet("ada") == "Hello."


async def test_the_second_greeting_asks_no_server(world):
    await world.app.rate("ada", 0.9)
    async with record(world.stack) as path:
        await world.app.greet("ada")
        await world.clock.advance(61)
        await world.app.greet("ada")
    assert path == ["cached hit", "cached miss, circuit closed, redis hit"]


async def test_a_hanging_redis_costs_50_ms_and_then_nothing(world):
    for name in ("ada", "grace", "linus", "edsger"):
        await world.app.rate(name, 0.9)
    await world.clock.advance(61)
    world.redis.outage("hang")
    async with record(world.stack) as path:
        for name in ("ada", "grace", "linus"):
            assert await world.during(0.05, world.app.greet(name)) == "Hey, good to see you!"
        assert await world.app.greet("edsger") == "Hey, good to see you!"  # the clock stands still
    slow = "cached miss, circuit closed, redis timeout, sql hit"
    assert path == [slow, slow, slow, "cached miss, circuit open, sql hit"]


async def test_people_are_greeted_while_the_database_is_away(world):
    await world.app.rate("ada", 0.9)
    await world.clock.advance(61)
    world.redis.outage()
    world.database.outage()
    async with record(world.stack) as path:
        assert await world.during(10, world.app.greet("ada")) == "Hey, good to see you!"
        assert await world.during(10, world.app.greet("nobody")) == "Hello."
    assert path[0].startswith("cached stale")
    assert path[1].outcome == "unavailable"
    assert (await world.stack.health_report()).status is HealthStatus.UNHEALTHY


async def test_a_lost_answer_is_written_once(world):
    world.database.fail(fault="error_after", operations=["upsert_latest"])
    await world.during(5, world.app.rate("ada", 0.9))
    assert len(await world.stack.get_history("ada", 10)) == 1


async def test_forgetting_says_when_it_is_not_finished(world):
    await world.app.rate("ada", 0.9)
    with world.redis.outage(), pytest.raises(ErasureIncompleteError):
        await world.during(10, world.app.forget("ada"))
    await world.app.forget("ada")
    assert await world.app.greet("ada") == "Hello."
