"""Who a record belongs to: the rule for user ids, their storage digest, how they are shown."""

from __future__ import annotations

import re
from hashlib import blake2b
from typing import Final

from layered_store._alphanumeric import ALPHANUMERIC_RANGES
from layered_store.errors import ConfigError, ValidationError
from layered_store.options import is_utf8, name_of

__all__ = [
    "DIGEST_BYTES",
    "MAX_USER_ID_BYTES",
    "PrivateStr",
    "check_user_id",
    "digest_function",
    "is_valid_user_id",
    "redact",
]

MAX_USER_ID_BYTES: Final = 256
"""Longest user id, counted in UTF-8 bytes."""

DIGEST_BYTES: Final = 16
"""Length of a user's storage key: 128 bits, so that two users never share one by accident."""

_MAX_KEY_BYTES: Final = 64
_SHOWN_CHARACTERS: Final = 4
_is_ascii_id: Final = re.compile(r"[A-Za-z0-9_-]{1,256}").fullmatch
_checked: str = "u"


def _character_class() -> str:
    parts = []
    for word in ALPHANUMERIC_RANGES.split():
        first, _, last = word.partition("-")
        parts.append(rf"\U{int(first, 16):08x}-\U{int(last or first, 16):08x}")
    return "[A-Za-z0-9_" + "".join(parts) + "-]+"


_unicode_id: re.Pattern[str] | None = None


def is_valid_user_id(user_id: object) -> bool:
    """Tell whether ``user_id`` may name a user.

    Valid is a ``str`` of 1 to 256 UTF-8 bytes whose characters are alphanumeric in the sense of
    Unicode (letters, alphabetic marks, numbers) or ``_`` or ``-``.
    """
    if not isinstance(user_id, str):
        return False
    if _is_ascii_id(user_id):
        return True
    if not user_id or user_id.isascii():
        return False
    global _unicode_id  # noqa: PLW0603  compiled on the first non-ASCII id: 40 kB and 10 ms
    if _unicode_id is None:
        _unicode_id = re.compile(_character_class())
    # The pattern excludes lone surrogates, so encoding afterwards cannot fail.
    return _unicode_id.fullmatch(user_id) is not None and len(user_id.encode()) <= MAX_USER_ID_BYTES


def check_user_id(
    user_id: object, operation: str | None = None, block: object = None
) -> None:
    """Raise :class:`ValidationError` unless ``user_id`` may name a user.

    Args:
        user_id: what the caller passed.
        operation: the store operation, for the error.
        block: what refuses it, for the error.
    """
    global _checked  # noqa: PLW0603
    # Each layer of a call asks for the same id, without others in between.
    if user_id is _checked:
        return
    # By far most ids are ASCII: asked first, since every operation comes by here.
    if type(user_id) is str and _is_ascii_id(user_id):
        _checked = user_id
        return
    if is_valid_user_id(user_id):
        if type(user_id) is str:
            _checked = user_id
        return
    if not isinstance(user_id, str):
        message = f"must be a str, not {type(user_id).__name__}"
    elif not user_id:
        message = "must not be empty"
    elif len(user_id.encode("utf-8", "surrogatepass")) > MAX_USER_ID_BYTES:
        message = f"must have at most {MAX_USER_ID_BYTES} UTF-8 bytes"
    else:
        message = "may hold only letters, digits, '_' and '-' (Unicode alphanumerics)"
    raise ValidationError(
        message,
        field="user_id",
        operation=operation,
        layer=name_of(block),
        user_id=user_id if isinstance(user_id, str) else None,
    )


def redact(user_id: object) -> str:
    """Return what may be shown of a user id: its first 4 characters, if it has more."""
    if isinstance(user_id, str) and len(user_id) > _SHOWN_CHARACTERS:
        return f"{user_id[:_SHOWN_CHARACTERS]}..."
    return "[redacted]"


class PrivateStr(str):
    """A user id on its way to a driver that logs what it is given: its repr is redacted."""

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(redact(str(self)))


class digest_function:  # noqa: N801  used like a function: digest = digest_function(key)
    """The keyed digest that stands for a user in storage keys and messages.

    Two user ids never share one (128 bits), whatever they hold, and without the key nobody can
    test whether a known id is in a dump.

    Args:
        key: the same bytes (0 to 64) for every block and process that share data. Empty means an
            unkeyed digest: ids can then be guessed from a dump.
        layer: the block whose option the key is, for the error.

    Source: BLAKE2, RFC 7693, keyed mode.
    """

    __slots__ = ("_template", "fingerprint")

    def __init__(self, key: bytes | str = b"", layer: str | None = None) -> None:
        raw = key.encode() if is_utf8(key) else key
        if not isinstance(raw, bytes) or len(raw) > _MAX_KEY_BYTES:
            raise ConfigError("must be 0 to 64 bytes", option="digest_key", layer=layer)
        self._template = blake2b(digest_size=DIGEST_BYTES, key=raw, person=b"layered_store")
        check = self._template.copy()
        check.update(b"\x00fingerprint")  # NUL is in no user id
        self.fingerprint = check.hexdigest()

    def __call__(self, user_id: str) -> bytes:
        state = self._template.copy()
        state.update(user_id.encode())
        return state.digest()

    def hexadecimal(self, user_id: str) -> bytes:
        """Return the digest in hexadecimal digits."""
        state = self._template.copy()
        state.update(user_id.encode())
        return state.hexdigest().encode()
