"""What each tier of a stack holds of one user, without changing or counting anything."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from layered_store.clock import SYSTEM_CLOCK
from layered_store.errors import StoreError
from layered_store.identity import check_user_id
from layered_store.stack import children_of, kind_of, walk

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from layered_store.clock import Clock
    from layered_store.interface import StateStore
    from layered_store.stack import Place

__all__ = ["Explanation", "Held", "Peek", "Peekable", "TierView", "explain"]


class Held(StrEnum):
    """What a tier has of a user."""

    STATE = "state"
    ABSENT = "absent"
    ERASED = "erased"
    """A tombstone: the user is known to be erased."""
    UNKNOWN = "unknown"
    """The tier could not be asked, or cannot tell."""


@dataclass(frozen=True, slots=True)
class Peek:
    """What one tier says of one user.

    Args:
        held: what it has.
        updated_at_unix_ms: the time of the state it has.
        time_left: seconds until it lets go of it; None when it does not by itself.
        version: the version it has; None where nobody numbers writes.
        answers: whether it would answer a read with this now.
        note: why not, or what else is to be known; no user data.
    """

    held: Held
    updated_at_unix_ms: int | None = None
    time_left: float | None = None
    version: int | None = None
    answers: bool = True
    note: str = ""


@runtime_checkable
class Peekable(Protocol):
    """A tier that can be looked into. A third-party store may offer this one method."""

    async def peek(self, user_id: str) -> Peek:
        """Tell what is held of a user, changing and counting nothing."""
        ...


@dataclass(frozen=True, slots=True)
class TierView:
    """One tier in an :class:`Explanation`.

    Args:
        index: position in ``describe``.
        path: roles from the outermost block down, such as ``"inner.origin"``.
        kind: the block's kind in config files, such as ``"redis"``.
        name: its class name.
        held: what it has of the user.
        age: seconds since the state it has was observed (``updated_at_unix_ms``); None without.
        time_left: see :class:`Peek`.
        version: see :class:`Peek`.
        answers: see :class:`Peek`.
        note: see :class:`Peek`.
    """

    index: int
    path: str
    kind: str
    name: str
    held: Held
    age: float | None
    time_left: float | None
    version: int | None
    answers: bool
    note: str

    def __str__(self) -> str:
        facts = [str(self.held)]
        if self.age is not None:
            facts.append(f"{self.age:.3g} s old")
        if self.time_left is not None:
            facts.append(f"{self.time_left:.3g} s left")
        if self.version is not None:
            facts.append(f"version {self.version}")
        if not self.answers:
            facts.append("does not answer now")
        if self.note:
            facts.append(self.note)
        return f"{self.index}.{self.kind}: {', '.join(facts)}"


class Explanation(list[TierView]):
    """The tiers of a stack, outermost first; prints one line each."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))


async def explain(
    stack: StateStore, user_id: str, *, clock: Clock = SYSTEM_CLOCK
) -> Explanation:
    """Return what each tier of a stack holds of a user: whether, how old, how long, which version.

    Asks the tiers themselves, bypassing retries, breakers and metrics: nothing is filled, evicted
    or counted, and no cache entry counts as used. A tier that cannot be reached within its time
    limit is ``unknown``, with the reason. Neither the user id nor any value is shown.

    Args:
        stack: the outermost block.
        user_id: as the callers of the stack know the user.
        clock: source of the time that ages are measured against.

    Raises:
        ValidationError: ``user_id`` is not valid.
    """
    check_user_id(user_id, "explain", stack)
    now_ms = clock.time() * 1000
    views = Explanation()
    async for place, peek in _look(stack, user_id):
        moment = peek.updated_at_unix_ms
        views.append(
            TierView(
                place.index,
                place.path,
                kind_of(place.store),
                type(place.store).__name__,
                peek.held,
                None if moment is None else (now_ms - moment) / 1000,
                peek.time_left,
                peek.version,
                peek.answers,
                peek.note,
            )
        )
    return views


async def _look(stack: StateStore, user_id: str) -> AsyncIterator[tuple[Place, Peek]]:
    from layered_store.layers.translating import TranslatingLayer  # noqa: PLC0415

    known = [user_id]  # by depth: the id by which the blocks there know the user
    for place in walk(stack):
        store = place.store
        del known[place.depth + 1 :]
        known_as = known[-1]
        if isinstance(store, Peekable):
            yield place, await _peek(store, known_as)
        elif not children_of(store):
            note = "this store cannot be looked into; it may offer peek()"
            yield place, Peek(Held.UNKNOWN, answers=False, note=note)
        if isinstance(store, TranslatingLayer):
            known_as = store.id_below(known_as, "explain")
        known.append(known_as)


async def _peek(store: Peekable, user_id: str) -> Peek:
    try:
        return await store.peek(user_id)
    except StoreError as exc:
        return Peek(Held.UNKNOWN, answers=False, note=str(exc))
    except Exception as exc:  # noqa: BLE001  a third party's; its text may hold anything
        return Peek(Held.UNKNOWN, answers=False, note=type(exc).__name__)
