"""Send a share of the users another way, and change the share while running."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

from layered_store.call import call_begins, call_continues, current_call
from layered_store.checks import (
    check_history,
    check_limit,
    check_snapshot,
    check_snapshots,
    check_state,
    check_states,
    check_user_ids,
    states_by_user,
)
from layered_store.clock import SYSTEM_CLOCK, Clock
from layered_store.coherence.contract import Invalidations
from layered_store.coherence.outcomes import (
    QUARANTINE_SECONDS,
    may_take_effect,
    not_happened,
    pending_of,
)
from layered_store.enumerable import Enumerable, enumerable_of
from layered_store.errors import (
    ClosedError,
    ConfigError,
    ErasureIncompleteError,
    StoreError,
    UnavailableError,
    UnsupportedError,
)
from layered_store.health import HealthReport, HealthStatus
from layered_store.identity import check_user_id
from layered_store.interface import Op, StateStore, ability_of, report_of
from layered_store.layer import Layer
from layered_store.layers.translating import TranslatingLayer
from layered_store.masking import masked
from layered_store.options import check_a, check_salt, check_share, check_store
from layered_store.running import UnderWay
from layered_store.sharing import place_of
from layered_store.stack import staleness, walk
from layered_store.stats import Sample
from layered_store.turns import Turn, Turns, unsent

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from layered_store.call import Call
    from layered_store.snapshot import StateSnapshot

__all__ = ["Ramp"]

C = TypeVar("C")

_MAX_BEHIND: Final = 100_000
"""How many users may be behind at the alternative before it answers for nobody."""


class _Write(Turn):
    """The writes of one user that are under way or wait: one at a time.

    Args:
        turns: those of all users.
        user_id: whose.
        loop: the event loop on which they are.
        to_other: the side that answers reads meanwhile, whatever the share becomes.
    """

    __slots__ = ("to_other",)

    def __init__(
        self, turns: Turns[_Write], user_id: str, loop: asyncio.AbstractEventLoop, *, to_other: bool
    ) -> None:
        super().__init__(turns, user_id, loop)
        self.to_other = to_other


@dataclass(eq=False, repr=False)
class Ramp(Layer):
    """Send a share of the users through ``layer`` or to ``alternative``, the rest to ``inner``.

    Always the same users: a larger share holds all those of a smaller one. Set :attr:`share` at any
    time, ``ramp.share = 0.2``; reads of a user never go back behind a write that returned, through
    any change of it.

    With ``layer``, both ways end in ``inner``. Users who were ever in the share go on writing and
    erasing through the layer, since it may hold something of theirs; only their reads leave it. A
    cache in the layer answers as any cache: what other processes wrote shows after its TTL.

    With ``alternative``, a second store takes every write and erasure of all users after ``inner``
    did, whatever the share, and answers the reads of the share. ``inner`` has everything at all
    times, so taking the share back to 0 is safe at any moment. Begin with an empty alternative: a
    user it does not have yet is read from ``inner``. When it misses a write of a user outside the
    share, the write stands and the user is read from ``inner`` until the next one reaches both; in
    the share, the write raises. Histories of the share begin with the first write that reached it.

    Args:
        inner: the way of everybody else.
        alternative: another store of the same class of snapshots.
        layer: in its place, what is put around ``inner``: a function that takes a store and gives
            one around it, or a table as in a config file, ``{"use": "cached", "ttl": 5.0}``.
        share: the share of users that goes the other way, 0 to 1.
        salt: chooses other users, 0 to 64 bytes.
        clock: source of time.

    Raises:
        ConfigError: an option is out of range, or not exactly one of ``alternative`` and ``layer``
            is given.
        UnavailableError: from an upsert of the share that ``inner`` took and the alternative did
            not, with ``outcome_unknown``; repeat it.
        ErasureIncompleteError: from ``delete``, when one of the two could not erase.
        UnsupportedError: from ``delete``, when neither of them can erase.

    Order:
        Above ``WriteThrough`` and below ``Cached``, which makes its choice cost nothing on a hit.
        Right: ``Cached(Ramp(stack, layer={"use": "timeout", "seconds": 0.2}, share=0.1))``.
        Wrong: ``WriteThrough(redis, origin=Ramp(sql, alternative=other))``, as no versions pass it
        and processes would not agree.

    Cancellation:
        A cancelled write may have reached ``inner`` and not the alternative, or reach it late; the
        user is then read from ``inner`` until a write that comes 5 s later, or more.
    """

    alternative: StateStore | None = field(default=None, kw_only=True)
    layer: Callable[[StateStore], StateStore] | Mapping[str, Any] | None = field(
        default=None,
        kw_only=True,
        metadata={"mask": lambda layer: _masked(layer), "table": "layer"},  # noqa: PLW0108
    )
    share: float = field(default=0.0, kw_only=True)
    salt: str = field(default="", kw_only=True)
    clock: Clock = field(default=SYSTEM_CLOCK, kw_only=True, repr=False)

    kind: ClassVar[str] = "ramp"
    _reached: ClassVar[float] = 0.0

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "share":
            value = check_share(value, "share", self)
            # Whoever was in the share once may still have something on that way.
            self.__dict__["_reached"] = max(self._reached, value)
        super().__setattr__(name, value)

    def __post_init__(self) -> None:
        check_salt(self.salt, self)
        check_a(self.clock, Clock, "clock", self)
        if (self.alternative is None) == (self.layer is None):
            raise ConfigError(
                "give either alternative= or layer=", option="alternative", layer=self.name
            )
        if self.alternative is not None:
            check_store(self.alternative, "alternative", self)
        if isinstance(self.layer, Mapping):
            # Read-only: a table is an option like any other, and no state to be emptied.
            self.layer = MappingProxyType(dict(self.layer))
        super().__post_init__()
        alternative = self.alternative
        self._other = self._layered() if alternative is None else alternative
        self._check_same_type(self._other, "both ways")
        self._turns = Turns(self._new_turn, self.name)
        self._writes = UnderWay(self.clock)
        self._behind: OrderedDict[str, None] = OrderedDict()
        self._all_behind = False
        # Writes under way that pass the layer by, and users of whom one may still take effect.
        self._direct: Counter[str] = Counter()
        # Writes under way through the layer: how many, and whether reads go there meanwhile.
        self._pins: dict[str, tuple[int, bool]] = {}
        self._doubtful: OrderedDict[str, float] = OrderedDict()
        self._reads: Counter[str] = Counter({"inner": 0, "other": 0})

    # Which way

    def takes(self, user_id: str) -> bool:
        """Tell whether reads of a user go the other way now."""
        turn = self._turns.users.get(user_id)
        if turn is not None:
            return turn.to_other
        if user_id in self._pins and user_id not in self._direct and not self._doubted(user_id):
            return self._pins[user_id][1]
        return (
            place_of(user_id, self.salt) < self.share
            and not self._all_behind
            and user_id not in self._behind
            and user_id not in self._direct
            and not self._doubted(user_id)
        )

    def _doubted(self, user_id: str) -> bool:
        """Tell whether a write that passed the layer by may still take effect."""
        until = self._doubtful.get(user_id) if self._doubtful else None
        return until is not None and self.clock.monotonic() < until

    @contextmanager
    def _writing(self, users: Iterable[str]) -> Iterator[dict[str, StateStore]]:
        """Give the way of each user's write, where both end in ``inner``.

        While a write passes the layer by, so do the user's reads: the layer would not hear of it.
        Further writes of the user do too, or the layer could keep what lost against the first.
        While one goes through it, reads stay on their side: inner may have it before the layer.
        """
        ways = {user_id: self._way(user_id) for user_id in users}
        direct = [user_id for user_id, way in ways.items() if way is self.inner]
        pinned = [user_id for user_id, way in ways.items() if way is not self.inner]
        for user_id in pinned:
            count, through = self._pins.get(user_id) or (0, self.takes(user_id))
            self._pins[user_id] = (count + 1, through)
        self._direct.update(direct)
        try:
            yield ways
        except BaseException as exc:
            if not not_happened(exc):
                self._doubt(direct)
            raise
        finally:
            for user_id in pinned:
                count, through = self._pins.pop(user_id)
                if count > 1:
                    self._pins[user_id] = (count - 1, through)
            for user_id in direct:
                self._direct[user_id] -= 1
                if not self._direct[user_id]:
                    del self._direct[user_id]

    def _way(self, user_id: str) -> StateStore:
        """Return the way of a user's write that begins now, where both end in ``inner``."""
        passes_by = (
            place_of(user_id, self.salt) >= self._reached
            or user_id in self._direct
            or self._doubted(user_id)
        )
        return self.inner if passes_by else self._other

    def _doubt(self, users: Iterable[str]) -> None:
        now = self.clock.monotonic()
        for user_id in users:
            self._doubtful.pop(user_id, None)
            self._doubtful[user_id] = now + QUARANTINE_SECONDS
        while self._doubtful and self._doubtful[first := next(iter(self._doubtful))] <= now:
            del self._doubtful[first]

    @property
    def behind(self) -> int:
        """How many users the alternative missed a write of."""
        return len(self._behind)

    # Reading

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        check_user_id(user_id, Op.GET_LATEST, self)
        if not self.takes(user_id):
            self._reads["inner"] += 1
            found = await self._latest_of(self.inner, user_id)
            if not self.takes(user_id):
                return found
            # The share rose meanwhile: a write under way may stand in inner alone, and the next
            # read would show what was before it.
        self._reads["other"] += 1
        found = await self._latest_of(self._other, user_id)
        if found is None and self.alternative is not None:
            found = await self._latest_of(self.inner, user_id)  # not written since the ramp began
            if self._midway(user_id):
                again = await self._latest_of(self._other, user_id)
                return found if again is None else again
        return found

    def _midway(self, user_id: str) -> bool:
        """Tell whether inner may show a write that the next read, of the other side, does not."""
        turn = self._turns.users.get(user_id)
        return turn is not None and turn.to_other

    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        check_user_id(user_id, Op.GET_HISTORY, self)
        check_limit(limit, self)
        if not self.takes(user_id):
            return await self._history_of(self.inner, user_id, limit)
        found = await self._history_of(self._other, user_id, limit)
        if not found and limit and self.alternative is not None:
            found = await self._history_of(self.inner, user_id, limit)
            if self._midway(user_id):
                return await self._history_of(self._other, user_id, limit) or found
        return found

    async def _latest_of(self, store: StateStore, user_id: str) -> StateSnapshot | None:
        return check_state(await store.get_latest(user_id), user_id, self)

    async def _history_of(
        self, store: StateStore, user_id: str, limit: int
    ) -> list[StateSnapshot]:
        return check_history(await store.get_history(user_id, limit), user_id, self.name)

    async def get_latest_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        wanted = check_user_ids(user_ids, self)
        other = {user_id: None for user_id in wanted if self.takes(user_id)}
        found: dict[str, StateSnapshot] = {}
        if other:
            self._reads["other"] += len(other)
            found.update(states_by_user(await self._other.get_latest_many([*other]), self))
        answered = found if self.alternative is not None else other
        rest = [user_id for user_id in wanted if user_id not in answered]
        if rest:
            self._reads["inner"] += len(wanted) - len(other)
            found.update(states_by_user(await self.inner.get_latest_many(rest), self))
        # As a single read does.
        again = [
            user_id
            for user_id in rest
            if (self._midway(user_id) if user_id in other else self.takes(user_id))
        ]
        if again:
            found.update(states_by_user(await self._other.get_latest_many(again), self))
        return check_states(found, wanted, self)

    # Writing

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        check_snapshot(snapshot, self.snapshot_type, block=self)
        with call_begins(self.clock) as call:
            if self.alternative is not None:
                with self._writes.call():
                    await self._write([snapshot], Op.UPSERT_LATEST, call)
                return
            with self._writing([snapshot.user_id]) as ways:
                await ways[snapshot.user_id].upsert_latest(snapshot)

    async def upsert_latest_many(self, snapshots: Iterable[StateSnapshot]) -> None:
        batch = check_snapshots(snapshots, self.snapshot_type, self)
        with call_begins(self.clock) as call:
            if self.alternative is not None:
                with self._writes.call():
                    await self._write(batch, Op.UPSERT_LATEST_MANY, call)
                return
            with self._writing({each.user_id: None for each in batch}) as ways:
                await self._divide(batch, ways, call)

    async def _divide(
        self, batch: Sequence[StateSnapshot], ways: Mapping[str, StateStore], call: Call
    ) -> None:
        """Write each user of a batch on the user's way; both ways end in ``inner``."""
        stored = False
        for way in (self.inner, self._other):
            part = {i: each for i, each in enumerate(batch) if ways[each.user_id] is way}
            if len(part) == len(batch):
                await way.upsert_latest_many(batch)
                return
            if part:
                own = call.of(part)
                try:
                    with call_continues(own):
                        await way.upsert_latest_many(list(part.values()))
                except StoreError as exc:
                    exc.outcome_unknown |= stored
                    raise
                stored = True
                call.superseded |= own.superseded
                call.unsure |= own.unsure

    async def _write(self, batch: Sequence[StateSnapshot], op: Op, call: Call) -> None:
        """Write to ``inner``, which acknowledges, then to the alternative."""
        users = sorted({snapshot.user_id for snapshot in batch})
        with await self._turns.begin_all(users, op) as turns:
            # What an earlier write may still do, on either side, could come after this one.
            settled = [user_id for user_id in users if not self._doubted(user_id)]
            try:
                await _upsert(self.inner, batch, op)
            except BaseException as exc:
                if not not_happened(exc):
                    self._fall_behind(users)
                if may_take_effect(exc):
                    self._doubt(users)
                raise
            in_share = any(place_of(user_id, self.salt) < self.share for user_id in users)
            if call.superseded:
                # An erasure or a newer state won in inner; who knows what would here.
                self._fall_behind(users)
                return
            own = call.again()
            try:
                await self._follow(batch, op, own, turns.values())
            except Exception as exc:
                self._fall_behind(users)
                if may_take_effect(exc):
                    self._doubt(users)
                if in_share:
                    raise self._unknown(exc, op) from exc
            except BaseException:
                self._fall_behind(users)
                self._doubt(users)  # cut off, it may still take effect
                raise
            else:
                if own.superseded:  # it has something else for the latest state
                    self._fall_behind(users)
                else:
                    self._catch_up(settled)

    async def _follow(
        self, batch: Sequence[StateSnapshot], op: Op, call: Call, turns: Collection[_Write]
    ) -> None:
        """Write to the alternative, unless one of the users is spared it."""
        if any(turn.spared for turn in turns):
            raise unsent(op, self.name)
        try:
            with call_continues(call):
                await _upsert(self._other, batch, op)
        except Exception as exc:
            for turn in turns:
                turn.second_failed(exc)
            raise

    def _unknown(self, exc: Exception, op: Op) -> UnavailableError:
        return UnavailableError(
            "inner took the write, the alternative did not; repeat it",
            operation=op,
            layer=self.name,
            retryable=getattr(exc, "retryable", False),
            outcome_unknown=True,
        )

    async def delete(self, user_id: str) -> None:
        check_user_id(user_id, Op.DELETE, self)
        if self.alternative is None:
            with self._writing([user_id]) as ways:
                await ways[user_id].delete(user_id)
            return
        with self._writes.call():
            await self._erase(user_id)

    async def _erase(self, user_id: str) -> None:
        """Erase in ``inner``, then in the alternative."""
        with await self._turns.begin(user_id, Op.DELETE) as turn:
            settled = not self._doubted(user_id)
            pending: list[str] = []
            errors: list[Exception] = []
            # Until both have erased, only inner tells the truth.
            self._fall_behind([user_id])
            for store in (self.inner, self._other):
                try:
                    if store is self.inner:
                        await store.delete(user_id)
                    else:
                        await self._erase_other(user_id, turn)
                except BaseException as exc:
                    if store is self.inner:
                        turn.failed(exc)
                    else:
                        turn.second_failed(exc)
                    if may_take_effect(exc):
                        self._doubt([user_id])
                    if not isinstance(exc, Exception):
                        raise
                    # Whatever it was, the other must erase.
                    errors.append(exc)
                    pending.extend(pending_of(exc, store))
            if errors[1:] and all(isinstance(e, UnsupportedError | ClosedError) for e in errors):
                raise errors[0]  # nothing was erased anywhere, and repeating it would not help
            if errors:
                raise ErasureIncompleteError(
                    "not every store has the user erased; repeat the delete",
                    pending=pending,
                    layer=self.name,
                    user_id=user_id,
                ) from errors[0]
            if settled:
                self._catch_up([user_id])

    async def _erase_other(self, user_id: str, turn: _Write) -> None:
        if turn.spared:
            raise unsent(Op.DELETE, self.name, user_id)
        # Inner may have erased again what was written since an earlier attempt.
        with call_continues(current_call(self.clock).anew()):
            await self._other.delete(user_id)

    def _new_turn(
        self, turns: Turns[_Write], user_id: str, loop: asyncio.AbstractEventLoop
    ) -> _Write:
        # Until the end, reads stay on the side they are on.
        return _Write(turns, user_id, loop, to_other=self.takes(user_id))

    def _fall_behind(self, users: Iterable[str]) -> None:
        for user_id in users:
            self._behind[user_id] = None
            self._turns.users[user_id].to_other = False
        if len(self._behind) > _MAX_BEHIND:
            self._all_behind = True

    def _catch_up(self, users: Iterable[str]) -> None:
        for user_id in users:
            self._behind.pop(user_id, None)

    # The rest of a layer

    def capability(self, kind: type[C]) -> C | None:
        if isinstance(self, kind):
            return self
        if kind is Enumerable:
            return enumerable_of(self.inner)  # type: ignore[return-value]
        if kind is Invalidations and self.alternative is None:
            # What is written through the layer ends in inner too.
            return ability_of(self.inner, kind)
        return None

    async def health_report(self) -> HealthReport:
        if self.alternative is None:
            below = await report_of(self._other if self._reached else self.inner)
            return HealthReport(self.name, below.status, below.latency_ms, "", (below,))
        inner, other = await asyncio.gather(report_of(self.inner), report_of(self._other))
        status, message = inner.status, ""
        if other.status is HealthStatus.UNHEALTHY and status is HealthStatus.HEALTHY:
            status = HealthStatus.DEGRADED
            message = "the alternative is down: calls of the share and all deletes fail"
        latency = max(inner.latency_ms, other.latency_ms)
        return HealthReport(self.name, status, latency, message, (inner, other))

    async def open(self) -> None:
        if self.alternative is None:
            await (self._other if self._reached else self.inner).open()
            return
        await self.inner.open()
        try:
            await self._other.open()
        except StoreError:
            if self.share > 0.0:
                raise

    def children(self) -> Mapping[str, StateStore]:
        if self.alternative is None:
            return {"inner": self.inner}
        return {"inner": self.inner, "alternative": self.alternative}

    def notes(self) -> tuple[str, ...]:
        """Return what ``describe`` says of this block: where the share goes."""
        if self.alternative is not None:
            return (f"{self.share:.6g} of the users read from the alternative",)
        layers = [type(store).__name__ for store in self._layers()]
        return (f"{self.share:.6g} of the users go through {', '.join(layers) or 'nothing more'}",)

    @property
    def staleness(self) -> tuple[float, str]:
        """Seconds by which the other way makes an answer older, and why when there is no bound."""
        (other, why), (inner, no_bound) = staleness(self._other), staleness(self.inner)
        if no_bound:
            return 0.0, ""  # inner says so itself
        return max(0.0, other - inner), why

    def samples(self) -> Iterable[Sample]:
        yield Sample("ramp_share", self.share)
        for side, reads in self._reads.items():
            yield Sample("ramp_reads", reads, (side,))
        if self.alternative is not None:
            yield Sample("ramp_behind", len(self._behind))
            return
        # The layers of the share are this block's own: what they count is counted here.
        totals: dict[tuple[str, tuple[str, ...]], float] = {}
        for store in self._layers():
            for sample in store.samples():
                key = (sample.metric, sample.labels)
                totals[key] = totals.get(key, 0.0) + sample.value
        for (metric, labels), value in totals.items():
            yield Sample(metric, value, labels)

    async def aclose(self) -> None:
        self._refuse_operations()
        await self._writes.end()
        results = await asyncio.gather(self._other.aclose(), return_exceptions=True)
        await self._close_children()
        for result in results:
            if isinstance(result, BaseException):
                raise result

    # The layers of the share

    def _layers(self) -> list[StateStore]:
        below = {id(place.store) for place in walk(self.inner)}
        return [place.store for place in walk(self._other) if id(place.store) not in below]

    def _layered(self) -> StateStore:
        if isinstance(self.layer, Mapping):
            built = _built(self.inner, self.layer)
        elif callable(self.layer):
            built = self.layer(self.inner)
        else:
            raise self._refuse_layer("must be a function, or a table such as {'use': 'cached'}")
        if not isinstance(built, StateStore) or built is self.inner:
            raise self._refuse_layer("must give a store around the one that it is given")
        places = list(walk(built))
        ends = [place.path for place in places if place.store is self.inner]
        if not ends:
            raise self._refuse_layer("must be put around the store that it is given, not another")
        for place in places:
            above = f"{place.path}." if place.path else ""
            on_the_way = place.store is not self.inner and any(p.startswith(above) for p in ends)
            if on_the_way and isinstance(place.store, TranslatingLayer):
                raise self._refuse_layer(
                    f"must keep states as they are: whoever leaves the share reads what"
                    f" {place.store.name} stored without it; give alternative= another store"
                )
        return built

    def _refuse_layer(self, message: str) -> ConfigError:
        return ConfigError(message, option="layer", layer=self.name)


