"""Encrypted: what the backend sees, what is refused, keys, user ids, the cache tier's protocol."""

from __future__ import annotations

import base64
import builtins
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace as altered

from layered_store import (
    Cached,
    Compressed,
    ConfigError,
    CorruptDataError,
    Encrypted,
    MemoryStore,
    StateSnapshot,
    UnavailableError,
    UnsupportedError,
    WriteThrough,
    describe,
    find,
    load_stack,
    replace,
    to_config,
)
from layered_store.codec import SnapshotCodec
from layered_store.coherence.contract import Authority, CacheTier, Invalidations
from layered_store.enumerable import enumerable_of
from layered_store.layers.encrypted import _bound
from layered_store.sealed import SealedSnapshot
from layered_store.testing import check_store
from layered_store.testing.clock import FakeClock

KEY, OTHER = (bytes([n]) * 32 for n in (1, 2))
MARK = "warmth_of_the_marked_axis"


class Mood(StateSnapshot):
    mood: str = ""


def state(user_id: str = "user-1", value: float = 0.7, at: int = 5) -> StateSnapshot:
    return StateSnapshot(user_id, updated_at_unix_ms=at, confidence=0.25, axes={MARK: value})


def samples(layer: Any) -> dict[str, float]:
    return {sample.metric: sample.value for sample in layer.samples()}


async def kept(store: MemoryStore, user_id: str = "user-1") -> SealedSnapshot:
    found = await store.get_latest(user_id)
    assert isinstance(found, SealedSnapshot)
    return found


async def tampered(store: MemoryStore, sealed: SealedSnapshot) -> None:
    """Put a record below, as whoever holds the backend could."""
    await store.upsert_latest(sealed)


# A store like any other


@pytest.mark.parametrize(
    "options",
    [
        {"keys": [KEY]},
        {"keys": [OTHER, KEY]},
        {"keys": [KEY], "hash_user_ids": True},
        {"keys": [OTHER, KEY], "hash_user_ids": True, "id_key": KEY},
        {"keys": [KEY], "accept_plain": True},
    ],
)
async def test_it_is_a_store_like_any_other(options: dict[str, Any]) -> None:
    """Every rule of the interface, versions and listing included, holds around a store."""
    report = await check_store(lambda: Encrypted(MemoryStore(), **options))
    assert report.ok, str(report)
    assert "versions" in str(report)
    assert "listing" in str(report)


async def test_subclasses_keep_all_their_fields() -> None:
    """The class is that of the store below."""
    store = Encrypted(MemoryStore(snapshot_type=Mood), keys=[KEY])
    mood = Mood("user-1", mood="calm")
    await store.upsert_latest(mood)
    assert await store.get_latest("user-1") == mood
    assert await store.get_history("user-1", 1) == [mood]


# The format

WRITTEN = {
    "user-1": (
        "02c2d0b4ac874aa14d2c7a717d143ada9374a5c21dcdb9e3328bf305e44ec66bf2d9b4c58411cbfe850cc9e735"
        "c1c35cca0d0718d8b6ecc48d95d11ca544083b3b42799aca3831629ac49953e4c4b4a01cea1459614d42e421c8"
        "e1bba0b19949ce51be3dc44d51342fa095ba2d3459d3ef0907313a75b95cf126d30880d3e28110a36e29436565"
        "1028a5c68479e9"
    ),
    "eba9b35d3b8b1950851a360e9c3e4c4e": (
        "02c2d0b4ac2e171edd38603d803f8b45fb99178da71bd216fb824571ca3b7a19e89919724089c8fb014777924e"
        "0cc88a123ec09d3f068c2982873f61d064bd75baa82644135ab04465617c4a1fde4649db185ca1f05a399ae943"
        "916f1812d622403813a2e38d6d79f0c7a093c0620453cb736fab1f5d5acc122743a51a9d84c205a9cd5440e308"
        "f589195e234635"
    ),
}
"""Records of one user under ``KEY`` as release 0.1.0 wrote them, by the id below."""


@pytest.mark.parametrize(("below", "sealed"), WRITTEN.items())
async def test_what_the_first_release_wrote_can_be_read(below: str, sealed: str) -> None:
    """Keys, nonces, user ids and what is authenticated are derived the same way for ever."""
    inner = MemoryStore()
    await tampered(inner, SealedSnapshot(below, 5, sealed=bytes.fromhex(sealed)))
    store = Encrypted(inner, keys=[KEY], hash_user_ids=below != "user-1")
    assert await store.get_latest("user-1") == StateSnapshot(
        "user-1", updated_at_unix_ms=5, confidence=0.25, axes={"warmth": 0.7}
    )


