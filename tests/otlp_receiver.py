"""A collector of OpenTelemetry spans in the test's own process."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Received:
    """A span; ids are hex, ``parent_id`` is empty at a root."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]
    events: tuple[str, ...]


class OtlpReceiver(pb_grpc.TraceServiceServicer):
    """What was exported to it so far."""

    def __init__(self) -> None:
        self.endpoint = ""
        self._lock = threading.Lock()
        self._spans: list[Received] = []

    def Export(  # noqa: N802 - gRPC's name
        self, request: pb.ExportTraceServiceRequest, context: object
    ) -> pb.ExportTraceServiceResponse:
        del context
        found = [
            _received(span, resource.resource)
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        with self._lock:
            self._spans += found
        return pb.ExportTraceServiceResponse()

    def trace(self, trace_id: str) -> list[Received]:
        """Spans of one trace, in the order they came."""
        with self._lock:
            return [span for span in self._spans if span.trace_id == trace_id]


@contextmanager
def otlp_receiver() -> Iterator[OtlpReceiver]:
    """Listens while the block runs."""
    receiver = OtlpReceiver()
    server = grpc.server(ThreadPoolExecutor(4))
    pb_grpc.add_TraceServiceServicer_to_server(receiver, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    receiver.endpoint = f"http://127.0.0.1:{port}"
    try:
        yield receiver
    finally:
        server.stop(0).wait()


def ancestors(span: Received, spans: list[Received]) -> list[Received]:
    """The chain above a span, nearest first; ends where a parent was not received."""
    by_id = {other.span_id: other for other in spans}
    chain: list[Received] = []
    while (parent := by_id.get((chain[-1] if chain else span).parent_id)) is not None:
        chain.append(parent)
    return chain


def _received(span: Any, resource: Any) -> Received:
    service = next(a.value.string_value for a in resource.attributes if a.key == "service.name")
    return Received(
        service=service,
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        attributes={a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes},
        events=tuple(event.name for event in span.events),
    )
