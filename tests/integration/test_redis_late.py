"""RedisStore as the record of several processes: writes that are late or repeated on their way."""

from __future__ import annotations

import asyncio
import contextvars
from typing import TYPE_CHECKING, Any

import pytest
from redis_servers import BINARY, Server, relayed, running

from layered_store.call import call_begins
from layered_store.errors import UnavailableError
from layered_store.explaining import Held
from layered_store.snapshot import StateSnapshot
from layered_store.stores.redis import RedisStore
from layered_store.stores.redis.record import pack, unpack

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Iterator

pytestmark = pytest.mark.skipif(BINARY is None, reason="redis-server is not installed")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as own:
        yield own


@pytest.fixture
async def here(server: Server) -> AsyncIterator[RedisStore]:
    async with RedisStore(server.url, history_limit=20) as own:
        await own.command("FLUSHALL")
        yield own


@pytest.fixture
async def there(server: Server) -> AsyncIterator[RedisStore]:
    """Another process's store: it knows nothing of what ``here`` did."""
    async with RedisStore(server.url, history_limit=20) as own:
        await own.open()
        yield own


def state(number: int = 0, user_id: str = "u-1") -> StateSnapshot:
    return StateSnapshot(user_id, 1, axes={"a": number / 1000})


async def own_call(work: Coroutine[Any, Any, None]) -> None:
    """Run a call that is no part of the one that is travelling here."""
    await asyncio.get_running_loop().create_task(work, context=contextvars.Context())


class Way:
    """A way to the server on which requests wait until they are let go."""

    def __init__(self) -> None:
        self.free = asyncio.Event()
        self.free.set()
        self.waiting = asyncio.Event()

    async def pause(self, there: bool) -> None:
        if there and not self.free.is_set():
            self.waiting.set()
            await self.free.wait()


@pytest.mark.parametrize("since", ["erased", "written again"])
@pytest.mark.parametrize("many", [False, True])
async def test_a_write_that_the_network_held_brings_nobody_back(
    server: Server, here: RedisStore, since: str, many: bool
) -> None:
    """What was sent before an erasure and arrives after it shows nowhere, and says so."""
    way = Way()
    async with (
        relayed(server.port, way.pause) as url,
        RedisStore(url, history_limit=20, timeout=30) as slow,
    ):
        await slow.upsert_latest(state(1))
        way.free.clear()
        late = state(2)
        work = slow.upsert_latest_many([late]) if many else slow.upsert_latest(late)
        write = asyncio.ensure_future(work)
        await way.waiting.wait()
        await asyncio.sleep(0.03)  # longer than any way here, for whom clocks have to tell
        await here.delete("u-1")
        shown = None
        if since == "written again":
            shown = state(3)
            await here.upsert_latest(shown)
        await asyncio.sleep(0.03)
        way.free.set()
        try:
            await write
        except UnavailableError as refused:
            assert not refused.outcome_unknown
        assert await here.get_latest("u-1") == shown
        assert await here.get_history("u-1", 9) == ([shown] if shown else [])
        # What begins now is stored, also by the process that was late.
        again = state(4)
        await slow.upsert_latest(again)
        assert await here.get_latest("u-1") == again


async def test_a_write_after_another_process_erased_is_stored(
    here: RedisStore, there: RedisStore
) -> None:
    """Nothing that begins after an erasure is lost, however shortly after it."""
    for number in range(200):
        await here.upsert_latest(state(number))
        await here.delete("u-1")
        written = state(number + 300)
        with call_begins() as call:
            await there.upsert_latest(written)
        assert not call.superseded
        assert await here.get_latest("u-1") == written


