"""OpenTelemetry spans of loads and saves, below the requests they are for.

    kv.load      one request's pages                      pages_asked, pages_loaded, tiers, is_late
      kv.find    one tier, asked what it has              tier, pages_asked, pages_found
      kv.get     one tier, one batch                      tier, pages_asked, pages_found, bytes
    kv.save      pages that are written together          pages
      kv.put     one tier                                 tier, pages, pages_taken, bytes

Pages are written in batches, so a save lies below the request of its first page and is linked to
those of the others.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from opentelemetry.context import Context
    from opentelemetry.trace import Span
    from opentelemetry.util.types import AttributeValue

_tracer = trace.get_tracer("kv_store")
_propagator = TraceContextTextMapPropagator()


@contextmanager
def kv_span(
    name: str, traceparents: Sequence[str | None] = (), **attributes: AttributeValue
) -> Iterator[Span]:
    """A span around the block, below the current one or the first of ``traceparents``.

    Args:
        name: behind ``kv.``.
        traceparents: W3C trace contexts of the requests it is for; None for those without.
        attributes: see ``describe``.
    """
    contexts = [_context(known) for known in dict.fromkeys(traceparents) if known]
    links = [
        trace.Link(trace.get_current_span(context).get_span_context()) for context in contexts[1:]
    ]
    with _tracer.start_as_current_span(
        f"kv.{name}", context=contexts[0] if contexts else None, links=links
    ) as span:
        describe(span, **attributes)
        yield span


def describe(span: Span, **attributes: AttributeValue) -> None:
    """Attributes below ``paceline.kv.``."""
    for name, value in attributes.items():
        span.set_attribute(f"paceline.kv.{name}", value)


def _context(traceparent: str) -> Context:
    return _propagator.extract({"traceparent": traceparent})
