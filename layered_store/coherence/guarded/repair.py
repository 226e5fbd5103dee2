"""Repair passes: what changed in the authority is replayed in the tier before that is believed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from layered_store.coherence.contract import TRUST_SECONDS
from layered_store.coherence.together import together
from layered_store.errors import StoreError
from layered_store.events import log_warning

if TYPE_CHECKING:
    from collections.abc import Sequence

    from layered_store.clock import Clock
    from layered_store.coherence.contract import Authority, CacheTier, Change, Pass
    from layered_store.coherence.guarded.backlog import Backlog
    from layered_store.coherence.guarded.leases import Leases
    from layered_store.coherence.guarded.reachability import Reachability
    from layered_store.coherence.guarded.watch import Watch

__all__ = ["PAGE", "REPAIR_SECONDS", "RUSH_SECONDS", "Repair"]

REPAIR_SECONDS: Final = 0.25
"""Pause between repair passes."""

RUSH_SECONDS: Final = 0.05
"""Least time from one pass to the next, however many ask for one."""

PAGE: Final = 500
"""How many changes are repaired at once."""


@dataclass(eq=False, repr=False)
class Repair:
    """Replays the authority's changes in the tier and pays the debts of unfinished erasures.

    Attributes:
        repaired: how many copies were behind, or not told of, so far.
        behind: how many users the pass under way has come upon and not repaired.
    """

    tier: CacheTier
    authority: Authority
    clock: Clock
    watch: Watch
    reach: Reachability
    backlog: Backlog
    leases: Leases
    repaired: int = field(default=0, init=False)
    behind: int = field(default=0, init=False)
    # Erasures may be owed to the tier that no replay will come upon.
    _look_for_debts: bool = field(default=True, init=False)

    def look_for_debts(self) -> None:
        """Have the next pass look whether erasures are owed to the tier."""
        self._look_for_debts = True

    async def run(self) -> None:
        """Make one pass after the other, for ever."""
        while True:
            begun = self.clock.monotonic()
            try:
                await self._pass()
                self.reach.answered()
                if self._look_for_debts:
                    await self._pay_debts()
            except StoreError:
                self.reach.failures["repair"] += 1
            except Exception as exc:  # noqa: BLE001  a third party's store: repair must go on
                self.reach.failures["repair"] += 1
                log_warning("a repair pass of the cache tier failed: %s", type(exc).__name__)
            self.watch.note(repaired=True)
            await self.watch.repair_now.wait(REPAIR_SECONDS)
            # While the tier is away each write asks for a pass; they share one.
            early = begun + RUSH_SECONDS - self.clock.monotonic()
            if early > 0:
                await self.clock.sleep(early)

    async def _pass(self) -> None:
        """Replay what changed in the authority, then stamp the tier as trusted."""
        started = self.clock.monotonic()
        head = await self.authority.head()
        begun = await self.tier.begin(self.watch.me, head)
        if begun is None:
            return
        if begun.fresh:
            self._look_for_debts = True
        elif not await self.authority.covers(begun.cursor):
            # Erasures since then may be forgotten: no copy of that time may count.
            self._look_for_debts = True
            await self.tier.renew(begun.generation, head)
            return
        repaired = self.repaired
        owed: list[Change] = []
        try:
            if await self._replay(begun, owed):
                self.backlog.repaired(started)
                if self.leases.until <= self.clock.monotonic():
                    self.watch.ping_now.set()  # what the last ping was refused for is there now
            if self.reach.was_away() and self.repaired > repaired:
                users = self.repaired - repaired
                self.reach.tell("tier_repaired", users=users)
            await self._settle(owed)
        except BaseException:
            # No replay comes upon them again.
            self._look_for_debts = self._look_for_debts or bool(owed)
            raise

    async def _replay(self, begun: Pass, owed: list[Change]) -> bool:
        """Bring the tier up to the authority, adding what it is owed to ``owed``; tell whether it
        was stamped.
        """
        cursor = begun.cursor
        while True:
            page = await self.authority.changes(cursor, PAGE)
            # The last page holds ordinary writes of just now, which are in the tier already.
            self.behind = len(page.items) if page.more else 0
            if page.items:
                self.repaired += len(await self.tier.repair(page.items))
                owed += [change for change in page.items if change.owed]
            cursor = page.cursor
            # After each page, so that a long way back is gone once, whoever goes on with it.
            stamped = await self.tier.stamp(begun, cursor, 0.0 if page.more else TRUST_SECONDS)
            if not page.more or not stamped:
                self.behind = 0
                return stamped

    async def _pay_debts(self) -> None:
        """Make up for erasures that a process began and did not finish, however long ago."""
        # First, so that whoever asks from here on has them looked for again.
        self._look_for_debts = False
        try:
            while owed := await self.authority.owing(self.tier.tier_name, PAGE):
                await self.tier.repair(owed)
                await self._settle(owed)
        except BaseException:
            self._look_for_debts = True
            raise

    async def _settle(self, owed: Sequence[Change]) -> None:
        name = self.tier.tier_name
        for start in range(0, len(owed), PAGE):
            some = owed[start : start + PAGE]
            await together(self.authority.settle(each.digest, each.version, name) for each in some)
