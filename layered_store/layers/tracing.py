"""An OpenTelemetry span for each call that passes a place in the stack."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, TypeVar

from layered_store.errors import ConfigError
from layered_store.layer import AroundLayer
from layered_store.layers.metrics import outcome_of
from layered_store.stack import children_of, kind_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from layered_store.interface import Op

__all__ = ["Tracing"]

P = ParamSpec("P")
T = TypeVar("T")

_NO_FAULT = ("ok", "invalid", "cancelled")


@dataclass(eq=False, repr=False)
class Tracing(AroundLayer):
    """Make a span of each call: which operation, at which tier, how it ended.

    Put one outermost for a span per call, and one around each backend for a span per tier below it.
    A span holds no user id, no state and no error text. If no OpenTelemetry SDK is set up, nothing
    is recorded, and a call costs about a microsecond more.

    Args:
        inner: the store below.
        tier: the name of this place in spans; None takes the kind of the backend below, such as
            ``"redis"``, or ``"stack"`` when there are several.
        tracer: an OpenTelemetry tracer; None takes that of the global provider.

    Raises:
        ConfigError: ``tier`` is empty, or OpenTelemetry is not installed (extra ``otel``).

    Order:
        Outermost, and directly above backends. Above ``Cached``, every hit goes through the layers
        one by one and becomes a span, so hits are slower.

    Cancellation:
        Passes through; the span ends with the outcome ``cancelled``.
    """

    tier: str | None = field(default=None, kw_only=True)
    tracer: Any = field(default=None, kw_only=True, repr=False)

    kind: ClassVar[str] = "tracing"

    def __post_init__(self) -> None:
        if self.tier is not None and (not isinstance(self.tier, str) or not self.tier):
            raise ConfigError(
                "must be a name such as 'redis', or None", option="tier", layer=self.name
            )
        super().__post_init__()
        try:
            from opentelemetry import trace  # noqa: PLC0415  an optional library
        except ImportError:
            raise ConfigError(
                "needs OpenTelemetry: pip install 'layered-store[otel]'",
                option="tracer",
                layer=self.name,
            ) from None
        if self.tracer is not None and not hasattr(self.tracer, "start_as_current_span"):
            raise ConfigError(
                "must be an OpenTelemetry tracer, or None", option="tracer", layer=self.name
            )
        self._tracer = trace.get_tracer("layered_store") if self.tracer is None else self.tracer
        self._error = trace.Status(trace.StatusCode.ERROR)
        self._tier = self.tier or _name(self.inner)

    async def around(
        self, op: Op, method: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        attributes = {"layered_store.operation": op.value, "layered_store.tier": self._tier}
        # Exceptions are not recorded: their texts and tracebacks may hold anything.
        with self._tracer.start_as_current_span(
            f"{self._tier}.{op.value}",
            attributes=attributes,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            outcome = "ok"
            try:
                return await method(*args, **kwargs)
            except BaseException as exc:
                outcome = outcome_of(exc)
                span.set_attribute("error.type", type(exc).__name__)
                raise
            finally:
                span.set_attribute("layered_store.outcome", outcome)
                if outcome not in _NO_FAULT:
                    span.set_status(self._error)


def _name(store: Any) -> str:
    """Return the kind of the backend that ``store`` leads to, if it is one."""
    while below := list(children_of(store).values()):
        if len(below) > 1:
            return "stack"
        store = below[0]
    return kind_of(store)
