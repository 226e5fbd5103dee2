"""The base of layers that keep something else below than what their callers see.

Encryption, compression and tenants differ in four small functions only; that every operation, every
record of the coherence protocol and every error passes them is written here, once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, TypeVar

from layered_store.call import call_begins
from layered_store.checks import (
    check_limit,
    check_snapshot,
    check_snapshots,
    check_user_ids,
    not_of_user,
    states_by_user,
)
from layered_store.coherence.contract import (
    Authority,
    CacheTier,
    Invalidations,
    TierRead,
    Versioned,
)
from layered_store.coherence.views import View, view_of
from layered_store.enumerable import Enumerable, UserPage, enumerable_of
from layered_store.errors import CorruptDataError, StoreError
from layered_store.identity import check_user_id, digest_function
from layered_store.interface import Op, ability_of
from layered_store.layer import Layer
from layered_store.snapshot import StateSnapshot
from layered_store.stats import Sample

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from layered_store.coherence.contract import Holders, Ticket

__all__ = ["DigestBelow", "TranslatingLayer"]

C = TypeVar("C")
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(eq=False, repr=False)
class TranslatingLayer(Layer):
    """A layer that puts its own form of a snapshot below and gives back what it was.

    A subclass says how: :meth:`down` and :meth:`up` for snapshots, and, when users have other ids
    below, :meth:`id_below`, :meth:`id_above` and :meth:`digest_of`. Versions, the cache tier's
    protocol, the invalidation channel and listing go through the same functions, so it may stand
    around any backend and anywhere in a stack.
    """

    def __post_init__(self) -> None:
        self._corrupt = 0
        super().__post_init__()

    @abstractmethod
    def down(self, snapshot: StateSnapshot) -> StateSnapshot:
        """Return what is kept below for a valid snapshot.

        Within one write (:func:`layered_store.call.current_call`) equal snapshots give equal ones,
        so that a repeated attempt is recognised.
        """

    @abstractmethod
    def up(self, kept: StateSnapshot, user_id: str) -> StateSnapshot:
        """Return the snapshot of ``user_id`` (as callers know it) that ``kept`` stands for.

        Raises:
            CorruptDataError: it stands for none, or for another user's.
        """

    def id_below(self, user_id: str, operation: str) -> str:  # noqa: ARG002
        """Return the id of a user (already checked) in the store below."""
        return user_id

    def id_above(self, below: str, kept: StateSnapshot | None) -> str | None:  # noqa: ARG002
        """Return the id that callers know a user by, None when the user is not one of theirs."""
        return below

    def digest_of(self, inner: digest_function) -> digest_function:
        """Return the digest that gives a caller's id the key that ``inner`` gives its id below."""
        return inner

    @property
    def lists_by_record(self) -> bool:
        """Whether :meth:`id_above` needs the user's record."""
        return False

    def is_cache(self) -> bool:
        """Tell whether what stands below is a cache tier: an unreadable copy there is a miss."""
        return (
            ability_of(self.inner, CacheTier) is not None
            and ability_of(self.inner, Authority) is None
        )

    # The operations

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        check_snapshot(snapshot, self.snapshot_type, block=self)
        below = self.id_below(snapshot.user_id, Op.UPSERT_LATEST)
        with call_begins(), _ErrorsOf({below: snapshot.user_id}):
            await self.inner.upsert_latest(self.down(snapshot))

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        check_user_id(user_id, Op.GET_LATEST, self)
        kept = await self.ask(Op.GET_LATEST, self.inner.get_latest, user_id)
        return None if kept is None else self.opened(kept, user_id, Op.GET_LATEST)

    async def delete(self, user_id: str) -> None:
        check_user_id(user_id, Op.DELETE, self)
        await self.ask(Op.DELETE, self.inner.delete, user_id)

    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        check_user_id(user_id, Op.GET_HISTORY, self)
        check_limit(limit, self)
        kept: object = await self.ask(Op.GET_HISTORY, self.inner.get_history, user_id, limit)
        if not isinstance(kept, Iterable):
            raise not_of_user(user_id, Op.GET_HISTORY, self.name)
        found = (self.opened(each, user_id, Op.GET_HISTORY) for each in kept)
        return [snapshot for snapshot in found if snapshot is not None]

    async def get_latest_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        below = self.ids_below(user_ids, Op.GET_LATEST_MANY)
        with _ErrorsOf(below):
            kept = states_by_user(await self.inner.get_latest_many(list(below)), self)
        found = {}
        for inner_id, user_id in below.items():
            if inner_id in kept:
                try:
                    snapshot = self.opened(kept[inner_id], user_id, Op.GET_LATEST_MANY)
                except CorruptDataError:
                    continue  # asked for alone, it raises
                if snapshot is not None:
                    found[user_id] = snapshot
        return found

    async def upsert_latest_many(self, snapshots: Iterable[StateSnapshot]) -> None:
        batch = self.checked_batch(snapshots)
        with call_begins():
            kept = [self.down(snapshot) for snapshot in batch]
            with _errors_of_batch(batch, kept):
                await self.inner.upsert_latest_many(kept)

    def samples(self) -> Iterable[Sample]:
        yield Sample("corrupt_records", self._corrupt)

    def capability(self, kind: type[C]) -> C | None:
        if isinstance(self, kind):
            return self
        view: Any = _VIEWS.get(kind)
        if view is None:
            return None
        listing = kind is Enumerable
        target: Any = enumerable_of(self.inner) if listing else ability_of(self.inner, kind)
        return None if target is None else view(self, target)

    # What the operations and the views share

    async def ask(
        self,
        operation: str,
        method: Callable[Concatenate[str, P], Awaitable[T]],
        user_id: str,
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Call a method of the store below about a user, by the id that the user has there."""
        below = self.id_below(user_id, operation)
        with _ErrorsOf({below: user_id}):
            return await method(below, *args, **kwargs)

    def ids_below(self, user_ids: Iterable[str], operation: str) -> dict[str, str]:
        """Return callers' ids by the ids below, each user once, all checked first."""
        wanted = check_user_ids(user_ids, self)
        return {self.id_below(user_id, operation): user_id for user_id in wanted}

    def checked_batch(self, snapshots: Iterable[StateSnapshot]) -> tuple[StateSnapshot, ...]:
        """Return the snapshots as a tuple, all of them checked, their ids below as well."""
        batch = check_snapshots(snapshots, self.snapshot_type, self)
        for snapshot in batch:
            self.id_below(snapshot.user_id, Op.UPSERT_LATEST_MANY)
        return batch

    def opened(self, kept: StateSnapshot, user_id: str, operation: str) -> StateSnapshot | None:
        """Return the caller's snapshot; None for a copy in a cache tier that cannot be read."""
        try:
            if not isinstance(kept, StateSnapshot):  # a store from elsewhere may answer anything
                raise not_of_user(user_id, operation, self.name)
            return self.up(kept, user_id)
        except CorruptDataError as exc:
            self._corrupt += 1
            if self.is_cache():
                return None
            exc.operation = operation
            raise

    def record(self, kept: Versioned, user_id: str, operation: str) -> Versioned:
        """Return a record of the system of record as callers see it."""
        if kept.snapshot is None:
            return kept
        return Versioned(kept.version, self.opened(kept.snapshot, user_id, operation))


class DigestBelow(digest_function):
    """The digest of the ids below, called with callers' ids.

    Args:
        inner: the digest of the store below.
        id_below: gives the id below; unlike the layer's it refuses none.
        tag: what else decides about the ids, such as a prefix; part of the fingerprint.
    """

    __slots__ = ("_id_below", "_inner")

    def __init__(
        self, inner: Callable[[str], bytes], id_below: Callable[[str], str], tag: bytes
    ) -> None:
        super().__init__(blake2b(tag, digest_size=32).digest())
        self.fingerprint += getattr(inner, "fingerprint", "")
        self._inner = inner
        self._id_below = id_below

    def __call__(self, user_id: str) -> bytes:
        return self._inner(self._id_below(user_id))


class _ErrorsOf:
    """Gives errors from below the user id that callers know.

    Args:
        known: callers' ids by the ids below.
    """

    __slots__ = ("_known",)

    def __init__(self, known: Mapping[str, str]) -> None:
        self._known = known

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        if isinstance(exc, StoreError) and exc.user_id is not None:
            exc.user_id = self._known.get(exc.user_id)


def _errors_of_batch(batch: Sequence[StateSnapshot], kept: Sequence[StateSnapshot]) -> _ErrorsOf:
    pairs = zip(batch, kept, strict=True)
    return _ErrorsOf({below.user_id: snapshot.user_id for snapshot, below in pairs})


class _View(View):
    """A capability of the store below, with callers' ids and snapshots."""

    __slots__ = ("_digest",)

    layer: TranslatingLayer

    def __init__(self, layer: TranslatingLayer, target: Any) -> None:
        super().__init__(layer, target)
        self._digest: Any = None

    def digest_from(self, inner: Any) -> Any:
        """Return the digest for callers' ids, made once."""
        if self._digest is None:
            self._digest = self.layer.digest_of(inner)
        return self._digest


class _AuthorityView(_View):
    __slots__ = ()

    target: Authority

    @property
    def digest(self) -> digest_function:
        return self.digest_from(self.target.digest)  # type: ignore[no-any-return]

    async def read(self, user_id: str) -> Versioned:
        check_user_id(user_id, Op.GET_LATEST, self.layer)
        kept = await self.layer.ask(Op.GET_LATEST, self.target.read, user_id)
        return self.layer.record(kept, user_id, Op.GET_LATEST)

    async def read_many(self, user_ids: Sequence[str]) -> Mapping[str, Versioned]:
        below = self.layer.ids_below(user_ids, Op.GET_LATEST_MANY)
        with _ErrorsOf(below):
            records = await self.target.read_many(list(below))
        found = {}
        for inner_id, user_id in below.items():
            if inner_id in records:
                kept = records[inner_id]
                try:
                    found[user_id] = self.layer.record(kept, user_id, Op.GET_LATEST_MANY)
                except CorruptDataError:
                    continue  # asked for alone, it raises
        return found

    async def write(self, snapshot: StateSnapshot) -> Versioned:
        check_snapshot(snapshot, self.layer.snapshot_type, block=self.layer)
        below = self.layer.id_below(snapshot.user_id, Op.UPSERT_LATEST)
        with call_begins():
            kept = self.layer.down(snapshot)
            with _ErrorsOf({below: snapshot.user_id}):
                record = await self.target.write(kept)
        return self._after(snapshot, kept, record)

    async def write_many(self, snapshots: Sequence[StateSnapshot]) -> Mapping[str, Versioned]:
        batch = self.layer.checked_batch(snapshots)
        with call_begins():
            kept = [self.layer.down(snapshot) for snapshot in batch]
            with _errors_of_batch(batch, kept):
                records = await self.target.write_many(kept)
        last = {pair[0].user_id: pair for pair in zip(batch, kept, strict=True)}
        return {
            user_id: self._after(snapshot, below, records[below.user_id])
            for user_id, (snapshot, below) in last.items()
        }

    def _after(self, snapshot: StateSnapshot, kept: StateSnapshot, record: Versioned) -> Versioned:
        """Return what a write left: its own snapshot as it is, or what won over it."""
        if record.snapshot is kept:
            return Versioned(record.version, snapshot)
        return self.layer.record(record, snapshot.user_id, Op.UPSERT_LATEST)

    async def erase(self, user_id: str, tiers: Sequence[str] = ()) -> int:
        check_user_id(user_id, Op.DELETE, self.layer)
        return await self.layer.ask(Op.DELETE, self.target.erase, user_id, tiers)

    async def debts(self, user_id: str) -> Sequence[str]:
        check_user_id(user_id, "debts", self.layer)
        return await self.layer.ask("debts", self.target.debts, user_id)


class _TierView(_View):
    __slots__ = ()

    target: CacheTier

    @property
    def digest(self) -> digest_function:
        return self.digest_from(self.target.digest)  # type: ignore[no-any-return]

    async def read(self, user_id: str) -> TierRead:
        check_user_id(user_id, Op.GET_LATEST, self.layer)
        kept = await self.layer.ask(Op.GET_LATEST, self.target.read, user_id)
        return self._read(kept, user_id)

    async def read_many(self, user_ids: Sequence[str]) -> Mapping[str, TierRead]:
        below = self.layer.ids_below(user_ids, Op.GET_LATEST_MANY)
        with _ErrorsOf(below):
            reads = await self.target.read_many(list(below))
        return {user_id: self._read(reads[inner], user_id) for inner, user_id in below.items()}

    def _read(self, kept: TierRead, user_id: str) -> TierRead:
        if kept.found is None or kept.found.snapshot is None:
            return kept
        try:
            snapshot = self.layer.opened(kept.found.snapshot, user_id, Op.GET_LATEST)
        except CorruptDataError:
            snapshot = None
        if snapshot is None:
            # A copy that cannot be read is none; the next write of the user replaces it.
            return TierRead(None, kept.ticket, kept.trusted)
        return TierRead(Versioned(kept.found.version, snapshot), kept.ticket, kept.trusted)

    async def read_stale(self, user_id: str, seconds: float) -> Versioned | None:
        kept = await self.layer.ask(Op.GET_LATEST, self.target.read_stale, user_id, seconds)
        return None if kept is None else self._read(TierRead(kept), user_id).found

    async def ticket(self, user_id: str) -> Ticket | None:
        return await self.layer.ask(Op.GET_LATEST, self.target.ticket, user_id)

    async def fill(self, user_id: str, record: Versioned, ticket: Ticket) -> None:
        kept = self._kept(record)
        await self.layer.ask(Op.GET_LATEST, self.target.fill, user_id, kept, ticket)

    async def put(self, user_id: str, record: Versioned, ticket: Ticket | None) -> None:
        kept = self._kept(record)
        await self.layer.ask(Op.UPSERT_LATEST, self.target.put, user_id, kept, ticket)

    def _kept(self, record: Versioned) -> Versioned:
        if record.snapshot is None:
            return record
        return Versioned(record.version, self.layer.down(record.snapshot))

    async def bury(self, user_id: str, version: int, me: str) -> Holders:
        return await self.layer.ask(Op.DELETE, self.target.bury, user_id, version, me)

    async def holders(self, user_id: str, me: str) -> Holders:
        return await self.layer.ask(Op.DELETE, self.target.holders, user_id, me)


class _ChannelView(_View):
    __slots__ = ()

    target: Invalidations

    @property
    def key_of(self) -> Callable[[str], bytes]:
        return self.digest_from(self.target.key_of)  # type: ignore[no-any-return]

    async def stale(self, user_id: str, seconds: float) -> StateSnapshot | None:
        kept = await self.layer.ask(Op.GET_LATEST, self.target.stale, user_id, seconds)
        try:
            return None if kept is None else self.layer.opened(kept, user_id, Op.GET_LATEST)
        except CorruptDataError:
            return None  # counted; the cache tells its own error


class _ListingView(_View):
    __slots__ = ()

    target: Enumerable

    async def users(self, cursor: str, limit: int) -> UserPage:
        page = await self.target.users(cursor, limit)
        records: Mapping[str, StateSnapshot] = {}
        if self.layer.lists_by_record:
            records = await self.layer.inner.get_latest_many(page.user_ids)
        found = []
        for below in page.user_ids:
            kept = records.get(below)
            if kept is None and self.layer.lists_by_record:
                # Gone meanwhile, or unreadable: then this raises, since nobody may be forgotten.
                kept = await self.layer.inner.get_latest(below)
            found.append(self.layer.id_above(below, kept))
        return UserPage([user_id for user_id in found if user_id is not None], page.cursor)


_VIEWS: Final[dict[type, type]] = {
    Authority: view_of(Authority, _AuthorityView),
    CacheTier: view_of(CacheTier, _TierView),
    Invalidations: view_of(Invalidations, _ChannelView),
    Enumerable: view_of(Enumerable, _ListingView),
}
