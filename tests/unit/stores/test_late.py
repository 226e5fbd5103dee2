"""Late writes to Redis, decided by what a server tells, without a server."""

from __future__ import annotations

from typing import Any

import pytest

from layered_store.call import next_order
from layered_store.errors import UnavailableError
from layered_store.stores.erasures import KnownErasures
from layered_store.stores.redis.late import Write, settle
from layered_store.stores.redis.scripts import NOW
from layered_store.testing.clock import FakeClock

ZERO = 1_700_000_000_000_000


class Told:
    """A store whose server answers after ``there`` seconds, and is heard ``back`` seconds later."""

    name = "RedisStore"

    def __init__(self, clock: FakeClock, there: float, back: float) -> None:
        self.clock = clock
        self.there = there
        self.back = back
        self.asked = 0
        self.stored: list[int] = []

    def now_us(self) -> int:
        return int(ZERO + self.clock.monotonic() * 1e6)

    def key(self, digest: bytes) -> bytes:
        return digest

    def upsert_parts(self, write: Write, *, follows: int) -> Any:
        return (write.digest,), (follows,)

    async def run_script(
        self, script: Any, keys: Any, args: Any = (), *, operation: str, write: bool = True
    ) -> int:
        await self.clock.advance(self.there)
        told = self.now_us()
        if script is NOW:
            self.asked += 1
            assert not write
        else:
            self.stored += args
            told = 1
        await self.clock.advance(self.back)
        return told


async def met(store: Told, known: KnownErasures, write: Write, erased_at: int) -> bool:
    """Settle a write whose first message met an erasure of version 7."""
    sent = store.clock.monotonic()
    await store.clock.advance(store.there)
    reply = [7, erased_at, store.now_us()]
    await store.clock.advance(store.back)
    return await settle(store, known, write, reply, sent, "upsert_latest")  # type: ignore[arg-type]


def begun(clock: FakeClock) -> Write:
    return Write(b"d", b"", b"i" * 16, clock.monotonic(), next_order(), first=True)


@pytest.mark.parametrize(
    ("after", "stored", "asked"),
    [(0.5, False, 0), (-0.5, True, 0), (0.0005, False, 3), (-0.0005, True, 3)],
)
async def test_what_a_round_trip_hides_is_asked_for_and_then_guessed(
    after: float, stored: bool, asked: int
) -> None:
    """An erasure half a second away is told apart at once; half a millisecond is guessed."""
    clock = FakeClock()
    await clock.advance(100)
    store, known = Told(clock, 0.002, 0.002), KnownErasures(clock)
    write = begun(clock)
    erased_at = int(ZERO + (clock.monotonic() + after) * 1e6)
    await clock.advance(max(0.0, after))
    assert await met(store, known, write, erased_at) is stored
    assert store.stored == ([7] if stored else [])
    assert store.asked == asked


@pytest.mark.parametrize(("there", "back"), [(0.2, 0.0), (0.0, 0.2)])
async def test_what_cannot_be_told_fails_once(there: float, back: float) -> None:
    """On a slow way the write fails, stored nowhere; the next one is known to follow."""
    clock = FakeClock()
    await clock.advance(100)
    store, known = Told(clock, there, back), KnownErasures(clock)
    erased_at = int(ZERO + (clock.monotonic() + there - back) * 1e6)
    write = begun(clock)
    with pytest.raises(UnavailableError, match="too close together") as caught:
        await met(store, known, write, erased_at)
    assert (caught.value.operation, caught.value.layer) == ("upsert_latest", "RedisStore")
    assert not caught.value.outcome_unknown
    assert store.stored == []
    with pytest.raises(UnavailableError):
        await met(store, known, write, erased_at)
    assert await met(store, known, begun(clock), erased_at)
    assert store.stored == [7]


async def test_an_erasure_of_this_process_needs_no_clock() -> None:
    """What was begun before this process erased the user is dropped, whatever the clocks say."""
    clock = FakeClock()
    store, known = Told(clock, 0.2, 0.2), KnownErasures(clock)
    early = begun(clock)
    known.made(b"d", 7, next_order())
    late = begun(clock)
    for write, stored in ((early, False), (late, True)):
        for erased_at in (ZERO, ZERO + 10**9):
            assert await met(store, known, write, erased_at) is stored
    assert store.asked == 0


async def test_a_clock_that_was_set_back_hinders_one_write() -> None:
    """An erasure of the future fails the write that met it; who calls again comes after it."""
    clock = FakeClock()
    await clock.advance(100)
    store, known = Told(clock, 0.001, 0.001), KnownErasures(clock)
    erased_at = int(ZERO + (clock.monotonic() + 300) * 1e6)
    with pytest.raises(UnavailableError, match="clock was set"):
        await met(store, known, begun(clock), erased_at)
    assert store.stored == []
    assert await met(store, known, begun(clock), erased_at)
    assert store.stored == [7]


@pytest.mark.parametrize("told", [b"OK", None, [1], True])
async def test_a_server_that_does_not_tell_its_time_fails_the_write(told: object) -> None:
    """As any other answer that is none; nothing was stored."""

    class Strange(Told):
        async def run_script(self, script: Any, *args: Any, **kwargs: Any) -> Any:
            return told if script is NOW else await super().run_script(script, *args, **kwargs)

    clock = FakeClock()
    await clock.advance(100)
    store, known = Strange(clock, 0.002, 0.002), KnownErasures(clock)
    erased_at = int(ZERO + clock.monotonic() * 1e6)
    with pytest.raises(UnavailableError, match="does not answer as Redis") as caught:
        await met(store, known, begun(clock), erased_at)
    assert not caught.value.outcome_unknown
    assert store.stored == []


@pytest.mark.parametrize(
    "reply", [2, None, b"OK", [], [7, 1], [7, 1, 1, 1], [7, b"1", 1], [None, 1, 1], "1"]
)
async def test_a_reply_that_is_none_of_the_scripts_is_an_outage_with_an_unknown_end(
    reply: object,
) -> None:
    """What was written may stand; nothing is made of numbers that are not there."""
    clock = FakeClock()
    store: Any = Told(clock, 0.001, 0.001)
    with pytest.raises(UnavailableError) as caught:
        await settle(store, KnownErasures(clock), begun(clock), reply, 0.0, "upsert_latest")
    assert caught.value.outcome_unknown
    assert not store.asked and not store.stored
