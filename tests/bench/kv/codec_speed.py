"""How fast codecs pack and unpack on one core, beside a plain copy of the same pages."""

from __future__ import annotations

from typing import Any

import numpy as np

from kv_store import PageLayout
from kv_store.codecs.base import LayerGroup
from kv_store.codecs.registry import BUILTIN_CODECS, load_codec
from tests.bench.kv.measure import race

_TOTAL_BYTES = 64 << 20  # beyond any cache, as pages in use are

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
        num_pages = _TOTAL_BYTES // layout.nbytes
        values = np.random.default_rng(0).normal(size=(num_pages, layout.nbytes // 2))
        bits = values.astype(np.float32).view(np.uint32) >> 16
        pages = bits.astype(np.uint16).view(np.uint8)
        pages.flags.writeable = False
        out = np.ones_like(pages)
        group = LayerGroup(
            layout=layout, first_layer=0, num_layers=layout.num_layers, token_start=64
        )

        def copy(pages: Any = pages, out: Any = out) -> int:
            for index, page in enumerate(pages):
                np.copyto(out[index], page)
            return int(pages.nbytes)

        for name in BUILTIN_CODECS:
            codec = load_codec(name)
            packed = [codec.encode(page, group) for page in pages]

            def encode(codec: Any = codec, group: Any = group, pages: Any = pages) -> int:
                for page in pages:
                    codec.encode(page, group)
                return int(pages.nbytes)

            def decode(
                codec: Any = codec, group: Any = group, packed: Any = packed, out: Any = out
            ) -> int:
                for index, section in enumerate(packed):
                    codec.decode(memoryview(section), group, out[index])
                return int(out.nbytes)

            speeds = race({"memcpy": copy, "encode": encode, "decode": decode})
            base = speeds["memcpy"].cpu_s_per_gb
            rows.append(
                {
                    "page": size,
                    "codec": name,
                    "ratio": pages.nbytes / sum(map(len, packed)),
                    "memcpy_gb_per_cpu_s": 1 / base,
                    "encode_gb_per_cpu_s": 1 / speeds["encode"].cpu_s_per_gb,
                    "decode_gb_per_cpu_s": 1 / speeds["decode"].cpu_s_per_gb,
                    "encode_of_memcpy": base / speeds["encode"].cpu_s_per_gb,
                    "decode_of_memcpy": base / speeds["decode"].cpu_s_per_gb,
                }
            )
    return rows
