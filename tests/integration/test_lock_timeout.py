"""A lock that is not given costs the whole write, never half of it."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from layered_store import SQLStore, StateSnapshot, UnavailableError


def state(value: float) -> StateSnapshot:
    return StateSnapshot("u-1", 0, axes={"a": value})


@pytest.mark.parametrize("engine", ["mysql", "postgres"])
@pytest.mark.parametrize("ends_by", ["the server's limit", "the store's limit"])
async def test_case_31_a_lock_that_is_not_given_costs_the_whole_write(
    engine: str, ends_by: str, request: pytest.FixtureRequest
) -> None:
    """MariaDB rolls back one statement only when a lock wait ends; latest state and history must
    agree all the same, and repeating must work."""
    url = request.getfixturevalue(f"{engine}_url")
    by_server = ends_by == "the server's limit"
    given = url
    if by_server:
        given += (
            "?init_command=SET+innodb_lock_wait_timeout%3D1" if engine == "mysql" else ""
        )
    store = SQLStore(given, timeout=10 if by_server else 2)
    if by_server and engine == "postgres":
        admin = create_async_engine(url)
        async with admin.begin() as connection:
            name = url.rpartition("/")[2]
            await connection.execute(text(f"ALTER DATABASE {name} SET lock_timeout = '300ms'"))
        await admin.dispose()
    async with SQLStore(url, timeout=30) as first:
        await first.upsert_latest(state(0.1))
    await store.get_latest("u-1")
    holder = create_async_engine(url)
    async with holder.connect() as connection:
        await connection.execute(text("SELECT * FROM layered_store_latest FOR UPDATE"))
        with pytest.raises(UnavailableError) as caught:
            await store.upsert_latest(state(0.2))
        assert caught.value.retryable
        await connection.rollback()
    await holder.dispose()
    await asyncio.sleep(0.1)
    latest = await store.get_latest("u-1")
    history = await store.get_history("u-1", 9)
    assert history[0] == latest
    assert [s.axes["a"] for s in history] in ([0.1], [0.2, 0.1])
    if by_server:
        assert not caught.value.outcome_unknown
        assert latest == state(0.1)
    await store.upsert_latest(state(0.3))
    assert (await store.get_history("u-1", 9))[0] == await store.get_latest("u-1") == state(0.3)
    await store.aclose()
