"""What layers that change ids or states offer of the store below: its versions, its copies, its
channel, all with the ids and the states that callers know."""

from __future__ import annotations

from typing import Any

import pytest

from layered_store import (
    Cached,
    Compressed,
    CorruptDataError,
    Encrypted,
    MemoryStore,
    Prefixed,
    Retry,
    StateSnapshot,
    UnavailableError,
    ValidationError,
)
from layered_store.coherence.contract import (
    ABSENT,
    Authority,
    CacheTier,
    Holders,
    Invalidations,
    Ticket,
    TierRead,
    Versioned,
)
from layered_store.coherence.views import view_of
from layered_store.enumerable import Enumerable
from layered_store.identity import digest_function
from layered_store.layers.translating import DigestBelow, TranslatingLayer
from layered_store.testing import Faults

LAYERS = {
    "prefixed": lambda inner: Prefixed(inner, prefix="acme"),
    "encrypted": lambda inner: Encrypted(inner, keys=[bytes(32)]),
    "hashed": lambda inner: Encrypted(inner, keys=[bytes(32)], hash_user_ids=True),
    "compressed": lambda inner: Compressed(inner, threshold=0),
}
TICKET = Ticket(b"token", b"generation")
HOLDERS = Holders(1.0, 2.0, {"other": (3.0, 4.0)})


def state(user_id: str = "u-1", value: float = 0.5) -> StateSnapshot:
    return StateSnapshot(
        user_id, updated_at_unix_ms=5, axes={f"axis_{n}": value for n in range(99)}
    )


class Below:
    """A tier, a channel and a register of debts by the ids below; it notes what it is asked."""

    layer: Any = None
    target: Any = None
    digest = digest_function(b"below")
    tier_name = "below"
    has_channel = False

    def __init__(self) -> None:
        self.kept: dict[str, Versioned] = {}
        self.asked: list[tuple[Any, ...]] = []
        self.error: Exception | None = None

    def _note(self, *call: Any) -> None:
        self.asked.append(call)
        if self.error is not None:
            raise self.error

    async def read(self, user_id: str) -> TierRead:
        self._note("read", user_id)
        return TierRead(self.kept.get(user_id), TICKET, trusted=True)

    async def read_many(self, user_ids: Any) -> dict[str, TierRead]:
        self._note("read_many", *user_ids)
        return {each: TierRead(self.kept.get(each), TICKET, trusted=True) for each in user_ids}

    async def read_stale(self, user_id: str, seconds: float) -> Versioned | None:
        self._note("read_stale", user_id, seconds)
        return self.kept.get(user_id)

    async def ticket(self, user_id: str) -> Ticket | None:
        self._note("ticket", user_id)
        return TICKET

    async def fill(self, user_id: str, record: Versioned, ticket: Ticket) -> None:
        self._note("fill", user_id, ticket)
        self.kept[user_id] = record

    async def put(self, user_id: str, record: Versioned, ticket: Ticket | None) -> None:
        self._note("put", user_id, ticket)
        self.kept[user_id] = record

    async def bury(self, user_id: str, version: int, me: str) -> Holders:
        self._note("bury", user_id, version, me)
        return HOLDERS

    async def holders(self, user_id: str, me: str) -> Holders:
        self._note("holders", user_id, me)
        return HOLDERS

    def key_of(self, user_id: str) -> bytes:
        return b"key of " + user_id.encode()

    async def stale(self, user_id: str, seconds: float) -> StateSnapshot | None:
        self._note("stale", user_id, seconds)
        found = self.kept.get(user_id)
        return None if found is None else found.snapshot


