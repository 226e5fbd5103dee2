"""The routes of the service."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from layered_store.errors import (
    CircuitOpenError,
    ConfigError,
    ErasureIncompleteError,
    RejectedError,
    StoreError,
    UnavailableError,
    ValidationError,
)
from layered_store.health import HealthStatus
from layered_store.service.guard import Guard, error_body
from layered_store.service.openapi import document
from layered_store.stack import walk

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

    from layered_store.interface import StateStore

__all__ = ["DEFAULT_MAX_BODY", "create_app"]

DEFAULT_MAX_BODY: Final = 65_536
MAX_LIMIT: Final = 1_000
_DEFAULT_LIMIT: Final = 100


def create_app(
    stack: StateStore, *, api_key: str | None = None, max_body: int = DEFAULT_MAX_BODY
) -> Starlette:
    """Return the service for a stack, an ASGI application.

    Run by itself it opens the stack at start and closes it at the end. Mounted in another
    application, whose lifespan it does not see, the stack opens on first use and is its owner's
    to close.

    Args:
        stack: what answers.
        api_key: when given, requests for states and metrics need ``Authorization: Bearer <key>``.
        max_body: the largest body in bytes.

    Raises:
        ConfigError: ``max_body`` is below 1.
    """
    if type(max_body) is not int or max_body < 1:
        raise ConfigError("must be an int of at least 1", option="max_body", layer="create_app")

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with stack:
            yield

    return Starlette(
        routes=_routes(stack),
        middleware=[Middleware(Guard, api_key=api_key or None, max_body=max_body)],
        exception_handlers={StoreError: _store_error, HTTPException: _http_error},
        lifespan=lifespan,
    )


def _routes(stack: StateStore) -> list[Route]:
    async def upsert(request: Request) -> Response:
        snapshot = stack.snapshot_type.from_json(await request.body())
        await stack.upsert_latest(snapshot)
        return Response(status_code=204)

    async def get(request: Request) -> Response:
        snapshot = await stack.get_latest(request.path_params["user_id"])
        if snapshot is None:
            return _error(request, 404, "USER_NOT_FOUND", "there is no state of this user")
        return Response(snapshot.to_json(), media_type="application/json")

    async def delete(request: Request) -> Response:
        await stack.delete(request.path_params["user_id"])
        return Response(status_code=204)

    async def history(request: Request) -> Response:
        limit = _limit(request.query_params.get("limit"))
        snapshots = await stack.get_history(request.path_params["user_id"], limit)
        body = b"[" + b",".join(snapshot.to_json() for snapshot in snapshots) + b"]"
        return Response(body, media_type="application/json")

    async def health(_: Request) -> Response:
        report = await stack.health_report()
        status = 503 if report.status is HealthStatus.UNHEALTHY else 200
        return JSONResponse(report.to_dict(), status_code=status)

    async def live(_: Request) -> Response:
        return JSONResponse({"status": "live"})

    async def ready(_: Request) -> Response:
        if await stack.health_check():
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready"}, status_code=503)

    async def metrics(request: Request) -> Response:
        from layered_store.metrics.prometheus import exposition

        accept = request.headers.get("accept", "")
        body, content_type = exposition(_registry(stack), accept)
        return Response(body, headers={"content-type": content_type})

    async def openapi(_: Request) -> Response:
        return JSONResponse(document())

    return [
        Route("/v1/state", upsert, methods=["POST"]),
        Route("/v1/state/{user_id}", get, methods=["GET"]),
        Route("/v1/state/{user_id}", delete, methods=["DELETE"]),
        Route("/v1/state/{user_id}/history", history, methods=["GET"]),
        Route("/health", health, methods=["GET"]),
        Route("/live", live, methods=["GET"]),
        Route("/ready", ready, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/openapi.json", openapi, methods=["GET"]),
    ]


def _registry(stack: StateStore) -> Any:
    from prometheus_client import REGISTRY

    for place in walk(stack):
        registry = getattr(place.store, "registry", None)
        if registry is not None:
            return registry
    return REGISTRY


def _limit(text: str | None) -> int:
    if text is None:
        return _DEFAULT_LIMIT
    if not (text.isascii() and text.isdigit() and len(text) <= 6 and int(text) <= MAX_LIMIT):
        raise ValidationError(f"must be a whole number from 0 to {MAX_LIMIT}", field="limit")
    return int(text)


def _error(
    request: Request, status: int, code: str, message: str, headers: dict[str, str] | None = None
) -> Response:
    request_id = request.scope["state"]["request_id"]
    return Response(
        error_body(code, message, request_id),
        status_code=status,
        headers=headers,
        media_type="application/json",
    )


async def _store_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, StoreError)
    if isinstance(exc, ValidationError):
        return _error(request, 400, "VALIDATION_ERROR", str(exc))
    if isinstance(exc, UnavailableError | RejectedError | ErasureIncompleteError):
        wait = exc.retry_after if isinstance(exc, CircuitOpenError) else 1.0
        headers = {"retry-after": str(max(1, round(wait)))}
        return _error(request, 503, "UNAVAILABLE", str(exc), headers)
    return _error(request, 500, "STORE_ERROR", str(exc))


async def _http_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    code = {404: "NOT_FOUND", 405: "METHOD_NOT_ALLOWED"}.get(exc.status_code, "BAD_REQUEST")
    headers = dict(exc.headers) if exc.headers else None
    return _error(request, exc.status_code, code, exc.detail, headers)
