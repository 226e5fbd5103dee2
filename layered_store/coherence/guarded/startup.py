"""How the first call starts repair and channel of a tier, and waits for both."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from layered_store.errors import StoreError

if TYPE_CHECKING:
    from layered_store.clock import Clock
    from layered_store.coherence.contract import CacheTier
    from layered_store.coherence.guarded.channel import Channel
    from layered_store.coherence.guarded.leases import Leases
    from layered_store.coherence.guarded.reachability import Reachability
    from layered_store.coherence.guarded.repair import Repair
    from layered_store.coherence.guarded.watch import Watch

__all__ = ["READY_SECONDS", "Startup"]

READY_SECONDS: Final = 1.0
"""How long the first call waits for the tier to be repaired before it goes on without."""

_NOBODY: Final = "0"


@dataclass(eq=False, repr=False)
class Startup:
    """Has repair and channel run on the event loop of the first call.

    Attributes:
        steady: the event loop on which calls need not ask whether everything runs.
    """

    tier: CacheTier
    clock: Clock
    watch: Watch
    reach: Reachability
    leases: Leases
    repair: Repair
    channel: Channel
    steady: asyncio.AbstractEventLoop | None = field(default=None, init=False)

    async def ready(self) -> None:
        """Begin what does not run yet; the first callers wait, at most 1 s and once."""
        watch, loop = self.watch, asyncio.get_running_loop()
        here = watch.loop is loop
        if watch.closed or (here and not watch.resumes):
            self._follow()
            if watch.ready is None or watch.ready.is_set():
                self.steady = loop if here and not watch.lapsed else None
                return
        else:
            if not watch.begin(loop):
                return  # the loop that came first keeps watch for all
            self.leases.distrust()
            watch.keep(self.repair.run(), self.look_again)
            self._follow()
        ready = watch.ready
        assert ready is not None
        try:
            # Through the layers around the tier: one that hangs costs their limit and no more.
            await self.tier.read(_NOBODY)
        except StoreError as exc:
            self.reach.failed(exc, "read")
        else:
            with contextlib.suppress(TimeoutError):
                async with self.clock.timeout(READY_SECONDS):
                    await ready.wait()
        ready.set()  # once is enough: a tier that is away must not cost every call a second

    def _follow(self) -> None:
        """Follow the channel once there are caches to tell."""
        watch = self.watch
        if self.leases.caches and not watch.listening and self.tier.has_channel:
            if watch.closed:
                return
            watch.listening = True
            watch.keep(self.channel.follow(), self.look_again)

    def look_again(self) -> None:
        """Have the next call begin what does not run yet."""
        self.steady = None