# What the backend sees


async def test_the_backend_sees_no_value() -> None:
    """Axes, their names, source and confidence are in nothing that the store below is given."""
    inner = MemoryStore()
    store = Encrypted(inner, keys=[KEY])
    await store.upsert_latest(state())
    sealed = await kept(inner)
    stored = SnapshotCodec(StateSnapshot).encode(sealed)
    assert MARK.encode() not in stored
    assert sealed.confidence == 1.0
    assert (sealed.user_id, sealed.updated_at_unix_ms) == ("user-1", 5)
    assert [type(each) for each in await inner.get_history("user-1", 9)] == [SealedSnapshot]


async def test_who_reads_past_the_layer_gets_an_error_and_no_empty_state() -> None:
    """A sealed state has no axes to mistake for a neutral state, and no JSON without its bytes."""
    inner = MemoryStore()
    await Encrypted(inner, keys=[KEY]).upsert_latest(state())
    sealed = await kept(inner)
    for look in (
        lambda: sealed.axes,
        lambda: sealed.get_axis(MARK),
        lambda: sealed.get_axis_opt(MARK),
        sealed.to_json,
    ):
        with pytest.raises(UnsupportedError, match="sealed"):
            look()
    assert "sealed=<" in repr(sealed)
    assert "user-1" not in repr(sealed)


async def test_equal_states_look_different() -> None:
    """Two writes of one state give two ciphertexts of the same length."""
    inner = MemoryStore()
    store = Encrypted(inner, keys=[KEY])
    for user_id in ("user-1", "user-1", "user-2"):
        await store.upsert_latest(state(user_id))
    texts = [each.sealed for each in await inner.get_history("user-1", 9)]  # type: ignore[attr-defined]
    texts.append((await kept(inner, "user-2")).sealed)
    assert len(set(texts)) == 3
    assert len({text[5:29] for text in texts}) == 3
    assert len({len(text) for text in texts}) == 1


# What is refused


async def refused(store: Encrypted, user_id: str = "user-1") -> CorruptDataError:
    with pytest.raises(CorruptDataError) as caught:
        await store.get_latest(user_id)
    with pytest.raises(CorruptDataError):
        await store.get_history(user_id, 1)
    assert await store.get_latest_many([user_id]) == {}
    assert caught.value.operation == "get_latest"
    assert caught.value.user_id == user_id
    assert user_id not in str(caught.value)
    return caught.value


async def test_every_changed_bit_is_noticed() -> None:
    """No byte of a record can be changed: form, key, nonce, text, tag; nor cut off or added to."""
    inner = MemoryStore(history_limit=1)
    store = Encrypted(inner, keys=[KEY])
    await store.upsert_latest(state())
    good = await kept(inner)
    for place in range(len(good.sealed)):
        bad = bytearray(good.sealed)
        bad[place] ^= 1
        await tampered(inner, altered(good, sealed=bytes(bad)))
        with pytest.raises(CorruptDataError):
            await store.get_latest("user-1")
    for bad in (good.sealed[:-1], good.sealed[:20], good.sealed[:1], good.sealed + b"x"):
        await tampered(inner, altered(good, sealed=bytes(bad)))
        await refused(store)
    await tampered(inner, altered(good, updated_at_unix_ms=6))
    await refused(store)
    await tampered(inner, good)
    assert await store.get_latest("user-1") == state()


@pytest.mark.parametrize("hashed", [False, True])
async def test_a_record_copied_to_another_user_is_refused(hashed: bool) -> None:
    """The user is part of what is authenticated, also where the id below is a hash."""
    inner = MemoryStore()
    store = Encrypted(inner, keys=[KEY], hash_user_ids=hashed)
    await store.upsert_latest(state("user-1"))
    await store.upsert_latest(state("user-2"))
    ids = (await inner.users("", 9)).user_ids
    mine, theirs = (store.id_below(user_id) for user_id in ("user-1", "user-2"))
    assert set(ids) == {mine, theirs}
    await tampered(inner, altered(await kept(inner, theirs), user_id=mine))
    error = await refused(store)
    assert "copied" in str(error)


