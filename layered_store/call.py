"""What must stay the same while one write travels down a stack, however often it is tried."""

from __future__ import annotations

import os
import random
from contextlib import contextmanager, suppress
from contextvars import ContextVar, Token
from itertools import count
from typing import TYPE_CHECKING, Any, Final

import msgspec

from layered_store.clock import SYSTEM_CLOCK

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from layered_store.clock import Clock
    from layered_store.snapshot import StateSnapshot

__all__ = [
    "Call",
    "call_begins",
    "call_continues",
    "call_under_way",
    "current_call",
    "new_id",
    "next_order",
]

next_order: Final = count(1).__next__
"""The order in which writes begin and erasures end in this process, whatever its clocks say."""


# Seeded by the system, which takes five times as long for each id that it is asked for.
_ids: Final = random.Random()  # noqa: S311  ids are no secrets
if hasattr(os, "register_at_fork"):  # elsewhere than on Windows
    os.register_at_fork(after_in_child=_ids.seed)


def new_id() -> bytes:
    """Return 16 random bytes that no other call returns, in any process; no secret."""
    return _ids.getrandbits(128).to_bytes(16, "big")


class Call(msgspec.Struct, eq=False):
    """One write, as its caller sees it.

    Args:
        write_id: 16 random bytes; a backend that finds them on a stored entry of the user knows
            that an earlier attempt of this write took effect.
        started: when the caller began, on ``clock``.
        clock: the clock of the layer that the caller called.
        order: place of the beginning among the writes and erasures of this process.
        version: the version the write was given, once known; 0 where nobody numbers writes.
        superseded: set when the write did not become the latest state, since an erasure or a newer
            snapshot won; what it wrote must then not be cached. Set too when an erasure was a
            repeat, which spares what was written since: the user must not be taken for absent then.
        unsure: set when one attempt to store it went well, and another failed that may take effect
            later all the same.
        fresh: whether no store was asked for it yet; see :meth:`first_attempt`.
        ended: set when the caller was answered; a task that was left behind begins calls of its
            own.
        places: of a part of the caller's batch, where each of its snapshots stood in that.
        sound: the snapshot that was found valid last; it cannot change.
    """

    write_id: bytes
    started: float
    clock: Any = SYSTEM_CLOCK
    order: int = msgspec.field(default_factory=next_order)
    system_started: float = msgspec.field(default_factory=SYSTEM_CLOCK.monotonic)
    version: int = 0
    superseded: bool = False
    unsure: bool = False
    fresh: bool = False
    ended: bool = False
    places: tuple[int, ...] = ()
    sound: Any = None
    _first: Any = None
    # The others that are stored, by user, each with its number.
    _others: dict[str, list[tuple[int, Any]]] | None = None
    _count: int = 0

    def began(self, clock: Clock) -> float:
        """Return when the caller began, as ``clock`` read then.

        A clock that stands still in a test tells nothing of another one: the call then counts as
        begun now. Every clock that ticks with the system's reads the same.
        """
        if clock is self.clock:
            return self.started
        if clock.monotonic is SYSTEM_CLOCK.monotonic:
            return self.system_started
        return clock.monotonic()

    def id_of(self, snapshot: StateSnapshot) -> bytes:
        """Return the write id of ``snapshot``: the same for each attempt to store it.

        A layer may store more than what it was called with; each different snapshot is a write of
        its own.
        """
        first = self._first
        if first is None:
            self._first = snapshot
            return self.write_id
        if first is snapshot or first == snapshot:
            return self.write_id
        if self._others is None:
            self._others = {}
        same_user = self._others.setdefault(snapshot.user_id, [])
        for number, other in same_user:
            if other == snapshot:
                return self.part(2**31 + number)
        self._count += 1
        same_user.append((self._count, snapshot))
        return self.part(2**31 + self._count)

    def first_attempt(self) -> bool:
        """Tell, once, that no store can have met this write: its id was made for this very call."""
        fresh, self.fresh = self.fresh, False
        return fresh

    def again(self, write_id: bytes | None = None) -> Call:
        """Return this write for one more store: begun when it was, with an outcome of its own.

        Args:
            write_id: another id, for one snapshot of a batch.
        """
        return Call(
            self.write_id if write_id is None else write_id,
            self.started,
            self.clock,
            self.order,
            self.system_started,
            places=self.places if write_id is None else (),
        )

    def of(self, places: Iterable[int]) -> Call:
        """Return this write for some of the snapshots of its batch, by their places in it.

        Their ids are those of the whole, so that another attempt may divide it otherwise.
        """
        own = self.again()
        own.places = tuple(self._place(index) for index in places)
        return own

    def anew(self) -> Call:
        """Return this erasure for one more store, which is to erase whatever it did before.

        A repeated erasure spares what was written since the first, in a store that knows the
        repeat. Where another store decides, which may not, that would be left behind.
        """
        return self.again(new_id())

    def part(self, index: int) -> bytes:
        """Return the write id of the snapshot at ``index`` of a batch."""
        return self.write_id[:12] + self._place(index).to_bytes(4, "big")

    def _place(self, index: int) -> int:
        return self.places[index] if index < len(self.places) else index


_current: ContextVar[Call | None] = ContextVar("layered_store_call", default=None)


call_under_way: Final = _current.get
"""Returns the write that travels down here, or did until just now; None when there is none."""


def _new(clock: Clock) -> Call:
    started = clock.monotonic()
    by_system = started if clock is SYSTEM_CLOCK else SYSTEM_CLOCK.monotonic()
    return Call(new_id(), started, clock, next_order(), by_system, fresh=True)


class call_begins:  # noqa: N801  used like a function: with call_begins():
    """Make this the outermost moment of a write, unless a layer above already did.

    Args:
        clock: source of time.
    """

    __slots__ = ("_call", "_clock", "_token")

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._token: Token[Call | None] | None = None
        self._call: Call | None = None

    def __enter__(self) -> Call:
        call = _current.get()
        if call is None or call.ended:
            call = self._call = _new(self._clock)
            self._token = _current.set(call)
        return call

    def __exit__(self, *exc_info: object) -> None:
        if self._token is not None and self._call is not None:
            self._call.ended = True
            # A coroutine that nobody awaited to its end is closed in a context of its collector.
            with suppress(ValueError):
                _current.reset(self._token)


@contextmanager
def call_continues(call: Call) -> Iterator[None]:
    """Let writes in here count as begun when ``call`` began, earlier and elsewhere."""
    token = _current.set(call)
    try:
        yield
    finally:
        call.ended = True
        _current.reset(token)


def current_call(clock: Clock = SYSTEM_CLOCK) -> Call:
    """Return the write that is travelling down, or a new one for a store used on its own."""
    call = _current.get()
    if call is None or call.ended:
        call = _new(clock)
    return call
