"""The hot path: one coroutine for a read that hits, however many layers it passes.

Each layer offers, beside its ``get_latest``, a hook (``hot_path``) that says what it needs on a
hit. The outermost layer binds one fused coroutine function made of those as its ``get_latest``.
The class's own method stays: it is the slow path, and what subclasses override.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

__all__ = [
    "Barrier",
    "HitCount",
    "HitObserver",
    "HotEntry",
    "HotPath",
    "Trust",
    "declares",
    "hot_path_of",
]

_SAMPLE_EVERY = 64


class HotEntry(Protocol):
    """What a cache keeps for one user, as far as a hit looks at it."""

    value: Any
    """The snapshot."""
    expires: float
    """Monotonic time until which a hit may be answered here; minus infinity for an absent user."""
    freq: int
    """Hits since the eviction last looked, up to 3."""


class Trust:
    """Until when hits may be answered without asking anybody.

    Two reasons end it: the cache's lease ran out, or a layer above refuses calls for now (an open
    circuit, a full bulkhead). They share one number, so that a hit compares only once.
    """

    __slots__ = ("_shut", "lease_until", "until")

    def __init__(self) -> None:
        self.until = math.inf
        self.lease_until = math.inf
        self._shut = 0

    def lease(self, until: float) -> None:
        """Trust the cache until this monotonic time."""
        self.lease_until = until
        self._settle()

    def shut(self) -> None:
        """Send every read down the slow path until :meth:`reopen`."""
        self._shut += 1
        self._settle()

    def reopen(self) -> None:
        """Take back one :meth:`shut`."""
        self._shut -= 1
        self._settle()

    def _settle(self) -> None:
        self.until = -math.inf if self._shut else self.lease_until


class Barrier:
    """Keeps hits of a cache below on the slow path for as long as a layer above refuses calls."""

    __slots__ = ("_trust", "_up")

    def __init__(self) -> None:
        self._trust: Trust | None = None
        self._up = False

    def stand_on(self, path: HotPath) -> None:
        """Remember the one cache below, whose hits it is to hold back."""
        self._trust = path.trust

    def put(self, *, up: bool) -> None:
        """Send hits down the slow path, or let them pass; without a cache below, do nothing."""
        if up is self._up or self._trust is None:
            return
        self._up = up
        if up:
            self._trust.shut()
        else:
            self._trust.reopen()


class HitCount:
    """Reads how many hits one fused path has answered."""

    __slots__ = ("read",)

    def __init__(self, read: Callable[[], int]) -> None:
        self.read = read


class HitObserver(Protocol):
    """A layer that counts hits, such as a cache or ``Metrics``."""

    def attach_hits(self, count: HitCount) -> None:
        """Take note of one more fused path that passes through this layer."""
        ...


@dataclass(slots=True)
class HotPath:
    """How hits of one cache can be answered, as seen from the layer that returned it.

    Args:
        entries: the cache's entries by user id.
        trust: until when they may be used.
        monotonic: the cache's clock.
        observers: layers passed so far that count hits.
        timers: called with the duration of a timed hit, in seconds.
        time_all: time every hit, not one in 64.
    """

    entries: Mapping[str, HotEntry]
    trust: Trust
    monotonic: Callable[[], float]
    observers: tuple[HitObserver, ...] = ()
    timers: tuple[Callable[[float], None], ...] = ()
    time_all: bool = False

    def fuse(self, slow: Callable[[str], Awaitable[Any]]) -> Callable[[str], Awaitable[Any]]:
        """Return the coroutine function that answers hits and sends all else to ``slow``."""
        if self.time_all and self.timers:
            get_latest, hits = _timed(self, slow)
        elif self.timers:
            get_latest, hits = _sampled(self, slow)
        else:
            get_latest, hits = _counted(self, slow)
        count = HitCount(hits)
        for observer in self.observers:
            observer.attach_hits(count)
        return get_latest


def declares(cls: type, hook: str, *, over: tuple[str, ...]) -> bool:
    """Tell whether ``hook`` speaks for ``cls``: no subclass changed a method of ``over`` since."""
    for base in cls.__mro__:
        names = vars(base)
        if hook in names:
            return True
        if any(name in names for name in over):
            return False
    return False


def hot_path_of(store: Any) -> HotPath | None:
    """Return the hot path that ``store`` offers to the layer above it, or None.

    A store that changes its reads without declaring the hook again is awaited, not passed by.
    """
    if not declares(type(store), "hot_path", over=("get_latest", "around")):
        return None
    path: HotPath | None = store.hot_path()
    return path


# The three variants differ in the timing only. They are written out because a call or a test that
# is shared between them would cost more than all the rest of a hit.


def _counted(
    path: HotPath, slow: Callable[[str], Awaitable[Any]]
) -> tuple[Callable[[str], Awaitable[Any]], Callable[[], int]]:
    find, trust, monotonic = path.entries.get, path.trust, path.monotonic
    hits = 0

    async def get_latest(user_id: str) -> Any:
        nonlocal hits
        try:
            entry = find(user_id)
        except TypeError:  # unhashable: the slow path refuses it by name
            entry = None
        if entry is not None and trust.until > monotonic() < entry.expires:
            hits += 1
            if entry.freq < 3:  # noqa: PLR2004
                entry.freq += 1
            return entry.value
        return await slow(user_id)

    return get_latest, lambda: hits


def _sampled(
    path: HotPath, slow: Callable[[str], Awaitable[Any]]
) -> tuple[Callable[[str], Awaitable[Any]], Callable[[], int]]:
    find, trust, monotonic, timers = path.entries.get, path.trust, path.monotonic, path.timers
    hits, due = 0, 1  # the first hit is one that is timed

    def sample(user_id: str) -> None:
        nonlocal due
        due = hits + _SAMPLE_EVERY
        # One hit in 64 is looked up once more between two readings of the clock: the others
        # then need not read it twice.
        begun = monotonic()
        entry = find(user_id)
        if entry is not None and begun < entry.expires and begun < trust.until:
            elapsed = monotonic() - begun
            for timer in timers:
                timer(elapsed)

    async def get_latest(user_id: str) -> Any:
        nonlocal hits
        try:
            entry = find(user_id)
        except TypeError:
            entry = None
        if entry is not None and trust.until > monotonic() < entry.expires:
            hits += 1
            if entry.freq < 3:  # noqa: PLR2004
                entry.freq += 1
            if hits >= due:
                sample(user_id)
            return entry.value
        return await slow(user_id)

    return get_latest, lambda: hits


def _timed(
    path: HotPath, slow: Callable[[str], Awaitable[Any]]
) -> tuple[Callable[[str], Awaitable[Any]], Callable[[], int]]:
    find, trust, monotonic, timers = path.entries.get, path.trust, path.monotonic, path.timers
    hits = 0

    async def get_latest(user_id: str) -> Any:
        nonlocal hits
        now = monotonic()
        try:
            entry = find(user_id)
        except TypeError:
            entry = None
        if entry is not None and now < entry.expires and now < trust.until:
            hits += 1
            if entry.freq < 3:  # noqa: PLR2004
                entry.freq += 1
            elapsed = monotonic() - now
            for timer in timers:
                timer(elapsed)
            return entry.value
        return await slow(user_id)

    return get_latest, lambda: hits
