"""Compiled loops of the quantising codecs: widen, find each group's range, round, and back.

All arithmetic is IEEE float32 without contraction, so the bytes are the same on every machine.
float16 numbers of a section are read and written bytewise, so its alignment does not matter.
Whatever a kernel calls stands in this file: only a change of its own file renews a cached kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kv_store.codecs.compiled import compiled, float_of_bits, to_bits

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Raw = NDArray[np.uint8]
    Words = NDArray[np.uint16] | NDArray[np.uint32]
    Floats = NDArray[np.float32]
    Keys = NDArray[np.int32]

GROUP_BYTES = 4  # of one group's minimum and scale
_INF_KEY = np.int32(0x7F800000)
_ROUND = np.float32(12582912)  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits
_ROUND_BITS = np.uint32(0x4B400000)
_TINIEST_HALF = np.float32(2**-24)
_HALVES_OF_ONE = np.float32(2**24)
_BLOCK_ROWS = 64  # at a time: row by row, short loops would cost more than their work
_MAX_HALF = np.float32(65504)
_INF_HALF = np.uint32(0x7C00)


@compiled
def _half_to_float(half: np.uint32) -> np.float32:
    magnitude = np.uint32(half & np.uint32(0x7FFF))
    normal = np.uint32(np.uint32(magnitude << np.uint32(13)) + np.uint32(0x38000000))
    if magnitude >= _INF_HALF:
        normal = np.uint32(normal + np.uint32(0x38000000))
    tiny = to_bits(np.float32(np.int32(magnitude)) * _TINIEST_HALF)
    bits = normal if magnitude >= np.uint32(0x0400) else tiny
    return float_of_bits(np.uint32(bits | np.uint32((half & np.uint32(0x8000)) << np.uint32(16))))


@compiled
def _float_to_half(value: np.float32) -> np.uint16:
    """To nearest even; beyond the largest finite half, that one."""
    value = min(max(value, -_MAX_HALF), _MAX_HALF)
    bits = to_bits(value)
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    odd = np.uint32(np.uint32(magnitude >> np.uint32(13)) & np.uint32(1))
    normal = np.uint32(magnitude + np.uint32(0xFFF) + odd - np.uint32(0x38000000))
    normal = np.uint32(normal >> np.uint32(13))
    tiny = to_bits(float_of_bits(magnitude) + np.float32(0.5))
    tiny = np.uint32(tiny - np.uint32(0x3F000000))
    half = normal if magnitude >= np.uint32(0x38800000) else tiny
    return np.uint16(half | np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(0x8000)))


@compiled
def _half_towards_zero(value: np.float32) -> np.uint32:
    """The half of a finite value's magnitude, cut off; 0x7C00 (infinity) if it has none."""
    magnitude = np.uint32(to_bits(value) & np.uint32(0x7FFFFFFF))
    if magnitude >= np.uint32(0x47800000):
        return _INF_HALF
    if magnitude >= np.uint32(0x38800000):
        return np.uint32(np.uint32(magnitude - np.uint32(0x38000000)) >> np.uint32(13))
    return np.uint32(float_of_bits(magnitude) * _HALVES_OF_ONE)


@compiled
def _half_floor(value: np.float32) -> np.uint32:
    """The largest half that is not above the value."""
    half = _half_towards_zero(value)
    if value < 0:
        if -_half_to_float(half) > value:
            half = np.uint32(half + np.uint32(1))
        half = np.uint32(half | np.uint32(0x8000))
    return half


@compiled
def _scale_half(extent: np.float32, num_steps: np.float32) -> np.uint32:
    """The least half of which ``num_steps`` reach as far as ``extent`` (not negative)."""
    half = _half_towards_zero(extent / num_steps)
    if half < _INF_HALF and _half_to_float(half) * num_steps < extent:
        half = np.uint32(half + np.uint32(1))
    return half


