"""The interface: what is required, what is provided, and what every base forwards."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import pytest

from layered_store import (
    AroundLayer,
    Cached,
    ClosedError,
    Compressed,
    ConfigError,
    CorruptDataError,
    Fallback,
    HealthStatus,
    Layer,
    MemoryStore,
    Op,
    OverloadedError,
    Prefixed,
    Ramp,
    Retry,
    SQLStore,
    StateSnapshot,
    StateStore,
    StoreError,
    UnavailableError,
    UnsupportedError,
    ValidationError,
    WriteThrough,
)
from layered_store.coherence.contract import Authority, Capability
from layered_store.enumerable import Enumerable
from layered_store.stores.redis import RedisStore
from layered_store.testing import Faults, Recorded, Scripted
from layered_store.testing.clock import settle

STATE = StateSnapshot("u-1", axes={"a": 0.5})


class Two(StateStore):
    """The two required operations."""

    def __init__(self) -> None:
        self.states: dict[str, StateSnapshot] = {}

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        snapshot.validate()
        self.states[snapshot.user_id] = snapshot

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        return self.states.get(user_id)


class Passes(AroundLayer):
    """Does nothing, to everything."""

    async def around(
        self, op: Op, method: Callable[..., Awaitable[Any]], /, *args: Any, **kwargs: Any
    ) -> Any:
        del op
        return await method(*args, **kwargs)


# What every store has

METHODS = {
    name: member
    for name, member in vars(StateStore).items()
    if not name.startswith("_") and callable(member)
}


def test_operations() -> None:
    """Each operation of the contract is a coroutine function, and named by ``Op``."""
    for op in Op:
        assert inspect.iscoroutinefunction(getattr(StateStore, op.value))
    assert {"health_check", "health_report", "open", "aclose"} < set(METHODS)
    assert [op for op in Op if op.is_write] == [Op.UPSERT_LATEST, Op.DELETE, Op.UPSERT_LATEST_MANY]


def test_nothing_is_inherited_that_hides_the_store_inside() -> None:
    """Layer writes down every method of the interface; a new one cannot be forgotten."""
    own = {"name", "samples"}  # what a layer says of itself, not of what is inside
    for name in METHODS:
        if name not in own:
            assert name in vars(Layer), f"Layer does not forward {name}"
    assert "snapshot_type" in vars(Layer)


async def test_a_refused_snapshot_names_the_operation() -> None:
    """Its error says which call was refused, alone and in a batch."""
    bad = StateSnapshot("u-1", confidence=2)
    with pytest.raises(ValidationError) as one:
        await MemoryStore().upsert_latest(bad)
    with pytest.raises(ValidationError) as many:
        await MemoryStore().upsert_latest_many([bad])
    assert (one.value.operation, many.value.operation) == (Op.UPSERT_LATEST, Op.UPSERT_LATEST_MANY)
    assert one.value.field == many.value.field == "confidence"


def test_around_treats_every_operation() -> None:
    """AroundLayer sends each operation through ``around``."""
    for op in Op:
        assert op.value in vars(AroundLayer), f"AroundLayer does not send {op.value} through around"


@pytest.mark.parametrize("cls", [MemoryStore, RedisStore, SQLStore])
def test_backends_have_the_signatures_of_the_interface(cls: type[StateStore]) -> None:
    """The same names of parameters everywhere, so that keyword arguments work on all."""
    for op in Op:
        expected = list(inspect.signature(getattr(StateStore, op.value)).parameters)
        for store in (cls, Layer, AroundLayer, Scripted, Recorded):
            assert list(inspect.signature(getattr(store, op.value)).parameters) == expected


def test_abstract() -> None:
    """Two methods are required, and no more."""
    assert StateStore.__abstractmethods__ == {"upsert_latest", "get_latest"}
    with pytest.raises(TypeError):
        StateStore()  # type: ignore[abstract]


async def test_two_methods_are_a_store() -> None:
    """Everything else works as the contract says it is provided."""
    async with Two() as store:
        await store.upsert_latest(STATE)
        other = StateSnapshot("u-2")
        await store.upsert_latest_many(iter([other, StateSnapshot("u-3")]))
        assert await store.get_latest_many(iter(["u-2", "none", "u-1", "u-1"])) == {
            "u-2": other,
            "u-1": STATE,
        }
        assert await store.get_history("u-1", 5) == []
        assert await store.health_check() is True
        report = await store.health_report()
        assert (report.name, report.status) == ("Two", HealthStatus.HEALTHY)
        with pytest.raises(UnsupportedError) as refused:
            await store.delete("u-1")
        assert (refused.value.operation, refused.value.layer) == ("delete", "Two")
        assert repr(store) == "Two()"
        assert store.name == "Two"
        assert store.snapshot_type is StateSnapshot
        assert store.capability(Authority) is None
        assert list(store.samples()) == []


async def test_provided_methods_check_their_arguments() -> None:
    """Also where a third party wrote nothing."""
    store = Two()
    for bad in (-1, 1.0, "1", None, True):
        with pytest.raises(ValidationError, match="limit must be an int of at least 0"):
            await store.get_history("u-1", bad)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="user_id"):
        await store.get_history("no id", 1)
    with pytest.raises(ValidationError, match="user_id"):
        await store.delete("no id")
    with pytest.raises(ValidationError, match="user_id"):
        await store.get_latest_many(["u-1", "no id"])
    with pytest.raises(ValidationError, match="user_ids must be a list"):
        await store.get_latest_many("u-1")
    with pytest.raises(ValidationError, match="confidence"):
        await store.upsert_latest_many([STATE, StateSnapshot("u-2", confidence=2)])
    assert store.states == {}, "all are validated before the first is stored"


async def test_a_batch_of_another_class() -> None:
    """A subclass needs a store that keeps it, so that no field is lost in silence."""

    class Mood(StateSnapshot):
        mood: str = ""

    for store in (Two(), MemoryStore(), Layer(MemoryStore())):
        with pytest.raises(ValidationError, match="snapshot_type="):
            await store.upsert_latest_many([Mood("u-1")])
    with pytest.raises(ValidationError, match="must be a Mood, not StateSnapshot"):
        await MemoryStore(snapshot_type=Mood).upsert_latest(STATE)


# Layers


@pytest.mark.parametrize("build", [Layer, Passes, Recorded])
async def test_every_operation_is_forwarded(build: Callable[[StateStore], Layer]) -> None:
    """Arguments go in and results come out as they are, by position and by name."""
    inner = Scripted(None, STATE, None, [STATE], {"u-1": STATE}, None, STATE, [STATE])
    layer = build(inner)
    assert await layer.upsert_latest(STATE) is None
    assert await layer.get_latest("u-1") is STATE
    assert await layer.delete("u-1") is None
    assert await layer.get_history("u-1", 5) == [STATE]
    assert await layer.get_latest_many(["u-1"]) == {"u-1": STATE}
    assert await layer.upsert_latest_many([STATE]) is None
    assert await layer.get_latest(user_id="u-1") is STATE
    assert await layer.get_history(user_id="u-1", limit=1) == [STATE]
    assert inner.calls == [
        Op.UPSERT_LATEST,
        Op.GET_LATEST,
        Op.DELETE,
        Op.GET_HISTORY,
        Op.GET_LATEST_MANY,
        Op.UPSERT_LATEST_MANY,
        Op.GET_LATEST,
        Op.GET_HISTORY,
    ]


async def test_iterators_are_read_once() -> None:
    """A layer that repeats a call passes the same users again."""

    class Twice(Passes):
        async def around(
            self, op: Op, method: Callable[..., Awaitable[Any]], /, *args: Any, **kwargs: Any
        ) -> Any:
            await method(*args, **kwargs)
            return await method(*args, **kwargs)

    layer = Twice(MemoryStore())
    await layer.upsert_latest_many(iter([STATE]))
    assert await layer.get_latest_many(iter(["u-1"])) == {"u-1": STATE}


async def test_what_an_iterator_raises_is_not_taken_for_a_wrong_argument() -> None:
    """A batch ends with the caller's own error, whatever its class, and stores nothing."""

    def snapshots() -> Iterable[StateSnapshot]:
        yield STATE
        raise TypeError("a fault of the caller's")

    for store in (MemoryStore(), Two(), Cached(MemoryStore()), Retry(Two())):
        with pytest.raises(TypeError, match="of the caller's"):
            await store.upsert_latest_many(snapshots())
        with pytest.raises(TypeError, match="of the caller's"):
            await store.get_latest_many(each.user_id for each in snapshots())
        assert await store.get_latest("u-1") is None


