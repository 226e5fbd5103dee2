"""Copying all users from one stack to another, with their histories."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from layered_store.enumerable import enumerable_of
from layered_store.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from layered_store.interface import StateStore
    from layered_store.snapshot import StateSnapshot

__all__ = ["Progress", "copy_users"]

_EVERYTHING: Final = 2**31 - 1
_SIDE_BY_SIDE: Final = 64


@dataclass(slots=True)
class Progress:
    """How far a copy has come.

    Args:
        cursor: where it goes on; None when everything was copied.
        users: users looked at.
        states: states written; fewer when a repeated copy finds them there.
        conflicts: users left alone, since the target holds other states of them.
    """

    cursor: str | None = ""
    users: int = 0
    states: int = 0
    conflicts: int = 0


async def copy_users(
    source: StateStore, target: StateStore, progress: Progress, page: int = 500
) -> AsyncIterator[Progress]:
    """Copy from ``progress.cursor`` on, yielding after each page of users.

    A page may be copied again, after a kill: what the target holds already is not written twice. A
    user whose states in the target are not the oldest ones of the source is left alone and counted
    as a conflict.

    Raises:
        UnsupportedError: the source cannot list its users.
    """
    listing = enumerable_of(source)
    if listing is None:
        raise UnsupportedError(
            "the source cannot list its users; name its system of record", operation="copy"
        )
    while progress.cursor is not None:
        found = await listing.users(progress.cursor, page)
        users = list(found.user_ids)
        latest = await source.get_latest_many(users)
        there = await target.get_latest_many(users)
        gate = asyncio.Semaphore(_SIDE_BY_SIDE)

        async def missing(
            user: str,
            latest: dict[str, StateSnapshot] = latest,
            there: dict[str, StateSnapshot] = there,
            gate: asyncio.Semaphore = gate,
        ) -> Sequence[StateSnapshot] | None:
            if user not in latest:
                return ()
            async with gate:
                states = await source.get_history(user, _EVERYTHING)
                states = states if states and states[0] == latest[user] else [latest[user], *states]
                if user not in there:
                    return states[::-1]
                held = await target.get_history(user, _EVERYTHING)
                return _missing(states, held, there[user])

        # One batch in the order of each user's history, so that the newest becomes the latest.
        batch: list[StateSnapshot] = []
        for states in await asyncio.gather(*map(missing, users)):
            if states is None:
                progress.conflicts += 1
            else:
                batch.extend(states)
        if batch:
            await target.upsert_latest_many(batch)
        progress.users += len(users)
        progress.states += len(batch)
        progress.cursor = found.cursor
        yield progress


def _missing(
    states: Sequence[StateSnapshot], held: Sequence[StateSnapshot], latest: StateSnapshot
) -> Sequence[StateSnapshot] | None:
    """Return the states still to be written, oldest first, or None when the target has others."""
    if latest == states[0]:
        return ()
    # The target's newest state says how far it got; it may keep a shorter history than the source.
    for position, state in enumerate(states):
        if state == latest:
            length = min(len(held), len(states) - position)
            if list(held[:length]) == list(states[position : position + length]):
                return states[:position][::-1]
            return None
    return None