class Holder(MemoryStore):
    """A store that offers a tier or a channel."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind
        self.below = Below()

    def capability(self, kind: Any) -> Any:
        if kind is not self.kind:
            return None
        return view_of(kind, type("Seen", (_Seen,), {}))(None, self.below)


class _Seen:
    def __init__(self, layer: Any, target: Any) -> None:  # noqa: ARG002
        self.target = target


def built(name: str, kind: type) -> tuple[TranslatingLayer, Any, Below]:
    """Return a layer, what it offers of a kind, and what stands below."""
    holder = Holder(kind)
    layer: Any = LAYERS[name](holder)
    return layer, layer.capability(kind), holder.below


@pytest.mark.parametrize("name", LAYERS)
async def test_copies_are_kept_below_as_the_store_knows_them(name: str) -> None:
    """Under the id below, in the form below, with the version and the ticket of the caller; and
    come back as the caller gave them."""
    layer, tier, below = built(name, CacheTier)
    inner_id = layer.id_below("u-1", "")
    for number, method in enumerate(("put", "fill")):
        await getattr(tier, method)("u-1", Versioned(7 + number, state()), TICKET)
        assert below.asked[-1] == (method, inner_id, TICKET)
        kept = below.kept[inner_id]
        assert kept.version == 7 + number
        assert kept.snapshot != state()
        found = Versioned(7 + number, state())
        assert await tier.read("u-1") == TierRead(found, TICKET, trusted=True)
        assert await tier.read_stale("u-1", 9.0) == found
        assert below.asked[-1] == ("read_stale", inner_id, 9.0)
    answers = await tier.read_many(["u-1", "u-2"])
    assert answers == {
        "u-1": TierRead(found, TICKET, trusted=True),
        "u-2": TierRead(None, TICKET, trusted=True),
    }
    assert await tier.read_stale("u-2", 9.0) is None
    assert await tier.ticket("u-1") is TICKET
    assert await tier.bury("u-1", 12, "me") is HOLDERS
    assert await tier.holders("u-1", "me") is HOLDERS
    assert below.asked[-3:] == [
        ("ticket", inner_id),
        ("bury", inner_id, 12, "me"),
        ("holders", inner_id, "me"),
    ]
    assert tier.tier_name == "below"
    assert tier.digest("u-1") == Below.digest(inner_id)
    assert tier.digest is tier.digest


@pytest.mark.parametrize("name", LAYERS)
async def test_a_tombstone_is_handed_on_as_it_is(name: str) -> None:
    """There is no state in it to translate."""
    layer, tier, below = built(name, CacheTier)
    grave = Versioned(9, None)
    await tier.put("u-1", grave, None)
    assert below.kept == {layer.id_below("u-1", ""): grave}
    assert (await tier.read("u-1")).found is grave
    assert (await tier.read_many(["u-1"]))["u-1"].found is grave
    assert await tier.read_stale("u-1", 9.0) is grave


@pytest.mark.parametrize("name", ["prefixed", "encrypted", "hashed"])
async def test_a_copy_of_somebody_else_is_a_miss_that_is_counted(name: str) -> None:
    """In a cache tier, where the next write replaces it; the ticket and the trust stay."""
    layer, tier, below = built(name, CacheTier)
    await tier.put("u-2", Versioned(3, state("u-2")), None)
    inner_id = layer.id_below("u-1", "")
    below.kept[inner_id] = below.kept.pop(layer.id_below("u-2", ""))
    assert await tier.read("u-1") == TierRead(None, TICKET, trusted=True)
    assert await tier.read_stale("u-1", 9.0) is None
    assert [sample.value for sample in layer.samples()][:1] == [2]
    assert layer.is_cache()
    # In a system of record the same is an error, and in a batch the user is left out.
    record: Any = LAYERS[name](MemoryStore())
    assert not record.is_cache()
    authority = record.capability(Authority)
    await record.inner.upsert_latest(state(inner_id))
    if name != "prefixed":
        with pytest.raises(CorruptDataError):
            await authority.read("u-1")
        assert await authority.read_many(["u-1", "u-3"]) == {"u-3": ABSENT}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", [CacheTier, Invalidations])
async def test_errors_from_below_carry_the_callers_id(name: str, kind: type) -> None:
    """Whatever was asked; an id that is nobody's here is told to nobody."""
    layer, seen, below = built(name, kind)
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("read", ("u-1",)),
        ("read_many", (["u-1", "u-2"],)),
        ("read_stale", ("u-1", 1.0)),
        ("ticket", ("u-1",)),
        ("fill", ("u-1", Versioned(1, state()), TICKET)),
        ("put", ("u-1", Versioned(1, state()), TICKET)),
        ("bury", ("u-1", 1, "me")),
        ("holders", ("u-1", "me")),
    ]
    if kind is Invalidations:
        calls = [("stale", ("u-1", 1.0))]
    for method, arguments in calls:
        for of, told in ((layer.id_below("u-1", ""), "u-1"), ("somebody", None)):
            below.error = UnavailableError("down", user_id=of)
            with pytest.raises(UnavailableError) as caught:
                await getattr(seen, method)(*arguments)
            assert caught.value.user_id == told


