"""4-bit and mixed codecs along KIVI's axes: keys per channel, values per token.

Source: Liu et al., KIVI, arXiv 2402.02750.

Keys have a few channels that are large in every token, so each channel gets its own range over the
page's tokens; values get one per vector, the channels of a few heads of one token. Attention feels
errors of the widest channels most, and those widen the ranges of value vectors, so the widest
channels of a layer take eight bits within ranges of their own: four where the others have theirs,
four behind. Longer vectors pay for that: on the default model int4 loses about half as much at
nearly the same size. The first tokens of a sequence draw most of the attention and have unusual
ranges: they are kept raw and out of the others' ranges, which halves the loss for a fraction of a
percent of the bytes.

    section = raw first tokens [layers, 2, sinks, heads, head_dim]   of a sequence's first page only
              || per layer: keys || values
              || variant (1 byte)
    keys    = wide channels || ranges || levels || lower halves of wide levels
    values  = wide channels || their ranges || ranges || levels || lower halves of wide levels
    wide channels = u16 LE each, ascending; 0xFFFF: none here
    ranges  = per group, float16 LE minimum and scale
    levels  = a byte each, or packed: byte i holds value i below value i + half (rounded up)

A minimum is rounded down and a scale up, so the error is at most half a scale plus the rounding of
the page's own dtype. Where a few vectors of values are far wider than many others, no channel of
them is wide: its range would be that of those few. A section with a value or range that is not
finite is kept raw.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from kv_store.codecs.base import Codec, LayerGroup, page_words
from kv_store.errors import PageCorruptError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kv_store.codecs.ranged_kernels import Piece
    from kv_store.layout import PageLayout

_QUANTISED, _KEPT_RAW = 0, 1
_SINK_TOKENS = 4
_MOST_IN_VECTOR = 256
_KEYS_PER_WIDE, _VALUES_PER_WIDE = 14, 48
"""Channels of a layer for each one that is wide."""
_MOST_CHANNELS = (1 << 15) - 1
"""Of a layer with wide ones: the kernels count them in 16 bits."""


class _KiviCodec(Codec):
    is_lossless: ClassVar[bool] = False
    packs_keys: ClassVar[bool]
    """Whether keys take four bits, not eight; values always do, and vectors are then longer."""

    def encode(self, raw: NDArray[np.uint8], group: LayerGroup) -> memoryview:
        """Quantise each layer's keys and values within their groups' ranges."""
        from kv_store.codecs.ranged_kernels import encode_ranged

        num_sinks, pieces, body_bytes = _form(group, self.packs_keys)
        sinks = _by_token(raw, group)[:, :num_sinks]
        stored = np.empty(sinks.size + body_bytes + 1, dtype=np.uint8)
        stored[: sinks.size].reshape(sinks.shape)[:] = sinks
        is_finite = encode_ranged(
            page_words(raw, group.layout),
            group.layout.dtype == "float16",
            pieces,
            num_sinks,
            stored[sinks.size : -1],
        )
        if not is_finite:
            return memoryview(b"".join((raw.data, bytes((_KEPT_RAW,)))))
        stored[-1] = _QUANTISED
        return stored.data

    def decode(self, stored: memoryview, group: LayerGroup, out: NDArray[np.uint8]) -> None:
        """Scale back and round to the page's dtype."""
        from kv_store.codecs.ranged_kernels import decode_ranged

        packed = np.frombuffer(stored.toreadonly(), dtype=np.uint8)
        variant = packed[-1] if len(packed) else None
        if variant == _KEPT_RAW and len(packed) == group.nbytes + 1:
            out[:] = packed[:-1]
            return
        num_sinks, pieces, body_bytes = _form(group, self.packs_keys)
        sinks = _by_token(out, group)[:, :num_sinks]
        if variant != _QUANTISED or len(packed) != sinks.size + body_bytes + 1:
            raise PageCorruptError(
                f"not a {self.name} section: {len(packed)} bytes, variant {variant}"
            )
        sinks[:] = packed[: sinks.size].reshape(sinks.shape)
        makes_sense = decode_ranged(
            packed[sinks.size : -1],
            group.layout.dtype == "float16",
            pieces,
            num_sinks,
            page_words(out, group.layout),
        )
        if not makes_sense:
            raise PageCorruptError(f"a {self.name} section names a channel that does not exist")


class Int4Codec(_KiviCodec):
    """Four bits a value: 16-bit pages of three heads of 64 shrink 3.53 times, a first one 3.04.

    A float32 page costs the same bytes as a 16-bit one.
    """

    name: ClassVar[str] = "int4"
    codec_id: ClassVar[int] = 7
    packs_keys: ClassVar[bool] = True


class K8V4Codec(_KiviCodec):
    """Keys in eight bits, values in four: nearly without loss, as the loss comes from the keys.

    2.44 times smaller for 16-bit pages of three heads of 64; a float32 page costs the same bytes.
    """

    name: ClassVar[str] = "k8v4"
    codec_id: ClassVar[int] = 6
    packs_keys: ClassVar[bool] = False


def _form(group: LayerGroup, packs_keys: bool) -> tuple[int, tuple[Piece, Piece], int]:
    """Tokens kept raw, how a layer's keys and values are stored, and bytes of all layers' body."""
    is_first = group.token_start == 0
    num_sinks = min(_SINK_TOKENS, group.layout.page_tokens) if is_first else 0
    pieces, layer_bytes = _layer_form(group.layout, num_sinks, packs_keys)
    return num_sinks, pieces, group.num_layers * layer_bytes


@lru_cache(maxsize=64)
def _layer_form(
    layout: PageLayout, num_sinks: int, packs_keys: bool
) -> tuple[tuple[Piece, Piece], int]:
    from kv_store.codecs.ranged_kernels import Piece, body_bytes

    num_rows = layout.page_tokens - num_sinks
    channels = layout.num_kv_heads * layout.head_dim
    is_named = channels <= _MOST_CHANNELS
    num_wide_keys = channels // _KEYS_PER_WIDE if is_named and packs_keys else 0
    num_wide_values = channels // _VALUES_PER_WIDE if is_named else 0
    num_heads = _heads_in_vector(layout) if packs_keys else 1
    in_vector = num_heads * layout.head_dim
    pieces = (
        Piece(True, packs_keys, num_wide_keys, num_rows, channels, channels),
        Piece(False, True, num_wide_values, num_rows, channels, in_vector),
    )
    return pieces, int(body_bytes(pieces, 1))


def _heads_in_vector(layout: PageLayout) -> int:
    """As many as fit, and divide the heads evenly."""
    heads = range(1, layout.num_kv_heads + 1)
    fitting = (n for n in heads if n * layout.head_dim <= _MOST_IN_VECTOR)
    return max((n for n in fitting if layout.num_kv_heads % n == 0), default=1)


def _by_token(data: NDArray[np.uint8], group: LayerGroup) -> NDArray[np.uint8]:
    """[layers x 2, tokens, bytes of a token]; shares memory."""
    return data.reshape(2 * group.num_layers, group.layout.page_tokens, -1)
