"""RedisStore when things go wrong: each failure is one of our errors, within its time limit."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
import time
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import pytest
from redis_servers import BINARY, Server, free_port, running

from layered_store.errors import StoreError, StoreTimeoutError, UnavailableError
from layered_store.snapshot import StateSnapshot
from layered_store.stores.redis import RedisScript, RedisStore
from layered_store.stores.redis.failures import NotSentError
from layered_store.stores.redis.links import LaneLink
from layered_store.testing.clock import FakeClock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

pytestmark = pytest.mark.skipif(BINARY is None, reason="redis-server is not installed")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as own:
        yield own


@asynccontextmanager
async def answering(*answers: bytes | None) -> AsyncIterator[str]:
    """Run a server that answers each connection's first bytes so; None cuts the connection."""
    number = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal number
        answer = answers[min(number, len(answers) - 1)]
        number += 1
        await reader.read(1000)
        if answer is not None:
            writer.write(answer)
            await writer.drain()
            await reader.read(1000)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        yield f"redis://127.0.0.1:{listening.sockets[0].getsockname()[1]}"


async def failure(work: Awaitable[object]) -> StoreError:
    with pytest.raises(StoreError) as caught:
        await work
    return caught.value


@contextmanager
def hanging_up() -> Iterator[tuple[str, list[object]]]:
    """Run a server that ends each connection as soon as it is made; who made them stands in a list.

    In a thread of its own: so the end may come in whatever moment of the client's event loop.
    """
    peers: list[object] = []
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while not stop.is_set():
                connection, peer = listening.accept()
                peers.append(peer)  # before the client can know that it ended
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        place = listening.getsockname()[:2]
        try:
            yield f"redis://127.0.0.1:{place[1]}", peers
        finally:
            stop.set()
            socket.create_connection(place).close()
            thread.join()


GARBAGE = {
    "nonsense": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "half a reply, then the end": b"$100\r\nabc",
    "cut": None,
}


async def test_a_peer_that_hangs_up_is_called_once_per_call() -> None:
    """As a proxy does that has no server behind it."""
    with hanging_up() as (url, peers):
        for call in range(50):
            store = RedisStore(url)
            assert isinstance(await failure(store.get_latest("u-1")), UnavailableError)
            await store.aclose()
            assert len(peers) == call + 1


@pytest.mark.parametrize("answer", GARBAGE.values(), ids=GARBAGE)
async def test_broken_peer(answer: bytes | None) -> None:
    """A peer that answers no Redis or cuts the line is unavailable; a sent write is unknown."""
    async with answering(answer) as url:
        store = RedisStore(url, timeout=0.2)
        read = await failure(store.get_latest("u-1"))
        write = await failure(store.upsert_latest(StateSnapshot("u-1")))
        assert isinstance(read, UnavailableError)
        assert read.retryable
        assert (read.operation, read.layer) == ("get_latest", "RedisStore")
        assert not read.outcome_unknown
        assert isinstance(write, UnavailableError)
        assert write.outcome_unknown
        assert not await store.health_check()
        await store.aclose()


@pytest.mark.parametrize(
    "answer", [b"+OK\r\n", b"*0\r\n", b"*3\r\n$-1\r\n:1\r\n:1\r\n", b"*-1\r\n"]
)
async def test_a_reply_to_another_question_acknowledges_nothing(answer: bytes) -> None:
    """Nor is it taken apart as if it were the right one."""
    async with answering(answer) as url:
        calls: list[tuple[Callable[[RedisStore], Awaitable[object]], bool]] = [
            (lambda store: store.upsert_latest(StateSnapshot("u-1")), True),
            (lambda store: store.upsert_latest_many([StateSnapshot("u-1")]), True),
            (lambda store: store.delete("u-1"), True),
            (lambda store: store.get_latest_many(["u-1", "u-2"]), False),
        ]
        if not answer.startswith((b"*0", b"*3")):  # which a history may be, if of nobody
            calls.append((lambda store: store.get_history("u-1", 3), False))
        for call, writes in calls:
            store = RedisStore(url, timeout=0.2, history_limit=3)
            error = await failure(call(store))
            assert isinstance(error, UnavailableError)
            assert error.outcome_unknown is writes
            await store.aclose()


