"""Which arithmetic is fast on this machine, for models whose exact values do not matter."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

DtypeName = Literal["float32", "bfloat16"]

_BFLOAT16_FLAGS = frozenset({"amx_bf16", "avx512_bf16"})


def fast_dtype(device: str) -> DtypeName:
    """bfloat16 where the hardware computes in it itself, else float32, which is faster then."""
    if device != "cpu":
        return "bfloat16"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "float32"
    flags = next((line for line in lines if line.startswith("flags")), "")
    return "bfloat16" if _BFLOAT16_FLAGS & set(flags.split()) else "float32"
