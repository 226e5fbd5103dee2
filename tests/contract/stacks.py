"""Every layer, and ten deep stacks, as functions of the store that holds the truth."""

from __future__ import annotations

from collections.abc import Callable

from cachetools import LRUCache
from prometheus_client import CollectorRegistry

from layered_store import (
    Bulkhead,
    Cached,
    CircuitBreaker,
    Compressed,
    Encrypted,
    Fallback,
    Layer,
    MemoryStore,
    Metrics,
    Prefixed,
    Ramp,
    ReadOnly,
    Retry,
    Shadow,
    StateStore,
    Timeout,
    Tracing,
    WriteThrough,
)
from layered_store.interface import snapshot_type_of
from layered_store.testing import Faults, Recorded

Build = Callable[[StateStore], StateStore]


def metrics(inner: StateStore, name: str = "check") -> Metrics:
    return Metrics(inner, name=name, registry=CollectorRegistry())


def copies(inner: StateStore) -> MemoryStore:
    """Another store of the same class of snapshots."""
    return MemoryStore(snapshot_type=snapshot_type_of(inner))


LAYERS: dict[str, Build] = {
    "Layer": Layer,
    "Cached": Cached,
    "Cached, every option": lambda inner: Cached(
        inner,
        max_entries=5,
        negative_ttl=5,
        stale_if_error=60,
        refresh_ahead=0.5,
        ttl_jitter=0.3,
        invalidation="off",
    ),
    "Cached, cachetools": lambda inner: Cached(inner, cache=LRUCache(100)),
    "Cached, tiny ttl": lambda inner: Cached(inner, ttl=1e-9),
    "Cached, fallback": lambda inner: Cached(copies(inner), fallback=inner),
    "WriteThrough": lambda inner: WriteThrough(copies(inner), origin=inner),
    "Metrics": metrics,
    "Metrics, every hit timed": lambda inner: Metrics(
        inner, name="check", registry=CollectorRegistry(), time_hits="all"
    ),
    "Retry": lambda inner: Retry(inner, base_delay=0),
    "Retry, no budget": lambda inner: Retry(inner, base_delay=0, attempts=10, budget=None),
    "Timeout": lambda inner: Timeout(inner, seconds=20),
    "CircuitBreaker": CircuitBreaker,
    "Fallback": lambda inner: Fallback(inner, secondary=copies(inner)),
    "Bulkhead": lambda inner: Bulkhead(inner, max_in_flight=2, max_waiting=1_000),
    "Faults": Faults,
    "Recorded": Recorded,
    "Tracing": Tracing,
    "Encrypted": lambda inner: Encrypted(inner, keys=[bytes(32)], hash_user_ids=True),
    "Compressed": lambda inner: Compressed(inner, threshold=0),
    "Prefixed": lambda inner: Prefixed(inner, prefix="tenant"),
    "Shadow": lambda inner: Shadow(inner, candidate=copies(inner)),
    "Ramp, alternative": lambda inner: Ramp(inner, alternative=copies(inner), share=0.0),
    "Ramp, layer": lambda inner: Ramp(inner, layer=Cached, share=0.5),
    "ReadOnly": ReadOnly,
}

DEEP: dict[str, Build] = {
    "the usual one": lambda inner: metrics(Cached(Retry(inner, base_delay=0))),
    "three tiers": lambda inner: metrics(
        Cached(
            CircuitBreaker(Timeout(copies(inner), seconds=20)),
            fallback=Retry(Timeout(inner, seconds=20), base_delay=0),
        )
    ),
    "negative marks over tiers": lambda inner: Cached(
        WriteThrough(
            CircuitBreaker(Timeout(copies(inner), seconds=20)),
            origin=CircuitBreaker(Retry(Timeout(inner, seconds=20), base_delay=0)),
        ),
        negative_ttl=10,
        stale_if_error=30,
    ),
    "two caches": lambda inner: Cached(metrics(Cached(inner, ttl=5, negative_ttl=2)), ttl=1),
    "guards outside the cache": lambda inner: metrics(
        Retry(CircuitBreaker(Bulkhead(Timeout(Cached(inner), seconds=20), max_in_flight=100)))
    ),
    "bulkhead in the middle": lambda inner: Cached(
        Retry(
            Bulkhead(CircuitBreaker(Timeout(inner, seconds=20)), max_in_flight=4, max_waiting=999),
            base_delay=0,
        )
    ),
    "a copy to fall back to": lambda inner: metrics(
        Cached(
            Fallback(
                Retry(CircuitBreaker(inner), base_delay=0),
                secondary=Timeout(copies(inner), seconds=20),
            )
        )
    ),
    "tier over tier": lambda inner: WriteThrough(
        copies(inner), origin=WriteThrough(copies(inner), origin=inner)
    ),
    "everything": lambda inner: metrics(
        Cached(
            Retry(
                WriteThrough(
                    Recorded(CircuitBreaker(Timeout(Faults(copies(inner)), seconds=20))),
                    origin=Fallback(
                        Bulkhead(
                            CircuitBreaker(Timeout(Faults(inner), seconds=20)),
                            max_in_flight=50,
                            max_waiting=999,
                        ),
                        secondary=copies(inner),
                    ),
                ),
                base_delay=0,
            ),
            refresh_ahead=0.8,
        )
    ),
    "nothing but layers": lambda inner: Layer(
        metrics(Layer(Cached(Layer(Retry(Layer(metrics(Layer(inner), "below")), base_delay=0)))))
    ),
}
