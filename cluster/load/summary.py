"""The figures of a run: percentiles, goodput at an SLO, and how it went over time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.load.outcome import Outcome

_PERCENTILES = (50, 90, 95, 99)
_NUM_ERRORS_TOLD = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """What a request must hold to be good; None asks nothing.

    Attributes:
        ttft_s: seconds to the first text.
        tpot_s: seconds a token behind it.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None

    def holds(self, outcome: Outcome) -> bool:
        """Whether the request is complete and within both."""
        if outcome.ending != "complete":
            return False
        return (self.ttft_s is None or outcome.ttft_s <= self.ttft_s) and (
            self.tpot_s is None or outcome.tpot_s <= self.tpot_s
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A measure over requests.

    Attributes:
        mean: of all; None without any, as the percentiles are then.
        percentiles: by their names, p50 and on.
    """

    mean: float | None
    percentiles: dict[str, float]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of all values; percentiles are values that occurred."""
        ordered = sorted(values)
        if not ordered:
            return cls(mean=None, percentiles={})
        last = len(ordered) - 1
        cuts = {f"p{cut}": ordered[round(last * cut / 100)] for cut in _PERCENTILES}
        return cls(mean=mean(ordered), percentiles=cuts)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSummary:
    """All figures of some requests.

    Attributes:
        num_failed: every request without a whole answer, rejected ones among them.
        num_good: complete within the SLO.
        goodput_share: good requests among all that were due.
        goodput_rps: good requests a second of the run.
        output_tokens_per_s: of complete requests, over the run.
        lateness_s: how much later than due requests left: of this side, not of the server. It is
            part of ``ttft_s``.
        gap_s: between two pieces of text.
        errors: the most frequent ones and how often they came.
    """

    num_requests: int
    num_complete: int
    num_failed: int
    num_rejected: int
    num_good: int
    goodput_share: float
    goodput_rps: float
    seconds: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    output_tokens_per_s: float
    lateness_s: Spread
    ttft_s: Spread
    tpot_s: Spread
    gap_s: Spread
    latency_s: Spread
    errors: dict[str, int]


def summarise(outcomes: Sequence[Outcome], slo: Slo, seconds: float) -> LoadSummary:
    """The figures of requests.

    Args:
        outcomes: of all that were due, at least one.
        slo: that good ones hold.
        seconds: of the run, from its start to its last event.
    """
    complete = [outcome for outcome in outcomes if outcome.ending == "complete"]
    num_good = sum(map(slo.holds, outcomes))
    num_output = sum(outcome.num_output_tokens for outcome in complete)
    errors = Counter(outcome.error for outcome in outcomes if outcome.error is not None)
    return LoadSummary(
        num_requests=len(outcomes),
        num_complete=len(complete),
        num_failed=len(outcomes) - len(complete),
        num_rejected=sum(outcome.ending == "rejected" for outcome in outcomes),
        num_good=num_good,
        goodput_share=num_good / len(outcomes),
        goodput_rps=num_good / seconds,
        seconds=seconds,
        num_prompt_tokens=sum(outcome.num_prompt_tokens for outcome in complete),
        num_cached_tokens=sum(outcome.num_cached_tokens for outcome in complete),
        num_output_tokens=num_output,
        output_tokens_per_s=num_output / seconds,
        lateness_s=Spread.of([outcome.sent_s - outcome.due_s for outcome in outcomes]),
        ttft_s=Spread.of([outcome.ttft_s for outcome in complete]),
        tpot_s=Spread.of([each.tpot_s for each in complete if each.num_output_tokens > 1]),
        gap_s=Spread.of([gap for outcome in complete for gap in outcome.gaps_s]),
        latency_s=Spread.of([outcome.ended_s - outcome.due_s for outcome in complete]),
        errors=dict(errors.most_common(_NUM_ERRORS_TOLD)),
    )


def timeline(outcomes: Sequence[Outcome], slo: Slo, step_s: float) -> list[dict[str, Any]]:
    """How it went: what was due in each interval and what became of that.

    Args:
        outcomes: of all that were due.
        slo: that good ones hold.
        step_s: length of an interval.

    Returns:
        By interval: its start, requests due, good and failed among them, and their median TTFT.
    """
    steps: dict[int, list[Outcome]] = {}
    for outcome in outcomes:
        steps.setdefault(int(outcome.due_s / step_s), []).append(outcome)
    return [
        {"at_s": index * step_s, **_interval(steps.get(index, ()), slo)}
        for index in range(max(steps) + 1)
    ]


def _interval(due: Sequence[Outcome], slo: Slo) -> dict[str, Any]:
    waited = [outcome.ttft_s for outcome in due if outcome.ending == "complete"]
    return {
        "due": len(due),
        "good": sum(map(slo.holds, due)),
        "failed": len(due) - len(waited),
        "ttft_s": Spread.of(waited).percentiles.get("p50"),
    }
