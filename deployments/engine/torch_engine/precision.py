"""In which arithmetic this machine multiplies what a model keeps in bfloat16."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

import torch

DtypeName = Literal["float32", "bfloat16"]

_BFLOAT16_FLAGS = frozenset({"amx_bf16", "avx512_bf16", "bf16"})


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products in bfloat16; without, torch is very slow."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return bool(_BFLOAT16_FLAGS & set(flags.split()))


def compute_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Of the activations of a model that is kept in ``dtype``; weights are widened to it."""
    if dtype is torch.bfloat16 and device_type == "cpu" and not multiplies_bfloat16():
        return torch.float32
    return dtype
