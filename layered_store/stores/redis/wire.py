"""Commands in Redis' wire form."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    parts = [b"*%d\r\n" % (len(args) + len(keys))]
    for arg in args:
        raw = arg if isinstance(arg, bytes) else str(arg).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(raw), raw))
    if keys:
        size = b"$%d\r\n" % len(keys[0])
        parts += (size, (b"\r\n" + size).join(keys), b"\r\n")
    return b"".join(parts)
