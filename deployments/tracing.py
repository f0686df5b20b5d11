"""OpenTelemetry: one root span per request in the ingress, children further down.

Serve's own tracing covers replicas only, so the ingress opens the root itself and hands its W3C
``traceparent`` down in ``GenerationRequest``.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import INVALID_SPAN, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

    from deployments.config import TracingConfig

_PROPAGATOR = TraceContextTextMapPropagator()
_EXPORT_DELAY_MS = 1000


class Tracing:
    """This process's tracer."""

    def __init__(self, config: TracingConfig, service: str) -> None:
        """Install the exporter.

        Args:
            config: where spans go.
            service: ``service.name`` of this process, such as ``paceline-ingress``.
        """
        self._provider: TracerProvider | None = None
        exporter = _build_exporter(config, service)
        if exporter is not None:
            self._provider = TracerProvider(
                resource=Resource.create({"service.name": service}),
                sampler=ParentBased(TraceIdRatioBased(config.sample_ratio)),
            )
            self._provider.add_span_processor(
                BatchSpanProcessor(exporter, schedule_delay_millis=_EXPORT_DELAY_MS)
            )
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


def _build_exporter(config: TracingConfig, service: str) -> SpanExporter | None:
    if config.exporter == "console":
        return ConsoleSpanExporter()
    if config.exporter == "otlp":
        # Imported late: a tenth of a second of every replica's start, for one kind of exporter.
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter(endpoint=config.otlp_endpoint)
    if config.exporter == "file" and config.file_path is not None:
        return _file_exporter(config.file_path, service)
    return None


def _file_exporter(folder: Path, service: str) -> SpanExporter:
    folder.mkdir(parents=True, exist_ok=True)
    # Open for the life of the process; the span processor is the only writer.
    out = (folder / f"{service}-{os.getpid()}.jsonl").open("a", encoding="utf-8", buffering=1)
    return ConsoleSpanExporter(out=out, formatter=_one_line)


def _one_line(span: ReadableSpan) -> str:
    text: str = span.to_json(indent=None)
    return text + "\n"
