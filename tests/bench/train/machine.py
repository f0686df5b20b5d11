"""What this machine can do at most, and what memory this process took."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from pathlib import Path
from typing import NamedTuple

import torch

_SIDE = 1536
_BLOCK = 4 << 20
_RESET_PEAK = "5"


def matmul_flops(dtype: torch.dtype) -> float:
    """Floating point operations a second of square matrix products, with torch's threads."""
    a, b = (torch.randn(_SIDE, _SIDE).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - began)
    return 2 * _SIDE**3 / best


class DiskRates(NamedTuple):
    """Bytes a second, of a file as long as what is compared with it."""

    write: float
    read: float


def disk_rates(path: Path, num_bytes: int) -> DiskRates:
    """Write a file through to the disk, forget its pages, and read it back."""
    block = os.urandom(_BLOCK)
    count = max(1, num_bytes // _BLOCK)
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(count):
            file.write(block)
        os.fsync(file.fileno())
    write_s = time.perf_counter() - began
    forget(path)
    began = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.read(_BLOCK):
            pass
    read_s = time.perf_counter() - began
    path.unlink()
    return DiskRates(count * _BLOCK / write_s, count * _BLOCK / read_s)


def forget(path: Path) -> None:
    """Have the next reader of a file wait for the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class PeakMemory:
    """The most resident memory since it was made, beyond what there was then."""

    def __init__(self) -> None:
        """Let go of what nobody uses, and begin to watch."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK, encoding="ascii")
        self._before = _status("VmRSS")

    def grown(self) -> tuple[int, int]:
        """Peak in bytes, and by how much it exceeds the beginning."""
        peak = _status("VmHWM")
        return peak, peak - self._before


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) << 10
    raise ValueError(f"/proc/self/status has no {name}")
