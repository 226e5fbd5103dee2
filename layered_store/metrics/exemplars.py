"""Exemplars: for each bucket of a histogram, the trace of one call that fell into it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

__all__ = ["Exemplar", "ExemplarHook", "checked", "trace_exemplar"]

_MAX_CHARACTERS: Final = 128

ExemplarHook = Callable[[], Mapping[str, str] | None]
"""Called when a call ends: labels that lead to it, such as its trace id, or None for none."""


class Exemplar(NamedTuple):
    """One call of a bucket.

    Args:
        labels: what the hook said.
        value: how long it took, in seconds.
        timestamp: when it ended, in seconds since 1970.
    """

    labels: Mapping[str, str]
    value: float
    timestamp: float


def checked(labels: Mapping[str, str] | None) -> Mapping[str, str] | None:
    """Return the labels if an exemplar may carry them (128 characters in all), else None."""
    if not labels or not all(
        isinstance(key, str) and isinstance(value, str) for key, value in labels.items()
    ):
        return None
    if sum(len(key) + len(value) for key, value in labels.items()) > _MAX_CHARACTERS:
        return None
    return dict(labels)


def trace_exemplar() -> Mapping[str, str] | None:
    """Return the ids of the present OpenTelemetry span, if it is recorded.

    Pass it on: ``Metrics(store, name="users", exemplar=trace_exemplar)``. Needs the extra ``otel``.
    """
    from opentelemetry import trace  # noqa: PLC0415  an optional library

    context = trace.get_current_span().get_span_context()
    if not context.is_valid or not context.trace_flags.sampled:
        return None
    return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}
