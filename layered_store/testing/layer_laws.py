"""The laws of layers: what must hold of everything that wraps a store."""

from __future__ import annotations

import asyncio
import inspect
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from layered_store.coherence.contract import Authority
from layered_store.errors import ClosedError, RejectedError, StoreError, UnsupportedError
from layered_store.health import HealthReport, HealthStatus
from layered_store.interface import Op, StateStore
from layered_store.layer import Layer
from layered_store.options import Seconds, check_seconds
from layered_store.snapshot import StateSnapshot
from layered_store.stack import children_of, replace, walk
from layered_store.stores.memory import MemoryStore
from layered_store.testing.error_laws import ERROR_LAWS, ERROR_LAWS_OF_READS, has_branches
from layered_store.testing.law_bench import (
    READS,
    WRITES,
    Bench,
    PlainInner,
    VersionedInner,
    end,
    settle,
)
from layered_store.testing.report import (
    Broken,
    Patience,
    Report,
    Result,
    Unneeded,
    build,
    expect,
    left_since,
    title_of,
)
from layered_store.testing.store_checks import check_store

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["check_layer"]

_LAW_SECONDS: Final = 30.0
_CANCELLED: Final = 128


async def check_layer(
    factory: Callable[[StateStore], StateStore | Awaitable[StateStore]]
    | Callable[[], StateStore | Awaitable[StateStore]],
    *,
    limit: Seconds = _LAW_SECONDS,
) -> Report:
    """Check that the layer which ``factory`` builds keeps the laws of layers.

    First it must be a store like any other (:func:`check_store`). Then it is put around stores
    that fail, hang, answer late or belong to another class, with versions and without: it must
    forward every operation, health and ``aclose``, add nothing and swallow nothing, let
    cancellation through, leave no task, and show nobody an older state. Several layers at once
    make a good test as well. As with :func:`check_store`, a finding is never raised::

        report = await check_layer(lambda inner: MyLayer(inner, option=3))
        assert report.ok, str(report)

    Args:
        factory: builds the layer around the store that it is given; may be a coroutine function.
            For a layer with several stores, the one that holds the truth:
            ``lambda inner: WriteThrough(MemoryStore(), origin=inner)``. A function without a
            parameter builds layers around a store of its own, whose place is taken by
            :func:`layered_store.replace`; these must be dataclasses.
        limit: seconds of real time that one law may take, above 0. Once a law did not end, the
            others have a tenth of it.

    Raises:
        TypeError: ``factory`` is no function, or does not return a StateStore.
        ConfigError: ``limit`` is not above 0.
    """
    patience = Patience(check_seconds(limit, "limit", check_layer))
    if not callable(factory):
        raise TypeError(
            "the factory must be a function that builds a layer around a store, such as"
            f" `lambda inner: MyLayer(inner)`, not a {type(factory).__name__}"
        )
    factory = _around_given(factory)
    as_store = await check_store(lambda: build(factory, MemoryStore()), limit=limit)
    results = [
        Result(f"as a store: {result.check}", result.outcome, result.message)
        for result in as_store.results
    ]
    read_only = "writes" not in as_store.abilities
    for law in (*_READ_LAWS, *_LAWS):
        title = title_of(law)
        if read_only and law in _LAWS:
            results.append(Result(title, "skipped", "it refuses writes"))
        else:
            results.append(await _both(title, law, factory, patience, read_only=read_only))
    if not read_only:
        title = title_of(_check_subclass)
        results.append(await patience.check(title, partial(_check_subclass, factory)))
    return Report(as_store.subject, as_store.abilities, tuple(results))


def _around_given(factory: Callable[..., Any]) -> Callable[[StateStore], Any]:
    """Return a factory that takes the store inside, whether the given one does or not."""
    try:
        inspect.signature(factory).bind(None)
    except TypeError:
        pass
    except ValueError:  # a builtin that does not tell
        return factory
    else:
        return factory

    async def around(inner: StateStore) -> StateStore:
        stack = await build(factory)
        if not isinstance(stack, StateStore):
            raise TypeError(f"the factory must return a StateStore, not {type(stack).__name__}")
        end = stack
        while below := children_of(end):
            end = below.get("origin") or below.get("inner") or next(iter(below.values()))
        return replace(stack, end, inner)

    return around


