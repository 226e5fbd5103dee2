"""The one interface: what every backend and every layer is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from layered_store.call import call_begins, call_continues
from layered_store.checks import check_limit, check_snapshots, check_user_ids
from layered_store.clock import SYSTEM_CLOCK
from layered_store.errors import StoreError, UnsupportedError
from layered_store.health import PROBE_SECONDS, HealthReport, HealthStatus, SharedProbe, reporting
from layered_store.identity import check_user_id
from layered_store.operations import Op
from layered_store.snapshot import StateSnapshot

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from types import TracebackType

    from layered_store.stats import Sample

__all__ = ["Op", "StateStore"]

C = TypeVar("C")

_OF_SNAPSHOTS: Final = type(StateSnapshot)


class StateStore(ABC):
    """Keeps the latest state of each user, and its history where the backend does.

    ``upsert_latest`` and ``get_latest`` are required; a class with these two is complete. Every
    store opens itself on first use, so ``async with`` is only needed to open early and to close::

        async with MemoryStore() as store:
            await store.upsert_latest(StateSnapshot("u-1", axes={"warmth": 0.7}))
            state = await store.get_latest("u-1")

    Raises:
        ValidationError: from any operation given a bad user id, snapshot or limit; nothing was
            stored.
        UnavailableError: from any operation whose backend could not be reached; retryable.
        ClosedError: from any operation after :meth:`aclose`.

    Cancellation:
        A cancelled call ends at once and leaks nothing. A cancelled write may or may not have
        taken effect; repeat it, or read, to know.
    """

    @abstractmethod
    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        """Validate ``snapshot``, make it its user's latest state, append it to the history."""

    @abstractmethod
    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        """Return the latest state of a user, or None when there is none."""

    async def delete(self, user_id: str) -> None:
        """Remove everything about a user from every tier, history included.

        An absent user is fine. Never returns while some tier may still show the user.

        Raises:
            ErasureIncompleteError: a tier could not be reached; ``pending`` names it. Repeat.
            UnsupportedError: this store cannot delete.
        """
        check_user_id(user_id, Op.DELETE, self)
        raise UnsupportedError(
            "this store cannot delete; implement delete() on it",
            operation=Op.DELETE,
            layer=self.name,
            user_id=user_id,
        )

    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        """Return up to ``limit`` states of a user, newest first; 0 gives ``[]``.

        The answer is as long as what the backend keeps (``history_limit``). A store that keeps no
        history returns ``[]``.

        Raises:
            ValidationError: ``limit`` is negative or no int.
        """
        check_user_id(user_id, Op.GET_HISTORY, self)
        check_limit(limit, self)
        return []

    async def get_latest_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        """Return the latest states of several users by user id; absent users are left out."""
        found = {}
        for user_id in check_user_ids(user_ids, self):
            snapshot = await self.get_latest(user_id)
            if snapshot is not None:
                found[user_id] = snapshot
        return found

    async def upsert_latest_many(self, snapshots: Iterable[StateSnapshot]) -> None:
        """Store several snapshots, in their order; all are validated before the first is stored.

        When it fails part way, those stored before stay stored, and ``outcome_unknown`` of the
        error is set; repeating the call is safe.
        """
        batch = check_snapshots(snapshots, self.snapshot_type, self)
        with call_begins() as call:
            fresh = call.first_attempt()
            for index, snapshot in enumerate(batch):
                # By its place: the same state may come twice, with another one in between.
                own = call.again(call.part(index))
                own.fresh = fresh
                try:
                    with call_continues(own):
                        await self.upsert_latest(snapshot)
                except StoreError as exc:
                    if index:
                        exc.outcome_unknown = True
                    raise
                call.superseded |= own.superseded
                call.unsure |= own.unsure

    async def health_check(self) -> bool:
        """Tell whether the store can serve; never raises for an unhealthy backend."""
        own = type(self).health_report is not StateStore.health_report
        if not own or reporting.get() is self:  # the report asks here
            return True
        return (await report_of(self)).status is not HealthStatus.UNHEALTHY

    async def health_report(self) -> HealthReport:
        """Return the health of this store and of everything below it.

        Probes run side by side, each within its time limit (1 s unless the block says otherwise),
        and concurrent callers share one probe.
        """
        probe = self.__dict__.get("_shared_probe")
        if probe is None:
            probe = self.__dict__["_shared_probe"] = SharedProbe(self.name)
        return await probe.run(self._health_check_of_report)

    async def _health_check_of_report(self) -> bool:
        reporting.set(self)  # in the probe's own context
        return await self.health_check()

    async def open(self) -> None:  # noqa: B027  a store without a connection has nothing to do
        """Connect now what would connect on first use; safe to call again."""

    async def aclose(self) -> None:  # noqa: B027
        """Finish what is under way and close what this store opened; safe to call again.

        Clients and engines that were passed in stay open: they are the caller's.
        """

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    @property
    def name(self) -> str:
        """What this block is called in errors and health reports: its class name."""
        return type(self).__name__

    @property
    def snapshot_type(self) -> type[StateSnapshot]:
        """The class of the snapshots that this store takes and returns."""
        return StateSnapshot

    def children(self) -> Mapping[str, StateStore]:
        """Return the stores that this one is built on, by role (``inner``, ``origin``, ...)."""
        return {}

    def capability(self, kind: type[C]) -> C | None:
        """Return an object with the abilities of ``kind``, or None when this store lacks them.

        Abilities beyond the interface, such as versions
        (:class:`layered_store.coherence.Authority`), are asked for here and never by looking at
        what a layer wraps. A subclass that changes an operation ends those that would go past it.
        """
        return self if isinstance(self, kind) and not _passed_by(self, kind) else None

    def samples(self) -> Iterable[Sample]:
        """Return what this block counted so far; see :mod:`layered_store.metrics.catalogue`."""
        return ()

    def __repr__(self) -> str:
        from layered_store.stack import expression  # noqa: PLC0415  stack imports this module

        return expression(self)


