"""Snapshot <-> bytes, for backends that keep bytes.

The form is MessagePack, and the first byte names it: the one that begins a map (of the fields by
name), or 2, with user id, time and bytes of a sealed snapshot behind it. Databases and sealed
states of earlier versions hold maps behind a 1; those are read, and no longer written. Unknown
fields are ignored and missing ones take their defaults, so that a fleet can be upgraded process by
process; a first byte from the future is recognised and not misread. Nothing in it can run code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import msgspec

from layered_store.errors import StoreError
from layered_store.sealed import SealedSnapshot
from layered_store.snapshot import Int64

if TYPE_CHECKING:
    from layered_store.snapshot import StateSnapshot

__all__ = ["CodecError", "SnapshotCodec"]

_FORM_EARLIER: Final = b"\x01"
"""First byte of a snapshot in what earlier versions wrote, before the map."""

_FORM_SEALED: Final = b"\x02"
"""First byte of a snapshot that a layer above sealed."""

_MAPS: Final = frozenset((*range(0x80, 0x90), 0xDE, 0xDF))
"""First bytes of a snapshot: those with which MessagePack begins a map."""

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
        if type(snapshot) is not self.snapshot_type and isinstance(snapshot, SealedSnapshot):
            fields = (snapshot.user_id, snapshot.updated_at_unix_ms, snapshot.sealed)
            return _FORM_SEALED + _encode_sealed(fields)
        return self._encode(snapshot)

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
            snapshot: S = self._decode(data)
        except _UNREADABLE as exc:
            snapshot = self._decode_other(data, exc)
        if snapshot.user_id != user_id and user_id is not None:
            raise CodecError("the record belongs to another user")
        return snapshot

    def _decode_other(self, data: bytes, problem: Exception) -> S:
        if data[:1] != _FORM_EARLIER:
            return _decode_sealed_form(data, problem)  # type: ignore[no-any-return]
        try:
            return self._decode(data[1:])
        except _UNREADABLE as exc:
            raise CodecError(f"the record cannot be decoded ({type(exc).__name__})") from None


_UNREADABLE = (msgspec.MsgspecError, UnicodeError, ValueError, RecursionError)


def _decode_sealed_form(data: bytes, problem: Exception) -> Any:
    """Return the sealed snapshot that a record holds, or raise what is wrong with it."""
    if not data:
        raise CodecError("the record is empty") from None
    if data[:1] == _FORM_SEALED:
        try:
            user_id, updated_at_unix_ms, sealed = _decode_sealed(data[1:])
        except _UNREADABLE as exc:
            problem = exc
        else:
            return SealedSnapshot(user_id, updated_at_unix_ms, sealed=sealed)
    elif data[0] not in _MAPS:
        raise CodecError(
            f"the record has form {data[0]}, which this version does not know"
        ) from None
    raise CodecError(f"the record cannot be decoded ({type(problem).__name__})") from None
