"""Connections of one event loop, handed from one operation to the next."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool

from layered_store.stores.sql.desks import Desks


@pytest.fixture
async def engine(sqlite_url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(sqlite_url, poolclass=AsyncAdaptedQueuePool)
    yield engine
    await engine.dispose()


def out(engine: AsyncEngine) -> int:
    """How many connections the engine has lent."""
    pool = engine.pool
    assert isinstance(pool, AsyncAdaptedQueuePool)
    return pool.checkedout()


async def test_who_is_cancelled_when_its_turn_came_passes_it_on(engine: AsyncEngine) -> None:
    """The next one waits for nobody; who was cancelled before is passed over."""
    desks = Desks(engine, 1, keep=True)
    desk = await desks.take()
    gone, called, last = (asyncio.create_task(desks.take()) for _ in range(3))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.sleep(0)
    await desks.give(desk)
    called.cancel()
    async with asyncio.timeout(5):
        assert await last is desk
    assert called.cancelled() and gone.cancelled()
    assert desks.busy == 1
    await desks.give(desk)
    assert desks.busy == 0
    await desks.release()
    assert out(engine) == 0


async def test_a_connection_that_cannot_be_used_leaves_its_place_and_goes_back(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits has the place at once."""
    desks = Desks(engine, 1, keep=True)
    real, failing = AsyncConnection.get_raw_connection, [True]

    async def raw(connection: AsyncConnection) -> object:
        if failing:
            failing.clear()
            await asyncio.sleep(0)
            raise OSError("lost")
        return await real(connection)

    monkeypatch.setattr(AsyncConnection, "get_raw_connection", raw)
    first, second = (asyncio.create_task(desks.take()) for _ in range(2))
    with pytest.raises(OSError, match="lost"):
        await first
    async with asyncio.timeout(5):
        desk = await second
    assert (desks.busy, out(engine)) == (1, 1)
    await desks.give(desk)
    await desks.release()
    assert out(engine) == 0


@pytest.mark.parametrize("how", ["broken", "closed", "foreign", "not kept"])
async def test_only_what_can_be_used_again_stays_at_hand(how: str, engine: AsyncEngine) -> None:
    """The rest goes back to the engine, and the next operation has another."""
    desks = Desks(engine, 1, keep=how != "not kept")
    desk = await desks.take()
    if how == "closed":
        await desk.connection.close()
    if how == "foreign":
        await desks.move(engine.execution_options())
    await desks.give(desk, broken=how == "broken")
    assert (desks.busy, out(engine)) == (0, 0)
    other = await desks.take()
    assert other is not desk
    await desks.give(other)
    await desks.release()
    assert out(engine) == 0


async def test_what_is_in_use_when_the_server_is_lost_is_not_used_again(
    engine: AsyncEngine,
) -> None:
    """It may lead to the server from before a failover, which answers with what was there then."""
    desks = Desks(engine, 3, keep=True)
    failed, used, kept = await desks.take(), await desks.take(), await desks.take()
    await desks.give(kept)
    desks.distrust(desks._clock.monotonic() - 60.0)  # of one call that was over, not of the server
    desks.distrust()
    await desks.give(failed, broken=True)
    await desks.give(used)
    await asyncio.gather(*desks._ending)
    assert out(engine) == 0
    anew = await desks.take()
    await desks.give(anew)
    assert await desks.take() is anew
    await desks.give(anew)
    await desks.release()


async def test_a_connection_in_use_at_the_end_is_closed_when_its_operation_ends(
    engine: AsyncEngine,
) -> None:
    """An operation that outlives ``aclose`` leaves no connection, and no thread, behind."""
    desks = Desks(engine, 2, keep=True)
    desk, idle = await desks.take(), await desks.take()
    await desks.give(idle)
    desks.end()
    await desks.release()
    await engine.dispose()
    assert not desk.connection.closed
    await desks.give(desk)
    assert desk.connection.closed and idle.connection.closed
    with pytest.raises(ValueError, match="no active connection"):
        await desk.driver.execute("SELECT 1")
