"""States in a Flask application: routes that do not await, through ``SyncStore``.

    pip install layered-store flask
    flask --app examples/flask_app.py run

    curl -X PUT localhost:5000/users/ada/state -H 'content-type: application/json' \
         -d '{"warmth": 0.7}'
    curl localhost:5000/users/ada/state
    curl localhost:5000/health
    curl localhost:5000/metrics

States are in DATABASE_URL, else in the SQLite file states.db. Threads and forked workers (gunicorn,
uwsgi) may share the application: each worker process builds a stack of its own on its first call.
"""

from __future__ import annotations

import os
from typing import Any

from flask import Flask, Response, abort, jsonify, request

from layered_store import (
    Cached,
    ErasureIncompleteError,
    HealthStatus,
    Metrics,
    RejectedError,
    Retry,
    SQLStore,
    StateSnapshot,
    StateStore,
    StoreError,
    SyncStore,
    UnavailableError,
    ValidationError,
)
from layered_store.metrics.prometheus import exposition


def build_stack() -> StateStore:
    """Compose the stack; called once in each worker process."""
    url = os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///states.db")
    return Metrics(Cached(Retry(SQLStore(url)), ttl=5), name="user_state")


def create_app(store: SyncStore) -> Flask:
    """Return the application around a store; a test passes one of its own."""
    app = Flask(__name__)

    @app.put("/users/<user_id>/state")
    def put_state(user_id: str) -> tuple[str, int]:
        axes = request.get_json()
        if not isinstance(axes, dict):
            abort(400, "the body must be an object of axes")
        store.upsert_latest(StateSnapshot(user_id, axes=axes))
        return "", 204

    @app.get("/users/<user_id>/state")
    def get_state(user_id: str) -> dict[str, Any]:
        state = store.get_latest(user_id)
        if state is None:
            abort(404)
        return {"axes": dict(state.axes), "updated_at_unix_ms": state.updated_at_unix_ms}

    @app.delete("/users/<user_id>")
    def erase(user_id: str) -> tuple[str, int]:
        store.delete(user_id)
        return "", 204

    @app.get("/health")
    def health() -> tuple[dict[str, Any], int]:
        report = store.health_report()
        return report.to_dict(), 503 if report.status is HealthStatus.UNHEALTHY else 200

    @app.get("/metrics")
    def metrics() -> Response:
        body, content_type = exposition(accept=request.headers.get("accept", ""))
        return Response(body, content_type=content_type)

    @app.errorhandler(StoreError)
    def store_error(error: StoreError) -> tuple[Response, int]:
        """Turn the one error tree into status codes; messages hold no user data."""
        if isinstance(error, ValidationError):
            return jsonify(error=error.message), 400
        if isinstance(error, (UnavailableError, RejectedError, ErasureIncompleteError)):
            return jsonify(error="try again"), 503
        return jsonify(error="the state could not be served"), 500

    return app


app = create_app(SyncStore(build_stack, timeout=2))
