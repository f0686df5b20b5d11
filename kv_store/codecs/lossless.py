"""Every bit kept: exponents compressed apart from signs and mantissas, which stay as they are.

Exponents of neighbouring values are much alike and mantissas are noise; mixed in one stream, as an
ordinary compressor sees them, neither shrinks much. Keys differ most between channels, so their
exponents are written as how far they are below the channel's greatest one.

    section = rest || u32 LE bytes of the keys' frame || keys' frame || values' frame
    keys' frame   = zstd of [layers, channels] greatest exponents || [layers, tokens, channels] rest
    values' frame = zstd of [layers, tokens, channels] exponents
    16-bit  : exponent byte = bits 7 to 14, rest = sign above bits 0 to 6, a byte per value
    float32 : exponent byte = bits 23 to 30, rest = sign above bits 0 to 22, three planes of bytes,
              the lowest first

Within float16 the exponent byte also holds the mantissa's upper three bits.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from kv_store.codecs.base import Codec, LayerGroup, page_words
from kv_store.errors import PageCorruptError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FAST = 1
_LENGTH = struct.Struct("<I")


class LosslessCodec(Codec):
    """1.45 times smaller for bfloat16 keys and values; float32 has more mantissa and gains less."""

    name: ClassVar[str] = "lossless"
    codec_id: ClassVar[int] = 3
    is_lossless: ClassVar[bool] = True

    def encode(self, raw: NDArray[np.uint8], group: LayerGroup) -> bytes:
        """Split off the exponents and compress them."""
        import zstandard

        from kv_store.codecs.planes import split_exponents

        words = page_words(raw, group.layout)
        run, num_keys = _sizes(group)
        keys = np.empty(num_keys, dtype=np.uint8)
        values = np.empty(words.size // 2, dtype=np.uint8)
        rest = np.empty(group.nbytes - words.size, dtype=np.uint8)
        split_exponents(words, run, keys, values, rest)
        compressor = zstandard.ZstdCompressor(_FAST)
        frame = compressor.compress(keys.data)
        length = _LENGTH.pack(len(frame))
        return b"".join((rest.data, length, frame, compressor.compress(values.data)))

    def decode(self, stored: memoryview, group: LayerGroup, out: NDArray[np.uint8]) -> None:
        """Decompress, never beyond the expected size, and join."""
        from kv_store.codecs.planes import join_exponents

        words = page_words(out, group.layout)
        run, num_keys = _sizes(group)
        num_rest = group.nbytes - words.size
        start = num_rest + _LENGTH.size
        if len(stored) < start:
            raise PageCorruptError(f"{len(stored)} bytes are no lossless section")
        middle = start + _LENGTH.unpack_from(stored, num_rest)[0]
        keys = _decompress(stored[start:middle], num_keys)
        values = _decompress(stored[middle:], words.size // 2)
        rest = np.frombuffer(stored[:num_rest].toreadonly(), dtype=np.uint8)
        join_exponents(keys, values, rest, run, words)


def _sizes(group: LayerGroup) -> tuple[int, int]:
    """Values of one layer's keys, and exponent bytes of all keys."""
    layout = group.layout
    channels = layout.num_kv_heads * layout.head_dim
    run = layout.page_tokens * channels
    return run, group.num_layers * (run + channels)


def _decompress(frame: memoryview, num_bytes: int) -> NDArray[np.uint8]:
    import zstandard

    try:
        # The decompressor trusts this number of the frame over any limit it is given.
        if zstandard.frame_content_size(frame) != num_bytes:
            raise PageCorruptError("a lossless section has another number of exponents")
        data = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as exc:
        raise PageCorruptError(f"not a lossless section: {exc}") from exc
    return np.frombuffer(data, dtype=np.uint8)
