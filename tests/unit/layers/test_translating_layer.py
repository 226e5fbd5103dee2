"""The base of Encrypted, Prefixed and Compressed: errors, unreadable records and calls pass it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest

from layered_store import (
    Compressed,
    CorruptDataError,
    Encrypted,
    MemoryStore,
    Prefixed,
    StateSnapshot,
    StateStore,
    UnavailableError,
    ValidationError,
)
from layered_store.call import Call, current_call
from layered_store.coherence.contract import Authority, CacheTier, Versioned
from layered_store.enumerable import Enumerable, UserPage
from layered_store.layers.translating import TranslatingLayer

LAYERS: dict[str, Any] = {
    "prefixed": lambda inner: Prefixed(inner, prefix="acme"),
    "encrypted": lambda inner: Encrypted(inner, keys=[bytes(32)]),
    "hashed": lambda inner: Encrypted(inner, keys=[bytes(32)], hash_user_ids=True),
    "compressed": lambda inner: Compressed(inner, threshold=0),
}


def state(user_id: str = "u-1", value: float = 0.5) -> StateSnapshot:
    return StateSnapshot(
        user_id, updated_at_unix_ms=5, axes={f"axis_{n}": value for n in range(99)}
    )


class Below(StateStore):
    """What is kept stands in ``kept``; every call is noted, and fails while there is an error.

    Args:
        offers: the abilities it claims to have; it is its own authority.
    """

    def __init__(self, *offers: type) -> None:
        self.offers = offers
        self.kept: dict[str, StateSnapshot] = {}
        self.asked: list[str] = []
        self.calls: list[Call] = []
        self.error: Exception | None = None
        self.winner: StateSnapshot | None = None

    def capability(self, kind: type) -> Any:
        return self if kind in self.offers else None

    def _note(self, name: str) -> None:
        self.asked.append(name)
        self.calls.append(current_call())
        if self.error is not None:
            raise self.error

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        self._note("upsert_latest")
        self.kept[snapshot.user_id] = snapshot

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        self._note("get_latest")
        return self.kept.get(user_id)

    async def delete(self, user_id: str) -> None:
        self._note("delete")
        self.kept.pop(user_id, None)

    async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
        self._note("get_history")
        return [self.kept[user_id]] * min(1, limit) if user_id in self.kept else []

    async def get_latest_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        self._note("get_latest_many")
        return {each: self.kept[each] for each in user_ids if each in self.kept}

    async def upsert_latest_many(self, snapshots: Iterable[StateSnapshot]) -> None:
        self._note("upsert_latest_many")
        self.kept.update({each.user_id: each for each in snapshots})

    # As an authority

    async def read(self, user_id: str) -> Versioned:
        self._note("read")
        return Versioned(3, self.kept.get(user_id))

    async def read_many(self, user_ids: Sequence[str]) -> Mapping[str, Versioned]:
        self._note("read_many")
        return {each: Versioned(3, self.kept[each]) for each in user_ids if each in self.kept}

    async def write(self, snapshot: StateSnapshot) -> Versioned:
        self._note("write")
        self.kept[snapshot.user_id] = self.winner or snapshot
        return Versioned(4, self.winner or snapshot)

    async def write_many(self, snapshots: Sequence[StateSnapshot]) -> Mapping[str, Versioned]:
        self._note("write_many")
        return {each.user_id: await self.write(each) for each in snapshots}

    async def erase(self, user_id: str, tiers: Sequence[str] = ()) -> int:  # noqa: ARG002
        self._note("erase")
        return 5

    async def debts(self, user_id: str) -> Sequence[str]:  # noqa: ARG002
        self._note("debts")
        return ()


@pytest.mark.parametrize("name", LAYERS)
async def test_errors_of_every_operation_carry_the_callers_id(name: str) -> None:
    """Of the store and of its authority; an id that is nobody's here is told to nobody."""
    below = Below(Authority)
    layer: TranslatingLayer = LAYERS[name](below)
    authority: Any = layer.capability(Authority)
    batch = [state("u-0"), state("u-1"), state("u-2")]
    for call in (
        lambda: layer.upsert_latest(state()),
        lambda: layer.get_latest("u-1"),
        lambda: layer.delete("u-1"),
        lambda: layer.get_history("u-1", 3),
        lambda: layer.get_latest_many(["u-0", "u-1"]),
        lambda: layer.upsert_latest_many(batch),
        lambda: authority.read("u-1"),
        lambda: authority.read_many(["u-0", "u-1"]),
        lambda: authority.write(state()),
        lambda: authority.write_many(batch),
        lambda: authority.erase("u-1"),
        lambda: authority.debts("u-1"),
    ):
        for of, told in ((layer.id_below("u-1", ""), "u-1"), ("somebody", None)):
            below.error = UnavailableError("down", user_id=of)
            with pytest.raises(UnavailableError) as caught:
                await call()
            assert caught.value.user_id == told


