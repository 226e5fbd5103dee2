"""Rules about calls: time limits, attempts, refusals, who sees a failure."""

from __future__ import annotations

from layered_store.config.lint_view import At, Severity, number, rule
from layered_store.errors import CircuitOpenError
from layered_store.interface import StateStore
from layered_store.stack import children_of

__all__: list[str] = []


@rule("LS001", Severity.ERROR, "retry with no time limit below it", of="retry")
def _retry_without_limit(at: At) -> str | None:
    if None not in at.call_limits():
        return None
    return (
        "a call that hangs is never repeated, since nothing below ends it; put a Timeout inside"
        " Retry"
    )


@rule("LS002", Severity.WARNING, "time limit above retry and none below", of="retry")
def _limit_only_outside(at: At) -> str | None:
    outer = at.under("timeout")
    if outer is None:
        return None
    limit = number(outer, "seconds")
    if limit is None or all(inner is not None and inner < limit for inner in at.call_limits()):
        return None
    return (
        f"the first attempt that hangs uses up the {limit:g} s of the Timeout outside, so nothing"
        " is repeated; put a shorter Timeout inside Retry as well"
    )


@rule("LS003", Severity.WARNING, "fallback below retry or breaker", of="fallback")
def _fallback_below(at: At) -> str | None:
    outer = at.under("retry") or at.under("circuit_breaker")
    if outer is None:
        return None
    return (
        f"{type(outer).__name__} above never sees a failed read, since Fallback answers it; put"
        f" Fallback outside and {type(outer).__name__} around its inner"
    )


@rule("LS004", Severity.WARNING, "retries of the driver multiply with ours")
def _driver_retries(at: At) -> str | None:
    layer = at.under("retry")
    retries = int(number(at.store, "driver_retries") or 0)
    if layer is None or children_of(at.store) or retries <= 0:
        return None
    attempts = int(number(layer, "attempts") or 1)
    return (
        f"the driver repeats each call {retries} times below Retry, up to"
        f" {attempts * (retries + 1)} attempts in all; build its client without retries"
    )


@rule("LS005", Severity.WARNING, "retry below retry", of="retry")
def _nested_retries(at: At) -> str | None:
    outer = at.under("retry")
    if outer is None:
        return None
    total = (number(outer, "attempts") or 1) * (number(at.store, "attempts") or 1)
    return (
        f"attempts multiply: up to {total:g} of one call, most of them when the backend can bear"
        " them least; keep one Retry on each way down"
    )


@rule("LS006", Severity.ERROR, "an open circuit is retried", of="retry")
def _open_circuit_retried(at: At) -> str | None:
    if not at.over("circuit_breaker"):
        return None
    for name in ("retry_on", "on", "retry_if"):
        wanted = getattr(at.store, name, None)
        if isinstance(wanted, type):
            wanted = (wanted,)
        if isinstance(wanted, list | tuple | set | frozenset) and any(
            isinstance(cls, type) and issubclass(CircuitOpenError, cls) for cls in wanted
        ):
            return (
                "an open circuit refuses at once, so the attempts are wasted and the caller waits;"
                " leave CircuitOpenError out of what is repeated"
            )
    return None


@rule("LS007", Severity.WARNING, "attempts and their limits exceed the limit outside", of="retry")
def _sum_of_limits(at: At) -> str | None:
    outer = at.under("timeout")
    if outer is None:
        return None
    limit = number(outer, "seconds")
    inner = max((each for each in at.call_limits() if each is not None), default=0.0)
    attempts = number(at.store, "attempts")
    if limit is None or attempts is None or inner >= limit:
        return None  # more than one attempt does not begin: LS002
    longest = min(attempts * inner, number(at.store, "time_limit") or attempts * inner)
    if longest <= limit:
        return None
    return (
        f"{attempts:g} attempts of {inner:g} s need {attempts * inner:g} s, but the Timeout outside"
        f" ends the call after {limit:g} s; lower one or raise the other"
    )


@rule("LS026", Severity.WARNING, "pool smaller than the bulkhead", of="bulkhead")
def _pool(at: At) -> str | None:
    places = number(at.store, "max_in_flight")
    if places is None:
        return None
    for end in at.ends():
        pool = _pool_size(end)
        if pool is not None and pool < places:
            return (
                f"{places:g} calls are let in but {type(end).__name__} has {pool:g} connections;"
                " the rest queue there unseen; make the pool at least as large"
            )
    return None


def _pool_size(store: StateStore) -> float | None:
    """Return how many connections a backend has at most; None when it cannot be told."""
    pool = getattr(getattr(getattr(store, "engine", None), "sync_engine", None), "pool", None)
    if pool is None:
        return number(store, "pool_size")
    size = getattr(pool, "size", None)
    overflow = getattr(pool, "_max_overflow", 0)
    # An engine that was passed in: its own pool counts, and -1 is one without an end.
    return float(size() + overflow) if callable(size) and overflow >= 0 else None


@rule("LS027", Severity.NOTE, "bulkhead above the cache", of="bulkhead")
def _bulkhead_above_cache(at: At) -> str | None:
    if not at.over("cached"):
        return None
    return "hits take places that only calls to a backend need; put Bulkhead below Cached"


@rule("LS028", Severity.ERROR, "a block that injects faults")
def _faults(at: At) -> str | None:
    if type(at.store).__module__ != "layered_store.testing.faults" and not getattr(
        type(at.store), "injects_faults", False
    ):
        return None
    return "it makes calls fail on purpose; take it out of every stack outside tests"


@rule("LS037", Severity.WARNING, "retry outside the cache", of="retry")
def _retry_over_cache(at: At) -> str | None:
    if not at.over("cached"):
        return None
    return (
        "every attempt passes the cache again, and callers that share one load each repeat it; put"
        " Retry below Cached, around each backend"
    )


@rule("LS038", Severity.NOTE, "breaker outside retry", of="circuit_breaker")
def _breaker_over_retry(at: At) -> str | None:
    if not at.over("retry"):
        return None
    return (
        "it sees calls, not attempts, and opens later; the usual order is Retry(CircuitBreaker())"
    )
