"""The conformance suite: what must hold of everything that calls itself a store."""

from __future__ import annotations

import asyncio
import math
import operator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from layered_store.call import call_begins
from layered_store.clock import SYSTEM_CLOCK
from layered_store.coherence.contract import Authority
from layered_store.enumerable import Enumerable, pages
from layered_store.errors import (
    RejectedError,
    StoreError,
    UnsupportedError,
    ValidationError,
)
from layered_store.health import HealthReport, HealthStatus
from layered_store.interface import StateStore
from layered_store.options import check_seconds
from layered_store.snapshot import Source, StateSnapshot
from layered_store.testing.report import (
    Broken,
    Patience,
    Report,
    Result,
    Unneeded,
    build,
    error_texts,
    expect,
    title_of,
    watched_logs,
)
from layered_store.testing.store_life import LIFE_CHECKS
from layered_store.testing.store_suite import NOW_MS, SOON_SECONDS, Suite, in_time

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["check_store"]

_CHECK_SECONDS: Final = 30.0
_BATCH: Final = 120
_AT_ONCE: Final = 8
_SOON_TRIES: Final = 20
_CANCELLED: Final = 160
_HELD_UP_SECONDS: Final = 0.05


async def check_store(
    factory: Callable[[], StateStore | Awaitable[StateStore]], *, limit: float = _CHECK_SECONDS
) -> Report:
    """Check that what ``factory`` builds keeps every rule of :class:`StateStore`.

    Needs no pytest and never sleeps. Abilities (history, delete, versions, listing) are found by
    trying; checks of those that are missing are skipped, and the report says so. A finding is
    never raised: look at ``report.ok``, print the report, or call ``raise_for_failures()``::

        report = await check_store(lambda: MyStore(url))
        assert report.ok, str(report)

    Args:
        factory: builds a store, which is closed at the end; may be a coroutine function. It is
            called several times; all that it builds may share one database. The checks use users
            of their own, named by chance, and delete them where the store can.
        limit: seconds of real time that one check may take. Once a check did not end, the others
            have a tenth of it.

    Raises:
        TypeError: ``factory`` does not return a StateStore, or its class of snapshots has a field
            without a default for which no value could be made up.
    """
    check_seconds(limit, "limit", check_store)
    results: list[Result] = []
    patience = Patience(limit)
    store = await _built(factory)
    subject = type(store).__name__
    abilities: tuple[str, ...] = ()
    try:
        suite = Suite(store)
        results.append(await patience.check("its abilities can be tried out", suite.find))
        abilities = tuple(suite.abilities)
        for check in _CHECKS:
            if suite.writes or check in _READ_CHECKS:
                result = await patience.check(title_of(check), partial(check, suite))
            else:
                result = Result(title_of(check), "skipped", "it refuses writes")
            results.append(result)
        await patience.check("", suite.clean_up)
    finally:
        await patience.check("", store.aclose)  # whether it closes well is a check of its own
    for lived in LIFE_CHECKS:
        store = await _built(factory)
        second = await _built(factory)
        try:
            results.append(await patience.check(title_of(lived), partial(lived, store, second)))
        finally:
            await patience.check("", store.aclose)
            await patience.check("", second.aclose)
    return Report(subject, abilities, tuple(results))


async def _built(factory: Callable[[], Any]) -> StateStore:
    if not callable(factory):
        raise TypeError(
            "the factory must be a function that builds a store, such as `lambda: MyStore(url)`,"
            f" not a {type(factory).__name__}"
        )
    store = await build(factory)
    if not isinstance(store, StateStore):
        raise TypeError(f"the factory must return a StateStore, not {type(store).__name__}")
    return store


async def _refused(call: Awaitable[Any], what: str) -> None:
    """Fail unless the call raises ValidationError."""
    try:
        await call
    except ValidationError:
        return
    except Exception as exc:
        raise Broken(
            f"{what} raised {type(exc).__name__}; raise ValidationError before anything is stored"
        ) from exc
    raise Broken(f"{what} was accepted; raise ValidationError before anything is stored")


