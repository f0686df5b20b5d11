"""Compiled loops over ranges: find them, choose the widest, write and read them.

A range is a minimum and a scale, both float16. Within the loops it is the least and the greatest
``order_key`` of its values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kv_store.codecs.float_bits import float_of_bits, to_bits
from kv_store.codecs.halves import (
    INF_HALF,
    INF_KEY,
    float_of_key,
    half_bits,
    half_floor,
    half_to_float,
    order_key,
    put_half,
    scale_half,
)
from kv_store.compiling import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kv_store.codecs.halves import Floats, Keys, Raw, Words

    Ids = NDArray[np.uint16]

HALVES = "8f2c42e522dcfbca"
"""Digest of ``halves``, see there."""
RANGE_BYTES = 4
"""Of one minimum and scale."""
_MOST_SPREAD = np.float32(17)
"""Eight bits of a range so many times as wide as a vector's tell less than four bits of its own."""


@compiled
def _order_of(word: np.uint16) -> np.int16:
    """As ``order_key``, of a bfloat16 alone: twice as many fit in a vector."""
    bits = np.int16(word)
    return np.int16(bits ^ np.int16(np.int16(bits >> np.int16(15)) & np.int16(0x7FFF)))


@compiled
def _key_of(order: np.int16) -> np.int32:
    """The ``order_key`` of the same number."""
    below = np.int32(0xFFFF) if order < 0 else np.int32(0)
    return np.int32(np.int32(np.int32(order) << np.int32(16)) | below)


@compiled
def column_ranges(words: Words, width: int, every: int, low: Keys, high: Keys) -> None:
    """Least and greatest key of each column of [rows, width], in every so many rows."""
    if words.itemsize == 2:
        least, most = np.empty(width, np.int16), np.empty(width, np.int16)
        for c in range(width):
            least[c] = most[c] = _order_of(words[c])
        for start in range(width * every, words.size, width * every):
            row = words[start : start + width]
            for c in range(width):
                order = _order_of(row[c])
                least[c] = min(least[c], order)
                most[c] = max(most[c], order)
        for c in range(width):
            low[c] = _key_of(least[c])
            high[c] = _key_of(most[c])
        return
    for c in range(width):
        low[c] = high[c] = order_key(float_of_bits(np.uint32(words[c])))
    for start in range(width * every, words.size, width * every):
        row = words[start : start + width]
        for c in range(width):
            key = order_key(float_of_bits(np.uint32(row[c])))
            low[c] = min(low[c], key)
            high[c] = max(high[c], key)


@compiled
def row_ranges(words: Words, width: int, low: Keys, high: Keys) -> None:
    """Least and greatest key of each row of [rows, width]."""
    if words.itemsize == 2:
        for r in range(low.size):
            row = words[r * width : (r + 1) * width]
            least = most = _order_of(row[0])
            for i in range(width):
                order = _order_of(row[i])
                least = min(least, order)
                most = max(most, order)
            low[r] = _key_of(least)
            high[r] = _key_of(most)
        return
    for r in range(low.size):
        row = words[r * width : (r + 1) * width]
        lowest = highest = order_key(float_of_bits(np.uint32(row[0])))
        for i in range(width):
            key = order_key(float_of_bits(np.uint32(row[i])))
            lowest = min(lowest, key)
            highest = max(highest, key)
        low[r] = lowest
        high[r] = highest


@compiled
def put_ranges(
    low: Keys, high: Keys, num_steps: np.float32, ranges: Raw, minima: Floats, inverses: Floats
) -> bool:
    """Write minima and scales; False if one is not finite; each minimum, and 1 / scale or 0."""
    lows, scales = np.empty(low.size, np.uint16), np.empty(low.size, np.uint16)
    num_bad = 0
    for g in range(low.size):
        least = half_floor(float_of_key(low[g]))
        minimum = half_to_float(least)
        scale = scale_half(float_of_key(high[g]) - minimum, num_steps)
        step = half_to_float(scale)
        inverse = np.float32(1) / step
        minima[g] = minimum
        inverses[g] = inverse if step > 0 else np.float32(0)
        lows[g] = least
        scales[g] = scale
        num_bad += (
            (low[g] <= -INF_KEY)
            | (high[g] >= INF_KEY)
            | (np.uint32(least & np.uint32(0x7FFF)) >= INF_HALF)
            | (scale >= INF_HALF)
        )
    for g in range(low.size):
        put_half(ranges, 2 * g, lows[g])
        put_half(ranges, 2 * g + 1, scales[g])
    return num_bad == 0


@compiled
def get_ranges(ranges: Raw, minima: Floats, scales: Floats) -> None:
    """Read minima and scales."""
    lows, steps = np.empty(minima.size, np.uint16), np.empty(minima.size, np.uint16)
    for g in range(minima.size):
        lows[g], steps[g] = half_bits(ranges, 2 * g), half_bits(ranges, 2 * g + 1)
    for g in range(minima.size):
        minima[g] = half_to_float(np.uint32(lows[g]))
        scales[g] = half_to_float(np.uint32(steps[g]))


@compiled
def _extent(low: np.int32, high: np.int32) -> np.float32:
    return np.float32(float_of_key(high) - float_of_key(low))


@compiled
def widest(low: Keys, high: Keys, ids: Ids) -> None:
    """The columns with the greatest ranges to seven bits, ascending; of equal ones the first."""
    extents = np.empty(low.size, np.int16)
    for c in range(low.size):
        bits = to_bits(_extent(low[c], high[c])) & np.uint32(0x7FFFFFFF)  # it may be no number
        extents[c] = np.int16(np.uint32(bits) >> np.uint32(16))
    bound = np.int16(0)
    for bit in range(14, -1, -1):
        trial = np.int16(bound | np.int16(1 << bit))
        count = np.int16(0)
        for c in range(extents.size):
            count = np.int16(count + np.int16(extents[c] >= trial))
        if count >= ids.size:
            bound = trial
    num_equal = ids.size
    for c in range(extents.size):
        num_equal -= extents[c] > bound
    place = 0
    for c in range(extents.size):
        is_taken = extents[c] > bound
        if extents[c] == bound and num_equal > 0:
            num_equal -= 1
            is_taken = True
        if is_taken:
            ids[place] = c
            place += 1


@compiled
def is_loud(low: Keys, high: Keys) -> bool:
    """Whether few vectors are so wide that channels' ranges are theirs, and useless for others."""
    most, num_narrow = np.float32(0), 0
    for g in range(low.size):
        most = max(most, _extent(low[g], high[g]))
    for g in range(low.size):
        num_narrow += _extent(low[g], high[g]) * _MOST_SPREAD < most  # type: ignore[assignment]
    return num_narrow * 8 > low.size
