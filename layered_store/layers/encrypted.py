"""Hide states from the backend that keeps them."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, ClassVar, Final

from layered_store.call import current_call
from layered_store.codec import CodecError, SnapshotCodec
from layered_store.errors import ConfigError, CorruptDataError
from layered_store.interface import snapshot_type_of
from layered_store.layers.translating import DigestBelow, TranslatingLayer
from layered_store.options import check_choice
from layered_store.sealed import SealedSnapshot
from layered_store.stats import Sample

if TYPE_CHECKING:
    from collections.abc import Iterable

    from layered_store.identity import digest_function
    from layered_store.snapshot import StateSnapshot

__all__ = ["Encrypted"]

_FORM: Final = b"\x02"
"""First byte of a sealed state that was encrypted; ``Compressed`` has another."""

_KEY_BYTES: Final = 32
_ID_BYTES: Final = 4
_NONCE_BYTES: Final = 24
_HEAD_BYTES: Final = 1 + _ID_BYTES + _NONCE_BYTES


class _Key:
    """One key, and what is derived from it.

    Every record is encrypted under a key of its own, derived from the first half of its 192-bit
    nonce: the 96 bits of AES-GCM alone would allow 2**32 writes per key only. The nonce is itself
    derived, from the write's random id and all that is encrypted: equal attempts of one write are
    then equal, and a nonce never serves two texts, even if the random numbers fail.
    """

    __slots__ = ("_raw", "id")

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self.id = self.derive(b"ls-key-id", b"", _ID_BYTES)

    def derive(self, purpose: bytes, data: bytes, size: int) -> bytes:
        return blake2b(data, digest_size=size, key=self._raw, person=purpose).digest()

    def encrypt(self, aead: Any, write_id: bytes, plain: bytes, bound: bytes) -> bytes:
        told = b"".join((write_id, len(bound).to_bytes(4, "big"), bound, plain))
        nonce = self.derive(b"ls-nonce", told, _NONCE_BYTES)
        own = self.derive(b"ls-record", nonce[:12], _KEY_BYTES)
        return _FORM + self.id + nonce + bytes(aead(own).encrypt(nonce[12:], plain, bound))

    def decrypt(self, aead: Any, sealed: bytes, bound: bytes) -> bytes:
        nonce = sealed[1 + _ID_BYTES : _HEAD_BYTES]
        own = self.derive(b"ls-record", nonce[:12], _KEY_BYTES)
        return bytes(aead(own).decrypt(nonce[12:], sealed[_HEAD_BYTES:], bound))


@dataclass(eq=False, repr=False)
class Encrypted(TranslatingLayer):
    """Encrypt every state before it reaches the store below; check it when it comes back.

    The backend sees user ids (or keyed hashes of them), the time and the size of each state, and
    ciphertext (AES-256-GCM). A record that was changed, or copied from another user, is refused:
    ``CorruptDataError`` from a system of record, a miss in a cache tier. If somebody who controls
    the backend puts back an older record of the same user, this is not noticed.

    Args:
        inner: the store to keep the encrypted states in; any backend or stack.
        keys: the first encrypts, all decrypt; each 32 bytes, as ``bytes`` or as base64 text.
            :meth:`new_key` makes one. To change keys, put the new one last in all processes, then
            first in all; keep the old ones as long as anything written with them is kept, history
            included.
        hash_user_ids: give the store below keyed hashes in place of user ids. Data stored without
            is not found with it, and the other way round.
        id_key: the key of these hashes; the only one of ``keys`` unless given. It can never change,
            so with several keys it must be given: it is the one you began with.
        accept_plain: read records that are not encrypted, for a store that has data already. While
            it is set, anybody who can write to the backend can forge a state.

    Raises:
        ConfigError: a key is not 32 bytes, two are equal, an option is missing, or the package
            ``cryptography`` is (``pip install layered-store[crypto]``).
        CorruptDataError: from a read, when the record cannot be decrypted with any of the keys.

    Order:
        Below ``Cached``, so that hits cost nothing and the process's own memory is all that holds
        states in the clear. Around ``inner`` and around ``origin`` of a ``WriteThrough``, with the
        same ``hash_user_ids`` and ``id_key``; around the whole of it, a damaged copy in the cache
        tier is an error instead of a miss. Inside ``Compressed``. Right:
        ``Cached(Encrypted(redis, keys=keys), fallback=Encrypted(sql, keys=keys))``.

    Cancellation:
        As of the store below.

    Source:
        NIST SP 800-38D (GCM and its limits); Gueron and Lindell, "Better Bounds for Block Cipher
        Modes of Operation via Nonce-Based Key Derivation", 2017 (a key per record); BLAKE2, RFC
        7693.
    """

    keys: Sequence[str | bytes] = field(kw_only=True, repr=False)
    hash_user_ids: bool = field(default=False, kw_only=True)
    id_key: str | bytes | None = field(default=None, kw_only=True, repr=False)
    accept_plain: bool = field(default=False, kw_only=True)

    kind: ClassVar[str] = "encrypted"

    def __post_init__(self) -> None:
        if isinstance(self.keys, str | bytes) or not isinstance(self.keys, Sequence):
            raise self._refuse("keys", "must be a list of keys, the one that writes first")
        raw = [self._read_key("keys", key) for key in self.keys]
        if not raw or len(set(raw)) != len(raw):
            raise self._refuse("keys", "must hold at least one key, and none twice")
        self._keys = {key.id: key for key in map(_Key, raw)}
        if len(self._keys) != len(raw):  # one chance in 2**32
            raise self._refuse("keys", "holds two keys that cannot be told apart; make a new one")
        self._writes_with = next(iter(self._keys.values()))
        check_choice(self.hash_user_ids, "hash_user_ids", self, (True, False))
        check_choice(self.accept_plain, "accept_plain", self, (True, False))
        self._id_key = self._find_id_key(raw)
        if self.hash_user_ids and self.accept_plain:
            raise self._refuse(
                "accept_plain",
                "finds nothing with hash_user_ids, as plain records stand under plain ids; copy the"
                " store into a new one instead (layered-store copy)",
            )
        self._aead, self._refused = _cryptography(self.name)
        self._old_keys = 0
        super().__post_init__()
        self._codec = SnapshotCodec(snapshot_type_of(self.inner))

    @staticmethod
    def new_key() -> str:
        """Return a new random key, as text for a config file or a secret store."""
        return base64.urlsafe_b64encode(os.urandom(_KEY_BYTES)).decode()

    def down(self, snapshot: StateSnapshot) -> StateSnapshot:
        below = self.id_below(snapshot.user_id)
        moment = snapshot.updated_at_unix_ms
        sealed = self._writes_with.encrypt(
            self._aead,
            current_call().write_id,
            self._codec.encode(snapshot),
            _bound(below, moment),
        )
        return SealedSnapshot(below, moment, sealed=sealed)

    def up(self, kept: StateSnapshot, user_id: str) -> StateSnapshot:
        if type(kept) is not SealedSnapshot or kept.sealed[:1] != _FORM:
            if self.accept_plain and kept.user_id == user_id:
                return kept
            raise self._corrupt_record(
                "the record is not encrypted; accept_plain=True reads what was stored before",
                user_id,
            )
        snapshot = self._decrypt(kept, user_id)
        if snapshot.user_id != user_id:
            raise self._corrupt_record("the record belongs to another user", user_id)
        return snapshot

    def _decrypt(self, kept: SealedSnapshot, user_id: str | None) -> StateSnapshot:
        sealed = kept.sealed
        key = self._keys.get(sealed[1 : 1 + _ID_BYTES])
        if key is None:
            raise self._corrupt_record(
                "the record was encrypted with a key that is not among keys", user_id
            )
        # The id that the record stands under is part of what is authenticated.
        below = kept.user_id if user_id is None else self.id_below(user_id)
        bound = _bound(below, kept.updated_at_unix_ms)
        try:
            plain = key.decrypt(self._aead, sealed, bound)
            snapshot = self._codec.decode(plain)
        except (self._refused, CodecError, ValueError):
            raise self._corrupt_record(
                "the record was changed, damaged or copied from elsewhere", user_id
            ) from None
        if key is not self._writes_with:
            self._old_keys += 1
        return snapshot

    def id_below(self, user_id: str, operation: str = "") -> str:  # noqa: ARG002
        if self._id_key is None:
            return user_id
        return self._id_key.derive(b"ls-user-id", user_id.encode(), 16).hex()

    def id_above(self, below: str, kept: StateSnapshot | None) -> str | None:
        if not self.hash_user_ids:
            return below
        if kept is None:
            return None
        if type(kept) is not SealedSnapshot or kept.sealed[:1] != _FORM:
            raise self._corrupt_record("the record is not encrypted", None)
        user_id = self._decrypt(kept, None).user_id
        if self.id_below(user_id) != below:
            raise self._corrupt_record("the record belongs to another user", None)
        return user_id

    @property
    def lists_by_record(self) -> bool:
        return self.hash_user_ids

    def digest_of(self, inner: digest_function) -> digest_function:
        if self._id_key is None:
            return inner
        return DigestBelow(inner, self.id_below, b"encrypted:" + self._id_key.id)

    def samples(self) -> Iterable[Sample]:
        yield from super().samples()
        yield Sample("old_key_reads", self._old_keys)

    def _find_id_key(self, keys: list[bytes]) -> _Key | None:
        if self.id_key is not None and not self.hash_user_ids:
            raise self._refuse("id_key", "is of no use without hash_user_ids=True")
        if not self.hash_user_ids:
            return None
        if self.id_key is not None:
            return _Key(self._read_key("id_key", self.id_key))
        if len(keys) > 1:
            raise self._refuse(
                "id_key",
                "must be given with several keys: the one that user ids were hashed with first (the"
                " oldest of keys, if there was no id_key then); with another, nobody is found",
            )
        return _Key(keys[0])

    def _read_key(self, option: str, key: object) -> bytes:
        raw: bytes | None = key if isinstance(key, bytes) else None
        if isinstance(key, str):
            try:
                raw = base64.b64decode(key.replace("-", "+").replace("_", "/"), validate=True)
            except (binascii.Error, ValueError):
                raw = None
        if raw is None or len(raw) != _KEY_BYTES:
            raise self._refuse(
                option,
                f"must be {_KEY_BYTES} bytes, as bytes or as base64 text; Encrypted.new_key() makes"
                " one",
            )
        return raw

    def _refuse(self, option: str, message: str) -> ConfigError:
        return ConfigError(message, option=option, layer=self.name)

    def _corrupt_record(self, message: str, user_id: str | None) -> CorruptDataError:
        return CorruptDataError(message, layer=self.name, user_id=user_id)


def _bound(below: str, moment: int) -> bytes:
    """Return what is authenticated with a state: whose it is below, and its time."""
    return b"".join((b"layered_store:", moment.to_bytes(8, "big", signed=True), below.encode()))


def _cryptography(layer: str) -> tuple[Any, type[Exception]]:
    try:
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415
    except ImportError:
        raise ConfigError(
            "needs the package cryptography: pip install 'layered-store[crypto]'", layer=layer
        ) from None
    return AESGCM, InvalidTag
