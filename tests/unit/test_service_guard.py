"""What stands around the service's routes, as the server calls it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from layered_store.service.guard import Guard
from layered_store.service.server import _Ending
from layered_store.testing.clock import FakeClock

Message = dict[str, Any]
SECRET = "marked-value"


class Exchange:
    """One request whose messages the test gives, and what was answered."""

    def __init__(self, app: Any, *messages: Message) -> None:
        self.messages: asyncio.Queue[Message] = asyncio.Queue()
        for message in messages:
            self.messages.put_nowait(message)
        self.sent: list[Message] = []
        scope = {"type": "http", "path": "/v1/state", "headers": [], "method": "POST"}
        self.task = asyncio.ensure_future(app(scope, self.messages.get, self._send))

    async def _send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def answer(self) -> tuple[int, str]:
        start, body = self.sent
        return start["status"], json.loads(body["body"])["error"]["code"]


def guard(app: Callable[..., Awaitable[None]], **options: Any) -> Guard:
    given: dict[str, Any] = {
        "api_key": None, "max_body": 10, "max_in_flight": 2, "body_seconds": 5.0, **options
    }  # fmt: skip
    return Guard(app, **given)


def part(body: bytes, *, more: bool) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


async def reads_all(scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def test_a_body_that_grows_beyond_the_limit_is_cut_off() -> None:
    """Also one that did not say how long it is; one of just that length passes."""
    large = Exchange(guard(reads_all), part(b"x" * 6, more=True), part(b"x" * 5, more=True))
    await large.task
    assert large.answer == (413, "PAYLOAD_TOO_LARGE")
    fits = Exchange(guard(reads_all), part(b"x" * 6, more=True), part(b"x" * 4, more=False))
    await fits.task
    assert fits.sent[0]["status"] == 204


async def test_a_body_has_a_time_as_a_whole_and_waiting_afterwards_has_none() -> None:
    """A caller that sends a byte now and then is not waited for; one that waits for us is."""
    clock = FakeClock()
    slow = Exchange(guard(reads_all, clock=clock), part(b"x", more=True))
    await clock.advance(4.0)
    slow.messages.put_nowait(part(b"x", more=True))
    await clock.advance(0.9)
    assert not slow.task.done()
    await clock.advance(0.2)
    assert slow.answer[0] == 408

    async def waits(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        assert (await receive())["type"] == "http.disconnect"

    waiting = Exchange(guard(waits, clock=clock), part(b"x", more=False))
    await clock.advance(100.0)
    assert not waiting.task.done()
    waiting.messages.put_nowait({"type": "http.disconnect"})
    await waiting.task
    assert not waiting.sent


@pytest.mark.parametrize("started", [False, True])
async def test_an_error_that_nobody_foresaw_is_told_without_its_text(
    started: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """As an answer while there is none yet; else the server has to cut the connection."""

    async def fails(scope: Any, receive: Any, send: Any) -> None:
        if started:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise KeyError(SECRET)

    guarded = guard(fails, max_in_flight=1)
    for _ in range(2):  # the place is free again
        exchange = Exchange(guarded)
        with caplog.at_level(logging.ERROR):
            if started:
                with pytest.raises(KeyError):
                    await exchange.task
                assert [message["type"] for message in exchange.sent] == ["http.response.start"]
            else:
                await exchange.task
                assert exchange.answer == (500, "STORE_ERROR")
    assert "KeyError" in caplog.text and SECRET not in caplog.text


@pytest.mark.parametrize("started", [False, True])
async def test_a_request_that_the_end_cuts_off_is_answered_while_it_can_be(started: bool) -> None:
    """Once an answer has begun, nothing may follow it."""

    async def hangs(scope: Any, receive: Any, send: Any) -> None:
        if started:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.Event().wait()

    exchange = Exchange(_Ending(hangs))
    await asyncio.sleep(0)
    exchange.task.cancel()
    await exchange.task
    if started:
        assert [message["type"] for message in exchange.sent] == ["http.response.start"]
    else:
        assert exchange.answer == (503, "UNAVAILABLE")


async def test_the_end_of_the_servers_own_task_stays_a_cancellation() -> None:
    """Only requests have somebody who waits for an answer."""

    async def hangs(*_: Any) -> None:
        await asyncio.Event().wait()

    task = asyncio.ensure_future(
        _Ending(hangs)({"type": "lifespan"}, asyncio.Queue().get, asyncio.Queue().put)
    )
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
