"""Token counts of one client request, summed over its choices."""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING

from deployments.engine.types import GenerationUsage, SpeculationStats

if TYPE_CHECKING:
    from collections.abc import Sequence


def add_speculation(left: SpeculationStats, right: SpeculationStats) -> SpeculationStats:
    """The sum of two requests' speculation counts."""
    histogram = zip_longest(left.acceptance_histogram, right.acceptance_histogram, fillvalue=0)
    return SpeculationStats(
        num_spec_steps=left.num_spec_steps + right.num_spec_steps,
        num_draft_tokens=left.num_draft_tokens + right.num_draft_tokens,
        num_accepted_draft_tokens=left.num_accepted_draft_tokens + right.num_accepted_draft_tokens,
        num_accepted_pool_tokens=left.num_accepted_pool_tokens + right.num_accepted_pool_tokens,
        num_accepted_head_tokens=left.num_accepted_head_tokens + right.num_accepted_head_tokens,
        num_table_hits=left.num_table_hits + right.num_table_hits,
        num_table_misses=left.num_table_misses + right.num_table_misses,
        acceptance_histogram=tuple(a + b for a, b in histogram),
    )


class RequestTotals:
    """Adds up choices as they finish.

    A prompt is counted once however many choices it has, and so are its cached tokens: the
    smallest count of its choices, since later choices reuse what the first one computed.
    """

    def __init__(self, prompt_lengths: Sequence[int]) -> None:
        self._num_prompt_tokens = sum(prompt_lengths)
        self._num_output_tokens = 0
        self._cached: dict[int, tuple[int, int]] = {}
        self.speculation = SpeculationStats()
        self.replica_id = ""

    def add_output(self, num_tokens: int) -> None:
        """Count delivered output tokens; they survive a change of replica."""
        self._num_output_tokens += num_tokens

    def add_finished(
        self,
        prompt_index: int,
        usage: GenerationUsage | None,
        speculation: SpeculationStats | None,
    ) -> None:
        """Count one finished choice."""
        if usage is not None:
            counts = (usage.num_cached_tokens, usage.num_tier_cached_tokens)
            self._cached[prompt_index] = min(self._cached.get(prompt_index, counts), counts)
        if speculation is not None:
            self.speculation = add_speculation(self.speculation, speculation)

    def usage(self) -> GenerationUsage:
        """The sums so far."""
        return GenerationUsage(
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
            num_cached_tokens=sum(cached for cached, _ in self._cached.values()),
            num_tier_cached_tokens=sum(tier for _, tier in self._cached.values()),
        )
