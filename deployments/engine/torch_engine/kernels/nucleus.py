"""The boundary of top-p, found without sorting the vocabulary."""

from __future__ import annotations

import numpy as np

from deployments.engine.torch_engine.kernels.compiling import kernel

_NUM_BINS = 512
_BINS_PER_UNIT = 16


@kernel
def last_kept(scores, probs, limits, thresholds):
    """The score of the last token of each row's smallest set whose probabilities reach a limit.

    Tokens are counted into bins by their distance from the best one; only the bin in which the
    limit is reached is sorted.

    Args:
        scores: [R, V] float64; ``-inf`` for excluded tokens.
        probs: [R, V] float64, their softmax.
        limits: [R] float64.
        thresholds: [R] float64, overwritten.
    """
    num_rows, vocab_size = scores.shape
    bins = np.empty(vocab_size, dtype=np.int64)
    for row in range(num_rows):
        best = scores[row, 0]
        for token in range(1, vocab_size):
            best = max(best, scores[row, token])
        mass = np.zeros(_NUM_BINS)
        for token in range(vocab_size):
            distance = (best - scores[row, token]) * _BINS_PER_UNIT
            bins[token] = np.int64(min(distance, _NUM_BINS - 1.0))
            mass[bins[token]] += probs[row, token]
        before, reached = 0.0, 0
        while reached < _NUM_BINS - 1 and before + mass[reached] < limits[row]:
            before += mass[reached]
            reached += 1
        here = np.nonzero(bins == reached)[0]
        thresholds[row] = best
        for index in here[np.argsort(-scores[row, here])]:
            if before >= limits[row] or probs[row, index] == 0:
                break
            thresholds[row] = scores[row, index]
            before += probs[row, index]