async def test_a_batch_after_another_process_erased_is_stored(
    here: RedisStore, there: RedisStore
) -> None:
    """A batch is judged user by user, and keeps the order of one user's snapshots."""
    users = [f"u-{number}" for number in range(6)]
    await here.upsert_latest_many([state(1, user) for user in users])
    for user in users[:3]:
        await here.delete(user)
    batch = [state(number, user) for number in (2, 3) for user in users]
    with call_begins() as call:
        await there.upsert_latest_many(batch)
    assert not call.superseded
    assert await here.get_latest_many(users) == {user: state_of(batch, user) for user in users}
    for user in users:
        history = [entry.axes["a"] for entry in await here.get_history(user, 9)]
        assert history == [0.003, 0.002] + ([] if user in users[:3] else [0.001])


def state_of(batch: list[StateSnapshot], user: str) -> StateSnapshot:
    return [snapshot for snapshot in batch if snapshot.user_id == user][-1]


async def test_a_batch_from_before_an_erasure_is_dropped_for_that_user_alone(
    here: RedisStore, there: RedisStore
) -> None:
    """Only the erased user's snapshots are dropped, and the call counts as superseded."""
    with call_begins() as call:
        await asyncio.sleep(0.03)
        await own_call(here.delete("u-1"))
        await asyncio.sleep(0.03)
        kept = state(1, "u-2")
        await there.upsert_latest_many([state(1), kept, state(2)])
    assert call.superseded
    assert await here.get_latest_many(["u-1", "u-2"]) == {"u-2": kept}


async def test_the_process_that_erased_needs_no_clock(server: Server) -> None:
    """Within one process the order is known: no second message, and none is dropped."""
    async with RedisStore(server.url) as store:
        await store.delete("u-1")
        before = await commands(store)
        await store.upsert_latest(state(1))
        assert await commands(store) - before == 1
        with call_begins() as call:
            await own_call(store.delete("u-1"))
            await store.upsert_latest(state(2))
        assert call.superseded
        assert await store.get_latest("u-1") is None


async def test_another_process_asks_once(here: RedisStore, there: RedisStore) -> None:
    """Who has met a server's clock knows without asking that later writes follow an erasure."""
    await here.upsert_latest(state(1))
    await here.delete("u-1")
    await there.upsert_latest(state(2))
    await here.delete("u-1")
    await asyncio.sleep(0.03)
    before = await commands(here)
    await there.upsert_latest(state(3))
    assert await commands(here) - before == 1
    assert await here.get_latest("u-1") == state(3)


async def commands(store: RedisStore) -> int:
    """Return how many scripts the server ran."""
    reply = await store.command("INFO", "commandstats", write=False)
    line = next(row for row in reply.decode().splitlines() if row.startswith("cmdstat_evalsha:"))
    return int(line.partition("calls=")[2].partition(",")[0])


async def test_a_repeat_is_known_behind_many_other_writes(
    here: RedisStore, there: RedisStore
) -> None:
    """A retried write whose first attempt took effect comes neither twice nor back on top."""
    with call_begins() as call:
        await there.upsert_latest(state(0))
        for number in range(1, 11):
            await own_call(here.upsert_latest(state(number)))
        await there.upsert_latest(state(0))
    assert call.superseded
    assert await here.get_latest("u-1") == state(10)
    assert await here.get_history("u-1", 99) == [state(number) for number in range(10, -1, -1)]


async def test_a_repeat_whose_first_attempt_was_lost_is_stored(
    here: RedisStore, there: RedisStore
) -> None:
    """Whatever others wrote meanwhile: it comes after them."""
    with call_begins() as call:
        assert call.first_attempt()
        for number in range(1, 4):
            await own_call(here.upsert_latest(state(number)))
        await there.upsert_latest(state(0))
    assert not call.superseded
    assert await here.get_latest("u-1") == state(0)
    assert await here.get_history("u-1", 99) == [state(number) for number in (0, 3, 2, 1)]


async def test_a_repeated_erasure_spares_what_was_written_since(
    here: RedisStore, there: RedisStore
) -> None:
    """Its first attempt took effect, so the user began anew."""
    await here.upsert_latest(state(1))
    with call_begins() as call:
        await here.delete("u-1")
        assert not call.superseded
        await own_call(here.upsert_latest(state(2)))
        await there.delete("u-1")
        assert call.superseded
    assert await there.get_latest("u-1") == state(2)
    await there.delete("u-1")
    assert await here.get_latest("u-1") is None


