"""Fallback: reads move over, writes never do, erasures go to both."""

import asyncio
from typing import Any

import pytest

from layered_store.call import current_call
from layered_store.coherence.contract import Authority
from layered_store.errors import (
    CircuitOpenError,
    ClosedError,
    ConfigError,
    CorruptDataError,
    ErasureIncompleteError,
    OverloadedError,
    StoreError,
    StoreTimeoutError,
    UnavailableError,
    UnsupportedError,
    ValidationError,
)
from layered_store.health import HealthReport, HealthStatus
from layered_store.interface import Op
from layered_store.layers.cached import Cached
from layered_store.layers.circuit_breaker import CircuitBreaker
from layered_store.layers.fallback import Fallback
from layered_store.layers.retry import Retry
from layered_store.layers.timeout import Timeout
from layered_store.snapshot import StateSnapshot
from layered_store.stats import Sample
from layered_store.stores.memory import MemoryStore
from layered_store.testing.clock import settle
from layered_store.testing.scripted import Gate, Scripted

STATE = StateSnapshot("u-1", 1, axes={"warmth": 0.5})
OLD = StateSnapshot("u-1", 0, axes={"warmth": 0.1})


class Other(StateSnapshot, frozen=True):
    """Another class of snapshots."""


def down() -> UnavailableError:
    return UnavailableError("down")


@pytest.mark.parametrize(
    ("option", "value"), [("secondary", None), ("secondary", MemoryStore), ("inner", "redis")]
)
def test_a_wrong_option_is_refused_by_name(option: str, value: object) -> None:
    """Each wrong value is a ConfigError that names class and option."""
    arguments: dict[str, Any] = {"inner": Scripted(), "secondary": Scripted(), option: value}
    with pytest.raises(ConfigError, match=f"Fallback.{option}") as caught:
        Fallback(**arguments)
    assert caught.value.option == option


def test_both_must_keep_the_same_snapshots() -> None:
    """Two classes of snapshots cannot stand in for each other."""
    with pytest.raises(ConfigError, match="Fallback.snapshot_type") as caught:
        Fallback(Scripted(), secondary=Scripted(snapshot_type=Other))
    assert caught.value.option == "snapshot_type"
    both = Fallback(Scripted(snapshot_type=Other), secondary=Scripted(snapshot_type=Other))
    assert both.snapshot_type is Other


async def test_secondary_is_not_asked_while_inner_answers() -> None:
    """An answer of inner stands, also when it is that the user is absent."""
    secondary = Scripted(OLD, OLD)
    fallback = Fallback(Scripted(STATE, None), secondary=secondary)
    assert await fallback.get_latest("u-1") == STATE
    assert await fallback.get_latest("u-1") is None
    assert secondary.calls == []


@pytest.mark.parametrize(
    "error",
    [down(), StoreTimeoutError("slow"), CircuitOpenError(retry_after=1), OverloadedError("full")],
)
async def test_reads_move_over(error: Exception) -> None:
    """When inner is unavailable or refuses, every read is answered by secondary, and counted."""
    inner = Scripted(error, error, error)
    secondary = Scripted(OLD, {"u-1": OLD}, [OLD])
    fallback = Fallback(inner, secondary=secondary)
    assert await fallback.get_latest("u-1") == OLD
    assert await fallback.get_latest_many(iter(["u-1"])) == {"u-1": OLD}
    assert await fallback.get_history("u-1", 1) == [OLD]
    assert inner.calls == secondary.calls
    assert list(fallback.samples()) == [
        Sample("fallbacks", 1, ("get_latest",)),
        Sample("fallbacks", 1, ("get_latest_many",)),
        Sample("fallbacks", 1, ("get_history",)),
        Sample("erasures_incomplete", 0),
    ]


