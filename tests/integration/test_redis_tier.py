"""Redis as a shared cache tier: single steps, with what others leave there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from servers import Server

from layered_store import ClosedError, RedisStore, SQLStore, StateSnapshot, WriteThrough
from layered_store.coherence.contract import CacheTier, Change, Ticket, Versioned
from layered_store.coherence.redis_tier import RedisTier
from layered_store.coherence.redis_tier.connection import Connection, ServerRun
from layered_store.errors import UnavailableError
from layered_store.identity import digest_function
from layered_store.stores.redis.record import FILLED, STATE, TOKEN, TOMBSTONE, pack, unpack
from layered_store.testing.clock import settle


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


WEEK = 7 * 24 * 3600.0


@pytest.mark.parametrize(
    ("ttl", "lives"), [(None, WEEK), (30.0, 30.0), (2 * WEEK, WEEK)], ids=["none", "short", "long"]
)
@pytest.mark.parametrize("way", ["filled", "written", "erased"])
async def test_a_copy_lives_no_longer_than_its_ttl_and_than_tombstones_do(
    way: str, ttl: float | None, lives: float, redis_url: str, sqlite_url: str
) -> None:
    """When the system of record has forgotten an erasure, no copy of before can be left."""
    store = RedisStore(redis_url, ttl=ttl)
    async with SQLStore(sqlite_url) as record, WriteThrough(store, origin=record) as stack:
        setting = Setting(store, stack)
        if way == "filled":
            await record.upsert_latest(state())
            await stack.get_latest("u-1")
        else:
            await stack.upsert_latest(state())
        if way == "erased":
            await stack.delete("u-1")
        left = await store.command("PTTL", setting.key("u-1"))
        assert lives - 20 < left / 1000 <= lives


async def test_what_is_no_copy_is_a_miss_of_a_trusted_tier(setting: Setting) -> None:
    """A damaged one, or another user's, is counted and goes; one of another generation stays."""
    await setting.stack.upsert_latest_many([state("u-1"), state("u-2"), state("u-3")])
    await setting.stack.delete("u-2")
    others = [await setting.store.command("GET", setting.key(name)) for name in ("u-2", "u-3")]
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
            1,
        ),
        (pack(TOMBSTONE, held.version, generation=held.generation), 1),
        *((other, 1) for other in others),
    ):
        await setting.store.command("SET", setting.key("u-1"), value)
        before = setting.store.corrupt_records
        read = await setting.tier.read("u-1")
        assert read.trusted and read.found is None
        assert setting.store.corrupt_records == before + corrupt
        left = await setting.store.command("GET", setting.key("u-1"))
        assert left == (None if corrupt else value)


@pytest.mark.parametrize("damage", ["cut", "another user's", "another user's erasure"])
async def test_what_a_reader_cannot_use_is_overwritten(damage: str, setting: Setting) -> None:
    """Also under a header that is whole: it would keep every reader from storing a copy."""
    stack, store = setting.stack, setting.store
    await stack.upsert_latest_many([state("u-1"), state("u-2", 0.25), state("u-3")])
    await stack.delete("u-3")
    copy = await store.command("GET", setting.key("u-1"))
    value = {
        "cut": copy[:-3],
        "another user's": await store.command("GET", setting.key("u-2")),
        "another user's erasure": await store.command("GET", setting.key("u-3")),
    }[damage]
    assert await stack.get_latest("u-1") == state("u-1")
    await store.command("SET", setting.key("u-1"), value)
    hits = store.reads.hit
    assert await stack.get_latest("u-1") == state("u-1")
    assert store.reads.hit == hits
    assert await stack.get_latest("u-1") == state("u-1")
    assert store.reads.hit == hits + 1
    assert store.corrupt_records == 1


async def test_a_copy_written_while_a_damaged_one_is_removed_stays(setting: Setting) -> None:
    """Only what was found damaged goes."""
    await setting.stack.upsert_latest(state())
    key, run = setting.key("u-1"), setting.tier._scripts.run
    copy = await setting.store.command("GET", key)
    bucket = setting.tier._place("u-1")[1]
    assert await run(bucket, "CLEAR", (key,), b"damaged") == 0
    assert await setting.store.command("GET", key) == copy
    await setting.store.command("DEL", key)
    await setting.store.command("LPUSH", key, "x")
    assert await run(bucket, "CLEAR", (key,), b"damaged") == 0


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


