"""Compiled loops of the lossless codec: exponents apart from sign and mantissa, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kv_store.compiling import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Raw = NDArray[np.uint8]
    Words = NDArray[np.uint16] | NDArray[np.uint32]


@compiled
def _split(words: Words, exponents: Raw, rest: Raw, start: int, plane: int) -> None:
    """One run of values; ``start`` is its place in each plane of the rest."""
    low = rest[start : start + words.size]
    if words.itemsize == 2:
        for i in range(words.size):
            word = np.uint32(words[i])
            exponents[i] = np.uint8(word >> np.uint32(7))
            sign = np.uint32(np.uint32(word >> np.uint32(8)) & np.uint32(0x80))
            low[i] = np.uint8(sign | np.uint32(word & np.uint32(0x7F)))
    else:
        middle = rest[plane + start : plane + start + words.size]
        upper = rest[2 * plane + start : 2 * plane + start + words.size]
        for i in range(words.size):
            word = np.uint32(words[i])
            exponents[i] = np.uint8(word >> np.uint32(23))
            low[i] = np.uint8(word)
            middle[i] = np.uint8(word >> np.uint32(8))
            sign = np.uint32(np.uint32(word >> np.uint32(24)) & np.uint32(0x80))
            mantissa = np.uint32(np.uint32(word >> np.uint32(16)) & np.uint32(0x7F))
            upper[i] = np.uint8(sign | mantissa)


@compiled
def _join(exponents: Raw, rest: Raw, start: int, plane: int, words: Words) -> None:
    """The way back."""
    low = rest[start : start + words.size]
    if words.itemsize == 2:
        for i in range(words.size):
            exponent = np.uint16(np.uint16(exponents[i]) << np.uint16(7))
            sign = np.uint16(np.uint16(low[i] & np.uint8(0x80)) << np.uint16(8))
            words[i] = np.uint16(exponent | sign | np.uint16(low[i] & np.uint8(0x7F)))
    else:
        middle = rest[plane + start : plane + start + words.size]
        upper = rest[2 * plane + start : 2 * plane + start + words.size]
        for i in range(words.size):
            wide_exponent = np.uint32(np.uint32(exponents[i]) << np.uint32(23))
            wide_sign = np.uint32(np.uint32(upper[i] & np.uint8(0x80)) << np.uint32(24))
            mantissa = np.uint32(
                np.uint32(np.uint32(upper[i] & np.uint8(0x7F)) << np.uint32(16))
                | np.uint32(np.uint32(middle[i]) << np.uint32(8))
                | np.uint32(low[i])
            )
            words[i] = np.uint32(wide_exponent | wide_sign | mantissa)


@compiled
def split_exponents(words: Words, run: int, keys: Raw, values: Raw, rest: Raw) -> None:
    """Take a section apart.

    Args:
        words: [layers, 2, tokens, channels], flat.
        run: tokens x channels.
        keys: [layers, channels] greatest exponents over the tokens, then [layers, tokens, channels]
            how far each exponent is below that.
        values: [layers, tokens, channels] exponents.
        rest: sign and mantissa of all words in order, as one or three planes.
    """
    num_layers = words.size // (2 * run)
    channels = keys.size // num_layers - run
    for layer in range(num_layers):
        start = 2 * layer * run
        place = num_layers * channels + layer * run
        below = keys[place : place + run]
        _split(words[start : start + run], below, rest, start, words.size)
        top = keys[layer * channels : (layer + 1) * channels]
        top[:] = 0
        for token in range(0, run, channels):
            for c in range(channels):
                top[c] = max(top[c], below[token + c])
        for token in range(0, run, channels):
            for c in range(channels):
                below[token + c] = np.uint8(top[c] - below[token + c])
        start += run
        exponents = values[layer * run : (layer + 1) * run]
        _split(words[start : start + run], exponents, rest, start, words.size)


@compiled
def join_exponents(keys: Raw, values: Raw, rest: Raw, run: int, words: Words) -> None:
    """The way back."""
    num_layers = words.size // (2 * run)
    channels = keys.size // num_layers - run
    exponents = np.empty(run, np.uint8)
    for layer in range(num_layers):
        start = 2 * layer * run
        place = num_layers * channels + layer * run
        below = keys[place : place + run]
        top = keys[layer * channels : (layer + 1) * channels]
        for token in range(0, run, channels):
            for c in range(channels):
                exponents[token + c] = np.uint8(top[c] - below[token + c])
        _join(exponents, rest, start, words.size, words[start : start + run])
        start += run
        _join(
            values[layer * run : (layer + 1) * run],
            rest,
            start,
            words.size,
            words[start : start + run],
        )
