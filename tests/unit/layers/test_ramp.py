"""Ramp: who goes which way, and that no change of the share shows anybody an older state."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from layered_store import (
    Cached,
    ClosedError,
    Compressed,
    ConfigError,
    ErasureIncompleteError,
    HealthReport,
    HealthStatus,
    MemoryStore,
    Prefixed,
    Ramp,
    RejectedError,
    Retry,
    Shadow,
    StateSnapshot,
    StoreError,
    StoreTimeoutError,
    Timeout,
    UnavailableError,
    UnsupportedError,
    ValidationError,
    describe,
    load_stack,
    replace,
    to_config,
)
from layered_store.call import call_begins, current_call
from layered_store.coherence.contract import Authority, CacheTier, Invalidations
from layered_store.enumerable import Enumerable
from layered_store.layer import Layer
from layered_store.ramping import to_alternative as module
from layered_store.sharing import belongs, place_of
from layered_store.testing import check_layer, check_store
from layered_store.testing.clock import FakeClock, settle
from layered_store.testing.explore import LoopClock, explore
from layered_store.testing.recorded import Recorded

RETRY = {"use": "retry"}
USERS = [f"u-{n}" for n in range(200)]
LOW = min(USERS, key=place_of)
"""A user in every share that is not tiny."""
HIGH = max(USERS, key=place_of)
"""A user in almost no share but the whole."""
BEST = {"use": "cached", "ttl": 60.0}


class Mood(StateSnapshot):
    mood: str = ""


class CountsAsFalse(StateSnapshot):
    def __bool__(self) -> bool:
        return False


class Down(MemoryStore):
    """Fails as told."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.error: Exception | None = None
        self.after = False
        self.gate: asyncio.Event | None = None
        self.reads = 0

    async def _enter(self) -> None:
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None and not self.after:
            raise self.error

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        self.reads += 1
        await self._enter()
        return await super().get_latest(user_id)

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        await self._enter()
        await super().upsert_latest(snapshot)
        if self.error is not None:
            raise self.error

    async def upsert_latest_many(self, snapshots: Any) -> None:
        await self._enter()
        await super().upsert_latest_many(snapshots)

    async def delete(self, user_id: str) -> None:
        await self._enter()
        await super().delete(user_id)

    async def health_check(self) -> bool:
        return self.error is None

    async def open(self) -> None:
        if self.error is not None:
            raise self.error


def state(user_id: str = LOW, value: float = 0.5) -> StateSnapshot:
    return StateSnapshot(user_id, updated_at_unix_ms=5, axes={"a": value})


def samples(layer: Any) -> dict[tuple[str, tuple[str, ...]], float]:
    return {(sample.metric, sample.labels): sample.value for sample in layer.samples()}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
async def test_it_is_a_store_and_a_layer_like_any_other(share: float) -> None:
    """Every rule of stores and every law of layers holds, both ways, at every share."""
    for layer in (BEST, None):
        report = await check_store(
            lambda: Ramp(
                MemoryStore(),
                layer=layer,  # noqa: B023
                alternative=None if layer else MemoryStore(),  # noqa: B023
                share=share,
            )
        )
        assert report.ok, str(report)
        laws = await check_layer(
            lambda inner: Ramp(
                inner,
                layer=layer,  # noqa: B023
                alternative=None if layer else MemoryStore(snapshot_type=inner.snapshot_type),  # noqa: B023
                share=share,
            )
        )
        assert laws.ok, str(laws)


# The share


async def test_a_larger_share_holds_the_users_of_a_smaller_one() -> None:
    """Nobody leaves while it grows, and the same users come back when it shrinks."""
    ramp = Ramp(MemoryStore(), layer=BEST)
    taken = {}
    for share in (0.0, 0.1, 0.4, 1.0, 0.4):
        ramp.share = share
        found = {user_id for user_id in USERS if ramp.takes(user_id)}
        assert abs(len(found) / len(USERS) - share) < 0.1
        assert taken.setdefault(share, found) == found
    assert taken[0.0] == set()
    assert taken[0.1] < taken[0.4] < taken[1.0] == set(USERS)
    other = Ramp(MemoryStore(), layer=BEST, share=0.4, salt="other")
    assert {user_id for user_id in USERS if other.takes(user_id)} != taken[0.4]


def test_places_are_the_same_for_ever() -> None:
    """Every process and every release sends a user the same way."""
    assert round(place_of("u-1"), 6) == PLACES["u-1"]
    assert round(place_of("ünal", "salt"), 6) == PLACES["ünal"]
    assert all(0.0 <= place_of(user_id) < 1.0 for user_id in USERS)
    for share in (0.0, 5e-324, 0.5, 1.0 - 2**-53, 1.0):
        of = [user_id for user_id in USERS if belongs(user_id, share)]
        assert of == [user_id for user_id in USERS if place_of(user_id) < share]


PLACES = {"u-1": 0.493796, "ünal": 0.14815}


@pytest.mark.parametrize("share", [-0.1, 1.1, "half", None, True])
def test_a_share_out_of_range_is_refused_also_later(share: Any) -> None:
    """And the one before stays."""
    with pytest.raises(ConfigError) as caught:
        Ramp(MemoryStore(), layer=BEST, share=share)
    assert caught.value.option == "share"
    ramp = Ramp(MemoryStore(), layer=BEST, share=0.25)
    with pytest.raises(ConfigError):
        ramp.share = share
    assert ramp.share == 0.25


# A layer around the same store


async def test_only_the_share_goes_through_the_layer() -> None:
    """The others pay nothing for it and get nothing of it."""
    inner = Down()
    await inner.upsert_latest_many([state(LOW), state(HIGH)])
    ramp = Ramp(inner, layer=BEST, share=0.5)
    for _ in range(3):
        await ramp.get_latest(LOW)
        await ramp.get_latest(HIGH)
    assert inner.reads == 1 + 3
    assert samples(ramp)["ramp_reads", ("other",)] == 3
    assert samples(ramp)["ramp_reads", ("inner",)] == 3
    assert samples(ramp)["ramp_share", ()] == 0.5
    assert samples(ramp)["reads", ("hit",)] == 2
    assert await ramp.get_latest_many([LOW, HIGH, "nobody"]) == {
        LOW: state(LOW),
        HIGH: state(HIGH),
    }


async def test_the_layer_hears_of_writes_after_its_users_left() -> None:
    """A cache in the layer still holds them: their writes pass it, until they come back."""
    ramp = Ramp(MemoryStore(), layer=BEST, share=1.0)
    await ramp.upsert_latest(state(value=0.1))
    assert await ramp.get_latest(LOW) == state(value=0.1)
    ramp.share = 0.0
    await ramp.upsert_latest(state(value=0.2))
    assert await ramp.get_latest(LOW) == state(value=0.2)
    ramp.share = 1.0
    assert await ramp.get_latest(LOW) == state(value=0.2)
    ramp.share = 0.0
    await ramp.delete(LOW)
    ramp.share = 1.0
    assert await ramp.get_latest(LOW) is None
    ramp.share = 0.0
    await ramp.upsert_latest_many([state(value=0.3), state(HIGH, 0.4)])
    ramp.share = 1.0
    assert await ramp.get_latest(LOW) == state(value=0.3)