async def test_what_is_written_is_made_within_the_write() -> None:
    """So that a repeated attempt is recognised: what goes below is made of the write's own id."""
    made: list[Call] = []

    class Noting(Prefixed):
        def down(self, snapshot: StateSnapshot) -> StateSnapshot:
            made.append(current_call())
            return super().down(snapshot)

    below = Below(Authority)
    layer = Noting(below, prefix="acme")
    authority: Any = layer.capability(Authority)
    for call in (
        layer.upsert_latest(state()),
        layer.upsert_latest_many([state(), state("u-2")]),
        authority.write(state()),
        authority.write_many([state(), state("u-2")]),
    ):
        await call
        assert {id(each) for each in made} == {id(each) for each in below.calls}
        assert len({id(each) for each in made}) == 1
        made.clear()
        below.calls.clear()


@pytest.mark.parametrize(
    ("offers", "cache"),
    [((), False), ((Authority,), False), ((CacheTier,), True), ((CacheTier, Authority), False)],
    ids=["plain", "record", "tier", "both"],
)
async def test_only_in_a_cache_tier_is_an_unreadable_record_none(
    offers: tuple[type, ...], cache: bool
) -> None:
    """Elsewhere it is told, since it may be the only one; a batch leaves it out in either case."""
    below = Below(*offers)
    layer = Encrypted(below, keys=[bytes(32)])
    below.kept = {"u-1": state()}  # not encrypted: somebody wrote past the layer
    await layer.upsert_latest(state("u-2"))
    assert layer.is_cache() is cache
    if cache:
        assert await layer.get_latest("u-1") is None
        assert await layer.get_history("u-1", 3) == []
    else:
        with pytest.raises(CorruptDataError) as caught:
            await layer.get_latest("u-1")
        assert caught.value.operation == "get_latest"
        with pytest.raises(CorruptDataError):
            await layer.get_history("u-1", 3)
    assert await layer.get_latest_many(["u-1", "u-2", "u-3"]) == {"u-2": state("u-2")}
    assert await layer.get_history("u-2", 3) == [state("u-2")]
    assert [sample.value for sample in layer.samples()][0] == 3


async def test_a_negative_limit_is_refused_here() -> None:
    """Whatever the store below makes of one."""
    below = Below()
    with pytest.raises(ValidationError):
        await Prefixed(below, prefix="acme").get_history("u-1", -1)
    assert below.asked == []


async def test_a_refused_id_names_the_operation() -> None:
    """One that is no id, and one that is too long together with the prefix."""
    authority: Any = Prefixed(Below(Authority), prefix="acme").capability(Authority)
    for user_id in ("not an id", "u" * 256):
        with pytest.raises(ValidationError) as caught:
            await authority.debts(user_id)
        assert caught.value.operation == "debts"


