"""What every request passes: an id, the key, the size limit, and one shape for all errors."""

from __future__ import annotations

import hmac
import json
import logging
import re
import uuid
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Guard", "TooLargeError", "error_body"]

_log = logging.getLogger("layered_store.service")
_valid_id: Final = re.compile(r"[A-Za-z0-9._-]{1,64}").fullmatch
_OPEN: Final = ("/live", "/ready", "/health", "/openapi.json")
"""Paths that need no key: probes cannot carry one, and they tell nothing about users."""


class TooLargeError(Exception):
    """The request's body is larger than allowed."""


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
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, max_body: int) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._max_body = max_body

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
            await _refuse(
                tagged, 401, "UNAUTHORIZED", "a valid API key is needed", request_id, extra
            )
            return
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and len(length) < 20 and int(length) > self._max_body:
            await self._too_large(tagged, request_id)
            return
        try:
            await self._app(scope, self._limited(receive), tagged)
        except TooLargeError:
            await self._too_large(tagged, request_id)
        except Exception as exc:
            # The text of an unforeseen error may hold anything, so only its kind is told.
            _log.error("request %s failed: %s", request_id, type(exc).__name__)
            if started:
                raise
            await _refuse(tagged, 500, "STORE_ERROR", "the service failed", request_id)

    def _may(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if self._key is None or path in _OPEN:
            return True
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        # In constant time, so that an answer's delay tells nothing about the key.
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key)

    def _limited(self, receive: Receive) -> Receive:
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self._max_body:
                    raise TooLargeError
            return message

        return limited

    async def _too_large(self, send: Send, request_id: str) -> None:
        message = f"the body may have at most {self._max_body} bytes"
        await _refuse(send, 413, "PAYLOAD_TOO_LARGE", message, request_id)


async def _refuse(
    send: Send,
    status: int,
    code: str,
    message: str,
    request_id: str,
    extra: list[tuple[bytes, bytes]] | None = None,
) -> None:
    body = error_body(code, message, request_id)
    headers: list[Any] = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *(extra or []),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