async def _refused_somehow(call: Awaitable[Any], what: str) -> None:
    """Fail unless the call is refused, be it as every write is."""
    try:
        await call
    except (ValidationError, RejectedError, UnsupportedError):
        return
    raise Broken(f"{what} was accepted")


# What a store does with its users


async def _absent(suite: Suite) -> None:
    """An absent user is None, has no history and is left out of a batch."""
    user_id = suite.user("absent")
    got = await suite.store.get_latest(user_id)
    expect(got is None, f"get_latest() of an absent user gave {type(got).__name__}, not None")
    history = await suite.history_of(user_id, 5)
    expect(history == [], "get_history() of an absent user is not []")
    many = await suite.store.get_latest_many([user_id])
    expect(many == {}, "get_latest_many() has an entry for an absent user; leave it out")


async def _round_trip(suite: Suite) -> None:
    """A state comes back equal, in every field and to the last bit."""
    samples: list[dict[str, Any]] = [
        {},
        {"source": Source.INFERRED, "confidence": 0.1},
        {"source": Source.MIXED, "confidence": 0.0, "axes": {}},
        {"axes": {"a": 0.0, "b": 1.0, "c": 0.1 + 0.2, "d": 5e-324, "e": math.nextafter(1.0, 0.0)}},
        {"axes": {"x" * 64: 0.5, "0": 0.25, "a_b__c": 1 / 3}},
        {"updated_at_unix_ms": 0},
        {"updated_at_unix_ms": -(2**63)},
        {"updated_at_unix_ms": 2**63 - 1},
    ]
    for number, fields in enumerate(samples):
        user_id = suite.user(f"equal-{number}")
        wrote = suite.snapshot(user_id, **fields)
        await suite.store.upsert_latest(wrote)
        got = await suite.store.get_latest(user_id)
        expect(
            type(got) is suite.store.snapshot_type,
            f"get_latest() gave a {type(got).__name__}, not a {suite.store.snapshot_type.__name__}",
        )
        differs = [
            name
            for name in wrote.__struct_fields__
            if getattr(got, name) != getattr(wrote, name)
            or type(getattr(got, name)) is not type(getattr(wrote, name))
        ]
        expect(
            not differs and got == wrote,
            f"what was read is not equal to what was written; it differs in {', '.join(differs)}",
        )


async def _replaces(suite: Suite) -> None:
    """The latest state is the one that was written last."""
    written = await suite.write("replace", 3)
    got = await suite.store.get_latest(written[0].user_id)
    expect(got == written[-1], "get_latest() is not the state that was written last")
    await suite.store.upsert_latest(written[-1])
    got = await suite.store.get_latest(written[0].user_id)
    expect(got == written[-1], "writing an equal state again changed the latest one")
    bare = suite.snapshot(written[0].user_id, 4, axes={"other": 0.5})
    await suite.store.upsert_latest(bare)
    got = await suite.store.get_latest(written[0].user_id)
    expect(got == bare, "a state was mixed with the one before it; replace it whole")
    tie = suite.snapshot(written[0].user_id, 4, axes={"other": 0.75})
    await suite.store.upsert_latest(tie)
    got = await suite.store.get_latest(written[0].user_id)
    expect(got == tie, "of two states of one moment the latest is not the one written last")