async def _both(
    title: str,
    law: Callable[[Bench], Awaitable[None]],
    factory: Any,
    patience: Patience,
    *,
    read_only: bool,
) -> Result:
    """Try a law around a store with versions and around one without; tell the first failure."""
    results = []
    for inner in (VersionedInner(), PlainInner()):
        before = asyncio.all_tasks()
        layer, twin = await build(factory, inner), await build(factory, inner)
        bench = Bench(layer, inner, inner if read_only else twin)
        result = await patience.check(title, partial(law, bench))
        inner.law.behave()
        closed = await patience.check("", layer.aclose)
        await patience.check("", twin.aclose)
        await settle()
        left = await left_since(before)
        for task in left:
            task.cancel()
        if result.outcome == "passed" and closed.outcome == "failed":
            result = Result(title, "failed", f"aclose() {closed.message}")
        elif result.outcome == "passed" and left:
            result = Result(title, "failed", f"it left {len(left)} tasks running after aclose()")
        if result.outcome == "failed":
            return result
        results.append(result)
    return next((result for result in results if result.outcome == "passed"), results[0])


# Forwarding


async def _reads_reach(bench: Bench) -> None:
    """Reads give what the store inside holds."""
    for number in range(5):
        await bench.behind.upsert_latest(bench.state(f"r-{number}", number))
    for number in range(2):
        got = await bench.layer.get_latest(f"r-{number}")
        expect(
            got == bench.state(f"r-{number}", number),
            "get_latest() does not give what the store inside holds; forward it",
        )
    many = await bench.layer.get_latest_many([f"r-{number}" for number in range(6)])
    expect(
        many == {f"r-{number}": bench.state(f"r-{number}", number) for number in range(5)},
        f"get_latest_many() found {len(many)} of the 5 users that the store inside holds",
    )


async def _writes_reach(bench: Bench) -> None:
    """Writes reach the store inside, each item of a batch as well."""
    await bench.layer.upsert_latest(bench.state("w-0", 3))
    expect(
        Op.UPSERT_LATEST in bench.law.seen or Op.UPSERT_LATEST_MANY in bench.law.seen,
        "upsert_latest() did not reach the store inside",
    )
    held = await bench.behind.get_latest("w-0")
    expect(held == bench.state("w-0", 3), "upsert_latest() did not reach the store inside")
    batch = [bench.state(f"w-{number}", number) for number in range(1, 9)]
    await bench.layer.upsert_latest_many(batch)
    held_many = await bench.behind.get_latest_many([state.user_id for state in batch])
    expect(
        held_many == {state.user_id: state for state in batch},
        f"upsert_latest_many() of {len(batch)} left {len(held_many)} in the store inside",
    )


async def _history_reaches(bench: Bench) -> None:
    """The history is that of the store inside."""
    states = [bench.state("h-1", number) for number in range(4)]
    for state in states:
        await bench.behind.upsert_latest(state)
    kept = await bench.layer.get_history("h-1", 10)
    expect(
        kept == states[::-1],
        f"get_history() gave {len(kept)} states where the store inside has 4, or in another"
        " order; forward it (Layer does)",
    )
    expect(
        await bench.layer.get_history("h-1", 2) == states[:1:-1],
        "get_history() does not hand on the limit",
    )


async def _delete_reaches(bench: Bench) -> None:
    """A delete reaches the store inside, and nothing shows the user afterwards."""
    state = bench.state("d-1", 1)
    await bench.layer.upsert_latest(state)
    await bench.layer.get_latest("d-1")
    await bench.layer.get_history("d-1", 5)
    try:
        await bench.layer.delete("d-1")
    except UnsupportedError as exc:
        raise Broken(
            "delete() says unsupported although the store inside can; forward it (Layer does)"
        ) from exc
    expect(await bench.behind.get_latest("d-1") is None, "delete() did not reach the store inside")
    expect(await bench.behind.get_history("d-1", 5) == [], "delete() left the history inside")
    expect(await bench.layer.get_latest("d-1") is None, "a read after delete() shows the user")
    expect(await bench.layer.get_history("d-1", 5) == [], "a history after delete() is not []")


async def _exact(bench: Bench) -> None:
    """Missing is None and nothing else; a state that counts as false is a state."""
    got = await bench.layer.get_latest("none")
    expect(got is None, f"an absent user gave {got!r}, not None")


def _tree(report: HealthReport) -> list[HealthReport]:
    return [report, *(each for child in report.children for each in _tree(child))]