@pytest.mark.parametrize("erasure", [False, True])
async def test_a_repeat_is_known_among_the_last_16_writes(server: Server, erasure: bool) -> None:
    """Of a write and of an erasure, also where no history is kept."""
    async with RedisStore(server.url) as store:
        await store.command("FLUSHALL")

        async def attempt() -> None:
            await (store.delete("u-1") if erasure else store.upsert_latest(state(0)))

        with call_begins() as call:
            await attempt()
            for number in range(1, 16):
                await own_call(store.upsert_latest(state(number)))
            await attempt()
        assert call.superseded
        assert await store.get_latest("u-1") == state(15)


async def test_a_state_of_the_history_keeps_the_id_of_its_own_write(here: RedisStore) -> None:
    """Those of others stand with them already."""
    for number in range(1, 20):
        await here.upsert_latest(state(number))
    digest = here.digest("u-1")
    latest = unpack(await here.command("GET", here.key(digest)))
    entries = await here.command("LRANGE", here.key(digest, "h"), 0, -1)
    history = [record for record in map(unpack, entries) if record is not None]
    assert latest is not None and latest.version == history[0].version == 19
    assert [ids for record in history[:16] for ids in record.write_ids] == [*latest.write_ids]
    assert latest.body == history[0].body


async def test_a_state_after_an_erasure_is_no_copy_of_a_tier(
    here: RedisStore, there: RedisStore
) -> None:
    """What a state carries of an erasure is not mistaken for a cache tier's generation."""
    await here.delete("u-1")
    await there.upsert_latest(state(1))
    value = await here.command("GET", here.key(here.digest("u-1")))
    record = unpack(value)
    assert record is not None and any(record.generation) and not record.shared
    peek = await here.peek("u-1")
    assert (peek.held, peek.answers, peek.note) == (Held.STATE, True, "")


async def test_an_erasure_is_carried_on_for_its_life(here: RedisStore, there: RedisStore) -> None:
    """An erasure older than tombstones live bars nothing, and is no longer carried."""
    key = here.key(here.digest("u-1"))
    now = int((await here.command("TIME"))[0]) * 1_000_000
    for days, carried in ((6, True), (8, False)):
        erasure = (1).to_bytes(8, "big") + (now - days * 86_400_000_000).to_bytes(8, "big")
        left = pack(b"S", 2, b"x", generation=erasure, write_ids=[b"i" * 16])
        await here.command("SET", key, left)
        await there.upsert_latest(state(days))
        record = unpack(await here.command("GET", key))
        assert record is not None
        assert record.generation == (erasure if carried else bytes(16))
        assert await here.get_latest("u-1") == state(days)


async def test_a_user_erased_again_and_again_is_an_error(
    here: RedisStore, there: RedisStore
) -> None:
    """A write that meets a new erasure at each try fails in the end, and stored nothing."""
    await here.delete("u-1")
    parts = there.upsert_parts

    def erased_meanwhile(write: Any, *, follows: int) -> Any:
        keys, args = parts(write, follows=follows and follows - 1)
        return keys, (*args[:3], 0, *args[4:])

    there.upsert_parts = erased_meanwhile  # type: ignore[method-assign]
    with pytest.raises(UnavailableError, match="erased again") as caught:
        await there.upsert_latest(state(1))
    assert caught.value.operation == "upsert_latest"
    assert not caught.value.outcome_unknown
    assert await here.get_latest("u-1") is None
    other = StateSnapshot("u-2", 1)
    with pytest.raises(UnavailableError, match="erased again") as caught:
        await there.upsert_latest_many([other, state(1)])
    assert caught.value.outcome_unknown, "others of the batch are stored"
    assert await here.get_latest_many(["u-1", "u-2"]) == {"u-2": other}