async def test_an_iterator_of_users_is_not_used_up_by_inner() -> None:
    """Secondary is asked for the same users."""

    class Broken(Scripted):
        async def get_latest_many(self, user_ids: Any) -> dict[str, StateSnapshot]:
            list(user_ids)
            raise down()

    secondary = MemoryStore()
    await secondary.upsert_latest(STATE)
    fallback = Fallback(Broken(), secondary=secondary)
    assert await fallback.get_latest_many(iter(["u-1", "u-2"])) == {"u-1": STATE}


@pytest.mark.parametrize(
    "error", [ValidationError("bad"), CorruptDataError("bad"), ClosedError("x"), ValueError("bug")]
)
async def test_other_errors_stay(error: Exception) -> None:
    """What is wrong with the call or the data is not papered over by an older copy."""
    secondary = Scripted(OLD)
    with pytest.raises(type(error)) as caught:
        await Fallback(Scripted(error), secondary=secondary).get_latest("u-1")
    assert caught.value is error
    assert secondary.calls == []


async def test_when_both_are_down_inner_is_heard() -> None:
    """The error is inner's, with secondary's as its cause."""
    first, second = down(), CircuitOpenError(retry_after=1)
    with pytest.raises(UnavailableError) as caught:
        await Fallback(Scripted(first), secondary=Scripted(second)).get_latest("u-1")
    assert caught.value is first
    assert caught.value.__cause__ is second


async def test_another_error_of_secondary_comes_out() -> None:
    """Bad data in secondary is told as such."""
    error = CorruptDataError("bad")
    with pytest.raises(CorruptDataError) as caught:
        await Fallback(Scripted(down()), secondary=Scripted(error)).get_latest("u-1")
    assert caught.value is error


@pytest.mark.parametrize("error", [down(), CircuitOpenError(retry_after=1)])
async def test_writes_never_move_over(error: Exception) -> None:
    """An upsert that inner did not take fails, and secondary never hears of it."""
    secondary = Scripted()
    fallback = Fallback(Scripted(error, error), secondary=secondary)
    with pytest.raises(type(error)):
        await fallback.upsert_latest(STATE)
    with pytest.raises(type(error)):
        await fallback.upsert_latest_many([STATE])
    await fallback.upsert_latest(STATE)
    assert secondary.calls == []


async def test_a_delete_goes_to_both_inner_first() -> None:
    """Nobody may be shown from the copy afterwards."""
    inner, secondary = MemoryStore(), MemoryStore()
    fallback = Fallback(inner, secondary=secondary)
    for store in (inner, secondary):
        await store.upsert_latest(STATE)
    await fallback.delete("u-1")
    assert await inner.get_latest("u-1") is None
    assert await secondary.get_latest("u-1") is None
    order: list[str] = []

    class Noting(Scripted):
        async def delete(self, user_id: str) -> None:  # noqa: ARG002
            order.append(self.name)

    class Second(Noting):
        pass

    await Fallback(Noting(), secondary=Second()).delete("u-1")
    assert order == ["Noting", "Second"]


class Left(Scripted):
    """Inner, by a name of its own."""


class Right(Scripted):
    """Secondary, by a name of its own."""


@pytest.mark.parametrize(
    ("left", "right", "pending"),
    [
        (down(), None, ("Left",)),
        (None, down(), ("Right",)),
        (down(), CircuitOpenError(), ("Left", "Right")),
        (None, UnsupportedError("cannot"), ("Right",)),
        (RuntimeError("bug"), None, ("Left",)),
        (ErasureIncompleteError(pending=("redis", "l1")), down(), ("redis", "l1", "Right")),
    ],
)
async def test_an_erasure_that_is_not_finished_says_where(
    left: Exception | None, right: Exception | None, pending: tuple[str, ...]
) -> None:
    """Both are always asked; those that failed are named; repeating is invited where it helps."""
    inner, secondary = Left(left), Right(right)
    fallback = Fallback(inner, secondary=secondary)
    with pytest.raises(ErasureIncompleteError) as caught:
        await fallback.delete("u-1")
    assert Sample("erasures_incomplete", 1) in fallback.samples()
    assert caught.value.pending == pending
    unable = isinstance(right, UnsupportedError)
    assert caught.value.retryable is not unable
    assert ("cannot delete" if unable else "repeat the delete") in str(caught.value)
    assert caught.value.__cause__ is (left or right)
    assert (caught.value.operation, caught.value.layer) == (Op.DELETE, "Fallback")
    assert caught.value.user_id == "u-1"
    assert "u-1" not in str(caught.value)
    assert inner.calls == secondary.calls == [Op.DELETE]