REPLIES = {
    "READONLY": (b"-READONLY You can't write against a read only replica.\r\n", True),
    "OOM": (b"-OOM command not allowed when used memory > 'maxmemory'.\r\n", True),
    "LOADING": (b"-LOADING Redis is loading the dataset in memory\r\n", True),
    "MASTERDOWN": (b"-MASTERDOWN Link with MASTER is down\r\n", True),
    "MISCONF": (b"-MISCONF Redis is configured to save RDB snapshots\r\n", True),
    "NOREPLICAS": (b"-NOREPLICAS Not enough good replicas to write.\r\n", True),
    "CLUSTERDOWN": (b"-CLUSTERDOWN Hash slot not served\r\n", True),
    "BUSY": (b"-BUSY Redis is busy running a script.\r\n", True),
    "MAXCLIENTS": (b"-ERR max number of clients reached\r\n", True),
    "DENIED": (b"-DENIED Redis is running in protected mode because\r\n", False),
    "NOAUTH": (b"-NOAUTH Authentication required.\r\n", False),
    "NOPERM": (b"-NOPERM this user has no permissions\r\n", False),
    "MOVED": (b"-MOVED 866 127.0.0.1:1\r\n", False),
}


@pytest.mark.parametrize("code", REPLIES)
async def test_error_replies(code: str) -> None:
    """An error reply becomes UnavailableError with its code; a refused write did not happen."""
    answer, retryable = REPLIES[code]
    async with answering(answer) as url:
        store = RedisStore(url)
        error = await failure(store.upsert_latest(StateSnapshot("u-1")))
        assert isinstance(error, UnavailableError)
        assert code in str(error)
        assert error.retryable is retryable
        assert not error.outcome_unknown
        await store.aclose()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://127.0.0.1:{}/99", "no database of this number"),
        ("redis+cluster://127.0.0.1:{}", "use a redis:// URL"),
        ("redis+sentinel://127.0.0.1:{}/mymaster", "no Sentinel"),
    ],
)
async def test_a_url_that_names_something_else_than_is_there(
    url: str, said: str, server: Server
) -> None:
    """What is wrong with it is told; waiting does not help."""
    store = RedisStore(url.format(server.port))
    error = await failure(store.get_latest("u-1"))
    assert isinstance(error, UnavailableError)
    assert said in str(error) and not error.retryable
    assert said in (await store.health_report()).message
    await store.aclose()


async def test_a_server_without_a_place_for_a_connection_is_unavailable() -> None:
    """So that a ``Retry`` repeats, a ``Fallback`` helps out and a breaker opens."""
    with running() as own:
        other = RedisStore(own.url)
        await other.upsert_latest(StateSnapshot("u-1"))
        await other.command("CONFIG", "SET", "maxclients", 1)
        store = RedisStore(own.url)
        for _ in range(3):
            error = await failure(store.get_latest("u-1"))
            assert isinstance(error, UnavailableError)
            assert error.retryable
        await other.aclose()
        await store.aclose()


async def test_refused() -> None:
    """A port where nobody listens is unavailable at once, and no write is in doubt."""
    store = RedisStore(f"redis://127.0.0.1:{free_port()}")
    assert type(await failure(store.get_latest("u-1"))) is UnavailableError
    assert not (await failure(store.upsert_latest(StateSnapshot("u-1")))).outcome_unknown
    assert not (await failure(store.delete("u-1"))).outcome_unknown
    assert not await store.health_check()
    await store.aclose()


async def test_hung_server_costs_the_time_limit(server: Server) -> None:
    """A hung server costs each call its limit once, whether connected before or not."""
    store = RedisStore(server.url, timeout=0.2, connect_timeout=0.2, probe_seconds=0.2)
    await store.get_latest("u-1")
    server.freeze()
    try:
        for _ in range(2):
            begun = time.monotonic()
            error = await failure(store.upsert_latest(StateSnapshot("u-1")))
            assert isinstance(error, StoreTimeoutError)
            assert error.outcome_unknown
            assert 0.15 < time.monotonic() - begun < 0.5
        begun = time.monotonic()
        errors = await asyncio.gather(*(failure(store.get_latest(f"u-{n}")) for n in range(500)))
        assert time.monotonic() - begun < 0.6
        assert all(isinstance(error, StoreTimeoutError) for error in errors)
        assert len({id(error) for error in errors}) == 500
        assert not await store.health_check()
    finally:
        server.thaw()
    await store.get_latest("u-1")
    assert await store.health_check()
    await store.aclose()


