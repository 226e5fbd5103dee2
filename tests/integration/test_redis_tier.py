"""Redis as a shared cache tier: single steps, with what others leave there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from layered_store import ClosedError, RedisStore, SQLStore, StateSnapshot, WriteThrough
from layered_store.coherence.contract import CacheTier, Versioned
from layered_store.coherence.redis_tier import RedisTier
from layered_store.errors import UnavailableError
from layered_store.stores.redis.record import STATE, pack, unpack


class Setting:
    """A tier that is trusted, and what the servers are told behind its back."""

    def __init__(self, store: RedisStore, stack: WriteThrough) -> None:
        tier = store.capability(CacheTier)
        assert isinstance(tier, RedisTier)
        self.store = store
        self.tier = tier
        self.stack = stack

    def key(self, user_id: str) -> bytes:
        return self.store.key(self.store.digest(user_id))

    async def publish(self, message: bytes) -> None:
        await self.store.command("PUBLISH", self.store.bucket_key("0", "channel"), message)


@pytest.fixture
async def setting(redis_url: str, sqlite_url: str) -> AsyncIterator[Setting]:
    store = RedisStore(redis_url)
    async with SQLStore(sqlite_url) as record, WriteThrough(store, origin=record) as stack:
        yield Setting(store, stack)


def state(user_id: str = "u-1", value: float = 0.5) -> StateSnapshot:
    return StateSnapshot(user_id, 1, axes={"a": value})


async def test_a_stale_copy_is_one_that_was_trusted_and_is_no_tombstone(setting: Setting) -> None:
    """Nor one that cannot be read, which is counted; nor anything once that is too long ago."""
    await setting.stack.upsert_latest_many([state("u-1"), state("u-2"), state("u-3")])
    found = await setting.tier.read_stale("u-1", 60)
    assert found is not None and found.snapshot == state("u-1")
    assert setting.store.reads.stale == 1
    await setting.stack.delete("u-2")
    assert await setting.tier.read_stale("u-2", 60) is None
    assert await setting.tier.read_stale("nobody", 60) is None
    assert setting.store.corrupt_records == 0
    held = unpack(await setting.store.command("GET", setting.key("u-3")))
    assert held is not None
    damaged = pack(STATE, held.version, b"no snapshot", generation=held.generation)
    await setting.store.command("SET", setting.key("u-3"), damaged)
    corrupt = setting.store.corrupt_records
    assert await setting.tier.read_stale("u-3", 60) is None
    assert setting.store.corrupt_records == corrupt + 1
    await setting.store.command("DEL", setting.store.bucket_key("0", "repair"))
    assert await setting.tier.read_stale("u-1", 60) is None
    assert setting.store.reads.stale == 1


async def test_what_is_no_copy_is_a_miss_of_a_trusted_tier(setting: Setting) -> None:
    """A damaged copy is counted; one of another generation, or with write ids, is none."""
    await setting.stack.upsert_latest(state())
    held = unpack(await setting.store.command("GET", setting.key("u-1")))
    assert held is not None
    for value, corrupt in (
        (pack(STATE, held.version, b"no snapshot", generation=held.generation), 1),
        (b"nonsense", 1),
        (pack(STATE, held.version, held.body, generation=b"\x01" * 16), 0),
        (
            pack(
                STATE, held.version, held.body, generation=held.generation, write_ids=[b"i" * 16]
            ),
            0,
        ),
    ):
        await setting.store.command("SET", setting.key("u-1"), value)
        before = setting.store.corrupt_records
        read = await setting.tier.read("u-1")
        assert read.trusted and read.found is None
        assert setting.store.corrupt_records == before + corrupt


async def test_reads_that_had_begun_when_the_store_is_closed_are_told(setting: Setting) -> None:
    """Each with an error of its own."""
    await setting.stack.upsert_latest(state())
    reads = [asyncio.create_task(setting.tier.read("u-1")) for _ in range(3)]
    await asyncio.sleep(0)
    await setting.store.aclose()
    errors = await asyncio.gather(*reads, return_exceptions=True)
    assert all(type(error) is ClosedError for error in errors)
    assert len({id(error) for error in errors}) == 3


@pytest.mark.parametrize(
    "message",
    [b"", b"hello", b"i|x|1|0|server|d", b"p|1|%s|0|server|d" % (b"9" * 5000), b"x|1|1|0|server|d"],
)
async def test_a_message_of_another_program_is_passed_over(
    message: bytes, setting: Setting
) -> None:
    """And what follows it is received."""
    async with setting.tier.listen() as notices:
        await setting.publish(message)
        await setting.stack.upsert_latest(state())
        async with asyncio.timeout(5):
            notice = await anext(notices)
            while notice.echo:
                notice = await anext(notices)
        assert notice.digest == setting.store.digest("u-1")


async def test_a_message_that_another_server_handed_on_ends_the_channel(setting: Setting) -> None:
    """It is neither in order nor surely whole: whoever listens begins anew."""
    async with setting.tier.listen() as notices:
        await setting.publish(b"i|1|1|0|another-run|" + setting.store.digest("u-1"))
        with pytest.raises(UnavailableError, match="channel was lost"):
            async with asyncio.timeout(1.5):  # a channel that is silent ends after 2 s
                while True:
                    await anext(notices)


async def test_no_message_before_an_erasures_is_taken_for_it(setting: Setting) -> None:
    """Who took in a message acknowledges all up to its moment; that of the erasure is its own,
    however many messages a millisecond has."""
    record = Versioned(7, state())
    async with setting.tier.listen() as notices:
        for number in range(40):
            *_, holders = await asyncio.gather(
                *(setting.tier.put("u-1", record, None) for _ in range(4)),
                setting.tier.bury("u-1", 8 + number, "me"),
            )
            seen = []
            while len(seen) < 5:
                notice = await anext(notices)
                if not notice.echo:
                    seen.append(notice)
            buried = next(at for at, notice in enumerate(seen) if notice.erased)
            assert seen[buried].sent == holders.now
            assert all(notice.sent < holders.now for notice in seen[:buried])


async def test_an_older_put_never_lowers_a_copy(setting: Setting) -> None:
    """Whoever comes with it."""
    await setting.stack.upsert_latest(state())
    read = await setting.tier.read("u-1")
    assert read.found is not None
    ticket = await setting.tier.ticket("u-1")
    await setting.tier.put("u-1", Versioned(read.found.version - 1, state(value=0.1)), ticket)
    assert (await setting.tier.read("u-1")).found == read.found


async def test_who_is_refused_a_pass_takes_nothing_from_the_one_under_way(redis_url: str) -> None:
    """Two stacks over one store: the pass of the first ends with a stamp all the same."""
    store = RedisStore(redis_url, prefix="two-passes:")
    tier = RedisTier(store)
    begun = await tier.begin("one", "5")
    assert begun is not None
    assert await tier.begin("another", "6") is None
    assert await tier.stamp(begun, "7", 2.0)
    assert (await tier.read("u-1")).trusted
    again = await tier.begin("one", "8")
    assert again is not None and again.cursor == "7"
    await store.aclose()


async def test_a_pass_that_another_stack_took_over_stamps_nothing(redis_url: str) -> None:
    """Over one store too: only the one that began last does."""
    store = RedisStore(redis_url, prefix="took-over:")
    tier = RedisTier(store)
    begun = await tier.begin("one", "5")
    assert begun is not None
    assert await tier.stamp(begun, "6", 0.0)
    await store.command("DEL", store.bucket_key("0", "repairer"))  # its time was over
    other = await tier.begin("another", "7")
    assert other is not None and other.cursor == "6"
    assert not await tier.stamp(begun, "8", 2.0)
    assert await tier.stamp(other, "9", 2.0)
    await store.aclose()


class Told:
    """A driver's connection whose server answers INFO so."""

    def __init__(self, info: bytes) -> None:
        self.info = info
        self.closed = False

    async def send_command(self, *_: Any) -> None:
        pass

    async def read_response(self, **_: Any) -> bytes:
        return self.info

    async def disconnect(self, *, nowait: bool) -> None:
        self.closed = nowait


@pytest.mark.parametrize(
    ("info", "cluster", "text", "retryable"),
    [
        (b"redis_version:7.0.1\r\n", False, "INFO must be allowed", True),
        (b"run_id:abc\r\nredis_version:x\r\n", False, "INFO must be allowed", True),
        (b"run_id:abc\r\nredis_version:6.2.14\r\n", True, "needs Redis 7", False),
    ],
)
async def test_a_server_that_cannot_be_a_tier_is_told(
    info: bytes, cluster: bool, text: str, retryable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the reason; the connection that was made to ask is closed."""
    connection = Told(info)

    async def new_connection(_: str) -> Told:
        return connection

    store = RedisStore("redis+cluster://127.0.0.1:1" if cluster else "redis://127.0.0.1:1")
    monkeypatch.setattr(store, "new_connection", new_connection)
    with pytest.raises(UnavailableError, match=text) as caught:
        await RedisTier(store).read("u-1")
    assert caught.value.retryable is retryable
    assert connection.closed
