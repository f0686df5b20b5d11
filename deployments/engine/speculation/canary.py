"""Does a candidate draft better than the drafter at work? A pure rule over what sessions showed.

The unit is the session, because rounds of one text are alike; a drafter's score is the number of
draft tokens a round that the text confirmed, a ratio of sums whose variance is taken over sessions.
The bound holds at every look, however often one looks, so a running cluster may ask all the time.

Source: the mixture sequential test for the difference of two means (Johari et al., "Peeking at A/B
Tests", KDD 2017).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from deployments.engine.config import CanaryConfig

_EXPECTED_DIFFERENCE = 0.2
"""Tokens a round: the size of difference that the bound is tightest for. Any other is found too."""


class DrafterRole(StrEnum):
    """Which of two drafters."""

    STABLE = "stable"
    CANDIDATE = "candidate"


class Outcome(StrEnum):
    """What becomes of a candidate."""

    UNDECIDED = "undecided"
    PROMOTED = "promoted"
    ROLLED_BACK = "rolled_back"


@dataclass(frozen=True, slots=True)
class Tally:
    """What sessions of one drafter add up to: counts, and sums of squares and products of them."""

    num_sessions: int = 0
    num_rounds: int = 0
    num_confirmed: int = 0
    sum_rounds_squared: int = 0
    sum_confirmed_squared: int = 0
    sum_products: int = 0

    def plus(self, num_rounds: int, num_confirmed: int) -> Tally:
        """With one more session; one without rounds says nothing.

        Args:
            num_rounds: tables that were asked for.
            num_confirmed: draft tokens of them that were in time and right.
        """
        if not num_rounds:
            return self
        return Tally(
            self.num_sessions + 1,
            self.num_rounds + num_rounds,
            self.num_confirmed + num_confirmed,
            self.sum_rounds_squared + num_rounds**2,
            self.sum_confirmed_squared + num_confirmed**2,
            self.sum_products + num_rounds * num_confirmed,
        )

    @property
    def score(self) -> float:
        """Confirmed draft tokens a round; 0 before the first."""
        return self.num_confirmed / self.num_rounds if self.num_rounds else 0.0

    @property
    def variance(self) -> float:
        """Of the score, by the spread of sessions around it; infinite below two of them."""
        if self.num_sessions < 2:
            return math.inf
        score = self.score
        residuals = (
            self.sum_confirmed_squared
            - 2 * score * self.sum_products
            + score**2 * self.sum_rounds_squared
        )
        # Rounding may leave a little less than nothing.
        spread = max(0.0, residuals) * self.num_sessions / (self.num_sessions - 1)
        return spread / self.num_rounds**2


class Verdict(NamedTuple):
    """What the rule says, and why in words."""

    outcome: Outcome
    reason: str


def judge(stable: Tally, candidate: Tally, rule: CanaryConfig) -> Verdict:
    """Judge a candidate by the sessions that either drafter served since the canary began.

    It is promoted when its score is higher beyond doubt. It is rolled back when its score is lower
    beyond doubt, or when ``rule.max_sessions`` of its own have not shown that it is higher.
    """
    counts = (
        f"candidate {candidate.score:.3f} confirmed draft tokens a round in "
        f"{candidate.num_rounds} rounds of {candidate.num_sessions} sessions, "
        f"stable {stable.score:.3f} in {stable.num_rounds} of {stable.num_sessions}"
    )
    fewest_sessions = min(stable.num_sessions, candidate.num_sessions)
    fewest_rounds = min(stable.num_rounds, candidate.num_rounds)
    if fewest_sessions < rule.min_sessions or fewest_rounds < rule.min_rounds:
        return Verdict(Outcome.UNDECIDED, f"too little to tell: {counts}")
    difference = candidate.score - stable.score
    doubt = half_width(stable.variance + candidate.variance, rule.error_rate)
    found = f"{counts}; difference {difference:+.3f} \u00b1 {doubt:.3f}"
    if difference > doubt:
        return Verdict(Outcome.PROMOTED, f"better: {found}")
    if difference < -doubt:
        return Verdict(Outcome.ROLLED_BACK, f"worse: {found}")
    if candidate.num_sessions >= rule.max_sessions:
        return Verdict(Outcome.ROLLED_BACK, f"not better: {found}")
    return Verdict(Outcome.UNDECIDED, f"no difference yet: {found}")


def half_width(variance: float, error_rate: float) -> float:
    """How far a difference of means may be from the true one, at any look.

    Args:
        variance: of the difference.
        error_rate: chance that it is ever farther.
    """
    if variance == 0:
        return 0.0
    mixture = _EXPECTED_DIFFERENCE**2
    total = variance + mixture
    logarithm = math.log(1 / error_rate) + 0.5 * math.log(total / variance)
    return math.sqrt(2 * variance * total / mixture * logarithm)