async def test_a_write_that_passed_the_layer_by_is_not_missed_by_it() -> None:
    """While it is under way the user is read past the layer too, also when the share grows."""
    inner = Down()
    await inner.upsert_latest(state(value=0.1))
    ramp = Ramp(inner, layer=BEST, share=0.0)
    inner.gate = asyncio.Event()
    write = asyncio.create_task(ramp.upsert_latest(state(value=0.2)))
    await settle()
    ramp.share = 1.0
    inner.gate.set()
    read = await ramp.get_latest(LOW)
    await write
    assert read in (state(value=0.1), state(value=0.2))
    assert await ramp.get_latest(LOW) == state(value=0.2)
    assert ramp._ways.direct == {}


async def test_a_write_that_overlaps_one_that_passed_the_layer_by_passes_it_too() -> None:
    """The layer would keep what lost against the other, and show it when the share comes back."""
    inner = Down()
    ramp = Ramp(inner, layer=BEST, share=0.0)
    inner.gate = first_gate = asyncio.Event()
    first = asyncio.create_task(ramp.upsert_latest(state(value=0.1)))
    await settle()
    ramp.share = 1.0
    inner.gate = None
    await ramp.upsert_latest(state(value=0.2))
    first_gate.set()
    await first
    assert await inner.get_latest(LOW) == state(value=0.1)
    assert await ramp.get_latest(LOW) == state(value=0.1)
    assert await ramp.get_latest_many([LOW]) == {LOW: state(value=0.1)}


async def test_a_write_within_the_doubt_about_another_passes_the_layer_by() -> None:
    """What was cut off may take effect after it, unseen by the layer."""
    clock = FakeClock()
    inner = Down()
    ramp = Ramp(inner, layer=BEST, share=0.0, clock=clock)
    inner.error = UnavailableError("cut off", outcome_unknown=True)
    with pytest.raises(UnavailableError):
        await ramp.upsert_latest(state(value=0.1))
    inner.error = None
    ramp.share = 1.0
    await ramp.upsert_latest(state(value=0.2))
    await inner.upsert_latest(state(value=0.1))  # so late
    await clock.advance(5)
    assert ramp.takes(LOW)
    assert await ramp.get_latest(LOW) == state(value=0.1)


async def test_a_write_of_unknown_outcome_keeps_its_user_off_the_layer_for_a_while() -> None:
    """It may still take effect behind a cache's back: for 5 s nothing is read through it."""
    clock = FakeClock()
    inner = Down()
    ramp = Ramp(inner, layer=BEST, share=0.0, clock=clock)
    inner.error = UnavailableError("cut off", outcome_unknown=True)
    with pytest.raises(UnavailableError):
        await ramp.upsert_latest(state(value=0.2))
    inner.error = None
    ramp.share = 1.0
    assert not ramp.takes(LOW)
    await clock.advance(5)
    assert ramp.takes(LOW)
    inner.error = ValidationError("refused")
    ramp.share = 0.0
    fresh = Ramp(inner, layer=BEST, clock=clock)
    with pytest.raises(ValidationError):
        await fresh.upsert_latest(state(value=0.2))
    fresh.share = 1.0
    assert fresh.takes(LOW)


async def test_a_change_of_the_share_shows_nobody_an_older_state() -> None:
    """Readers, writers and somebody who turns the share, in any order, with a cache in the layer
    and with an alternative: what a reader saw or a writer was told never goes back."""

    async def scenario(*, layered: bool) -> None:
        clock = LoopClock()
        dice = random.Random(7)

        class Slow(MemoryStore):
            async def get_latest(self, user_id: str) -> StateSnapshot | None:
                await asyncio.sleep(0)
                found = await super().get_latest(user_id)
                await asyncio.sleep(0)
                return found

            async def upsert_latest(self, snapshot: StateSnapshot) -> None:
                await asyncio.sleep(0)
                await super().upsert_latest(snapshot)
                await asyncio.sleep(0)

        inner = Slow(clock=clock)
        ramp = (
            Ramp(inner, layer=lambda store: Cached(store, clock=clock), clock=clock)
            if layered
            else Ramp(inner, alternative=Slow(clock=clock), clock=clock)
        )
        told = 0.0

        async def write() -> None:
            nonlocal told
            for number in range(1, 6):
                await ramp.upsert_latest(state(value=number / 10))
                told = number / 10
                await asyncio.sleep(0)

        async def read() -> None:
            latest = 0.0
            for _ in range(8):
                least = max(told, latest)
                found = await ramp.get_latest(LOW)
                value = 0.0 if found is None else found.get_axis("a")
                assert value >= least, f"{value} after {least}"
                latest = value

        async def turn() -> None:
            for _ in range(8):
                ramp.share = dice.choice([0.0, 1.0])
                await asyncio.sleep(0)

        await asyncio.gather(write(), read(), read(), turn())
        assert not (ramp._ways.direct if layered else ramp._ways.turns.users)
        await ramp.aclose()

    for layered in (True, False):
        await asyncio.to_thread(
            explore,
            lambda: scenario(layered=layered),  # noqa: B023
            schedules=150,
            seed=3,
        )


@pytest.mark.parametrize(
    "layer",
    [
        "cached",
        5,
        lambda inner: inner,
        lambda inner: None,
        lambda inner: Cached(MemoryStore()),
    ],
)
def test_what_is_no_layer_around_the_store_is_refused(layer: Any) -> None:
    """The error says what a layer is."""
    with pytest.raises(ConfigError) as caught:
        Ramp(MemoryStore(), layer=layer)
    assert (caught.value.option, caught.value.layer) == ("layer", "Ramp")


@pytest.mark.parametrize(
    "layer",
    [
        {"use": "compressed"},
        {"use": "encrypted", "keys": ["A" * 43 + "="], "accept_plain": True},
        {"use": "ramp", "layer": {"use": "prefixed", "prefix": "p"}},
        lambda inner: Cached(Retry(Compressed(inner))),
    ],
)
def test_a_layer_that_keeps_states_in_another_form_is_refused(layer: Any) -> None:
    """Who leaves the share would be given what it stored: a sealed state, or nothing."""
    with pytest.raises(ConfigError, match=r"layer: must keep states as they are"):
        Ramp(MemoryStore(), layer=layer)


def test_a_layer_may_lead_elsewhere_in_another_form() -> None:
    """Off the way to inner, and below both ways, states may be kept in any."""
    Ramp(
        Compressed(MemoryStore()),
        layer=lambda inner: Shadow(inner, candidate=Prefixed(MemoryStore(), prefix="p")),
    )


def test_a_table_with_a_mistake_says_where() -> None:
    """As in a config file."""
    with pytest.raises(ConfigError, match=r"^layer\.ttll: .*ttl"):
        Ramp(MemoryStore(), layer={"use": "cached", "ttll": 5})
    table: dict[str, Any] = {"use": "memory", "layers": [{"use": "ramp", "layer": {"use": "x"}}]}
    for layer, paths in (
        ({"use": "cachd"}, ["use"]),
        ({"use": "cached", "ttl": "5x"}, ["ttl"]),
        ({"use": "cached", "ttl": -1, "max_entries": 0}, ["ttl", "max_entries"]),
    ):
        table["layers"][0]["layer"] = layer
        with pytest.raises(ConfigError) as caught:
            load_stack(table)
        problems = caught.value.problems or [caught.value]
        assert [each.path for each in problems] == [f"store.layers.0.layer.{p}" for p in paths]


