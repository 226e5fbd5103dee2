"""An in-process cache in front of a store, right under any interleaving of its callers."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random as _random
import weakref
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, TypeVar

from cachetools import Cache

from layered_store.call import call_begins
from layered_store.checks import (
    check_history,
    check_snapshot,
    check_snapshots,
    check_state,
    check_user_ids,
    is_state_of,
    not_of_user,
    states_by_user,
)
from layered_store.clock import SYSTEM_CLOCK, Clock
from layered_store.coherence.contract import Invalidations, Notice
from layered_store.errors import (
    ConfigError,
    CorruptDataError,
    RejectedError,
    UnavailableError,
)
from layered_store.eviction import S3FIFOCache
from layered_store.explaining import Held, Peek
from layered_store.flights import AGAIN, LEAD, NO_VALUE, Failure, Flight, Stale, fresh
from layered_store.holdings import LEFT_OUT, NEVER, Entry, Holdings
from layered_store.hotpath import HitCount, HotPath, Trust
from layered_store.identity import check_user_id
from layered_store.interface import Op, StateStore, ability_of
from layered_store.layer import Layer
from layered_store.options import (
    Seconds,
    check_a,
    check_choice,
    check_count,
    check_seconds,
    check_share,
)
from layered_store.running import cancel_all, running_loop, spawn
from layered_store.stack import staleness
from layered_store.stats import Reads, Sample

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from layered_store.snapshot import StateSnapshot

__all__ = ["Cached"]

C = TypeVar("C")

# Those that were given a cache object: two of them must not share one.
_GIVEN: Final[weakref.WeakSet[Cached]] = weakref.WeakSet()


@dataclass(eq=False, repr=False)
class Cached(Layer):
    """Keep users' latest states in this process for ``ttl`` seconds.

    A hit costs about twice an awaited dict lookup. Concurrent misses of one user cause one read
    below. Within one process, reads through this layer never go back behind a write that returned:
    a write or delete takes away what is cached and what is being loaded, before and after it runs.
    A write that failed or was cancelled leaves nothing cached, and nothing is cached for that user
    for 5 s, since it may still take effect.

    With ``fallback``, ``inner`` is a shared cache tier and ``fallback`` the system of record: it is
    exactly ``Cached(WriteThrough(inner, origin=fallback))``. Above a tier with an invalidation
    channel (Redis), hits are answered only under a lease that this process's own echo over the
    channel renews; without one, other processes' writes show after ``ttl`` at the latest.

    Args:
        inner: the store to cache, or the cache tier when ``fallback`` is given.
        fallback: the system of record behind the cache tier.
        ttl: seconds for which an entry answers, above 0.
        max_entries: how many users are kept, at least 1; the least useful go first (S3-FIFO).
        negative_ttl: seconds for which an absent user is remembered; 0 is off.
        stale_if_error: seconds past the TTL in which an old entry answers when ``inner`` is
            unavailable; 0 is off. Never after a delete of the user or a write that may have taken
            effect, nor without a lease.
        refresh_ahead: share of the TTL after which a hit starts a refresh in the background; one
            that fails is tried again after half of what is left. None is off.
        ttl_jitter: each entry's TTL is shortened by a random share up to this, so that entries
            stored together do not expire together.
        invalidation: ``"auto"`` uses the channel of the tier below when there is one,
            ``"required"`` refuses a stack without, ``"off"`` never does.
        cache: any ``cachetools`` cache to keep the entries in, instead of S3-FIFO with
            ``max_entries``: empty, and used by nobody else. Its hits are slower.
        random: source of the jitter.
        clock: source of time.

    Raises:
        ConfigError: an option is out of range, ``invalidation="required"`` has no channel below, or
            ``cache`` is not empty or another ``Cached``'s.

    Order:
        Below ``Metrics``, above everything that talks to a backend. A ``Retry`` or ``Timeout``
        above it costs nothing on a hit, but belongs below it, around each backend.

    Cancellation:
        A cancelled reader never cancels or fails the others: when it was the one that loads, the
        next takes over; when nobody waits any more, the load stops.

    Source:
        Stale answers: RFC 5861. Early refresh: the ``refreshAfterWrite`` of Caffeine.
    """

    fallback: InitVar[StateStore | None] = field(default=None, kw_only=True)
    ttl: Seconds = field(default=60.0, kw_only=True)
    max_entries: int = field(default=10_000, kw_only=True)
    negative_ttl: Seconds = field(default=0.0, kw_only=True)
    stale_if_error: Seconds = field(default=0.0, kw_only=True)
    refresh_ahead: float | None = field(default=None, kw_only=True)
    ttl_jitter: float = field(default=0.0, kw_only=True)
    invalidation: Literal["auto", "required", "off"] = field(default="auto", kw_only=True)
    cache: Cache[Any, Any] | None = field(default=None, kw_only=True)
    random: _random.Random = field(default_factory=_random.Random, kw_only=True, repr=False)
    clock: Clock = field(default=SYSTEM_CLOCK, kw_only=True, repr=False)

    kind: ClassVar[str] = "cached"
    caches: ClassVar[bool] = True  # told as a cache by layered_store.testing.record

    def __post_init__(self, fallback: StateStore | None) -> None:
        check_a(self.clock, Clock, "clock", self)
        check_a(self.random, _random.Random, "random", self)
        if isinstance(fallback, StateStore):
            from layered_store.layers.write_through import WriteThrough  # noqa: PLC0415

            self.inner = WriteThrough(self.inner, origin=fallback, clock=self.clock)
        elif fallback is not None:
            raise ConfigError(
                "must be a StateStore, the system of record", option="fallback", layer=self.name
            )
        self.ttl = check_seconds(self.ttl, "ttl", self)
        check_count(self.max_entries, "max_entries", self)
        self.negative_ttl = check_seconds(self.negative_ttl, "negative_ttl", self, positive=False)
        self.stale_if_error = check_seconds(
            self.stale_if_error, "stale_if_error", self, positive=False
        )
        if self.refresh_ahead is not None:
            check_share(self.refresh_ahead, "refresh_ahead", self, zero=False, one=False)
        self.ttl_jitter = check_share(self.ttl_jitter, "ttl_jitter", self, one=False)
        check_choice(self.invalidation, "invalidation", self, ("auto", "required", "off"))
        if self.cache is not None:
            self._take(self.cache)
        self._monotonic = self.clock.monotonic
        self._channel: Invalidations | None = None
        # The event loop on which the channel was seen to stand.
        self._following: asyncio.AbstractEventLoop | None = None
        self._trust = Trust()
        # Until when no erasure can have been missed, whether or not the tier is trusted.
        self._heard_until = math.inf
        self._refreshes: set[asyncio.Task[None]] = set()
        self._hit_counts: list[HitCount] = []
        self._reads = Reads()
        self._waits = 0
        self._stale_seconds: float = self.stale_if_error
        self._held = Holdings(
            S3FIFOCache(self.max_entries) if self.cache is None else self.cache,
            given=self.cache is not None,
            lifetime=self.ttl,
            negative_lifetime=self.negative_ttl,
            stale=self._stale_seconds,
            refresh_ahead=self.refresh_ahead,
            jitter=self._shortened if self.ttl_jitter else None,
            monotonic=self._monotonic,
        )
        # At hand, since each miss looks at them.
        self._entries, self._flights = self._held.entries, self._held.flights
        super().__post_init__()
        if self.invalidation != "off":
            self._channel = ability_of(self.inner, Invalidations)
            if self._channel is not None:
                self._held.follow(self._channel.key_of)
                self._trust.lease(NEVER)
                self._heard_until = NEVER
                self._channel.attach(self)
            elif self.invalidation == "required":
                raise ConfigError(
                    "'required' needs a tier with an invalidation channel below, such as"
                    " WriteThrough(RedisStore(url), origin=SQLStore(url))",
                    option="invalidation",
                    layer=self.name,
                )

    def _shortened(self, lifetime: float) -> float:
        return lifetime * (1.0 - self.ttl_jitter * self.random.random())

    def _take(self, cache: object) -> None:
        """Refuse what is not a cache, is not empty, or is another ``Cached``'s as well."""
        if not isinstance(cache, Cache):
            wrong = "must be a cachetools cache, such as cachetools.LRUCache(1000)"
        elif cache or any(other.cache is cache for other in tuple(_GIVEN)):
            wrong = "must be empty and no other Cached's, whose states it would answer with"
        else:
            _GIVEN.add(self)
            return
        raise ConfigError(wrong, option="cache", layer=self.name)

    # Reading

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        try:
            entry = self._entries.get(user_id)
        except TypeError:
            check_user_id(user_id, Op.GET_LATEST, self)
            raise
        if entry is not None:
            now = self._monotonic()
            if (
                now < entry.deadline
                and now < self._trust.lease_until
                and entry.version != LEFT_OUT
            ):
                return self._answer(user_id, entry)
        loop = running_loop()
        if loop is not self._following and self._channel is not None:
            await self._follow_channel(self._channel)
        flight = self._flights.get(user_id)
        if flight is not None and flight.loop is loop:
            if self._channel is not None and not self._joinable(flight):
                return await self._come_late(user_id, flight)
            # Wait for another caller's load; take it over if that caller goes away.
            self._waits += 1
            future = loop.create_future()
            if flight.waiters is None:
                flight.waiters = [future]
                flight.joined = True
            else:
                flight.waiters.append(future)
            try:
                result = await future
            except BaseException:
                # Cancelled in the very turn in which it was made the one that loads.
                if future.done() and not future.cancelled() and future.result() is LEAD:
                    self._abandoned(user_id, flight)
                raise
            if result is not LEAD:
                if type(result) in NO_VALUE:
                    return self._received(result)
                self._reads.miss += 1
                return result  # type: ignore[no-any-return]
        elif flight is None or flight.loop.is_closed():
            if self._channel is None and not self._held.quarantine:
                check_user_id(user_id, Op.GET_LATEST, self)
                flight = self._flights[user_id] = Flight(loop)
            else:
                flight = self._takeoff(user_id, loop)
        else:
            # Futures belong to one loop: a caller on another one loads for itself, keeps nothing.
            flight = Flight(loop)
        try:
            if flight.boarding:
                await self.clock.sleep(0)
            value = await self.inner.get_latest(user_id)
            if value is not None and getattr(value, "user_id", None) != user_id:
                raise not_of_user(user_id, Op.GET_LATEST, self.name)
        except Exception as exc:  # noqa: BLE001
            return await self._load_failed(user_id, flight, exc)
        except BaseException:
            self._abandoned(user_id, flight)
            raise
        self._reads.miss += 1
        held = self._held
        with held.lock:  # as ``Holdings.landed`` does; written out, since each miss comes by here
            current = held.flights.pop(user_id, None)
            if current is flight:
                held.keep(user_id, value, 0, flight.digest)
            else:
                held.overtaken(user_id, current, value)
        if flight.joined:
            flight.land(value)
        return value

    async def get_latest_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        wanted = check_user_ids(user_ids, self)
        loop = running_loop()
        if loop is not self._following and self._channel is not None:
            await self._follow_channel(self._channel)
        now = self._monotonic()
        found: dict[str, StateSnapshot | None] = dict.fromkeys(wanted)
        led: dict[str, Flight] = {}
        joined: dict[str, asyncio.Future[Any]] = {}
        for user_id in found:
            entry = self._entries.get(user_id)
            if entry is not None and now < entry.deadline and now < self._trust.lease_until:
                found[user_id] = self._answer(user_id, entry)
                continue
            flight = self._flights.get(user_id)
            if flight is None or flight.loop.is_closed():
                led[user_id] = self._takeoff(user_id, loop)
            elif flight.loop is loop and self._joinable(flight):
                self._waits += 1
                joined[user_id] = future = loop.create_future()
                flight.board(future)
            else:
                led[user_id] = Flight(loop)
        left = len(joined)
        try:
            if led:
                found.update(await self._lead_many(led))
            for user_id, future in joined.items():
                result = await future
                left -= 1
                # A record that cannot be read is left out of a batch, as stores do.
                with contextlib.suppress(CorruptDataError):
                    if result is AGAIN:
                        found[user_id] = await self.get_latest(user_id)
                    else:
                        found[user_id] = self._received(result)
        except Exception as exc:
            self._reads.failed(exc, left)
            raise
        finally:
            for future in joined.values():
                future.cancel()
        return {user_id: snapshot for user_id, snapshot in found.items() if snapshot is not None}

    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        return check_history(await self.inner.get_history(user_id, limit), user_id, self.name)

    def _answer(self, user_id: str, entry: Entry) -> StateSnapshot | None:
        """Count a hit and give what the entry holds, starting a refresh when it is due."""
        value: StateSnapshot | None = entry.value
        if value is None:
            self._reads.negative_hit += 1
            return None
        self._reads.hit += 1
        if self._held.s3 is not None and entry.freq < 3:  # noqa: PLR2004  as the hot path does
            entry.freq += 1
        if entry.expires < entry.deadline and self._monotonic() >= entry.expires:
            entry.expires = entry.deadline
            self._refresh(user_id, entry)
        return value

    async def _follow_channel(self, channel: Invalidations) -> None:
        """Wait for the channel before the first load, so that its answer may be kept."""
        await channel.ready()
        self._following = asyncio.get_running_loop()

    def _takeoff(self, user_id: str, loop: asyncio.AbstractEventLoop) -> Flight:
        check_user_id(user_id, Op.GET_LATEST, self)
        flight = Flight(loop)
        self._held.take_off(user_id, flight)
        if self._channel is not None and self._monotonic() >= self._trust.lease_until:
            # Without a lease others may join it in this turn only; it reads when that is over.
            flight.boarding = True
            loop.call_soon(flight.close_doors)
        return flight

    def _joinable(self, flight: Flight) -> bool:
        """Tell whether a load that began before a call may answer it.

        Under a lease it may: whatever another process wrote or erased before the call was told of,
        and took the flight away. Without one nobody was told, and an erasure may have returned
        since the flight read.
        """
        return (
            self._channel is None
            or flight.boarding
            or self._monotonic() < self._trust.lease_until
        )

    async def _come_late(self, user_id: str, flight: Flight) -> StateSnapshot | None:
        """Wait until a load that may be too old is over; share the next one."""
        self._waits += 1
        future: asyncio.Future[Any] = flight.loop.create_future()
        flight.come_late(future)
        result = await future
        if result is AGAIN:
            return await self.get_latest(user_id)
        old = await self._old(user_id, result.error)
        if old is None:
            self._reads.failed(result.error)
            raise fresh(result.error)
        self._reads.stale += 1
        return old

    async def _load_failed(
        self, user_id: str, flight: Flight, exc: Exception
    ) -> StateSnapshot:
        """Return the old state that may answer, or raise the error of a load."""
        try:
            answer = await self._failed(user_id, flight, exc)
        except BaseException:
            self._abandoned(user_id, flight)
            raise
        if answer is None:
            self._reads.failed(exc)
            try:
                raise exc
            finally:
                del exc  # it holds this frame
        self._reads.stale += 1
        return answer

    async def _lead_many(self, led: Mapping[str, Flight]) -> Mapping[str, StateSnapshot | None]:
        try:
            if any(flight.boarding for flight in led.values()):
                await self.clock.sleep(0)
            values = states_by_user(await self.inner.get_latest_many(tuple(led)), self)
            found = {user_id: values.get(user_id) for user_id in led}
        except Exception as exc:
            left = dict(led)
            answers = {}
            try:
                for user_id, flight in led.items():
                    answers[user_id] = await self._failed(user_id, flight, exc)
                    del left[user_id]
            except BaseException:
                for user_id, flight in left.items():
                    self._abandoned(user_id, flight)
                raise
            if None in answers.values():
                self._reads.failed(exc, len(led))
                raise
            self._reads.stale += len(led)
            return answers
        except BaseException:
            for user_id, flight in led.items():
                self._abandoned(user_id, flight)
            raise
        self._reads.miss += len(led)
        for user_id, flight in led.items():
            value = found[user_id]
            if value is not None and not is_state_of(value, user_id):
                # Left out of the batch; whoever asked for this user alone is told.
                found[user_id] = None
                self._held.leave(user_id, flight)
                flight.land(Failure(not_of_user(user_id, Op.GET_LATEST, self.name)))
                continue
            if value is None and flight.any_waits():
                # Whoever asked for this user alone is told of a record that cannot be read.
                self._held.saw(user_id)
                flight.hand_over()
                continue
            self._held.landed(user_id, flight, value, 0 if value is not None else LEFT_OUT)
            flight.land(value)
        return found

    def _received(self, result: Any) -> StateSnapshot | None:
        """Give what a flight landed with, to one of those who waited."""
        if type(result) is Failure:
            self._reads.failed(result.error)
            raise fresh(result.error)
        if type(result) is Stale:
            self._reads.stale += 1
            return result.value
        self._reads.miss += 1
        return result  # type: ignore[no-any-return]

    async def _failed(
        self, user_id: str, flight: Flight, exc: Exception
    ) -> StateSnapshot | None:
        """End a load that raised; return the old state that may answer instead, if any."""
        old = None
        if self.stale_if_error and self._flights.get(user_id) is flight:
            old = await self._old(user_id, exc)
        if not self._held.leave(user_id, flight):
            old = None  # written or erased meanwhile
        if old is not None:
            flight.land(Stale(old, exc))
            return old
        if flight.joined:
            flight.land(Failure(exc))
        return None

    async def _old(self, user_id: str, exc: Exception) -> StateSnapshot | None:
        """Return an old state that may answer in place of this error, if there is one."""
        if (
            not self.stale_if_error
            or not isinstance(exc, UnavailableError | RejectedError)
            or self._held.doubtful(user_id)
        ):
            return None
        entry = self._entries.get(user_id)
        now = self._monotonic()
        if (
            entry is not None
            and entry.value is not None
            and now < entry.deadline + self._stale_seconds
            # Not under a lease, which ends when the tier is no longer repaired; but no erasure may
            # have been missed.
            and now < self._heard_until
        ):
            return entry.value  # type: ignore[no-any-return]
        if self._channel is None:
            return None
        return await self._channel.stale(user_id, self._stale_seconds)

    def _abandoned(self, user_id: str, flight: Flight) -> None:
        """The loading caller was cancelled: the next one loads, or nobody."""
        if not flight.hand_over():
            self._held.leave(user_id, flight)

    def _refresh(self, user_id: str, entry: Entry) -> None:
        """Load a user in the background, unless somebody is loading or writing it already."""
        if user_id in self._flights or user_id in self._held.writing:
            return
        loop = asyncio.get_running_loop()
        flight = self._takeoff(user_id, loop)

        def ended(task: asyncio.Task[None]) -> None:
            self._refreshes.discard(task)
            # Here, since a task that is cancelled as soon as it is made runs none of its code.
            if task.cancelled() or task.exception() is not None:
                self._abandoned(user_id, flight)

        task = spawn(self._refresh_quietly(user_id, entry, flight))
        self._refreshes.add(task)
        task.add_done_callback(ended)

    async def _refresh_quietly(self, user_id: str, entry: Entry, flight: Flight) -> None:
        try:
            if flight.boarding:
                await self.clock.sleep(0)
            value = check_state(await self.inner.get_latest(user_id), user_id, self)
        except Exception as exc:  # noqa: BLE001
            # The entry answers until its deadline whatever happens here; then a caller sees it.
            # Until then it is tried again, each time after half of what is left.
            entry.expires = (self._monotonic() + entry.deadline) / 2
            await self._failed(user_id, flight, exc)
        else:
            self._held.landed(user_id, flight, value)
            flight.land(value)

    # Writing

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        with call_begins(self.clock) as call:
            check_snapshot(snapshot, self.snapshot_type, block=self)
            user_id = snapshot.user_id
            if self._following is None and self._channel is not None:
                await self._follow_channel(self._channel)
            self._held.write_begins(user_id)
            try:
                await self.inner.upsert_latest(snapshot)
            except BaseException as exc:
                self._held.write_failed(user_id, exc)
                raise
        self._held.write_ends(user_id, snapshot, call.version, kept=not call.superseded)

    async def upsert_latest_many(self, snapshots: Iterable[StateSnapshot]) -> None:
        batch = check_snapshots(snapshots, self.snapshot_type, self)
        last = {snapshot.user_id: snapshot for snapshot in batch}
        for user_id in last:
            self._held.write_begins(user_id)
        try:
            with call_begins(self.clock) as call:
                await self.inner.upsert_latest_many(batch)
        except BaseException as exc:
            for user_id in last:
                self._held.write_failed(user_id, exc)
            raise
        for user_id, snapshot in last.items():
            self._held.write_ends(user_id, snapshot, 0, kept=not call.superseded)

    async def delete(self, user_id: str) -> None:
        check_user_id(user_id, Op.DELETE, self)
        self._held.write_begins(user_id)
        try:
            with call_begins(self.clock) as call:
                await self.inner.delete(user_id)
        except BaseException as exc:
            self._held.write_failed(user_id, exc, erasing=True)
            raise
        self._held.write_ends(user_id, None, 0, kept=not call.superseded)

    # What the invalidation channel tells (coherence.LeasedCache)

    def invalidate(self, notice: Notice) -> None:
        self._held.invalidate(notice)

    def distrust(self) -> None:
        self._held.distrust()

    def lease(self, until: float) -> None:
        self._trust.lease(until)

    def hear(self, until: float) -> None:
        self._heard_until = until

    # The rest of a layer

    def capability(self, kind: type[C]) -> C | None:
        # A cache above this one must hear of the same writes and erasures.
        return ability_of(self.inner, kind) if kind is Invalidations else super().capability(kind)

    async def peek(self, user_id: str) -> Peek:
        """Tell what is cached of a user; the entry does not count as used."""
        entry = self._held.look(user_id)
        if entry is None:
            return Peek(Held.ABSENT, answers=False)
        now = self._monotonic()
        left = entry.deadline - now
        leased = now < self._trust.lease_until
        heard = now < self._heard_until
        away = "the tier waits for its repair" if heard else "the invalidation channel is away"
        note = "" if leased else f"no lease: {away}"
        if left <= 0:
            note = "kept for stale_if_error" if self._stale_seconds else "expired"
        single = entry.version != LEFT_OUT
        if not single and not note:
            note = "left out of a batch: answers batches only"
        state = entry.value
        return Peek(
            Held.ABSENT if state is None else Held.STATE,
            None if state is None else state.updated_at_unix_ms,
            max(0.0, left),
            entry.version if entry.version > 0 else None,
            answers=leased and left > 0 and single,
            note=note,
        )

    def hot_path(self) -> HotPath | None:
        if self._held.s3 is None:
            return None
        return HotPath(self._held.s3.nodes, self._trust, self._monotonic, (self,))  # type: ignore[arg-type]

    def attach_hits(self, count: HitCount) -> None:
        self._hit_counts.append(count)

    def samples(self) -> Iterable[Sample]:
        hits = sum(count.read() for count in self._hit_counts)
        for sample in self._reads.samples():
            extra = hits if sample.labels == ("hit",) else 0
            yield Sample("reads", sample.value + extra, sample.labels)
        yield Sample("read_waits", self._waits)
        yield Sample("cache_entries", len(self._entries))
        if self._held.s3 is not None and self._held.s3.evicted:
            yield Sample("cache_evictions", self._held.s3.evicted, ("size",))
        for (metric, reason), value in list(self._held.removals.items()):
            yield Sample(metric, value, (reason,))

    def notes(self) -> tuple[str, ...]:
        """Return what ``describe`` says of this block: the worst-case staleness."""
        bound, why = staleness(self)
        if self._channel is not None:
            first = f"other processes' writes show at once, after {bound:g} s at the latest"
        elif bound < math.inf:
            first = f"other processes' writes show after {bound:g} s at the latest"
        else:
            first = f"other processes' writes may not show: {why}"
        if self._stale_seconds:
            first += f"; up to {self._stale_seconds:g} s older while inner is unavailable"
        return (first,)

    @property
    def staleness(self) -> tuple[float, str]:
        """Seconds by which this block makes an answer older, and why when there is no bound."""
        if self._channel is not None:
            return 0.0, ""
        return max(self.ttl, self.negative_ttl), ""  # type: ignore[return-value]

    async def aclose(self) -> None:
        self._refuse_operations()
        _GIVEN.discard(self)
        if self._channel is not None:
            self._channel.detach(self)
        self._held.close()
        await cancel_all(self._refreshes)
        await self._close_children()
