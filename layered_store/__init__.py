"""Per-user state from composable async stores.

Every block is a :class:`StateStore`; every layer wraps one::

    stack = Metrics(Cached(RedisStore(url), fallback=SQLStore(url)), name="user_state")

Importing this package imports no driver: each comes with the first store that needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from layered_store.errors import (
    CircuitOpenError,
    ClosedError,
    ConfigError,
    CorruptDataError,
    ErasureIncompleteError,
    OverloadedError,
    RejectedError,
    StoreError,
    StoreTimeoutError,
    UnavailableError,
    UnsupportedError,
    ValidationError,
)
from layered_store.health import HealthReport, HealthStatus
from layered_store.interface import Op, StateStore
from layered_store.layer import AroundLayer, Layer
from layered_store.snapshot import Source, StateSnapshot
from layered_store.stack import describe, find, replace

if TYPE_CHECKING:
    from layered_store.config import lint, load_stack, to_config
    from layered_store.explaining import explain
    from layered_store.layers.bulkhead import Bulkhead
    from layered_store.layers.cached import Cached
    from layered_store.layers.circuit_breaker import CircuitBreaker
    from layered_store.layers.compressed import Compressed
    from layered_store.layers.encrypted import Encrypted
    from layered_store.layers.fallback import Fallback
    from layered_store.layers.metrics import Metrics
    from layered_store.layers.prefixed import Prefixed
    from layered_store.layers.ramp import Ramp
    from layered_store.layers.read_only import ReadOnly
    from layered_store.layers.retry import Retry
    from layered_store.layers.shadow import Shadow
    from layered_store.layers.timeout import Timeout
    from layered_store.layers.tracing import Tracing
    from layered_store.layers.write_through import WriteThrough
    from layered_store.stores.memory import MemoryStore
    from layered_store.stores.redis import RedisStore
    from layered_store.stores.sql import SQLStore
    from layered_store.sync import SyncStore

__all__ = [
    "AroundLayer",
    "Bulkhead",
    "Cached",
    "CircuitBreaker",
    "CircuitOpenError",
    "ClosedError",
    "Compressed",
    "ConfigError",
    "CorruptDataError",
    "Encrypted",
    "ErasureIncompleteError",
    "Fallback",
    "HealthReport",
    "HealthStatus",
    "Layer",
    "MemoryStore",
    "Metrics",
    "Op",
    "OverloadedError",
    "Prefixed",
    "Ramp",
    "ReadOnly",
    "RedisStore",
    "RejectedError",
    "Retry",
    "SQLStore",
    "Shadow",
    "Source",
    "StateSnapshot",
    "StateStore",
    "StoreError",
    "StoreTimeoutError",
    "SyncStore",
    "Timeout",
    "Tracing",
    "UnavailableError",
    "UnsupportedError",
    "ValidationError",
    "WriteThrough",
    "describe",
    "explain",
    "find",
    "lint",
    "load_stack",
    "replace",
    "to_config",
]

__version__ = "0.1.0"

# Imported when first asked for, so that nobody pays for a block that is not used.
_LAZY = {
    "Bulkhead": "layered_store.layers.bulkhead",
    "Cached": "layered_store.layers.cached",
    "CircuitBreaker": "layered_store.layers.circuit_breaker",
    "Compressed": "layered_store.layers.compressed",
    "Encrypted": "layered_store.layers.encrypted",
    "Fallback": "layered_store.layers.fallback",
    "MemoryStore": "layered_store.stores.memory",
    "Metrics": "layered_store.layers.metrics",
    "Prefixed": "layered_store.layers.prefixed",
    "Ramp": "layered_store.layers.ramp",
    "ReadOnly": "layered_store.layers.read_only",
    "RedisStore": "layered_store.stores.redis",
    "Retry": "layered_store.layers.retry",
    "SQLStore": "layered_store.stores.sql",
    "Shadow": "layered_store.layers.shadow",
    "SyncStore": "layered_store.sync",
    "Timeout": "layered_store.layers.timeout",
    "Tracing": "layered_store.layers.tracing",
    "WriteThrough": "layered_store.layers.write_through",
    "explain": "layered_store.explaining",
    "lint": "layered_store.config",
    "load_stack": "layered_store.config",
    "to_config": "layered_store.config",
}


if not TYPE_CHECKING:  # which would take any name for one of this module

    def __getattr__(name: str) -> Any:
        try:
            module = _LAZY[name]
        except KeyError:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
        value = globals()[name] = getattr(import_module(module), name)
        return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
