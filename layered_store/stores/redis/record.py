"""What stands under a user's key in Redis: a fixed header, then the snapshot.

::

    bytes 0-2    "LS" and the form of the rest (1)
    byte  3      kind: S state, F state that a reader filled in, D tombstone, T token
    bytes 4-11   version, big-endian, below 2**53 since Lua counts in doubles
    bytes 12-27  generation of a shared cache tier. When the store is used on its own: of a state
                 that followed an erasure, the version and the time of that one; else zeros
    byte  28     number of write ids that follow, newest first, 16 bytes each
    then         the snapshot in the form of :mod:`layered_store.codec`; for a tombstone of a shared
                 cache tier, the digest of its user; for one of a store that is used on its own,
                 the time of the erasure (8 bytes, microseconds)

A record of an unknown form, a truncated one or anything else is recognised and never misread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "FILLED",
    "HEADER_BYTES",
    "MAGIC",
    "MAX_VERSION",
    "NO_GENERATION",
    "STATE",
    "TOKEN",
    "TOMBSTONE",
    "Record",
    "pack",
    "unpack",
]

MAGIC: Final = b"LS\x01"
"""Name of the format and the form that this version writes."""

STATE: Final = b"S"
FILLED: Final = b"F"
TOMBSTONE: Final = b"D"
TOKEN: Final = b"T"

HEADER_BYTES: Final = 28
WRITE_ID_BYTES: Final = 16
NO_GENERATION: Final = bytes(16)
MAX_VERSION: Final = 2**53 - 1

_KINDS: Final = frozenset({STATE, FILLED, TOMBSTONE, TOKEN})


class Record(NamedTuple):
    """One value under a record key.

    Args:
        kind: :data:`STATE`, :data:`FILLED`, :data:`TOMBSTONE` or :data:`TOKEN`.
        version: of the user's state, growing with every write.
        generation: of the cache tier that the record belongs to; outside of one see above.
        write_ids: of the latest writes, newest first, so that a repeat is recognised.
        body: the encoded snapshot; of a tombstone, see above.
    """

    kind: bytes
    version: int
    generation: bytes
    write_ids: tuple[bytes, ...]
    body: bytes

    @property
    def shared(self) -> bool:
        """Whether a cache tier wrote it: generations do not begin with two zeros."""
        return not self.generation.startswith(b"\0\0")


def pack(
    kind: bytes,
    version: int,
    body: bytes = b"",
    *,
    generation: bytes = NO_GENERATION,
    write_ids: Sequence[bytes] = (),
) -> bytes:
    """Return the stored form of a record; see :class:`Record` for the arguments."""
    return b"".join(
        (
            MAGIC,
            kind,
            version.to_bytes(8, "big"),
            generation,
            len(write_ids).to_bytes(1, "big"),
            *write_ids,
            body,
        )
    )


def unpack(data: object) -> Record | None:
    """Return the record that ``data`` holds, or None when it does not have this form."""
    if not isinstance(data, bytes) or len(data) < HEADER_BYTES or not data.startswith(MAGIC):
        return None
    kind = data[3:4]
    version = int.from_bytes(data[4:12], "big")
    if kind not in _KINDS or version > MAX_VERSION:
        return None
    generation = data[12:28]
    if len(data) == HEADER_BYTES:
        # Tokens of a cache tier end here; a state never does.
        return Record(kind, version, generation, (), b"") if kind in b"DT" else None
    count = data[HEADER_BYTES]
    start = HEADER_BYTES + 1
    end = start + count * WRITE_ID_BYTES
    if len(data) < end:
        return None
    write_ids = tuple(data[at : at + WRITE_ID_BYTES] for at in range(start, end, WRITE_ID_BYTES))
    return Record(kind, version, generation, write_ids, data[end:])