async def test_a_plain_record_is_refused_unless_plain_ones_are_accepted() -> None:
    """Whoever can write to the backend cannot put a state there, until one says so."""
    inner = MemoryStore()
    await inner.upsert_latest(state())
    error = await refused(Encrypted(inner, keys=[KEY]))
    assert "accept_plain" in str(error)
    moving = Encrypted(inner, keys=[KEY], accept_plain=True)
    assert await moving.get_latest("user-1") == state()
    await moving.upsert_latest(state(value=0.1))
    assert isinstance(await inner.get_latest("user-1"), SealedSnapshot)
    assert [s.get_axis(MARK) for s in await moving.get_history("user-1", 9)] == [0.1, 0.7]
    # Still nobody else's record, and nothing of another layer's that was not encrypted.
    await inner.upsert_latest(SealedSnapshot("user-1", 5, sealed=b"\x07???"))
    found = await moving.get_latest("user-1")
    assert isinstance(found, SealedSnapshot)
    with pytest.raises(CorruptDataError):
        moving.up(state("user-2"), "user-1")


async def test_a_record_that_says_it_is_another_users_is_refused() -> None:
    """Also one that was encrypted with the key for this place, as only a mistake here could."""
    for hashed in (False, True):
        store = Encrypted(MemoryStore(), keys=[KEY], hash_user_ids=hashed)
        below = store.id_below("user-1")
        plain = SnapshotCodec(StateSnapshot).encode(state("user-2"))
        sealed = store._writes_with.encrypt(store._aead, b"w", plain, _bound(below, 5))
        record = SealedSnapshot(below, 5, sealed=sealed)
        with pytest.raises(CorruptDataError, match="another user") as caught:
            store.up(record, "user-1")
        assert (caught.value.layer, caught.value.user_id) == ("Encrypted", "user-1")
        if hashed:
            with pytest.raises(CorruptDataError, match="another user"):
                store.id_above(below, record)
            with pytest.raises(CorruptDataError, match="not encrypted"):
                store.id_above(below, state(below))
            assert store.id_above(below, None) is None  # erased since it was listed


@given(st.binary(max_size=80), st.sampled_from([b"", b"\x01", b"\x02"]), st.booleans())
async def test_whatever_stands_there_is_refused_and_nothing_else(
    junk: bytes, form: bytes, known: bool
) -> None:
    """Bytes of any kind, also behind the id of a key that is known: CorruptDataError."""
    store = Encrypted(Compressed(MemoryStore()), keys=[KEY])
    sealed = form + (store._writes_with.id if known else b"") + junk
    with pytest.raises(CorruptDataError):
        store.up(SealedSnapshot("user-1", 5, sealed=sealed), "user-1")
    with pytest.raises(CorruptDataError):
        Encrypted(MemoryStore(), keys=[KEY], hash_user_ids=True).id_above(
            "0" * 32, SealedSnapshot("0" * 32, 5, sealed=sealed)
        )


async def test_refused_records_are_counted() -> None:
    """The metric counts each record that could not be read."""
    inner = MemoryStore()
    await inner.upsert_latest(state())
    store = Encrypted(inner, keys=[KEY])
    await refused(store)
    assert samples(store)["corrupt_records"] == 3


async def test_a_deleted_user_is_gone_whatever_could_be_read() -> None:
    """Erasing needs no key that fits."""
    inner = MemoryStore()
    await Encrypted(inner, keys=[KEY]).upsert_latest(state())
    store = Encrypted(inner, keys=[OTHER])
    await refused(store)
    await store.delete("user-1")
    assert await store.get_latest("user-1") is None
    assert await inner.get_history("user-1", 9) == []


# Keys


async def test_the_first_key_writes_and_all_read() -> None:
    """Rotation: old records stay readable, new ones need the new key, reads by an old one count."""
    inner = MemoryStore()
    await Encrypted(inner, keys=[KEY]).upsert_latest(state(value=0.1))
    both = Encrypted(inner, keys=[OTHER, KEY])
    assert await both.get_latest("user-1") == state(value=0.1)
    assert samples(both)["old_key_reads"] == 1
    await both.upsert_latest(state(value=0.2))
    assert len(await both.get_history("user-1", 9)) == 2
    assert samples(both)["old_key_reads"] == 2
    new = Encrypted(inner, keys=[OTHER])
    assert await new.get_latest("user-1") == state(value=0.2)
    assert samples(new)["old_key_reads"] == 0
    with pytest.raises(CorruptDataError, match="not among keys"):
        await new.get_history("user-1", 9)
    await refused(Encrypted(inner, keys=[KEY]))