async def _apart(suite: Suite) -> None:
    """Users whose ids differ in case, accents, form or ending are different users."""
    stem = suite.user("apart")
    alike = [
        f"{stem}-a",
        f"{stem}-A",
        f"{stem}-ä",
        f"{stem}-ａ",
        f"{stem}-ß",
        f"{stem}-ss",
        f"{stem}-e\N{COMBINING GREEK YPOGEGRAMMENI}",
        f"{stem}-e",
        f"{stem}-ı",
        f"{stem}-i",
        f"{stem}-K",
        f"{stem}-\N{KELVIN SIGN}",
        f"{stem}-_",
        f"{stem}--",
        f"{stem}-x".ljust(200, "x"),
        f"{stem}-x".ljust(255, "x"),
        f"{stem}-x".ljust(256, "x"),
        f"{stem}-x".ljust(255, "x") + "y",
    ]
    written = {user_id: suite.snapshot(user_id, number) for number, user_id in enumerate(alike)}
    for user_id, state in written.items():
        try:
            await suite.store.upsert_latest(state)
        except ValidationError:
            # A layer that lengthens ids may take shorter ones only.
            expect(len(user_id) > 200, "a valid user id was refused")  # noqa: PLR2004
            alike.remove(user_id)
    suite.used.extend(alike)
    many = await suite.store.get_latest_many(alike)
    for user_id in alike:
        wrote = written[user_id]
        got = await suite.store.get_latest(user_id)
        expect(
            got == wrote and many.get(user_id, wrote) == wrote,
            "a user got the state of another one with a similar id (case, accent, width or"
            " ending); compare ids byte by byte",
        )
        if suite.history:
            kept = await suite.store.get_history(user_id, 2)
            expect(
                {state.user_id for state in kept} <= {user_id},
                "the history of a user holds states of another one with a similar id (case, accent,"
                " width or ending); compare ids byte by byte",
            )
    if suite.can_delete:
        await asyncio.gather(*map(suite.store.delete, alike[::2]))
        for user_id in alike[1::2]:
            expect(
                await suite.store.get_latest(user_id) is not None,
                "delete() removed another user with a similar id (case, accent, width or ending);"
                " compare ids byte by byte, without wildcards",
            )


async def _bad_ids(suite: Suite) -> None:
    """A bad user id is refused, and finds nobody."""
    store = suite.store
    refused = _refused if suite.writes else _refused_somehow
    bad: list[Any] = ["", "a b", "a:b", "a/b", "é!", "a\n", "a\0b", "x" * 257, "ä" * 129, "\ud800"]
    for user_id in bad:
        shown = f"a bad user id ({user_id!a:.12})"
        await refused(store.upsert_latest(suite.snapshot(user_id)), f"upsert_latest() for {shown}")
        await refused(
            store.upsert_latest_many([suite.snapshot(user_id)]),
            f"upsert_latest_many() for {shown}",
        )
    for user_id in (*bad, None, 7, b"u-1", ["u-1"]):
        for read in (
            partial(store.get_latest, user_id),
            partial(suite.history_of, user_id, 5),
            partial(store.get_latest_many, [user_id]),
        ):
            try:
                found = await read()
            except ValidationError:
                continue
            except (TypeError, AttributeError) as exc:
                # What a dict says of a list; more cannot be asked of two methods.
                if isinstance(user_id, str):
                    message = f"a read of a bad user id raised {type(exc).__name__}"
                    raise Broken(f"{message}; raise ValidationError") from exc
                continue
            expect(not found, f"a read of a bad user id ({user_id!a:.12}) found somebody")
        if suite.can_delete and isinstance(user_id, str):
            try:
                await store.delete(user_id)
            except ValidationError:
                pass


async def _bad_snapshots(suite: Suite) -> None:
    """A bad snapshot is refused before anything is stored."""
    user_id = suite.user("bad")
    refused = _refused if suite.writes else _refused_somehow
    bad: list[dict[str, Any]] = [
        {"axes": {"warmth": 1.5}},
        {"axes": {"warmth": math.nan}},
        {"axes": {"warmth": -math.inf}},
        {"axes": {"warmth": True}},
        {"axes": {"warmth": "0.5"}},
        {"axes": {"Warmth": 0.5}},
        {"axes": {"_warmth": 0.5}},
        {"axes": {"": 0.5}},
        {"axes": {"x" * 65: 0.5}},
        {"axes": None},
        {"confidence": -0.1},
        {"confidence": math.nan},
        {"confidence": True},
        {"source": "guessed"},
        {"updated_at_unix_ms": 2**63},
        {"updated_at_unix_ms": 1.5},
    ]
    for fields in bad:
        snapshot = suite.snapshot(user_id, **fields)
        what = f"upsert_latest() with a bad {next(iter(fields))}"
        await refused(suite.store.upsert_latest(snapshot), what)
        await refused(
            suite.store.upsert_latest_many([suite.snapshot(user_id), snapshot]),
            f"upsert_latest_many() with a bad {next(iter(fields))}",
        )
    for odd in (None, {"user_id": user_id}, user_id):
        try:
            await suite.store.upsert_latest(odd)  # type: ignore[arg-type]
        except (ValidationError, RejectedError, UnsupportedError, TypeError, AttributeError):
            continue
        raise Broken(f"upsert_latest() of a {type(odd).__name__} was accepted")
    got = await suite.store.get_latest(user_id)
    expect(got is None, "a batch with a bad snapshot was stored in part; validate all of it first")


