"""Commands in Redis' wire form."""

from __future__ import annotations

from typing import TYPE_CHECKING

import hiredis

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Command", "pack_command"]

Command = tuple[bytes | str | int, ...]


def pack_command(args: Sequence[bytes | str | int], keys: Sequence[bytes] = ()) -> bytes:
    """Return a command in Redis' wire form.

    Args:
        args: its name and arguments.
        keys: more arguments, all of one length: so many are packed at once.
    """
    # Its stub knows tuples of one.
    head: bytes = hiredis.pack_command(tuple(args))  # type: ignore[arg-type]
    if not keys:
        return head
    size = b"$%d\r\n" % len(keys[0])
    rest = head.partition(b"\r\n")[2]
    parts = (b"*%d\r\n" % (len(args) + len(keys)), rest, size, (b"\r\n" + size).join(keys))
    return b"".join((*parts, b"\r\n"))
