"""Store large states in less room."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Final

from layered_store.checks import is_state_of
from layered_store.codec import CodecError, SnapshotCodec
from layered_store.errors import CorruptDataError
from layered_store.interface import snapshot_type_of
from layered_store.layers.translating import TranslatingLayer
from layered_store.options import check_count
from layered_store.sealed import SealedSnapshot
from layered_store.stats import Sample

if TYPE_CHECKING:
    from collections.abc import Iterable

    from layered_store.snapshot import StateSnapshot

__all__ = ["Compressed"]

_FORM: Final = b"\x01"
"""First byte of a sealed state that was compressed; ``Encrypted`` has another."""

_LONGEST: Final = 64 * 2**20
"""Most bytes that are compressed, and that a record may unfold to: a damaged one must not fill the
memory."""


@dataclass(eq=False, repr=False)
class Compressed(TranslatingLayer):
    """Keep states of at least ``threshold`` bytes compressed (zlib) in the store below.

    A state that would not get smaller is stored as it is, and both forms are read, so the layer may
    be added to a store that has data, and its options changed, at any time. It is not worth it for
    states of the usual size: 20 axes are 0.5 kB, get a third smaller, and cost the event loop
    about 30 µs a write and 10 µs a read. It is for large subclasses of ``StateSnapshot``, and for
    cases where the memory of Redis is scarce.

    Args:
        inner: the store to keep the compressed states in.
        threshold: states smaller than so many bytes are stored as they are; at least 0.
        level: 1 (fastest) to 9 (smallest).

    Raises:
        ConfigError: an option is out of range.
        CorruptDataError: from a read, when the record does not decompress to a state of the user.
            In a cache tier such a copy is a miss.

    Order:
        Around the backend, or above ``WriteThrough``; below ``Cached``. Outside ``Encrypted``,
        since ciphertext does not get smaller. Right: ``Cached(Compressed(Encrypted(store,
        keys=keys)))``.
        Wrong: ``Encrypted(Compressed(store), keys=keys)``. Do not compress before encrypting where
        an attacker can choose part of a state and watch its size.

    Cancellation:
        As of the store below.
    """

    threshold: int = field(default=1024, kw_only=True)
    level: int = field(default=6, kw_only=True)

    kind: ClassVar[str] = "compressed"

    def __post_init__(self) -> None:
        check_count(self.threshold, "threshold", self, minimum=0)
        check_count(self.level, "level", self, maximum=9)
        self._before = self._after = 0
        super().__post_init__()
        self._codec = SnapshotCodec(snapshot_type_of(self.inner))

    def down(self, snapshot: StateSnapshot) -> StateSnapshot:
        plain = self._codec.encode(snapshot)
        if not self.threshold <= len(plain) <= _LONGEST:
            return snapshot
        packed = zlib.compress(plain, self.level)
        self._before += len(plain)
        self._after += min(len(packed), len(plain))
        if len(packed) >= len(plain):
            return snapshot
        return SealedSnapshot(
            snapshot.user_id, snapshot.updated_at_unix_ms, sealed=_FORM + packed
        )

    def up(self, kept: StateSnapshot, user_id: str) -> StateSnapshot:
        if type(kept) is not SealedSnapshot or kept.sealed[:1] != _FORM:
            # Stored as it is, or sealed by a layer above.
            if not is_state_of(kept, user_id):
                raise CorruptDataError(
                    "the record belongs to another user", layer=self.name, user_id=user_id
                )
            return kept
        try:
            unfold = zlib.decompressobj()
            plain = unfold.decompress(memoryview(kept.sealed)[1:], _LONGEST)
            if not unfold.eof or unfold.unused_data:
                raise CodecError("the compressed record is truncated or too long")
            return self._codec.decode(plain, user_id)
        except zlib.error:
            message = "the compressed record is damaged"
        except CodecError as exc:
            message = exc.message
        raise CorruptDataError(message, layer=self.name, user_id=user_id)

    def samples(self) -> Iterable[Sample]:
        yield from super().samples()
        yield Sample("compression_bytes", self._before, ("before",))
        yield Sample("compression_bytes", self._after, ("after",))
