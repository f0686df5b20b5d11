"""How fast codecs pack and unpack on one core, beside a plain copy of the same pages."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kv_store import PageLayout
from kv_store.codecs.base import LayerGroup
from kv_store.codecs.registry import BUILTIN_CODECS, load_codec
from tests.bench.kv.measure import race

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kv_store.codecs.base import Codec
    from tests.bench.kv.measure import Speed

_CACHE_SIZE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
_SLICE_BYTES = 16 << 20  # of one call

LAYOUTS = {
    "1.47 MB": PageLayout(
        num_layers=30, num_kv_heads=3, head_dim=64, dtype="bfloat16", model_digest="b", rope="b"
    ),
    "8 MiB": PageLayout(
        num_layers=32, num_kv_heads=8, head_dim=128, dtype="bfloat16", model_digest="b", rope="b"
    ),
}


def measure_codecs() -> list[dict[str, Any]]:
    """One row for each page size and codec: raw GB per CPU second, and as a part of memcpy's."""
    return [row for size, layout in LAYOUTS.items() for row in _measure(size, layout)]


def _measure(size: str, layout: PageLayout) -> Iterator[dict[str, Any]]:
    in_slice = -(-_SLICE_BYTES // layout.nbytes)
    num_slices = -(-_beyond_caches() // (in_slice * layout.nbytes))
    values = np.random.default_rng(0).normal(size=(in_slice, layout.nbytes // 2))
    bits = values.astype(np.float32).view(np.uint32) >> 16
    pages = np.tile(bits.astype(np.uint16).view(np.uint8), (num_slices, 1))
    pages.flags.writeable = False
    out = np.ones_like(pages)
    group = LayerGroup(layout=layout, first_layer=0, num_layers=layout.num_layers, token_start=64)
    turn = itertools.cycle(range(0, len(pages), in_slice))

    def each(act: Callable[[int], object]) -> Callable[[], int]:
        """One slice's pages at a call."""

        def run() -> int:
            start = next(turn)
            for index in range(start, start + in_slice):
                act(index)
            return in_slice * layout.nbytes

        return run

    def race_codec(codec: Codec, packed: list[memoryview]) -> dict[str, Speed]:
        return race(
            {
                "memcpy": each(lambda index: np.copyto(out[index], pages[index])),
                "encode": each(lambda index: codec.encode(pages[index], group)),
                "decode": each(lambda index: codec.decode(packed[index], group, out[index])),
            }
        )

    for name in BUILTIN_CODECS:
        codec = load_codec(name)
        packed = [memoryview(codec.encode(page, group)) for page in pages]
        speeds = race_codec(codec, packed)
        memcpy = speeds["memcpy"]
        yield {
            "page": size,
            "codec": name,
            "ratio": pages.nbytes / sum(map(len, packed)),
            "memcpy_gb_per_cpu_s": 1 / memcpy.median_cpu_s_per_gb,
            "encode_gb_per_cpu_s": 1 / speeds["encode"].median_cpu_s_per_gb,
            "decode_gb_per_cpu_s": 1 / speeds["decode"].median_cpu_s_per_gb,
            "encode_of_memcpy": 1 / speeds["encode"].cpu_of(memcpy),
            "decode_of_memcpy": 1 / speeds["decode"].cpu_of(memcpy),
        }


def _beyond_caches() -> int:
    """More bytes than this machine's caches hold, as a server's pages are; half a GiB at most."""
    try:
        last_level = int(_CACHE_SIZE.read_text(encoding="ascii").rstrip("K\n")) << 10
    except (OSError, ValueError):
        last_level = 0
    return max(64 << 20, min(last_level * 5 // 4, 512 << 20))