@pytest.mark.parametrize("name", LAYERS)
async def test_a_stale_copy_comes_by_the_channel_as_the_callers(name: str) -> None:
    """Asked for under the id below, and never somebody else's who is called so there."""
    layer, channel, below = built(name, Invalidations)
    inner_id = layer.id_below("u-1", "")
    below.kept["u-1"] = Versioned(1, state(value=0.25))  # another's, where ids differ
    if inner_id != "u-1":
        assert await channel.stale("u-1", 9.0) is None
    below.kept[inner_id] = Versioned(2, layer.down(state()))
    assert await channel.stale("u-1", 9.0) == state()
    assert below.asked[-1] == ("stale", inner_id, 9.0)
    assert channel.key_of("u-1") == below.key_of(inner_id)
    if name != "compressed":
        below.kept[inner_id] = Versioned(2, layer.down(state("u-2")))
        assert await channel.stale("u-1", 9.0) is None
        assert [sample.value for sample in layer.samples()][:1] == [1]


@pytest.mark.parametrize("name", ["prefixed", "encrypted", "hashed"])
async def test_bad_arguments_are_refused_before_anything_is_asked(name: str) -> None:
    """As by the store itself: with the callers' names, and nothing below hears of it."""
    layer: Any = LAYERS[name](MemoryStore())
    authority = layer.capability(Authority)
    tier, below = built(name, CacheTier)[1:]
    for call in (
        lambda: authority.erase("not an id"),
        lambda: authority.debts("not an id"),
        lambda: authority.read("not an id"),
        lambda: authority.write(StateSnapshot("u-1", confidence=7.0)),
        lambda: authority.write_many([state(), StateSnapshot("u-1", confidence=7.0)]),
        lambda: layer.get_history("u-1", -1),
        lambda: tier.read("not an id"),
    ):
        with pytest.raises(ValidationError):
            await call()
    assert below.asked == []
    assert await layer.get_latest("u-1") is None


@pytest.mark.parametrize("name", LAYERS)
async def test_a_repeated_attempt_is_stored_once(name: str) -> None:
    """The write keeps its identity below, and gives the same record."""
    inner = Faults(MemoryStore())
    inner.fail(fault="error_after", operations=["upsert_latest"])
    stack = Retry(LAYERS[name](inner), base_delay=0.0)
    await stack.upsert_latest(state())
    assert inner.injected == {("upsert_latest", "error_after"): 1}
    assert len(await stack.get_history("u-1", 9)) == 1


def test_what_else_a_store_can_do_is_not_offered() -> None:
    """Past a layer that changes ids, a method that takes one would mean another user."""

    class Peeking:
        """An ability of somebody else's store."""

    class Able(MemoryStore, Peeking):
        pass

    layer: Any = Prefixed(Able(), prefix="a")
    assert layer.inner.capability(Peeking) is not None
    assert layer.capability(Peeking) is None
    assert layer.capability(Prefixed) is layer
    assert layer.capability(Enumerable) is not None
    assert Prefixed(Cached(MemoryStore()), prefix="a").capability(Enumerable) is not None


def test_digests_below_differ_by_what_they_are_made_of() -> None:
    """Of two layers only those are equal that give every user the same key."""

    def digest(inner: bytes, tag: bytes) -> str:
        return DigestBelow(digest_function(inner), str, tag).fingerprint

    assert digest(b"one", b"a") == digest(b"one", b"a")
    assert len({digest(b"one", b"a"), digest(b"two", b"a"), digest(b"one", b"b")}) == 3
