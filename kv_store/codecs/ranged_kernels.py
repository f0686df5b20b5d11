"""Compiled loops of the codecs that round within ranges: find them, round, and back.

A piece is one layer's keys or values, [rows, channels]. Keys have a range per channel; values have
one per vector, a row's channels of a few heads. The channels with the widest ranges take eight bits
where the others take four: see ``kivi``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kv_store.codecs.compiled import compiled, to_bits
from kv_store.codecs.halves import (
    INF_HALF,
    INF_KEY,
    float_of_key,
    floats_of,
    get_half,
    half_floor,
    half_to_float,
    level_of,
    narrow,
    order_key,
    put_half,
    scale_half,
    widen,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kv_store.codecs.halves import Floats, Keys, Raw, Words

    Ids = NDArray[np.uint16]

HALVES = "9609c3c56073220c"
"""Digest of ``halves``, see there."""
RANGE_BYTES = 4
"""Of one minimum and scale."""
_SAMPLED_ROWS = 4
"""Wide channels of values are chosen by every so many rows; their ranges are those of all."""
NO_CHANNEL = np.uint16(0xFFFF)
"""In place of every wide channel, where a piece has none."""
_FINE_STEPS = np.float32(255)
_COARSE_STEPS = np.float32(15)
_MOST_SPREAD = np.float32(17)
"""Eight bits of a range so many times as wide as a vector's tell less than four bits of its own."""


class Piece(NamedTuple):
    """How a piece is stored.

    Attributes:
        is_key: ranges are per channel, else per vector.
        is_packed: levels take four bits, else eight.
        num_wide: channels that take eight bits beside packed ones.
        num_rows: tokens.
        num_channels: of all heads.
        num_in_group: channels of a vector.
    """

    is_key: bool
    is_packed: bool
    num_wide: int
    num_rows: int
    num_channels: int
    num_in_group: int


