"""The OpenAPI document of the service."""

from __future__ import annotations

from typing import Any

__all__ = ["document"]


def document() -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of all routes."""
    share = {"type": "number", "minimum": 0, "maximum": 1}
    user_id = {
        "type": "string",
        "minLength": 1,
        "maxLength": 256,
        "pattern": r"^[\p{L}\p{N}_-]+$",
        "description": "letters, digits, '_' and '-' of all scripts; at most 256 UTF-8 bytes",
    }
    snapshot = {
        "type": "object",
        "required": ["user_id"],
        "properties": {
            "user_id": user_id,
            "updated_at_unix_ms": {"type": "integer", "format": "int64"},
            "source": {"enum": ["self_report", "inferred", "mixed"]},
            "confidence": share,
            "axes": {
                "type": "object",
                "propertyNames": {"pattern": "^[a-z0-9]([a-z0-9_]{0,62}[a-z0-9])?$"},
                "additionalProperties": share,
            },
        },
    }
    error = {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["code", "message", "request_id"],
                "properties": {
                    name: {"type": "string"} for name in ("code", "message", "request_id")
                },
            }
        },
    }
    user = {
        "name": "user_id",
        "in": "path",
        "required": True,
        "schema": user_id,
    }
    limit = {
        "name": "limit",
        "in": "query",
        "schema": {"type": "integer", "minimum": 0, "maximum": 1000, "default": 100},
    }
    state = _json("The state", {"$ref": "#/components/schemas/StateSnapshot"})
    states = _json(
        "States, newest first",
        {"type": "array", "items": {"$ref": "#/components/schemas/StateSnapshot"}},
    )
    report = {"type": "object", "required": ["name", "status"]}
    wrong = {
        str(status): _json(text, {"$ref": "#/components/schemas/Error"})
        for status, text in (
            (400, "An argument was refused"),
            (401, "The API key is missing or wrong"),
            (404, "There is no state of this user"),
            (408, "The body took too long to arrive"),
            (413, "The body is too large"),
            (500, "The store failed"),
            (503, "The store cannot be reached now"),
        )
    }
    done = {"description": "Done"}
    secured: list[dict[str, list[str]]] = [{}, {"key": []}]
    return {
        "openapi": "3.1.0",
        "info": {"title": "layered_store", "version": "1"},
        "paths": {
            "/v1/state": {
                "post": {
                    "operationId": "upsertLatest",
                    "security": secured,
                    "requestBody": {
                        "required": True,
                        "content": {
                            "application/json": {
                                "schema": {"$ref": "#/components/schemas/StateSnapshot"}
                            }
                        },
                    },
                    "responses": {"204": done, **wrong},
                }
            },
            "/v1/state/{user_id}": {
                "parameters": [user],
                "get": {
                    "operationId": "getLatest",
                    "security": secured,
                    "responses": {"200": state, **wrong},
                },
                "delete": {
                    "operationId": "delete",
                    "security": secured,
                    "responses": {"204": done, **wrong},
                },
            },
            "/v1/state/{user_id}/history": {
                "parameters": [user],
                "get": {
                    "operationId": "getHistory",
                    "security": secured,
                    "parameters": [limit],
                    "responses": {"200": states, **wrong},
                },
            },
            "/health": _probe("health", "The health of every block", report),
            "/live": _probe("live", "The process runs; no backend is asked", {"type": "object"}),
            "/ready": _probe("ready", "The store can serve", {"type": "object"}),
            "/metrics": {
                "get": {
                    "operationId": "metrics",
                    "security": secured,
                    "responses": {
                        "200": {
                            "description": "Prometheus metrics",
                            "content": {
                                "text/plain": {"schema": {"type": "string"}},
                                "application/openmetrics-text": {"schema": {"type": "string"}},
                            },
                        },
                        "401": wrong["401"],
                    },
                }
            },
        },
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {"StateSnapshot": snapshot, "Error": error},
        },
    }


def _json(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _probe(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    answer = _json(description, schema)
    return {"get": {"operationId": name, "responses": {"200": answer, "503": answer}}}
