"""Recorded: every call, in order, with how it ended."""

from __future__ import annotations

import asyncio

import pytest

from layered_store import (
    Cached,
    ConfigError,
    MemoryStore,
    StateSnapshot,
    UnavailableError,
    ValidationError,
)
from layered_store.coherence.contract import Authority
from layered_store.testing import Faults, Recorded, Scripted
from layered_store.testing.scripted import Gate

STATE = StateSnapshot("user-1", axes={"a": 0.5})


async def test_every_operation() -> None:
    """Operation, arguments, users, result and outcome of each call are kept in order."""
    store = Recorded(MemoryStore())
    await store.upsert_latest(STATE)
    await store.upsert_latest_many(iter([STATE]))
    await store.get_latest("user-1")
    await store.get_latest_many(iter(["user-1", "u-2"]))
    await store.get_history("user-1", 3)
    await store.delete("user-1")
    assert store.operations == [
        "upsert_latest",
        "upsert_latest_many",
        "get_latest",
        "get_latest_many",
        "get_history",
        "delete",
    ]
    assert {call.outcome for call in store.calls} == {"ok"}
    assert [call.user_ids for call in store.calls][:4] == [
        ("user-1",),
        ("user-1",),
        ("user-1",),
        ("user-1", "u-2"),
    ]
    assert store.of("get_latest")[0].result == STATE
    assert store.of("get_history")[0].args == ("user-1", 3)
    assert store.count() == 6
    assert store.count("delete") == 1
    store.clear()
    assert store.calls == []


async def test_failures() -> None:
    """An error is kept with its class, a cancelled call as cancelled, and both pass through."""
    faults = Faults(MemoryStore())
    store = Recorded(faults)
    faults.fail()
    with pytest.raises(UnavailableError):
        await store.get_latest("u-1")
    with pytest.raises(ValidationError):
        await store.get_latest("no id")
    faults.fail(fault="hang")
    task = asyncio.create_task(store.get_latest("u-1"))
    await asyncio.sleep(0)
    assert store.calls[-1].outcome == "running"
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [call.outcome for call in store.calls] == [
        "UnavailableError",
        "ValidationError",
        "cancelled",
    ]
    assert [type(error) for error in store.errors] == [UnavailableError, ValidationError]


async def test_sees_hits_of_a_cache_below() -> None:
    """A hit below is not answered past it."""
    store = Recorded(Cached(MemoryStore()))
    await store.upsert_latest(STATE)
    for _ in range(3):
        assert await store.get_latest("user-1") == STATE
    assert store.count("get_latest") == 3


async def test_capabilities_count() -> None:
    """A call through an ability counts as the operation that it stands for."""
    store = Recorded(MemoryStore())
    authority = store.capability(Authority)
    assert authority is not None
    await authority.write(STATE)
    await authority.read("user-1")
    await authority.erase("user-1")
    assert store.operations == ["upsert_latest", "get_latest", "delete"]


async def test_order_is_that_of_the_begin() -> None:
    """Calls at the same time stand in the order in which they began."""
    gate = Gate()
    store = Recorded(Scripted(gate))
    slow = asyncio.create_task(store.get_latest("slow"))
    await gate.entered.wait()
    await store.get_latest("fast")
    gate.open()
    await slow
    assert [call.user_ids for call in store.calls] == [("slow",), ("fast",)]


def test_misspelt_operation() -> None:
    """It is refused: that it was never called would hold of anything."""
    store = Recorded(MemoryStore())
    assert store.count("get_latest") == 0
    for look in (store.count, store.of):
        with pytest.raises(ConfigError, match=r"Recorded\.operation: .*mean 'get_latest'"):
            look("get_lates")


async def test_private() -> None:
    """Neither the text nor the repr of a call shows a whole user id or a value."""
    store = Recorded(MemoryStore())
    await store.upsert_latest(STATE)
    await store.get_latest("user-1")
    assert str(store.calls[1]) == "get_latest(user...): ok"
    for text in (str(store.calls), str(store.calls[0]), repr(store)):
        assert "user-1" not in text
        assert "0.5" not in text
