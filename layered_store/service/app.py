"""The routes of the service."""

from __future__ import annotations

import contextlib
import logging
import math
from typing import TYPE_CHECKING, Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from layered_store.checks import check_history, is_state_of, not_of_user
from layered_store.errors import (
    CircuitOpenError,
    ClosedError,
    ConfigError,
    ErasureIncompleteError,
    RejectedError,
    StoreError,
    UnavailableError,
    ValidationError,
)
from layered_store.health import HealthStatus
from layered_store.interface import Op, report_of
from layered_store.metrics.prometheus import exposition
from layered_store.options import Seconds, check_count, check_seconds, check_store
from layered_store.service.guard import Guard, error_body
from layered_store.service.openapi import document
from layered_store.stack import walk

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

    from layered_store.interface import StateStore
    from layered_store.snapshot import StateSnapshot

__all__ = ["create_app"]

_log = logging.getLogger("layered_store.service")

MAX_LIMIT: Final = 1_000
_DEFAULT_LIMIT: Final = 100
_LONGEST_WAIT: Final = 86_400


def create_app(
    stack: StateStore,
    *,
    api_key: str | None = None,
    max_body: int = 65_536,
    max_in_flight: int = 1_000,
    body_seconds: Seconds = 10.0,
) -> Starlette:
    """Return the service for a stack, an ASGI application.

    Run by itself it opens the stack at start and closes it at the end; when the backend cannot be
    reached at start, it serves all the same and is not ready until it can be. Mounted in another
    application, whose lifespan it does not see, the stack opens on first use and is its owner's
    to close.

    Args:
        stack: what answers.
        api_key: when given, requests for states and metrics need ``Authorization: Bearer <key>``.
        max_body: the largest body in bytes, at least 1.
        max_in_flight: most requests at a time, at least 1; those beyond are refused with 503.
        body_seconds: how long a body may take to arrive, above 0.

    Raises:
        ConfigError: an option is out of range; an ``api_key`` is when it is empty, since it would
            protect nothing, or has characters that no header carries.
    """
    check_store(stack, "stack", create_app)
    check_count(max_body, "max_body", create_app)
    check_count(max_in_flight, "max_in_flight", create_app)
    seconds = check_seconds(body_seconds, "body_seconds", create_app)
    if api_key is not None and not (
        isinstance(api_key, str) and api_key.strip() == api_key != "" and api_key.isprintable()
    ):
        raise ConfigError(
            "must be printable text without spaces around it, or None for no key",
            option="api_key",
            layer="create_app",
        )

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        try:
            await stack.open()
        except UnavailableError as exc:
            if not exc.retryable:
                raise
            _log.warning("starting without its backend: %s", exc)
        try:
            yield
        finally:
            await stack.aclose()

    app = Starlette(
        routes=_routes(stack),
        middleware=[
            Middleware(
                Guard,
                api_key=api_key,
                max_body=max_body,
                max_in_flight=max_in_flight,
                body_seconds=seconds,
            ),
        ],
        exception_handlers={StoreError: _store_error, HTTPException: _http_error},
        lifespan=lifespan,
    )
    # A redirect would carry the user id on, and no route ends with a slash.
    app.router.redirect_slashes = False
    return app


