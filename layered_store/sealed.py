"""A state that its backend cannot read: encrypted or compressed by a layer above.

It stands in the place of the caller's snapshot below such a layer, so every store keeps it like any
other: it has the user id and the time, which stores need for keys and for
``order="snapshot_time"``, and bytes. Whatever looks for the state in it gets an error, and never an
empty state.
"""

from __future__ import annotations

from typing import NoReturn

from layered_store.errors import UnsupportedError
from layered_store.snapshot import StateSnapshot

__all__ = ["SealedSnapshot"]

_REMEDY = (
    "this state is sealed; read it through the layer that sealed it (Encrypted, Compressed), and"
    " keep it as an object or by SnapshotCodec"
)


class SealedSnapshot(StateSnapshot, frozen=True, gc=False):
    """What a backend keeps in place of a state that it must not or need not read.

    Args:
        user_id: whose it is, as the backend knows the user.
        updated_at_unix_ms: the time of the state.
        sealed: the state, as the layer that sealed it writes it.
    """

    sealed: bytes = b""

    def validate(self) -> None:
        if type(self.sealed) is not bytes or not self.sealed:
            raise self._refuse("sealed", "must be bytes, at least one")
        super().validate()

    def _check_added_fields(self) -> None:
        """The one added field was looked at."""

    def to_json(self) -> bytes:
        raise UnsupportedError(_REMEDY, layer="SealedSnapshot")

    def get_axis(self, name: str) -> float:  # noqa: ARG002
        raise UnsupportedError(_REMEDY, layer="SealedSnapshot")

    def get_axis_opt(self, name: str) -> float | None:  # noqa: ARG002
        raise UnsupportedError(_REMEDY, layer="SealedSnapshot")

    def __repr__(self) -> str:
        return super().__repr__().replace("axes=<0>", f"sealed=<{len(self.sealed)} bytes>")

    __hash__ = StateSnapshot.__hash__


def _unreadable(_: SealedSnapshot) -> NoReturn:
    raise UnsupportedError(_REMEDY, layer="SealedSnapshot")


# After the class was made, as for every field of a snapshot: the slot itself stays for C code.
type.__setattr__(SealedSnapshot, "axes", property(_unreadable))