def ability_of(store: StateStore, kind: type[C]) -> C | None:
    """Return ``store.capability(kind)``; None for a mock, which would return another mock."""
    # A mock with a spec passes isinstance(); its type is no subclass.
    return store.capability(kind) if issubclass(type(store), StateStore) else None


def name_of_store(store: StateStore) -> str:
    """Return the name of a store; of a mock, whose name is a mock too, the class."""
    told: object = store.name
    return told if isinstance(told, str) else type(store).__name__


def snapshot_type_of(store: StateStore) -> type[StateSnapshot]:
    """Return the class of the snapshots that a store keeps; ``StateSnapshot`` if it names none."""
    told: object = store.snapshot_type
    return told if isinstance(told, _OF_SNAPSHOTS) else StateSnapshot


def _passed_by(store: StateStore, kind: Any) -> bool:
    """Tell whether a subclass of the class that offers ``kind`` overrides an operation.

    Whoever uses ``kind`` would bypass the override.
    """
    if not getattr(kind, "in_place_of_operations", False):
        return False
    for op in set(kind.operations.values()):
        methods = {name for name, stands_for in kind.operations.items() if stands_for is op}
        offers = next(cls for cls in type(store).__mro__ if not methods.isdisjoint(vars(cls)))
        # A mixin that is not a store itself has no operations to override.
        if issubclass(offers, StateStore) and changes(store, op, offers):
            return True
    return False


def changes(store: StateStore, op: Op, since: type[StateStore]) -> bool:
    """Tell whether a subclass of ``since`` changed an operation."""
    mro = type(store).__mro__
    return any(op.value in vars(cls) for cls in mro[: mro.index(since)])


async def report_of(store: StateStore) -> HealthReport:
    """Return a store's health report, unhealthy when its ``health_report`` raises or hangs.

    Our backends and layers keep their limits themselves; those from elsewhere may do anything.
    """
    from layered_store.stack import children_of  # noqa: PLC0415  stack imports this module

    bounded = hasattr(store, "probe_seconds") or children_of(store)
    try:
        async with SYSTEM_CLOCK.timeout(None if bounded else PROBE_SECONDS):
            report: object = await store.health_report()
        if isinstance(report, HealthReport) and isinstance(report.status, HealthStatus):
            return report
        message = "health_report() returned no HealthReport"
    except StoreError as exc:
        message = str(exc)
    except TimeoutError:
        message = f"no answer within {PROBE_SECONDS:g} s"
    except Exception as exc:  # noqa: BLE001  its text may hold anything, so only its kind is told
        message = type(exc).__name__
    return HealthReport(name_of_store(store), HealthStatus.UNHEALTHY, 0.0, message)
