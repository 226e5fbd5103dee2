"""What backends that number their writes have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layered_store.checks import check_user_ids, listed
from layered_store.coherence.contract import Authority
from layered_store.errors import ClosedError
from layered_store.interface import Op, StateStore

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from layered_store.coherence.contract import Versioned
    from layered_store.snapshot import StateSnapshot

__all__ = ["StoreOfRecord", "outdone"]


class StoreOfRecord(StateStore, Authority):
    """A backend that is a system of record: its operations are the authority's, without versions.

    A lone read is left to the backend, since most calls come by there.
    """

    _closed: bool = False

    def _check_open(self, operation: str) -> None:
        if self._closed:
            raise ClosedError(
                "this store was closed; build a new one", operation=operation, layer=self.name
            )

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        await self.write(snapshot)

    async def delete(self, user_id: str) -> None:
        await self.erase(user_id)

    async def get_latest_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        records = await self.read_many(check_user_ids(user_ids, self))
        return {
            user_id: record.snapshot
            for user_id, record in records.items()
            if record.snapshot is not None
        }

    async def upsert_latest_many(self, snapshots: Iterable[StateSnapshot]) -> None:
        await self.write_many(listed(snapshots, "snapshots", Op.UPSERT_LATEST_MANY, self))


def outdone(snapshots: Sequence[StateSnapshot], records: Mapping[str, Versioned]) -> bool:
    """Tell whether any user's record is not the last snapshot that the batch has of them."""
    last = {snapshot.user_id: snapshot for snapshot in snapshots}
    return any(records[user_id].snapshot is not snapshot for user_id, snapshot in last.items())
