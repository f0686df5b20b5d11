"""Repetition, presence and frequency penalties along a hypothetical continuation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from deployments.engine.types import SamplingParams


class PenaltyState:
    """Which tokens a sequence has used. It only grows: tokens enter when they are committed."""

    def __init__(self, sampling: SamplingParams, vocab_size: int, device: torch.device) -> None:
        self._sampling = sampling
        self._is_used_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self._num_output_V = torch.zeros(vocab_size, dtype=torch.float64, device=device)

    @staticmethod
    def is_needed(sampling: SamplingParams) -> bool:
        """Whether any penalty is on."""
        return (
            sampling.repetition_penalty != 1.0
            or sampling.presence_penalty != 0.0
            or sampling.frequency_penalty != 0.0
        )

    def add_prompt(self, token_ids: Sequence[int]) -> None:
        """Note the prompt: it counts for the repetition penalty only."""
        self._is_used_V[self._ids(token_ids)] = True

    def add_output(self, token_ids: Sequence[int]) -> None:
        """Note committed output."""
        _count(self._num_output_V, self._ids(token_ids))
        self._is_used_V[self._ids(token_ids)] = True

    def apply(self, logits_V: Tensor, path: Sequence[int]) -> Tensor:
        """Penalise one row as if the tokens of ``path`` were output already.

        Args:
            logits_V: [V] float64.
            path: draft tokens between the committed text and the row.

        Returns:
            [V] float64, a new tensor.
        """
        num_output_V, is_used_V = self._num_output_V, self._is_used_V
        if path:
            ids = self._ids(path)
            num_output_V, is_used_V = num_output_V.clone(), is_used_V.clone()
            _count(num_output_V, ids)
            is_used_V[ids] = True
        repetition = self._sampling.repetition_penalty
        scaled_V = torch.where(logits_V > 0, logits_V / repetition, logits_V * repetition)
        logits_V = torch.where(is_used_V, scaled_V, logits_V)
        logits_V = logits_V - self._sampling.frequency_penalty * num_output_V
        return logits_V - self._sampling.presence_penalty * (num_output_V > 0)

    def _ids(self, token_ids: Sequence[int]) -> Tensor:
        return torch.tensor(token_ids, dtype=torch.int64, device=self._is_used_V.device)


def _count(counts_V: Tensor, ids: Tensor) -> None:
    counts_V.index_add_(0, ids, torch.ones_like(ids, dtype=counts_V.dtype))
