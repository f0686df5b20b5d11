"""What steps of target and draft take on this machine, and what a draft should give by that.

A round that drafts in line commits tau tokens in the time of the draft's steps, one behind the
other, and one step of the target over all draft tokens. Measured against plain decoding::

    speed-up = tau * T(1) / (T(nodes + 1) + sum of D(rows) over the draft's steps)

for a chain of K tokens tau * T(1) / (T(K + 1) + K * D(1)). It leaves out what an engine does beside
its steps, and other sequences in the batch.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Self

import torch

from deployments.engine.speculation.step_times import StepTimes
from deployments.engine.torch_engine.forward_batch import ForwardBatch, SequenceSpan
from deployments.engine.torch_engine.kv_cache import KVCache
from deployments.engine.torch_engine.model_runner import ModelRunner
from deployments.engine.training.tree_shape import TreeShape
from kv_store.layout import PAGE_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from deployments.engine.torch_engine.weights.loader import LoadedModel
    from deployments.engine.training.evaluation import DraftQuality

CONTEXT_TOKENS = 256
"""Committed tokens in front of a measured step."""
_REPETITIONS = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedUps:
    """Of greedy drafts, predicted.

    Attributes:
        chains: entry K - 1 is that of K draft tokens.
        tree: of the evaluation's tree.
    """

    chains: tuple[float, ...]
    tree: float

    @property
    def best_length(self) -> int:
        """The chain that gives most."""
        return self.chains.index(max(self.chains)) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """Seconds of a step by its rows; never falling between those that are given.

    Attributes:
        target_s: of the target, one sequence alone; for 1 row at least.
        draft_s: of the draft, likewise.
    """

    target_s: Mapping[int, float]
    draft_s: Mapping[int, float]

    def speed_ups(self, quality: DraftQuality, tree: TreeShape) -> SpeedUps:
        """By what factor tokens come faster than without a draft."""
        target, draft = _curve(self.target_s), _curve(self.draft_s)

        def factor(shape: TreeShape, length: float) -> float:
            drafting = sum(draft.seconds(rows) for rows in shape.extended_at)
            return length * target.seconds(1) / (target.seconds(shape.num_nodes + 1) + drafting)

        return SpeedUps(
            chains=tuple(
                factor(TreeShape.chain(length), tau)
                for length, tau in enumerate(quality.mean_acceptance_length, start=1)
            ),
            tree=factor(tree, quality.tree_acceptance_length),
        )

    @classmethod
    def read(cls, path: Path) -> Self:
        """As ``write`` left them."""
        raw = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            **{name: {int(rows): s for rows, s in raw[name].items()} for name in cls.__slots__}
        )

    def write(self, path: Path) -> None:
        """Keep them, so that a run that is interrupted goes on with the same."""
        raw = {"target_s": dict(self.target_s), "draft_s": dict(self.draft_s)}
        path.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def rows_needed(num_draft_tokens: int, tree: TreeShape) -> tuple[set[int], set[int]]:
    """Of which steps the times are wanted: rows of the target's, rows of the draft's."""
    chains = range(1, num_draft_tokens + 1)
    return {1, tree.num_nodes + 1, *(length + 1 for length in chains)}, {1, *tree.extended_at}


def time_steps(step: Callable[[int], object], rows: Iterable[int]) -> dict[int, float]:
    """Median seconds of a step by its rows; all widths take turns.

    Args:
        step: runs one of so many rows to its end, and does not return before that.
        rows: to be tried.
    """
    widths = sorted(rows)
    samples: dict[int, list[float]] = {width: [] for width in widths}
    for repetition in range(_REPETITIONS + 1):
        for width in widths:
            began = time.perf_counter()
            step(width)
            if repetition:
                samples[width].append(time.perf_counter() - began)
    return {width: median(seconds) for width, seconds in samples.items()}


def decoding_step(loaded: LoadedModel) -> Callable[[int], object]:
    """Greedy steps of a model over some rows behind a context, as an engine runs them."""
    model = loaded.model
    num_pages = 2 * CONTEXT_TOKENS // PAGE_TOKENS
    cache = KVCache(loaded.config, num_pages, dtype=model.dtype, device=model.device)
    runner = ModelRunner(model, loaded.config, cache)
    runner.warm_up()

    def step(num_rows: int) -> object:
        end = CONTEXT_TOKENS + num_rows
        new = torch.arange(CONTEXT_TOKENS, end)
        span = SequenceSpan(start=0, length=num_rows, kv_slots=torch.arange(end))
        batch = ForwardBatch(
            token_ids=torch.ones(num_rows, dtype=torch.int64),
            positions=new,
            slots=new,
            spans=(span,),
            logit_rows=torch.arange(num_rows),
        )
        return runner.forward(batch).argmax(1).tolist()

    return step


def _curve(seconds_of: Mapping[int, float]) -> StepTimes:
    times = StepTimes()
    for rows, seconds in seconds_of.items():
        times.observe(rows, seconds)
    return times
