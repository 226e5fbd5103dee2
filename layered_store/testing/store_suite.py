"""One store on the bench of the conformance suite."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

from layered_store.coherence.contract import Authority
from layered_store.enumerable import Enumerable
from layered_store.errors import RejectedError, StoreError, UnsupportedError
from layered_store.testing.report import Broken, Unneeded
from layered_store.testing.samples import sample_fields

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from layered_store.interface import StateStore
    from layered_store.snapshot import StateSnapshot

__all__ = ["NOW_MS", "SOON_SECONDS", "Suite", "in_time"]

T = TypeVar("T")

NOW_MS: Final = 1_700_000_000_000
SOON_SECONDS: Final = 5.0


async def in_time(call: Awaitable[T], what: str, remedy: str = "bound what it waits for") -> T:
    """Return the result of a call that must end within ``SOON_SECONDS``."""
    try:
        async with asyncio.timeout(SOON_SECONDS):
            return await call
    except TimeoutError as exc:
        if isinstance(exc, StoreError):
            raise
        raise Broken(f"{what} did not end within {SOON_SECONDS:g} s; {remedy}") from exc


@dataclass
class Suite:
    """One store under test, and what is known of it."""

    store: StateStore
    abilities: list[str] = field(default_factory=list)
    run: str = field(default_factory=lambda: os.urandom(5).hex())
    used: list[str] = field(default_factory=list)
    added: dict[str, Any] = field(init=False)
    """A value for each field that the store's class of snapshots adds."""
    writes: bool = True
    """Whether it takes writes at all."""
    has_history: bool = True
    """Whether the history can be asked for at all."""
    history: int = 0
    """How many of three states the history gave back."""
    can_delete: bool = False

    def __post_init__(self) -> None:
        self.added = sample_fields(self.store.snapshot_type)

    def user(self, name: str) -> str:
        """Return a user id of this run."""
        user_id = f"check-{self.run}-{name}"
        self.used.append(user_id)
        return user_id

    def snapshot(self, user_id: str, number: int = 0, **fields: Any) -> StateSnapshot:
        """Return the ``number``-th state of a user."""
        fields = {"updated_at_unix_ms": NOW_MS + number, **fields}
        fields.setdefault("axes", {"warmth": (number % 101) / 101, "formality": 0.1})
        return self.store.snapshot_type(user_id=user_id, **{**self.added, **fields})

    async def write(self, name: str, count: int = 1) -> list[StateSnapshot]:
        """Write so many states of a new user and return them, oldest first."""
        user_id = self.user(name)
        written = [self.snapshot(user_id, number) for number in range(count)]
        for snapshot in written:
            await self.store.upsert_latest(snapshot)
        return written

    async def find(self) -> None:
        """Try out which abilities the store has."""
        try:
            written = await self.write("abilities", 3)
        except (RejectedError, UnsupportedError):
            self.writes = False
            return
        self.abilities.append("writes")
        user_id = written[0].user_id
        try:
            kept = await self.store.get_history(user_id, 3)
        except UnsupportedError:
            self.has_history, kept = False, []
        if not isinstance(kept, list):
            raise Broken(f"get_history() returned a {type(kept).__name__}; return a list")
        self.history = len(kept)
        if self.history:
            self.abilities.append("history")
        try:
            await self.store.delete(user_id)
            self.can_delete = True
            self.abilities.append("delete")
        except UnsupportedError:
            pass
        for kind, name in ((Authority, "versions"), (Enumerable, "listing")):
            if self.store.capability(kind) is not None:
                self.abilities.append(name)

    def need_history(self) -> None:
        if not self.history:
            raise Unneeded("it keeps no history")

    async def history_of(self, user_id: str, limit: int) -> list[StateSnapshot]:
        """Return a user's history, [] of a store that has none (UnsupportedError)."""
        return await self.store.get_history(user_id, limit) if self.has_history else []

    def need_delete(self) -> None:
        if not self.can_delete:
            raise Unneeded("it cannot delete (UnsupportedError)")

    def need(self, kind: type[Any], name: str) -> Any:
        ability = self.store.capability(kind)
        if ability is None:
            raise Unneeded(f"it does not offer {name}")
        return ability

    async def clean_up(self) -> None:
        if self.can_delete:
            # At once, since a delete may wait until no other process can show the user.
            await asyncio.gather(*map(self.store.delete, self.used), return_exceptions=True)