@compiled
def _ends_of(piece: Piece, start: int) -> tuple[int, int, int, int, int]:
    """Where its parts end: wide channels, their ranges, ranges, levels, rest of wide levels.

    Wide channels of keys have theirs among the others' ranges.
    """
    num_values = piece.num_rows * piece.num_channels
    num_groups = piece.num_channels if piece.is_key else num_values // piece.num_in_group
    ids = start + 2 * piece.num_wide
    wide = ids + (0 if piece.is_key else RANGE_BYTES * piece.num_wide)
    ranges = wide + RANGE_BYTES * num_groups
    levels = ranges + ((num_values + 1) // 2 if piece.is_packed else num_values)
    return ids, wide, ranges, levels, levels + (piece.num_rows * piece.num_wide + 1) // 2


@compiled
def _column_ranges(values: Floats, width: int, every: int, low: Keys, high: Keys) -> None:
    """Least and greatest key of each column of [rows, width], in every so many rows."""
    for c in range(width):
        low[c] = high[c] = order_key(values[c])
    for start in range(width * every, values.size, width * every):
        row = values[start : start + width]
        for c in range(width):
            key = order_key(row[c])
            low[c] = min(low[c], key)
            high[c] = max(high[c], key)


@compiled
def _row_ranges(values: Floats, width: int, low: Keys, high: Keys) -> None:
    """Least and greatest key of each row of [rows, width]."""
    for r in range(values.size // width):
        row = values[r * width : (r + 1) * width]
        least = most = order_key(row[0])
        for i in range(width):
            key = order_key(row[i])
            least = min(least, key)
            most = max(most, key)
        low[r] = least
        high[r] = most


@compiled
def _put_range(
    low: np.int32, high: np.int32, num_steps: np.float32, ranges: Raw, index: int
) -> tuple[bool, np.float32, np.float32]:
    """Write a minimum and a scale; False if one is not finite; the minimum and 1 / scale, or 0."""
    nothing = np.float32(0)
    if low <= -INF_KEY or high >= INF_KEY:
        return False, nothing, nothing
    least = half_floor(float_of_key(low))
    if np.uint32(least & np.uint32(0x7FFF)) >= INF_HALF:
        return False, nothing, nothing
    minimum = half_to_float(least)
    scale = scale_half(float_of_key(high) - minimum, num_steps)
    if scale >= INF_HALF:
        return False, nothing, nothing
    put_half(ranges, 2 * index, least)
    put_half(ranges, 2 * index + 1, scale)
    step = half_to_float(scale)
    return True, minimum, np.float32(1) / step if step > 0 else nothing


@compiled
def _extent(low: np.int32, high: np.int32) -> np.float32:
    return np.float32(float_of_key(high) - float_of_key(low))


@compiled
def _widest(low: Keys, high: Keys, ids: Ids) -> None:
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
            count += np.int16(extents[c] >= trial)
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
def _hide(values: Floats, piece: Piece, ids: Ids) -> None:
    """Put another value of its vector in each wide channel's place, so that it widens no range."""
    others = np.empty(ids.size, np.uint16)
    for n in range(ids.size):
        start = np.int64(ids[n]) // piece.num_in_group * piece.num_in_group
        other = start
        for wide in ids:
            # Ascending, so one look at each is enough.
            other += np.int64(wide) == other and other < start + piece.num_in_group - 1
        others[n] = other
    for r in range(piece.num_rows):
        row = values[r * piece.num_channels : (r + 1) * piece.num_channels]
        for n in range(ids.size):
            row[ids[n]] = row[others[n]]


@compiled
def _is_loud(low: Keys, high: Keys) -> bool:
    """Whether few vectors are so wide that channels' ranges are theirs, and useless for others."""
    most, num_narrow = np.float32(0), 0
    for g in range(low.size):
        most = max(most, _extent(low[g], high[g]))
    for g in range(low.size):
        num_narrow += _extent(low[g], high[g]) * _MOST_SPREAD < most  # type: ignore[assignment]
    return num_narrow * 8 > low.size


@compiled
def _pack(levels: Raw, packed: Raw) -> None:
    """Two a byte: the first half of them below the second."""
    half = packed.size
    upper = levels[half:]
    for i in range(upper.size):
        packed[i] = np.uint8(levels[i] | np.uint8(upper[i] << np.uint8(4)))
    for i in range(upper.size, half):
        packed[i] = levels[i]


@compiled
def _unpack(packed: Raw, levels: Raw) -> None:
    """The way back; ``levels`` has room for an even number."""
    upper = levels[packed.size :]
    for i in range(packed.size):
        levels[i] = np.uint8(packed[i] & np.uint8(15))
        upper[i] = np.uint8(packed[i] >> np.uint8(4))


@compiled
def _encode_piece(words: Words, is_half: bool, piece: Piece, body: Raw, start: int) -> bool:
    """Write a piece, words [rows, channels], to its place; False if a range is not finite."""
    channels, num_rows, num_wide = piece.num_channels, piece.num_rows, piece.num_wide
    ids_end, wide_end, ranges_end, levels_end, end = _ends_of(piece, start)
    ranges, wide_ranges = body[wide_end:ranges_end], body[ids_end:wide_end]
    values = np.empty(words.size, np.float32)
    widen(words, is_half, values)
    ids, fine = np.empty(num_wide, np.uint16), np.zeros(num_rows * num_wide, np.uint8)
    columns = np.empty((2, channels), np.int32)
    if piece.is_key:
        _column_ranges(values, channels, 1, columns[0], columns[1])
    elif num_wide:
        _column_ranges(values, channels, _SAMPLED_ROWS, columns[0], columns[1])
    kept, edges = np.empty(num_rows * num_wide, np.float32), np.empty((2, num_wide), np.int32)
    if num_wide:
        _widest(columns[0], columns[1], ids)
        for r in range(num_rows):
            row, own = values[r * channels : (r + 1) * channels], kept[r * num_wide :]
            for n in range(num_wide):
                own[n] = row[ids[n]]
        _column_ranges(kept, num_wide, 1, edges[0], edges[1])
    low, high, group = columns[0], columns[1], channels
    if not piece.is_key:
        group = piece.num_in_group
        rows = np.empty((2, words.size // group), np.int32)
        low, high = rows[0], rows[1]
        _hide(values, piece, ids)
        _row_ranges(values, group, low, high)
        if num_wide and _is_loud(low, high):
            ids[:] = NO_CHANNEL
            num_wide = 0
            widen(words, is_half, values)
            _row_ranges(values, group, low, high)
    minima, inverses = np.empty((2, max(low.size, num_wide)), np.float32)
    steps = _COARSE_STEPS if piece.is_packed else _FINE_STEPS
    for g in range(low.size):
        fits, minima[g], inverses[g] = _put_range(low[g], high[g], steps, ranges, g)
        if not fits:
            return False
    levels = np.empty(words.size, np.uint8)
    for r in range(num_rows if piece.is_key else low.size):
        row, level = values[r * group : (r + 1) * group], levels[r * group : (r + 1) * group]
        if piece.is_key:
            for i in range(group):
                level[i] = level_of((row[i] - minima[i]) * inverses[i])
        else:
            minimum, inverse = minima[r], inverses[r]
            for i in range(group):
                level[i] = level_of((row[i] - minimum) * inverse)
    wide_ranges[:] = 0
    for n in range(num_wide):
        target, index = (ranges, np.int64(ids[n])) if piece.is_key else (wide_ranges, n)
        edge = edges[0][n], edges[1][n]
        fits, minima[n], inverses[n] = _put_range(*edge, _FINE_STEPS, target, index)  # type: ignore[arg-type]
        if not fits:
            return False
    for r in range(num_rows if num_wide else 0):
        own, lower = kept[r * num_wide : (r + 1) * num_wide], fine[r * num_wide :]
        for n in range(num_wide):
            lower[n] = level_of((own[n] - minima[n]) * inverses[n])
        level = levels[r * channels : (r + 1) * channels]
        for n in range(num_wide):
            level[ids[n]] = lower[n] >> np.uint8(4)
    for i in range(fine.size):
        fine[i] &= np.uint8(15)
    for n in range(piece.num_wide):
        body[start + 2 * n] = np.uint8(ids[n])
        body[start + 2 * n + 1] = np.uint8(ids[n] >> np.uint16(8))
    if piece.is_packed:
        _pack(levels, body[ranges_end:levels_end])
    else:
        body[ranges_end:levels_end] = levels
    _pack(fine, body[levels_end:end])
    return True


@compiled
def _decode_piece(body: Raw, start: int, is_half: bool, piece: Piece, words: Words) -> bool:
    """The way back; False if the piece names a channel that does not exist."""
    channels, num_rows, num_wide = piece.num_channels, piece.num_rows, piece.num_wide
    ids_end, wide_end, ranges_end, levels_end, end = _ends_of(piece, start)
    ranges, wide_ranges = body[wide_end:ranges_end], body[ids_end:wide_end]
    values = floats_of(words, np.empty(words.size, np.float32))
    num_groups = ranges.size // RANGE_BYTES
    minima, scales = np.empty((2, max(num_groups, num_wide)), np.float32)
    for g in range(num_groups):
        minima[g] = get_half(ranges, 2 * g)
        scales[g] = get_half(ranges, 2 * g + 1)
    levels = body[ranges_end:levels_end]
    if piece.is_packed:
        levels = np.empty(words.size + 1, np.uint8)
        _unpack(body[ranges_end:levels_end], levels)
    group = channels if piece.is_key else piece.num_in_group
    for r in range(words.size // group):
        level, row = levels[r * group : (r + 1) * group], values[r * group : (r + 1) * group]
        if piece.is_key:
            for i in range(group):
                row[i] = np.float32(level[i]) * scales[i] + minima[i]
        else:
            minimum, scale = minima[r], scales[r]
            for i in range(group):
                row[i] = np.float32(level[i]) * scale + minimum
    if num_wide:
        ids = np.empty(num_wide, np.uint16)
        for n in range(num_wide):
            low, high = body[start + 2 * n], body[start + 2 * n + 1]
            ids[n] = np.uint16(low) | np.uint16(np.uint16(high) << np.uint16(8))
            if ids[n] == NO_CHANNEL:
                num_wide = 0
                break
            if ids[n] >= channels:
                return False
            source, index = (ranges, np.int64(ids[n])) if piece.is_key else (wide_ranges, n)
            minima[n], scales[n] = get_half(source, 2 * index), get_half(source, 2 * index + 1)  # type: ignore[arg-type]
        fine = np.empty(num_rows * piece.num_wide + 1, np.uint8)
        _unpack(body[levels_end:end], fine)
        for r in range(num_rows if num_wide else 0):
            level, row = levels[r * channels : (r + 1) * channels], values[r * channels :]
            lower = fine[r * num_wide :]
            for n in range(num_wide):
                level8 = np.uint8(np.uint8(level[ids[n]] << np.uint8(4)) | lower[n])
                row[ids[n]] = np.float32(level8) * scales[n] + minima[n]
    # All at once: row by row, short loops would cost more than their work.
    narrow(values, is_half, words)
    return True


@compiled
def body_bytes(pieces: tuple[Piece, Piece], num_layers: int) -> int:
    """Of so many layers, each a piece of keys and one of values."""
    if pieces[0].num_rows == 0:
        return 0
    return num_layers * (_ends_of(pieces[0], 0)[4] + _ends_of(pieces[1], 0)[4])


@compiled
def encode_ranged(
    words: Words, is_half: bool, pieces: tuple[Piece, Piece], first: int, body: Raw
) -> bool:
    """Round each layer's keys and values from token ``first`` on.

    Args:
        words: [layers, 2, tokens, channels], flat.
        is_half: 16-bit words are float16, else bfloat16.
        pieces: keys and values of a layer.
        first: tokens left out at the start.
        body: [layers], keys then values.

    Returns:
        False if a value is not finite or a range does not fit in halves.
    """
    channels = pieces[0].num_channels
    run = (first + pieces[0].num_rows) * channels
    start = 0
    if pieces[0].num_rows == 0:
        return True
    for number in range(words.size // run):
        piece = pieces[number % 2]
        own = words[number * run + first * channels : (number + 1) * run]
        if not _encode_piece(own, is_half, piece, body, start):
            return False
        start = _ends_of(piece, start)[4]
    return True


@compiled
def decode_ranged(
    body: Raw, is_half: bool, pieces: tuple[Piece, Piece], first: int, words: Words
) -> bool:
    """The way back; False if the body makes no sense."""
    channels = pieces[0].num_channels
    run = (first + pieces[0].num_rows) * channels
    start = 0
    if pieces[0].num_rows == 0:
        return True
    for number in range(words.size // run):
        piece = pieces[number % 2]
        own = words[number * run + first * channels : (number + 1) * run]
        if not _decode_piece(body, start, is_half, piece, own):
            return False
        start = _ends_of(piece, start)[4]
    return True