async def test_capabilities_of_an_around_layer() -> None:
    """Each method of an ability counts as the operation it stands for; a plain Layer has none."""
    seen: list[Op] = []

    class Sees(Passes):
        async def around(
            self, op: Op, method: Callable[..., Awaitable[Any]], /, *args: Any, **kwargs: Any
        ) -> Any:
            seen.append(op)
            return await method(*args, **kwargs)

    inner = MemoryStore()
    authority = Sees(inner).capability(Authority)
    assert isinstance(authority, Authority)
    await authority.write(STATE)
    await authority.write_many([STATE])
    await authority.read("u-1")
    await authority.read_many(["u-1"])
    await authority.erase("u-1")
    await authority.head()
    assert seen == [
        Op.UPSERT_LATEST,
        Op.UPSERT_LATEST_MANY,
        Op.GET_LATEST,
        Op.GET_LATEST_MANY,
        Op.DELETE,
    ]
    assert authority.digest is inner.digest
    assert Layer(inner).capability(Authority) is None
    assert Sees(Two()).capability(Authority) is None
    assert Sees(inner).capability(Enumerable) is not None


def test_every_ability_names_its_operations() -> None:
    """What an ability says stands for an operation is one of its methods."""
    for kind in Capability.__subclasses__():
        if kind.__module__.startswith("layered_store") and "Around" not in kind.__name__:
            for method, op in kind.operations.items():
                assert inspect.iscoroutinefunction(getattr(kind, method)), (kind, method)
                assert isinstance(op, Op)