async def _many(suite: Suite) -> None:
    """A batch of reads agrees with single reads."""
    written = [(await suite.write(f"many-{number}"))[0] for number in range(5)]
    ids = [snapshot.user_id for snapshot in written]
    asked = [ids[3], suite.user("many-absent"), *ids, ids[0]]
    got = await suite.store.get_latest_many(iter(asked))
    expect(isinstance(got, dict), "get_latest_many() did not return a dict")
    single = {user_id: await suite.store.get_latest(user_id) for user_id in dict.fromkeys(asked)}
    wanted = {user_id: snapshot for user_id, snapshot in single.items() if snapshot is not None}
    expect(
        got == wanted,
        f"get_latest_many() found {len(got)} users where get_latest() finds {len(wanted)}, or"
        " other states of them",
    )
    expect(await suite.store.get_latest_many([]) == {}, "get_latest_many([]) is not {}")


async def _write_many(suite: Suite) -> None:
    """A batch of writes stores every item, in its order."""
    ids = [suite.user(f"batch-{number}") for number in range(_BATCH)]
    batch = [suite.snapshot(user_id, number) for number, user_id in enumerate(ids)]
    batch += [suite.snapshot(ids[0], _BATCH), suite.snapshot(ids[0], _BATCH + 1)]
    await suite.store.upsert_latest_many(iter(batch))
    last = {snapshot.user_id: snapshot for snapshot in batch}
    many = await suite.store.get_latest_many(ids)
    found: dict[str, StateSnapshot | None] = {}
    for start in range(0, len(ids), _AT_ONCE):  # one by one takes long in a slow store
        part = ids[start : start + _AT_ONCE]
        states = await asyncio.gather(*map(suite.store.get_latest, part))
        found.update(zip(part, states, strict=True))
    lost = list(found.values()).count(None)
    expect(
        not lost,
        f"upsert_latest_many() of {len(batch)} snapshots lost {lost} of {len(last)} users",
    )
    expect(found == last, "upsert_latest_many() did not keep the last of a user's states")
    expect(many == last, f"get_latest_many() found {len(many)} of {len(last)} users")
    if suite.history >= 3:  # noqa: PLR2004
        kept = await suite.store.get_history(ids[0], 3)
        expect(kept == [batch[-1], batch[-2], batch[0]], "a batch is not in the history in order")
    await suite.store.upsert_latest_many([])


async def _history(suite: Suite) -> None:
    """The history is newest first, at most as long as asked."""
    suite.need_history()
    written = await suite.write("history", 4)
    user_id = written[0].user_id
    written.append(suite.snapshot(user_id, 3, axes={"of": 1.0}))  # of the same moment as the last
    await suite.store.upsert_latest(written[-1])
    newest_first = written[::-1]
    kept = await suite.store.get_history(user_id, 100)
    expect(kept[:1] == newest_first[:1], _history_problem(kept, newest_first))
    expect(kept == newest_first[: len(kept)], _history_problem(kept, newest_first))
    for limit in (1, 2, 3):
        part = await suite.store.get_history(user_id, limit)
        expect(len(part) <= limit, f"get_history(limit={limit}) gave {len(part)} states")
        expect(part == kept[:limit], f"get_history(limit={limit}) is not the newest {limit}")
    # A state of before, and one that equals the latest, are writes like any other.
    for again in (suite.snapshot(user_id, 3), suite.snapshot(user_id, 3)):
        await suite.store.upsert_latest(again)
        newest_first.insert(0, again)
    kept = await suite.store.get_history(user_id, 3)
    expect(
        kept == newest_first[: min(3, suite.history)],
        "a state that equals an earlier one is missing in the history; append every write",
    )
    # Older by its own time: such a write counts or is ignored, in both places alike.
    await suite.store.upsert_latest(suite.snapshot(user_id, -5))
    latest = await suite.store.get_latest(user_id)
    kept = await suite.store.get_history(user_id, 1)
    expect(
        kept == [latest],
        "after a state with an older time of its own the newest of the history is not the latest"
        " state; order both alike",
    )


