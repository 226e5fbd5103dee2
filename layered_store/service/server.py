"""The process behind ``layered-store serve``: uvicorn with bounds for slow callers and a clean end.

uvicorn waits for ever for the rest of a request line or header, answers malformed requests with
plain text, and prints a traceback for each request that it cuts off at the end of its drain.
"""

from __future__ import annotations

import asyncio
import copy
import uuid
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.config import LOGGING_CONFIG
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from layered_store.service.guard import error_body, refuse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["build_server"]


def build_server(
    app: ASGIApp, *, host: str, port: int, drain: int, patience: float
) -> uvicorn.Server:
    """Return the server, not yet running.

    Args:
        app: what answers.
        host: the address to listen on.
        port: the port; 0 takes any that is free.
        drain: seconds that running requests get at the end.
        patience: seconds in which a caller must have sent the head of its request.
    """
    connection = type("Connection", (_Connection,), {"patience": patience})
    logging: dict[str, Any] = copy.deepcopy(LOGGING_CONFIG)
    logging["loggers"]["layered_store"] = {
        "handlers": ["default"],
        "level": "INFO",
        "propagate": False,
    }
    return uvicorn.Server(
        uvicorn.Config(
            _Ending(app),
            host=host,
            port=port,
            http=connection,
            ws="none",
            log_config=logging,
            access_log=False,  # it would log user ids
            timeout_graceful_shutdown=drain,
            server_header=False,
            lifespan="on",
        )
    )


class _Connection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """A connection that is closed when the head of a request takes too long."""

    patience: float

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._waiting: asyncio.TimerHandle | None = None
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        request_id = uuid.uuid4().hex
        body = error_body("VALIDATION_ERROR", msg, request_id)
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nx-request-id: {request_id}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: the request is answered as one without ``Upgrade``."""

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            if self._waiting is not None:
                self._waiting.cancel()
                self._waiting = None
        elif self._waiting is None:
            self._waiting = self.loop.call_later(self.patience, self._give_up)

    def _give_up(self) -> None:
        self._waiting = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class _Ending:
    """Gives requests that are cut off at the end an answer, and a failed start one line."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def noted(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            if message["type"].endswith(".failed"):
                # The whole traceback, of which the last line says what is wrong.
                lines = str(message.get("message", "")).strip().splitlines() or [""]
                message = {**message, "message": lines[-1].rpartition("Error: ")[2]}
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except asyncio.CancelledError:
            if scope["type"] != "http":
                raise
            # Only the end of the drain cancels a request, and nothing waits for it any more.
            if not started:
                request_id = scope.get("state", {}).get("request_id", "")
                extra = [(b"x-request-id", request_id.encode())]
                await refuse(send, 503, "UNAVAILABLE", "the service is ending", request_id, extra)
