"""Single flight: one load of one user, shared by all who ask meanwhile.

Each caller who waits has a future of its own, so that cancelling one harms no other; when the
caller who loads goes away, the next one takes over.
"""

from __future__ import annotations

import asyncio
import copy
from typing import TYPE_CHECKING, Any, Final

import msgspec

from layered_store.errors import StoreError, own_notes

if TYPE_CHECKING:
    from layered_store.snapshot import StateSnapshot

__all__ = ["AGAIN", "LEAD", "NO_VALUE", "Failure", "Flight", "Stale", "fresh"]


class Failure:
    """The error of a load, on its way to those who wait.

    As it was raised: on the error itself, layers above note what is the loading caller's.
    """

    __slots__ = ("error",)

    def __init__(self, error: Exception) -> None:
        self.error = error.fresh() if isinstance(error, StoreError) else error


class Stale:
    """An old answer in place of an error, on its way to those who wait."""

    __slots__ = ("error", "value")

    def __init__(self, value: StateSnapshot, error: Exception) -> None:
        self.value = value
        self.error = error


NO_VALUE: Final = frozenset({Failure, Stale})
"""Types of results that are no answer by themselves."""

LEAD: Final = object()
"""Tells a waiting caller that the load is now its own."""

AGAIN: Final = object()
"""Tells a waiting caller that the load ended without an answer."""


class Flight(msgspec.Struct, eq=False):
    """One load of one user.

    It is current while it stands in ``Holdings.flights``. A write or delete takes it out: its
    callers still get their answer, but no later caller joins and nothing of it is kept.
    """

    loop: Any
    # The user's, under an invalidation channel.
    digest: bytes | None = None
    # Whether anybody ever waited for it.
    joined: bool = False
    # Whether it may be joined without a lease: it waits until the turn in which it began is over,
    # so nothing of it can have been read.
    boarding: bool = False
    # Callers that came too late to be sure of it.
    late: list[Any] | None = None
    waiters: list[Any] | None = None
    # Callers that wait for other users as well, and so cannot take over this load.
    passengers: list[Any] | None = None

    def board(self, future: Any) -> None:
        """Have a caller wait who waits for other users as well."""
        if self.passengers is None:
            self.passengers = []
        self.passengers.append(future)
        self.joined = True

    def come_late(self, future: Any) -> None:
        """Have a caller wait who came too late to be sure of the answer."""
        if self.late is None:
            self.late = []
        self.late.append(future)
        self.joined = True

    def land(self, result: Any) -> None:
        """Hand the result to everyone who waits."""
        for group in (self.waiters, self.passengers):
            if group is not None:
                for future in group:
                    try:
                        future.set_result(result)
                    except asyncio.InvalidStateError:
                        pass  # its caller was cancelled
        self.waiters = self.passengers = None
        late, self.late = self.late, None
        for future in late or ():
            if not future.done():
                # What failed for others fails for them; what was found may be too old for them.
                old = type(result) in NO_VALUE
                future.set_result(result if old else AGAIN)

    def close_doors(self) -> None:
        """End the turn in which it began."""
        self.boarding = False

    def any_waits(self) -> bool:
        """Tell whether a caller waits who could take over."""
        return any(not future.done() for future in self.waiters or ())

    def hand_over(self) -> bool:
        """Make the first caller who can the one that loads; False when none can."""
        for position, future in enumerate(self.waiters or ()):
            if not future.done():
                self.waiters = self.waiters[position + 1 :]  # type: ignore[index]
                future.set_result(LEAD)
                return True
        self.land(AGAIN)
        return False


def fresh(error: Exception) -> Exception:
    """Return an error of one's own for one more caller: a shared one would mix up tracebacks."""
    if isinstance(error, StoreError):
        return error.fresh()
    for twin_of in (copy.copy, _unbuilt):
        try:
            twin = twin_of(error)
            same = type(twin) is type(error) and twin.args == error.args
            if same and str(twin) == str(error):
                twin.__cause__ = error
                own_notes(twin)
                return twin
        except Exception:  # noqa: BLE001, S112  an exception class that cannot be copied this way
            continue
    return error


def _unbuilt(error: Exception) -> Exception:
    """Return a copy made without ``__init__``, which may take other arguments than ``args``."""
    twin = type(error).__new__(type(error))
    twin.args = error.args
    twin.__dict__.update(error.__dict__)
    return twin
