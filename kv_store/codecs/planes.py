"""Compiled loops of the lossless codec: exponents apart from sign and mantissa, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kv_store.codecs.compiled import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Raw = NDArray[np.uint8]
    Words = NDArray[np.uint16] | NDArray[np.uint32]


@compiled
def split_exponents(words: Words, run: int, exponents: Raw, rest: Raw) -> None:
    """Runs (K, V, K, V ...) to exponents of all K runs, then all V runs; the rest alike."""
    num_runs = words.size // run
    size = words.size
    for number in range(num_runs):
        place = (number // 2 + (number % 2) * (num_runs // 2)) * run
        source = words[number * run : (number + 1) * run]
        high = exponents[place : place + run]
        low = rest[place : place + run]
        if words.itemsize == 2:
            for i in range(run):
                word = np.uint32(source[i])
                high[i] = np.uint8(word >> np.uint32(7))
                sign = np.uint32(np.uint32(word >> np.uint32(8)) & np.uint32(0x80))
                low[i] = np.uint8(sign | np.uint32(word & np.uint32(0x7F)))
        else:
            middle = rest[size + place : size + place + run]
            upper = rest[2 * size + place : 2 * size + place + run]
            for i in range(run):
                word = np.uint32(source[i])
                high[i] = np.uint8(word >> np.uint32(23))
                low[i] = np.uint8(word)
                middle[i] = np.uint8(word >> np.uint32(8))
                sign = np.uint32(np.uint32(word >> np.uint32(24)) & np.uint32(0x80))
                mantissa = np.uint32(np.uint32(word >> np.uint32(16)) & np.uint32(0x7F))
                upper[i] = np.uint8(sign | mantissa)


@compiled
def join_exponents(exponents: Raw, rest: Raw, run: int, words: Words) -> None:
    """The way back."""
    num_runs = words.size // run
    size = words.size
    for number in range(num_runs):
        place = (number // 2 + (number % 2) * (num_runs // 2)) * run
        target = words[number * run : (number + 1) * run]
        high = exponents[place : place + run]
        low = rest[place : place + run]
        if words.itemsize == 2:
            for i in range(run):
                exponent = np.uint16(np.uint16(high[i]) << np.uint16(7))
                sign = np.uint16(np.uint16(low[i] & np.uint8(0x80)) << np.uint16(8))
                target[i] = np.uint16(exponent | sign | np.uint16(low[i] & np.uint8(0x7F)))
        else:
            middle = rest[size + place : size + place + run]
            upper = rest[2 * size + place : 2 * size + place + run]
            for i in range(run):
                wide_exponent = np.uint32(np.uint32(high[i]) << np.uint32(23))
                wide_sign = np.uint32(np.uint32(upper[i] & np.uint8(0x80)) << np.uint32(24))
                mantissa = np.uint32(
                    np.uint32(np.uint32(upper[i] & np.uint8(0x7F)) << np.uint32(16))
                    | np.uint32(np.uint32(middle[i]) << np.uint32(8))
                    | np.uint32(low[i])
                )
                target[i] = np.uint32(wide_exponent | wide_sign | mantissa)
