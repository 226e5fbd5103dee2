"""What the scripts say over the invalidation channel."""

from __future__ import annotations

from typing import Final, NamedTuple

__all__ = ["MOMENTS", "Message", "parse"]

MOMENTS: Final = 1_000_000
"""How many moments of the server's clock a second has: no two messages are sent at the same."""

_PARTS: Final = 6


class Message(NamedTuple):
    """One message as a script publishes it: ``kind|sent|number|erased|server|body``.

    Args:
        echo: whether it answers a ping; else it tells of a change.
        sent: the server's clock when it was published, in microseconds.
        number: of the ping, or the version of the record.
        erased: whether the record is a tombstone.
        server: the run of the server that published it.
        body: who sent the ping, or the digest of the user; empty when it is about everybody.
    """

    echo: bool
    sent: int
    number: int
    erased: bool
    server: bytes
    body: bytes


def parse(data: bytes) -> Message | None:
    """Return the message, or None when it is another program's."""
    parts = data.split(b"|", _PARTS - 1)
    if len(parts) != _PARTS or parts[0] not in (b"i", b"p"):
        return None
    kind, sent, number, erased, server, body = parts
    try:
        return Message(kind == b"p", int(sent), int(number), erased == b"1", server, body)
    except ValueError:
        return None