async def _health_shows(bench: Bench) -> None:
    """Its health is not better than that of the store inside, which stands in the report."""
    report = await bench.layer.health_report()
    expect(report.status is HealthStatus.HEALTHY, "it is not healthy over a healthy store")
    expect(
        bench.inner.name in [each.name for each in _tree(report)],
        "the health report does not hold the report of the store inside; forward health_report()",
    )
    bench.law.healthy = False
    report = await bench.layer.health_report()
    expect(
        report.status is not HealthStatus.HEALTHY,
        "the store inside is unhealthy and it says healthy; forward health_report()",
    )
    expect(
        report.status is HealthStatus.UNHEALTHY or has_branches(bench.layer),
        f"the store inside is unhealthy and it says {report.status.value}; a layer has the status"
        " of what it wraps",
    )
    expect(
        any(each.message for each in _tree(report)),
        "it is not healthy, and no message in the report says why",
    )
    well = await bench.layer.health_check()
    expect(
        well is (report.status is not HealthStatus.UNHEALTHY),
        f"health_check() says {well} and health_report() says {report.status.value}",
    )


async def _closes_inner(bench: Bench) -> None:
    """It opens and closes the store inside, and refuses calls afterwards."""
    await bench.layer.open()
    expect(bench.law.opened, "open() did not reach the store inside")
    state = bench.state("c-1", 1)
    await bench.layer.upsert_latest(state)
    await bench.layer.get_latest("c-1")
    await bench.layer.aclose()
    expect(bench.law.closed, "aclose() did not close the store inside; forward it (Layer does)")
    await bench.layer.aclose()
    for op, call in bench.calls("c-1").items():
        try:
            await call()
        except ClosedError:
            continue
        except Exception as exc:
            message = f"{op.value}() after aclose() raised {type(exc).__name__}, not ClosedError"
            raise Broken(message) from exc
        raise Broken(f"{op.value}() after aclose() did not raise ClosedError")


async def _stands_in_stack(bench: Bench) -> None:
    """The store inside is found by walking the stack, and its class of snapshots is told."""
    found = [place.store for place in walk(bench.layer)]
    expect(bench.inner in found, "children() does not name the store inside")
    expect(
        bench.layer.snapshot_type is bench.inner.snapshot_type,
        "snapshot_type is not that of the store inside; forward it (Layer does)",
    )
    if bench.layer.capability(Authority) is not None:
        expect(
            bench.inner.capability(Authority) is not None,
            "it claims versions that the store inside does not have",
        )


async def _ability_agrees(bench: Bench) -> None:
    """What is written through an ability shows in reads."""
    authority = bench.layer.capability(Authority)
    if authority is None:
        raise Unneeded("it offers no versions")
    await authority.write(bench.state("a-1", 1))
    await bench.layer.get_latest("a-1")
    await authority.write(bench.state("a-1", 2))
    got = await bench.layer.get_latest("a-1")
    expect(
        got == bench.state("a-1", 2),
        "what was written through capability(Authority) does not show in get_latest(); a layer"
        " that changes reads must not offer what is inside past itself",
    )
    await authority.erase("a-1")
    expect(
        await bench.layer.get_latest("a-1") is None,
        "what was erased through capability(Authority) still shows in get_latest()",
    )


# Cancellation


async def _passes_cancellation(bench: Bench) -> None:
    """A cancelled call ends as cancelled, and the call below it as well."""
    await bench.behind.upsert_latest(bench.state("x-1", 1))
    for op in Op:
        bench.law.hold(*Op)
        task = asyncio.ensure_future(bench.calls("x-1")[op]())
        if not await bench.reached(task):
            bench.law.behave()
            await end(task, f"{op.value}()")
            continue
        task.cancel()
        await end(task, f"a cancelled {op.value}()")
        expect(
            task.cancelled(),
            f"a cancelled {op.value}() did not end as cancelled; let CancelledError through",
        )
        await settle()
        expect(
            bench.law.inside == 0, f"a cancelled {op.value}() left its call running in the store"
        )
        bench.law.behave()
    # As many as fill a small limit, if each leaves something behind.
    for number in range(_CANCELLED):
        bench.law.hold(*READS)
        task = asyncio.ensure_future(bench.layer.get_latest(f"x-2-{number}"))
        await bench.reached(task)
        task.cancel()
        await end(task, "a cancelled get_latest()")
        bench.law.behave()
    state = bench.state("x-2", 2)
    try:
        await bench.layer.upsert_latest(state)
    except StoreError as exc:
        raise Broken(
            f"after {_CANCELLED} cancelled calls it refuses the next one ({type(exc).__name__});"
            " give back in `finally` what a call took"
        ) from exc
    got = await bench.layer.get_latest("x-2")
    expect(got == state, "after cancelled calls it does not work as before")