@compiled
def _order_key(value: np.float32) -> np.int32:
    """An integer that orders as the floats do; integer loops vectorise where float ones do not."""
    bits = np.int32(to_bits(value))
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@compiled
def _float_of_key(key: np.int32) -> np.float32:
    bits = np.int32(key ^ np.int32(np.int32(key >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    return float_of_bits(np.uint32(bits))


@compiled
def _level(scaled: np.float32) -> np.uint8:
    """To nearest even; the low byte of the two's complement."""
    return np.uint8(np.uint32(to_bits(scaled + _ROUND) - _ROUND_BITS))


@compiled
def _put_half(target: Raw, index: int, half: np.uint32) -> None:
    target[2 * index] = np.uint8(half)
    target[2 * index + 1] = np.uint8(half >> np.uint32(8))


@compiled
def _get_half(source: Raw, index: int) -> np.float32:
    high = np.uint32(source[2 * index + 1])
    return _half_to_float(np.uint32(np.uint32(source[2 * index]) | np.uint32(high << np.uint32(8))))


@compiled
def _widen(source: Words, is_half: bool, target: Floats) -> None:
    """float32 words, float16 or bfloat16 to float32."""
    if source.itemsize == 4:
        for i in range(target.size):
            target[i] = float_of_bits(np.uint32(source[i]))
    elif is_half:
        for i in range(target.size):
            target[i] = _half_to_float(np.uint32(source[i]))
    else:
        for i in range(target.size):
            target[i] = float_of_bits(np.uint32(np.uint32(source[i]) << np.uint32(16)))


@compiled
def _floats_of(words: Words, scratch: Floats) -> Floats:
    """Where to make the values of words: in place if these are float32."""
    return words.view(np.float32) if words.itemsize == 4 else scratch[: words.size]


@compiled
def _narrow(source: Floats, is_half: bool, target: Words) -> None:
    """Finite float32 to the page's words, to nearest even."""
    if target.itemsize == 2 and is_half:
        for i in range(source.size):
            target[i] = _float_to_half(source[i])
    elif target.itemsize == 2:  # else they were made in place
        for i in range(source.size):
            bits = to_bits(source[i])
            odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
            rounded = np.uint32(bits + np.uint32(0x7FFF) + odd)
            target[i] = np.uint16(rounded >> np.uint32(16))


@compiled
def encode_symmetric(words: Words, is_half: bool, width: int, levels: Raw, scales: Raw) -> bool:
    """Rows of ``width`` values to int8 [rows, width] and one half each; False: not finite."""
    block = np.empty(_BLOCK_ROWS * width, np.float32)
    for begin in range(0, words.size, block.size):
        values = block[: min(block.size, words.size - begin)]
        _widen(words[begin : begin + values.size], is_half, values)
        for r in range(values.size // width):
            row = values[r * width : (r + 1) * width]
            largest = np.uint32(0)
            for i in range(width):
                largest = max(largest, np.uint32(to_bits(row[i]) & np.uint32(0x7FFFFFFF)))
            if largest >= np.uint32(0x7F800000):
                return False
            half = _scale_half(float_of_bits(largest), np.float32(127))
            if half >= _INF_HALF:
                return False
            _put_half(scales, begin // width + r, half)
            scale = _half_to_float(half)
            inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
            level = levels[begin + r * width : begin + (r + 1) * width]
            for i in range(width):
                level[i] = _level(row[i] * inverse)
    return True


@compiled
def decode_symmetric(levels: Raw, scales: Raw, is_half: bool, width: int, words: Words) -> None:
    """The way back."""
    block, scale = np.empty(_BLOCK_ROWS * width, np.float32), np.empty(_BLOCK_ROWS, np.float32)
    for begin in range(0, words.size, block.size):
        target = words[begin : begin + block.size]
        values = _floats_of(target, block)
        for r in range(values.size // width):
            scale[r] = _get_half(scales, begin // width + r)
        for r in range(values.size // width):
            level = levels[begin + r * width : begin + (r + 1) * width]
            row, step = values[r * width : (r + 1) * width], scale[r]
            for i in range(width):
                row[i] = np.float32(np.int8(level[i])) * step
        _narrow(values, is_half, target)


@compiled
def _channel_ranges(values: Floats, width: int, low: Keys, high: Keys) -> None:
    """Least and greatest key of each column of [rows, width]."""
    for c in range(width):
        low[c] = high[c] = _order_key(values[c])
    for start in range(width, values.size, width):
        row = values[start : start + width]
        for c in range(width):
            key = _order_key(row[c])
            low[c] = min(low[c], key)
            high[c] = max(high[c], key)


@compiled
def _vector_ranges(values: Floats, width: int, low: Keys, high: Keys) -> None:
    """Least and greatest key of each row of [rows, width]."""
    for r in range(values.size // width):
        row = values[r * width : (r + 1) * width]
        least = most = _order_key(row[0])
        for i in range(width):
            key = _order_key(row[i])
            least = min(least, key)
            most = max(most, key)
        low[r] = least
        high[r] = most


@compiled
def _put_ranges(
    low: Keys, high: Keys, num_steps: np.float32, ranges: Raw, minima: Floats, inverses: Floats
) -> bool:
    """Each group's minimum and scale as halves [groups, 2]; False: one is not finite."""
    for g in range(minima.size):
        if low[g] <= -_INF_KEY or high[g] >= _INF_KEY:
            return False
        least = _half_floor(_float_of_key(low[g]))
        if np.uint32(least & np.uint32(0x7FFF)) >= _INF_HALF:
            return False
        minimum = _half_to_float(least)
        scale = _scale_half(_float_of_key(high[g]) - minimum, num_steps)
        if scale >= _INF_HALF:
            return False
        _put_half(ranges, 2 * g, least)
        _put_half(ranges, 2 * g + 1, scale)
        minima[g] = minimum
        step = _half_to_float(scale)
        inverses[g] = np.float32(1) / step if step > 0 else np.float32(0)
    return True


@compiled
def _encode_piece(
    words: Words,
    is_half: bool,
    width: int,
    per_channel: bool,
    is_packed: bool,
    ranges: Raw,
    levels: Raw,
    scratch: tuple[Floats, Raw, Keys, Keys, Floats, Floats],
) -> bool:
    """One layer's keys or values, [rows, width] with a group per column or per row."""
    values, wide, low, high, minima, inverses = scratch
    values = values[: words.size]
    minima = minima[: ranges.size // GROUP_BYTES]
    _widen(words, is_half, values)
    if per_channel:
        _channel_ranges(values, width, low, high)
    else:
        _vector_ranges(values, width, low, high)
    num_steps = np.float32(15) if is_packed else np.float32(255)
    if not _put_ranges(low, high, num_steps, ranges, minima, inverses):
        return False
    target = wide if is_packed else levels
    for r in range(words.size // width):
        row = values[r * width : (r + 1) * width]
        level = target[r * width : (r + 1) * width]
        if per_channel:
            for i in range(width):
                level[i] = _level((row[i] - minima[i]) * inverses[i])
        else:
            minimum, inverse = minima[r], inverses[r]
            for i in range(width):
                level[i] = _level((row[i] - minimum) * inverse)
    if is_packed:
        half = levels.size
        upper = wide[half : words.size]
        for i in range(upper.size):
            levels[i] = np.uint8(wide[i] | np.uint8(upper[i] << np.uint8(4)))
        for i in range(upper.size, half):
            levels[i] = wide[i]
    return True


@compiled
def _decode_piece(
    ranges: Raw,
    levels: Raw,
    is_half: bool,
    width: int,
    per_channel: bool,
    is_packed: bool,
    words: Words,
    scratch: tuple[Raw, Floats, Floats, Floats],
) -> None:
    """The way back."""
    wide, minima, scales, values = scratch
    values = _floats_of(words, values)
    for g in range(ranges.size // GROUP_BYTES):
        minima[g] = _get_half(ranges, 2 * g)
        scales[g] = _get_half(ranges, 2 * g + 1)
    if is_packed:
        upper = wide[levels.size :]
        for i in range(levels.size):
            wide[i] = np.uint8(levels[i] & np.uint8(15))
            upper[i] = np.uint8(levels[i] >> np.uint8(4))
    else:
        for i in range(levels.size):
            wide[i] = levels[i]
    for r in range(words.size // width):
        level = wide[r * width : (r + 1) * width]
        row = values[r * width : (r + 1) * width]
        if per_channel:
            for i in range(width):
                row[i] = np.float32(level[i]) * scales[i] + minima[i]
        else:
            minimum, scale = minima[r], scales[r]
            for i in range(width):
                row[i] = np.float32(level[i]) * scale + minimum
    # All at once: row by row, short loops would cost more than their work.
    _narrow(values, is_half, words)


@compiled
def _bounds(
    start: int, number: int, dims: tuple[int, int, int], num_rows: int, packs_keys: bool
) -> tuple[bool, bool, int, int]:
    """Of piece ``number`` (K, V, K, V ...): is it keys, is it packed, end of ranges and levels."""
    _, num_heads, head_dim = dims
    is_key = number % 2 == 0
    is_packed = packs_keys or not is_key
    middle = start + GROUP_BYTES * num_heads * (head_dim if is_key else num_rows)
    num_values = num_rows * num_heads * head_dim
    return is_key, is_packed, middle, middle + ((num_values + 1) // 2 if is_packed else num_values)


@compiled
def encode_ranged(
    words: Words, is_half: bool, dims: tuple[int, int, int], first: int, packs_keys: bool, body: Raw
) -> bool:
    """Quantise each layer's keys and values from token ``first`` on.

    Args:
        words: [layers, 2, tokens, heads, head_dim], flat.
        is_half: 16-bit words are float16, else bfloat16.
        dims: tokens, heads, head_dim.
        first: tokens left out at the start.
        packs_keys: whether keys take four bits, not eight.
        body: per layer K ranges, K levels, V ranges, V levels.

    Returns:
        False if a value is not finite or a range does not fit in halves.
    """
    num_tokens, num_heads, head_dim = dims
    channels = num_heads * head_dim
    run = num_tokens * channels
    max_groups = max(channels, num_tokens * num_heads)
    keys, ranged = np.empty((2, max_groups), np.int32), np.empty((2, max_groups), np.float32)
    wide = np.empty(run, np.uint8)
    scratch = np.empty(run, np.float32), wide, keys[0], keys[1], ranged[0], ranged[1]
    start = 0
    for number in range(words.size // run):
        is_key, is_packed, mid, end = _bounds(start, number, dims, num_tokens - first, packs_keys)
        piece = words[number * run + first * channels : (number + 1) * run]
        width = channels if is_key else head_dim
        ranges, levels = body[start:mid], body[mid:end]
        if not _encode_piece(piece, is_half, width, is_key, is_packed, ranges, levels, scratch):
            return False
        start = end
    return True


@compiled
def decode_ranged(
    body: Raw, is_half: bool, dims: tuple[int, int, int], first: int, packs_keys: bool, words: Words
) -> None:
    """The way back."""
    num_tokens, num_heads, head_dim = dims
    channels = num_heads * head_dim
    run = num_tokens * channels
    max_groups = max(channels, num_tokens * num_heads)
    ranged = np.empty((2, max_groups), np.float32)
    scratch = np.empty(run + 1, np.uint8), ranged[0], ranged[1], np.empty(run, np.float32)
    start = 0
    for number in range(words.size // run):
        is_key, is_packed, mid, end = _bounds(start, number, dims, num_tokens - first, packs_keys)
        piece = words[number * run + first * channels : (number + 1) * run]
        width = channels if is_key else head_dim
        ranges, levels = body[start:mid], body[mid:end]
        _decode_piece(ranges, levels, is_half, width, is_key, is_packed, piece, scratch)
        start = end