def _history_problem(kept: list[StateSnapshot], newest_first: list[StateSnapshot]) -> str:
    if kept == newest_first[::-1][: len(kept)]:
        return "the history is oldest first; give the newest first"
    return "the history does not hold what was written, newest first"


async def _limits(suite: Suite) -> None:
    """A history of 0 states is [], a negative or odd limit is refused."""
    if not suite.has_history:
        raise Unneeded("it has no history (UnsupportedError)")
    user_id = (await suite.write("limits", 2))[0].user_id
    none = await suite.store.get_history(user_id, 0)
    expect(none == [], f"get_history(limit=0) gave {len(none)} states, not []")
    everything = await suite.store.get_history(user_id, 2**64)
    kept = await suite.store.get_history(user_id, 10)
    expect(everything == kept, "get_history(limit=2**64) is not all that is kept")
    for limit in (-1, -100, 1.5, "3", None, True):
        await _refused(
            suite.store.get_history(user_id, limit),  # type: ignore[arg-type]
            f"get_history(limit={limit!r})",
        )


async def _immutable(suite: Suite) -> None:
    """Nobody can change what others read."""
    axes = {"warmth": 0.5}
    user_id = suite.user("immutable")
    snapshot = suite.snapshot(user_id, axes=axes)
    same = suite.snapshot(user_id, axes=dict(axes))
    await suite.store.upsert_latest(snapshot)
    axes["warmth"] = 0.9
    message = "changing what {} changed what the store holds; hand out copies"
    got = await suite.store.get_latest(user_id)
    expect(got == same, message.format("was passed in"))
    assert got is not None
    for change in (
        lambda: setattr(got, "confidence", 0.25),
        lambda: operator.setitem(got.axes, "warmth", 0.9),  # type: ignore[call-overload]
        lambda: got.axes.clear(),  # type: ignore[attr-defined]  # noqa: PLW0108
    ):
        try:
            change()
        except (AttributeError, TypeError):
            continue
        raise Broken("a snapshot that was read can be changed; return the StateSnapshot itself")
    many = await suite.store.get_latest_many([user_id])
    many.clear()
    again = await suite.store.get_latest_many([user_id])
    expect(again == {user_id: same}, message.format("get_latest_many() returned"))
    if suite.history:
        history = await suite.store.get_history(user_id, 5)
        history.clear()
        kept = await suite.store.get_history(user_id, 5)
        expect(kept == [same], message.format("get_history() returned"))
        await suite.store.upsert_latest(suite.snapshot(user_id, 1))
        expect(kept == [same], "a write changed the list that get_history() had returned")


async def _deletes(suite: Suite) -> None:
    """A deleted user is gone, with the history, and can come back."""
    suite.need_delete()
    store = suite.store
    written = await suite.write("delete", 3)
    other = (await suite.write("delete-other"))[0]
    user_id = written[0].user_id
    await store.get_latest(user_id)
    await suite.history_of(user_id, 5)
    await store.delete(user_id)
    expect(await store.get_latest(user_id) is None, "get_latest() shows a deleted user")
    expect(await store.get_latest_many([user_id]) == {}, "get_latest_many() shows a deleted user")
    left = await suite.history_of(user_id, 5)
    expect(left == [], f"delete() left {len(left)} states in the history; remove them too")
    expect(await store.get_latest(other.user_id) == other, "delete() removed another user")
    await store.delete(user_id)
    await store.delete(suite.user("delete-absent"))
    # Equal to the last one before: whoever leaves out what did not change must forget it as well.
    await store.upsert_latest(written[-1])
    again = await store.get_latest(user_id)
    expect(again == written[-1], "a deleted user cannot be written again")
    if suite.history:
        kept = await store.get_history(user_id, 5)
        expect(kept == [written[-1]], "after delete() and a write the history holds older states")