async def _readers_apart(bench: Bench) -> None:
    """A cancelled reader neither cancels nor fails another one."""
    state = bench.state("x-3", 1)
    await bench.behind.upsert_latest(state)
    bench.law.hold(*READS)
    first = asyncio.ensure_future(bench.layer.get_latest("x-3"))
    if not await bench.reached(first):
        bench.law.behave()
        await end(first, "get_latest()")
        raise Unneeded("a read does not reach the store inside")
    second = asyncio.ensure_future(bench.layer.get_latest("x-3"))
    await settle()
    first.cancel()
    await settle()
    bench.law.behave()
    got = await end(second, "a read beside a cancelled one")
    if not second.cancelled() and isinstance(second.exception(), RejectedError):
        await end(first, "a cancelled read")
        raise Unneeded("it takes one read at a time")
    expect(
        got == state,
        "a reader that was cancelled took another one with it, which asked for the same user",
    )
    await end(first, "a cancelled read")


# Order


async def _no_late_fill(bench: Bench) -> None:
    """A read that began before a write or delete leaves nothing old behind."""
    for change in (Op.UPSERT_LATEST, Op.UPSERT_LATEST_MANY, Op.DELETE):
        for read in (*READS, Op.GET_HISTORY):
            await _late_fill(bench, read, change)
            await _late_fill(bench, read, change, during=True)
            if change is not Op.DELETE:
                await _late_fill(bench, read, change, absent=True)
                await _late_fill(bench, read, change, absent=True, during=True)


async def _late_fill(
    bench: Bench, read: Op, change: Op, *, absent: bool = False, during: bool = False
) -> None:
    """Let a read begin before a write, or while it has not yet taken effect, and end after it."""
    user_id = f"o-{change.value}-{read.value}-{absent:d}{during:d}"
    if not absent:
        await bench.behind.upsert_latest(bench.state(user_id, 1))
    reads, read_call = (*READS, Op.GET_HISTORY), bench.calls(user_id)[read]
    bench.law.hold(*(WRITES if during else reads), before=during)
    first = asyncio.ensure_future(bench.calls(user_id)[change]() if during else read_call())
    reached = await bench.reached(first)
    second = asyncio.ensure_future(read_call() if during else bench.calls(user_id)[change]())
    await settle()
    if reached and not second.done():
        await asyncio.wait({second}, timeout=0.05)  # it may wait for the first
    bench.law.behave()
    reading, writing = (second, first) if during else (first, second)
    await end(reading, f"{read.value}()")
    await end(writing, f"{change.value}()")
    if not writing.cancelled() and isinstance(writing.exception(), RejectedError):
        return  # it takes one call at a time
    wanted = [] if change is Op.DELETE else [bench.state(user_id, 7)]
    latest = await bench.layer.get_latest(user_id)
    newest = (await bench.layer.get_history(user_id, 5))[:1]
    expect(
        ([] if latest is None else [latest]) == newest == wanted,
        f"a {read.value}() that began {'while' if during else 'before'} {change.value}()"
        f"{' was under way' if during else ''} put"
        f" {'the absence' if absent else 'the older state'} back; keep what was read only if"
        " no write began or ended meanwhile",
    )


async def _reads_follow_writes(bench: Bench) -> None:
    """A read after a write gives what was written, whatever was read before."""
    layer = bench.layer
    one, many = Op.UPSERT_LATEST, Op.UPSERT_LATEST_MANY
    # Each kind of write first, since the absence may be kept; then the state of before again, which
    # is a write although it equals one.
    for user_id, writes in (("s-1", (one, many, one)), ("s-2", (many, one, many))):
        expect(await layer.get_latest(user_id) is None, "an absent user is there")
        expect(await layer.get_history(user_id, 5) == [], "an absent user has a history")
        for number, write in enumerate(writes):
            state = bench.state(user_id, number % 2)
            if write is one:
                await layer.upsert_latest(state)
            else:
                await layer.upsert_latest_many([bench.state("s-3"), state])
            for _ in range(2):
                got = await layer.get_latest(user_id)
                expect(got == state, f"a read after {write.value}() gives an older state")
                found = await layer.get_latest_many([user_id])
                expect(found == {user_id: state}, "get_latest_many() disagrees with get_latest()")
                kept = await layer.get_history(user_id, 5)
                expect(
                    kept[:1] == [state] and len(kept) == number + 1,
                    f"a history after {write.value}() does not begin with what was written",
                )
        await layer.upsert_latest(state)
        kept = await layer.get_history(user_id, 5)
        expect(
            kept[:2] == [state, state],
            "a write that equals the one before is missing in the history; forward every write",
        )
        await layer.delete(user_id)
        found = await layer.get_latest_many([user_id, "none"])
        expect(found == {}, "a batch shows a deleted user")
        await layer.upsert_latest(state)
        got = await layer.get_latest(user_id)
        expect(got == state, "a deleted user cannot be written again with the state of before")