@pytest.mark.parametrize(
    ("layer", "built", "written"),
    [
        (
            {"use": "retry", "attempts": "${NUMBER}"},
            "Retry(MemoryStore(), attempts=5)",
            {"use": "retry", "attempts": 5},
        ),
        (
            {"use": "shadow", "candidate": {"use": "memory"}, "salt": "${TEXT}"},
            "Shadow(MemoryStore(), candidate=MemoryStore(), salt='a${HOME}')",
            {"use": "shadow", "candidate": {"use": "memory"}, "salt": "a$${HOME}"},
        ),
        (
            {"use": "shadow", "candidate": {"use": "memory"}, "salt": "$${HOME}"},
            "Shadow(MemoryStore(), candidate=MemoryStore(), salt='${HOME}')",
            {"use": "shadow", "candidate": {"use": "memory"}, "salt": "$${HOME}"},
        ),
        (
            {
                "use": "${KIND:-fallback}",
                "secondary": {
                    "use": "memory",
                    "history_limit": "${NUMBER}",
                    "layers": [{"use": "retry", "attempts": "${NUMBER}"}],
                },
            },
            "Fallback(MemoryStore(), secondary=Retry(MemoryStore(history_limit=5), attempts=5))",
            {
                "use": "fallback",
                "secondary": {
                    "use": "memory",
                    "history_limit": 5,
                    "layers": [{"use": "retry", "attempts": 5}],
                },
            },
        ),
        (
            {"use": "ramp", "layer": {"use": "ramp", "salt": "${TEXT}", "layer": RETRY}},
            "Ramp(MemoryStore(), layer=<dict>)",
            {"use": "ramp", "layer": {"use": "ramp", "salt": "a$${HOME}", "layer": RETRY}},
        ),
    ],
)
def test_variables_in_a_table_are_filled_in_once(layer: Any, built: str, written: Any) -> None:
    """From where the file's come; what they hold is no variable again."""
    environ = {"NUMBER": "5", "TEXT": "a${HOME}"}
    table = {"use": "memory", "layers": [{"use": "ramp", "layer": layer}]}
    stack = load_stack(table, environ=environ)
    assert [repr(store) for store in stack._layers()][:1] == [built]  # type: ignore[attr-defined]
    config = to_config(stack)
    assert config["store"]["layers"][0]["layer"] == written
    assert to_config(load_stack(config, environ={})) == config


