"""The channel of a Redis tier: whose echo counts, and what is acknowledged."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import Any

import hiredis
import pytest

from layered_store import RedisStore
from layered_store.coherence.contract import Notice
from layered_store.coherence.redis_tier.buckets import Bucket, buckets_of
from layered_store.coherence.redis_tier.channel import RedisChannel
from layered_store.errors import UnavailableError
from layered_store.stores.redis.wire import pack_command

RUN = "1" * 40


class Connection:
    """A driver's connection and its transport, to a server that says what a test has it say."""

    def __init__(self) -> None:
        self._reader = SimpleNamespace(_buffer=b"")
        self._writer = SimpleNamespace(transport=self)
        self.protocol: Any = None
        # A bucket of which it tells after each answer to a subscription.
        self.busy: Bucket | None = None

    async def send_command(self, *command: Any) -> None:
        assert command == ("INFO", "server")

    async def read_response(self) -> bytes:
        return f"run_id:{RUN}\r\nredis_version:7.2.0\r\n".encode()

    async def disconnect(self, *, nowait: bool) -> None:
        pass

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def resume_reading(self) -> None:
        pass

    def is_closing(self) -> bool:
        return False

    def write(self, data: bytes) -> None:
        reader = hiredis.Reader(notEnoughData=None)
        reader.feed(data)
        while command := reader.gets():
            self.protocol.data_received(pack_command((b"ssubscribe", command[1], 1)))
            if self.busy is not None:
                self.say(self.busy, "i", 1, b"d" * 16)

    def abort(self) -> None:
        pass

    def say(self, bucket: Bucket, kind: str, number: int, body: bytes, sent: int = 1) -> None:
        """Publish a message as a script does."""
        head = f"{kind}|{sent}|{number}|0|{RUN}|".encode()
        self.protocol.data_received(pack_command((b"smessage", bucket.channel, head + body)))


class Scripts:
    """The scripts of one server; keeps what it was asked."""

    server = RUN.encode()

    def __init__(self) -> None:
        self.acknowledged: list[int] = []

    async def load(self, bucket: Bucket) -> Scripts:
        return self

    async def run(self, bucket: Bucket, name: str, keys: Sequence[bytes], *args: Any) -> int:
        self.acknowledged.append(args[2])
        return 1000


