"""Compiled loops of the codecs that round within ranges: find them, round, and back.

A piece is one layer's keys or values, [rows, channels]. Keys have a range per channel; values have
one per vector, a row's channels of a few heads. The channels with the widest ranges take eight bits
where the others take four: see ``kivi``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kv_store.codecs.float_bits import word_shift
from kv_store.codecs.halves import float_of_word, level_of, narrow, widen, word_of_float
from kv_store.codecs.range_kernels import (
    RANGE_BYTES,
    column_ranges,
    get_ranges,
    is_loud,
    put_ranges,
    row_ranges,
    widest,
)
from kv_store.compiling import compiled

if TYPE_CHECKING:
    from kv_store.codecs.halves import Raw, Words
    from kv_store.codecs.range_kernels import Ids

HALVES = "8f2c42e522dcfbca"
"""Digest of ``halves``, see there; and of ``range_kernels``."""
RANGES = "4f212c59a78638ec"
_SAMPLED_ROWS = 4
"""Wide channels of values are chosen by every so many rows; their ranges are those of all."""
NO_CHANNEL = np.uint16(0xFFFF)
"""In place of every wide channel, where a piece has none."""
_FINE_STEPS = np.float32(255)
_COARSE_STEPS = np.float32(15)


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
def _take_wide(words: Words, piece: Piece, ids: Ids, kept: Words) -> None:
    """Wide channels of values to [wide, rows]; in their places others of their vectors.

    So they widen no vector's range.
    """
    channels, group = piece.num_channels, piece.num_in_group
    others = np.empty(ids.size, np.uint16)
    for n in range(ids.size):
        other = start = np.int64(ids[n]) // group * group
        for wide in ids:
            # Ascending, so one look at each is enough.
            other += np.int64(wide) == other and other < start + group - 1
        others[n] = other
    for r in range(piece.num_rows):
        row, own = words[r * channels : (r + 1) * channels], kept[r:]
        for n in range(ids.size):
            own[n * piece.num_rows] = row[ids[n]]
            row[ids[n]] = row[others[n]]


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
def _encode_piece(words: Words, piece: Piece, body: Raw, start: int) -> bool:
    """Write a piece, words [rows, channels], to its place; False if a range is not finite."""
    channels, num_rows, num_wide = piece.num_channels, piece.num_rows, piece.num_wide
    ids_end, wide_end, ranges_end, levels_end, end = _ends_of(piece, start)
    ranges, wide_ranges = body[wide_end:ranges_end], body[ids_end:wide_end]
    shift = word_shift(words)
    # Arrays of their own, not rows of one: the compiler must see that they do not overlap.
    low, high, group = np.empty(channels, np.int32), np.empty(channels, np.int32), channels
    if piece.is_key or num_wide:
        column_ranges(words, channels, 1 if piece.is_key else _SAMPLED_ROWS, low, high)
    ids = np.empty(num_wide, np.uint16)
    if num_wide:
        widest(low, high, ids)
    wide_low, wide_high = np.empty(num_wide, np.int32), np.empty(num_wide, np.int32)
    kept, others = words[:0], words
    if piece.is_key:
        for n in range(num_wide):
            wide_low[n], wide_high[n] = low[ids[n]], high[ids[n]]
    else:
        if num_wide:
            kept, others = np.empty(num_rows * num_wide, words.dtype), words.copy()
            _take_wide(others, piece, ids, kept)
            row_ranges(kept, num_rows, wide_low, wide_high)
        group = piece.num_in_group
        low, high = np.empty(words.size // group, np.int32), np.empty(words.size // group, np.int32)
        row_ranges(others, group, low, high)
        if num_wide and is_loud(low, high):
            ids[:] = NO_CHANNEL
            num_wide = 0
            others = words
            row_ranges(others, group, low, high)
    minima, inverses = np.empty(low.size, np.float32), np.empty(low.size, np.float32)
    steps = _COARSE_STEPS if piece.is_packed else _FINE_STEPS
    if not put_ranges(low, high, steps, ranges, minima, inverses):
        return False
    wide_minima, wide_inverses = np.empty(num_wide, np.float32), np.empty(num_wide, np.float32)
    own_ranges = np.zeros(RANGE_BYTES * piece.num_wide, np.uint8)
    if num_wide and not put_ranges(
        wide_low, wide_high, _FINE_STEPS, own_ranges, wide_minima, wide_inverses
    ):
        return False
    levels = np.empty(words.size, np.uint8)
    if piece.is_key:
        for n in range(num_wide):
            column = np.int64(ids[n])
            minima[column], inverses[column] = wide_minima[n], wide_inverses[n]
            for i in range(RANGE_BYTES):
                ranges[RANGE_BYTES * column + i] = own_ranges[RANGE_BYTES * n + i]
        for r in range(num_rows):
            row, level = words[r * group : (r + 1) * group], levels[r * group : (r + 1) * group]
            for i in range(group):
                level[i] = level_of((float_of_word(row[i], shift) - minima[i]) * inverses[i])
    else:
        wide_ranges[:] = own_ranges
        for r in range(low.size):
            row, level = others[r * group : (r + 1) * group], levels[r * group : (r + 1) * group]
            minimum, inverse = minima[r], inverses[r]
            for i in range(group):
                level[i] = level_of((float_of_word(row[i], shift) - minimum) * inverse)
    fine = np.zeros(num_rows * piece.num_wide, np.uint8)
    wide_levels = np.empty(kept.size, np.uint8)
    for n in range(num_wide if kept.size else 0):
        row, level = kept[n * num_rows : (n + 1) * num_rows], wide_levels[n * num_rows :]
        minimum, inverse = wide_minima[n], wide_inverses[n]
        for r in range(num_rows):
            level[r] = level_of((float_of_word(row[r], shift) - minimum) * inverse)
    for r in range(num_rows if num_wide else 0):
        upper, lower = levels[r * channels : (r + 1) * channels], fine[r * num_wide :]
        for n in range(num_wide):
            level8 = wide_levels[n * num_rows + r] if kept.size else upper[ids[n]]
            lower[n] = level8 & np.uint8(15)
            upper[ids[n]] = level8 >> np.uint8(4)
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
def _decode_piece(body: Raw, start: int, piece: Piece, words: Words) -> bool:
    """The way back; False if the piece names a channel that does not exist."""
    channels, num_rows, num_wide = piece.num_channels, piece.num_rows, piece.num_wide
    ids_end, wide_end, ranges_end, levels_end, end = _ends_of(piece, start)
    ranges, wide_ranges = body[wide_end:ranges_end], body[ids_end:wide_end]
    num_groups, shift = ranges.size // RANGE_BYTES, word_shift(words)
    minima, scales = np.empty(num_groups, np.float32), np.empty(num_groups, np.float32)
    get_ranges(ranges, minima, scales)
    levels = body[ranges_end:levels_end]
    if piece.is_packed:
        levels = np.empty(words.size + 1, np.uint8)
        _unpack(body[ranges_end:levels_end], levels)
    group = channels if piece.is_key else piece.num_in_group
    for r in range(words.size // group):
        level, row = levels[r * group : (r + 1) * group], words[r * group : (r + 1) * group]
        if piece.is_key:
            for i in range(group):
                row[i] = word_of_float(np.float32(level[i]) * scales[i] + minima[i], shift)
        else:
            minimum, scale = minima[r], scales[r]
            for i in range(group):
                row[i] = word_of_float(np.float32(level[i]) * scale + minimum, shift)
    if num_wide == 0:
        return True
    ids = np.empty(num_wide, np.uint16)
    for n in range(num_wide):
        low, high = body[start + 2 * n], body[start + 2 * n + 1]
        ids[n] = np.uint16(low) | np.uint16(np.uint16(high) << np.uint16(8))
        if ids[n] == NO_CHANNEL:
            return True
        if ids[n] >= channels:
            return False
    wide_minima, wide_scales = np.empty(num_wide, np.float32), np.empty(num_wide, np.float32)
    if piece.is_key:
        for n in range(num_wide):
            wide_minima[n], wide_scales[n] = minima[ids[n]], scales[ids[n]]
    else:
        get_ranges(wide_ranges, wide_minima, wide_scales)
    fine = np.empty(num_rows * num_wide + 1, np.uint8)
    _unpack(body[levels_end:end], fine)
    for r in range(num_rows):
        row, upper = words[r * channels : (r + 1) * channels], levels[r * channels :]
        lower = fine[r * num_wide :]
        for n in range(num_wide):
            level8 = np.uint8(np.uint8(upper[ids[n]] << np.uint8(4)) | lower[n])
            row[ids[n]] = word_of_float(np.float32(level8) * wide_scales[n] + wide_minima[n], shift)
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
    wider = np.empty(run - first * channels if is_half else 0, np.float32)  # float16 as float32
    for number in range(words.size // run):
        piece = pieces[number % 2]
        own = words[number * run + first * channels : (number + 1) * run]
        if is_half:
            widen(own, True, wider)
            fits = _encode_piece(wider.view(np.uint32), piece, body, start)
        else:
            fits = _encode_piece(own, piece, body, start)
        if not fits:
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
    wider = np.empty(run - first * channels if is_half else 0, np.float32)  # float16 as float32
    for number in range(words.size // run):
        piece = pieces[number % 2]
        own = words[number * run + first * channels : (number + 1) * run]
        if is_half:
            makes_sense = _decode_piece(body, start, piece, wider.view(np.uint32))
            narrow(wider, True, own)
        else:
            makes_sense = _decode_piece(body, start, piece, own)
        if not makes_sense:
            return False
        start = _ends_of(piece, start)[4]
    return True
