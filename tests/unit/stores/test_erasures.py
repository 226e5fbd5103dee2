"""Which came first, a write or an erasure: told by clocks that somebody sets, or refused."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from layered_store.call import next_order
from layered_store.errors import UnavailableError
from layered_store.stores.erasures import Began, KnownErasures
from layered_store.testing.clock import FakeClock

ZERO = 1_700_000_000_000_000
"""The database's time, in microseconds, when our clock reads 0."""


def answer(clock: FakeClock, ahead: float = 0.0, trip: float = 0.001) -> Began:
    """Return what one answer of a database teaches, whose clock was set ahead."""
    now = clock.monotonic()
    began = Began()
    began.learn(now - trip, now, int(ZERO + (now - trip / 2 + ahead) * 1e6))
    return began


def at(seconds: float, ahead: float = 0.0) -> int:
    return int(ZERO + (seconds + ahead) * 1e6)


async def test_durations_tell_the_order() -> None:
    """A write that began before an erasure is late, one that began after it is not."""
    clock = FakeClock()
    known = KnownErasures(clock)
    await clock.advance(10)
    began = answer(clock)
    start = clock.monotonic()
    assert known.before(start - 5, at(start - 3), began) is True
    assert known.before(start - 2, at(start - 3), began) is False
    assert known.before(start - 3, at(start - 3), began) is None
    assert began.overlaps(start - 3, at(start - 3), 0.01)
    assert not began.overlaps(start - 3, at(start - 3.1), 0.01)


async def test_rates_of_clocks_make_no_order() -> None:
    """What clocks may run apart since the write began is no order."""
    clock = FakeClock()
    await clock.advance(100)
    now = clock.monotonic()
    began = answer(clock, trip=0.0)
    assert began.before(now - 60, at(now - 60.01)) is None
    assert began.before(now - 60, at(now - 60.02)) is False
    assert began.before(now - 60, at(now - 59.98)) is True


async def test_an_erasure_in_the_future_is_refused_once() -> None:
    """The database's clock was set back: a write is not dropped as if it were late, it fails."""
    clock = FakeClock()
    known = KnownErasures(clock)
    await clock.advance(10)
    erased_at = at(clock.monotonic(), ahead=300)
    with pytest.raises(UnavailableError, match="clock was set") as refused:
        known.before(clock.monotonic(), erased_at, answer(clock))
    assert not refused.value.retryable
    # Whoever calls again after it was met comes after it, whatever clocks say.
    known.saw(b"digest", 7)
    assert known.knows(b"digest", 7, 2**60) is False


@pytest.mark.parametrize("ahead", [-300.0, -0.4, 0.4, 300.0])
async def test_a_clock_set_during_a_write_is_noticed(ahead: float) -> None:
    """Forward it would let a late write pass, back it would drop one in time; both are refused."""
    clock = FakeClock()
    known = KnownErasures(clock)
    await clock.advance(1_000)
    known.learn(answer(clock))
    started = clock.monotonic()
    await clock.advance(0.1)
    erased_at = at(clock.monotonic() + (-0.05 if ahead < 0 else 0.05))
    if ahead < 0:
        erased_at = at(started - 0.05)
    await clock.advance(0.1)
    with pytest.raises(UnavailableError, match="clock was set"):
        known.before(started, erased_at, answer(clock, ahead))


async def test_a_clock_set_long_ago_hinders_nobody() -> None:
    """Erasures and writes after it are told apart as before."""
    clock = FakeClock()
    known = KnownErasures(clock)
    await clock.advance(1_000)
    known.learn(answer(clock))
    await clock.advance(1)
    known.learn(answer(clock, 300))
    await clock.advance(10)
    now = clock.monotonic()
    assert known.before(now - 1, at(now - 2, 300), answer(clock, 300)) is False
    assert known.before(now - 2, at(now - 1, 300), answer(clock, 300)) is True
    # One of long before it, too: it is out of doubt on either clock.
    assert known.before(now - 1, at(now - 900), answer(clock, 300)) is False


async def test_times_that_came_twice_are_refused() -> None:
    """After a clock was set back its times mean two moments, until it is past where it was."""
    clock = FakeClock()
    known = KnownErasures(clock)
    await clock.advance(1_000)
    known.learn(answer(clock))
    erased_at = at(clock.monotonic())
    await clock.advance(1)
    known.learn(answer(clock, -20))
    await clock.advance(19.5)
    with pytest.raises(UnavailableError, match="clock was set"):
        known.before(clock.monotonic() - 1, erased_at, answer(clock, -20))
    await clock.advance(10)
    assert known.before(clock.monotonic() - 1, erased_at, answer(clock, -20)) is False


async def test_what_was_over_before_its_clock_was_set_is_told_apart() -> None:
    """On either clock the write comes first, and its erasure's time did not come twice."""
    clock = FakeClock()
    known = KnownErasures(clock)
    await clock.advance(1_000)
    known.learn(answer(clock))
    await clock.advance(1)
    known.learn(answer(clock, -20))
    assert known.before(900, at(950), answer(clock, -20)) is True


async def test_what_clocks_run_apart_in_hours_is_no_clock_that_was_set() -> None:
    """200 microseconds in a second are; more is one."""
    for ahead, was_set in ((1.9, False), (-1.9, False), (2.1, True), (-2.1, True)):
        clock = FakeClock()
        known = KnownErasures(clock)
        await clock.advance(100)
        known.learn(answer(clock))
        await clock.advance(10_000)
        known.learn(answer(clock, ahead))
        assert (known._old is not None) is was_set, ahead


