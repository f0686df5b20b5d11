"""OpenTelemetry: one root span per request in the ingress, children further down.

Serve's own tracing covers replicas only, so the ingress opens the root itself and hands its W3C
``traceparent`` down in ``GenerationRequest``.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.trace import INVALID_SPAN, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from deployments.engine.span_export import SpanExport

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

    from deployments.config import TracingConfig

_PROPAGATOR = TraceContextTextMapPropagator()


class Tracing:
    """This process's tracer."""

    def __init__(self, config: TracingConfig, service: str) -> None:
        """Install the exporter.

        Args:
            config: where spans go.
            service: ``service.name`` of this process, such as ``paceline-ingress``.
        """
        self._provider: TracerProvider | None = None
        export = span_export(config)
        if export is not None:
            self._provider = export.provider(service)
            # The engine finds the provider through the API package, which is all it imports.
            trace.set_tracer_provider(self._provider)
        self._tracer = (
            self._provider.get_tracer("paceline") if self._provider else trace.NoOpTracer()
        )

    @contextmanager
    def span(
        self,
        name: str,
        traceparent: str | None,
        attributes: dict[str, str | int | float],
        *,
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> Iterator[Span]:
        """A span around the block, below the caller's one if it sent a valid ``traceparent``.

        The span is not made current: a streaming answer crosses tasks, and a context variable set
        in one of them cannot be reset in another. Pass ``traceparent_of(span)`` on instead.
        """
        if self._provider is None and traceparent is None:
            yield INVALID_SPAN
            return
        carrier = {"traceparent": traceparent} if traceparent else {}
        span = self._tracer.start_span(
            name, context=_PROPAGATOR.extract(carrier), kind=kind, attributes=attributes
        )
        try:
            yield span
        except Exception as error:
            span.set_status(StatusCode.ERROR, type(error).__name__)
            raise
        finally:
            span.end()

    def close(self) -> None:
        """Send what is left."""
        if self._provider is not None:
            self._provider.shutdown()


def traceparent_of(span: Span) -> str | None:
    """The W3C header that makes other spans children of this one; None if it is not recorded."""
    if span is INVALID_SPAN:
        return None
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, trace.set_span_in_context(span))
    return carrier.get("traceparent")


def span_export(config: TracingConfig) -> SpanExport | None:
    """Where spans go, for processes that are not replicas; None where there are none."""
    if config.exporter == "none":
        return None
    return SpanExport(
        exporter=config.exporter,
        otlp_endpoint=config.otlp_endpoint,
        file_path=None if config.file_path is None else str(config.file_path.absolute()),
        sample_ratio=config.sample_ratio,
    )
