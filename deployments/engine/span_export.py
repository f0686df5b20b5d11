"""Where spans go, for each process that has some to send."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

_EXPORT_DELAY_MS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanExport:
    """Settings of an exporter; see ``TracingConfig``. They hold no secret."""

    exporter: Literal["console", "file", "otlp"]
    otlp_endpoint: str
    file_path: str | None
    sample_ratio: float

    def provider(self, service: str) -> TracerProvider:
        """What makes this process's spans and sends them.

        Args:
            service: ``service.name`` of this process, such as ``paceline-ingress``.
        """
        provider = TracerProvider(
            resource=Resource.create({"service.name": service}),
            sampler=ParentBased(TraceIdRatioBased(self.sample_ratio)),
            id_generator=_Ids(),
        )
        provider.add_span_processor(
            BatchSpanProcessor(self._exporter(service), schedule_delay_millis=_EXPORT_DELAY_MS)
        )
        return provider

    def _exporter(self, service: str) -> SpanExporter:
        if self.exporter == "otlp":
            # Imported late: a tenth of a second of every replica's start, for one kind of exporter.
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

            return OTLPSpanExporter(endpoint=self.otlp_endpoint)
        if self.exporter == "file" and self.file_path is not None:
            return _file_exporter(Path(self.file_path), service)
        return ConsoleSpanExporter()


class _Ids(IdGenerator):
    """SGLang gives the random numbers of all its processes one seed; ids must differ."""

    def __init__(self) -> None:
        self._random = random.SystemRandom()

    def generate_span_id(self) -> int:
        return self._random.randrange(1, 1 << 64)

    def generate_trace_id(self) -> int:
        return self._random.randrange(1, 1 << 128)


def _file_exporter(folder: Path, service: str) -> SpanExporter:
    folder.mkdir(parents=True, exist_ok=True)
    # Open for the life of the process; the span processor is the only writer.
    out = (folder / f"{service}-{os.getpid()}.jsonl").open("a", encoding="utf-8", buffering=1)
    return ConsoleSpanExporter(out=out, formatter=_one_line)


def _one_line(span: ReadableSpan) -> str:
    text: str = span.to_json(indent=None)
    return text + "\n"