async def test_a_read_that_comes_late_to_a_hung_connection_has_another() -> None:
    """A connection is given up for its oldest call; reads that had hardly begun go on elsewhere."""
    clock = FakeClock()
    answers: list[bytes] = [b"", b"*2\r\n$-1\r\n$-1\r\n"]
    asked: list[bytes] = []
    arrived = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer = answers.pop(0)
        while data := await reader.read(1000):
            asked.append(data)
            arrived.set()
            writer.write(answer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        url = f"redis://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        store = RedisStore(url, timeout=1.0, connect_timeout=1.0, clock=clock)

        async def begin(*works: Awaitable[object]) -> list[asyncio.Future[object]]:
            arrived.clear()
            tasks = [asyncio.ensure_future(work) for work in works]
            await arrived.wait()
            return tasks

        (old,) = await begin(store.get_latest("old"))
        await clock.advance(0.4)
        (early,) = await begin(store.get_latest("early"))
        await clock.advance(0.3)
        late = await begin(store.get_latest("late"), store.get_latest("later"))
        (write,) = await begin(store.upsert_latest(StateSnapshot("late")))
        del asked[:]
        arrived.clear()
        await clock.advance(0.4)
        assert isinstance(await failure(old), StoreTimeoutError)
        assert isinstance(await failure(early), StoreTimeoutError)
        assert (await failure(write)).outcome_unknown
        assert await asyncio.gather(*late) == [None, None]
        assert len(asked) == 1 and asked[0].startswith(b"*3\r\n$4\r\nMGET")
        await store.aclose()


async def test_busy_process_is_no_timeout(server: Server) -> None:
    """A reply that came while this process was busy is used, not given up."""
    store = RedisStore(server.url, timeout=0.1)
    await store.upsert_latest(StateSnapshot("busy"))
    call = asyncio.ensure_future(store.get_latest("busy"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    time.sleep(0.3)  # noqa: ASYNC251  the loop is blocked on purpose
    assert await call is not None
    await store.aclose()


async def test_wrong_password() -> None:
    """A refused login is not retryable and shows no password."""
    with running("--requirepass", "right") as own:
        for url in (f"redis://:s3cret@127.0.0.1:{own.port}", own.url):
            store = RedisStore(url)
            error = await failure(store.get_latest("u-1"))
            assert isinstance(error, UnavailableError)
            assert not error.retryable
            report = await store.health_report()
            assert "s3cret" not in f"{error!r}{error.__cause__!r}{store!r}{report}"
            await store.aclose()


async def test_real_replica_and_full_server(server: Server) -> None:
    """A replica and a full server refuse writes retryably; reads go on; all recovers."""
    with running() as own:
        store = RedisStore(own.url)
        await store.upsert_latest(StateSnapshot("u-1"))
        await store.command("CONFIG", "SET", "replica-read-only", "yes")
        await store.command("REPLICAOF", "127.0.0.1", server.port)
        error = await failure(store.upsert_latest(StateSnapshot("u-2")))
        assert isinstance(error, UnavailableError)
        assert error.retryable
        await store.command("REPLICAOF", "NO", "ONE")
        await store.upsert_latest(StateSnapshot("u-1"))
        await store.command("CONFIG", "SET", "maxmemory", 1)
        error = await failure(store.upsert_latest(StateSnapshot("u-2")))
        assert "OOM" in str(error)
        assert error.retryable
        assert await store.get_latest("u-1") is not None
        await store.command("CONFIG", "SET", "maxmemory", 0)
        await store.upsert_latest(StateSnapshot("u-2"))
        await store.aclose()


async def test_a_batch_of_which_redis_refuses_a_part_says_that_it_took_effect() -> None:
    """The error does not read as if nothing had been stored; after a whole refusal it does."""
    with running() as own:
        admin = RedisStore(own.url)
        allowed = b"~*" + admin.digest("u-1").hex().encode() + b"*"
        await admin.command("ACL", "SETUSER", "part", "on", ">s3cret", "+@all", allowed)
        store = RedisStore(own.url.replace("//", "//part:s3cret@"))
        for users, unknown in ((["u-2", "u-1"], False), (["u-1", "u-2"], True)):
            error = await failure(store.upsert_latest_many(map(StateSnapshot, users)))
            assert isinstance(error, UnavailableError)
            assert error.outcome_unknown is unknown
            found = await admin.get_latest_many(users)
            assert list(found) == ["u-1"] * unknown
        await store.aclose()
        await admin.aclose()


async def test_killed_server_comes_back() -> None:
    """Calls fail while the server is dead and succeed once it is back, on the same store."""
    with running() as own:
        store = RedisStore(own.url)
        await store.upsert_latest(StateSnapshot("u-1"))
        own.kill()
        assert isinstance(await failure(store.get_latest("u-1")), UnavailableError)
        own.start()
        assert await store.get_latest("u-1") is None
        await store.upsert_latest_many([StateSnapshot("u-1"), StateSnapshot("u-2")])
        await store.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "no")
        results = await asyncio.gather(
            *(store.get_latest("u-1") for _ in range(3)), return_exceptions=True
        )
        assert all(r is None or isinstance(r, StateSnapshot | UnavailableError) for r in results)
        assert await store.get_latest("u-1") is not None
        await store.aclose()


async def test_cancelled_calls_never_mix_replies(server: Server) -> None:
    """Among thousands of calls, many cancelled at any moment, each gets its own reply."""
    store = RedisStore(server.url)
    users = [f"mix-{n}" for n in range(200)]
    await store.upsert_latest_many(
        StateSnapshot(user, updated_at_unix_ms=n) for n, user in enumerate(users)
    )
    echo = RedisScript("return ARGV[1]")
    rng = random.Random(7)
    cancelled = 0

    async def call(n: int) -> None:
        if n % 2:
            found = await store.get_latest(users[n % 200])
            assert found is not None
            assert found.updated_at_unix_ms == n % 200
        else:
            assert await store.run_script(echo, [b"k"], [n]) == str(n).encode()

    for base in range(0, 4000, 100):
        tasks = [asyncio.ensure_future(call(base + n)) for n in range(100)]
        for _ in range(rng.randrange(6)):
            await asyncio.sleep(0)
        for task in rng.sample(tasks, 50):
            cancelled += task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(r is None or isinstance(r, asyncio.CancelledError) for r in results)
    assert cancelled > 1000
    assert int(_field(await store.command("INFO", "clients"), "connected_clients")) <= 4
    await call(1)
    await store.aclose()


def _field(info: bytes, name: str) -> str:
    return dict(line.split(":") for line in info.decode().split("\r\n") if ":" in line)[name]


async def test_burst_waits_for_places(server: Server) -> None:
    """A burst beyond what the connections can carry waits, fails nothing and opens no more."""
    store = RedisStore(server.url, max_connections=2, timeout=5.0)
    await store.upsert_latest(StateSnapshot("u-1"))
    results = await asyncio.gather(*(store.get_latest("u-1") for _ in range(10_000)))
    assert all(result is not None for result in results)
    assert int(_field(await store.command("INFO", "clients"), "connected_clients")) <= 2
    await store.aclose()


async def test_waiting_for_a_place_is_limited_and_probes_pass(server: Server) -> None:
    """With all places taken by a hung server's calls, further ones fail in time as not sent."""
    store = RedisStore(server.url, max_connections=1, timeout=0.3, connect_timeout=0.3)
    await store.get_latest("u-1")
    server.freeze()
    try:
        begun = time.monotonic()
        writes = [store.upsert_latest(StateSnapshot(f"u-{n}")) for n in range(6000)]
        probe = asyncio.ensure_future(store.health_check())
        errors = await asyncio.gather(*map(failure, writes))
        assert not await probe
        assert time.monotonic() - begun < 8
        assert all(isinstance(error, StoreTimeoutError) for error in errors)
        assert any(not error.outcome_unknown for error in errors)
    finally:
        server.thaw()
    await store.get_latest("u-1")
    await store.aclose()


async def test_close_waits_for_calls_under_way(server: Server) -> None:
    """aclose lets calls that were sent finish and leaves no task behind."""
    before = len(asyncio.all_tasks())
    store = RedisStore(server.url)
    await store.get_latest("u-1")
    calls = [asyncio.ensure_future(store.upsert_latest(StateSnapshot("end"))) for _ in range(50)]
    await asyncio.sleep(0)
    await store.aclose()
    assert await asyncio.gather(*calls) == [None] * 50
    assert len(asyncio.all_tasks()) == before


async def test_close_waits_for_calls_that_have_to_bring_their_script(server: Server) -> None:
    """A server that was just started knows none: the call goes out once more."""
    store = RedisStore(server.url)
    await store.command("SCRIPT", "FLUSH")
    calls = [asyncio.ensure_future(store.upsert_latest(StateSnapshot("end"))) for _ in range(3)]
    await asyncio.sleep(0)
    await store.aclose()
    assert await asyncio.gather(*calls) == [None] * 3


async def test_cancelled_while_connecting(server: Server) -> None:
    """Cancelling callers while the connection is being made harms neither others nor the close."""
    store = RedisStore(server.url)
    tasks = [asyncio.ensure_future(store.get_latest("nobody")) for _ in range(10)]
    await asyncio.sleep(0)
    for task in tasks[:9]:
        task.cancel()
    assert await tasks[9] is None
    await store.aclose()
    store = RedisStore(server.url)
    alone = asyncio.ensure_future(store.get_latest("nobody"))
    await asyncio.sleep(0)
    alone.cancel()
    await asyncio.gather(alone, return_exceptions=True)
    await store.aclose()


async def test_a_batch_that_ends_half_way_says_that_it_took_effect(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was never sent did not happen, but what went ahead of it did."""

    async def not_sent(self: LaneLink, commands: Sequence[object]) -> list[object]:  # noqa: ARG001
        return [NotSentError() for _ in commands]

    monkeypatch.setattr(LaneLink, "call_all", not_sent)
    async with RedisStore(server.url) as store:
        batch = [StateSnapshot("half-1"), StateSnapshot("half-2")]
        with pytest.raises(UnavailableError) as caught:
            await store.upsert_latest_many(batch)
        assert caught.value.outcome_unknown
        assert await store.get_latest("half-1") == batch[0]
        assert await store.get_latest("half-2") is None
