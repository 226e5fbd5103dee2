"""The ability to list users, which copying and exporting whole stores needs."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple

from layered_store.coherence.contract import Capability
from layered_store.interface import Op, ability_of
from layered_store.layer import AroundLayer
from layered_store.stack import kind_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from layered_store.interface import StateStore

__all__ = ["Enumerable", "UserPage", "enumerable_of", "pages"]


class UserPage(NamedTuple):
    """A page of users.

    Args:
        user_ids: who has a state; an id may come again on a later page.
        cursor: where the next page begins; None after the last.
    """

    user_ids: Sequence[str]
    cursor: str | None


class Enumerable(Capability):
    """A store that can list its users.

    Users that are there during the whole listing are listed; those that come or go meanwhile may
    be. A cursor stays good when the store is closed and opened again.
    """

    operations: ClassVar[Mapping[str, Op]] = {"users": Op.GET_LATEST_MANY}

    @abstractmethod
    async def users(self, cursor: str, limit: int) -> UserPage:
        """Return about ``limit`` users after ``cursor``; ``""`` begins the listing."""


def enumerable_of(stack: StateStore) -> Enumerable | None:
    """Return what lists the users of a stack: its system of record, when that can.

    Looks only through blocks that keep users under the ids that their callers give.
    """
    found = ability_of(stack, Enumerable)
    if found is not None:
        return found
    role = "inner" if isinstance(stack, AroundLayer) else _RECORD_BELOW.get(kind_of(stack), "")
    below = stack.children().get(role)
    found = None if below is None else enumerable_of(below)
    if found is not None and isinstance(stack, AroundLayer):
        return Enumerable.around(stack, found)
    return found


_RECORD_BELOW: Final = {"cached": "inner", "write_through": "origin", "fallback": "inner"}


async def pages(listing: Enumerable, limit: int, cursor: str = "") -> AsyncIterator[UserPage]:
    """Yield all pages from ``cursor`` on."""
    position: str | None = cursor
    while position is not None:
        page = await listing.users(position, limit)
        yield page
        position = page.cursor