async def test_a_server_in_a_folder_whose_name_is_no_text_is_known() -> None:
    """INFO names its files as the system does, which need not be UTF-8."""
    connection: Any = Told(b"run_id:abc\r\nredis_version:7.0.1\r\nconfig_file:/\xe9.conf\r\n")
    run = await Connection(RedisStore("redis://127.0.0.1:1"), connection).server_run()
    assert run == ServerRun("abc", 7)


async def test_closing_cuts_off_what_is_being_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that hangs there leaves no task and no connection behind."""

    class Hanging(Told):
        async def read_response(self, **_: Any) -> bytes:
            return await asyncio.get_running_loop().create_future()

    before = asyncio.all_tasks()
    connection = Hanging(b"")

    async def new_connection(_: str) -> Told:
        return connection

    store = RedisStore("redis://127.0.0.1:1")
    monkeypatch.setattr(store, "new_connection", new_connection)
    tier = store.capability(CacheTier)
    assert tier is not None
    reads = [asyncio.create_task(tier.read("u-1")) for _ in range(2)]
    await settle()
    reads.pop().cancel()
    await store.aclose()
    assert connection.closed
    with pytest.raises(UnavailableError):
        await reads.pop()
    assert asyncio.all_tasks() <= before


class Bare:
    """A tier that nothing repairs in the background, and one user's key."""

    def __init__(self, url: str) -> None:
        self.store = RedisStore(url)
        self.tier = RedisTier(self.store)
        self.key = self.store.key(self.store.digest("u-1"))
        self.digest = self.store.digest("u-1")

    async def trust(self) -> bytes:
        """Make a whole pass; return the generation."""
        begun = await self.tier.begin("me", "head")
        assert begun is not None and await self.tier.stamp(begun, "cursor", 2.0)
        return begun.generation

    async def holding(self, value: bytes | None) -> None:
        await self.store.command("DEL", self.key)
        if value is not None:
            await self.store.command("SET", self.key, value)

    async def held(self) -> Any:
        return await self.store.command("GET", self.key)


@pytest.fixture
async def bare(redis_url: str) -> AsyncIterator[Bare]:
    made = Bare(redis_url)
    async with made.store:
        yield made


async def test_scripts_that_the_server_lost_are_loaded_by_the_next_call(bare: Bare) -> None:
    """However often that comes about; the call that meets it says so."""
    for _ in range(3):
        await bare.trust()
        assert (await bare.tier.read("u-1")).trusted
        await bare.store.command("SCRIPT", "FLUSH")
        with pytest.raises(UnavailableError, match="server of the cache tier changed"):
            await bare.tier.read("u-1")
    assert (await bare.tier.read("u-1")).trusted


