"""Copying all users from one stack to another, with their histories."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Final, NamedTuple

from layered_store.call import Call, call_continues, new_id, next_order
from layered_store.clock import SYSTEM_CLOCK, Clock
from layered_store.enumerable import enumerable_of, pages
from layered_store.errors import CorruptDataError, UnsupportedError
from layered_store.identity import digest_function

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from layered_store.enumerable import Enumerable
    from layered_store.interface import StateStore
    from layered_store.snapshot import StateSnapshot

__all__ = ["CopiedUsers", "Copy", "Counts", "Progress", "count_users"]

_EVERYTHING: Final = 2**31 - 1
_SIDE_BY_SIDE: Final = 250
_LISTED: Final = 5_000


@dataclass(slots=True)
class Progress:
    """How far a copy has come.

    Args:
        cursor: where it goes on; None when every user was looked at.
        users: users looked at.
        states: states written; fewer when a repeated copy finds them there.
        conflicts: users left alone, since the target holds other states of them.
        erased: users who were erased on either side during the copy, and so are not in the target.
        unreadable: users left alone, since one of their records cannot be read.
    """

    cursor: str | None = ""
    users: int = 0
    states: int = 0
    conflicts: int = 0
    erased: int = 0
    unreadable: int = 0


class CopiedUsers:
    """The users that a copy wrote, as digests, so that those erased meanwhile can be found.

    Args:
        digest: of user ids, keyed with a secret of this copy alone.
        known: digests of an earlier run, 16 bytes each.
        remember: told of further digests before their users are written.
    """

    def __init__(
        self,
        digest: digest_function,
        known: bytes = b"",
        remember: Callable[[bytes], object] = lambda _: None,
    ) -> None:
        self._digest = digest
        self._remember = remember
        # A kill may have cut off the last one, whose page is then done again.
        self._digests = {known[at : at + 16] for at in range(0, len(known) - 15, 16)}

    def add(self, user_ids: Iterable[str]) -> None:
        """Note users who are about to be written."""
        new = {self._digest(user_id) for user_id in user_ids} - self._digests
        if new:
            self._remember(b"".join(new))
            self._digests |= new

    def discard(self, user_ids: Iterable[str]) -> None:
        """Forget users who are still there."""
        self._digests.difference_update(map(self._digest, user_ids))

    def of(self, user_ids: Iterable[str]) -> list[str]:
        """Return those that the copy wrote and that were not found there again."""
        return [user_id for user_id in user_ids if self._digest(user_id) in self._digests]

    def __len__(self) -> int:
        return len(self._digests)


class Counts(NamedTuple):
    """What was counted in the end.

    Args:
        source: users at the source.
        target: users at the target; None when it cannot list them.
        left: users erased at the source meanwhile who are in a target that cannot list them.
    """

    source: int
    target: int | None
    left: int


class Copy:
    """One copy of all users, which can be resumed.

    A page may be copied again, after a kill: what the target holds already is not written twice. A
    user whose states in the target are not the oldest ones of the source is left alone and counted
    as a conflict; so is one with a record that cannot be read, counted apart.

    Whoever is erased meanwhile is not brought back. An erasure at the target wins over the copy's
    writes, which count as begun when the copy began; users erased at the source after they were
    copied are found in the end, and erased at the target too.

    Args:
        source: where users are read from; its system of record can list them.
        target: where they are written to.
        progress: where to go on.
        copied: the users that earlier runs of this copy wrote.
        age: seconds since this copy began, when it goes on.
        page: users at a time.
        clock: source of time.

    Raises:
        UnsupportedError: the source cannot list its users.
    """

    def __init__(
        self,
        source: StateStore,
        target: StateStore,
        progress: Progress | None = None,
        *,
        copied: CopiedUsers | None = None,
        age: float = 0.0,
        page: int = 500,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.progress = Progress() if progress is None else progress
        self._source = source
        self._target = target
        if copied is None:
            copied = CopiedUsers(digest_function(os.urandom(32)))
        self._copied = copied
        self._page = page
        self._clock = clock
        self._began = clock.monotonic() - age
        self._system_began = SYSTEM_CLOCK.monotonic() - age
        self._order = next_order()
        listing = enumerable_of(source)
        if listing is None:
            raise UnsupportedError(
                "the source cannot list its users; name its system of record",
                operation="copy",
                layer=source.name,
            )
        self._listing = listing
        self._written = enumerable_of(target)

    async def run(self) -> AsyncIterator[Progress]:
        """Copy page by page, yielding after each; :meth:`finish` belongs after the last."""
        progress = self.progress
        while progress.cursor is not None:
            found = await self._listing.users(progress.cursor, self._page)
            await self._copy(list(dict.fromkeys(found.user_ids)))
            progress.cursor = found.cursor
            yield progress

    async def finish(self) -> Counts:
        """Erase at the target whom the source erased meanwhile; count the users of both."""
        there = await count_users(self._listing, self._copied.discard)
        if self._written is None:
            return Counts(there, None, len(self._copied))
        here = await count_users(self._written)
        if self._copied:
            async for page in pages(self._written, _LISTED):
                suspects = self._copied.of(page.user_ids)
                still = await self._source.get_latest_many(suspects) if suspects else {}
                for user_id in suspects:
                    if user_id not in still:
                        await self._target.delete(user_id)
                        self.progress.erased += 1
                        here -= 1
        return Counts(there, here, 0)

    async def _copy(self, users: list[str]) -> None:
        """Copy a page of users."""
        latest, there = await asyncio.gather(
            self._source.get_latest_many(users), self._target.get_latest_many(users)
        )
        gate = asyncio.Semaphore(_SIDE_BY_SIDE)

        async def missing(user: str) -> Sequence[StateSnapshot] | None:
            try:
                async with gate:
                    state = latest.get(user)
                    if state is None:  # erased since it was listed, or it cannot be read
                        state = await self._source.get_latest(user)
                    if state is None:
                        return None
                    states = await self._missing(user, state, there.get(user))
            except CorruptDataError:
                self.progress.unreadable += 1
                return None
            if states is None:
                self.progress.conflicts += 1
            return states

        each = zip(users, await asyncio.gather(*map(missing, users)), strict=True)
        found = {user: states for user, states in each if states is not None}
        # Everybody's oldest state, then everybody's next: in each user's order, so that the newest
        # becomes the latest, and with no user twice in a row, which stores write faster.
        rounds = zip_longest(*found.values())
        batch = [state for each in rounds for state in each if state is not None]
        copied = {user: len(states) for user, states in found.items()}
        self._copied.add(copied)
        await self._write(batch, copied)
        self.progress.users += len(users)

    async def _write(self, batch: list[StateSnapshot], copied: Mapping[str, int]) -> None:
        if not batch:
            return
        call = Call(
            new_id(),
            self._began,
            self._clock,
            order=self._order,
            system_started=self._system_began,
        )
        with call_continues(call):
            await self._target.upsert_latest_many(batch)
        self.progress.states += len(batch)
        if call.superseded:
            written = [user for user, states in copied.items() if states]
            found = await self._target.get_latest_many(written)
            for user in written:
                if user not in found:
                    self.progress.erased += 1
                    self.progress.states -= copied[user]

    async def _missing(
        self, user: str, latest: StateSnapshot, there: StateSnapshot | None
    ) -> Sequence[StateSnapshot] | None:
        """Return the states still to be written, oldest first, or None for a conflict."""
        states: Sequence[StateSnapshot] = await self._source.get_history(user, _EVERYTHING)
        if not states:
            states = [latest]
        elif states[0] != latest:
            # Written to between the two reads, or a history that lags behind.
            now = await self._source.get_latest(user)
            states = states if now is None or now in states else [now, *states]
        if there is None:
            return states[::-1]
        if there == states[0] and states.count(there) == 1:
            return ()
        held = await self._target.get_history(user, _EVERYTHING) or [there]
        return _rest(states, held)


def _rest(
    states: Sequence[StateSnapshot], held: Sequence[StateSnapshot]
) -> Sequence[StateSnapshot] | None:
    """Return which of ``states`` are newer than ``held``, oldest first; None when they differ.

    Both are newest first. What is held may reach less far back than the states.
    """
    whole = len(states) - len(held)
    places = [place for place, state in enumerate(states) if state == held[0]]
    # Equal states may stand in several places: the one that explains all that is held goes first.
    for place in sorted(places, key=lambda place: (place != whole, place)):
        length = min(len(held), len(states) - place)
        if list(held[:length]) == list(states[place : place + length]):
            return states[:place][::-1]
    return None


async def count_users(
    listing: Enumerable, seen: Callable[[Sequence[str]], object] = lambda _: None
) -> int:
    """Return how many users a store has, each counted once; ``seen`` is told of every page."""
    found: set[int] = set()
    async for page in pages(listing, _LISTED):
        seen(page.user_ids)
        # 64 of their bits: a million users meet by accident once in ten million copies.
        found.update(map(hash, page.user_ids))
    return len(found)