async def test_what_is_pending_is_named_by_its_store_and_not_by_the_layers_around_that() -> None:
    """In the stack that its page calls right, ``Retry`` would tell nobody where to look."""
    inner = Retry(CircuitBreaker(Left(down())), attempts=1)
    fallback = Fallback(inner, secondary=Timeout(Right(down()), seconds=1))
    with pytest.raises(ErasureIncompleteError) as caught:
        await fallback.delete("u-1")
    assert caught.value.pending == ("Left", "Right")


@pytest.mark.parametrize("kind", [UnsupportedError, ClosedError])
async def test_an_erasure_that_no_store_can_do_is_not_to_be_repeated(
    kind: type[StoreError],
) -> None:
    """Where neither side can erase at all, the error says that and is not retryable."""
    layer = Fallback(Scripted(kind("no")), secondary=Scripted(kind("no")))
    with pytest.raises(kind) as caught:
        await layer.delete("u-1")
    assert not caught.value.retryable


async def test_a_bad_user_id_is_refused_before_anything_is_erased() -> None:
    """A ValidationError, not an unfinished erasure."""
    inner, secondary = Scripted(), Scripted()
    with pytest.raises(ValidationError):
        await Fallback(inner, secondary=secondary).delete("not valid")
    assert inner.calls == secondary.calls == []


async def test_cancellation_is_no_reason_to_ask_secondary() -> None:
    """A cancelled read or delete ends at once."""
    for operation in ("get_latest", "delete"):
        gate = Gate()
        secondary = Scripted()
        fallback = Fallback(Scripted(gate), secondary=secondary)
        task = asyncio.create_task(getattr(fallback, operation)("u-1"))
        await gate.entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert secondary.calls == []


class Ill(Scripted):
    """A layer-like store that is degraded itself."""

    async def health_report(self) -> Any:
        report = await super().health_report()
        return type(report)(report.name, HealthStatus.DEGRADED, 3.0)


@pytest.mark.parametrize(
    ("inner", "secondary", "status", "words"),
    [
        (Scripted(), Scripted(), HealthStatus.HEALTHY, ""),
        (Scripted(healthy=False), Scripted(), HealthStatus.DEGRADED, "inner is down"),
        (Scripted(), Scripted(healthy=False), HealthStatus.DEGRADED, "secondary is down"),
        (
            Scripted(healthy=False),
            Scripted(healthy=False),
            HealthStatus.UNHEALTHY,
            "inner and secondary",
        ),
        (Ill(), Scripted(), HealthStatus.DEGRADED, ""),
        (Scripted(), Ill(), HealthStatus.DEGRADED, ""),
        (Ill(), Scripted(healthy=False), HealthStatus.DEGRADED, "secondary"),
    ],
)
async def test_health(
    inner: Scripted, secondary: Scripted, status: HealthStatus, words: str
) -> None:
    """Degraded when one side is down, unhealthy when both are; both are in the report."""
    fallback = Fallback(inner, secondary=secondary)
    report = await fallback.health_report()
    assert report.status is status
    assert words in report.message
    assert bool(report.message) is bool(words)
    assert len(report.children) == 2
    assert await fallback.health_check() is (status is not HealthStatus.UNHEALTHY)


async def test_both_are_probed_side_by_side() -> None:
    """Neither probe waits for the other: each needs the other to have begun."""
    begun = asyncio.Barrier(2)

    class Meeting(Scripted):
        async def health_check(self) -> bool:
            await begun.wait()
            return True

    report = await Fallback(Meeting(), secondary=Meeting()).health_report()
    assert report.status is HealthStatus.HEALTHY