async def _upsert(store: StateStore, batch: Sequence[StateSnapshot], op: Op) -> None:
    if op is Op.UPSERT_LATEST:
        await store.upsert_latest(batch[0])
    else:
        await store.upsert_latest_many(batch)


def _built(inner: StateStore, table: Mapping[str, Any]) -> StateStore:
    """Return the layer of a config file's table around ``inner``."""
    from layered_store.config.loader import load_unchecked  # noqa: PLC0415

    end = "ramp.inner"
    stack = {"store": {"use": "memory", "id": end, "layers": [dict(table)]}}
    try:
        # The linter sees the whole stack elsewhere, and nothing of it here.
        return load_unchecked(stack, overrides={end: inner})[0]
    except ConfigError as exc:
        exc.option = "layer"
        for each in (exc, *exc.problems):
            each.path = "layer" + (each.path or "").removeprefix("store.layers.0")
        raise


def _masked(layer: object) -> object:
    """Return what may be shown of the option ``layer``: of a table, all but its secrets."""
    if isinstance(layer, list | tuple):
        return [_masked(each) for each in layer]
    if not isinstance(layer, Mapping):
        return f"<{type(layer).__name__}>"
    from layered_store.config.registry import spec_of  # noqa: PLC0415

    known = {option.name: option for option in spec_of(str(layer.get("use"))).options}
    shown = {}
    for name, value in layer.items():
        option = known.get(name)
        if name == "layers" or (option is not None and option.store):
            shown[name] = _masked(value)
        elif option is not None and option.mask is not None:
            shown[name] = option.mask(value)
        else:
            hidden = option is not None and option.secret
            shown[name] = "***" if hidden else masked(str(name), value)
    return shown
