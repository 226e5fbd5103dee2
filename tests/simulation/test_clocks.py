"""A Redis server whose clock is set: nothing is believed for longer, nobody waits for the dead."""

from __future__ import annotations

import random
from typing import Any

import pytest

from layered_store.coherence.redis_tier import scripts
from layered_store.testing.explore import explore
from tests.simulation.clocks import WallClock
from tests.simulation.network import Network
from tests.simulation.redis_model import RedisServer

GUARD, REPAIR, LOCK, LEASES = b"{0}:guard", b"{0}:repair", b"{0}:repairer", b"{0}:leases"
GENERATION = b"g" * 16


class Scripted:
    """A server, and the shipped scripts run on it."""

    def __init__(self) -> None:
        chance = random.Random(1)
        loop: Any = None
        self.server = RedisServer(Network(loop, chance, 0.0, print), WallClock(chance))

    def run(self, name: str, keys: list[bytes], *args: Any) -> Any:
        text = scripts.source(
            getattr(scripts, name), self.server.run_id, sharded=False, forgets=True
        )
        return self.server.execute(("EVAL", text, len(keys), *keys, *args))

    def begin(self, me: str) -> Any:
        keys = [GUARD, REPAIR, LOCK]
        return self.run("BEGIN", keys, me, "0", 750, GENERATION, b"channel")

    def stamp(self, me: str, begun: Any, number: int) -> Any:
        until = int(begun[0]) + 2_000
        keys = [GUARD, REPAIR, LOCK]
        before = begun[3]
        return self.run(
            "STAMP", keys, me, GENERATION, "1", until, number, 2_000, 750, before
        )

    def ping(self, me: str) -> int:
        left: int = self.run("PING", [LEASES, GUARD], me, 1_000, 0, 1, b"channel")
        return left


def on_a_loop(check: Any) -> None:
    async def scenario() -> None:
        check(Scripted())

    explore(scenario, schedules=1)


@pytest.mark.parametrize("back", [1.0, 300.0])
def test_trust_does_not_outlive_a_clock_that_is_set_back(back: float) -> None:
    """A guard that would last longer than any pass gives it is gone for good."""

    def check(redis: Scripted) -> None:
        begun = redis.begin("a")
        assert redis.stamp("a", begun, 1) == 1
        assert 0 < redis.ping("a") <= 2_000
        redis.server.clock.set(-back)
        assert redis.ping("a") == 0
        redis.server.clock.set(back)
        assert redis.ping("a") == 0

    on_a_loop(check)


def test_a_lock_does_not_outlive_a_clock_that_is_set_back() -> None:
    """The process that held it may be dead; another repairs in its place."""

    def check(redis: Scripted) -> None:
        assert redis.begin("dead")
        assert redis.begin("b") is None or redis.begin("b") == []
        redis.server.clock.set(-300)
        assert redis.begin("b")

    on_a_loop(check)


@pytest.mark.parametrize("seconds", [300.0, -300.0])
def test_an_erasure_waits_for_leases_that_look_ended(seconds: float) -> None:
    """A register whose clock was set begins anew: whoever reads it waits for a whole lease."""

    def check(redis: Scripted) -> None:
        redis.ping("reader")
        now, born, pairs = redis.run("HOLDERS", [LEASES])
        assert b"reader" in pairs
        redis.server.clock.set(seconds)
        now, born, pairs = redis.run("HOLDERS", [LEASES])
        assert int(now) // 1000 - int(born) == 0
        assert b"reader" not in pairs

    on_a_loop(check)


def test_a_register_of_nobody_is_no_reason_to_wait() -> None:
    """Without readers that hold leases nothing need begin anew."""

    def check(redis: Scripted) -> None:
        redis.run("HOLDERS", [LEASES])
        redis.server.clock.set(300)
        now, born, _ = redis.run("HOLDERS", [LEASES])
        assert int(now) // 1000 - int(born) == 300_000

    on_a_loop(check)


def test_stale_copies_do_not_outlive_a_clock_that_is_set_back() -> None:
    """For how long the tier is out of trust is not known then, so it gives nothing."""

    def check(redis: Scripted) -> None:
        begun = redis.begin("a")
        redis.stamp("a", begun, 1)
        value = b"LS\x01S" + bytes(7) + b"\x05" + GENERATION + b"\x00state"
        redis.server.data[b"{0}:s:1"] = (value, None)
        keys = [b"{0}:s:1", REPAIR]
        assert redis.run("STALE", keys, 10_000) == value
        redis.server.clock.set(-300)
        assert redis.run("STALE", keys, 10_000) is None
        redis.server.clock.set(300)
        assert redis.run("STALE", keys, 10_000) is None

    on_a_loop(check)
