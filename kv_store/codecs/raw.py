"""No packing: the page as the engine wrote it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from kv_store.codecs.base import Codec, LayerGroup
from kv_store.errors import PageCorruptError

if TYPE_CHECKING:
    from numpy.typing import NDArray


class RawCodec(Codec):
    """Bytes as they are; ratio 1."""

    name: ClassVar[str] = "raw"
    codec_id: ClassVar[int] = 1
    is_lossless: ClassVar[bool] = True

    def encode(self, raw: NDArray[np.uint8], group: LayerGroup) -> memoryview:
        """The very bytes, without a copy."""
        del group
        return raw.data

    def decode(self, stored: memoryview, group: LayerGroup, out: NDArray[np.uint8]) -> None:
        """One copy."""
        if len(stored) != group.nbytes:
            raise PageCorruptError(f"a raw section has {group.nbytes} bytes, got {len(stored)}")
        out[:] = np.frombuffer(stored, dtype=np.uint8)
