"""Snapshot <-> bytes, for backends that keep bytes.

The form is one byte that names it, then MessagePack: of the fields by name, or of user id, time and
bytes of a sealed snapshot. Unknown fields are ignored and missing ones take their defaults, so that
a fleet can be upgraded process by process; a form byte from the future is recognised and not
misread. Nothing in it can run code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import msgspec

from layered_store.errors import StoreError
from layered_store.sealed import SealedSnapshot
from layered_store.snapshot import Int64

if TYPE_CHECKING:
    from layered_store.snapshot import StateSnapshot

__all__ = ["FORM_MSGPACK", "FORM_SEALED", "CodecError", "SnapshotCodec"]

FORM_MSGPACK: Final = 1
"""First byte of a snapshot."""

FORM_SEALED: Final = 2
"""First byte of a snapshot that a layer above sealed."""

_encode_sealed = msgspec.msgpack.Encoder().encode
_decode_sealed = msgspec.msgpack.Decoder(tuple[str, Int64, bytes]).decode

S = TypeVar("S", bound="StateSnapshot")


class CodecError(StoreError):
    """Bytes that are not a snapshot of the expected user; the text never shows any of them."""


class SnapshotCodec(Generic[S]):
    """Encodes and decodes snapshots of one class.

    Args:
        snapshot_type: the class to read; bytes of another one are read as far as fields agree.
    """

    __slots__ = ("_decode", "_encode", "snapshot_type")

    def __init__(self, snapshot_type: type[S]) -> None:
        self.snapshot_type = snapshot_type
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(snapshot_type).decode

    def encode(self, snapshot: S) -> bytes:
        """Return the stored form of a validated snapshot, sealed or not."""
        if isinstance(snapshot, SealedSnapshot):
            fields = (snapshot.user_id, snapshot.updated_at_unix_ms, snapshot.sealed)
            return b"\x02" + _encode_sealed(fields)
        return b"\x01" + self._encode(snapshot)

    def decode(self, data: bytes, user_id: str | None = None) -> S:
        """Return the snapshot that ``data`` holds, or the sealed one that stands in its place.

        Ranges of numbers and the kinds of all fields are checked; the names of axes are not, as
        they were when written.

        Args:
            data: what :meth:`encode` returned.
            user_id: whose it must be; a record of another user is refused (None: not checked).

        Raises:
            CodecError: truncated, of a newer form, another schema, or another user's.
        """
        try:
            # A copy of the body costs a fifth of what a view of it does.
            snapshot: S = (
                self._decode(data[1:]) if data[:1] == b"\x01" else _decode_other(data)
            )
        except (msgspec.MsgspecError, UnicodeError, ValueError, RecursionError) as exc:
            raise CodecError(f"the record cannot be decoded ({type(exc).__name__})") from None
        if user_id is not None and snapshot.user_id != user_id:
            raise CodecError("the record belongs to another user")
        return snapshot


def _decode_other(data: bytes) -> Any:
    """Return what a record of another form holds."""
    if not data:
        raise CodecError("the record is empty")
    if data[0] != FORM_SEALED:
        raise CodecError(f"the record has form {data[0]}, which this version does not know")
    user_id, updated_at_unix_ms, sealed = _decode_sealed(data[1:])
    return SealedSnapshot(user_id, updated_at_unix_ms, sealed=sealed)