class Opening(Scripted):
    """A store that opens with an error, or counts."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.error = error
        self.opened = self.closed = 0

    async def open(self) -> None:
        self.opened += 1
        if self.error is not None:
            raise self.error

    async def aclose(self) -> None:
        self.closed += 1


@pytest.mark.parametrize(
    ("inner", "secondary", "raised"),
    [
        (None, None, None),
        (down(), None, None),
        (None, down(), None),
        (UnavailableError("first"), UnavailableError("second"), "first"),
        (None, RuntimeError("bug"), "bug"),
    ],
)
async def test_it_opens_while_one_side_is_down(
    inner: Exception | None, secondary: Exception | None, raised: str | None
) -> None:
    """Both are opened; only both down, or a mistake, is an error."""
    stores = Opening(inner), Opening(secondary)
    fallback = Fallback(stores[0], secondary=stores[1])
    if raised is None:
        await fallback.open()
    else:
        with pytest.raises((UnavailableError, RuntimeError), match=raised):
            await fallback.open()
    assert [store.opened for store in stores] == [1, 1]


async def test_closing_closes_both() -> None:
    """After aclose every operation says so."""
    stores = Opening(), Opening()
    fallback = Fallback(stores[0], secondary=stores[1])
    assert fallback.children() == {"inner": stores[0], "secondary": stores[1]}
    await fallback.aclose()
    assert [store.closed for store in stores] == [1, 1]
    with pytest.raises(ClosedError):
        await fallback.get_latest("u-1")


async def test_an_erasure_under_way_comes_to_its_end_before_the_stores_are_closed() -> None:
    """On both, as one: a repeat of it is known by its id wherever it arrives."""
    gate, erased = Gate(), []

    class Slow(MemoryStore):
        async def delete(self, user_id: str) -> None:
            await gate.pass_through()
            erased.append((self, current_call().write_id))
            await super().delete(user_id)

    fallback = Fallback(Slow(), secondary=Slow())
    erasing = asyncio.create_task(fallback.delete("u-1"))
    await gate.entered.wait()
    closing = asyncio.create_task(fallback.aclose())
    await settle()
    assert not closing.done()
    gate.open()
    await erasing
    await closing
    (inner, one), (secondary, other) = erased
    assert (inner, secondary) == (fallback.inner, fallback.secondary)
    assert one == other
    with pytest.raises(ClosedError):
        await secondary.get_latest("u-1")


def test_it_is_no_system_of_record() -> None:
    """What inner offers beyond the interface is not offered past this layer."""
    assert MemoryStore().capability(Authority) is not None  # type: ignore[type-abstract]
    fallback = Fallback(MemoryStore(), secondary=MemoryStore())
    assert fallback.capability(Authority) is None  # type: ignore[type-abstract]


async def test_a_hit_below_passes_without_the_layer() -> None:
    """The hot path of a cache below is offered unchanged; without one there is none."""
    cached = Cached(MemoryStore())
    await cached.upsert_latest(STATE)
    fallback = Fallback(Timeout(cached, seconds=1), secondary=MemoryStore())
    assert fallback.hot_path() == cached.hot_path()
    assert await fallback.get_latest("u-1") == STATE
    assert Fallback(MemoryStore(), secondary=MemoryStore()).hot_path() is None


async def test_the_health_report_is_as_slow_and_as_bad_as_its_worse_side() -> None:
    """While both are up, whichever that is."""

    class Tells(MemoryStore):
        def __init__(self, status: HealthStatus, latency: float) -> None:
            super().__init__()
            self.report = HealthReport("Tells", status, latency)

        async def health_report(self) -> HealthReport:
            return self.report

    one, two = Tells(HealthStatus.HEALTHY, 1.0), Tells(HealthStatus.DEGRADED, 3.0)
    for inner, secondary in ((one, two), (two, one)):
        report = await Fallback(inner, secondary=secondary).health_report()
        assert (report.status, report.latency_ms) == (HealthStatus.DEGRADED, 3.0)
