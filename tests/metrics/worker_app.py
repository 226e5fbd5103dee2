"""A small ASGI application for the tests of several worker processes."""

from __future__ import annotations

import os
from typing import Any

from layered_store import Cached, MemoryStore, Metrics, StateSnapshot
from layered_store.errors import ValidationError
from layered_store.metrics.prometheus import exposition

stack: Metrics | None = None


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    global stack  # noqa: PLW0603  one of each worker
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                stack = Metrics(Cached(MemoryStore()), name="users")
                await send({"type": "lifespan.startup.complete"})
            else:
                await stack.aclose()
                await send({"type": "lifespan.shutdown.complete"})
                return
    if stack is None:  # a server without lifespan
        stack = Metrics(Cached(MemoryStore()), name="users")
    status, body, kind = 200, b"", "text/plain"
    path = scope["path"]
    if path == "/metrics":
        body, kind = exposition(accept=dict(scope["headers"]).get(b"accept", b"").decode())
    elif path == "/pid":
        body = str(os.getpid()).encode()
    elif path.startswith("/put/"):
        await stack.upsert_latest(StateSnapshot(path[5:]))
    elif path.startswith("/get/"):
        try:
            found = await stack.get_latest(path[5:])
        except ValidationError:
            status = 400
        else:
            status = 404 if found is None else 200
    headers = [(b"content-type", kind.encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
