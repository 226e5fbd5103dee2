"""What must stay the same while one write travels down a stack, however often it is tried."""

from __future__ import annotations

import os
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layered_store.clock import SYSTEM_CLOCK

if TYPE_CHECKING:
    from layered_store.clock import Clock

__all__ = ["Call", "call_begins", "current_call"]


@dataclass(slots=True)
class Call:
    """One write, as its caller sees it.

    Args:
        write_id: 16 random bytes; a backend that finds them on a stored entry of the user knows
            that an earlier attempt of this write took effect.
        started: when the caller began, on the clock that the backend measures with. An erasure
            after this moment wins over the write.
        version: the version the write was given, once known; 0 where nobody numbers writes.
        superseded: set when the write did not become the latest state, since an erasure or a newer
            snapshot won; what it wrote must then not be cached.
    """

    write_id: bytes
    started: float
    version: int = 0
    superseded: bool = False

    def part(self, index: int) -> bytes:
        """Return the write id of the snapshot at ``index`` of a batch."""
        return self.write_id[:12] + index.to_bytes(4, "big")


_current: ContextVar[Call | None] = ContextVar("layered_store_call", default=None)


class call_begins:  # noqa: N801  used like a function: with call_begins():
    """Make this the outermost moment of a write, unless a layer above already did.

    Args:
        clock: source of time.
    """

    __slots__ = ("_clock", "_token")

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._token: Token[Call | None] | None = None

    def __enter__(self) -> Call:
        call = _current.get()
        if call is None:
            call = Call(os.urandom(16), self._clock.monotonic())
            self._token = _current.set(call)
        return call

    def __exit__(self, *exc_info: object) -> None:
        if self._token is not None:
            _current.reset(self._token)


def current_call(clock: Clock = SYSTEM_CLOCK) -> Call:
    """Return the write that is travelling down, or a new one for a store used on its own."""
    return _current.get() or Call(os.urandom(16), clock.monotonic())
