"""MariaDB and MySQL may be told to begin a transaction behind each commit."""

from __future__ import annotations

from layered_store import SQLStore, StateSnapshot


async def test_a_commit_ends_the_transaction(mysql_url: str) -> None:
    """Whatever ``completion_type`` says, which a server may set for all who connect."""
    state = [StateSnapshot("u-1", number) for number in range(4)]
    chaining = f"{mysql_url}?init_command=SET+completion_type%3D1"
    async with SQLStore(chaining, pool_size=1) as store, SQLStore(mysql_url) as other:
        await store.upsert_latest(state[0])
        await store.upsert_latest(state[1])
        await other.upsert_latest(state[2])
        assert await store.get_latest("u-1") == state[2]
        await store.erase("u-1", ["tier"])
        await store.settle(store.digest("u-1"), 0, "tier")  # changes nothing: it is rolled back
        await store.upsert_latest(state[3])
        assert await other.get_history("u-1", 9) == [state[3]]
