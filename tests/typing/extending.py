"""Stores and layers as their authors write them: checked by mypy --strict, never run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import ClassVar, ParamSpec, TypeVar, assert_type

from layered_store import (
    AroundLayer,
    HealthReport,
    Op,
    StateSnapshot,
    StateStore,
    describe,
    explain,
)
from layered_store.enumerable import Enumerable, UserPage, enumerable_of
from layered_store.explaining import Held, Peek, TierView
from layered_store.health import SharedProbe
from layered_store.hotpath import HotPath, hot_path_of
from layered_store.layers.metrics import outcome_of
from layered_store.metrics.prometheus import exposition
from layered_store.options import Seconds, check_seconds
from layered_store.stack import Block, walk
from layered_store.stats import Reads, Sample

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(eq=False, repr=False)
class Shelf(StateStore, Enumerable):
    limit: Seconds = field(default=1.0, kw_only=True)

    kind: ClassVar[str] = "shelf"

    def __post_init__(self) -> None:
        self._rows: dict[str, StateSnapshot] = {}
        self._reads = Reads()
        self._probe = SharedProbe(self.name, check_seconds(self.limit, "limit", self))

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        snapshot.validate()
        self._rows[snapshot.user_id] = snapshot

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        found = self._rows.get(user_id)
        self._reads.found(found)
        return found

    async def users(self, cursor: str, limit: int) -> UserPage:
        rest = sorted(user_id for user_id in self._rows if user_id > cursor)
        return UserPage(rest[:limit], rest[limit - 1] if len(rest) > limit else None)

    async def peek(self, user_id: str) -> Peek:
        return Peek(Held.STATE if user_id in self._rows else Held.ABSENT)

    async def health_report(self) -> HealthReport:
        return await self._probe.run(self._ping)

    async def _ping(self) -> bool:
        return True

    def samples(self) -> Iterable[Sample]:
        yield from self._reads.samples()
        yield Sample("corrupt_records", 0)


@dataclass(eq=False, repr=False)
class Watched(AroundLayer):
    async def around(
        self, op: Op, method: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        try:
            return await method(*args, **kwargs)
        except Exception as exc:
            assert_type(outcome_of(exc), str)
            raise

    def hot_path(self) -> HotPath | None:
        return hot_path_of(self.inner)

    def notes(self) -> tuple[str, ...]:
        return ("is watched",)


async def look(stack: StateStore) -> None:
    assert_type(describe(stack)[0], Block)
    assert_type([place.store for place in walk(stack)], list[StateStore])
    for tier in await explain(stack, "u-1"):
        assert_type(tier, TierView)
        assert_type(tier.version, int | None)
    listing = enumerable_of(Watched(Shelf()))
    if listing is not None:
        page = await listing.users("", 10)
        assert_type(page.cursor, str | None)
    assert_type(exposition()[0], bytes)