async def test_closed_layers_refuse() -> None:
    """Every operation of a closed layer raises, by name, and closing again does nothing."""
    layer = Passes(Layer(MemoryStore()))
    await layer.aclose()
    await layer.aclose()
    for call in (
        layer.upsert_latest(STATE),
        layer.get_latest("u-1"),
        layer.delete("u-1"),
        layer.get_history("u-1", 1),
        layer.get_latest_many(["u-1"]),
        layer.upsert_latest_many([STATE]),
    ):
        with pytest.raises(ClosedError, match="build a new one") as refused:
            await call
        assert refused.value.layer == "Passes"
        assert refused.value.operation is not None


@pytest.mark.parametrize("inner", [None, MemoryStore, 3, "memory", {}])
def test_inner_must_be_a_store(inner: Any) -> None:
    """The remedy is said, above all when the class itself was passed."""
    with pytest.raises(ConfigError, match="Passes.inner: must be a StateStore; pass an") as refused:
        Passes(inner)
    assert "Meta" not in str(refused.value)


def test_layers_print_as_they_are_built() -> None:
    """``repr`` is the nested expression."""
    assert repr(Passes(Layer(MemoryStore(history_limit=5)))) == (
        "Passes(Layer(MemoryStore(history_limit=5)))"
    )


async def test_a_subclass_that_changes_reads_is_not_passed_by() -> None:
    """A layer that overrides a read below a cache's fused path is still asked."""
    from layered_store import Cached, Metrics

    class Hides(Cached):
        async def get_latest(self, user_id: str) -> StateSnapshot | None:
            await super().get_latest(user_id)
            return None

    from prometheus_client import CollectorRegistry

    stack = Metrics(Hides(MemoryStore()), name="m", registry=CollectorRegistry())
    await stack.upsert_latest(STATE)
    for _ in range(3):
        assert await stack.get_latest("u-1") is None


class Counts(Layer):
    """Overrides a batch only."""

    async def get_latest_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        return await super().get_latest_many(user_ids)


async def test_layers_keep_what_they_do_not_override() -> None:
    """One operation overridden, the others inherited, forwarding included."""
    layer = Counts(MemoryStore())
    await layer.upsert_latest(STATE)
    assert await layer.get_history("u-1", 1) == [STATE]
    assert await layer.get_latest_many(["u-1"]) == {"u-1": STATE}


@pytest.mark.parametrize("answer", [None, 5, [None], [{"user_id": "u-1"}], [StateSnapshot("u-2")]])
@pytest.mark.parametrize(
    "layer",
    [
        Cached,
        lambda store: WriteThrough(MemoryStore(), origin=store),
        lambda store: Fallback(store, secondary=MemoryStore()),
        lambda store: Fallback(Scripted(UnavailableError("down")), secondary=store),
        Compressed,
        lambda store: Prefixed(store, prefix="t"),
    ],
)
async def test_a_history_that_is_not_the_users_is_never_returned(
    layer: Callable[[StateStore], StateStore], answer: Any
) -> None:
    """As a state of another user is not; one state of another makes the whole of it doubtful."""

    class Elsewhere(Two):
        async def get_history(self, user_id: str, limit: int) -> Any:
            return [StateSnapshot("u-1"), *answer] if isinstance(answer, list) else answer

    with pytest.raises(CorruptDataError) as caught:
        await layer(Elsewhere()).get_history("u-1", 5)
    assert (caught.value.operation, caught.value.user_id) == ("get_history", "u-1")