async def test_scripts_that_outlive_a_run_of_an_older_server_look_which_it_is(
    bare: Bare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before Redis 7 a replica and a file know them too: there they say that they are not known."""
    real = Connection.server_run
    told: dict[str, Any] = {"major": 6}

    async def older(connection: Connection) -> ServerRun:
        return (await real(connection))._replace(**told)

    monkeypatch.setattr(Connection, "server_run", older)
    await bare.trust()
    assert (await bare.tier.read("u-1")).trusted
    told["run_id"] = "0" * 40
    other = RedisTier(bare.store)
    with pytest.raises(UnavailableError, match="server of the cache tier changed"):
        await other.read("u-1")
    with pytest.raises(UnavailableError, match="server of the cache tier changed"):
        await other.bury("u-1", 7, "me")


async def test_a_load_that_failed_is_tried_again_by_the_next_call(
    bare: Bare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server may be back."""

    async def refuse(_: str) -> Any:
        raise UnavailableError("away")

    with monkeypatch.context() as patch:
        patch.setattr(bare.store, "new_connection", refuse)
        for _ in range(2):
            with pytest.raises(UnavailableError):
                await bare.tier.read("u-1")
    await bare.trust()
    assert (await bare.tier.read("u-1")).trusted


async def test_what_another_event_loop_is_loading_holds_nobody_up(
    bare: Bare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one loop waits for can be awaited there only."""
    here, go_on, real = asyncio.get_running_loop(), asyncio.Event(), bare.store.new_connection

    async def new_connection(bucket: Any) -> Any:
        if asyncio.get_running_loop() is here:
            await go_on.wait()
        return await real(bucket)

    monkeypatch.setattr(bare.store, "new_connection", new_connection)
    first = asyncio.create_task(bare.tier.read("u-1"))
    await settle()

    async def read() -> bool:
        async with asyncio.timeout(5):
            return (await bare.tier.read("u-1")).trusted

    assert await asyncio.to_thread(asyncio.run, read()) is False
    go_on.set()
    assert not (await first).trusted


DIGEST = digest_function(b"")("u-1")
OTHER = b"\x01" + b"o" * 15
"""A generation that is not the tier's."""


def copies(generation: bytes, version: int = 5, body: bytes = b"x") -> dict[str, bytes | None]:
    """What may stand under a key, by name."""
    return {
        "state": pack(STATE, version, body, generation=generation),
        "filled": pack(FILLED, version, body, generation=generation),
        "tombstone": pack(TOMBSTONE, version, DIGEST, generation=generation),
        "token": pack(TOKEN, 0, generation=b"t" * 16),
        "nonsense": b"nonsense",
        "newer": b"LS\x02" + pack(STATE, version, body, generation=generation)[3:],
        "cut": pack(STATE, version, generation=generation)[:27],
        "new kind": pack(b"N", version, body, generation=generation),
        "nothing": None,
    }


NO_RECORDS = ("nonsense", "newer", "cut", "new kind")


CALLS: dict[str, Callable[[RedisTier], Awaitable[Any]]] = {
    "ticket": lambda tier: tier.ticket("u-1"),
    "bury": lambda tier: tier.bury("u-1", 7, "me"),
    "holders": lambda tier: tier.holders("u-1", "me"),
    "begin": lambda tier: tier.begin("me", "head"),
    "repair": lambda tier: tier.repair([Change(DIGEST, 7, erased=False)]),
    "stale": lambda tier: tier.read_stale("u-1", 60),
    "put": lambda tier: tier.put("u-1", Versioned(5, state()), None),
}


STRANGE: dict[str, list[Any]] = {
    "ticket": [[b"a"], [b"a", None], b"OK"],
    "bury": [[b"a guard", b"2", []], [b"1", b"a copy", []]],
    "holders": [[b"1", b"2"], [b"1", b"2", [b"a"]], [b"1", 2, []], [b"1", b"2", [b"a", 3]]],
    "begin": [[b"x", b"a", b"end", 1], [b"1", b"a", b"end", b"x"], [b"1", b"2", []]],
    "repair": [[b"1"], [[]], 1],
    "stale": [7, []],
    "put": [b"OK", [], None],
}


@pytest.mark.parametrize(
    ("name", "reply"), [(name, reply) for name, replies in STRANGE.items() for reply in replies]
)
async def test_a_reply_to_another_question_is_an_outage(
    name: str, reply: Any, bare: Bare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same form too: a proxy that adds a reply shifts all that come behind it."""
    await bare.trust()

    def begin(*_: Any) -> asyncio.Future[Any]:
        answered = asyncio.get_running_loop().create_future()
        answered.set_result(reply)
        return answered

    monkeypatch.setattr(bare.store, "begin", begin)
    with pytest.raises(UnavailableError, match="does not answer as Redis"):
        await CALLS[name](bare.tier)


async def test_a_ticket_leaves_what_may_be_believed(bare: Bare) -> None:
    """It stands in for anything else, and all who miss share one."""
    generation = await bare.trust()
    for name, value in copies(generation).items():
        await bare.holding(value)
        ticket = await bare.tier.ticket("u-1")
        assert ticket is not None and ticket.generation == generation
        if name in ("state", "filled", "tombstone"):
            assert (ticket.token, await bare.held()) == (b"", value), name
        else:
            assert ticket.token == await bare.held(), name
            assert (ticket.token == value) is (name == "token"), name
            if name != "token":
                assert 0 < await bare.store.command("PTTL", bare.key) <= 10_000
    for name, value in copies(OTHER).items():
        await bare.holding(value)
        ticket = await bare.tier.ticket("u-1")
        assert ticket is not None and ticket.token == await bare.held() != b"", name


async def test_repair_removes_what_is_older_and_tells_of_what_was_not_told(bare: Bare) -> None:
    """A copy that a reader filled in was never told of; from then on it was."""
    generation = await bare.trust()
    for version in (4, 5, 6):
        for name, value in copies(generation, version).items():
            await bare.holding(value)
            change = Change(bare.digest, 5, erased=False)
            told = await bare.tier.repair([change])
            known = version >= 5 and name in ("state", "tombstone")
            assert list(told) == ([] if known else [change]), (name, version)
            if version >= 5 and name == "filled":
                value = copies(generation, version)["state"]
            elif not known:
                value = None
            assert await bare.held() == value, (name, version)
    await bare.holding(copies(generation)["state"])
    both = [Change(bare.digest, 5, erased=False), Change(bare.store.digest("u-2"), 1, erased=True)]
    assert list(await bare.tier.repair(both)) == both[1:]


@pytest.mark.parametrize("erased", [False, True])
async def test_a_put_moves_a_copy_up_and_brings_none_where_none_was(
    bare: Bare, *, erased: bool
) -> None:
    """Only with a ticket of the tier's generation, or with the token that stands there."""
    generation = await bare.trust()
    written = Versioned(5, None if erased else state())
    new = bare.tier._value(STATE, bare.digest, written, generation)
    ticket, foreign = Ticket(b"", generation), Ticket(b"", OTHER)
    for version in (4, 5, 6):
        for name, value in copies(generation, version, new[29:]).items():
            for given in (ticket, foreign, None):
                await bare.trust()
                await bare.holding(value)
                await bare.tier.put("u-1", written, given)
                kept = value
                if name in ("token", *NO_RECORDS):
                    kept = None
                elif version == 4 and value is not None:
                    kept = new if given is ticket else None
                elif version == 5 and name == "filled":
                    kept = copies(generation, 5, new[29:])["state"]
                elif version == 5 and name == "tombstone" and not erased:
                    kept = None  # one version was given twice: nobody knows which one it is
                assert await bare.held() == kept, (name, version, given)
    for version in (4, 5, 6):
        for value in copies(OTHER, version, new[29:]).values():
            await bare.holding(value)
            await bare.tier.put("u-1", written, ticket)
            assert await bare.held() is None
    await bare.holding(None)
    own = await bare.tier.ticket("u-1")
    assert own is not None
    await bare.tier.put("u-1", written, Ticket(own.token, OTHER))
    assert await bare.held() is None
    own = await bare.tier.ticket("u-1")
    await bare.tier.put("u-1", written, own)
    assert await bare.held() == new


async def test_where_nothing_is_trusted_copies_only_go(bare: Bare) -> None:
    """A newer one may stay: under its generation, which may come to be trusted again."""
    generation = await bare.trust()
    await bare.store.command("DEL", bare.store.bucket_key("0", "guard"))
    written = Versioned(5, state())
    body = bare.tier._value(STATE, bare.digest, written, generation)[29:]
    for version in (4, 5, 6):
        for name, value in copies(generation, version, body).items():
            for given in (Ticket(b"t" * 16, generation), None):
                await bare.holding(value)
                await bare.tier.put("u-1", written, given)
                newer = version == 6 and name in ("state", "filled", "tombstone")
                same = version == 5 and name in ("state", "filled")
                kept = copies(generation, 5, body)["state"] if same else value if newer else None
                assert await bare.held() == kept, (name, version)
            await bare.holding(value)
            await bare.tier.bury("u-1", 5, "me")
            assert await bare.held() is None, (name, version)


async def test_each_step_tells_what_it_changed(bare: Bare) -> None:
    """Whose record, which version it has, and whether it was erased; a new beginning, everybody."""
    async with bare.tier.listen() as notices:

        async def told() -> tuple[bytes, int, bool]:
            async with asyncio.timeout(5):
                notice = await anext(notices)
                while notice.echo:
                    notice = await anext(notices)
            return notice.digest, notice.version, notice.erased

        generation = await bare.trust()
        assert await told() == (b"", 0, False)
        await bare.tier.put("u-1", Versioned(5, state()), None)
        assert await told() == (bare.digest, 5, False)
        await bare.tier.put("u-1", Versioned(6, None), None)
        assert await told() == (bare.digest, 6, True)
        await bare.tier.bury("u-1", 7, "me")
        assert await told() == (bare.digest, 7, True)
        other = bare.store.digest("u-2")
        changes = [Change(bare.digest, 8, erased=False), Change(other, 9, erased=True)]
        assert await bare.tier.repair(changes) == changes
        assert await told() == (bare.digest, 8, False)
        assert await told() == (other, 9, True)
        await bare.tier.renew(generation, "head")
        assert await told() == (b"", 0, False)


async def test_a_burial_replaces_a_copy_and_brings_none_where_none_was(bare: Bare) -> None:
    """A newer copy stays: the user was written again since."""
    generation = await bare.trust()
    for version in (4, 5, 6):
        for name, value in copies(generation, version).items():
            await bare.trust()
            await bare.holding(value)
            await bare.tier.bury("u-1", 5, "me")
            kept = value if version == 6 else copies(generation, 5)["tombstone"]
            if name in ("token", *NO_RECORDS, "nothing"):
                kept = None
            assert await bare.held() == kept, (name, version)
    for value in copies(OTHER, 6).values():
        await bare.holding(value)
        await bare.tier.bury("u-1", 5, "me")
        assert await bare.held() is None


async def test_a_stale_copy_is_of_the_generation_that_was_trusted_last(bare: Bare) -> None:
    """And of this server's run, for as long as it was told."""
    generation = await bare.trust()
    repair = bare.store.bucket_key("0", "repair")
    body = bare.store.codec.encode(state())
    seconds, micros = await bare.store.command("TIME")
    now = int(seconds) * 1000 + int(micros) // 1000

    async def stale(until: int, limit: float = 60.0) -> bool:
        await bare.store.command("HSET", repair, "until", until)
        found = await bare.tier.read_stale("u-1", limit)
        assert found in (None, Versioned(5, state()))
        return found is not None

    for name, value in copies(generation, 5, body).items():
        await bare.holding(value)
        assert await stale(now - 30_000) is (name in ("state", "filled")), name
        assert not await stale(now - 30_000, 20.0)
        assert not await stale(now + 60_000)  # the clock was set back
        assert not await bare.store.command("HEXISTS", repair, "until")
        assert await bare.tier.read_stale("u-1", 60) is None
    await bare.holding(copies(OTHER, 5, body)["state"])
    assert not await stale(now)
    await bare.holding(copies(generation, 5, body)["state"])
    assert await stale(now)
    assert await bare.tier.read_stale("u-1", 60) == Versioned(5, state())  # and again
    await bare.store.command("HSET", repair, "run", "another")
    assert not await stale(now)


async def test_one_process_repairs_at_a_time(bare: Bare) -> None:
    """Whoever's lock ran out may go on while nobody took over."""
    begun = await bare.tier.begin("me", "head")
    assert begun is not None and begun.fresh
    again = await bare.tier.begin("me", "head")
    assert again is not None
    other = RedisTier(bare.store)
    assert await other.begin("other", "head") is None
    await bare.store.command("DEL", bare.store.bucket_key("0", "repairer"))
    assert await bare.tier.stamp(again, "cursor", 0.0)
    await bare.store.command("DEL", bare.store.bucket_key("0", "repairer"))
    theirs = await other.begin("other", "later")
    assert theirs is not None and (theirs.cursor, theirs.fresh) == ("cursor", False)
    assert theirs.generation == again.generation
    assert not await bare.tier.stamp(again, "cursor", 2.0)
    await bare.store.command("SET", bare.store.bucket_key("0", "repairer"), "none of ours")
    assert await other.begin("other", "later") is not None
    assert await other.stamp(theirs, "cursor", 2.0)
    assert (await bare.tier.read("u-1")).trusted


async def test_a_lock_that_lasts_longer_than_any_holds_nobody_up(bare: Bare) -> None:
    """The server's clock was set back."""
    lock = bare.store.bucket_key("0", "repairer")
    await bare.store.command("SET", lock, "another", "PX", 700)
    assert await bare.tier.begin("me", "head") is None
    await bare.store.command("SET", lock, "another", "PX", 60_000)
    assert await bare.tier.begin("me", "head") is not None


async def test_a_generation_that_was_never_stamped_is_replaced(bare: Bare) -> None:
    """And one of which something is missing; until the next stamp nothing is trusted."""
    first = await bare.tier.begin("me", "head")
    again = await bare.tier.begin("me", "later")
    assert first is not None and again is not None
    assert (again.fresh, again.cursor) == (True, "later")
    assert again.generation != first.generation
    repair, body = bare.store.bucket_key("0", "repair"), bare.store.codec.encode(state())
    for change in (
        ("DEL", repair),
        ("HDEL", repair, "gen"),
        ("HDEL", repair, "cursor"),
        ("HDEL", repair, "pass"),
        ("HSET", repair, "gen", "short"),
        ("HSET", repair, "pass", "x"),
    ):
        generation = await bare.trust()
        await bare.holding(copies(generation, 5, body)["state"])
        assert (await bare.tier.read("u-1")).found == Versioned(5, state())
        await bare.store.command(*change)
        begun = await bare.tier.begin("me", "head")
        assert begun is not None and begun.fresh and begun.generation != generation, change
        assert not (await bare.tier.read("u-1")).trusted
        assert await bare.tier.read_stale("u-1", 60) is None
        assert await bare.tier.stamp(begun, "cursor", 2.0)
        read = await bare.tier.read("u-1")
        assert read.trusted and read.found is None


async def test_a_new_generation_is_stamped_by_who_began_it(bare: Bare) -> None:
    """Another came in its place, and the lock of whoever began that one ran out."""
    lock = bare.store.bucket_key("0", "repairer")
    other = RedisTier(bare.store)
    begun = await bare.tier.begin("me", "head")
    await bare.store.command("DEL", lock)
    theirs = await other.begin("other", "head")
    await bare.store.command("DEL", lock)
    assert begun is not None and theirs is not None
    assert not await bare.tier.stamp(begun, "mine", 2.0)
    assert await bare.store.command("HGET", bare.store.bucket_key("0", "repair"), "cursor") is None
    assert await other.stamp(theirs, "theirs", 2.0)


@pytest.mark.parametrize(("set_by", "most"), [(0, 2000), (-1000, 1000), (1000, 2000)])
async def test_a_stamp_lasts_from_the_beginning_of_its_pass(
    set_by: int, most: int, bare: Bare
) -> None:
    """On the server's clock and on our own: the shorter, if one was set meanwhile."""
    keys = {name: bare.store.bucket_key("0", name) for name in ("guard", "repairer", "repair")}
    begun = await bare.tier.begin("me", "head")
    assert begun is not None
    assert 0 < await bare.store.command("PTTL", keys["repairer"]) <= 750
    under_way = bare.tier._passes._under_way
    assert under_way is not None
    (part,) = under_way.parts
    under_way.parts = [part._replace(began=part.began + set_by)]
    await bare.store.command("DEL", keys["repairer"])
    assert await bare.tier.stamp(begun, "cursor", 2.0)
    left = await bare.store.command("PTTL", keys["guard"])
    assert most - 500 < left <= most
    assert 0 < await bare.store.command("PTTL", keys["repairer"]) <= 750
    until = int(await bare.store.command("HGET", keys["repair"], "until"))
    assert abs(until - part.began - most) < 500


async def test_a_pass_that_took_too_long_gives_no_trust(bare: Bare) -> None:
    """But the next one goes on where it ended."""
    begun = await bare.tier.begin("me", "head")
    assert begun is not None
    under_way = bare.tier._passes._under_way
    assert under_way is not None
    under_way.parts = [part._replace(began=part.began - 2000) for part in under_way.parts]
    assert await bare.tier.stamp(begun, "cursor", 2.0)
    assert not (await bare.tier.read("u-1")).trusted
    again = await bare.tier.begin("me", "head")
    assert again is not None and (again.cursor, again.fresh) == ("cursor", False)


async def test_a_renewed_generation_begins_at_its_head(bare: Bare) -> None:
    """One that is gone already renews nothing, and takes no trust away."""
    generation = await bare.trust()
    await bare.tier.renew(OTHER, "nowhere")
    assert (await bare.tier.read("u-1")).trusted
    number = ("HGET", bare.store.bucket_key("0", "repair"), "pass")
    before = int(await bare.store.command(*number))
    await bare.tier.renew(generation, "newer")
    assert int(await bare.store.command(*number)) == before + 1
    assert not (await bare.tier.read("u-1")).trusted
    begun = await bare.tier.begin("me", "head")
    assert begun is not None
    assert (begun.cursor, begun.fresh) == ("newer", False)
    assert begun.generation != generation
    assert await bare.tier.stamp(begun, "cursor", 2.0)


async def test_a_pass_that_others_overtook_is_not_stamped(bare: Bare) -> None:
    """Though nobody holds the lock any more: another pass, or another generation, came since."""
    await bare.trust()
    for renewed in (False, True):
        await bare.store.command("DEL", bare.store.bucket_key("0", "repairer"))
        begun = await bare.tier.begin("me", "head")
        assert begun is not None
        other = RedisTier(bare.store)
        await bare.store.command("DEL", bare.store.bucket_key("0", "repairer"))
        theirs = await other.begin("other", "head")
        assert theirs is not None
        await other.renew(OTHER, "head")  # of a generation that is gone: nothing happens
        if renewed:
            await other.renew(theirs.generation, "head")
        else:
            assert await other.stamp(theirs, "later", 0.0)
        await bare.store.command("DEL", bare.store.bucket_key("0", "repairer"))
        assert not await bare.tier.stamp(begun, "earlier", 2.0)
        after = await other.begin("other", "head")
        assert after is not None
        assert (after.generation == begun.generation) is not renewed


async def test_the_register_tells_until_when_a_lease_runs(bare: Bare) -> None:
    """Of every process but the one that asks; who leaves holds nothing any more."""
    before = (await bare.tier.holders("u-1", "another")).now
    await bare.tier.ping("me", 1.0, before, 1)
    found = await bare.tier.holders("u-1", "another")
    assert (await bare.tier.bury("u-1", 1, "another")).others == found.others
    until, _ = found.others["me"]
    assert before + 0.99 <= until <= found.now + 1.01
    assert not (await bare.tier.holders("u-1", "me")).others
    await bare.tier.ping("me", -1.0, before, 0)
    left = await bare.tier.holders("u-1", "another")
    assert all(until < left.now for until, _ in left.others.values())


async def test_a_ping_comes_back_and_tells_what_is_left_of_trust(bare: Bare) -> None:
    """To whoever sent it; in the register stands up to where it took in what was told."""
    assert await bare.tier.ping("me", 1.0, 0.0, 6) == 0
    await bare.trust()
    async with bare.tier.listen() as notices:
        async with asyncio.timeout(5):
            await bare.tier.put("u-1", Versioned(5, state()), None)
            told = await anext(notices)
            assert 1.5 < await bare.tier.ping("me", 1.0, 0.0, 7) <= 2.0
            echo = await anext(notices)
            assert (echo.echo, echo.version, echo.digest) == ("me", 7, b"")
            assert echo.sent > told.sent
        await bare.tier.ping("me", 1.0, 0.0, 8)
        _, seen = (await bare.tier.holders("u-1", "another")).others["me"]
        assert seen == told.sent
        await bare.tier.ping("me", 0.0, 0.0, 9)
        assert not (await bare.tier.holders("u-1", "another")).others


async def test_leases_that_ended_long_ago_are_forgotten_where_there_are_many(bare: Bare) -> None:
    """So that the register of a service whose processes come and go is bounded."""
    await bare.tier.ping("me", 1.0, 0.0, 1)
    register = bare.store.bucket_key("0", "leases")
    seconds, _ = await bare.store.command("TIME")
    for index in range(40):
        for name, age in (("old", 90), ("new", 30)):
            lease = b"%d|0" % ((int(seconds) - age) * 1000)
            await bare.store.command("HSET", register, f"{name}-{index}", lease)
    await bare.tier.ping("me", 1.0, 0.0, 2)
    names = await bare.store.command("HKEYS", register)
    assert {bytes(name) for name in names} == {
        *(b"new-%d" % index for index in range(40)), b"me", b"run", b"born", b"last"
    }  # fmt: skip


async def test_a_fill_needs_the_token_that_stands_there(bare: Bare) -> None:
    """And trust in the generation that it was given under."""
    generation = await bare.trust()
    record = Versioned(5, state())
    ticket = await bare.tier.ticket("u-1")
    assert ticket is not None
    for wrong in (Ticket(ticket.token, OTHER), Ticket(pack(TOKEN, 0), generation)):
        await bare.tier.fill("u-1", record, wrong)
        assert await bare.held() == ticket.token
    await bare.store.command("DEL", bare.store.bucket_key("0", "guard"))
    await bare.tier.fill("u-1", record, ticket)
    assert await bare.held() == ticket.token
    await bare.trust()
    await bare.tier.fill("u-1", record, ticket)
    filled = await bare.held()
    assert filled == bare.tier._value(FILLED, bare.digest, record, generation)
    await bare.tier.fill("u-1", Versioned(4, state(value=0.1)), ticket)
    assert await bare.held() == filled


async def test_trust_that_lasts_too_long_or_is_of_another_run_is_none(bare: Bare) -> None:
    """A clock was set back, or a guard was copied from another server: it is removed."""
    guard = bare.store.bucket_key("0", "guard")
    for change in (
        ("PERSIST", guard),
        ("PEXPIRE", guard, 60_000),
        ("SET", guard, OTHER + b"another run", "PX", 1_000),
    ):
        await bare.trust()
        assert await bare.tier.ping("me", 1.0, 0.0, 1) > 0
        await bare.store.command(*change)
        assert await bare.tier.ticket("u-1") is None
        assert not (await bare.tier.read("u-1")).trusted
        assert await bare.tier.ping("me", 1.0, 0.0, 2) == 0
    await bare.trust()
    await bare.store.command("PEXPIRE", guard, 60_000)
    assert await bare.tier.begin("me", "head") is not None  # where nobody pings or misses
    assert not (await bare.tier.read("u-1")).trusted
    generation = await bare.trust()
    await bare.tier.renew(generation, "head")
    assert not (await bare.tier.read("u-1")).trusted


async def test_leases_of_another_run_or_another_clock_are_begun_anew(bare: Bare) -> None:
    """Then nobody can tell who holds what, and an erasure waits for the longest lease."""
    seconds, _ = await bare.store.command("TIME")
    now = int(seconds) * 1000
    for field, value in (
        ("run", "another"),
        ("born", "x"),
        ("born", None),
        ("last", now + 60_000),
        ("last", now - 60_000),
    ):
        await bare.tier.ping("other", 60.0, 0.0, 1)
        assert "other" in (await bare.tier.holders("u-1", "me")).others
        register = bare.store.bucket_key("0", "leases")
        if value is None:
            await bare.store.command("HDEL", register, field)
        else:
            await bare.store.command("HSET", register, field, value)
        holders = await bare.tier.holders("u-1", "me")
        assert holders.others == {}, (field, value)
        assert holders.since < 1.0


async def test_a_full_server_erases_and_tells_who_holds_leases(
    redis_server: Callable[..., Server],
) -> None:
    """Though it takes nothing new, neither a copy nor a lease."""
    bare = Bare(f"redis://127.0.0.1:{redis_server().port}")
    async with bare.store:
        generation = await bare.trust()
        await bare.holding(copies(generation)["state"])
        await bare.tier.ping("other", 60.0, 0.0, 1)
        await bare.store.command("CONFIG", "SET", "maxmemory", 1)
        assert "other" in (await bare.tier.holders("u-1", "me")).others
        assert "other" in (await bare.tier.bury("nobody", 7, "me")).others
        await bare.tier.put("u-1", Versioned(7, state()), Ticket(b"", generation))
        assert await bare.held() is None
        with pytest.raises(UnavailableError):
            await bare.tier.ping("other", 60.0, 0.0, 2)


async def test_who_has_left_the_register_keeps_no_later_erasure_waiting(bare: Bare) -> None:
    """Such as a command of its own that erases somebody: only of whom leases were given to is it to
    be told whether the server's clock was set."""
    register = bare.store.bucket_key("0", "leases")
    for name, lasts, waits in (("gone", -1.0, False), ("killed", 1.0, True)):
        await bare.tier.ping(name, 1.0, 0.0, 1)
        await bare.tier.ping(name, lasts, 0.0, 2)
        await bare.store.command("HINCRBY", register, "born", -5000)
        await bare.store.command("HINCRBY", register, "last", -5000)
        holders = await bare.tier.bury("u-1", 1, "me")
        assert (holders.since < 1.0) is waits, name
        assert not holders.others


async def test_a_key_of_another_type_counts_as_missing(bare: Bare) -> None:
    """Whichever it is, and whatever asks for it first; it is replaced, or goes."""
    keys = {"record": bare.key}
    for name in ("guard", "repair", "repairer", "leases"):
        keys[name] = bare.store.bucket_key("0", name)
    for name, key in keys.items():
        for call, ask in CALLS.items():
            await bare.trust()
            await bare.store.command("DEL", key)
            await bare.store.command("RPUSH", key, "x")
            await ask(bare.tier)
            if name == "record" and call in ("put", "bury", "repair"):
                assert await bare.held() is None, call
        await bare.store.command("DEL", key)
        await bare.store.command("RPUSH", key, "x")
        assert await bare.tier.ping("me", 1.0, 0.0, 1) > 0 or name == "guard"
        await bare.trust()
        assert await bare.tier.ping("me", 1.0, 0.0, 2) > 0
        assert "me" in (await bare.tier.holders("u-1", "another")).others
        assert await bare.tier.ticket("u-1") is not None
