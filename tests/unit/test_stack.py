"""Building a stack again, and what else a third party's blocks may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import pytest

from layered_store import (
    Cached,
    ConfigError,
    Fallback,
    Layer,
    MemoryStore,
    Retry,
    SQLStore,
    StateSnapshot,
    StateStore,
    SyncStore,
    Timeout,
    describe,
    find,
    lint,
    load_stack,
    replace,
    to_config,
)
from layered_store.clock import SystemClock
from layered_store.coherence.contract import Authority
from layered_store.errors import ValidationError
from layered_store.layer import AroundLayer
from layered_store.sealed import SealedSnapshot
from layered_store.stack import tier_name
from layered_store.testing import FakeClock, on_clock


class Plain(StateStore):
    """A store that is no dataclass."""

    def __init__(self) -> None:
        self.kept: dict[str, StateSnapshot] = {}

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        return self.kept.get(user_id)

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        self.kept[snapshot.user_id] = snapshot


class Around(Plain):
    """A layer that is none either."""

    def __init__(self, inner: StateStore, limit: int = 3) -> None:
        super().__init__()
        self.inner = inner
        self._limit = limit


class Odd(Around):
    """One that keeps its option under another name."""

    def __init__(self, inner: StateStore, most: int) -> None:
        super().__init__(inner, most)


class Dialled(Plain):
    """An end that does not tell what it was built with."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.line = number


async def test_what_is_no_dataclass_is_built_again_too() -> None:
    """With the arguments that it keeps; it shares no state with the old one."""
    stack = Fallback(Around(Plain(), 7), secondary=MemoryStore())
    await stack.upsert_latest(StateSnapshot("u-1"))
    twin = replace(stack, MemoryStore, MemoryStore())
    (around,) = find(twin, Around)
    assert around._limit == 7
    assert await twin.get_latest("u-1") is None
    await twin.upsert_latest(StateSnapshot("u-2"))
    assert await stack.get_latest("u-2") is None


def test_a_layer_that_cannot_be_built_again_is_told() -> None:
    """Its class is named, with the remedy; a store that is only an end is copied."""
    with pytest.raises(ConfigError, match="cannot rebuild Odd, whose __init__ takes 'most'"):
        replace(Cached(Odd(MemoryStore(), 7)), MemoryStore, MemoryStore())
    end = Dialled(5)
    twin = replace(Fallback(end, secondary=MemoryStore()), MemoryStore, MemoryStore())
    (copied,) = find(twin, Dialled)
    assert copied is not end
    assert copied.line == 5
    assert copied.kept is not end.kept


class Slow(Layer):
    """A layer as many write it: with an ``__init__`` of its own."""

    def __init__(self, inner: StateStore, seconds: float = 1.0, *, name: str = "slow") -> None:
        super().__init__(inner)
        self.seconds = seconds
        self._name = name


class Hides(Layer):
    """One that keeps its option under another name."""

    def __init__(self, inner: StateStore, limit: int = 3) -> None:
        super().__init__(inner)
        self.most = limit


class Any_(Layer):
    """One that takes whatever its base takes."""

    def __init__(self, *args: StateStore, **kwargs: StateStore) -> None:
        super().__init__(*args, **kwargs)


@pytest.mark.parametrize(
    "again",
    [
        lambda stack: replace(stack, MemoryStore, MemoryStore()),
        lambda stack: on_clock(stack, FakeClock()),
    ],
)
def test_a_layer_with_an_init_of_its_own(again: Callable[[StateStore], StateStore]) -> None:
    """It is built with the options it was built with; one that does not tell them is refused."""
    (slow,) = find(again(Cached(Any_(Slow(MemoryStore(), 5.0, name="mine")))), Slow)
    assert (slow.seconds, slow._name) == (5.0, "mine")
    with pytest.raises(ConfigError, match="cannot rebuild Hides, whose __init__ takes 'limit'"):
        again(Cached(Hides(MemoryStore(), 7)))


class Sized(Plain):
    """A store of a third party with options, and a cache that it may be given."""

    def __init__(self, size: int, rows: dict[str, StateSnapshot] | None = None) -> None:
        super().__init__()
        self._size = size
        self.rows = {} if rows is None else rows


class Scattered(Plain):
    """One that takes what it does not keep."""

    def __init__(self, *parts: str) -> None:
        super().__init__()
        self.text = "".join(parts)


async def test_the_store_of_a_third_party_shares_nothing() -> None:
    """Its twin has the same options and holds nothing; one that does not tell them is copied."""
    sized = Sized(3)
    stack = Cached(Fallback(sized, secondary=MemoryStore()))
    await stack.upsert_latest(StateSnapshot("ada"))
    sized.rows["ada"] = StateSnapshot("ada")
    new = replace(stack, MemoryStore, MemoryStore())
    assert await new.get_latest("ada") is None
    (twin,) = find(new, Sized)
    assert (twin._size, twin.rows) == (3, {})
    assert twin.rows is not sized.rows
    scattered = Scattered("a", "b")
    new = replace(Fallback(scattered, secondary=MemoryStore()), MemoryStore, MemoryStore())
    (copied,) = find(new, Scattered)
    assert copied.text == "ab"
    assert copied.kept is not scattered.kept


