"""How fast codecs pack and unpack on one core, beside a plain copy of the same pages."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from kv_store import PageLayout
from kv_store.codecs.base import LayerGroup
from kv_store.codecs.registry import BUILTIN_CODECS, load_codec
from tests.bench.kv.measure import race

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
    rows: list[dict[str, Any]] = []
    for size, layout in LAYOUTS.items():
        in_slice = -(-_SLICE_BYTES // layout.nbytes)
        num_slices = -(-_beyond_caches() // (in_slice * layout.nbytes))
        values = np.random.default_rng(0).normal(size=(in_slice, layout.nbytes // 2))
        bits = values.astype(np.float32).view(np.uint32) >> 16
        pages = np.tile(bits.astype(np.uint16).view(np.uint8), (num_slices, 1))
        pages.flags.writeable = False
        out = np.ones_like(pages)
        slices = [
            range(start, start + in_slice) for start in range(0, num_slices * in_slice, in_slice)
        ]
        group = LayerGroup(
            layout=layout, first_layer=0, num_layers=layout.num_layers, token_start=64
        )

        nbytes = in_slice * layout.nbytes
        turn = itertools.cycle(slices)

        def copy(pages: Any = pages, out: Any = out, turn: Any = turn, nbytes: int = nbytes) -> int:
            for index in next(turn):
                np.copyto(out[index], pages[index])
            return nbytes

        for name in BUILTIN_CODECS:
            codec = load_codec(name)
            packed = [codec.encode(page, group) for page in pages]

            def encode(
                codec: Any = codec,
                group: Any = group,
                pages: Any = pages,
                turn: Any = turn,
                nbytes: int = nbytes,
            ) -> int:
                for index in next(turn):
                    codec.encode(pages[index], group)
                return nbytes

            def decode(
                codec: Any = codec,
                group: Any = group,
                packed: Any = packed,
                out: Any = out,
                turn: Any = turn,
                nbytes: int = nbytes,
            ) -> int:
                for index in next(turn):
                    codec.decode(memoryview(packed[index]), group, out[index])
                return nbytes

            speeds = race({"memcpy": copy, "encode": encode, "decode": decode})
            memcpy = speeds["memcpy"]
            rows.append(
                {
                    "page": size,
                    "codec": name,
                    "ratio": pages.nbytes / sum(map(len, packed)),
                    "memcpy_gb_per_cpu_s": 1 / memcpy.median_cpu_s_per_gb,
                    "encode_gb_per_cpu_s": 1 / speeds["encode"].median_cpu_s_per_gb,
                    "decode_gb_per_cpu_s": 1 / speeds["decode"].median_cpu_s_per_gb,
                    "encode_of_memcpy": 1 / speeds["encode"].cpu_of(memcpy),
                    "decode_of_memcpy": 1 / speeds["decode"].cpu_of(memcpy),
                }
            )
    return rows


def _beyond_caches() -> int:
    """Bytes that no cache of this machine holds, as the pages of a server in use."""
    try:
        last_level = int(_CACHE_SIZE.read_text(encoding="ascii").rstrip("K\n")) << 10
    except (OSError, ValueError):
        last_level = 0
    return max(64 << 20, min(last_level * 5 // 4, 512 << 20))
