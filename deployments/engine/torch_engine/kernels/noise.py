"""Which tokens' noise may be large enough to win, without computing the noise itself.

``speculation.noise`` defines the noise; its logarithms cost far more than its hash.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from deployments.engine.speculation.noise import GOLDEN, MUL_1, MUL_2
from deployments.engine.torch_engine.kernels.compiling import kernel

if TYPE_CHECKING:
    from numpy.typing import NDArray

_STEP, _FIRST, _SECOND = np.uint64(GOLDEN), np.uint64(MUL_1), np.uint64(MUL_2)
_A, _B, _C, _BITS = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(12)
_SLACK = 1e-6
_BINS_PER_UNIT = 8
_NUM_BINS = 48 * _BINS_PER_UNIT
"""No noise makes up for more: it lies between -3.6 and 36.8."""
_DISTANCES = np.arange(_NUM_BINS) / _BINS_PER_UNIT
_BLOCK = 256


def smallest_bits(noise: float) -> NDArray[np.uint64]:
    """Bounds on the 52 hash bits of tokens that win over ``noise`` from some way below.

    Returns:
        By eighths of a unit that a token's score lies below the one that has the noise.
    """
    needed = noise + _DISTANCES
    uniform = np.exp(-np.exp(np.minimum(_SLACK - needed, 700.0)))
    return np.maximum(0.0, uniform * 2.0**52 - 16).astype(np.uint64)


@kernel
def tokens_above(row_key, smallest, scores, best, inverse, ids):
    """The tokens that may win.

    Args:
        row_key: uint64, of the position.
        smallest: from ``smallest_bits``, of the noise to beat.
        scores: [V] float, finite or ``-inf``.
        best: float64, the score that has the noise to beat; none is above it.
        inverse: float64, what distances between scores are multiplied with.
        ids: [V] int64, overwritten with the tokens' ids in ascending order.

    Returns:
        How many there are.
    """
    count = 0
    size, last = scores.shape[0], smallest.shape[0] - 1
    per_unit = inverse * _BINS_PER_UNIT
    bits = np.empty(_BLOCK, dtype=np.uint64)
    bins = np.empty(_BLOCK, dtype=np.int64)
    for start in range(0, size, _BLOCK):
        length = min(_BLOCK, size - start)
        first = row_key + np.uint64(start + 1) * _STEP
        # Loops without branches, which the compiler makes vectors of.
        for i in range(length):
            hashed = first + np.uint64(i) * _STEP
            mixed = (hashed ^ (hashed >> _A)) * _FIRST
            mixed = (mixed ^ (mixed >> _B)) * _SECOND
            bits[i] = (mixed ^ (mixed >> _C)) >> _BITS
        for i in range(length):
            distance = (best - np.float64(scores[start + i])) * per_unit
            bins[i] = np.int64(distance if distance < last else last)
        num_found = 0
        for i in range(length):
            num_found += bits[i] >= smallest[bins[i]]
        if num_found:
            for i in range(length):
                if bits[i] >= smallest[bins[i]]:
                    ids[count] = start + i
                    count += 1
    return count
