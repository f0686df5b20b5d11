"""Texts with their target's features, as training takes them.

B: sequences, T: positions, E: hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class FeatureText(NamedTuple):
    """One text.

    Attributes:
        token_ids: [T] int32.
        features: [T, 3E], the three fused layers side by side.
        hidden: [T, E], what the target's head reads: behind its final norm.
        wanted: [T] int32, the target's likeliest token behind each position.
        is_answer: [T] bool, whether the target would have chosen the token behind the position.
    """

    token_ids: Tensor
    features: Tensor
    hidden: Tensor
    wanted: Tensor
    is_answer: Tensor

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.token_ids.shape[0]

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self)

    def without_features(self) -> FeatureText:
        """The text and what was wanted of it alone."""
        empty = self.features.new_empty((self.num_tokens, 0))
        return self._replace(features=empty, hidden=empty)


class FeatureBatch(NamedTuple):
    """Several texts, padded at the right with zeros that are no part of any answer."""

    token_ids: Tensor
    features: Tensor
    hidden: Tensor
    wanted: Tensor
    is_answer: Tensor


def left(x: Tensor, shift: int) -> Tensor:
    """Position t gets what stood at t + shift; the end is filled with zeros."""
    kept = x[:, shift:]
    filling = x.new_zeros((x.shape[0], x.shape[1] - kept.shape[1], *x.shape[2:]))
    return torch.cat((kept, filling), dim=1)


def collate(texts: Sequence[FeatureText], device: torch.device, dtype: torch.dtype) -> FeatureBatch:
    """Put texts into one batch: [B, T] and [B, T, ...].

    Args:
        texts: at least one.
        device: of the training.
        dtype: of features and hidden states.
    """

    def padded(field: str, dtype: torch.dtype) -> Tensor:
        parts = [getattr(text, field) for text in texts]
        return pad_sequence(parts, batch_first=True).to(device=device, dtype=dtype)

    return FeatureBatch(
        token_ids=padded("token_ids", torch.int64),
        features=padded("features", dtype),
        hidden=padded("hidden", dtype),
        wanted=padded("wanted", torch.int64),
        is_answer=padded("is_answer", torch.bool),
    )
