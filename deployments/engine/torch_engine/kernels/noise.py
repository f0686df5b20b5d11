"""Which tokens' noise may be large enough to win, without computing the noise itself.

``speculation.noise`` defines the noise; its logarithms cost far more than its hash.
"""

from __future__ import annotations

import math

import numpy as np

from deployments.engine.speculation.noise import GOLDEN, MUL_1, MUL_2
from deployments.engine.torch_engine.kernels.compiling import kernel

_STEP, _FIRST, _SECOND = np.uint64(GOLDEN), np.uint64(MUL_1), np.uint64(MUL_2)
_A, _B, _C, _BITS = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(12)
_SLACK = 1e-6


def smallest_bits(noise: float) -> int:
    """A bound on the 52 hash bits of any token whose noise is at least ``noise``."""
    uniform = math.exp(-math.exp(min(_SLACK - noise, 700.0)))
    return max(0, int(uniform * 2.0**52) - 16)


@kernel
def tokens_above(row_key, bits, ids):
    """The tokens whose hash bits are at least ``bits``.

    Args:
        row_key: uint64, of the position.
        bits: uint64, from ``smallest_bits``.
        ids: [V] int64, overwritten with the tokens' ids in ascending order.

    Returns:
        How many there are.
    """
    count = 0
    hashed = row_key
    for token in range(ids.shape[0]):
        hashed += _STEP
        mixed = (hashed ^ (hashed >> _A)) * _FIRST
        mixed = (mixed ^ (mixed >> _B)) * _SECOND
        if (mixed ^ (mixed >> _C)) >> _BITS >= bits:
            ids[count] = token
            count += 1
    return count
