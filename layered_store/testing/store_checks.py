"""The conformance suite: what must hold of everything that calls itself a store."""

from __future__ import annotations

import asyncio
import math
import operator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from layered_store.errors import (
    RejectedError,
    StoreError,
    UnsupportedError,
    ValidationError,
)
from layered_store.health import HealthReport, HealthStatus
from layered_store.interface import StateStore
from layered_store.options import Seconds, check_seconds
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
from layered_store.testing.store_abilities import late_write, listing, versions
from layered_store.testing.store_calls import at_once, cancelled, lets_others_run
from layered_store.testing.store_life import LIFE_CHECKS
from layered_store.testing.store_suite import Suite, in_time

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["check_store"]

_CHECK_SECONDS: Final = 30.0
_BATCH: Final = 120
_AT_ONCE: Final = 8


async def check_store(
    factory: Callable[[], StateStore | Awaitable[StateStore]], *, limit: Seconds = _CHECK_SECONDS
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
        limit: seconds of real time that one check may take, above 0. Once a check did not end, the
            others have a tenth of it.

    Raises:
        TypeError: ``factory`` does not return a StateStore, or its class of snapshots has a field
            without a default for which no value could be made up.
        ConfigError: ``limit`` is not above 0.
    """
    patience = Patience(check_seconds(limit, "limit", check_store))
    results: list[Result] = []
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


_CHECKS: Final = (
    lets_others_run,
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
    at_once,
    cancelled,
    _private,
    versions,
    late_write,
    listing,
)
_READ_CHECKS: Final = (_absent, _bad_ids, _bad_snapshots, _health)