@pytest.mark.parametrize(
    "keys",
    [
        base64.b64encode(KEY).decode(),
        [],
        [b"short"],
        ["not base64!"],
        [base64.b64encode(bytes(31)).decode()],
        [base64.b64encode(bytes(33)).decode()],
        [KEY, KEY],
        [KEY, base64.b64encode(KEY).decode()],
        [None],
        [5],
        [bytearray(32)],
        None,
        {KEY},
    ],
)
def test_bad_keys_are_refused_without_showing_them(keys: Any) -> None:
    """The error names the option and the remedy, and no part of a key."""
    with pytest.raises(ConfigError) as caught:
        Encrypted(MemoryStore(), keys=keys)
    assert caught.value.option == "keys"
    text = str(caught.value) + repr(caught.value)
    for key in (KEY, b"short", b"not base64"):
        assert repr(key)[2:-1] not in text
        assert base64.b64encode(key).decode()[:8] not in text


@pytest.mark.parametrize("keys", [KEY, base64.b64encode(KEY).decode(), None, {KEY}])
def test_one_key_instead_of_a_list_is_told_as_such(keys: Any) -> None:
    """Not as a bad key: each byte or character of it would be one."""
    with pytest.raises(ConfigError, match="must be a list of keys") as caught:
        Encrypted(MemoryStore(), keys=keys)
    assert caught.value.layer == "Encrypted"


def test_keys_that_cannot_be_told_apart_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records name their key by four bytes of a hash; with one byte, two of 257 must be equal."""
    monkeypatch.setattr("layered_store.layers.encrypted._ID_BYTES", 1)
    keys = [n.to_bytes(32, "big") for n in range(257)]
    with pytest.raises(ConfigError, match="told apart") as caught:
        Encrypted(MemoryStore(), keys=keys)
    assert caught.value.option == "keys"


def test_keys_come_in_both_alphabets_of_base64() -> None:
    """Standard and URL-safe text name the same key, and new_key makes one."""
    raw = bytes(range(224, 256))
    texts = {base64.b64encode(raw).decode(), base64.urlsafe_b64encode(raw).decode()}
    assert len(texts) == 2
    for text in texts:
        with pytest.raises(ConfigError, match="twice"):
            Encrypted(MemoryStore(), keys=[raw, text])
    made = {Encrypted.new_key() for _ in range(9)}
    assert len(made) == 9
    Encrypted(MemoryStore(), keys=sorted(made))


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"hash_user_ids": 1}, "hash_user_ids"),
        ({"accept_plain": "yes"}, "accept_plain"),
        ({"id_key": KEY}, "id_key"),
        ({"hash_user_ids": True, "id_key": b"x"}, "id_key"),
        ({"hash_user_ids": True, "accept_plain": True}, "accept_plain"),
        ({"hash_user_ids": True, "keys": [KEY, OTHER]}, "id_key"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], option: str) -> None:
    """Each error names its option."""
    with pytest.raises(ConfigError) as caught:
        Encrypted(MemoryStore(), **{"keys": [KEY], **options})
    assert caught.value.option == option


def test_without_the_package_the_error_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The extra is named."""
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("cryptography"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"layered-store\[crypto\]"):
        Encrypted(MemoryStore(), keys=[KEY])


# User ids


async def test_hashed_user_ids_hide_who_is_there() -> None:
    """Below, an id is a keyed hash; above, everything has the caller's id."""
    inner = MemoryStore()
    store = Encrypted(inner, keys=[KEY], hash_user_ids=True)
    await store.upsert_latest_many([state("anna"), state("bert")])
    below = (await inner.users("", 9)).user_ids
    assert len(below) == 2
    assert all(len(each) == 32 and int(each, 16) for each in below)
    assert await store.get_latest_many(["anna", "bert", "carl"]) == {
        "anna": state("anna"),
        "bert": state("bert"),
    }
    assert await store.get_history("anna", 9) == [state("anna")]
    other = Encrypted(inner, keys=[OTHER, KEY], hash_user_ids=True, id_key=OTHER)
    assert await other.get_latest("anna") is None
    await store.delete("anna")
    assert await store.get_latest("anna") is None
    assert (await inner.users("", 9)).user_ids == [store.id_below("bert")]


async def test_hashed_users_are_listed_by_their_own_ids() -> None:
    """The listing decrypts, page by page, and forgets nobody silently."""
    inner = MemoryStore()
    store = Encrypted(inner, keys=[KEY], hash_user_ids=True)
    await store.upsert_latest_many([state(f"user-{n}") for n in range(5)])
    listing = enumerable_of(Cached(store))
    assert listing is not None
    found: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        page = await listing.users(cursor, 2)
        found += page.user_ids
        cursor = page.cursor
    assert sorted(found) == [f"user-{n}" for n in range(5)]
    await tampered(inner, altered(await kept(inner, store.id_below("user-3")), sealed=b"\x02bad"))
    with pytest.raises(CorruptDataError):
        await listing.users("", 9)
    await inner.upsert_latest(state("plain"))
    with pytest.raises(CorruptDataError):
        await listing.users("", 9)


