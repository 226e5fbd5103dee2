"""Which came first, a write or the erasure of its user.

A write that began before an erasure must not bring the user back, one that began after it must not
be lost. Inside one process the order is known. Between processes only durations are compared: how
long ago the write began, and how long ago the erasure was, on the server's clock. That clock may be
set meanwhile; what then cannot be told is refused, never guessed.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from layered_store.call import next_order
from layered_store.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from layered_store.clock import Clock

__all__ = ["Began", "KnownErasures"]

_SLACK_US: Final = 1_000.0


class Write(Protocol):
    """A write, as far as its order matters."""

    @property
    def digest(self) -> bytes:
        """The user's."""
        ...

    @property
    def started(self) -> float:
        """When its caller began, on our clock."""
        ...

    @property
    def order(self) -> int:
        """Place of the beginning among the writes and erasures of this process."""
        ...


@dataclass(slots=True)
class Began:
    """When calls began, on the database's clock, as far as it can be told.

    Every answer with the database's time says that its clock read that at some moment between
    sending and receiving. Several such answers narrow the offset to the shortest round trip.

    Args:
        low: least microseconds to add to our seconds for the database's time.
        high: most of them.
        now_us: the database's time in the last answer.
        received: when that answer came.
        drift: microseconds by which the two clocks run apart in a second: crystals are within 100
            each; 0 for the clocks of one host.
    """

    low: float = field(default=float("-inf"))
    high: float = field(default=float("inf"))
    now_us: int = 0
    received: float = 0.0
    drift: float = 200.0

    def learn(self, sent: float, received: float, now_us: int) -> None:
        """Note that the database's clock read ``now_us`` between two of our moments."""
        self.now_us, self.received = now_us, received
        self.low = max(self.low, now_us - received * 1e6)
        self.high = min(self.high, now_us - sent * 1e6)

    def before(self, started: float, erased_at: int) -> bool | None:
        """Tell whether a call began before an erasure; None when that cannot be told."""
        # Neither rounding to microseconds nor the clocks' rates must make a tie look like an order.
        drift = self._drift(started)
        if started * 1e6 + self.low - drift >= erased_at - 1:
            return False
        if started * 1e6 + self.high + drift < erased_at - 1:
            return True
        return None

    def overlaps(self, started: float, erased_at: int, hidden: float) -> bool:
        """Tell whether a call began at most ``hidden`` seconds after an erasure, if after it."""
        return started * 1e6 + self.high + self._drift(started) <= erased_at + hidden * 1e6

    def _drift(self, started: float) -> float:
        return max(0.0, self.received - started) * self.drift


