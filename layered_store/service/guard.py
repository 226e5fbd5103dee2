"""What every request passes: an id, the key, the size limit, and one shape for all errors."""

from __future__ import annotations

import hmac
import json
import logging
import re
import uuid
from typing import TYPE_CHECKING, Any, Final

from starlette.requests import ClientDisconnect

from layered_store.clock import SYSTEM_CLOCK, Clock

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Guard", "error_body", "refuse"]

_log = logging.getLogger("layered_store.service")
_valid_id: Final = re.compile(r"[A-Za-z0-9._-]{1,64}").fullmatch
_OPEN: Final = ("/live", "/ready", "/health", "/openapi.json")
"""Paths that need no key: probes cannot carry one, and they tell nothing about users."""
_NEVER_TOO_MANY: Final = (*_OPEN, "/metrics")
"""Paths that are let in beyond the bound: how full it is must be seen while it is."""
_CLOSE: Final = [(b"connection", b"close")]  # the rest of the body is not wanted


class _TooLargeError(Exception):
    """The request's body is larger than allowed."""


class _TooSlowError(Exception):
    """The request's body took longer than allowed."""


def error_body(code: str, message: str, request_id: str) -> bytes:
    """Return the one shape that all errors have."""
    body = {"error": {"code": code, "message": message, "request_id": request_id}}
    return json.dumps(body, separators=(",", ":")).encode()


class Guard:
    """Wraps the application; the outermost piece.

    Args:
        app: what handles requests that pass.
        api_key: the key that ``Authorization: Bearer`` must carry; None lets everyone in.
        max_body: largest body in bytes.
        max_in_flight: most requests at a time; probes and scrapes are let in beyond them.
        body_seconds: how long a body may take to arrive.
        clock: source of time.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        max_body: int,
        max_in_flight: int,
        body_seconds: float,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._max_body = max_body
        self._max_in_flight = max_in_flight
        self._in_flight = 0
        self._body_seconds = body_seconds
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _valid_id(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def tagged(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                own = [(b"x-request-id", request_id.encode()), (b"cache-control", b"no-store")]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if not self._may(path, headers):
            extra = [(b"www-authenticate", b"Bearer")]
            await refuse(
                tagged, 401, "UNAUTHORIZED", "a valid API key is needed", request_id, extra
            )
            return
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and len(length) < 20 and int(length) > self._max_body:
            await self._too_large(tagged, request_id)
            return
        if self._in_flight >= self._max_in_flight and path not in _NEVER_TOO_MANY:
            message = f"{self._max_in_flight} requests are under way; try again"
            again = [(b"retry-after", b"1")]
            await refuse(tagged, 503, "UNAVAILABLE", message, request_id, again)
            return
        self._in_flight += 1
        try:
            await self._app(scope, self._limited(receive), tagged)
        except _TooLargeError:
            await self._too_large(tagged, request_id)
        except _TooSlowError:
            message = f"the body did not arrive within {self._body_seconds:g} s"
            await refuse(tagged, 408, "REQUEST_TIMEOUT", message, request_id, _CLOSE)
        except ClientDisconnect:
            return  # nobody is there to be told
        except Exception as exc:
            # The text of an unforeseen error may hold anything, so only its kind is told.
            _log.error("request %s failed: %s", request_id, type(exc).__name__)
            if started:
                raise
            await refuse(tagged, 500, "STORE_ERROR", "the service failed", request_id)
        finally:
            self._in_flight -= 1

    def _may(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if self._key is None or path in _OPEN:
            return True
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        # In constant time, so that an answer's delay tells nothing about the key.
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key)

    def _limited(self, receive: Receive) -> Receive:
        seen = 0
        whole = False
        deadline = self._clock.monotonic() + self._body_seconds

        async def limited() -> Message:
            nonlocal seen, whole
            if whole:
                return await receive()
            try:
                async with self._clock.timeout(max(0.0, deadline - self._clock.monotonic())):
                    message = await receive()
            except TimeoutError:
                raise _TooSlowError from None
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                whole = not message.get("more_body", False)
                if seen > self._max_body:
                    raise _TooLargeError
            return message

        return limited

    async def _too_large(self, send: Send, request_id: str) -> None:
        message = f"the body may have at most {self._max_body} bytes"
        await refuse(send, 413, "PAYLOAD_TOO_LARGE", message, request_id, _CLOSE)


async def refuse(
    send: Send,
    status: int,
    code: str,
    message: str,
    request_id: str,
    extra: list[tuple[bytes, bytes]] | None = None,
) -> None:
    """Send an error as the whole answer."""
    body = error_body(code, message, request_id)
    headers: list[Any] = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *(extra or []),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
