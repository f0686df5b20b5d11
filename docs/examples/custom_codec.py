"""A codec of your own, plugged into the KV tier by its import path.

Floats of one kind differ little in their upper bytes. This codec puts all first bytes together,
then all second bytes, and so on, and deflates each of these planes: lossless, so its pages keep the
``exact`` fidelity and mix with raw ones in one namespace.

Run it from the repository's root:

    PYTHONPATH=. python docs/examples/custom_codec.py

To use it in a cluster, put the module where every replica can import it, and configure
``codec: custom_codec:BytePlaneCodec``.
"""

from __future__ import annotations

import secrets
import sys
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from kv_store import (
    KVStoreConfig,
    Namespace,
    PageCorruptError,
    PageLayout,
    SsdTierConfig,
    build_page_store,
)
from kv_store.codecs.base import Codec, LayerGroup

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FAST = 1


class BytePlaneCodec(Codec):
    """Byte planes, each deflated."""

    name: ClassVar[str] = "byte-plane"
    codec_id: ClassVar[int] = 1024
    is_lossless: ClassVar[bool] = True

    def encode(self, raw: NDArray[np.uint8], group: LayerGroup) -> bytes:
        """Transpose [values, bytes of a value] and deflate."""
        planes = raw.reshape(-1, _value_bytes(group.layout)).T
        return zlib.compress(planes.tobytes(), _FAST)

    def decode(self, stored: memoryview, group: LayerGroup, out: NDArray[np.uint8]) -> None:
        """Inflate, never beyond the expected size, and transpose back."""
        inflater = zlib.decompressobj()
        try:
            flat = inflater.decompress(stored, group.nbytes)
        except zlib.error as exc:
            raise PageCorruptError(f"not a deflated section: {exc}") from exc
        if len(flat) != group.nbytes or inflater.unconsumed_tail:
            raise PageCorruptError("a section inflates to another size")
        planes = np.frombuffer(flat, dtype=np.uint8).reshape(_value_bytes(group.layout), -1)
        out.reshape(-1, len(planes))[:] = planes.T


def _value_bytes(layout: PageLayout) -> int:
    return 4 if layout.dtype == "float32" else 2


def main() -> int:
    """Save a page with this codec in one store and load it with another."""
    layout = PageLayout(
        num_layers=10,
        num_kv_heads=3,
        head_dim=64,
        dtype="float16",
        model_digest="demo",
        rope="none",
    )
    values = np.random.default_rng(0).normal(size=layout.nbytes // 2).astype(np.float16)
    page = values.view(np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        config = KVStoreConfig(
            codec=f"{Path(__file__).stem}:BytePlaneCodec",
            tiers=(SsdTierConfig(root=Path(folder)),),
        )
        writer = build_page_store(config, layout)
        namespace = Namespace(secrets.token_bytes(32), layout, writer.fidelity)
        [key] = namespace.chain(range(layout.page_tokens))
        writer.save(key, page.copy())
        writer.close()

        reader = build_page_store(config, layout)
        loaded = reader.load([key], timeout_s=5.0).result().pages
        num_stored = reader.stats().tiers["ssd"].num_bytes
        reader.close()
    is_same = len(loaded) == 1 and np.array_equal(loaded[0], page)
    print(f"{layout.nbytes} bytes stored in {num_stored}; read back bit for bit: {is_same}")
    return 0 if is_same else 1


if __name__ == "__main__":
    sys.exit(main())
