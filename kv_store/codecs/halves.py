"""Compiled conversions that the quantising codecs share.

All arithmetic is IEEE float32 without contraction, so the bytes are the same on every machine.
float16 numbers of a section are read and written bytewise, so its alignment does not matter.
A cached kernel is renewed by a change of its own file alone, so each file that calls these holds
the digest of this one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kv_store.codecs.float_bits import float_of_bits, to_bits
from kv_store.compiling import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Raw = NDArray[np.uint8]
    Words = NDArray[np.uint16] | NDArray[np.uint32]
    Floats = NDArray[np.float32]
    Keys = NDArray[np.int32]

INF_KEY = np.int32(0x7F800000)
"""``order_key`` of infinity."""
INF_HALF = np.uint32(0x7C00)
"""The half that is infinity."""
_ROUND = np.float32(12582912)  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits
_ROUND_BITS = np.uint32(0x4B400000)
_TINIEST_HALF = np.float32(2**-24)
_HALVES_OF_ONE = np.float32(2**24)
_MAX_HALF = np.float32(65504)


@compiled
def half_to_float(half: np.uint32) -> np.float32:
    """The value of a half's bits."""
    magnitude = np.uint32(half & np.uint32(0x7FFF))
    normal = np.uint32(np.uint32(magnitude << np.uint32(13)) + np.uint32(0x38000000))
    if magnitude >= INF_HALF:
        normal = np.uint32(normal + np.uint32(0x38000000))
    tiny = to_bits(np.float32(np.int32(magnitude)) * _TINIEST_HALF)
    bits = normal if magnitude >= np.uint32(0x0400) else tiny
    return float_of_bits(np.uint32(bits | np.uint32((half & np.uint32(0x8000)) << np.uint32(16))))


@compiled
def float_to_half(value: np.float32) -> np.uint16:
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
def half_towards_zero(value: np.float32) -> np.uint32:
    """The half of a finite value's magnitude, cut off; 0x7C00 (infinity) if it has none."""
    magnitude = np.uint32(to_bits(value) & np.uint32(0x7FFFFFFF))
    # Without a branch, or the loops over ranges would not be vectorised.
    normal = np.uint32(np.uint32(magnitude - np.uint32(0x38000000)) >> np.uint32(13))
    small = float_of_bits(min(magnitude, np.uint32(0x38800000)))
    tiny = np.uint32(np.int32(small * _HALVES_OF_ONE))
    half = normal if magnitude >= np.uint32(0x38800000) else tiny
    return INF_HALF if magnitude >= np.uint32(0x47800000) else half


@compiled
def half_floor(value: np.float32) -> np.uint32:
    """The largest half that is not above the value."""
    half = half_towards_zero(value)
    below = np.uint32(np.uint32(half + np.uint32(-half_to_float(half) > value)) | np.uint32(0x8000))
    return below if value < 0 else half


@compiled
def scale_half(extent: np.float32, num_steps: np.float32) -> np.uint32:
    """The least half of which ``num_steps`` reach as far as ``extent`` (not negative)."""
    half = half_towards_zero(extent / num_steps)
    return np.uint32(half + np.uint32(half_to_float(half) * num_steps < extent))


@compiled
def order_key(value: np.float32) -> np.int32:
    """An integer that orders as the floats do; integer loops vectorise where float ones do not."""
    bits = np.int32(to_bits(value))
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@compiled
def float_of_key(key: np.int32) -> np.float32:
    """The float of an ``order_key``."""
    bits = np.int32(key ^ np.int32(np.int32(key >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    return float_of_bits(np.uint32(bits))


@compiled
def level_of(scaled: np.float32) -> np.uint8:
    """To nearest even; the low byte of the two's complement."""
    return np.uint8(np.uint32(to_bits(scaled + _ROUND) - _ROUND_BITS))


@compiled
def put_half(target: Raw, index: int, half: np.uint32) -> None:
    """Write one of an array of halves."""
    target[2 * index] = np.uint8(half)
    target[2 * index + 1] = np.uint8(half >> np.uint32(8))


@compiled
def half_bits(source: Raw, index: int) -> np.uint16:
    """Read one of an array of halves, as it is."""
    high = np.uint16(np.uint16(source[2 * index + 1]) << np.uint16(8))
    return np.uint16(np.uint16(source[2 * index]) | high)


@compiled
def get_half(source: Raw, index: int) -> np.float32:
    """Read one of an array of halves."""
    return half_to_float(np.uint32(half_bits(source, index)))


@compiled
def float_of_word(word: np.uint32, shift: np.uint32) -> np.float32:
    """A bfloat16's value (``shift`` 16), or a float32's (0), of its bits."""
    return float_of_bits(np.uint32(np.uint32(word) << shift))


@compiled
def word_of_float(value: np.float32, shift: np.uint32) -> np.uint32:
    """The way back, to nearest even."""
    bits = to_bits(value)
    odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    half = np.uint32(np.uint32(0x7FFF) + odd) if shift == np.uint32(16) else np.uint32(0)
    return np.uint32(np.uint32(bits + half) >> shift)


@compiled
def widen(source: Words, is_half: bool, target: Floats) -> None:
    """float32 words, float16 or bfloat16 to float32."""
    if source.itemsize == 4:
        for i in range(target.size):
            target[i] = float_of_bits(np.uint32(source[i]))
    elif is_half:
        for i in range(target.size):
            target[i] = half_to_float(np.uint32(source[i]))
    else:
        for i in range(target.size):
            target[i] = float_of_word(source[i], np.uint32(16))


@compiled
def floats_of(words: Words, scratch: Floats) -> Floats:
    """Where to make the values of words: in place if these are float32."""
    return words.view(np.float32) if words.itemsize == 4 else scratch[: words.size]


@compiled
def narrow(source: Floats, is_half: bool, target: Words) -> None:
    """Finite float32 to the page's words, to nearest even."""
    if target.itemsize == 2 and is_half:
        for i in range(source.size):
            target[i] = float_to_half(source[i])
    elif target.itemsize == 2:  # else they were made in place
        for i in range(source.size):
            target[i] = word_of_float(source[i], np.uint32(16))
