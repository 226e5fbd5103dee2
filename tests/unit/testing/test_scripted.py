"""Stores that answer by a script."""

from __future__ import annotations

import asyncio

from layered_store import StateSnapshot
from layered_store.testing.scripted import Gate, Scripted


def test_a_gate_is_made_before_a_loop_runs() -> None:
    """A fixture that does not await can make it; the call waits until it opens."""
    gate, state = Gate(), StateSnapshot("u-1", axes={"warmth": 0.5})

    async def opened() -> StateSnapshot | None:
        call = asyncio.create_task(Scripted(gate).get_latest("u-1"))
        await gate.entered.wait()
        assert not gate.opened
        gate.open(state)
        assert gate.opened
        return await call

    assert asyncio.run(opened()) == state
