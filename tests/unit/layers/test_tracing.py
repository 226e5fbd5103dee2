"""Tracing: a span per call and per tier, with nothing in it that tells of a user."""

from __future__ import annotations

import asyncio
import sys

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from prometheus_client import CollectorRegistry

from layered_store import (
    Cached,
    ConfigError,
    MemoryStore,
    Metrics,
    Retry,
    StateSnapshot,
    Tracing,
    WriteThrough,
)
from layered_store.errors import UnavailableError, ValidationError
from layered_store.metrics.exemplars import trace_exemplar
from layered_store.testing.scripted import Gate, Scripted


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter: InMemorySpanExporter) -> TracerProvider:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider


@pytest.fixture
def tracer(provider: TracerProvider) -> object:
    return provider.get_tracer("test")


async def test_a_span_per_call_and_per_tier(exporter: InMemorySpanExporter, tracer: object) -> None:
    """The tiers' spans are children of the call's, so that a trace shows which tier took long."""
    origin = MemoryStore()
    await origin.upsert_latest(StateSnapshot("u-marked"))
    stack = Tracing(
        Cached(
            WriteThrough(
                Tracing(Scripted(UnavailableError("u-marked")), tier="copies", tracer=tracer),
                origin=Tracing(origin, tracer=tracer),
            )
        ),
        tier="users",
        tracer=tracer,
    )
    await stack.get_latest("u-marked")
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"users.get_latest", "copies.get_latest", "memory.get_latest"}
    call = spans["users.get_latest"]
    for name in ("copies.get_latest", "memory.get_latest"):
        assert spans[name].parent is not None
        assert spans[name].parent.span_id == call.context.span_id
    assert spans["copies.get_latest"].attributes == {
        "layered_store.operation": "get_latest",
        "layered_store.tier": "copies",
        "layered_store.outcome": "unavailable",
        "error.type": "UnavailableError",
    }
    assert not spans["copies.get_latest"].status.is_ok
    assert call.status.is_ok
    assert call.attributes is not None
    assert call.attributes["layered_store.outcome"] == "ok"
    assert not any("u-marked" in span.to_json() for span in spans.values())


async def test_refused_and_cancelled_calls_are_no_faults(
    exporter: InMemorySpanExporter, tracer: object
) -> None:
    """Their spans say what they were, and are not marked as errors."""
    gate = Gate()
    stack = Tracing(Scripted(gate, ValidationError("bad")), tracer=tracer)
    call = asyncio.create_task(stack.get_latest("u-1"))
    await gate.entered.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    with pytest.raises(ValidationError):
        await stack.get_latest("u-1")
    spans = exporter.get_finished_spans()
    assert [span.attributes["layered_store.outcome"] for span in spans] == ["cancelled", "invalid"]
    assert all(span.status.is_ok or span.status.is_unset for span in spans)


async def test_the_trace_of_a_call_is_its_exemplar(
    exporter: InMemorySpanExporter, tracer: object
) -> None:
    """A slow bucket leads to a trace of one call that fell into it."""
    registry = CollectorRegistry()
    inner = Metrics(MemoryStore(), name="s", registry=registry, exemplar=trace_exemplar)
    await inner.get_latest("u-1")
    assert inner.exemplars("get_latest") == {}  # no span, no exemplar
    await Tracing(inner, tracer=tracer).get_latest("u-1")
    (span,) = exporter.get_finished_spans()
    (exemplar,) = inner.exemplars("get_latest").values()
    assert exemplar.labels == {
        "trace_id": f"{span.context.trace_id:032x}",
        "span_id": f"{span.context.span_id:016x}",
    }


async def test_a_trace_that_is_not_recorded_is_no_exemplar() -> None:
    """It would lead nowhere."""
    tracer = TracerProvider(sampler=ALWAYS_OFF).get_tracer("tests")
    with tracer.start_as_current_span("not recorded") as span:
        assert span.get_span_context().is_valid
        assert trace_exemplar() is None


async def test_without_a_tracer_the_global_provider_is_asked() -> None:
    """Which does nothing until an application sets one up."""
    stack = Tracing(MemoryStore())
    await stack.upsert_latest(StateSnapshot("u-1"))
    assert await stack.get_latest("u-1") == await stack.inner.get_latest("u-1")


def test_bad_options_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name; a missing library with the command that installs it."""
    for tier in ("", 5):
        with pytest.raises(ConfigError) as caught:
            Tracing(MemoryStore(), tier=tier)  # type: ignore[arg-type]
        assert caught.value.option == "tier"
    with pytest.raises(ConfigError, match="must be an OpenTelemetry tracer"):
        Tracing(MemoryStore(), tracer="jaeger")
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ConfigError, match=r"layered-store\[otel\]") as caught:
        Tracing(MemoryStore())
    assert (caught.value.option, caught.value.layer) == ("tracer", "Tracing")


async def test_a_tier_is_called_after_the_backend_that_it_leads_to(
    exporter: InMemorySpanExporter, tracer: object
) -> None:
    """Through whatever layers; where the way parts, it is a stack."""
    for inner in (MemoryStore(), Retry(Cached(MemoryStore()))):
        await Tracing(inner, tracer=tracer).get_latest("u-1")
    both = WriteThrough(MemoryStore(), origin=MemoryStore())
    await Tracing(Retry(both), tracer=tracer).get_latest("u-1")
    names = [span.name for span in exporter.get_finished_spans()]
    assert names == ["memory.get_latest", "memory.get_latest", "stack.get_latest"]
