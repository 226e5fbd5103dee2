"""The laws of layers about errors: what fails inside comes out as what it is, and is not kept."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from layered_store.errors import (
    CircuitOpenError,
    CorruptDataError,
    ErasureIncompleteError,
    RejectedError,
    StoreError,
    StoreTimeoutError,
    UnavailableError,
)
from layered_store.interface import Op, StateStore
from layered_store.stack import children_of, walk
from layered_store.testing.law_bench import READS, WRITES, Bench, soon
from layered_store.testing.report import Broken, Unneeded, error_texts, expect, watched_logs

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ERROR_LAWS", "ERROR_LAWS_OF_READS", "has_branches"]

_NOT_FOUND: Final = (*READS, Op.GET_HISTORY)
_TEXT: Final = "out of order, for the check"


def has_branches(layer: StateStore) -> bool:
    """Tell whether the layer has another store that may answer."""
    return any(len(children_of(place.store)) > 1 for place in walk(layer))


def _need_no_branches(bench: Bench) -> None:
    if has_branches(bench.layer):
        raise Unneeded("it has another store that may answer")


def _failures(ops: tuple[Op, ...], *errors: StoreError) -> Iterator[tuple[Op, StoreError]]:
    # A timeout is an UnavailableError too, so whoever swallows either is found.
    for error in (StoreTimeoutError(_TEXT, layer="inner"), *errors):
        for op in ops:
            yield op, error


async def _failed_writes_raise(bench: Bench) -> None:
    """A write that failed inside is never reported as done."""
    await bench.behind.upsert_latest(bench.state("f-1", 1))
    for op, error in _failures(WRITES, StoreError(_TEXT, layer="inner")):
        bench.law.fail(*WRITES, error=error)
        try:
            await bench.calls("f-1")[op]()
        except StoreError:
            continue
        raise Broken(
            f"{op.value}() failed in the store inside and returned normally; let the"
            f" {type(error).__name__} through"
        )


async def _failed_reads_raise(bench: Bench) -> None:
    """A read that failed inside never says that there is no such user."""
    _need_no_branches(bench)
    await bench.behind.upsert_latest(bench.state("f-2", 1))
    for op, error in _failures(_NOT_FOUND, CorruptDataError(_TEXT, layer="inner")):
        bench.law.fail(*_NOT_FOUND, error=error)
        try:
            got = await bench.calls("f-2")[op]()
        except StoreError:
            continue
        expect(
            got,
            f"{op.value}() failed in the store inside and says that there is no such user; let the"
            f" {type(error).__name__} through",
        )


async def _comes_out_as_it_is(bench: Bench) -> None:
    """An error inside comes out as what it is: of its class, retryable or not, sure or not."""
    _need_no_branches(bench)
    unsure = UnavailableError(_TEXT, layer="inner", outcome_unknown=True)
    pending = ErasureIncompleteError(_TEXT, layer="inner", pending=("a tier",))
    for number, (ops, error) in enumerate(
        (
            (_NOT_FOUND, CorruptDataError(_TEXT, layer="inner")),
            ((*READS, *WRITES, Op.GET_HISTORY), UnavailableError(_TEXT, layer="inner")),
            (WRITES, StoreError(_TEXT, layer="inner")),
            ((Op.UPSERT_LATEST, Op.UPSERT_LATEST_MANY), unsure),
            ((Op.DELETE,), pending),
        )
    ):
        for op in ops:
            user_id = f"e-{number}-{op.value}"
            await bench.behind.upsert_latest(bench.state(user_id, 1))
            bench.law.fail(*ops, error=error)
            try:
                await bench.calls(user_id)[op]()
            except RejectedError:
                continue  # a breaker may have seen enough
            except StoreError as exc:
                _is_like(exc, error, op)
            else:
                expect(
                    not op.is_write,
                    f"{op.value}() failed in the store inside and returned normally; let the"
                    f" {type(error).__name__} through",
                )
            finally:
                bench.law.behave()


def _is_like(exc: StoreError, error: StoreError, op: Op) -> None:
    kind = type(error).__name__
    what = f"a {kind} from {op.value}() of the store inside came out"
    expect(
        isinstance(exc, type(error)), f"{what} as {type(exc).__name__}; let it through as it is"
    )
    expect(
        exc.retryable or not error.retryable, f"{what} as one that is not retryable; keep that"
    )
    expect(error.retryable or not exc.retryable, f"{what} as retryable, which it is not; keep that")
    expect(
        exc.outcome_unknown or not error.outcome_unknown,
        f"{what} without outcome_unknown, so its caller takes the write for not done; keep that",
    )
    if isinstance(error, ErasureIncompleteError) and isinstance(exc, ErasureIncompleteError):
        expect(exc.pending, f"{what} without the names of the tiers in pending; keep them")


async def _not_repeated(bench: Bench) -> None:
    """What cannot succeed is not repeated: an error that is not retryable, an open circuit."""
    _need_no_branches(bench)
    for error in (StoreError(_TEXT, layer="inner"), CircuitOpenError(retry_after=60.0)):
        for op in (Op.GET_LATEST, Op.UPSERT_LATEST, Op.DELETE):
            bench.law.fail(op, error=error)
            bench.law.seen.clear()
            try:
                await bench.calls(f"n-{op.value}")[op]()
            except StoreError:
                count = bench.law.seen.count(op)
                expect(
                    count <= 1,
                    f"{op.value}() raised {type(error).__name__} in the store inside and was called"
                    f" {count} times; repeat only what has `retryable` set, and no open circuit",
                )


async def _private_failures(bench: Bench) -> None:
    """A failure shows neither a user id nor a state, in its text or in what is logged."""
    user_id = "SECRET-user-of-the-check"
    await bench.behind.upsert_latest(bench.state(user_id, 1))
    bench.law.fail(*_NOT_FOUND, *WRITES)
    for op, call in bench.calls(user_id).items():
        texts = []
        with watched_logs() as logged:
            try:
                await call()
            except StoreError as exc:
                texts = error_texts(exc)
        expect(
            not any(user_id in text for text in texts),
            f"the error of a failed {op.value}() shows the user id; StoreError takes it as"
            " user_id=, which is not in its text",
        )
        expect(
            not any(user_id in text for text in logged),
            f"a failed {op.value}() logs the user id; leave it out",
        )


async def _asked_anew(bench: Bench) -> None:
    """A read that failed is not remembered: the next one asks again."""
    state = bench.state("g-1", 1)
    await bench.behind.upsert_latest(state)
    bench.law.fail(*_NOT_FOUND)
    for op in _NOT_FOUND:
        try:
            await bench.calls("g-1")[op]()
        except StoreError:
            pass
    bench.law.behave()

    async def found() -> bool:
        try:
            return await bench.layer.get_latest("g-1") == state
        except RejectedError:
            return True  # it takes its time before it asks again, and says so
        except StoreError:
            return False

    expect(
        await soon(found),
        "a read that failed inside is answered as before although the store inside works again;"
        " keep no errors",
    )


async def _nothing_older(bench: Bench) -> None:
    """While reads fail inside, nobody is shown a state from before the last write or delete."""
    _need_no_branches(bench)
    for change in WRITES:
        user_id = f"k-{change.value}"
        await bench.behind.upsert_latest(bench.state(user_id, 1))
        try:
            await bench.layer.get_latest(user_id)
            await bench.layer.get_latest_many([user_id])
            await bench.calls(user_id)[change]()
        except RejectedError:
            continue
        bench.law.fail(*_NOT_FOUND)
        try:
            got = await bench.layer.get_latest(user_id)
        except StoreError:
            continue
        finally:
            bench.law.behave()
        wanted = None if change is Op.DELETE else bench.state(user_id, 7)
        expect(
            got == wanted,
            f"while the store inside fails, a read shows the state from before {change.value}();"
            " forget what is kept of a user with every write",
        )


async def _unknown_write_hidden(bench: Bench) -> None:
    """After a write that took effect and failed or was cancelled, reads show it at once or soon."""
    upserts = (Op.UPSERT_LATEST, Op.UPSERT_LATEST_MANY)
    for op in WRITES:
        for cancelled in (False, True):
            user_id = f"f-3-{op.value}-{cancelled:d}"
            await bench.behind.upsert_latest(bench.state(user_id, 1))
            try:
                await bench.layer.get_latest(user_id)
            except RejectedError:
                continue  # a breaker has seen enough
            ops = (op,) if op is Op.DELETE else upserts
            if cancelled:
                bench.law.hold(*ops)
                task = asyncio.ensure_future(bench.calls(user_id)[op]())
                await bench.reached(task)
                task.cancel()
                await asyncio.wait({task})
            else:
                # Once, since a breaker could open and another store show what it has.
                bench.law.fail(*ops, after=True, once=True)
                try:
                    await bench.calls(user_id)[op]()
                except StoreError:
                    pass
            bench.law.behave()
            wanted = None if op is Op.DELETE else bench.state(user_id, 7)

            async def shown(user_id: str = user_id, wanted: object = wanted) -> bool:
                try:
                    return await bench.layer.get_latest(user_id) == wanted
                except StoreError:
                    return True  # it refuses for now, which is no older state

            expect(
                await soon(shown),  # a shared tier is repaired soon
                f"{'a cancelled' if cancelled else 'a failed'} {op.value}() took effect inside, its"
                " answer was lost, and reads still show the state before it; forget what is kept"
                " of a user when a write fails",
            )


ERROR_LAWS_OF_READS: Final = (_failed_writes_raise, _failed_reads_raise)
ERROR_LAWS: Final = (
    _comes_out_as_it_is,
    _not_repeated,
    _private_failures,
    _asked_anew,
    _nothing_older,
    _unknown_write_hidden,
)
