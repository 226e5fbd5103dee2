"""Stores from elsewhere: what they may answer, keep and change without harm to anybody.

A store of two methods is a complete one, and nobody checked it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from layered_store import (
    Bulkhead,
    Cached,
    CircuitBreaker,
    CorruptDataError,
    Fallback,
    Metrics,
    Ramp,
    ReadOnly,
    Retry,
    Shadow,
    StateSnapshot,
    StateStore,
    Timeout,
    UnavailableError,
    WriteThrough,
)
from layered_store.testing.scripted import Gate

MINE = StateSnapshot("u-1", 1)
OTHERS = StateSnapshot("u-2", 2)


class Foreign(StateStore):
    """Two methods over a dict, as anybody might write them."""

    def __init__(self, **kept: Any) -> None:
        self.kept = {key.replace("_", "-"): value for key, value in kept.items()}
        self.down = False
        self.gate: Gate | None = None

    async def upsert_latest(self, snapshot: StateSnapshot) -> None:
        if self.down:
            raise UnavailableError("planned")
        self.kept[snapshot.user_id] = snapshot

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        if self.gate is not None:
            await self.gate.pass_through()
        if self.down:
            raise UnavailableError("planned")
        return self.kept.get(user_id)

    async def get_latest_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        return {key: value for key in user_ids if (value := await self.get_latest(key))}


class Emptying(Foreign):
    """Takes what it is given out of its list, and fails once half way."""

    calls = 0

    async def upsert_latest_many(self, snapshots: Iterable[StateSnapshot]) -> None:
        batch = snapshots if isinstance(snapshots, list) else list(snapshots)
        self.calls += 1
        while batch:
            await self.upsert_latest(batch.pop())
            if self.calls == 1:
                raise UnavailableError("half way")

    async def get_latest_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        wanted = user_ids if isinstance(user_ids, list) else list(user_ids)
        self.calls += 1
        found = {}
        while wanted:
            found[user_id] = self.kept[user_id := wanted.pop()]
            if self.calls == 1:
                raise UnavailableError("half way")
        return found


@pytest.mark.parametrize("answer", [OTHERS, "text", {"user_id": "u-1"}, b"bytes", 7])
async def test_a_wrong_answer_of_the_system_of_record_is_an_error_for_that_user(
    answer: object,
) -> None:
    """Another user's record, or no snapshot at all, is never returned nor kept, and the other
    users of a batch are."""
    down = Foreign()
    down.down = True
    for build in (
        lambda record: Cached(record, negative_ttl=60),
        lambda record: WriteThrough(Foreign(), origin=record),
        lambda record: Cached(Foreign(), fallback=record),
        lambda record: Fallback(record, secondary=Foreign()),
        lambda record: Fallback(down, secondary=record),
        Retry,
        lambda record: Timeout(record, seconds=9),
        CircuitBreaker,
        lambda record: Bulkhead(record, max_in_flight=9),
        ReadOnly,
        lambda record: Metrics(record, name="users", registry=CollectorRegistry()),
        lambda record: Shadow(record, candidate=Foreign(), share=0.0),
        lambda record: Ramp(record, alternative=Foreign(), share=0.0),
        lambda record: Ramp(Foreign(), alternative=record, share=1.0),
    ):
        record = Foreign(u_1=answer, u_3=StateSnapshot("u-3", 3))
        stack: StateStore = build(record)
        for _ in range(2):
            assert set(await stack.get_latest_many(["u-1", "u-3"])) == {"u-3"}
            with pytest.raises(CorruptDataError, match="another user"):
                await stack.get_latest("u-1")
        record.kept["u-1"] = MINE
        assert await stack.get_latest("u-1") == MINE


@pytest.mark.parametrize("answer", [[MINE, OTHERS], ["text"], None])
async def test_a_history_that_is_not_the_users_is_an_error(answer: object) -> None:
    """No layer hands on another user's state."""

    class Telling(Foreign):
        async def get_history(self, user_id: str, limit: int) -> Any:  # noqa: ARG002
            return answer

    for build in (
        Cached,
        Retry,
        ReadOnly,
        lambda record: Metrics(record, name="users", registry=CollectorRegistry()),
        lambda record: Shadow(record, candidate=Foreign()),
        lambda record: Ramp(record, alternative=Foreign(), share=0.0),
        lambda record: Ramp(Foreign(), alternative=record, share=1.0),
        lambda record: Fallback(record, secondary=Foreign()),
    ):
        stack: StateStore = build(Telling())
        with pytest.raises(CorruptDataError, match="another user"):
            await stack.get_history("u-1", 10)


@pytest.mark.parametrize("answer", [OTHERS, "text", {"user_id": "u-1"}])
async def test_a_wrong_answer_of_a_cache_tier_is_a_miss(answer: object) -> None:
    """It is counted, the system of record answers, and the copy is replaced."""
    for read_many in (False, True):
        tier = Foreign(u_1=answer)
        stack = WriteThrough(tier, origin=Foreign(u_1=MINE))
        found = (await stack.get_latest_many(["u-1"])).get("u-1") if read_many else None
        assert (found or await stack.get_latest("u-1")) == MINE
        assert tier.kept["u-1"] == MINE
        failures = {each.labels: each.value for each in stack.samples() if each.labels}
        assert failures["read",] == 1


async def test_who_waits_for_a_batch_is_told_of_a_wrong_answer() -> None:
    """A lone reader that shares a batch's load gets the error; a batch that shares a lone reader's
    load leaves the user out."""
    record = Foreign(u_1=OTHERS, u_3=StateSnapshot("u-3", 3))
    stack = Cached(record, negative_ttl=60)
    record.gate = Gate()
    batch = asyncio.create_task(stack.get_latest_many(["u-1"]))
    await record.gate.entered.wait()
    alone = asyncio.create_task(stack.get_latest("u-1"))
    await asyncio.sleep(0)
    record.gate.open()
    assert await batch == {}
    with pytest.raises(CorruptDataError):
        await alone
    record.gate = Gate()
    alone = asyncio.create_task(stack.get_latest("u-1"))
    await record.gate.entered.wait()
    gate, record.gate = record.gate, None
    batch = asyncio.create_task(stack.get_latest_many(["u-1", "u-3"]))
    await asyncio.sleep(0)
    gate.open()
    assert set(await batch) == {"u-3"}
    with pytest.raises(CorruptDataError):
        await alone


async def test_a_store_that_empties_the_list_it_is_given_loses_nothing() -> None:
    """A retry repeats the whole batch, not what the first attempt left of it, and a write-through
    copies all of it."""
    record = Emptying()
    stack = Retry(Cached(Foreign(), fallback=record), base_delay=0)
    batch = [MINE, OTHERS]
    await stack.upsert_latest_many(batch)
    assert record.kept == {"u-1": MINE, "u-2": OTHERS}
    assert batch == [MINE, OTHERS]
    record.calls = 0
    for reader in (Retry(record, base_delay=0), Retry(Cached(record), base_delay=0)):
        record.calls = 0
        assert set(await reader.get_latest_many(["u-1", "u-2"])) == {"u-1", "u-2"}


async def test_a_health_check_that_cancels_itself_is_an_unhealthy_answer() -> None:
    """Such as a driver's task that ended: nobody who asked was cancelled, so nobody is told so."""

    class Sick(Foreign):
        async def health_check(self) -> bool:
            raise asyncio.CancelledError

    stack = Cached(Sick())
    assert await stack.health_check() is False
    assert "cancelled" in (await stack.health_report()).to_json()