def _routes(stack: StateStore) -> list[Route]:
    async def upsert(request: Request) -> Response:
        snapshot = stack.snapshot_type.from_json(await request.body())
        await stack.upsert_latest(snapshot)
        return Response(status_code=204)

    def written(snapshot: StateSnapshot, op: Op) -> bytes:
        try:
            return snapshot.to_json()
        except ValidationError as exc:  # an added field holds what JSON has no form for
            raise StoreError(str(exc), operation=op, layer=stack.name) from None

    async def get(request: Request) -> Response:
        user_id = request.path_params["user_id"]
        snapshot = await stack.get_latest(user_id)
        if snapshot is None:
            return _error(request, 404, "USER_NOT_FOUND", "there is no state of this user")
        if not is_state_of(snapshot, user_id):
            raise not_of_user(user_id, Op.GET_LATEST, stack.name)
        return Response(written(snapshot, Op.GET_LATEST), media_type="application/json")

    async def delete(request: Request) -> Response:
        await stack.delete(request.path_params["user_id"])
        return Response(status_code=204)

    async def one_user(request: Request) -> Response:
        # One route: the Allow header of a 405 is that of the first route that knows the path.
        _refuse_encoded_slash(request)
        return await (delete if request.method == "DELETE" else get)(request)

    async def history(request: Request) -> Response:
        _refuse_encoded_slash(request)
        limit = _limit(request.query_params.get("limit"))
        user_id = request.path_params["user_id"]
        snapshots = check_history(await stack.get_history(user_id, limit), user_id, stack.name)
        texts = (written(snapshot, Op.GET_HISTORY) for snapshot in snapshots)
        body = b"[" + b",".join(texts) + b"]"
        return Response(body, media_type="application/json")

    async def health(_: Request) -> Response:
        report = await report_of(stack)
        status = 503 if report.status is HealthStatus.UNHEALTHY else 200
        return JSONResponse(report.to_dict(), status_code=status)

    async def live(_: Request) -> Response:
        return JSONResponse({"status": "live"})

    async def ready(_: Request) -> Response:
        if await stack.health_check():
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready"}, status_code=503)

    async def metrics(request: Request) -> Response:
        accept = request.headers.get("accept", "")
        body, content_type = exposition(_registry(stack), accept)
        return Response(body, headers={"content-type": content_type})

    async def openapi(request: Request) -> Response:
        root = request.scope.get("root_path", "")
        # Its paths would else be those of the whole host, when this is mounted in an application.
        return JSONResponse({**document(), **({"servers": [{"url": root}]} if root else {})})

    return [
        Route("/v1/state", upsert, methods=["POST"]),
        Route("/v1/state/{user_id}", one_user, methods=["GET", "DELETE"]),
        Route("/v1/state/{user_id}/history", history, methods=["GET"]),
        Route("/health", health, methods=["GET"]),
        Route("/live", live, methods=["GET"]),
        Route("/ready", ready, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/openapi.json", openapi, methods=["GET"]),
    ]


def _registry(stack: StateStore) -> Any:
    """Return the registry of the outermost block that has one; None is the client's own."""
    for place in walk(stack):
        registry = getattr(place.store, "registry", None)
        if registry is not None:
            return registry
    return None


def _refuse_encoded_slash(request: Request) -> None:
    """Refuse a user id with a '/' in it, which was decoded before the route was looked for.

    Else an id such as ``ada/history`` would be answered with what another user has.
    """
    if b"%2f" in request.scope.get("raw_path", b"").lower():
        raise ValidationError("may not hold '/'", field="user_id")


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
        return _error(request, 400, "VALIDATION_ERROR", exc.message)
    if isinstance(exc, UnavailableError | RejectedError | ErasureIncompleteError | ClosedError):
        wait = exc.retry_after if isinstance(exc, CircuitOpenError) else 1.0
        headers = {"retry-after": str(max(1, math.ceil(min(wait, _LONGEST_WAIT))))}
        return _error(request, 503, "UNAVAILABLE", str(exc), headers)
    return _error(request, 500, "STORE_ERROR", str(exc))


async def _http_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    if exc.status_code in (404, 405):
        try:
            _refuse_encoded_slash(request)
        except ValidationError as refused:
            return _error(request, 400, "VALIDATION_ERROR", refused.message)
    code = {404: "NOT_FOUND", 405: "METHOD_NOT_ALLOWED"}.get(exc.status_code, "BAD_REQUEST")
    headers = dict(exc.headers) if exc.headers else None
    message = {
        404: "there is no such route; /openapi.json lists them",
        405: "this route does not take this method",
    }.get(exc.status_code, exc.detail)
    return _error(request, exc.status_code, code, message, headers)
