"""4-bit and mixed codecs along KIVI's axes: keys per channel, values per token.

Source: Liu et al., KIVI, arXiv 2402.02750.

Keys have a few channels that are large in every token, so each channel gets its own range over the
page's tokens; values have none, so each vector (token, head) gets its own. The first tokens of a
sequence draw most of the attention and have unusual ranges: they are kept raw and out of the
others' ranges, which halves the loss for a fraction of a percent of the bytes.

    section = raw first tokens [layers, 2, sinks, heads, head_dim]   of a sequence's first page only
              || per layer: K ranges || K levels || V ranges || V levels
              || variant (1 byte)
    ranges  = per group, float16 LE minimum and scale
    levels  = a byte each, or packed: byte i holds value i below value i + half (rounded up)

A minimum is rounded down and a scale up, so the error is at most half a scale plus the rounding of
the page's own dtype. A section with a value or range that is not finite is kept raw.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from kv_store.codecs.base import Codec, LayerGroup, page_words
from kv_store.errors import PageCorruptError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_QUANTISED, _KEPT_RAW = 0, 1
_SINK_TOKENS = 4
_GROUP_BYTES = 4


class _KiviCodec(Codec):
    is_lossless: ClassVar[bool] = False
    packs_keys: ClassVar[bool]
    """Whether keys take four bits, not eight; values always do."""

    def encode(self, raw: NDArray[np.uint8], group: LayerGroup) -> memoryview:
        """Quantise each layer's keys and values within their groups' ranges."""
        from kv_store.codecs.kernels import encode_ranged

        num_sinks = _num_sinks(group)
        sinks = _by_token(raw, group)[:, :num_sinks]
        stored = np.empty(sinks.size + self._body_bytes(group) + 1, dtype=np.uint8)
        stored[: sinks.size].reshape(sinks.shape)[:] = sinks
        is_finite = encode_ranged(
            page_words(raw, group.layout),
            group.layout.dtype == "float16",
            _dims(group),
            num_sinks,
            self.packs_keys,
            stored[sinks.size : -1],
        )
        if not is_finite:
            return memoryview(b"".join((raw.data, bytes((_KEPT_RAW,)))))
        stored[-1] = _QUANTISED
        return stored.data

    def decode(self, stored: memoryview, group: LayerGroup, out: NDArray[np.uint8]) -> None:
        """Scale back and round to the page's dtype."""
        from kv_store.codecs.kernels import decode_ranged

        packed = np.frombuffer(stored.toreadonly(), dtype=np.uint8)
        variant = packed[-1] if len(packed) else None
        if variant == _KEPT_RAW and len(packed) == group.nbytes + 1:
            out[:] = packed[:-1]
            return
        num_sinks = _num_sinks(group)
        sinks = _by_token(out, group)[:, :num_sinks]
        if variant != _QUANTISED or len(packed) != sinks.size + self._body_bytes(group) + 1:
            raise PageCorruptError(
                f"not a {self.name} section: {len(packed)} bytes, variant {variant}"
            )
        sinks[:] = packed[: sinks.size].reshape(sinks.shape)
        decode_ranged(
            packed[sinks.size : -1],
            group.layout.dtype == "float16",
            _dims(group),
            num_sinks,
            self.packs_keys,
            page_words(out, group.layout),
        )

    def _body_bytes(self, group: LayerGroup) -> int:
        """Ranges and levels of all layers."""
        num_tokens, num_heads, head_dim = _dims(group)
        num_rows = num_tokens - _num_sinks(group)
        if num_rows == 0:
            return 0
        num_values = num_rows * num_heads * head_dim
        num_packed = -(-num_values // 2)
        num_groups = num_heads * (head_dim + num_rows)
        levels = num_packed + (num_packed if self.packs_keys else num_values)
        return group.num_layers * (_GROUP_BYTES * num_groups + levels)


class Int4Codec(_KiviCodec):
    """Four bits a value: 3.56 times smaller for 16-bit pages of head size 64, 3.31 for a first one.

    A float32 page costs the same bytes as a 16-bit one.
    """

    name: ClassVar[str] = "int4"
    codec_id: ClassVar[int] = 5
    packs_keys: ClassVar[bool] = True


class K8V4Codec(_KiviCodec):
    """Keys in eight bits, values in four: nearly without loss, as the loss comes from the keys.

    2.46 times smaller for 16-bit pages of head size 64; a float32 page costs the same bytes.
    """

    name: ClassVar[str] = "k8v4"
    codec_id: ClassVar[int] = 4
    packs_keys: ClassVar[bool] = False


def _dims(group: LayerGroup) -> tuple[int, int, int]:
    return group.layout.page_tokens, group.layout.num_kv_heads, group.layout.head_dim


def _num_sinks(group: LayerGroup) -> int:
    return min(_SINK_TOKENS, group.layout.page_tokens) if group.token_start == 0 else 0


def _by_token(data: NDArray[np.uint8], group: LayerGroup) -> NDArray[np.uint8]:
    """[layers x 2, tokens, bytes of a token]; shares memory."""
    return data.reshape(2 * group.num_layers, group.layout.page_tokens, -1)
