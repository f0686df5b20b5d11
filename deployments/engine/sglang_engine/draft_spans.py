"""A span for each sequence that the draft pool drafts for, with an event for each of its rounds.

    draft.rounds     paceline.rounds, paceline.draft_tokens, paceline.accepted
      round          paceline.draft_tokens, paceline.accepted, paceline.accepted_pool,
                     paceline.table_hit

The SDK keeps the last 128 events of a span, and the attributes count all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_tracer = trace.get_tracer(__name__)
_propagator = TraceContextTextMapPropagator()


class RoundsSpan:
    """One sequence's; without a trace context it does nothing."""

    def __init__(self, traceparent: str | None) -> None:
        """Begin.

        Args:
            traceparent: W3C trace context of the request.
        """
        context = _propagator.extract({"traceparent": traceparent or ""})
        self._span: Span = trace.INVALID_SPAN
        # Without a parent it would be the root of a trace that nobody asked for.
        if trace.get_current_span(context).get_span_context().is_valid:
            self._span = _tracer.start_span("draft.rounds", context)
        self._num_rounds = 0
        self._num_draft_tokens = 0
        self._num_accepted = 0

    def round(
        self, *, num_draft_tokens: int, num_accepted: int, num_accepted_pool: int, is_hit: bool
    ) -> None:
        """One step of the sequence.

        Args:
            num_draft_tokens: verified.
            num_accepted: of them.
            num_accepted_pool: of these, the pool's.
            is_hit: whether a row of the pool's table fitted.
        """
        self._num_rounds += 1
        self._num_draft_tokens += num_draft_tokens
        self._num_accepted += num_accepted
        if self._span.is_recording():
            self._span.add_event(
                "round",
                {
                    "paceline.draft_tokens": num_draft_tokens,
                    "paceline.accepted": num_accepted,
                    "paceline.accepted_pool": num_accepted_pool,
                    "paceline.table_hit": is_hit,
                },
            )

    def end(self) -> None:
        """The sequence ended."""
        self._span.set_attributes(
            {
                "paceline.rounds": self._num_rounds,
                "paceline.draft_tokens": self._num_draft_tokens,
                "paceline.accepted": self._num_accepted,
            }
        )
        self._span.end()
