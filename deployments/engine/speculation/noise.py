"""Sampling noise as a pure function of (seed, choice, position, token id). Version 1.

The target emits ``argmax_v(logp_v + g_v)`` with g standard Gumbel, which draws from the processed
distribution; a drafter that adds the same g to its own log-probabilities agrees with the target
more often than independent draws could. Because g does not depend on drafts, batches or replicas,
neither does the text (Gumbel coupling: Daliri et al., arXiv:2408.07978).

Definition, all arithmetic modulo 2**64, ``mix`` the finaliser of SplitMix64 (Steele et al. 2014):

    row_key = mix(mix(mix(seed + G) + choice_index + G) + position + G)      G = 0x9E3779B97F4A7C15
    bits_v  = mix(row_key + (v + 1) * G)
    u_v     = ((bits_v >> 12) + 0.5) * 2**-52                                in (0, 1), exact
    g_v     = -log(-log(u_v))                                                in float64

``position`` is the index, counted from the first prompt token, of the token being chosen.
``tests/unit/.../test_noise.py`` holds golden vectors; a change of any bit is a new version.

Keys need no torch, which is imported where tensors are: a simulated draft replica has none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

NOISE_VERSION = 1

_MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
MUL_1 = 0xBF58476D1CE4E5B9
MUL_2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """The two's-complement int64 with the bits of an unsigned 64-bit integer."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * MUL_1) & _MASK
    value = ((value ^ (value >> 27)) * MUL_2) & _MASK
    return value ^ (value >> 31)


def choice_key(seed: int, choice_index: int) -> int:
    """What all positions of one sequence have in common, as an unsigned integer."""
    return _mix(_mix(seed + GOLDEN) + choice_index + GOLDEN)


def row_key(seed: int, choice_index: int, position: int) -> int:
    """The 64-bit key of one sampled position, as an unsigned integer."""
    return _mix(choice_key(seed, choice_index) + position + GOLDEN)


def row_keys_at(choice_keys: Sequence[int], positions_R: Tensor) -> Tensor:
    """The keys of positions that only a device knows; the host does not wait for it.

    Args:
        choice_keys: R keys from ``choice_key``.
        positions_R: [R] int64.

    Returns:
        [R] int64 with the bits of ``row_key``.
    """
    import torch

    keys_R = torch.tensor([_signed(key) for key in choice_keys], dtype=torch.int64)
    keys_R = keys_R.to(positions_R.device, non_blocking=True)
    return _mix_all(keys_R + positions_R + _signed(GOLDEN))


def _shift_right(values: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically; the mask clears the copies of the sign bit.
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _mix_all(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift_right(bits, 30)) * _signed(MUL_1)
    bits = (bits ^ _shift_right(bits, 27)) * _signed(MUL_2)
    return bits ^ _shift_right(bits, 31)


def gumbel(row_keys: Sequence[int] | Tensor, token_ids: Tensor) -> Tensor:
    """Gumbel noise for rows of candidate tokens.

    Args:
        row_keys: R keys from ``row_key``, or all of them from ``row_keys_at``.
        token_ids: [V] or [R, V] int64 candidate ids, on the device the noise is wanted on.

    Returns:
        [R, V] float64.
    """
    import torch

    if not isinstance(row_keys, torch.Tensor):
        row_keys = torch.tensor(
            [_signed(key) for key in row_keys], dtype=torch.int64, device=token_ids.device
        )
    bits_RV = _mix_all(row_keys.unsqueeze(1) + (token_ids + 1) * _signed(GOLDEN))
    uniform_RV = (_shift_right(bits_RV, 12).to(torch.float64) + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform_RV))