async def _health(suite: Suite) -> None:
    """A store that works is healthy, in a bool and in a report that agree."""
    well = await in_time(suite.store.health_check(), "health_check()")
    expect(well is True, f"health_check() of a store that works gave {well!r}, not True")
    report = await in_time(suite.store.health_report(), "health_report()")
    expect(isinstance(report, HealthReport), "health_report() gave no HealthReport")
    expect(
        report.status is not HealthStatus.UNHEALTHY,
        "health_check() says healthy, health_report() says unhealthy",
    )
    first, second = await asyncio.gather(suite.store.health_report(), suite.store.health_report())
    expect(first.status is second.status, "two health reports at the same time disagree")


async def _at_once(suite: Suite) -> None:
    """Writes at the same time leave one winner, and everybody reads their own."""
    store = suite.store
    user_id = suite.user("at-once")
    # Of one moment, since a store may go by the snapshots' own time.
    written = [suite.snapshot(user_id, number, updated_at_unix_ms=NOW_MS) for number in range(12)]
    mixed_up = (
        "of several users read at the same time one got another's state; keep what belongs to a"
        " call in that call, not on the store"
    )

    async def own(number: int) -> None:
        mine = suite.snapshot(suite.user(f"own-{number}"), number)
        await store.upsert_latest(mine)
        got = await store.get_latest(mine.user_id)
        expect(got is None or got.user_id == mine.user_id, mixed_up)
        expect(got == mine, "a state that was written is not what its writer reads next")

    await asyncio.gather(*map(store.upsert_latest, written), *map(own, range(12)))
    ids = [user_id, *(f"check-{suite.run}-own-{number}" for number in range(12))]
    found = await asyncio.gather(*map(store.get_latest, ids))
    expect([state and state.user_id for state in found] == ids, mixed_up)
    latest = await store.get_latest(user_id)
    expect(latest in written, "after writes at the same time the latest state is none of them")
    if suite.history:
        newest = await store.get_history(user_id, 1)
        expect(newest == [latest], "the latest state is not the newest of the history")
        one_by_one = (await suite.write("one-by-one", len(written)))[0].user_id
        kept = await store.get_history(user_id, len(written))
        full = len(await store.get_history(one_by_one, len(written)))
        differing = [state for number, state in enumerate(kept) if state not in kept[:number]]
        expect(
            len(differing) == len(kept) == full,
            f"of {len(written)} writes at the same time the history holds {len(differing)}, of as"
            f" many one by one {full}; no write may undo another's entry",
        )
    reads = await asyncio.gather(*(store.get_latest(user_id) for _ in range(20)))
    expect(all(read == latest for read in reads), "readers at the same time see different states")
    others = ids[1:]
    batches = await asyncio.gather(*(store.get_latest_many([other]) for other in others))
    expect([[*batch] for batch in batches] == [[other] for other in others], mixed_up)
    if suite.history:
        kept_of = await asyncio.gather(*(store.get_history(other, 1) for other in others))
        expect([kept[0].user_id for kept in kept_of if kept] == others, mixed_up)
    if suite.can_delete:
        await asyncio.gather(*map(store.delete, others[::2]))
        left = await store.get_latest_many(others)
        expect(
            left.keys() == {*others[1::2]},
            f"of {len(others)} users {len(others[::2])} were deleted at the same time, and"
            f" {len(left)} are left; keep what belongs to a call in that call, not on the store",
        )


