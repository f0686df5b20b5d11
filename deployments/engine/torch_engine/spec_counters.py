"""Counts what became of draft tokens, for one request or for the whole engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployments.engine.speculation.types import DraftOrigin
from deployments.engine.types import SpeculationStats

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deployments.engine.speculation.speculator import TakenDraft


class SpeculationCounters:
    """The mutable side of ``SpeculationStats``."""

    def __init__(self) -> None:
        self._num_spec_steps = 0
        self._num_draft_tokens = 0
        self._num_accepted = 0
        self._num_accepted_pool = 0
        self._num_accepted_head = 0
        self._num_table_hits = 0
        self._num_table_misses = 0
        self._histogram: list[int] = []

    def add(self, taken: TakenDraft, nodes: Sequence[int]) -> None:
        """Count one sequence's step.

        Args:
            taken: the draft that was verified, possibly empty.
            nodes: of its tree, that became output.
        """
        self._num_table_hits += taken.table_hit
        self._num_table_misses += taken.table_miss
        if not len(taken.tree):
            return
        self._num_spec_steps += 1
        self._num_draft_tokens += len(taken.tree)
        num_accepted = len(nodes)
        self._num_accepted += num_accepted
        if origins := taken.tree.origins:
            accepted = [origins[node] for node in nodes]
            self._num_accepted_pool += accepted.count(DraftOrigin.POOL)
            self._num_accepted_head += accepted.count(DraftOrigin.HEAD)
        self._histogram.extend([0] * (num_accepted + 1 - len(self._histogram)))
        self._histogram[num_accepted] += 1

    def snapshot(self) -> SpeculationStats:
        """The counts so far."""
        return SpeculationStats(
            num_spec_steps=self._num_spec_steps,
            num_draft_tokens=self._num_draft_tokens,
            num_accepted_draft_tokens=self._num_accepted,
            num_accepted_pool_tokens=self._num_accepted_pool,
            num_accepted_head_tokens=self._num_accepted_head,
            num_table_hits=self._num_table_hits,
            num_table_misses=self._num_table_misses,
            acceptance_histogram=tuple(self._histogram),
        )
