"""The leases under which in-process caches answer, and what those caches are told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from layered_store.clock import Clock
    from layered_store.coherence.contract import LeasedCache, Notice
    from layered_store.coherence.guarded.watch import Watch

__all__ = ["LEASE_SECONDS", "Leases"]

LEASE_SECONDS: Final = 1.0
"""How long an in-process cache answers after its echo was sent."""

_PINGS: Final = 5
"""How many pings may be under way."""

_NEVER: Final = -math.inf


@dataclass(slots=True)
class _Ping:
    """A ping that was sent.

    Args:
        sent: when.
        trusted: for how long the tier may be believed, as its reply tells.
        echoed: whether its echo came back over the channel.
    """

    sent: float
    trusted: float = 0.0
    echoed: bool = False


class Leases:
    """Renews the leases of the caches above with each ping that was answered and echoed.

    The echo shows that every message published before the ping was sent has been received; the
    reply tells for how long the tier, and so what was read from it, may be believed.

    Args:
        clock: source of time.
        watch: is told of the first lease.

    Attributes:
        caches: the in-process caches above.
        until: the end of the lease.
        heard: until when the latest echo shows that messages come; it may be longer than the lease,
            which also needs a tier that may be believed.
    """

    def __init__(self, clock: Clock, watch: Watch) -> None:
        self._monotonic = clock.monotonic
        self._watch = watch
        self.caches: list[LeasedCache] = []
        self.until = self.heard = _NEVER
        self._pings: dict[int, _Ping] = {}

    def tell(self, notice: Notice) -> None:
        """Tell the caches of a change."""
        for cache in self.caches:
            cache.invalidate(notice)

    def distrust(self) -> None:
        """Have the caches drop everything: messages may have been missed."""
        for cache in self.caches:
            cache.lease(_NEVER)
            cache.hear(_NEVER)
            cache.distrust()

    def channel_stands(self) -> None:
        """Begin over a new subscription: no echo answers what was sent before it."""
        self.distrust()
        self.heard = _NEVER
        self._pings.clear()

    def channel_lost(self) -> None:
        """Have the caches answer no more until the next lease."""
        self.distrust()
        self.until = self.heard = _NEVER

    def ping_sent(self, number: int) -> None:
        """Note that a ping goes out."""
        for old in [each for each in self._pings if each <= number - _PINGS]:
            del self._pings[old]
        self._pings[number] = _Ping(self._monotonic())

    def ping_answered(self, number: int, trusted: float) -> None:
        """Note the reply to a ping: for how many seconds the tier may be believed."""
        ping = self._pings.get(number)
        if ping is not None:
            ping.trusted = ping.trusted or trusted
            self._renew(number, ping)

    def ping_echoed(self, number: int) -> None:
        """Note the echo of a ping."""
        ping = self._pings.get(number)
        if ping is not None:
            ping.echoed = True
            self.heard = ping.sent + LEASE_SECONDS
            for cache in self.caches:
                cache.hear(self.heard)
            self._renew(number, ping)

    def _renew(self, number: int, ping: _Ping) -> None:
        if ping.trusted and ping.echoed:
            del self._pings[number]
            self.until = ping.sent + min(LEASE_SECONDS, ping.trusted)
            for cache in self.caches:
                cache.lease(self.until)
            self._watch.note(leased=True)

    def begin_anew(self) -> None:
        """In a child of ``os.fork``: the leases are the parent's.

        What the caches hold stays, as their locks may be held by a thread that is not here.
        """
        self.until = self.heard = _NEVER
        for cache in self.caches:
            cache.lease(_NEVER)
            cache.hear(_NEVER)
