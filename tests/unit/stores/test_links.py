"""Links to Redis, without a server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from redis.exceptions import ClusterError, NoScriptError

from layered_store.clock import SYSTEM_CLOCK
from layered_store.errors import ClosedError
from layered_store.stores.redis.address import Address
from layered_store.stores.redis.client_link import ClientLink
from layered_store.stores.redis.failures import ConnectionLostError, NotSentError, ReplyError
from layered_store.stores.redis.links import _PENDING, LaneLink, Limits
from layered_store.testing.clock import FakeClock, settle


async def test_a_lane_that_is_lost_at_once_does_not_stop_the_loop() -> None:
    """Who comes right after a connection was made, and finds it gone, has another one made."""
    address: Any = None
    link = LaneLink(address, Limits(1.0, 1.0, 1, SYSTEM_CLOCK))
    refused = OSError("refused")
    answers = [None, refused]

    async def open_lane() -> Exception | None:
        return answers.pop(0)

    link._open_lane = open_lane  # type: ignore[method-assign]
    link._connect()
    # Begins in the same turn of the loop, after the connection was made, before anybody is told.
    found = await asyncio.create_task(link.call(("PING",)))
    assert isinstance(found, Exception) and found.__cause__ is refused
    assert not answers


async def test_whoever_waits_for_a_connection_waits_in_order_and_in_time() -> None:
    """What was cancelled or waited too long is never sent; the rest keeps its order."""
    address = Address()
    clock = FakeClock()
    link = LaneLink(address, Limits(1.0, 1.0, 1, clock))
    gate = asyncio.Event()

    async def open_lane() -> Exception | None:
        await gate.wait()
        return None

    link._open_lane = open_lane  # type: ignore[method-assign]
    early = link.send_now(b"early")
    await clock.advance(1.5)
    gone, kept, read = link.send_now(b"gone"), link.send_now(b"kept"), link.read_now(b"key")
    gone.cancel()
    await clock.advance(0.6)
    failure = early.result()
    assert isinstance(failure, NotSentError)
    assert isinstance(failure.__cause__, TimeoutError)
    lane = Kept()
    link._lanes.append(lane)  # type: ignore[arg-type]
    gate.set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert lane.sent == [(b"kept", [kept]), (b"key", read)]
    link._lanes.clear()
    late = link.send_now(b"late")
    await link.aclose()
    assert isinstance(late.result().__cause__, ClosedError)
    assert isinstance(link.send_now(b"later").result().__cause__, ClosedError)


async def test_each_who_waits_for_a_place_has_a_limit_of_its_own() -> None:
    """Also after others were given up, for want of time or of a server."""
    clock = FakeClock()
    link = LaneLink(Address(), Limits(1.0, 1.0, 1, clock))
    refused = OSError("refused")

    async def open_lane() -> Exception | None:
        return refused

    link._open_lane = open_lane  # type: ignore[method-assign]
    full = Kept()
    full.pending = (None,) * _PENDING
    for afterwards_refused in (False, True, False):
        link._lanes = [full]  # type: ignore[list-item]
        first = link.send_now(b"first")
        await clock.advance(0.5)
        second = link.send_now(b"second")
        await clock.advance(1.4)
        assert not first.done()
        await clock.advance(0.2)
        assert isinstance(first.result().__cause__, TimeoutError)
        assert not second.done()
        await clock.advance(0.5)
        assert isinstance(second.result().__cause__, TimeoutError)
        link._lanes.clear()
        if afterwards_refused:
            assert (await link.send_now(b"none")).__cause__ is refused
    await link.aclose()


async def test_no_more_connections_are_made_than_may_be() -> None:
    """Whoever finds them all full waits for a place."""
    link = LaneLink(Address(), Limits(1.0, 1.0, 2, FakeClock()))
    attempts = 0

    async def open_lane() -> Exception | None:
        nonlocal attempts
        attempts += 1
        lane = Kept()
        lane.pending = (None,) * _PENDING
        link._lanes.append(lane)  # type: ignore[arg-type]
        return None

    link._open_lane = open_lane  # type: ignore[method-assign]
    calls = [link.send_now(b"call") for _ in range(5)]
    await settle()
    assert attempts == 2
    assert not any(call.done() for call in calls)
    link._lanes.clear()
    await link.aclose()


async def test_who_comes_late_into_an_attempt_has_the_next_one_too() -> None:
    """A server that came back during a hung attempt is not reported as hung to late comers."""
    clock = FakeClock()
    link = LaneLink(Address(), Limits(1.0, 1.0, 1, clock))
    attempts = 0

    async def open_lane() -> Exception | None:
        nonlocal attempts
        attempts += 1
        try:
            async with clock.timeout(1.0):
                await asyncio.Event().wait()
        except TimeoutError as exc:
            return exc
        return None

    link._open_lane = open_lane  # type: ignore[method-assign]
    first = link.send_now(b"first")
    await clock.advance(0.4)
    early = link.send_now(b"early")
    await clock.advance(0.4)
    late, later = link.send_now(b"late"), link.read_now(b"later")
    await clock.advance(0.3)
    assert attempts == 2
    for future in (first, early):
        assert isinstance(future.result().__cause__, TimeoutError)
    assert not late.done() and not later.done()
    await clock.advance(1.0)
    for future in (late, later):
        assert isinstance(future.result().__cause__, TimeoutError)
    assert attempts == 2
    await link.aclose()


async def test_commands_that_belong_together_go_to_a_lane_with_room() -> None:
    """A full one is passed over."""
    link = LaneLink(Address(), Limits(1.0, 1.0, 2, FakeClock()))
    full, free = Kept(), Kept()
    full.pending = (None,) * _PENDING
    link._lanes += [full, free]  # type: ignore[list-item]
    calls = asyncio.create_task(link.call_all([("PING",), ("PING",)]))
    await asyncio.sleep(0)
    assert not full.sent
    ((data, futures),) = free.sent
    assert data == b"*1\r\n$4\r\nPING\r\n" * 2
    for number, future in enumerate(futures):
        future.set_result(number)
    assert await calls == [0, 1]


async def test_a_further_connection_that_fails_costs_nobody_a_call() -> None:
    """Those who wait have the lanes that are there, as soon as these have room."""
    link = LaneLink(Address(), Limits(1.0, 1.0, 2, FakeClock()))
    lane = Kept()
    lane.pending = (None,) * _PENDING
    link._lanes.append(lane)  # type: ignore[arg-type]

    async def open_lane() -> Exception | None:
        return OSError("refused")

    link._open_lane = open_lane  # type: ignore[method-assign]
    call = link.send_now(b"call")
    for _ in range(3):
        await asyncio.sleep(0)
    assert not call.done() and link._connecting is None
    lane.pending = ()
    link._changed(lane)  # type: ignore[arg-type]
    assert lane.sent == [(b"call", [call])]
    link._lanes.clear()
    await link.aclose()


async def test_closing_waits_for_calls_under_way_no_longer_than_for_a_reply() -> None:
    """A hung server cannot hold a process back that wants to end."""
    clock = FakeClock()
    link = LaneLink(Address(), Limits(5.0, 1.0, 1, clock))
    lane = Kept()
    link._lanes.append(lane)  # type: ignore[arg-type]
    closing = asyncio.create_task(link.aclose())
    await clock.advance(0.9)
    assert not lane.closed and not closing.done()
    await clock.advance(0.2)
    assert lane.closed and closing.done()


async def elsewhere(work: Callable[[], None]) -> None:
    """Run something in a thread that has no event loop."""
    thread = threading.Thread(target=work)
    thread.start()
    await asyncio.to_thread(thread.join)


async def test_abandoned_from_another_thread_a_link_ends_on_its_own_loop() -> None:
    """Its lanes close, who waits is told, and what is just being connected is not kept."""
    connection = Connection()
    link = LaneLink(Address(lambda: connection), Limits(5.0, 5.0, 2, FakeClock()))
    lane = Kept()
    lane.pending = (None,) * _PENDING
    link._lanes.append(lane)  # type: ignore[arg-type]
    waiting = link.send_now(b"waiting")
    await asyncio.sleep(0)
    await elsewhere(link.abandon)
    assert isinstance((await waiting).__cause__, ConnectionLostError)
    assert lane.closed and not connection.closed
    connection.gate.set()
    for _ in range(5):
        await asyncio.sleep(0)
    assert connection.closed
    assert link._lanes == [lane]
    assert isinstance(link.send_now(b"later").result().__cause__, ClosedError)


@pytest.mark.parametrize("kind", ["lanes", "client"])
def test_a_link_of_a_loop_that_is_closed_is_abandoned_in_silence(kind: str) -> None:
    """Nothing is left to close there."""
    client = Client()

    async def make() -> LaneLink | ClientLink:
        limits = Limits(1.0, 1.0, 1, FakeClock())
        if kind == "lanes":
            return LaneLink(Address(), limits)
        return ClientLink(Address(client=lambda: client), limits)

    asyncio.run(make()).abandon()
    assert not client.closed


@pytest.mark.parametrize("shared", [False, True])
async def test_an_abandoned_client_is_closed_on_its_own_loop_unless_it_is_the_callers(
    shared: bool,
) -> None:
    """The caller may use what was passed in elsewhere."""
    client = Client()
    link = ClientLink(
        Address(client=lambda: client, shared=shared), Limits(1.0, 1.0, 1, FakeClock())
    )
    await elsewhere(link.abandon)
    for _ in range(3):
        await asyncio.sleep(0)
    assert client.closed is not shared


async def test_a_client_that_hangs_is_closed_when_its_time_is_up() -> None:
    """Closing waits for the calls under way first, as long as a reply may take."""
    clock = FakeClock()
    client = Client()
    link = ClientLink(Address(client=lambda: client), Limits(5.0, 1.0, 2, clock))
    # A driver that swallows the cancellation: its call keeps the place.
    call = asyncio.create_task(link.call(("PING",)))
    await clock.advance(0)
    closing = asyncio.create_task(link.aclose())
    await clock.advance(0.9)
    assert not client.closed and not closing.done()
    await clock.advance(0.2)
    assert client.closed and closing.done()
    assert isinstance(await call, ConnectionLostError)
    assert not link._running, "it would connect anew, and nobody would close that"


async def test_who_waits_for_a_place_when_a_client_is_closed_is_not_sent() -> None:
    """The call before it is waited for."""
    client = Client()
    link = ClientLink(Address(client=lambda: client), Limits(5.0, 1.0, 1, FakeClock()))
    first, second = (asyncio.create_task(link.call(("PING",))) for _ in range(2))
    await asyncio.sleep(0)
    closing = asyncio.create_task(link.aclose())
    await asyncio.sleep(0)
    client.gate.set()
    await closing
    assert await first == b"late"
    failure = await second
    assert isinstance(failure, NotSentError)
    assert isinstance(failure.__cause__, ClosedError)
    assert client.calls == 1


@pytest.mark.parametrize("step", ["owners", "connect"])
async def test_a_cluster_that_is_looked_for_is_left_at_once(step: str) -> None:
    """The driver swallows the cancellation when what it tidies up fails; closing waits for it."""

    class Seeking(Client):
        async def initialize(self) -> None:
            await self.execute_command()

        def get_node_from_key(self, key: str) -> None:
            raise AssertionError("its caller is gone")

    clock = FakeClock()
    client = Seeking()
    link = ClientLink(Address(client=lambda: client, cluster=True), Limits(5.0, 1.0, 1, clock))
    work = link.owners([b"a"]) if step == "owners" else link.connect(b"a")
    call: asyncio.Task[Any] = asyncio.ensure_future(work)
    await clock.advance(0)
    call.cancel()
    await asyncio.wait([call], timeout=5)
    assert call.cancelled()
    closing = asyncio.create_task(link.aclose())
    await clock.advance(0.9)
    assert not closing.done()
    client.gate.set()
    await closing
    assert client.closed


async def test_calls_through_a_client_wait_for_a_place_in_time() -> None:
    """And who found none was not sent."""
    clock = FakeClock()
    client = Client()
    link = ClientLink(Address(client=lambda: client), Limits(0.5, 1.0, 1, clock))
    first = asyncio.create_task(link.call(("PING",)))
    await clock.advance(0)
    second = asyncio.create_task(link.call(("PING",)))
    await clock.advance(1.6)
    failure = await second
    assert isinstance(failure, NotSentError)
    assert isinstance(failure.__cause__, TimeoutError)
    assert client.calls == 1
    client.gate.set()
    assert await first == b"late"


async def test_a_clients_failure_is_returned() -> None:
    """As what it is, and no reply: None would be an absent user. Its place is free again."""

    class Failing:
        error = Exception("refused")

        async def execute_command(self, *_: Any) -> bytes:
            raise self.error

    client = Failing()
    link = ClientLink(Address(client=lambda: client), Limits(0.5, 1.0, 1, FakeClock()))
    for call in (link.call(("GET", "k")), link.probe()):
        assert await call is client.error
    assert await link.call_all([("GET", "k"), ("GET", "l")]) == [client.error] * 2
    client.error = NoScriptError("of the driver")
    reply = await link.call(("EVALSHA", "f", 1, "k"))
    assert isinstance(reply, ReplyError) and reply.code == "NOSCRIPT"


async def test_a_call_that_nodes_send_to_and_fro_is_made_again() -> None:
    """A slot that moves: nothing was done yet, and the next look finds where it is."""

    class Moving(Client):
        left = 2

        async def execute_command(self, *_: Any) -> bytes:
            if self.left:
                self.left -= 1
                raise ClusterError("TTL exhausted.")
            return b"value"

    client, clock = Moving(), FakeClock()
    link = ClientLink(Address(client=lambda: client, cluster=True), Limits(0.5, 1.0, 1, clock))
    call = asyncio.create_task(link.call(("GET", "k")))
    await clock.advance(0.1)
    assert await call == b"value"
    client.left = 1_000
    call = asyncio.create_task(link.call(("GET", "k")))
    await clock.advance(1)
    assert isinstance(await call, TimeoutError)
    await link.aclose()


class Client:
    """A client whose calls go on until the gate opens, also when cancelled once."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.calls = 0
        self.closed = False

    async def execute_command(self, *_: Any) -> bytes:
        self.calls += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            await self.gate.wait()
        return b"late"

    async def aclose(self) -> None:
        self.closed = True


class Connection:
    """A connection of the driver that is made when the gate opens."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.closed = False

    async def connect(self) -> None:
        await self.gate.wait()

    def _close(self) -> None:
        self.closed = True


class Kept:
    """A lane that keeps what it is given."""

    open = True
    idle = False
    outdated = False
    closed = False

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.pending: tuple[Any, ...] = ()
        self.returned: list[Any] = []

    async def drain(self) -> None:
        await asyncio.Event().wait()

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.closed = True

    def put(self, futures: Any, data: bytes) -> None:
        self.sent.append((data, futures))

    def put_read(self, future: Any, key: bytes) -> None:
        self.sent.append((key, future))
