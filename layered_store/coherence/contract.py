"""What stores offer so that several processes agree: two capabilities, and their records.

A store of record offers :class:`Authority`: it numbers each user's writes and remembers erasures.
A shared cache offers :class:`CacheTier`: it keeps copies that only ever move up to the authority's
versions. :class:`layered_store.WriteThrough` joins the two. A third-party store may offer either;
stores that offer neither get the guarantees of one process, and ``describe`` says so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple, Protocol, Self

import msgspec

from layered_store.coherence.views import as_it_is, through, viewed
from layered_store.interface import Op

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from layered_store.identity import digest_function
    from layered_store.layer import AroundLayer
    from layered_store.snapshot import StateSnapshot

__all__ = [
    "ABSENT",
    "TRUST_SECONDS",
    "Authority",
    "CacheTier",
    "Capability",
    "Change",
    "Changes",
    "Holders",
    "Invalidations",
    "LeasedCache",
    "Notice",
    "Pass",
    "Ticket",
    "TierRead",
    "Versioned",
]


TRUST_SECONDS: Final = 2.0
"""How long a tier is believed after a repair pass began."""


class Versioned(msgspec.Struct, frozen=True):
    """What the system of record holds for one user.

    Args:
        version: 1 to 2**53 - 1, growing with every write and erasure of the user; 0 when the user
            was never written (or its tombstone was forgotten).
        snapshot: the state, or None when the user is absent or erased.
    """

    version: int
    snapshot: StateSnapshot | None


ABSENT = Versioned(0, None)


class Change(NamedTuple):
    """One user whose record changed.

    Args:
        digest: the user's storage key (16 bytes).
        version: the version the record has now.
        erased: whether it is a tombstone now.
        owed: whether an erasure of it is still owed to some tier; see :meth:`Authority.settle`.
    """

    digest: bytes
    version: int
    erased: bool
    owed: bool = False


@dataclass(frozen=True, slots=True)
class Changes:
    """A page of changes, each user at most once, oldest first.

    Args:
        items: the users that changed after the cursor that was passed in.
        cursor: where the next page begins; every change committed later comes after it.
        more: whether another page is ready now.
    """

    items: Sequence[Change]
    cursor: str
    more: bool


class Ticket(NamedTuple):
    """What a process knew about the cache tier before it read or wrote the system of record.

    A copy may be stored only with a ticket taken before the record was read or written.

    Args:
        token: stands in the tier in place of a copy that is not there; whoever still finds it
            there knows that nobody wrote since. Empty when the tier holds a copy, which can only
            be replaced by a newer one.
        generation: the tier's generation at that moment.
    """

    token: bytes
    generation: bytes


class TierRead(msgspec.Struct, frozen=True):
    """The cache tier's answer for one user.

    Args:
        found: the copy, if there is one that may be believed; its snapshot is None for a tombstone.
        ticket: what a fill or a write needs; None while the tier is not trusted.
        trusted: whether the tier may be believed now.
    """

    found: Versioned | None = None
    ticket: Ticket | None = None
    trusted: bool = False


class Holders(NamedTuple):
    """Who may still answer from a cache in its own process.

    Args:
        now: the tier's clock, in seconds, when this was read.
        since: for how long the register of holders is whole, in seconds; a holder that was
            registered earlier may be missing.
        others: by process, until when its lease runs and up to which moment it has acknowledged
            all messages, both on the tier's clock. Those whose lease ended long ago, by more than
            that clock may step, are left out.
    """

    now: float
    since: float
    others: Mapping[str, tuple[float, float]]


class Pass(NamedTuple):
    """A repair pass that was begun.

    Args:
        began: the tier's clock, in seconds.
        generation: the generation that is being repaired.
        cursor: up to where the authority's changes are known to be in the tier.
        fresh: whether the generation is new, so that no copy of an earlier one counts.
        owner: the process that began it.
    """

    began: float
    generation: bytes
    cursor: str
    fresh: bool
    owner: str


class Notice(NamedTuple):
    """One message of the invalidation channel.

    Args:
        digest: whose record changed; empty for a process's own echo or for everybody's.
        version: which version it has now.
        erased: whether it is a tombstone now.
        sent: the tier's clock when it was published, in seconds.
        echo: the process whose ping this answers, whose number is ``version``; empty for a change.
    """

    digest: bytes
    version: int
    erased: bool = False
    sent: float = 0.0
    echo: str = ""


class Capability(ABC):  # noqa: B024  its parts are
    """A set of abilities that a store may offer beyond :class:`StateStore`.

    An :class:`AroundLayer` hands it on with each method wrapped as the operation it stands for.
    """

    operations: ClassVar[Mapping[str, Op]] = {}
    in_place_of_operations: ClassVar[bool] = False
    """Whether a layer above calls these methods and no longer the operations they stand for."""

    @classmethod
    def around(cls, layer: AroundLayer, target: Any) -> Self:
        """Return ``target`` seen through ``layer``."""
        return _wrapped_class(cls)(layer, target)  # type: ignore[no-any-return]


@cache
def _wrapped_class(kind: type[Capability]) -> Any:
    """Return a subclass of ``kind`` whose methods go through a layer, built once per kind."""

    def member(name: str) -> Any:
        op = kind.operations.get(name)
        return as_it_is(name) if op is None else through(name, op)

    return viewed(kind, member)


class Authority(Capability):
    """A system of record that numbers its writes, so that copies can be kept in step.

    For each user there is one row with a version. Every write and every erasure takes a higher
    one, computed under the row's lock, in the transaction that stores it; an erasure leaves a
    tombstone (digest, version, time), which is kept for 7 days. A write that began before an
    erasure committed (:attr:`Call.started`, measured as a duration back from now on the
    authority's own clock) is dropped: it counts as overwritten by the erasure.
    """

    in_place_of_operations = True
    operations: ClassVar[Mapping[str, Op]] = {
        "read": Op.GET_LATEST,
        "read_many": Op.GET_LATEST_MANY,
        "write": Op.UPSERT_LATEST,
        "write_many": Op.UPSERT_LATEST_MANY,
        "erase": Op.DELETE,
    }

    @property
    @abstractmethod
    def digest(self) -> digest_function:
        """The digest that keys the rows; a cache tier must use an equal one."""

    @abstractmethod
    async def read(self, user_id: str) -> Versioned:
        """Return the committed record of a user; ``ABSENT`` when there never was one."""

    @abstractmethod
    async def read_many(self, user_ids: Sequence[str]) -> Mapping[str, Versioned]:
        """Return the committed records of several users; every id asked for is in the answer."""

    @abstractmethod
    async def write(self, snapshot: StateSnapshot) -> Versioned:
        """Store a snapshot as ``upsert_latest`` does and return what the record is after it.

        That is the snapshot under its new version or, when an erasure or (with
        ``order="snapshot_time"``) a newer snapshot won, what won. The write id of the current
        :class:`Call` makes a repeat of it a no-op that returns the record as it is then.
        """

    @abstractmethod
    async def write_many(self, snapshots: Sequence[StateSnapshot]) -> Mapping[str, Versioned]:
        """Store several snapshots; return the records they left, by user id."""

    @abstractmethod
    async def erase(self, user_id: str, tiers: Sequence[str] = ()) -> int:
        """Remove the user and its history, leave a tombstone, return the tombstone's version.

        Erasing an absent user leaves a tombstone too: copies may exist. Repeating it while the
        tombstone stands returns a version at least as high.

        Args:
            user_id: whom to erase.
            tiers: names of cache tiers that may hold copies: debts, kept with the tombstone until
                :meth:`settle` names them.
        """

    @abstractmethod
    async def settle(self, digest: bytes, version: int, tier: str) -> None:
        """Note that ``tier`` holds no copy older than this version of an erased user."""

    @abstractmethod
    async def debts(self, user_id: str) -> Sequence[str]:
        """Return the tiers that may still hold copies of this erased user."""

    @abstractmethod
    async def owing(self, tier: str, limit: int) -> Sequence[Change]:
        """Return up to ``limit`` erased users whose erasure is still owed to this tier."""

    @abstractmethod
    async def head(self) -> str:
        """Return a cursor such that every change committed from now on comes after it."""

    @abstractmethod
    async def changes(self, cursor: str, limit: int) -> Changes:
        """Return what changed after ``cursor``, at most ``limit`` users; may repeat, never skip.

        With the last page (``more`` is False) everything was told that had been committed when
        this was called. So it may be longer: what was committed behind a transaction that is
        still open comes with it, and again with the next.
        """

    @abstractmethod
    async def covers(self, cursor: str) -> bool:
        """Tell whether changes after ``cursor`` are all still known (erasures: 7 days).

        Never of a cursor that another store made.
        """


class CacheTier(Capability):
    """A shared cache that several processes keep in step with one authority.

    Every method names its step of the protocol (``docs/notes/0002-coherence.md``). All of them
    raise :class:`UnavailableError` when the tier cannot be reached.
    """

    in_place_of_operations = True
    operations: ClassVar[Mapping[str, Op]] = {
        "read": Op.GET_LATEST,
        "read_many": Op.GET_LATEST_MANY,
        "ticket": Op.GET_LATEST,
        "fill": Op.UPSERT_LATEST,
        "put": Op.UPSERT_LATEST,
        "bury": Op.DELETE,
        "read_stale": Op.GET_LATEST,
    }

    @property
    @abstractmethod
    def digest(self) -> digest_function:
        """The digest that keys the copies; the authority must use an equal one."""

    @property
    @abstractmethod
    def tier_name(self) -> str:
        """The name under which an authority keeps this tier's erasure debts."""

    @property
    @abstractmethod
    def has_channel(self) -> bool:
        """Whether :meth:`listen` works here."""

    @abstractmethod
    async def read(self, user_id: str) -> TierRead:
        """READ: the copy, if the tier is trusted now and holds one of its generation."""

    @abstractmethod
    async def read_many(self, user_ids: Sequence[str]) -> Mapping[str, TierRead]:
        """READ for several users."""

    @abstractmethod
    async def read_stale(self, user_id: str, seconds: float) -> Versioned | None:
        """STALE: the copy, if the tier was trusted on this server run until so long ago."""

    @abstractmethod
    async def ticket(self, user_id: str) -> Ticket | None:
        """TICKET: what a fill or put needs, taken before the authority is asked; None:
        untrusted.
        """

    @abstractmethod
    async def fill(self, user_id: str, record: Versioned, ticket: Ticket) -> None:
        """FILL: store what was read from the authority, if the token still stands there."""

    @abstractmethod
    async def put(self, user_id: str, record: Versioned, ticket: Ticket | None) -> None:
        """PUT: after a commit, raise the copy to ``record`` or remove it, and tell all
        processes.
        """

    @abstractmethod
    async def bury(self, user_id: str, version: int, me: str) -> Holders:
        """BURY: after an erasure, replace any copy by a tombstone and tell all processes."""

    @abstractmethod
    async def holders(self, user_id: str, me: str) -> Holders:
        """HOLDERS: who else holds a lease now."""

    @abstractmethod
    async def begin(self, me: str, head: str) -> Pass | None:
        """BEGIN: start a repair pass; None while another process is at it.

        Args:
            me: this process.
            head: the authority's head, read before; the cursor of a new generation.
        """

    @abstractmethod
    async def renew(self, generation: bytes, head: str) -> None:
        """RENEW: start a new generation at ``head``: no copy stored before counts any more."""

    @abstractmethod
    async def repair(self, changes: Sequence[Change]) -> Sequence[Change]:
        """REPAIR: remove copies and tokens older than these, tell all processes of the rest.

        Returns those for which something had to be done.
        """

    @abstractmethod
    async def stamp(self, begun: Pass, cursor: str, seconds: float) -> bool:
        """STAMP: note that all changes before ``cursor`` are in the tier, and trust it until so
        long after the pass began.

        With 0 seconds it only notes how far the pass has come, and keeps other processes off for
        longer. False: another process took over, this pass counts no more.
        """

    @abstractmethod
    async def ping(self, me: str, seconds: float, seen: float, number: int) -> float:
        """PING: publish this process's echo, register its lease; return for how long (seconds) the
        tier is trusted still, 0 when it is not.

        A lease of fewer than 0 seconds takes the process off the register.
        """

    @abstractmethod
    def listen(self) -> AbstractAsyncContextManager[AsyncIterator[Notice]]:
        """Subscribe; the block begins when the subscription stands, the iterator ends by
        raising.
        """


class LeasedCache(Protocol):
    """An in-process cache, as the channel that keeps it in step sees it."""

    def invalidate(self, notice: Notice) -> None:
        """Drop what is held or being loaded of this user, unless it has this version or a later."""
        ...

    def distrust(self) -> None:
        """Drop everything held and everything being loaded: messages may have been missed."""
        ...

    def lease(self, until: float) -> None:
        """Answer from the cache until this monotonic time."""
        ...

    def hear(self, until: float) -> None:
        """No erasure can have been missed that returns before this monotonic time."""
        ...


class Invalidations(Capability):
    """A channel that tells in-process caches what other processes wrote."""

    @abstractmethod
    def attach(self, cache: LeasedCache) -> None:
        """Keep this cache in step from now on; it must not answer before it is given a lease."""

    @abstractmethod
    def detach(self, cache: LeasedCache) -> None:
        """Forget this cache."""

    @abstractmethod
    async def ready(self) -> None:
        """Begin to follow the channel and wait, at most 1 s and once, until leases are given."""

    @property
    @abstractmethod
    def key_of(self) -> Callable[[str], bytes]:
        """The digest of a user id, as notices carry it."""

    @abstractmethod
    async def stale(self, user_id: str, seconds: float) -> StateSnapshot | None:
        """Read a user's copy from a tier that was trusted until so many seconds ago.

        For when the system of record does not answer. Never a copy of a user whose ``delete``
        returned, nor older than this process has seen; None when there is none, never an error of
        the tier.
        """