async def test_ids_stay_findable_when_keys_rotate() -> None:
    """With id_key the first key, users written before the rotation are found and erased after."""
    inner = MemoryStore()
    await Encrypted(inner, keys=[KEY], hash_user_ids=True).upsert_latest(state())
    store = Encrypted(inner, keys=[OTHER, KEY], hash_user_ids=True, id_key=KEY)
    assert await store.get_latest("user-1") == state()
    await store.upsert_latest(state(value=0.1))
    last = Encrypted(inner, keys=[OTHER], hash_user_ids=True, id_key=KEY)
    assert await last.get_latest("user-1") == state(value=0.1)
    await last.delete("user-1")
    assert await store.get_latest("user-1") is None


async def test_errors_from_below_carry_the_callers_id() -> None:
    """What the error is about is the id that the caller knows; of a stranger it tells none."""

    class Down(MemoryStore):
        async def get_latest(self, user_id: str) -> StateSnapshot | None:
            raise UnavailableError("down", user_id=user_id)

        async def get_latest_many(self, user_ids: Any) -> dict[str, StateSnapshot]:
            raise UnavailableError("down", user_id=list(user_ids)[1])

        async def upsert_latest_many(self, snapshots: Any) -> None:
            raise UnavailableError("down", user_id="a-stranger")

    store = Encrypted(Down(), keys=[KEY], hash_user_ids=True)
    with pytest.raises(UnavailableError) as caught:
        await store.get_latest("anna")
    assert caught.value.user_id == "anna"
    with pytest.raises(UnavailableError) as caught:
        await store.get_latest_many(["anna", "bert"])
    assert caught.value.user_id == "bert"
    with pytest.raises(UnavailableError) as caught:
        await store.upsert_latest_many([state("anna")])
    assert caught.value.user_id is None


# In a stack


def test_keys_are_shown_nowhere() -> None:
    """repr, describe and to_config hide them; loading a masked config says what is missing."""
    texts = [base64.b64encode(key).decode() for key in (KEY, OTHER)]
    stack = Encrypted(MemoryStore(), keys=texts, hash_user_ids=True, id_key=texts[1])
    config = to_config(stack)
    shown = repr(stack) + str(describe(stack)) + repr(describe(stack)) + json.dumps(config)
    shown += repr(vars(stack)["_keys"])
    for text in texts:
        assert text not in shown
    for key in (KEY, OTHER):
        assert repr(key)[2:-1] not in shown
    assert config["store"]["layers"][0] == {
        "use": "encrypted",
        "keys": "***",
        "hash_user_ids": True,
        "id_key": "***",
    }
    with pytest.raises(ConfigError, match="keys.*mask"):
        load_stack(config)


