"""Rounds of a sequence as a span."""

from __future__ import annotations

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from deployments.engine.sglang_engine import draft_spans
from deployments.engine.sglang_engine.draft_spans import RoundsSpan

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def spans(monkeypatch):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(draft_spans, "_tracer", provider.get_tracer("test"))
    return exporter.get_finished_spans


def two_rounds(traceparent):
    span = RoundsSpan(traceparent)
    span.round(num_draft_tokens=3, num_accepted=2, num_accepted_pool=2, is_hit=True)
    span.round(num_draft_tokens=0, num_accepted=0, num_accepted_pool=0, is_hit=False)
    span.end()


def test_each_round_is_an_event(spans):
    two_rounds(TRACEPARENT)
    (span,) = spans()
    assert span.parent.span_id == 0xB7AD6B7169203331
    assert [event.name for event in span.events] == ["round", "round"]
    assert span.events[0].attributes["paceline.accepted"] == 2
    assert dict(span.attributes) == {
        "paceline.rounds": 2,
        "paceline.draft_tokens": 3,
        "paceline.accepted": 2,
    }


@pytest.mark.parametrize("traceparent", [None, "nonsense"])
def test_without_a_trace_there_is_no_span(spans, traceparent):
    two_rounds(traceparent)
    assert spans() == ()
