"""Whether a prompt is computed by the prefill pool or where it is answered: measured costs, pure.

A target replica measures what a prompt token has cost of late: computed here, computed by the pool
(with its queue and the way to the tier), and loaded from the tier. The pool is asked for long
prompts alone, and only while its way is not expected to take much longer than the target's own.
Costs that are not known speak for the pool, and old ones are forgotten: so it is tried again.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deployments.config import PrefillConfig

_WEIGHT = 0.3
_REMEMBERED_S = 60.0


class Reason(StrEnum):
    """Why a prompt goes to the prefill pool or not; a metric's label."""

    SENT = "sent"
    """It goes there."""
    SHORT = "short"
    """The prompt is short."""
    CACHED = "cached"
    """So is what of it is in no cache."""
    UNUSED = "unused"
    """The request computes its prompt itself whatever is cached, as prompt log probabilities do."""
    BUSY = "busy"
    """As many of this replica's prompts as may be are at the pool."""
    FAILING = "failing"
    """The pool has failed of late and is left alone for a while."""
    COST = "cost"
    """The replica is expected to be sooner done itself."""


class TokenCost:
    """Seconds of one token, a moving average that is forgotten when nothing new comes."""

    def __init__(self) -> None:
        self._cost_s = 0.0
        self._seen_at: float | None = None

    def learn(self, seconds: float, num_tokens: int, now: float) -> None:
        """So many tokens took so long; nothing is learnt of none."""
        if num_tokens <= 0 or seconds < 0:
            return
        is_new = self.at(now) is None
        self._cost_s += (1.0 if is_new else _WEIGHT) * (seconds / num_tokens - self._cost_s)
        self._seen_at = now

    def at(self, now: float) -> float | None:
        """Seconds of a token; None while unknown."""
        if self._seen_at is None or now - self._seen_at > _REMEMBERED_S:
            return None
        return self._cost_s


class PromptCosts:
    """What one target replica knows of the ways to a prompt's pages."""

    def __init__(self) -> None:
        self.here = TokenCost()
        """Computed by this replica, by all tokens that were to compute before its first token."""
        self.pool = TokenCost()
        """Computed by the pool and written, from the question to the answer."""
        self.load = TokenCost()
        """From the pool's answer to the first token, by tokens that were loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What is known of a prompt before it is computed.

    Attributes:
        num_tokens: with resumed output.
        num_uncached: those behind what this replica and the tier have.
        num_backlog: tokens that this replica has to compute before it.
        num_in_flight: prompts of this replica at the pool.
        is_reusable: whether the request takes pages from a cache.
    """

    num_tokens: int
    num_uncached: int
    num_backlog: int
    num_in_flight: int
    is_reusable: bool = True


def choose(prompt: Prompt, costs: PromptCosts, config: PrefillConfig, now: float) -> Reason:
    """Where a prompt is computed."""
    if prompt.num_tokens < config.min_tokens:
        return Reason.SHORT
    if not prompt.is_reusable:
        return Reason.UNUSED
    if prompt.num_uncached < config.min_tokens:
        return Reason.CACHED
    if prompt.num_in_flight >= config.max_in_flight:
        return Reason.BUSY
    here, pool = costs.here.at(now), costs.pool.at(now)
    if here is not None and pool is not None:
        # Loading that was never measured is taken for free, until it is.
        away_s = prompt.num_uncached * (pool + (costs.load.at(now) or 0.0))
        here_s = (prompt.num_uncached + prompt.num_backlog) * here
        if away_s > config.max_slowdown * here_s:
            return Reason.COST
    return Reason.SENT