async def test_slow_answers_are_no_clock_that_was_set() -> None:
    """An answer that took long tells little, and is not taken for more."""
    clock = FakeClock()
    known = KnownErasures(clock)
    await clock.advance(100)
    for trip in (0.001, 3.0, 0.5, 0.002):
        await clock.advance(1)
        known.learn(answer(clock, trip=trip))
    assert known._old is None


async def test_the_earliest_beginning_is_never_later_than_the_true_one() -> None:
    """What is told to the server errs towards earlier, by the way there and the clocks' rates."""
    clock = FakeClock()
    await clock.advance(100)
    known = KnownErasures(clock)
    assert known.earliest(clock.monotonic()) == 0
    known.learn(answer(clock, trip=0.01))
    now = clock.monotonic()
    assert at(now) - 5_100 < known.earliest(now) <= at(now) - 4_900
    for apart in (-50.0, 50.0):
        behind = at(now + apart) - known.earliest(now + apart)
        assert 10_000 <= behind < 15_100


async def test_within_a_short_round_trip_the_order_is_guessed() -> None:
    """As if both ways took equally long; beyond it there is no guess."""
    clock = FakeClock()
    await clock.advance(100)
    known = KnownErasures(clock)
    now = clock.monotonic()
    assert known.guess(now, at(now), 5_000) is None
    known.learn(answer(clock, trip=0.004))
    assert known.guess(now, at(now + 0.001), 5_000) is True
    assert known.guess(now, at(now - 0.001), 5_000) is False
    assert known.guess(now, at(now + 0.001), 3_000) is None
    later = now + 10  # what clocks may run apart until then is no longer short
    assert known.guess(later, at(later + 0.001), 5_000) is None


async def test_of_its_own_erasures_a_process_knows_the_order() -> None:
    """Of this very erasure; nothing follows from it for another one of the user, or of others."""
    known = KnownErasures(FakeClock())
    before, made, after = next_order(), next_order(), next_order()
    known.made(b"u", 7, made)
    known.saw(b"u", 7)  # a write has met it: that takes nothing back
    assert known.knows(b"u", 7, before) is True
    assert known.knows(b"u", 7, after) is False
    assert known.knows(b"u", 8, before) is None
    assert known.knows(b"v", 7, before) is None
    assert known.known_before(b"u", after) == 7
    assert known.known_before(b"u", before) is None
    assert known.known_before(b"v", after) is None


async def test_what_begins_after_an_erasure_was_met_comes_after_it() -> None:
    """Since it was met first; what began before may be on either side."""
    known = KnownErasures(FakeClock())
    before = next_order()
    known.saw(b"u", 7)
    after = next_order()
    known.saw(b"u", 7)
    assert known.knows(b"u", 7, after) is False
    assert known.knows(b"u", 7, before) is None
    known.saw(b"u", 9)
    assert known.knows(b"u", 9, after) is None
    assert known.knows(b"u", 9, next_order()) is False


async def test_what_is_known_of_erasures_is_bounded() -> None:
    """By their number and by time; the newest are kept."""
    clock = FakeClock()
    known = KnownErasures(clock, seconds=30.0, most=3)
    for number in range(10):
        known.made(b"%d" % number, 1, number)
    assert list(known._known) == [b"7", b"8", b"9"]
    await clock.advance(20)
    known.made(b"7", 2, 10)
    await clock.advance(11)
    known.made(b"new", 1, 11)
    assert list(known._known) == [b"7", b"new"]


@dataclass
class Write:
    """A write of ``u`` that began at some time."""

    started: float
    order: int
    digest: bytes = b"u"


async def test_the_server_is_asked_for_its_time_until_the_order_is_clear_and_no_more() -> None:
    """A long round trip hides it, a short one tells; of an erasure of its own nobody is asked."""
    clock = FakeClock()
    await clock.advance(100)
    trips = [0.5, 0.5, 0.002, 0.002]
    asked = 0

    async def ask() -> int:
        nonlocal asked
        trip = trips[asked]
        asked += 1
        await clock.advance(trip / 2)
        now_us = at(clock.monotonic())
        await clock.advance(trip / 2)
        return now_us

    def write(ago: float) -> Write:
        return Write(clock.monotonic() - ago, next_order())

    known = KnownErasures(clock)
    late = write(2.0)
    erased_at = at(clock.monotonic() - 1.99)
    assert await known.began_before(late, 1, erased_at, answer(clock, trip=0.5), ask, 2) is None
    assert asked == 2
    # What began before it was met may be on either side still.
    assert await known.began_before(late, 1, erased_at, answer(clock, trip=0.5), ask, 2) is True
    assert asked == 3
    # What begins since it was met comes after it, however little the clocks tell.
    in_time = write(0.0)
    unclear = answer(clock, trip=9.0)
    assert await known.began_before(in_time, 1, erased_at, unclear, ask, 2) is False
    known.made(b"u", 2, next_order())
    erased_at = at(clock.monotonic())
    assert await known.began_before(in_time, 2, erased_at, answer(clock, trip=0.5), ask, 2) is True
    assert asked == 3