async def _cancelled(suite: Suite) -> None:
    """A cancelled call ends, and the store works on."""
    store, user_id = suite.store, suite.user("cancelled")
    for turns in range(4):
        state = suite.snapshot(user_id, turns)
        calls: list[Callable[[], Awaitable[object]]] = [
            partial(store.upsert_latest, state),
            partial(store.upsert_latest_many, [state]),
            partial(store.get_latest, user_id),
            partial(store.get_latest_many, [user_id]),
            partial(suite.history_of, user_id, 5),
        ]
        if suite.can_delete:
            calls.append(partial(store.delete, suite.user("cancelled-delete")))
        for call in calls:
            await _cut_off(call, turns)
            if suite.history:
                await _newest_is_latest(store, user_id)
    # As many as empty a pool of connections, if each keeps one.
    for number in range(_CANCELLED):
        await _cut_off(partial(store.get_latest, user_id), 1 + number % 3)
    wrote = suite.snapshot(user_id, 99)
    after = f"after {_CANCELLED} cancelled calls the next one"
    await in_time(store.upsert_latest(wrote), after, "give back in `finally` what a call took")
    got = await store.get_latest(user_id)
    expect(got == wrote, "after cancelled calls a write is not what is read next")


async def _newest_is_latest(store: StateStore, user_id: str) -> None:
    for _ in range(_SOON_TRIES):
        newest = await store.get_history(user_id, 1)
        latest = await store.get_latest(user_id)
        if newest == ([] if latest is None else [latest]):
            return
        await asyncio.sleep(SOON_SECONDS / _SOON_TRIES / 5)  # what was sent may arrive later
    raise Broken(
        "after a cancelled write the newest of the history is not the latest state; write both in"
        " one step, or none"
    )


async def _cut_off(call: Callable[[], Awaitable[object]], turns: int) -> None:
    """Begin a call and cancel it after so many turns of the event loop."""
    task: asyncio.Future[Any] = asyncio.ensure_future(call())
    for _ in range(turns):
        await asyncio.sleep(0)
    asked = task.cancel()
    done, _ = await asyncio.wait({task}, timeout=SOON_SECONDS)
    expect(
        done,
        f"a cancelled call did not end within {SOON_SECONDS:g} s; let CancelledError through, and"
        " give back in `finally` what the call took",
    )
    if not task.cancelled():
        task.result()
        expect(not asked, "a cancelled call returned normally; let CancelledError through")


async def _lets_others_run(suite: Suite) -> None:
    """Others go on while a call waits."""
    state = (await suite.write("others"))[0]
    for name, call in (
        ("upsert_latest", partial(suite.store.upsert_latest, state)),
        ("get_latest", partial(suite.store.get_latest, state.user_id)),
    ):
        # Several times, since the machine may hold up anybody now and then.
        for _ in range(5):
            held_up = await _longest_turn(call())
            if held_up < _HELD_UP_SECONDS:
                break
        else:
            raise Broken(
                f"{name}() held up the event loop for {held_up:.2f} s each time; await what takes"
                " time, or do it in a thread (asyncio.to_thread)"
            )


async def _longest_turn(call: Awaitable[object]) -> float:
    task = asyncio.ensure_future(call)
    longest, before = 0.0, SYSTEM_CLOCK.monotonic()
    while not task.done():
        await asyncio.sleep(0)
        now = SYSTEM_CLOCK.monotonic()
        longest, before = max(longest, now - before), now
    await task
    return longest


async def _private(suite: Suite) -> None:
    """Neither its repr nor an error nor a log shows a user id or a value."""
    store, user_id = suite.store, suite.user("SECRET")
    value = 0.123456789
    bad_id = f"{user_id} !"
    bad = suite.snapshot(user_id, axes={"warmth": 100 + value})
    texts: dict[str, list[str]] = {}
    with watched_logs() as logged:
        await store.upsert_latest(suite.snapshot(user_id, axes={"warmth": value}))
        # A cache has it now, too.
        await store.get_latest(user_id)
        await store.get_latest_many([user_id])
        await suite.history_of(user_id, 1)
        texts["its repr"] = [repr(store), str(store)]
        texts["its health report"] = [str((await store.health_report()).to_dict())]
        for name, call in (
            ("get_history", partial(store.get_history, user_id, -1)),
            ("get_latest", partial(store.get_latest, bad_id)),
            ("get_latest_many", partial(store.get_latest_many, [bad_id])),
            ("delete", partial(store.delete, bad_id)),
            ("upsert_latest", partial(store.upsert_latest, bad)),
            ("upsert_latest_many", partial(store.upsert_latest_many, [bad])),
        ):
            try:
                await call()
            except StoreError as exc:
                texts[f"an error text of {name}()"] = error_texts(exc)
    texts["what it logs"] = logged
    for where, found in texts.items():
        shown = any(user_id in text or "0.12345" in text for text in found)
        expect(not shown, f"{where} shows a user id or a state value; leave them out")


