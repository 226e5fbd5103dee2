"""Several tenants in one store, each with users of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from msgspec.structs import replace

from layered_store.errors import ConfigError, CorruptDataError, ValidationError
from layered_store.identity import MAX_USER_ID_BYTES, is_valid_user_id
from layered_store.layers.translating import DigestBelow, TranslatingLayer

if TYPE_CHECKING:
    from layered_store.identity import digest_function
    from layered_store.snapshot import StateSnapshot

__all__ = ["Prefixed"]

_MAX_PREFIX_BYTES = 64
_SEPARATOR = "-"


@dataclass(eq=False, repr=False)
class Prefixed(TranslatingLayer):
    """Keep the users of one tenant apart from those of others in the same store.

    Callers see their own ids; in the store, ``u-1`` of the tenant ``acme`` is ``acme-u-1``. Reads,
    histories, erasures and listings stay within the tenant, and no two tenants ever share an id,
    whatever their names are: a name with anything but letters, digits and ``_`` in it is stored in
    hexadecimal, ``-6f72673a31-u-1``. Users stored without a prefix belong to no tenant, so use the
    store through ``Prefixed`` only.

    Args:
        inner: the store that the tenants share.
        prefix: the tenant, 1 to 64 UTF-8 bytes; one ``-`` or ``:`` at its end is the separator and
            no part of it.

    Raises:
        ConfigError: ``prefix`` breaks these rules.
        ValidationError: from any operation, when prefix and user id together are longer than an id
            may be (256 bytes).
        CorruptDataError: from a read, when the record below is another user's.

    Order:
        Anywhere; outside ``Cached`` every hit pays for it, inside it none does. Above a
        ``WriteThrough``, or the same around its ``inner`` and its ``origin``. Right:
        ``Cached(Prefixed(store, prefix="acme"))``. Wrong: one ``Cached`` below the ``Prefixed`` of
        several tenants when one tenant must not push out another's entries.

    Cancellation:
        As of the store below.
    """

    prefix: str = field(kw_only=True)

    kind: ClassVar[str] = "prefixed"

    def __post_init__(self) -> None:
        tenant = self.prefix if isinstance(self.prefix, str) else ""
        tenant = tenant[:-1] if tenant[-1:] in (_SEPARATOR, ":") else tenant
        raw = tenant.encode("utf-8", "surrogatepass")
        if not 1 <= len(raw) <= _MAX_PREFIX_BYTES:
            raise ConfigError(
                f"must be a str of 1 to {_MAX_PREFIX_BYTES} UTF-8 bytes, such as 'acme'",
                option="prefix",
                layer=self.name,
            )
        # Up to the separator all is the tenant's: else user "b-1" of "a" and user "1" of "a-b"
        # would be one. No plain name begins with a separator.
        plain = is_valid_user_id(tenant) and _SEPARATOR not in tenant
        self._head = f"{tenant}{_SEPARATOR}" if plain else f"-{raw.hex()}{_SEPARATOR}"
        self._room = MAX_USER_ID_BYTES - len(self._head.encode())
        super().__post_init__()

    def down(self, snapshot: StateSnapshot) -> StateSnapshot:
        return replace(snapshot, user_id=self._head + snapshot.user_id)

    def up(self, kept: StateSnapshot, user_id: str) -> StateSnapshot:
        if kept.user_id != self._head + user_id:
            raise CorruptDataError(
                "the record belongs to another user", layer=self.name, user_id=user_id
            )
        return replace(kept, user_id=user_id)

    def id_below(self, user_id: str, operation: str) -> str:
        # A character has 4 bytes at most.
        if len(user_id) * 4 > self._room and len(user_id.encode()) > self._room:
            raise ValidationError(
                f"must have at most {self._room} UTF-8 bytes, as the prefix takes the rest",
                field="user_id",
                operation=operation,
                layer=self.name,
                user_id=user_id,
            )
        return self._head + user_id

    def id_above(self, below: str, kept: StateSnapshot | None) -> str | None:  # noqa: ARG002
        return below[len(self._head) :] or None if below.startswith(self._head) else None

    def digest_of(self, inner: digest_function) -> digest_function:
        return DigestBelow(inner, self._head.__add__, b"prefixed:" + self._head.encode())