@pytest.mark.parametrize(
    "layer",
    [
        Counts,
        Cached,
        Retry,
        lambda store: WriteThrough(MemoryStore(), origin=store),
        lambda store: Fallback(store, secondary=MemoryStore()),
        lambda store: Ramp(store, alternative=MemoryStore(), share=0.5),
        Compressed,
        lambda store: Prefixed(store, prefix="t"),
    ],
)
async def test_a_batch_answers_with_the_users_asked_for_only(
    layer: Callable[[StateStore], StateStore],
) -> None:
    """Whatever a store from elsewhere adds to its answer, and no dict is no answer."""

    class Elsewhere(Two):
        answer: Any = None

        async def get_latest_many(self, user_ids: Iterable[str]) -> Any:
            return self.answer

    store = Elsewhere()
    stack = layer(store)
    for answer in ({"u-2": StateSnapshot("u-2")}, {"u-1": None, 5: 5}, {"u-1": StateSnapshot("x")}):
        store.answer = answer
        assert await stack.get_latest_many(["u-1", "u-3"]) == {}
    for answer in (None, [], 5, [StateSnapshot("u-1")]):
        store.answer = answer
        with pytest.raises(CorruptDataError) as caught:
            await stack.get_latest_many(["u-1"])
        assert caught.value.operation == "get_latest_many"
        assert caught.value.layer is not None


@pytest.mark.parametrize("failure", [UnavailableError(), OverloadedError()])
async def test_a_batch_that_fails_part_way_says_that_it_took_effect(failure: StoreError) -> None:
    """Refused or not sent: what came before in the batch is stored, and not hidden by a cache."""

    class Refusing(Two):
        async def upsert_latest(self, snapshot: StateSnapshot) -> None:
            if snapshot.user_id == "u-2":
                raise failure
            await super().upsert_latest(snapshot)

    batch = [StateSnapshot("u-1", axes={"a": 0.9}), StateSnapshot("u-2")]
    async with Cached(Retry(Refusing(), attempts=1)) as stack:
        await stack.upsert_latest(STATE)
        with pytest.raises(type(failure)) as caught:
            await stack.upsert_latest_many(batch[1:])
        assert not caught.value.outcome_unknown
        assert await stack.get_latest("u-1") == STATE
        with pytest.raises(type(failure)) as caught:
            await stack.upsert_latest_many(batch)
        assert caught.value.outcome_unknown
        assert await stack.get_latest("u-1") == batch[0]


class Passing(StateStore):
    """A third party's wrapper that has no batches of its own."""

    def __init__(self, inner: StateStore) -> None:
        self.inner = inner
        self.gates: list[asyncio.Event] = []

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        for gate in self.gates:
            await gate.wait()
        await self.inner.upsert_latest(snapshot)

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        return await self.inner.get_latest(user_id)

    async def delete(self, user_id: str) -> None:
        await self.inner.delete(user_id)


async def test_a_batch_one_by_one_is_stored_as_given_and_once() -> None:
    """The same state twice in it is two writes; the same batch again is the same writes."""
    other = StateSnapshot("u-1", axes={"a": 0.7})
    memory = MemoryStore()
    flaky = Faults(memory)
    flaky.fail(fault="error_after", operations=["upsert_latest"])
    await Retry(Passing(flaky), base_delay=0.0).upsert_latest_many([STATE, other, STATE])
    assert await memory.get_latest("u-1") == STATE
    assert await memory.get_history("u-1", 9) == [STATE, other, STATE]


async def test_a_batch_one_by_one_began_with_its_first() -> None:
    """An erasure that returned before the turn of its user came is final."""
    store = Passing(MemoryStore())
    store.gates.append(asyncio.Event())
    batch = asyncio.create_task(store.upsert_latest_many([STATE, StateSnapshot("u-2")]))
    await settle()
    await store.delete("u-2")
    store.gates[0].set()
    await batch
    assert await store.get_latest("u-1") == STATE
    assert await store.get_latest("u-2") is None
