"""States in a FastAPI application: opened and closed by its lifespan, with health and metrics.

    pip install 'layered-store[serve]' fastapi
    uvicorn --app-dir examples fastapi_app:app

    curl -X PUT localhost:8000/users/ada/state -H 'content-type: application/json' \
         -d '{"warmth": 0.7}'
    curl localhost:8000/users/ada/state
    curl localhost:8000/health
    curl localhost:8000/metrics

States are in DATABASE_URL, else in the SQLite file states.db; with REDIS_URL a shared cache tier
is between. Several workers: set PROMETHEUS_MULTIPROC_DIR and add ``--workers 4``.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse

from layered_store import (
    Cached,
    CircuitBreaker,
    ErasureIncompleteError,
    HealthStatus,
    Metrics,
    RedisStore,
    RejectedError,
    Retry,
    SQLStore,
    StateSnapshot,
    StateStore,
    StoreError,
    Timeout,
    UnavailableError,
    ValidationError,
)
from layered_store.metrics.prometheus import exposition


def stack_from_environment() -> StateStore:
    """Compose the stack; nothing is connected before the lifespan opens it."""
    truth = Retry(SQLStore(os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///states.db")))
    redis = os.environ.get("REDIS_URL")
    if redis:
        tier = CircuitBreaker(Timeout(RedisStore(redis), seconds=0.05))
        return Metrics(Cached(tier, fallback=truth, ttl=60), name="user_state")
    return Metrics(Cached(truth, ttl=5), name="user_state")


def create_app(stack: StateStore) -> FastAPI:
    """Return the application around a stack; a test passes one of its own."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with stack:
            app.state.states = stack
            yield

    app = FastAPI(title="States", lifespan=lifespan)
    app.add_exception_handler(StoreError, store_error)  # type: ignore[arg-type]

    @app.put("/users/{user_id}/state", status_code=204)
    async def put_state(user_id: str, axes: dict[str, float], states: States) -> None:
        await states.upsert_latest(StateSnapshot(user_id, axes=axes))

    @app.get("/users/{user_id}/state")
    async def get_state(user_id: str, states: States) -> dict[str, Any]:
        state = await states.get_latest(user_id)
        if state is None:
            raise HTTPException(404, "no such user")
        return shown(state)

    @app.get("/users/{user_id}/history")
    async def get_history(
        user_id: str, states: States, limit: Annotated[int, Query(ge=0, le=1000)] = 20
    ) -> list[dict[str, Any]]:
        return [shown(state) for state in await states.get_history(user_id, limit)]

    @app.delete("/users/{user_id}", status_code=204)
    async def erase(user_id: str, states: States) -> None:
        await states.delete(user_id)

    @app.get("/health")
    async def health(states: States) -> JSONResponse:
        report = await states.health_report()
        served = report.status is not HealthStatus.UNHEALTHY
        return JSONResponse(report.to_dict(), 200 if served else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        body, content_type = exposition(accept=request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    return app


def states_of(request: Request) -> StateStore:
    """Give a route the stack that the lifespan opened."""
    states: StateStore = request.app.state.states
    return states


States = Annotated[StateStore, Depends(states_of)]


def shown(state: StateSnapshot) -> dict[str, Any]:
    """Return what a caller sees of a state."""
    return {
        "axes": dict(state.axes),
        "source": state.source.value,
        "confidence": state.confidence,
        "updated_at_unix_ms": state.updated_at_unix_ms,
    }


async def store_error(_: Request, error: StoreError) -> JSONResponse:
    """Turn the one error tree into status codes; messages hold no user data."""
    if isinstance(error, ValidationError):
        return JSONResponse({"error": error.message}, 400)
    if isinstance(error, (UnavailableError, RejectedError, ErasureIncompleteError)):
        return JSONResponse({"error": "try again"}, 503, {"retry-after": "1"})
    return JSONResponse({"error": "the state could not be served"}, 500)


app = create_app(stack_from_environment())
