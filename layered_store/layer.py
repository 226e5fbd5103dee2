"""The bases of all layers: forwarding, written once."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, NoReturn, ParamSpec, TypeVar

from layered_store.call import call_begins
from layered_store.checks import check_history, check_state, check_states, listed
from layered_store.clock import SYSTEM_CLOCK
from layered_store.errors import ClosedError, ConfigError
from layered_store.health import HealthReport, HealthStatus, SharedReport, reporting
from layered_store.hotpath import HotPath, declares
from layered_store.interface import Op, StateStore, ability_of, report_of, snapshot_type_of
from layered_store.options import check_store

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping

    from layered_store.clock import Clock
    from layered_store.snapshot import StateSnapshot

__all__ = ["AroundLayer", "Layer"]

P = ParamSpec("P")
T = TypeVar("T")
C = TypeVar("C")

_OPERATIONS: Final = tuple(op.value for op in Op)


@dataclass(eq=False, repr=False)
class Layer(StateStore):
    """A store that wraps another and forwards every operation to it.

    What comes back is checked to be the state of the user who was asked for: a store from elsewhere
    may answer anything.

    Subclass it to change some operations and inherit the rest; to treat all operations alike,
    subclass :class:`AroundLayer`. A layer is a dataclass: its fields are its options, its
    ``repr`` is its part of the composition and the same fields are its config schema. It is whole
    once built; ``__post_init__`` checks the options and then calls ``super().__post_init__()``.

    Args:
        inner: the store below.

    Raises:
        ConfigError: ``inner`` is no store.
    """

    inner: StateStore

    _closed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_store(self.inner, "inner", self)
        self._bind_hot_path()

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        await self.inner.upsert_latest(snapshot)

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        return check_state(await self.inner.get_latest(user_id), user_id, self)

    async def delete(self, user_id: str) -> None:
        await self.inner.delete(user_id)

    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        return check_history(await self.inner.get_history(user_id, limit), user_id, self.name)

    async def get_latest_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        wanted = listed(user_ids, "user_ids", Op.GET_LATEST_MANY, self)
        return check_states(await self.inner.get_latest_many(wanted), wanted, self)

    async def upsert_latest_many(self, snapshots: Iterable[StateSnapshot]) -> None:
        await self.inner.upsert_latest_many(snapshots)

    async def health_check(self) -> bool:
        report: HealthReport
        if reporting.get() is self:  # a subclass's report asks here, for what is below
            report = await Layer.health_report(self)
        else:
            shared = self.__dict__.get("_shared_report")
            if shared is None:
                shared = self.__dict__["_shared_report"] = SharedReport()
            report = await shared.share(self._report_of_check)
        return report.status is not HealthStatus.UNHEALTHY

    async def _report_of_check(self) -> HealthReport:
        reporting.set(self)  # in the report's own context
        return await self.health_report()

    async def health_report(self) -> HealthReport:
        below = await report_of(self.inner)
        return HealthReport(self.name, below.status, below.latency_ms, "", (below,))

    async def open(self) -> None:
        await self.inner.open()

    async def aclose(self) -> None:
        self._refuse_operations()
        await self._close_children()

    @property
    def snapshot_type(self) -> type[StateSnapshot]:
        return snapshot_type_of(self.inner)

    def children(self) -> Mapping[str, StateStore]:
        return {"inner": self.inner}

    def capability(self, kind: type[C]) -> C | None:
        """Return an ability of this layer itself, or None.

        Abilities of ``inner`` are not passed on by default: whoever used them would bypass what
        this layer does.
        """
        return self if isinstance(self, kind) else None

    def hot_path(self) -> HotPath | None:
        """Return how a read that hits can be answered without awaiting, or None.

        A layer that does nothing on a hit returns ``hot_path_of(self.inner)``; one that
        does not know the hook ends the fusion and is simply awaited.
        """
        return None

    def _bind_hot_path(self) -> None:
        """Put the fused read in place of ``get_latest``, when the layers below allow it.

        A subclass that overrides a read below the class that declared the hook is left alone.
        """
        if not declares(type(self), "hot_path", over=("get_latest", "around")):
            return
        path = self.hot_path()
        if path is not None:
            self.__dict__["get_latest"] = path.fuse(type(self).get_latest.__get__(self))

    def _check_same_type(self, other: StateStore, which: str) -> None:
        """Refuse another store below that keeps another class of snapshots than ``inner``."""
        if snapshot_type_of(other) is not snapshot_type_of(self.inner):
            raise ConfigError(
                f"{which} must be built with the same snapshot_type=",
                option="snapshot_type",
                layer=self.name,
            )

    def _refuse_operations(self) -> None:
        """Make every operation raise ClosedError, so that an open layer need not ask."""
        self.__dict__["_closed"] = True
        for op in Op:
            self.__dict__[op.value] = _Closed(self.name, op)

    async def _close_children(self) -> None:
        """Close all stores below, each even if another fails; raise the first failure."""
        results = await asyncio.gather(
            *(child.aclose() for child in self.children().values()), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result


class _Closed:
    """An operation of a closed layer."""

    __slots__ = ("_name", "_op")

    def __init__(self, name: str, op: Op) -> None:
        self._name = name
        self._op = op

    async def __call__(self, *args: object, **kwargs: object) -> NoReturn:  # noqa: ARG002
        raise ClosedError(
            "this stack was closed; build a new one", operation=self._op, layer=self._name
        )


@dataclass(eq=False, repr=False)
class AroundLayer(Layer):
    """A layer that treats all operations alike: it writes one method, :meth:`around`.

    Health probes do not pass through it. Capabilities do: each of their methods counts as the
    operation it stands for.
    """

    @abstractmethod
    async def around(
        self, op: Op, method: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call ``method(*args, **kwargs)`` as this layer sees fit and return its result.

        Args:
            op: which operation this is.
            method: the operation of the store below; may be called several times.
            args: its positional arguments.
            kwargs: its keyword arguments.
        """

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        with call_begins(self._call_clock()):
            await self.around(Op.UPSERT_LATEST, self.inner.upsert_latest, snapshot)

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        found = await self.around(Op.GET_LATEST, self.inner.get_latest, user_id)
        return check_state(found, user_id, self)

    async def delete(self, user_id: str) -> None:
        # A repeat of an erasure that took effect must not erase what was written since.
        with call_begins(self._call_clock()):
            await self.around(Op.DELETE, self.inner.delete, user_id)

    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        found = await self.around(Op.GET_HISTORY, self.inner.get_history, user_id, limit)
        return check_history(found, user_id, self.name)

    async def get_latest_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        wanted = listed(user_ids, "user_ids", Op.GET_LATEST_MANY, self)
        found = await self.around(Op.GET_LATEST_MANY, self.inner.get_latest_many, wanted)
        return check_states(found, wanted, self)

    async def upsert_latest_many(self, snapshots: Iterable[StateSnapshot]) -> None:
        batch = listed(snapshots, "snapshots", Op.UPSERT_LATEST_MANY, self)
        with call_begins(self._call_clock()):
            await self.around(Op.UPSERT_LATEST_MANY, self.inner.upsert_latest_many, batch)

    def _call_clock(self) -> Clock:
        # Whether it is a whole ``Clock`` would take longer to tell than all else here.
        clock: Any = getattr(self, "clock", None)
        return clock if hasattr(clock, "monotonic") else SYSTEM_CLOCK

    def capability(self, kind: type[C]) -> C | None:
        if isinstance(self, kind):
            return self
        target = ability_of(self.inner, kind)
        around: Any = getattr(kind, "around", None)
        if target is None or around is None or not declares(type(self), "around", over=_OPERATIONS):
            return None  # a subclass that changed an operation would be passed by
        return around(self, target)  # type: ignore[no-any-return]