def test_what_was_swapped_in_is_found_by_the_id_of_its_place() -> None:
    """By ``overrides=`` or by ``replace``: a second swap names it as the first did."""
    file = {"use": "cached", "id": "l1", "inner": {"use": "memory", "id": "truth"}}
    first, second, third = MemoryStore(), MemoryStore(), MemoryStore()
    stack = load_stack(file, overrides={"truth": first})
    assert [block.id for block in describe(stack)] == ["l1", "truth"]
    again = replace(replace(stack, "truth", second), "truth", third)
    assert find(again, MemoryStore) == [third]
    assert [block.id for block in describe(on_clock(again, FakeClock()))] == ["l1", "truth"]
    with pytest.raises(ConfigError, match="did you mean 'truth'"):
        replace(again, "trut", first)


def test_what_has_an_id_keeps_it() -> None:
    """A block of another stack is not renamed there."""
    other = load_stack({"use": "memory", "id": "mine"})
    stack = load_stack({"use": "memory", "id": "truth"}, overrides={"truth": other})
    assert describe(stack)[0].id == "mine"


def test_swapping_in_no_store_is_refused() -> None:
    """By the argument's name, before anything is built."""
    with pytest.raises(ConfigError, match=r"replace\.new: must be a StateStore"):
        replace(Cached(MemoryStore()), MemoryStore, MemoryStore)  # type: ignore[arg-type]


@dataclass(eq=False, repr=False)
class Remote(Plain):
    """A third party's store, whose author knows nothing of masks."""

    url: str
    token: str = field(default="", kw_only=True)
    api_key: bytes | None = field(default=None, kw_only=True)
    dsn: str = field(default="", kw_only=True)
    tokens: int = field(default=0, kw_only=True)
    monkey: str = field(default="", kw_only=True)


def test_a_tier_is_called_by_its_backend() -> None:
    """Whatever layers stand around it; what is made of several stores has a name of its own."""
    assert tier_name(Plain()) == "Plain"
    assert tier_name(Retry(Around(Timeout(Plain(), seconds=1)))) == "Plain"
    assert tier_name(Cached(MemoryStore(), fallback=Plain())) == "WriteThrough"
    alone = Around(Plain())
    alone.inner = alone
    assert tier_name(alone) == "Around"


def test_secrets_of_a_third_party_are_masked() -> None:
    """By the name of the option, or within a URL; what is none is shown."""
    store = Remote(
        "https://ada:marked@host/path?sig=marked",
        token="marked",
        api_key=b"marked",
        dsn="Server=host;Password=marked",
        tokens=5,
        monkey="shown",
    )
    stack = Cached(store)
    for text in (repr(stack), str(describe(stack)), repr(describe(stack))):
        assert "marked" not in text
        assert "https://ada:***@host/path?sig=***" in text
        assert "tokens" in text
        assert "shown" in text


def test_a_duration_is_shown_in_seconds() -> None:
    """As a file has it, so that a stack looks the same before and after it was one."""
    stack = SQLStore("sqlite+aiosqlite:///x.db", history_max_age=timedelta(hours=1))
    assert "history_max_age=3600.0" in repr(stack)
    assert str(describe(load_stack(to_config(stack)))) == str(describe(stack))


@pytest.mark.parametrize("ask", [describe, lint, to_config, lambda stack: find(stack, Cached)])
def test_what_is_no_stack_is_told(ask: Callable[[object], object]) -> None:
    """A store of blocking code is none either: its stack is inside."""
    with SyncStore(lambda: MemoryStore()) as blocking:
        for stack in (5, MemoryStore, blocking):
            with pytest.raises(ConfigError, match="^stack: must be a StateStore; pass an"):
                ask(stack)


def test_errors_name_the_function_that_was_called() -> None:
    """And not that it is one."""
    with pytest.raises(ConfigError, match=r"^on_clock\.stack: must be a StateStore"):
        on_clock(5, FakeClock())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^on_clock\.clock: must be a Clock"):
        on_clock(MemoryStore(), 5)  # type: ignore[arg-type]


def test_a_layer_offers_itself() -> None:
    """A layer that is a system of record is asked before the store inside."""

    class Record(AroundLayer):
        async def around(self, op, method, /, *args, **kwargs):  # type: ignore[no-untyped-def]
            return await method(*args, **kwargs)

    layer = Record(MemoryStore())
    assert layer.capability(Record) is layer
    around = layer.capability(Authority)
    assert around is not None
    assert around is not layer.inner


def test_what_shows_a_value_shows_no_user() -> None:
    """Also to a program that prints with colours; and the clock's name is its class."""
    snapshot = StateSnapshot("user-marked", axes={"secret": 0.25})
    assert dict(snapshot.__rich_repr__()) == {"user_id": "user...", "axes": "<1>"}
    assert repr(SystemClock()) == "SystemClock()"


@pytest.mark.parametrize("sealed", [b"", "text", None])
def test_a_sealed_state_holds_bytes(sealed: object) -> None:
    """An empty one would be read as nothing at all."""
    with pytest.raises(ValidationError) as caught:
        SealedSnapshot("u-1", 5, sealed=sealed).validate()  # type: ignore[arg-type]
    assert caught.value.field == "sealed"


def test_find_wants_a_class() -> None:
    """A kind or an id is no class; the error says so."""
    with pytest.raises(ConfigError, match="must be a class"):
        find(Cached(MemoryStore()), "cached")  # type: ignore[type-var]
