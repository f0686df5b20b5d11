"""Small layouts, pages and keys for tests of the KV tier."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from kv_store import EXACT, Namespace, PageKey, PageLayout
from kv_store.codecs.base import LayerGroup

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from kv_store.codecs.base import Codec

TENANT_KEY = bytes(range(32))


def make_layout(**changes: Any) -> PageLayout:
    """768 raw bytes in float32: 3 layers, 4 tokens, 2 heads of 4."""
    fields: dict[str, Any] = {
        "num_layers": 3,
        "num_kv_heads": 2,
        "head_dim": 4,
        "dtype": "float32",
        "model_digest": "c0ffee",
        "rope": "theta=10000",
        "page_tokens": 4,
    }
    return PageLayout(**(fields | changes))


def make_page(layout: PageLayout, seed: int = 0, scale: float = 1.0) -> NDArray[np.uint8]:
    """Normal values in the layout's dtype, as raw bytes."""
    num_values = int(np.prod(layout.shape))
    values = np.random.default_rng(seed).normal(scale=scale, size=num_values).astype(np.float32)
    return from_floats(values, layout)


def from_floats(values: NDArray[np.float32], layout: PageLayout) -> NDArray[np.uint8]:
    """Raw bytes of float32 values; bfloat16 by truncation."""
    if layout.dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    with np.errstate(over="ignore"):
        return values.astype(layout.dtype).view(np.uint8)


def to_floats(page: NDArray[np.uint8], layout: PageLayout) -> NDArray[np.float32]:
    """[rows, head_dim] float32."""
    if layout.dtype == "bfloat16":
        values = (page.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = page.view(layout.dtype).astype(np.float32)
    return values.reshape(-1, layout.head_dim)


def whole_page(layout: PageLayout, token_start: int = 0) -> LayerGroup:
    """All layers of a page as one section."""
    return LayerGroup(
        layout=layout, first_layer=0, num_layers=layout.num_layers, token_start=token_start
    )


def round_trip(
    codec: Codec, page: NDArray[np.uint8], layout: PageLayout, token_start: int = 0
) -> tuple[NDArray[np.uint8], int]:
    """A page packed and unpacked, and how many bytes it took."""
    group = whole_page(layout, token_start)
    raw = page.view()
    raw.flags.writeable = False
    stored = codec.encode(raw, group)
    out = np.full(layout.nbytes, 0xA5, dtype=np.uint8)
    codec.decode(memoryview(stored), group, out)
    return out, len(stored)


def make_chain(layout: PageLayout, num_pages: int, fidelity: str = EXACT) -> list[PageKey]:
    """Keys of one chain."""
    namespace = Namespace(TENANT_KEY, layout, fidelity)
    return namespace.chain(range(num_pages * layout.page_tokens))


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Poll; the deadline only ends a test that would otherwise hang."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the condition did not come true")
        time.sleep(0.005)


def tier_counts(stats: Mapping[str, Any], name: str) -> tuple[int, int, int]:
    """Hits, misses and corrupt pages of a tier."""
    tier = stats[name]
    return tier.num_hits, tier.num_misses, tier.num_corrupt