class KnownErasures:
    """What a process knows of erasures: those it made or saw, and when the clock was set.

    Bounded: what is forgotten is only looked at more closely.

    Args:
        clock: source of time.
        seconds: how long an erasure is remembered.
        most: how many are remembered.
    """

    def __init__(self, clock: Clock, seconds: float = 30.0, most: int = 100_000) -> None:
        self._clock = clock
        self._seconds = seconds
        self._most = most
        # By digest: the tombstone's version, when it was noted, its order, whether it is our own.
        self._known: OrderedDict[bytes, tuple[int, float, int, bool]] = OrderedDict()
        # Whoever forgets what is old: event loops of several threads.
        self._lock = threading.Lock()
        # The database's clock against ours, and what it was before somebody set it.
        self._now = Began()
        self._old: Began | None = None
        self._set_at = float("-inf")
        # Times that came twice, since it was set back.
        self._twice = (0.0, 0.0)

    def made(self, digest: bytes, version: int, order: int) -> None:
        """Note an erasure of this process that has just returned."""
        self._note(digest, version, order, own=True)

    def saw(self, digest: bytes, version: int) -> None:
        """Note an erasure that a write has met: writes that begin from now on come after it."""
        known = self._known.get(digest)
        if known is None or known[0] != version:
            self._note(digest, version, next_order(), own=False)

    def knows(self, digest: bytes, version: int, order: int) -> bool | None:
        """Tell whether a write began before this erasure; None: that is not known here."""
        known = self._known.get(digest)
        if known is None or known[0] != version:
            return None
        if known[3]:
            return order < known[2]
        return False if order > known[2] else None

    def follows(self, digest: bytes, version: int, order: int) -> bool:
        """Tell whether a write is known to have begun after this erasure."""
        return self.known_before(digest, order) == version

    def known_before(self, digest: bytes, order: int) -> int | None:
        """Return the version of the last erasure known to come before a write."""
        known = self._known.get(digest)
        return known[0] if known is not None and known[2] <= order else None

    def earliest(self, started: float) -> int:
        """Return the server's time before which a call cannot have begun; 0: not known."""
        return int(max(0.0, self._between(started)[0]))

    def guess(self, started: float, erased_at: int, width: float) -> bool | None:
        """Tell whether a call began before an erasure when only a round trip lies between them.

        Args:
            started: when it began, on our clock.
            erased_at: when the user was erased, on the server's.
            width: microseconds within which to guess, as if both ways took equally long.

        Returns:
            None when what is known of the server's clock is less exact than that.
        """
        low, high = self._between(started)
        return (low + high) / 2 < erased_at if high - low <= width else None

    def _between(self, started: float) -> tuple[float, float]:
        """Return the server's times between which a call began."""
        now = self._now
        apart = abs(now.received - started) * now.drift
        return started * 1e6 + now.low - apart, started * 1e6 + now.high + apart

    async def began_before(
        self,
        write: Write,
        version: int,
        erased_at: int,
        began: Began,
        ask: Callable[[], Awaitable[int]],
        probes: int,
    ) -> bool | None:
        """Tell whether a write began before an erasure of its user, which it has met.

        Args:
            write: which.
            version: the tombstone's.
            erased_at: when the user was erased, on the server's clock.
            began: what was measured just now; learns more.
            ask: returns the server's time in microseconds.
            probes: how often it may be asked.

        Returns:
            None when a round trip hides the order.

        Raises:
            UnavailableError: no answer can tell, since the clock was set.
        """
        known = self.knows(write.digest, version, write.order)
        # Whatever comes of this one, writes that begin from now on come after the erasure.
        self.saw(write.digest, version)
        if known is not None:
            return known
        answer = self.before(write.started, erased_at, began)
        for _ in range(probes):
            if answer is not None:
                break
            sent = self._clock.monotonic()
            now_us = await ask()
            began.learn(sent, self._clock.monotonic(), now_us)
            answer = self.before(write.started, erased_at, began)
        return answer

    def learn(self, began: Began) -> None:
        """Compare the database's clock with what it was: it may have been set since."""
        known, at = self._now, began.received
        slack = _SLACK_US + max(0.0, at - known.received) * known.drift
        low, high = known.low - slack, known.high + slack
        if began.low <= high and began.high >= low:
            self._now = Began(max(low, began.low), min(high, began.high), received=at)
            return
        if began.high < low:
            self._twice = (at * 1e6 + began.low, at * 1e6 + high)
        self._old, self._set_at, self._now = known, at, Began(began.low, began.high, received=at)

    def before(self, started: float, erased_at: int, began: Began) -> bool | None:
        """Tell whether a write began before an erasure, on the database's clock.

        Args:
            started: when it began, on our clock.
            erased_at: when the user was erased, on the database's.
            began: what was measured just now.

        Returns:
            None when more answers of the database may tell.

        Raises:
            UnavailableError: no answer can tell, since the clock was set.
        """
        self.learn(began)
        answer = began.before(started, erased_at)
        now_us = self._clock.monotonic() * 1e6 + began.high
        set_since = (
            self._old is not None
            and started <= self._set_at
            and self._old.before(started, erased_at) is not answer
        )
        # Of a time that came twice, the later moment is the one that answers.
        twice = answer is not False and self._twice[0] <= erased_at <= self._twice[1]
        if erased_at > now_us or set_since or twice:
            raise UnavailableError(
                "the server's clock was set since the write began, or since its user was erased;"
                " nothing was stored, call again",
                retryable=False,
            )
        return answer

    def _note(self, digest: bytes, version: int, order: int, *, own: bool) -> None:
        now = self._clock.monotonic()
        erasures = self._known
        with self._lock:
            erasures.pop(digest, None)
            erasures[digest] = (version, now, order, own)
            for _ in range(2):
                oldest = next(iter(erasures.values()))
                if len(erasures) > self._most or oldest[1] < now - self._seconds:
                    erasures.popitem(last=False)