async def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A config file names variables; the options are those of the class."""
    monkeypatch.setenv("STATE_KEY", base64.b64encode(KEY).decode())
    monkeypatch.setenv("OLD_STATE_KEY", base64.b64encode(OTHER).decode())
    layer = {"use": "encrypted", "keys": ["${STATE_KEY}", "${OLD_STATE_KEY}"]}
    stack = load_stack({"store": {"use": "memory", "layers": [layer]}})
    inner = find(stack, MemoryStore)[0]
    await Encrypted(inner, keys=[OTHER]).upsert_latest(state())
    assert await stack.get_latest("user-1") == state()
    with pytest.raises(ConfigError, match=r"keys") as caught:
        load_stack({"store": {"use": "memory", "layers": [{**layer, "keys": ["${STATE_KEY}x"]}]}})
    assert base64.b64encode(KEY).decode() not in str(caught.value)


async def test_replace_keeps_keys_and_options() -> None:
    """A test swaps the backend; what is encrypted below stays so."""
    stack = Cached(Encrypted(MemoryStore(), keys=[KEY], hash_user_ids=True))
    new = MemoryStore()
    swapped = replace(stack, MemoryStore, new)
    await swapped.upsert_latest(state())
    assert await swapped.get_latest("user-1") == state()
    found = await new.get_latest(find(stack, Encrypted)[0].id_below("user-1"))
    assert isinstance(found, SealedSnapshot)


async def test_compression_goes_outside() -> None:
    """Compressed around Encrypted: what reaches the backend is small and unreadable."""
    big = {f"axis_{n}": 0.5 for n in range(200)}
    snapshot = StateSnapshot("user-1", axes=big)
    plain, both = MemoryStore(), MemoryStore()
    await Encrypted(plain, keys=[KEY]).upsert_latest(snapshot)
    stack = Compressed(Encrypted(both, keys=[KEY]))
    await stack.upsert_latest(snapshot)
    assert await stack.get_latest("user-1") == snapshot
    assert len((await kept(both)).sealed) < len((await kept(plain)).sealed) / 3


def test_it_offers_what_the_store_below_offers() -> None:
    """Versions and listing pass; what is not there is not made up."""
    store = Encrypted(MemoryStore(), keys=[KEY])
    assert store.capability(Authority) is not None
    assert store.capability(CacheTier) is None
    assert store.capability(Invalidations) is None
    assert store.capability(Encrypted) is store


def test_every_method_that_speaks_of_users_is_translated() -> None:
    """A method of a capability that takes a user or a snapshot must not be handed on as it is."""
    import inspect

    from layered_store.layers import translating

    for kind, view in translating._VIEWS.items():
        for name in kind.__abstractmethods__:  # type: ignore[attr-defined]
            member = inspect.getattr_static(kind, name)
            if isinstance(member, property):
                result = str(inspect.signature(member.fget).return_annotation)
                own = isinstance(inspect.getattr_static(view, name), property) and (
                    inspect.getattr_static(view, name).fget.__module__ == translating.__name__
                    and inspect.getattr_static(view, name).fget.__name__ == name
                )
                assert own or "[str" not in result, f"{kind.__name__}.{name}"
                continue
            speaks = {"user_id", "user_ids", "snapshot", "snapshots", "record"} & set(
                inspect.signature(member).parameters
            )
            own = getattr(view, name).__module__ == translating.__name__
            assert own or not speaks, f"{kind.__name__}.{name}"


async def test_hashed_tiers_agree_only_when_built_alike() -> None:
    """WriteThrough compares what keys the rows: a tier hashed with another key is refused."""
    authority = Encrypted(MemoryStore(), keys=[KEY], hash_user_ids=True).capability(Authority)
    alike = Encrypted(MemoryStore(), keys=[KEY], hash_user_ids=True).capability(Authority)
    other = Encrypted(MemoryStore(), keys=[OTHER], hash_user_ids=True).capability(Authority)
    plain = Encrypted(MemoryStore(), keys=[KEY]).capability(Authority)
    assert authority is not None
    assert alike is not None
    assert other is not None
    assert plain is not None
    assert authority.digest.fingerprint == alike.digest.fingerprint
    assert authority.digest("anna") == alike.digest("anna")
    assert authority.digest.fingerprint != other.digest.fingerprint
    assert authority.digest.fingerprint != plain.digest.fingerprint
    assert plain.digest.fingerprint == MemoryStore.digest.fingerprint


async def test_the_record_of_a_write_is_the_callers_snapshot() -> None:
    """The authority gives back what was written, in single writes and batches, and what won."""
    clock = FakeClock()
    store = Encrypted(MemoryStore(clock=clock), keys=[KEY])
    authority = store.capability(Authority)
    assert authority is not None
    written = state()
    assert (await authority.write(written)).snapshot is written
    batch = [state("user-1", 0.1), state("user-2", 0.2), state("user-1", 0.3)]
    records = await authority.write_many(batch)
    assert records["user-1"].snapshot is batch[2]
    assert records["user-2"].snapshot is batch[1]
    assert (await authority.read("user-1")).snapshot == batch[2]
    assert (await authority.read_many(["user-1", "nobody"]))["nobody"].version == 0
    version = await authority.erase("user-1", ("tier",))
    assert (await authority.read("user-1")).version == version
    assert await authority.debts("user-1") == ["tier"]


async def test_a_damaged_copy_in_a_tier_costs_one_read_of_the_origin() -> None:
    """Around each side of WriteThrough, a copy that was tampered with is a miss."""
    tier, origin = MemoryStore(), MemoryStore()
    stack = WriteThrough(Encrypted(tier, keys=[KEY]), origin=Encrypted(origin, keys=[OTHER]))
    await stack.upsert_latest(state())
    await tampered(tier, altered(await kept(tier), sealed=b"\x02" + bytes(60)))
    assert await stack.get_latest("user-1") == state()