@pytest.mark.parametrize("name", LAYERS)
async def test_the_record_of_a_write_is_told_by_callers_ids(name: str) -> None:
    """Each user once, with the last of their states; or with the one that won below."""
    below = Below(Authority)
    layer: TranslatingLayer = LAYERS[name](below)
    authority: Any = layer.capability(Authority)
    batch = [state(value=0.1), state("u-2", 0.2), state(value=0.3)]
    assert await authority.write_many(batch) == {
        "u-1": Versioned(4, batch[2]),
        "u-2": Versioned(4, batch[1]),
    }
    below.winner = layer.down(state(value=0.9))
    assert await authority.write(state(value=0.4)) == Versioned(4, state(value=0.9))
    assert await authority.write_many([state(value=0.5)]) == {"u-1": Versioned(4, state(value=0.9))}
    # What the authority cannot read is left out by it.
    assert await authority.read_many(["u-1", "nobody"]) == {"u-1": Versioned(3, state(value=0.9))}


class Listed(MemoryStore):
    """A store that lists its users, and notes how often it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        self.reads.append("one")
        return await super().get_latest(user_id)

    async def get_latest_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        self.reads.append("many")
        return await super().get_latest_many(user_ids)


@pytest.mark.parametrize(
    ("name", "reads"),
    [("prefixed", []), ("encrypted", []), ("compressed", []), ("hashed", ["many"])],
)
async def test_listing_reads_records_only_where_they_hold_the_ids(
    name: str, reads: list[str]
) -> None:
    """A page at a time."""
    below = Listed()
    layer: TranslatingLayer = LAYERS[name](below)
    await layer.upsert_latest_many([state(), state("u-2")])
    listing: Any = layer.capability(Enumerable)
    page = await listing.users("", 10)
    assert sorted(page.user_ids) == ["u-1", "u-2"]
    assert below.reads == reads


async def test_a_hashed_user_who_is_gone_while_listed_is_left_out() -> None:
    """And one whose record cannot be read stops the listing: nobody may be forgotten."""

    class Going(Listed):
        gone: Iterable[str] = ()

        async def users(self, cursor: str, limit: int) -> UserPage:
            page = await super().users(cursor, limit)
            for user_id in self.gone:
                await self.delete(user_id)
            return page

    below = Going()
    layer = Encrypted(below, keys=[bytes(32)], hash_user_ids=True)
    await layer.upsert_latest_many([state(), state("u-2")])
    listing: Any = layer.capability(Enumerable)
    below.gone = [layer.id_below("u-2", "")]
    assert (await listing.users("", 10)).user_ids == ["u-1"]
    assert below.reads == ["many", "one"]
    below.gone = ()
    await below.upsert_latest(state("a-stranger"))
    with pytest.raises(CorruptDataError):
        await listing.users("", 10)


@pytest.mark.parametrize("answer", [{"user_id": "u-1"}, "u-1", 5, object()])
@pytest.mark.parametrize("layer", [*LAYERS, "accepts plain"])
async def test_an_answer_that_is_no_snapshot_is_a_corrupt_record(layer: str, answer: Any) -> None:
    """A store from elsewhere may answer anything; it costs nobody but the user asked for."""

    class Elsewhere(StateStore):
        async def upsert_latest(self, snapshot: StateSnapshot) -> None: ...

        async def get_latest(self, user_id: str) -> Any:
            return answer

        async def get_history(self, user_id: str, limit: int) -> list[Any]:
            return [answer]

    plain = {"accepts plain": lambda inner: Encrypted(inner, keys=[bytes(32)], accept_plain=True)}
    stack = (LAYERS | plain)[layer](Elsewhere())
    with pytest.raises(CorruptDataError) as caught:
        await stack.get_latest("u-1")
    assert (caught.value.operation, caught.value.user_id) == ("get_latest", "u-1")
    with pytest.raises(CorruptDataError):
        await stack.get_history("u-1", 1)
    assert await stack.get_latest_many(["u-1"]) == {}
    assert [s.value for s in stack.samples() if s.metric == "corrupt_records"] == [3]