def test_a_missing_variable_in_a_table_is_told_with_its_place() -> None:
    """Also deep in it; a table that contains itself is refused."""
    secondary = {"use": "memory", "history_limit": "${NO}"}
    endless: dict[str, Any] = {"use": "ramp"}
    endless["layer"] = endless
    for layer, path in (
        ({"use": "retry", "attempts": "${NO}"}, "store.layer.attempts"),
        ({"use": "fallback", "secondary": secondary}, "store.layer.secondary.history_limit"),
        (endless, "store.layer"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_stack({"use": "ramp", "inner": {"use": "memory"}, "layer": layer}, environ={})
        assert caught.value.path == path


async def test_closing_closes_the_layer_and_what_is_below() -> None:
    """Once each, and twice is fine; then every operation says so."""
    closed = []

    class Noting(Layer):
        async def aclose(self) -> None:
            closed.append("layer")
            await super().aclose()

    inner = MemoryStore()
    ramp = Ramp(inner, layer=Noting)
    await ramp.open()
    await ramp.aclose()
    assert inner._closed
    assert closed == ["layer"]


async def test_opening_opens_the_way_that_is_used() -> None:
    """What the layer connects to is connected early once there is a share."""
    opened: list[str] = []

    class Opening(Layer):
        async def open(self) -> None:
            opened.append("layer")
            await super().open()

    class Inner(MemoryStore):
        async def open(self) -> None:
            opened.append("inner")

    await Ramp(Inner(), layer=Opening).open()
    assert opened == ["inner"]
    await Ramp(Inner(), layer=Opening, share=0.1).open()
    assert opened == ["inner", "layer", "inner"]


@pytest.mark.filterwarnings("error")
def test_a_table_is_built_without_the_linter() -> None:
    """It judges whole stacks; here it would see the layer and nothing above."""
    Ramp(Timeout(MemoryStore(), seconds=1), layer={"use": "retry"})


async def test_health_with_a_layer_is_that_of_the_way_that_is_used() -> None:
    """One child: the layer once there is a share, else the store."""
    ramp = Ramp(MemoryStore(), layer=lambda inner: Timeout(inner, seconds=1))
    assert [child.name for child in (await ramp.health_report()).children] == ["MemoryStore"]
    ramp.share = 0.1
    assert [child.name for child in (await ramp.health_report()).children] == ["Timeout"]


# An alternative


async def test_both_sides_take_every_write_and_the_share_reads_the_other() -> None:
    """Whatever the share is, so that it can change at any moment."""
    inner, other = Down(), Down()
    ramp = Ramp(inner, alternative=other, share=0.5)
    await ramp.upsert_latest(state(LOW, 0.1))
    await ramp.upsert_latest_many([state(HIGH, 0.2), state(LOW, 0.3)])
    for store in (inner, other):
        assert store._users.keys() == {LOW, HIGH}
        assert [s.get_axis("a") for s in await store.get_history(LOW, 9)] == [0.3, 0.1]
    assert await ramp.get_latest(LOW) == state(LOW, 0.3)
    assert await ramp.get_latest(HIGH) == state(HIGH, 0.2)
    assert (inner.reads, other.reads) == (1, 1)
    assert len(await ramp.get_history(LOW, 9)) == 2
    await ramp.delete(LOW)
    assert await inner.get_latest(LOW) is None
    assert await other.get_latest(LOW) is None


async def test_an_alternative_that_counts_as_false_is_one() -> None:
    """As a store does that tells its length, while it is empty."""

    class Sized(MemoryStore):
        def __len__(self) -> int:
            return 0

    async with Ramp(MemoryStore(), alternative=Sized(), share=1.0) as ramp:
        await ramp.upsert_latest(state())
        assert await ramp.get_latest(LOW) == state()


async def test_who_is_not_at_the_alternative_yet_is_read_from_inner() -> None:
    """States, batches and histories from before the ramp."""
    inner = MemoryStore()
    await inner.upsert_latest_many([state(LOW, 0.1), state(HIGH, 0.2)])
    ramp = Ramp(inner, alternative=MemoryStore(), share=1.0)
    assert await ramp.get_latest(LOW) == state(LOW, 0.1)
    assert await ramp.get_latest_many([HIGH, LOW, "nobody"]) == {
        HIGH: state(HIGH, 0.2),
        LOW: state(LOW, 0.1),
    }
    assert await ramp.get_history(LOW, 9) == [state(LOW, 0.1)]
    assert await ramp.get_history(LOW, 0) == []
    await ramp.upsert_latest(state(LOW, 0.3))
    assert await ramp.get_latest(LOW) == state(LOW, 0.3)
    assert await ramp.get_history(LOW, 9) == [state(LOW, 0.3)]


async def test_outside_the_share_a_broken_alternative_costs_nothing() -> None:
    """The write stands, and the user is read from inner whatever the share, until both have it."""
    inner, other = Down(), Down()
    ramp = Ramp(inner, alternative=other, share=0.0)
    await ramp.upsert_latest(state(value=0.1))
    other.error = UnavailableError("down")
    await ramp.upsert_latest(state(value=0.2))
    other.error = None
    assert ramp.behind == 1
    assert samples(ramp)["ramp_behind", ()] == 1
    ramp.share = 1.0
    assert await ramp.get_latest(LOW) == state(value=0.2)
    assert await ramp.get_latest_many([LOW]) == {LOW: state(value=0.2)}
    await ramp.upsert_latest(state(value=0.3))
    assert ramp.behind == 0
    reads = other.reads
    assert await ramp.get_latest(LOW) == state(value=0.3)
    assert other.reads == reads + 1


async def test_in_the_share_a_write_that_one_side_missed_says_so() -> None:
    """Outcome unknown, retryable as the cause is; and the state of inner is shown from then on."""
    inner, other = Down(), Down()
    ramp = Ramp(inner, alternative=other, share=1.0)
    await ramp.upsert_latest(state(value=0.1))
    for error, retryable in ((UnavailableError("down"), True), (RuntimeError("bug"), False)):
        other.error = error
        with pytest.raises(UnavailableError) as caught:
            await ramp.upsert_latest(state(value=0.2))
        assert caught.value.outcome_unknown
        assert caught.value.retryable is retryable
        assert caught.value.operation == "upsert_latest"
        assert LOW not in str(caught.value)
    other.error = None
    assert await ramp.get_latest(LOW) == state(value=0.2)
    # The way out: everybody back to inner, which has everything.
    ramp.share = 0.0
    other.error = UnavailableError("down")
    await ramp.upsert_latest(state(value=0.3))
    assert await ramp.get_latest(LOW) == state(value=0.3)


async def test_a_retry_finishes_what_one_side_missed() -> None:
    """The repeat is the same write: inner keeps it once, and the alternative gets it."""

    class Once(MemoryStore):
        failed = False

        async def upsert_latest(self, snapshot: StateSnapshot) -> None:
            if not self.failed:
                self.failed = True
                raise UnavailableError("down")
            await super().upsert_latest(snapshot)

    inner, other = MemoryStore(), Once()
    ramp = Ramp(inner, alternative=other, share=1.0)
    await Retry(ramp, base_delay=0.0).upsert_latest(state())
    assert len(await inner.get_history(LOW, 9)) == 1
    assert len(await other.get_history(LOW, 9)) == 1
    assert ramp.behind == 0


async def test_a_write_that_inner_refused_reaches_nobody() -> None:
    """And nobody is behind; one of unknown outcome keeps its user at inner."""
    inner, other = Down(), Down()
    ramp = Ramp(inner, alternative=other, share=1.0)
    inner.error = ValidationError("refused")
    with pytest.raises(ValidationError):
        await ramp.upsert_latest(state())
    assert ramp.behind == 0
    inner.error = UnavailableError("cut off", outcome_unknown=True)
    with pytest.raises(UnavailableError):
        await ramp.upsert_latest(state())
    assert ramp.behind == 1
    assert other._users == {}


async def test_a_write_that_lost_in_inner_is_not_stored_at_the_alternative() -> None:
    """An erasure or a newer state won there; what would win here nobody knows."""

    class Loses(MemoryStore):
        async def upsert_latest(self, snapshot: StateSnapshot) -> None:
            from layered_store.call import current_call

            current_call(self.clock).superseded = True

    other = MemoryStore()
    ramp = Ramp(Loses(), alternative=other, share=1.0)
    await ramp.upsert_latest(state())
    assert other._users == {}
    assert ramp.behind == 1
    assert await ramp.get_latest(LOW) is None


@pytest.mark.parametrize(
    "error",
    [
        UnavailableError("cut off", outcome_unknown=True),
        StoreTimeoutError("no answer"),
        OSError("of a driver"),
    ],
)
async def test_a_write_that_may_still_reach_the_alternative_keeps_its_user_at_inner(
    error: Exception,
) -> None:
    """A later write may be overtaken there: for 5 s none of them makes the alternative answer."""
    clock = FakeClock()
    other = Down()
    ramp = Ramp(MemoryStore(), alternative=other, share=1.0, clock=clock)
    other.error = error
    with pytest.raises(UnavailableError):
        await ramp.upsert_latest(StateSnapshot(LOW, 1))
    other.error = None
    await ramp.upsert_latest(StateSnapshot(LOW, 2))
    assert ramp.behind == 1
    await other.upsert_latest(StateSnapshot(LOW, 1))  # so late
    assert await ramp.get_latest(LOW) == StateSnapshot(LOW, 2)
    await clock.advance(5.1)
    assert await ramp.get_latest(LOW) == StateSnapshot(LOW, 2)
    await ramp.upsert_latest(StateSnapshot(LOW, 3))
    assert ramp.behind == 0
    assert await ramp.get_latest(LOW) == StateSnapshot(LOW, 3)


@pytest.mark.parametrize("side", ["inner", "alternative"])
@pytest.mark.parametrize("way", ["upsert", "delete"])
@pytest.mark.parametrize(
    "error", [StoreTimeoutError("no answer"), OSError("of a driver"), asyncio.CancelledError()]
)
async def test_what_may_still_reach_one_side_leaves_the_user_at_inner(
    side: str, way: str, error: BaseException
) -> None:
    """For 5 s no write is the last on both sides for sure."""
    clock = FakeClock()
    sides = {"inner": Down(), "alternative": Down()}
    ramp = Ramp(sides["inner"], alternative=sides["alternative"], share=1.0, clock=clock)
    sides[side].error = error  # type: ignore[assignment]
    with pytest.raises((StoreError, OSError, asyncio.CancelledError)):
        await (ramp.delete(LOW) if way == "delete" else ramp.upsert_latest(StateSnapshot(LOW, 1)))
    sides[side].error = None
    await ramp.upsert_latest(StateSnapshot(LOW, 2))
    assert ramp.behind == 1
    await sides["inner"].upsert_latest(StateSnapshot(LOW, 1))  # so late
    assert await ramp.get_latest(LOW) == StateSnapshot(LOW, 1)
    await clock.advance(5.1)
    await ramp.upsert_latest(StateSnapshot(LOW, 3))
    assert ramp.behind == 0


async def test_a_write_that_began_in_doubt_leaves_its_user_at_inner_though_it_ends_later() -> None:
    """The one that was not answered may have come in between."""
    clock = FakeClock()
    other = Down()
    ramp = Ramp(MemoryStore(), alternative=other, share=1.0, clock=clock)
    other.error = StoreTimeoutError("no answer")
    with pytest.raises(UnavailableError):
        await ramp.upsert_latest(StateSnapshot(LOW, 1))
    other.error = None
    for call in (lambda: ramp.upsert_latest(StateSnapshot(LOW, 2)), lambda: ramp.delete(LOW)):
        ramp._ways.doubt([LOW])
        await clock.advance(4.0)
        other.gate = asyncio.Event()
        task = asyncio.create_task(call())
        await settle()
        await clock.advance(2.0)
        other.gate.set()
        await task
        assert ramp.behind == 1
    await ramp.upsert_latest(StateSnapshot(LOW, 3))
    assert ramp.behind == 0


async def test_a_cancelled_write_may_still_reach_the_alternative() -> None:
    """Cut off on its way there, it is as one whose outcome is unknown."""
    clock = FakeClock()
    other = Down()
    ramp = Ramp(MemoryStore(), alternative=other, share=1.0, clock=clock)
    other.gate = asyncio.Event()
    first = asyncio.create_task(ramp.upsert_latest(StateSnapshot(LOW, 1)))
    await settle()
    first.cancel()
    await settle()
    other.gate.set()
    await ramp.upsert_latest(StateSnapshot(LOW, 2))
    await other.upsert_latest(StateSnapshot(LOW, 1))  # so late
    assert await ramp.get_latest(LOW) == StateSnapshot(LOW, 2)
    await clock.advance(5.1)
    assert await ramp.get_latest(LOW) == StateSnapshot(LOW, 2)
    await ramp.upsert_latest(StateSnapshot(LOW, 3))
    assert ramp.behind == 0


async def test_a_store_behind_both_sides_takes_a_write_once() -> None:
    """Two ways to one database: the second write is the first, by its id."""
    database = MemoryStore()
    ramp = Ramp(database, alternative=Cached(database), share=1.0)
    await ramp.upsert_latest(state(value=0.1))
    await ramp.upsert_latest_many([state(value=0.2), state(HIGH)])
    assert len(await database.get_history(LOW, 9)) == 2
    assert await ramp.get_latest(LOW) == state(value=0.2)


async def test_a_delete_that_one_side_missed_says_so() -> None:
    """pending names the side; the other is erased; until the repeat the user is read from inner."""
    for inner, other, names in (
        (MemoryStore(), Down(), ("Down",)),
        (Down(), MemoryStore(), ("Down",)),
        (Down(), Down(), ("Down", "Down")),
    ):
        ramp = Ramp(inner, alternative=other, share=1.0)
        await ramp.upsert_latest(state())
        broken = [store for store in (inner, other) if isinstance(store, Down)]
        for store in broken:
            store.error = UnavailableError("down")
        with pytest.raises(ErasureIncompleteError) as caught:
            await ramp.delete(LOW)
        assert caught.value.pending == names
        assert (caught.value.layer, caught.value.user_id) == ("Ramp", LOW)
        assert caught.value.__cause__ is broken[0].error
        assert LOW not in str(caught.value)
        assert not ramp.takes(LOW)
        for store in broken:
            store.error = None
        await ramp.delete(LOW)
        assert ramp.takes(LOW)
        assert await ramp.get_latest(LOW) is None
        assert await inner.get_latest(LOW) is None
        assert await other.get_latest(LOW) is None


@pytest.mark.parametrize("kind", [UnsupportedError, ClosedError])
async def test_a_delete_that_neither_side_can_do_is_not_to_be_repeated(
    kind: type[StoreError],
) -> None:
    """Nothing was erased anywhere, so nothing is left to be finished."""
    inner, other = Down(), Down()
    ramp = Ramp(inner, alternative=other, share=1.0)
    await ramp.upsert_latest(state())
    inner.error, other.error = kind("no"), kind("no")
    with pytest.raises(kind) as caught:
        await ramp.delete(LOW)
    assert caught.value is inner.error
    assert not caught.value.retryable
    inner.error = other.error = None
    assert await ramp.get_latest(LOW) == state()


async def test_a_delete_tells_every_tier_that_is_left() -> None:
    """Those inside a side by their own names."""
    inner, other = Down(), Down()
    inner.error = ErasureIncompleteError("left", pending=("redis", "l1"))
    other.error = UnavailableError("down")
    with pytest.raises(ErasureIncompleteError) as caught:
        await Ramp(inner, alternative=Retry(other, attempts=1)).delete(LOW)
    assert caught.value.pending == ("redis", "l1", "Down")


async def test_batches_are_counted_and_ask_each_side_for_its_own() -> None:
    """Reads by side as of single ones; a side that has nobody is not asked."""
    asked: list[tuple[str, list[str]]] = []

    class Noting(MemoryStore):
        def __init__(self, side: str) -> None:
            super().__init__()
            self.side = side

        async def get_latest_many(self, user_ids: Any) -> dict[str, StateSnapshot]:
            wanted = list(user_ids)
            asked.append((self.side, wanted))
            return await super().get_latest_many(wanted)

    ramp = Ramp(Noting("inner"), alternative=Noting("other"), share=0.5)
    assert samples(ramp)["ramp_reads", ("inner",)] == samples(ramp)["ramp_reads", ("other",)] == 0
    await ramp.upsert_latest_many([state(LOW, 0.1), state(HIGH, 0.2)])
    for users in ([LOW], [HIGH], [LOW, HIGH]):
        found = await ramp.get_latest_many(users)
        assert list(found) == users
    assert asked == [
        ("other", [LOW]),
        ("inner", [HIGH]),
        ("other", [LOW]),
        ("inner", [HIGH]),
    ]
    assert samples(ramp)["ramp_reads", ("inner",)] == 2
    assert samples(ramp)["ramp_reads", ("other",)] == 2
    asked.clear()
    layered = Ramp(Noting("inner"), layer=BEST, share=1.0)
    assert await layered.get_latest_many([LOW]) == {}
    assert asked == [("inner", [LOW])]  # through the layer, and not once more past it


async def test_with_a_layer_each_state_of_a_batch_is_written_once() -> None:
    """Through the layer or past it, never both; and a history is asked of one of the two ways."""
    passed: list[str] = []

    class Noting(Layer):
        async def upsert_latest_many(self, snapshots: Any) -> None:
            passed.append("batch")
            await super().upsert_latest_many(snapshots)

        async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
            passed.append(user_id)
            return await super().get_history(user_id, limit)

    ramp = Ramp(MemoryStore(), layer=Noting, share=0.5)
    await ramp.upsert_latest_many([state(LOW, 0.1), state(HIGH, 0.2), state(LOW, 0.3)])
    assert [s.get_axis("a") for s in await ramp.get_history(LOW, 9)] == [0.3, 0.1]
    assert [s.get_axis("a") for s in await ramp.get_history(HIGH, 9)] == [0.2]
    await ramp.upsert_latest_many([state(HIGH, 0.4)])
    await ramp.upsert_latest_many([])
    assert passed == ["batch", LOW]
    assert await ramp.get_history("nobody", 9) == []


@pytest.mark.parametrize("what", ["superseded", "unsure"])
@pytest.mark.parametrize("user_id", [LOW, HIGH])
async def test_what_one_part_of_a_batch_tells_the_whole_batch_tells(
    what: str, user_id: str
) -> None:
    """Through the layer or past it: it was one call."""

    class Tells(MemoryStore):
        async def upsert_latest_many(self, snapshots: Iterable[StateSnapshot]) -> None:
            if any(snapshot.user_id == user_id for snapshot in snapshots):
                setattr(current_call(self.clock), what, True)

    ramp = Ramp(Tells(), layer=BEST, share=0.5)
    with call_begins() as call:
        await ramp.upsert_latest_many([state(LOW), state(HIGH)])
    assert (call.superseded, call.unsure) == (what == "superseded", what == "unsure")


@pytest.mark.parametrize("error", [RejectedError("full"), UnavailableError("down")])
async def test_a_batch_of_which_one_way_took_its_part_says_so(error: StoreError) -> None:
    """The other way refused its own part: that nothing was stored would not be true."""

    class Refusing(Layer):
        async def upsert_latest_many(self, snapshots: Any) -> None:
            raise error

    inner = MemoryStore()
    ramp = Ramp(inner, layer=Refusing, share=0.5)
    with pytest.raises(type(error)) as caught:
        await ramp.upsert_latest_many([state(LOW), state(HIGH)])
    assert await inner.get_latest(HIGH) == state(HIGH)
    assert caught.value.outcome_unknown
    error.outcome_unknown = False
    with pytest.raises(type(error)) as caught:
        await ramp.upsert_latest_many([state(LOW)])
    assert not caught.value.outcome_unknown


async def test_a_batch_that_waits_for_one_user_brings_no_other_back() -> None:
    """It began before the erasure that returned meanwhile."""
    inner = Down()
    ramp = Ramp(inner, alternative=MemoryStore(), share=1.0)
    first, erased = sorted([LOW, HIGH])
    inner.gate = asyncio.Event()
    slow = asyncio.create_task(ramp.upsert_latest(state(first)))
    await settle()
    batch = asyncio.create_task(ramp.upsert_latest_many([state(first), state(erased)]))
    await settle()
    held, inner.gate = inner.gate, None
    await ramp.delete(erased)
    held.set()
    await asyncio.gather(slow, batch)
    assert await ramp.get_latest(first) == state(first)
    assert await ramp.get_latest(erased) is None


async def test_who_is_in_doubt_is_forgotten_in_time() -> None:
    """Each for 5 s from the last write of unknown outcome, and no longer in memory than that."""
    clock = FakeClock()
    inner = Down()
    ramp = Ramp(inner, layer=BEST, clock=clock)
    inner.error = UnavailableError("cut off", outcome_unknown=True)

    async def fail(user_id: str) -> None:
        with pytest.raises(UnavailableError):
            await ramp.upsert_latest(state(user_id))

    await fail(LOW)
    await clock.advance(3)
    await fail(HIGH)
    await fail(LOW)
    await clock.advance(3)
    ramp.share = 1.0
    assert not ramp.takes(LOW)  # doubted again meanwhile
    ramp = Ramp(inner, layer=BEST, clock=clock)
    for number in range(10):
        await fail(f"w-{number}")
    await clock.advance(5)
    await fail(LOW)
    assert list(ramp._ways.doubtful) == [LOW]
    # Nothing fails any more: whoever comes by is enough.
    inner.error = None
    await clock.advance(5)
    await ramp.get_latest("somebody")
    assert not ramp._ways.doubtful


async def test_closing_tells_what_the_layer_could_not_end() -> None:
    """After the store below was closed all the same."""

    class Stuck(Layer):
        async def aclose(self) -> None:
            raise UnavailableError("stuck")

    inner = MemoryStore()
    with pytest.raises(UnavailableError, match="stuck"):
        await Ramp(inner, layer=Stuck).aclose()
    assert inner._closed


@pytest.mark.parametrize("operation", ["upsert_latest", "upsert_latest_many", "delete"])
async def test_what_is_under_way_reaches_both_sides_before_they_are_closed(operation: str) -> None:
    """One of them would miss it for good otherwise."""
    inner, alternative = Down(), MemoryStore()
    ramp = Ramp(inner, alternative=alternative)
    await ramp.upsert_latest(state(value=0.1))
    inner.gate = asyncio.Event()
    calls: dict[str, Any] = {
        "upsert_latest": lambda: ramp.upsert_latest(state()),
        "upsert_latest_many": lambda: ramp.upsert_latest_many([state(), state(HIGH)]),
        "delete": lambda: ramp.delete(LOW),
    }
    call = asyncio.create_task(calls[operation]())
    await settle()
    closing = asyncio.create_task(ramp.aclose())
    await settle()
    assert not closing.done()
    inner.gate.set()
    await call
    await closing
    for store in (inner, alternative):
        assert store._closed


@pytest.mark.parametrize("user_id", [LOW, HIGH])
async def test_with_a_layer_an_erasure_reaches_the_store_once(user_id: str) -> None:
    """A second one could take away what was written since the first."""
    inner = Recorded(MemoryStore())
    ramp = Ramp(inner, layer=BEST, share=0.5)
    await ramp.upsert_latest(state(user_id))
    await ramp.delete(user_id)
    assert inner.operations.count("delete") == 1
    assert await ramp.get_latest(user_id) is None


async def test_while_a_write_is_under_way_reads_stay_on_their_side() -> None:
    """Then inner, as soon as the alternative missed it."""
    inner, other = Down(), Down()
    ramp = Ramp(inner, alternative=other, share=1.0)
    await ramp.upsert_latest(state(value=0.1))
    inner.gate = asyncio.Event()
    write = asyncio.create_task(ramp.upsert_latest(state(value=0.2)))
    await settle()
    assert ramp.takes(LOW)
    ramp.share = 0.0
    assert ramp.takes(LOW)  # till its end
    ramp.share = 1.0
    waiting = asyncio.create_task(ramp.upsert_latest(state(value=0.3)))
    other.error = UnavailableError("down")
    await settle()
    inner.gate.set()
    with pytest.raises(UnavailableError, match="the alternative did not") as caught:
        await write
    assert (caught.value.operation, caught.value.layer) == ("upsert_latest", "Ramp")
    assert not ramp.takes(LOW)
    with pytest.raises(UnavailableError):
        await waiting
    other.error = None
    await ramp.upsert_latest(state(value=0.4))
    assert ramp.takes(LOW)


async def test_a_larger_share_shows_nothing_older_than_was_read_past_the_cache() -> None:
    """Another process wrote while the share was small, and reads of this one saw it."""
    store = MemoryStore()
    ramp = Ramp(store, layer=lambda inner: Retry(Cached(inner, ttl=60.0)), share=1.0)
    await ramp.upsert_latest(state(value=0.1))
    ramp.share = 0.0
    await store.upsert_latest(state(value=0.2))
    assert await ramp.get_latest(LOW) == state(value=0.2)
    ramp.share = 1.0
    assert await ramp.get_latest(LOW) == state(value=0.2)
    # Only raising it empties the cache.
    await store.upsert_latest(state(value=0.3))
    ramp.share = 0.9
    ramp.share = ramp.share
    assert await ramp.get_latest(LOW) == state(value=0.2)


class Hangs(Down):
    """Counts whom it makes wait, and tells somebody before."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.calls = 0
        self.told: Callable[[int], None] = lambda number: None

    async def _enter(self) -> None:
        self.calls += 1
        self.told(self.calls)
        await asyncio.sleep(0)
        await super()._enter()


@pytest.mark.parametrize("way", ["upsert", "delete"])
@pytest.mark.parametrize("caused", [False, True], ids=["raised", "the cause"])
async def test_who_waited_for_an_alternative_that_hangs_is_spared_it(
    way: str, caused: bool
) -> None:
    """While it was tried in vain; whoever came later tries again. Inner takes every write."""
    inner, other = Hangs(), Hangs()
    ramp = Ramp(inner, alternative=other, share=1.0)
    tasks: list[asyncio.Task[None]] = []

    def begin() -> None:
        call = ramp.delete(LOW) if way == "delete" else ramp.upsert_latest(state())
        tasks.append(asyncio.create_task(call))

    def one_more(number: int) -> None:
        if number == 3:
            begin()
            assert not ramp.takes(LOW)

    other.error = StoreTimeoutError("no answer")
    if caused:
        other.error = UnavailableError("down")
        other.error.__cause__ = TimeoutError()
    inner.told = one_more
    for _ in range(4):
        begin()
    error: Any = ErasureIncompleteError if way == "delete" else UnavailableError
    for number in range(5):
        with pytest.raises(error):
            await tasks[number]
    # The first had nobody behind it yet, and the last one came when the second was done.
    assert inner.calls == 5
    assert other.calls == 3


async def test_an_alternative_that_fails_at_once_is_tried_by_everybody() -> None:
    """Nobody has waited for it."""
    other = Hangs()
    ramp = Ramp(Hangs(), alternative=other, share=1.0)
    other.error = UnavailableError("refused")
    writes = [ramp.upsert_latest(state()) for _ in range(4)]
    errors = await asyncio.gather(*writes, return_exceptions=True)
    assert all(isinstance(error, UnavailableError) for error in errors)
    assert other.calls == 4


async def test_behind_an_inner_that_hangs_nobody_waits_to_erase() -> None:
    """Who waited while it was tried in vain was not sent, and is told so."""
    inner, other = Hangs(), Hangs()
    ramp = Ramp(inner, alternative=other, share=1.0)
    inner.error = StoreTimeoutError("no answer")
    erasures = [asyncio.create_task(ramp.delete(LOW)) for _ in range(4)]
    for erasure in erasures[:2]:
        with pytest.raises(ErasureIncompleteError):
            await erasure
    for erasure in erasures[2:]:
        with pytest.raises(StoreTimeoutError, match="was not sent"):
            await erasure
    assert inner.calls == other.calls == 2


@pytest.mark.parametrize("many", [False, True])
async def test_a_read_under_way_while_the_share_rises_shows_no_write_too_early(many: bool) -> None:
    """It was on its way to inner; what a write put there since is not at the alternative yet."""

    class SlowWrites(MemoryStore):
        async def upsert_latest(self, snapshot: StateSnapshot) -> None:
            if snapshot.get_axis("a") == 0.2:
                await gate.wait()
            await super().upsert_latest(snapshot)

    class SlowReads(Down):
        async def get_latest_many(self, user_ids: Any) -> Any:
            await self._enter()
            return await super().get_latest_many(user_ids)

    async def read() -> float:
        if many:
            return (await ramp.get_latest_many([LOW]))[LOW].get_axis("a")
        found = await ramp.get_latest(LOW)
        assert found is not None
        return found.get_axis("a")

    gate, on_its_way = asyncio.Event(), asyncio.Event()
    inner = SlowReads()
    ramp = Ramp(inner, alternative=SlowWrites(), share=0.0)
    await ramp.upsert_latest(StateSnapshot(LOW, axes={"a": 0.1}))
    inner.gate = on_its_way
    reader = asyncio.create_task(read())
    await settle()
    inner.gate = None
    ramp.share = 1.0
    writer = asyncio.create_task(ramp.upsert_latest(StateSnapshot(LOW, axes={"a": 0.2})))
    await settle()
    on_its_way.set()
    first = await reader
    assert await read() >= first
    gate.set()
    await writer
    assert await read() == 0.2
    await ramp.aclose()


@pytest.mark.parametrize("kind", [StateSnapshot, CountsAsFalse])
@pytest.mark.parametrize("operation", ["get_latest", "get_latest_many", "get_history"])
async def test_a_read_that_found_nobody_at_the_alternative_shows_no_write_too_early(
    operation: str, kind: type[StateSnapshot]
) -> None:
    """Its user was written first, and is being written again, before it comes to ask inner."""

    class Slow(MemoryStore):
        async def upsert_latest(self, snapshot: StateSnapshot) -> None:
            if snapshot.get_axis("a") == 0.2:
                await gate.wait()
            await super().upsert_latest(snapshot)

    class Gated(Down):
        async def get_latest_many(self, user_ids: Any) -> Any:
            await self._enter()
            return await super().get_latest_many(user_ids)

        async def get_history(self, user_id: str, limit: int) -> list[StateSnapshot]:
            await self._enter()
            return await super().get_history(user_id, limit)

    async def read() -> float:
        if operation == "get_latest_many":
            found: Any = (await ramp.get_latest_many([LOW]))[LOW]
        elif operation == "get_history":
            found = (await ramp.get_history(LOW, 1))[0]
        else:
            found = await ramp.get_latest(LOW)
        value: float = found.get_axis("a")
        return value

    gate, on_its_way = asyncio.Event(), asyncio.Event()
    inner = Gated(snapshot_type=kind)
    ramp = Ramp(inner, alternative=Slow(snapshot_type=kind), share=1.0)
    inner.gate = on_its_way
    reader = asyncio.create_task(read())
    await settle()
    inner.gate = None
    await ramp.upsert_latest(kind(LOW, axes={"a": 0.1}))
    writer = asyncio.create_task(ramp.upsert_latest(kind(LOW, axes={"a": 0.2})))
    await settle()
    on_its_way.set()
    first = await reader
    assert await read() >= first
    gate.set()
    await writer
    assert await read() == 0.2
    await ramp.aclose()


async def test_while_a_write_goes_through_the_layer_reads_stay_on_their_side() -> None:
    """Inner has it before the layer: who saw it there must not be sent to the layer meanwhile."""

    class Late(Layer):
        """Hears of a write once the gate is open."""

        def __post_init__(self) -> None:
            self.seen: dict[str, StateSnapshot] = {}

        async def get_latest(self, user_id: str) -> StateSnapshot | None:
            return self.seen.get(user_id)

        async def upsert_latest(self, snapshot: StateSnapshot) -> None:
            await self.inner.upsert_latest(snapshot)
            await gate.wait()
            self.seen[snapshot.user_id] = snapshot

    gate = asyncio.Event()
    gate.set()
    ramp = Ramp(MemoryStore(), layer=Late, share=1.0)
    await ramp.upsert_latest(StateSnapshot(LOW, axes={"a": 0.1}))
    gate.clear()
    ramp.share = 0.0
    writer = asyncio.create_task(ramp.upsert_latest(StateSnapshot(LOW, axes={"a": 0.2})))
    await settle()
    assert (await ramp.get_latest(LOW)).get_axis("a") == 0.2  # type: ignore[union-attr]
    ramp.share = 1.0
    assert (await ramp.get_latest(LOW)).get_axis("a") == 0.2  # type: ignore[union-attr]
    gate.set()
    await writer
    assert (await ramp.get_latest(LOW)).get_axis("a") == 0.2  # type: ignore[union-attr]
    assert not ramp._ways.pins
    await ramp.aclose()


async def test_of_two_writes_through_the_layer_the_last_lets_reads_change_sides() -> None:
    """Whichever that is."""
    inner = Down()
    ramp = Ramp(inner, layer=BEST, share=1.0)
    gates, writers = [asyncio.Event() for _ in range(3)], []
    for gate in gates:
        inner.gate = gate
        writers.append(asyncio.create_task(ramp.upsert_latest(state())))
        await settle()
        ramp.share = 0.0
    for gate, writer in zip(gates, writers, strict=True):
        assert ramp.takes(LOW)
        gate.set()
        await writer
    assert not ramp.takes(LOW)
    assert not ramp._ways.pins


async def test_a_cancelled_write_keeps_its_user_at_inner() -> None:
    """Cancellation passes at once; whoever waited for the same user goes on."""
    clock = FakeClock()
    inner, other = MemoryStore(), Down()
    ramp = Ramp(inner, alternative=other, share=1.0, clock=clock)
    other.gate = asyncio.Event()
    first = asyncio.create_task(ramp.upsert_latest(state(value=0.1)))
    await settle()
    second = asyncio.create_task(ramp.upsert_latest(state(value=0.2)))
    third = asyncio.create_task(ramp.upsert_latest(state(value=0.3)))
    await settle()
    assert await inner.get_latest(LOW) == state(value=0.1)
    third.cancel()
    first.cancel()
    await settle()
    assert first.cancelled()
    assert third.cancelled()
    assert ramp.behind == 1
    other.gate.set()
    await second
    assert await other.get_latest(LOW) == state(value=0.2)
    assert not ramp.takes(LOW)
    await clock.advance(5)
    await ramp.upsert_latest(state(value=0.4))
    assert ramp.takes(LOW)
    assert ramp.behind == 0
    assert ramp._ways.turns.users == {}


async def test_too_many_behind_send_everybody_to_inner(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of who is behind has a bound; past it the alternative answers for nobody."""
    monkeypatch.setattr(module, "_MAX_BEHIND", 3)
    inner, other = MemoryStore(), Down()
    ramp = Ramp(inner, alternative=other, share=0.0)
    other.error = UnavailableError("down")
    for number in range(3):
        await ramp.upsert_latest(state(f"w-{number}"))
    ramp.share = 1.0
    assert ramp.takes(LOW)
    ramp.share = 0.0
    await ramp.upsert_latest(state("w-3"))
    ramp.share = 1.0
    assert not ramp.takes(LOW)


def test_one_user_written_from_two_loops_is_told_the_remedy() -> None:
    """The order of a user's writes is one loop's."""
    inner = Down()
    ramp = Ramp(inner, alternative=MemoryStore())

    async def hang() -> None:
        inner.gate = asyncio.Event()
        task = asyncio.create_task(ramp.upsert_latest(state()))
        await settle()

        def elsewhere() -> None:
            with pytest.raises(UnsupportedError, match="one stack per loop"):
                asyncio.run(ramp.upsert_latest(state()))

        await asyncio.to_thread(elsewhere)
        inner.gate.set()
        await task

    asyncio.run(hang())


def test_event_loops_of_two_threads_write_one_user_through_a_layer() -> None:
    """Also when they begin in the very same moment; nothing is kept of their writes."""
    entered, over = threading.Event(), threading.Event()
    main = threading.current_thread()
    results: list[object] = []

    class Held(MemoryStore):
        async def upsert_latest(self, snapshot: StateSnapshot) -> None:
            if threading.current_thread() is not main:
                entered.set()
                over.wait()
            await super().upsert_latest(snapshot)

    def elsewhere() -> None:
        try:
            results.append(asyncio.run(ramp.upsert_latest(state())))
        except Exception as exc:  # noqa: BLE001
            results.append(exc)

    other = threading.Thread(target=elsewhere, daemon=True)

    ramp = Ramp(Held(), layer=Layer, share=1.0)
    takes = ramp._ways.takes

    def interrupted(user_id: str) -> bool:
        if other.ident is None:
            other.start()
            entered.wait(0.2)  # it cannot come so far, when one waits for the other
        return takes(user_id)

    ramp._ways.takes = interrupted  # type: ignore[method-assign]
    asyncio.run(ramp.upsert_latest(state()))
    over.set()
    other.join()
    assert results == [None]
    assert ramp._ways.pins == {}


async def test_open_and_health_with_an_alternative() -> None:
    """The alternative counts as far as anybody depends on it."""
    inner, other = Down(), Down()
    other.error = UnavailableError("down")
    ramp = Ramp(inner, alternative=other, share=0.0)
    await ramp.open()
    report = await ramp.health_report()
    assert report.status is HealthStatus.DEGRADED
    assert "alternative is down" in report.message
    assert [child.name for child in report.children] == ["Down", "Down"]
    ramp.share = 0.1
    with pytest.raises(UnavailableError):
        await ramp.open()
    inner.error = UnavailableError("down")
    assert (await ramp.health_report()).status is HealthStatus.UNHEALTHY
    other.error = None
    assert (await ramp.health_report()).status is HealthStatus.UNHEALTHY


async def test_the_health_report_takes_as_long_as_its_slower_side() -> None:
    """Both are asked side by side."""

    class Took(MemoryStore):
        def __init__(self, latency: float) -> None:
            super().__init__()
            self.latency = latency

        async def health_report(self) -> HealthReport:
            return HealthReport("Took", HealthStatus.HEALTHY, self.latency)

    for one, two in ((1.0, 3.0), (3.0, 1.0)):
        assert (await Ramp(Took(one), alternative=Took(two)).health_report()).latency_ms == 3.0


# In a stack


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({}, "alternative"),
        ({"alternative": MemoryStore(), "layer": BEST}, "alternative"),
        ({"alternative": "redis"}, "alternative"),
        ({"alternative": MemoryStore(snapshot_type=Mood)}, "snapshot_type"),
        ({"layer": BEST, "salt": 5}, "salt"),
        ({"layer": BEST, "clock": None}, "clock"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], option: str) -> None:
    """The error names the option."""
    with pytest.raises(ConfigError) as caught:
        Ramp(MemoryStore(), **options)
    assert caught.value.option == option


def test_versions_do_not_pass_and_listing_does() -> None:
    """Two ways make no order: a WriteThrough above keeps to this process, and says so."""
    for ramp in (
        Ramp(MemoryStore(), layer=BEST),
        Ramp(MemoryStore(), alternative=MemoryStore()),
    ):
        assert ramp.capability(Authority) is None
        assert ramp.capability(CacheTier) is None
        assert ramp.capability(Enumerable) is not None
        assert ramp.capability(Ramp) is ramp

    class Channelled(Layer):
        def capability(self, kind: type[Any]) -> Any:
            return "offered" if kind is Invalidations else super().capability(kind)

    inner = Channelled(MemoryStore())
    layered = Ramp(inner, layer={"use": "retry"})
    assert layered.capability(Invalidations) == "offered"  # type: ignore[comparison-overlap]
    assert Ramp(inner, alternative=MemoryStore()).capability(Invalidations) is None


def test_it_comes_from_a_config_file_and_can_be_swapped() -> None:
    """Options in, options out; describe says where the share goes; a swap keeps the present
    share."""
    layered: dict[str, Any] = {
        "store": {
            "use": "memory",
            "layers": [{"use": "ramp", "layer": {"use": "cached", "ttl": "5s"}, "share": 0.25}],
        }
    }
    stack = load_stack(layered)
    assert to_config(stack) == layered
    assert describe(stack)[0].notes == ("0.25 of the users go through Cached",)
    assert [block.id for block in describe(stack)] == [None, None]
    assert len(describe(stack)) == 2
    stack.share = 0.5  # type: ignore[attr-defined]
    new = MemoryStore()
    swapped = replace(stack, MemoryStore, new)
    assert isinstance(swapped, Ramp)
    assert (swapped.inner, swapped.share) == (new, 0.5)
    assert swapped._layers() != stack._layers()  # type: ignore[attr-defined]

    both = {
        "store": {
            "use": "ramp",
            "share": 0.1,
            "inner": {"use": "memory"},
            "alternative": {"use": "memory", "history_limit": 5},
        }
    }
    stack = load_stack(both)
    assert to_config(stack) == both
    assert [block.path for block in describe(stack)] == ["", "inner", "alternative"]
    assert "0.1 of the users" in str(describe(stack))


def test_a_function_and_secrets_of_a_table_are_not_shown() -> None:
    """What a layer's own config hides is hidden here too."""
    key = "A" * 43 + "="
    hidden = {"use": "memory", "layers": [{"use": "encrypted", "keys": [key]}]}
    ramp = Ramp(MemoryStore(), layer={"use": "fallback", "secondary": hidden})
    shown = repr(ramp) + str(describe(ramp)) + repr(describe(ramp)) + str(to_config(ramp))
    assert key not in shown
    assert "***" in shown
    sql = {"use": "sql", "url": "postgresql://app:zebra@db/app"}
    layers = [{"use": "encrypted", "keys": [key]}]
    secret = {"use": "write_through", "origin": {**sql, "layers": layers}}
    ramp = Ramp(MemoryStore(), layer=secret)
    shown = repr(ramp) + repr(describe(ramp)) + str(to_config(ramp))
    assert "zebra" not in shown
    assert key not in shown
    table = to_config(ramp)["store"]["layers"][0]["layer"]
    assert table["origin"]["url"] == "postgresql://app:***@db/app"
    assert table["origin"]["layers"] == [{"use": "encrypted", "keys": "***"}]
    function = Ramp(MemoryStore(), layer=Cached)
    assert "<" in repr(function)
    assert to_config(function)["store"]["layers"][0]["layer"].startswith("<")