async def _writes_at_once(bench: Bench) -> None:
    """Of two writes of one user at the same time none is lost."""
    for write in (Op.UPSERT_LATEST, Op.UPSERT_LATEST_MANY):
        user_id = f"b-{write.value}"
        bench.law.hold(Op.UPSERT_LATEST, Op.UPSERT_LATEST_MANY)
        first = asyncio.ensure_future(bench.layer.upsert_latest(bench.state(user_id, 1)))
        await bench.reached(first)
        second = asyncio.ensure_future(bench.calls(user_id)[write]())
        await settle()
        bench.law.behave()
        await end(first, "upsert_latest()")
        await end(second, f"{write.value}() beside another write")
        done = [
            state
            for task, state in ((first, bench.state(user_id, 1)), (second, bench.state(user_id, 7)))
            if not task.cancelled() and task.exception() is None
        ]
        kept = await bench.behind.get_history(user_id, 5)
        expect(
            all(state in kept for state in done),
            f"an upsert_latest() and an {write.value}() of one user at the same time both returned"
            " normally, and only one of them reached the store inside",
        )


async def _repeats_count_once(bench: Bench) -> None:
    """A write whose answer was lost and that the layer repeats stands in the history once."""
    if not isinstance(bench.inner, VersionedInner):
        raise Unneeded("the store inside cannot tell a repeated write from another one")
    for op in (Op.UPSERT_LATEST, Op.UPSERT_LATEST_MANY):
        user_id = f"m-{op.value}"
        bench.law.fail(Op.UPSERT_LATEST, Op.UPSERT_LATEST_MANY, after=True, once=True)
        try:
            await bench.calls(user_id)[op]()
        except StoreError:
            continue  # it is its caller's to repeat
        finally:
            bench.law.behave()
        kept = await bench.behind.get_history(user_id, 5)
        expect(
            len(kept) == 1,
            f"{op.value}() was repeated after it took effect and is in the history {len(kept)}"
            " times; repeat within AroundLayer.around, where all attempts count as one write",
        )


class _Falsy(StateSnapshot):
    """A state that counts as false."""

    mood: str = ""

    def __bool__(self) -> bool:
        return False


async def _check_subclass(factory: Any) -> None:
    """States of a class of the application's own come back whole, also one that counts as false."""
    for inner in (VersionedInner(_Falsy), PlainInner(_Falsy)):
        try:
            layer = await build(factory, inner)
        except ValueError as exc:
            raise Unneeded("its other stores keep another class of snapshots") from exc
        try:
            expect(
                layer.snapshot_type is _Falsy,
                "snapshot_type is not that of the store inside; forward it (Layer does)",
            )
            state = _Falsy(user_id="t-1", mood="calm", axes={"a": 0.0})
            await layer.upsert_latest(state)
            for _ in range(2):
                got = await layer.get_latest("t-1")
                expect(
                    got is not None and got == state and got.mood == "calm",
                    "a state that counts as false was taken for a missing one, or lost a field;"
                    " compare with `is None`",
                )
            many = await layer.get_latest_many(["t-1"])
            expect(many == {"t-1": state}, "a batch lost a state that counts as false, or a field")
            history = await layer.get_history("t-1", 5)
            expect(
                history == [state],
                "the history lost a state that counts as false, or one of its fields",
            )
            batch = [_Falsy(user_id=f"t-{number}", mood="glad") for number in (2, 3)]
            await layer.upsert_latest_many(batch)
            many = await layer.get_latest_many(["t-2", "t-3"])
            expect(
                many == {each.user_id: each for each in batch},
                "a batch of writes lost a state that counts as false, or one of its fields",
            )
        finally:
            await layer.aclose()


async def _whole_interface(bench: Bench) -> None:
    """It answers every operation itself or inherits from Layer, which forwards it."""
    if isinstance(bench.layer, Layer):
        return
    missing = [
        name
        for name in ("delete", "get_history", "health_report", "aclose", "open", "children")
        if getattr(type(bench.layer), name) is getattr(StateStore, name)
    ]
    expect(
        not missing,
        f"it inherits {', '.join(missing)} from StateStore, whose defaults hide the store inside;"
        " subclass Layer",
    )


_READ_LAWS: Final = (
    _reads_reach,
    _history_reaches,
    _exact,
    _health_shows,
    _stands_in_stack,
    *ERROR_LAWS_OF_READS,
    _readers_apart,
    _whole_interface,
)
_LAWS: Final = (
    _writes_reach,
    _delete_reaches,
    _closes_inner,
    _ability_agrees,
    *ERROR_LAWS,
    _passes_cancellation,
    _no_late_fill,
    _reads_follow_writes,
    _writes_at_once,
    _repeats_count_once,
)
