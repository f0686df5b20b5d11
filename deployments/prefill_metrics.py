"""What a target replica reports of its prefill pool, as it happens: a few numbers per request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployments import metrics as names
from deployments.metrics import new_counter, new_gauge, new_histogram

if TYPE_CHECKING:
    from deployments.prefill_choice import PromptCosts, Reason


class PrefillMetrics:
    """Made only where there is a prefill pool."""

    def __init__(self) -> None:
        self._prompts = new_counter(names.PREFILL_PROMPTS)
        self._calls = new_counter(names.PREFILL_CALLS)
        self._tokens = new_counter(names.PREFILL_TOKENS)
        self._seconds = new_histogram(names.PREFILL_SECONDS)
        self._in_flight = new_gauge(names.PREFILL_IN_FLIGHT)
        self._costs = new_gauge(names.PREFILL_TOKEN_COST)

    def chosen(self, reason: Reason) -> None:
        """A prompt goes to the pool, or why it does not."""
        self._prompts.inc(tags={"reason": reason.value})

    def in_flight(self, num_prompts: int) -> None:
        """So many prompts are at the pool now."""
        self._in_flight.set(num_prompts)

    def ended(self, outcome: str, seconds: float) -> None:
        """The pool has answered, or is no longer waited for."""
        self._calls.inc(tags={"outcome": outcome})
        self._seconds.observe(seconds, tags={"outcome": outcome})

    def computed(self, num_tokens: int) -> None:
        """The pool has computed so many tokens."""
        if num_tokens > 0:
            self._tokens.inc(num_tokens)

    def costs(self, costs: PromptCosts, now: float) -> None:
        """What a token costs; 0 for what is not known."""
        for place, cost in (("here", costs.here), ("pool", costs.pool), ("load", costs.load)):
            self._costs.set(cost.at(now) or 0.0, tags={"place": place})
