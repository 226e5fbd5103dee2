"""Reads pass, writes are refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar

from layered_store.checks import check_snapshot, check_snapshots
from layered_store.coherence.contract import Authority
from layered_store.coherence.offering import offered
from layered_store.coherence.views import View, view_of
from layered_store.errors import RejectedError
from layered_store.hotpath import HotPath, hot_path_of
from layered_store.identity import check_user_id
from layered_store.interface import Op
from layered_store.layer import Layer
from layered_store.stats import Sample

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from layered_store.snapshot import StateSnapshot

__all__ = ["ReadOnly"]

C = TypeVar("C")


@dataclass(eq=False, repr=False)
class ReadOnly(Layer):
    """Refuse every upsert and delete; reads, histories, listings and health pass.

    For processes that must not change anything: dashboards, exports, a service during a migration.
    It guards against the application's own mistakes; what the process is allowed to do is decided
    by its login at the backend. Caches below are still filled.

    Args:
        inner: the store to read from.

    Raises:
        RejectedError: from ``upsert_latest``, ``upsert_latest_many`` and ``delete``; nothing was
            asked of ``inner``. Repeating does not help.

    Order:
        Outermost, below ``Metrics``, so that refused writes are counted. Around the ``origin`` of a
        ``WriteThrough`` it leaves a stack that fills its cache tier but changes no state. Right:
        ``Metrics(ReadOnly(Cached(redis, fallback=sql)), name="dashboard")``. Wrong:
        ``WriteThrough(ReadOnly(redis), origin=sql)``.

    Cancellation:
        As of the store below.
    """

    kind: ClassVar[str] = "read_only"

    def __post_init__(self) -> None:
        self._refusals = 0
        super().__post_init__()

    async def upsert_latest(self, snapshot: StateSnapshot) -> NoReturn:
        check_snapshot(snapshot, self.snapshot_type, block=self)
        self.refuse(Op.UPSERT_LATEST, snapshot.user_id)

    async def upsert_latest_many(self, snapshots: Iterable[StateSnapshot]) -> NoReturn:
        check_snapshots(snapshots, self.snapshot_type, self)
        self.refuse(Op.UPSERT_LATEST_MANY)

    async def delete(self, user_id: str) -> NoReturn:
        check_user_id(user_id, Op.DELETE, self)
        self.refuse(Op.DELETE, user_id)

    def refuse(self, operation: str, user_id: str | None = None) -> NoReturn:
        """Count a write and raise the error it gets."""
        self._refusals += 1
        raise RejectedError(
            "this stack is read-only; write through another one",
            operation=operation,
            layer=self.name,
            user_id=user_id,
        )

    def capability(self, kind: type[C]) -> C | None:
        return offered(self, kind, _ReadingAuthority)  # type: ignore[no-any-return]

    def samples(self) -> Iterable[Sample]:
        yield Sample("refused_writes", self._refusals)

    def hot_path(self) -> HotPath | None:
        return hot_path_of(self.inner)


class _Reading(View):
    """An authority that numbers no writes; a tier's debts are settled, which changes no state."""

    __slots__ = ()

    layer: ReadOnly

    async def write(self, snapshot: StateSnapshot) -> NoReturn:
        await self.layer.upsert_latest(snapshot)

    async def write_many(self, snapshots: Sequence[StateSnapshot]) -> NoReturn:
        await self.layer.upsert_latest_many(snapshots)

    async def erase(self, user_id: str, tiers: Sequence[str] = ()) -> NoReturn:  # noqa: ARG002
        await self.layer.delete(user_id)


_ReadingAuthority: Any = view_of(Authority, _Reading)
