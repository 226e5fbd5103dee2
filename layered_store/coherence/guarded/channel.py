"""Following the invalidation channel, and the pings whose echoes come back over it."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from layered_store.coherence.guarded.leases import LEASE_SECONDS
from layered_store.errors import StoreError
from layered_store.events import log_warning
from layered_store.running import spawn

if TYPE_CHECKING:
    from layered_store.clock import Clock
    from layered_store.coherence.contract import CacheTier, Notice
    from layered_store.coherence.guarded.backlog import Backlog
    from layered_store.coherence.guarded.leases import Leases
    from layered_store.coherence.guarded.reachability import Reachability
    from layered_store.coherence.guarded.watch import Watch

__all__ = ["PING_SECONDS", "Channel"]

PING_SECONDS: Final = 0.3
"""Pause between echoes: three may be lost before a lease runs out."""

_LEAVE_SECONDS: Final = 0.2

_FIRST_PAUSE: Final = 0.05


@dataclass(eq=False, repr=False)
class Channel:
    """Hands what other processes tell to the caches above, and keeps their leases alive.

    Attributes:
        losses: how often it was lost.
    """

    tier: CacheTier
    clock: Clock
    watch: Watch
    reach: Reachability
    backlog: Backlog
    leases: Leases
    losses: int = field(default=0, init=False)
    # The tier's clock in the latest message that was taken in.
    _seen: float = field(default=0.0, init=False)
    _away: bool = field(default=False, init=False)
    # No number is used twice: a ping of before may be echoed over the next subscription.
    _pings: int = field(default=0, init=False)
    # Whether the tier may have this process among the holders of leases.
    _registered: bool = field(default=False, init=False)

    async def follow(self) -> None:
        """Follow the channel for ever; whatever breaks it, distrust all and begin again."""
        pause = _FIRST_PAUSE
        while True:
            pings: asyncio.Task[None] | None = None
            stood = False
            try:
                async with self.tier.listen() as notices:
                    # What was held before the subscription stood may have missed messages.
                    self.leases.channel_stands()
                    pings = spawn(self._ping_for_ever())
                    async for notice in notices:
                        if not stood:
                            # Not before: a replica, for one, takes subscriptions and is no use.
                            stood, pause = True, _FIRST_PAUSE
                            self._stands()
                        self._receive(notice)
            except asyncio.CancelledError:
                stood = False  # the event loop ends, which is no loss of the channel
                raise
            except StoreError:
                pass
            except Exception as exc:  # noqa: BLE001  a third party's store: listening must go on
                log_warning("the invalidation channel failed: %s", type(exc).__name__)
            finally:
                self.leases.channel_lost()
                self.watch.note(leased=True)  # nobody waits for a channel that cannot be had
                if stood and not self.watch.closed:
                    self._away = True
                    self.losses += 1
                    self.reach.tell("channel_lost")
                if pings is not None:
                    pings.cancel()
                    # Not awaited itself: its cancellation would look like our own, or hide it.
                    await asyncio.gather(pings, return_exceptions=True)
            await self.clock.sleep(pause)
            pause = min(1.0, pause * 2)

    def _stands(self) -> None:
        if self._away:
            self._away = False
            self.reach.tell("channel_back")

    def _receive(self, notice: Notice) -> None:
        self._seen = max(self._seen, notice.sent)
        if notice.echo:
            if notice.echo == self.watch.me:
                self.leases.ping_echoed(notice.version)
            return
        if not notice.digest:
            # A new generation: what changed before it is not told one by one.
            self.leases.distrust()
            self.watch.ping_now.set()
            return
        self.leases.tell(notice)
        if notice.erased:
            # Somebody waits for us to have seen this.
            self.watch.ping_now.set()

    async def _ping_for_ever(self) -> None:
        while True:
            self._pings += 1
            number = self._pings
            self.leases.ping_sent(number)
            self._registered = True
            try:
                trusted = await self.tier.ping(self.watch.me, LEASE_SECONDS, self._seen, number)
            except StoreError as exc:
                self.reach.failed(exc, "ping")
            except Exception as exc:  # noqa: BLE001  a third party's store: pings must go on
                self.reach.failures["ping"] += 1
                log_warning("a ping of the cache tier failed: %s", type(exc).__name__)
            else:
                self.reach.answered()
                self.leases.ping_answered(number, trusted)
                if trusted:
                    self.backlog.tier_trusted()
            await self.watch.ping_now.wait(PING_SECONDS)

    async def leave(self) -> None:
        """Tell that nothing is held any more: whoever erases need not wait for this process."""
        if self._registered:
            with contextlib.suppress(StoreError, TimeoutError):
                async with self.clock.timeout(_LEAVE_SECONDS):
                    await self.tier.ping(self.watch.me, -LEASE_SECONDS, self._seen, 0)
            self._registered = False

    def begin_anew(self) -> None:
        """In a child of ``os.fork``: nothing was registered under its name."""
        self._registered = False