# Abilities beyond the interface


async def _versions(suite: Suite) -> None:
    """Versions grow with every write and erasure; a repeated write counts once."""
    authority: Authority = suite.need(Authority, "versions")
    user_id = suite.user("versions")
    first = suite.snapshot(user_id, 1)
    second = suite.snapshot(user_id, 2)
    absent = await authority.read(user_id)
    expect(absent.snapshot is None, "read() of an absent user gave a state")
    head = await authority.head()
    seen = [absent.version, (await authority.write(first)).version]
    with call_begins():
        record = await authority.write(second)
        again = await authority.write(second)
    expect(record == again, "a write that was repeated with the same write id counted twice")
    seen.append(record.version)
    read = await authority.read(user_id)
    expect(read == record, "read() does not give the record that the write left")
    many = await authority.read_many([user_id, suite.user("versions-absent")])
    expect(len(many) == 2, "read_many() left out an id")  # noqa: PLR2004
    expect(many[user_id] == read, "read_many() disagrees with read()")
    if suite.history > 1:
        kept = await suite.store.get_history(user_id, 5)
        expect(kept == [second, first], "a repeated write stands in the history twice")
    seen.append(await authority.erase(user_id, ("tier",)))
    expect(await authority.debts(user_id), "a tier that may hold an erased user is not kept")
    erased = await authority.read(user_id)
    expect(erased.snapshot is None, "read() of an erased user gave a state")
    await authority.settle(authority.digest(user_id), seen[-1], "tier")
    expect(not await authority.debts(user_id), "settle() did not take the debt away")
    seen.append((await authority.write(first)).version)
    expect(seen == sorted(set(seen)), f"the versions {seen} do not grow")
    expect(await authority.covers(head), "changes after a fresh cursor are not known")
    found, more = set(), True
    while more:
        page = await authority.changes(head, 100)
        found |= {change.digest for change in page.items}
        head, more = page.cursor, page.more
    expect(authority.digest(user_id) in found, "changes() skipped a user that changed")


async def _late_write(suite: Suite) -> None:
    """A write that began before an erasure cannot bring the user back."""
    authority: Authority = suite.need(Authority, "versions")
    user_id = suite.user("late")
    await authority.write(suite.snapshot(user_id, 1))
    with call_begins(getattr(suite.store, "clock", SYSTEM_CLOCK)):
        # The erasure is another caller's, so it runs in a context without this write.
        await asyncio.create_task(_outside(authority.erase(user_id)))
        await authority.write(suite.snapshot(user_id, 2))
    got = await suite.store.get_latest(user_id)
    expect(got is None, "a write that began before an erasure brought the user back")


async def _outside(call: Awaitable[Any]) -> None:
    await call


async def _listing(suite: Suite) -> None:
    """Every user is listed."""
    listing: Enumerable = suite.need(Enumerable, "listing")
    ids = {(await suite.write(f"listed-{number}"))[0].user_id for number in range(7)}
    found: set[str] = set()
    async for page in pages(listing, 3):
        found.update(page.user_ids)
    expect(ids <= found, f"the listing left out {len(ids - found)} of {len(ids)} users")
    if suite.can_delete:
        gone = ids.pop()
        await suite.store.delete(gone)
        async for page in pages(listing, 100):
            expect(gone not in page.user_ids, "the listing shows a deleted user")


_CHECKS: Final = (
    _lets_others_run,
    _absent,
    _round_trip,
    _replaces,
    _apart,
    _bad_ids,
    _bad_snapshots,
    _many,
    _write_many,
    _history,
    _limits,
    _immutable,
    _deletes,
    _health,
    _at_once,
    _cancelled,
    _private,
    _versions,
    _late_write,
    _listing,
)
_READ_CHECKS: Final = (_absent, _bad_ids, _bad_snapshots, _health)
