"""A step without a model: it takes the time a model would, and its tokens are computed from ids."""

from __future__ import annotations

import time
from bisect import bisect_left
from typing import TYPE_CHECKING

import torch

from deployments.engine.simulated_engine.text import SimulatedText, effective_seed, last_or_zero
from deployments.engine.torch_engine.capture import StepFeatures
from deployments.engine.torch_engine.core import EngineCore

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from torch import Tensor

    from deployments.engine.config import SimulatedConfig
    from deployments.engine.speculation.speculator import TakenDraft
    from deployments.engine.torch_engine.scheduler import Chunk


class SimulatedCore(EngineCore):
    """The embedded engine's core: its queue, pages, KV tier and rounds, without the arithmetic."""

    def __init__(
        self,
        *,
        simulated: SimulatedConfig,
        text: SimulatedText,
        sleep: Callable[[float], None] = time.sleep,
        **parts: Any,  # noqa: ANN401 - the base class's own
    ) -> None:
        """Build on the parts of ``EngineCore``.

        Args:
            simulated: what steps take.
            text: what is written.
            sleep: lets a step's time pass.
            parts: of the base class.
        """
        super().__init__(**parts)
        self._simulated = simulated
        self._text = text
        self._sleep = sleep
        self._no_logits = torch.empty(0, 0)

    def _compute(
        self, chunks: Sequence[Chunk], taken: Sequence[TakenDraft]
    ) -> tuple[list[int], Tensor, StepFeatures]:
        """See ``EngineCore``; there are no logits and no hidden states."""
        num_prefilled = sum(chunk.num_new_tokens for chunk in chunks if chunk.num_new_tokens > 1)
        num_rows = sum(chunk.num_new_tokens == 1 for chunk in chunks)
        num_rows += sum(len(draft.tree) for draft in taken)
        self._sleep(step_seconds(self._simulated, num_prefilled, num_rows))
        choices: list[int] = []
        for chunk, draft in zip(chunks, taken, strict=True):
            if chunk.is_sampled:
                choices.extend(self._choices(chunk, draft))
        return choices, self._no_logits, StepFeatures({}, (), None)

    def _choices(self, chunk: Chunk, draft: TakenDraft) -> list[int]:
        """The token behind the committed text, and behind each node of the draft."""
        sequence = chunk.sequence
        sampling, length = sequence.sampling, len(sequence.token_ids)
        seed = effective_seed(sampling.seed, sampling.temperature)
        index = sequence.request.choice_index
        last = last_or_zero(sequence.token_ids)
        choices = [self._text.next_token(seed, index, length, last)]
        depths: list[int] = []
        for parent, token_id in zip(draft.tree.parents, draft.tree.token_ids, strict=True):
            depths.append(1 if parent < 0 else depths[parent] + 1)
            choices.append(self._text.next_token(seed, index, length + depths[-1], token_id))
        return choices


def step_seconds(config: SimulatedConfig, num_prefilled: int, num_rows: int) -> float:
    """What a step takes.

    Args:
        config: the simulated hardware.
        num_prefilled: prompt tokens of the step.
        num_rows: sequences that decode in it, and draft tokens that are verified.
    """
    seconds = num_prefilled / config.prefill_tokens_per_s
    return seconds + _decode_seconds(config, num_rows) if num_rows else seconds


def _decode_seconds(config: SimulatedConfig, num_rows: int) -> float:
    """The line through the configured points; level before the first, as steep as the last pair."""
    points = config.decode_step_s
    at = bisect_left(points, float(num_rows), key=lambda point: point[0])
    if at == 0:
        return points[0][1]
    if len(points) == 1:
        return points[0][1]
    (left, low), (right, high) = points[at - 1 : at + 1] if at < len(points) else points[-2:]
    return low + (high - low) * (num_rows - left) / (right - left)
