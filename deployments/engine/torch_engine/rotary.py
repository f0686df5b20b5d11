"""Rotary position embeddings in the layout of Hugging Face checkpoints (two halves).

N: tokens of a batch, H: heads, D: head dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK_POSITIONS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """How positions turn into angles.

    Attributes:
        theta: the base of the wavelengths.
        scaling: ``linear`` stretches all positions by ``factor``; ``llama3`` stretches long
            wavelengths only, with a smooth passage (Llama 3.1); ``yarn`` does so with a passage
            that is linear in the dimension, and sharpens attention (arXiv 2309.00071).
        low_freq_factor: llama3 only; wavelengths above ``original_max_positions`` divided by
            this are stretched fully.
        high_freq_factor: llama3 only; wavelengths below ``original_max_positions`` divided by
            this are left alone.
        original_max_positions: llama3 and yarn; the context length of the pretraining.
        beta_fast: yarn only; what turns more often over the pretraining's context is left alone.
        beta_slow: yarn only; what turns less often is stretched fully.
        amplitude: factor on all cosines and sines, hence its square on attention scores.
    """

    theta: float = 10_000.0
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    amplitude: float = 1.0

    def canonical_text(self) -> str:
        """One line that differs whenever two settings rotate differently."""
        if self.scaling == "none":
            return f"theta={self.theta!r}"
        text = f"theta={self.theta!r} {self.scaling} factor={self.factor!r}"
        if self.scaling == "llama3":
            text += (
                f" low={self.low_freq_factor!r} high={self.high_freq_factor!r}"
                f" original={self.original_max_positions}"
            )
        if self.scaling == "yarn":
            text += (
                f" fast={self.beta_fast!r} slow={self.beta_slow!r}"
                f" original={self.original_max_positions} amplitude={self.amplitude!r}"
            )
        return text


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Angle per position of each pair of dimensions: [D / 2] float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.scaling == "linear":
        return frequencies / rope.factor
    if rope.scaling == "llama3":
        return _stretch_long_wavelengths(frequencies, rope)
    if rope.scaling == "yarn":
        return _stretch_high_dimensions(frequencies, rope, head_dim)
    return frequencies


def _stretch_long_wavelengths(frequencies: Tensor, rope: RopeConfig) -> Tensor:
    """Llama 3.1's scaling, continuous in the wavelength."""
    turns = rope.original_max_positions * frequencies / (2 * math.pi)
    span = rope.high_freq_factor - rope.low_freq_factor
    smooth = ((turns - rope.low_freq_factor) / span).clamp(0, 1)
    return frequencies * (smooth + (1 - smooth) / rope.factor)


def _stretch_high_dimensions(frequencies: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    """YaRN's scaling; the ends of its passage are whole dimensions, as checkpoints expect."""

    def dimension(turns: float) -> float:
        wavelength = rope.original_max_positions / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    first = max(math.floor(dimension(rope.beta_fast)), 0)
    last = max(min(math.ceil(dimension(rope.beta_slow)), head_dim - 1), first + 0.001)
    at = torch.arange(head_dim // 2, dtype=torch.float32)
    stretched = ((at - first) / (last - first)).clamp(0, 1)
    return frequencies * (1 - stretched) + frequencies / rope.factor * stretched


def rotation_table(
    positions: Tensor, frequencies: Tensor, amplitude: float, dtype: torch.dtype
) -> Tensor:
    """Cosines and sines of each token: [2, N, 1, D / 2]; angles are computed in float32."""
    angles = positions.to(torch.float32).unsqueeze(1) * frequencies
    return (torch.stack((angles.cos(), angles.sin())) * amplitude).to(dtype).unsqueeze(2)


class RotationRows:
    """A table of ``rotation_table`` by position, so that no position is computed twice.

    Vectorised cosines may differ in their last bit with the place in the vector; here a position
    has the same place in every process.
    """

    def __init__(self, frequencies: Tensor, amplitude: float) -> None:
        """Begin with no position; the arguments are those of ``rotation_table``."""
        self._frequencies, self._amplitude = frequencies, amplitude
        self._table = torch.empty(2, 0, frequencies.shape[0])

    def of(self, positions: Tensor) -> Tensor:
        """[2, N, D / 2] float32 of N positions."""
        while int(positions.max()) >= self._table.shape[1]:
            start = self._table.shape[1]
            block = torch.arange(start, start + _BLOCK_POSITIONS)
            rows = rotation_table(block, self._frequencies, self._amplitude, torch.float32).squeeze(
                2
            )
            self._table = torch.cat((self._table, rows), dim=1)
        return self._table.index_select(1, positions)


def rotate(heads_NHD: Tensor, table: Tensor) -> Tensor:
    """Turn each pair (i, i + D / 2) of every head by its token's angles."""
    cos, sin = table.unbind()
    first, second = heads_NHD.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