class Setting:
    """A cluster's channel, and connections to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.connections: list[Connection] = []
        self.groups: list[list[str]] = []
        self.busy = False
        store = RedisStore("redis+cluster://127.0.0.1:1")

        async def new_connection(_: str) -> Connection:
            self.connections.append(Connection())
            self.connections[-1].busy = self.buckets[0] if self.busy else None
            return self.connections[-1]

        async def group_buckets() -> list[list[str]]:
            return self.groups

        monkeypatch.setattr(store, "new_connection", new_connection)
        monkeypatch.setattr(store, "group_buckets", group_buckets)
        by_name = buckets_of(store)
        self.groups = [list(by_name)]
        self.buckets = list(by_name.values())
        self.scripts: Any = Scripts()
        self.channel = RedisChannel(store, by_name, self.scripts)
        self.listening = AsyncExitStack()

    async def listen(self) -> tuple[Connection, AsyncIterator[Notice]]:
        notices = await self.listening.enter_async_context(self.channel.listen())
        return self.connections[-1], notices


@pytest.fixture
async def setting(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Setting]:
    made = Setting(monkeypatch)
    yield made
    await made.listening.aclose()


async def test_an_echo_of_another_process_is_not_taken_for_ones_own(setting: Setting) -> None:
    """Both number their pings from 1; what a bucket said behind ours was not received yet."""
    await setting.channel.ping("me", 1.0, 5)
    connection, notices = await setting.listen()
    *others, last = setting.buckets
    connection.say(last, "p", 5, b"another")
    for bucket in others:
        connection.say(bucket, "p", 5, b"me")
    connection.say(last, "i", 7, b"d" * 16)
    connection.say(last, "p", 5, b"me")
    connection.say(last, "i", 8, b"d" * 16)
    found = [await anext(notices) for _ in range(3)]
    assert [(notice.echo, notice.version) for notice in found] == [("", 7), ("me", 5), ("", 8)]


async def test_a_process_that_pings_for_longer_takes_no_echo_away(setting: Setting) -> None:
    """Its numbers are higher, and come between those that are awaited."""
    await setting.channel.ping("me", 1.0, 2)
    connection, notices = await setting.listen()
    for bucket in setting.buckets:
        connection.say(bucket, "p", 2, b"me")
        connection.say(bucket, "p", 1_000, b"another")
    connection.say(setting.buckets[0], "i", 7, b"d" * 16)
    notice = await anext(notices)
    assert (notice.echo, notice.version) == ("me", 2)


async def test_an_echo_of_another_program_is_passed_over(setting: Setting) -> None:
    """Whatever its name looks like."""
    await setting.channel.ping("me", 1.0, 1)
    connection, notices = await setting.listen()
    for bucket in setting.buckets:
        connection.say(bucket, "p", 1, b"\xff\xfe")
    connection.say(setting.buckets[0], "i", 7, b"d" * 16)
    assert (await anext(notices)).version == 7


@pytest.mark.parametrize(
    "said",
    [
        b"*1\r\n+smessage\r\n",
        b"*2\r\n+smessage\r\n+channel\r\n",
        b"*4\r\n+pong\r\n+\r\n+\r\n+\r\n",
        b"*3\r\n+smessage\r\n+another channel\r\n+" + f"i|1|1|0|{RUN}|body".encode() + b"\r\n",
        b"*3\r\n+smessage\r\n+channel\r\n:1\r\n",
        b"*3\r\n+smessage\r\n*0\r\n+" + f"i|1|1|0|{RUN}|body".encode() + b"\r\n",
    ],
)
async def test_what_no_server_says_there_ends_the_channel(said: bytes, setting: Setting) -> None:
    """Who listens would wait for ever: nobody reads on."""
    connection, notices = await setting.listen()
    connection.protocol.data_received(said)
    with pytest.raises(UnavailableError):
        async with asyncio.timeout(5):
            await anext(notices)


async def test_a_bucket_that_is_written_to_keeps_no_other_from_being_followed(
    setting: Setting,
) -> None:
    """Its messages come between the answers to the other subscriptions, without end."""
    setting.busy = True
    connection, notices = await setting.listen()
    connection.say(setting.buckets[-1], "i", 7, b"d" * 16)
    while (notice := await anext(notices)).version == 1:
        pass
    assert notice.version == 7


async def test_what_one_listener_has_not_taken_in_yet_is_not_acknowledged(
    setting: Setting,
) -> None:
    """Two stacks over one store: an erasure waits for the caches of both."""
    (first, told), (second, untold) = await setting.listen(), await setting.listen()
    bucket = setting.buckets[0]
    first.say(bucket, "i", 7, b"d" * 16, sent=100)
    first.say(bucket, "i", 8, b"d" * 16, sent=200)
    assert [(await anext(told)).version for _ in range(2)] == [7, 8]
    await setting.channel.ping("one", 1.0, 1)
    assert set(setting.scripts.acknowledged) == {0}
    second.say(bucket, "i", 7, b"d" * 16, sent=100)
    second.say(bucket, "i", 8, b"d" * 16, sent=200)
    assert [(await anext(untold)).version for _ in range(2)] == [7, 8]
    await setting.channel.ping("one", 1.0, 2)
    assert setting.scripts.acknowledged.count(100) == 1  # 200 is taken in when the next is asked


async def test_a_listener_that_begins_takes_back_nothing_of_the_others(setting: Setting) -> None:
    """Once it is gone, what the other has taken in counts again."""
    connection, notices = await setting.listen()
    bucket = setting.buckets[0]
    for sent in (100, 200):
        connection.say(bucket, "i", 7, b"d" * 16, sent=sent)
        await anext(notices)
    async with setting.channel.listen():
        await setting.channel.ping("one", 1.0, 1)
        assert set(setting.scripts.acknowledged) == {0}
    await setting.channel.ping("one", 1.0, 2)
    assert setting.scripts.acknowledged.count(100) == 1


@pytest.mark.parametrize("end", ["closed", "forked"])
def test_a_listener_whose_event_loop_ended_holds_up_nothing(
    end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for what it will never take in: it left without a word, or in the parent."""
    setting = Setting(monkeypatch)
    every, setting.groups = setting.groups, []
    before = asyncio.new_event_loop()
    left = setting.channel.listen()
    before.run_until_complete(left.__aenter__())
    if end == "closed":
        before.close()
    else:
        monkeypatch.setattr(os, "getpid", lambda: -1)

    setting.groups = every

    async def after() -> None:
        connection, notices = await setting.listen()
        for sent in (100, 200):
            connection.say(setting.buckets[0], "i", 7, b"d" * 16, sent=sent)
            await anext(notices)
        await setting.channel.ping("one", 1.0, 1)
        assert setting.scripts.acknowledged.count(100) == 1
        await setting.listening.aclose()

    asyncio.run(after())
    if end != "closed":
        before.run_until_complete(left.__aexit__(None, None, None))
    before.close()
