"""Every fault a tier can have, on a memory tier above an SSD tier, one after the other."""

from __future__ import annotations

import errno
import os
import time
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from kv_store import BreakerConfig, KVStoreConfig, MemoryTierConfig, SsdTierConfig
from kv_store.factory import build_page_store
from kv_store.faults import FaultPlan, FaultyTier
from kv_store.tiers.direct_io import DirectIO
from tests.chaos.kv.pages import (
    LAYOUT,
    PATIENT_S,
    LastResortCounter,
    Verdict,
    make_chains,
    recovers,
    save,
    work,
)

if TYPE_CHECKING:
    from pathlib import Path

    from kv_store.tiers.base import KVTier

_NUM_CHAINS = 48
_RECOVERY_ROUNDS = 200
_OFTEN = 0.2

PLANS = {
    "delay": FaultPlan(seed=1, delay=_OFTEN, delay_s=0.002),
    "fail": FaultPlan(seed=2, fail=_OFTEN),
    "drop": FaultPlan(seed=3, drop=_OFTEN),
    "corrupt": FaultPlan(seed=4, corrupt=_OFTEN),
    "truncate": FaultPlan(seed=5, truncate=_OFTEN),
    "swap": FaultPlan(seed=6, swap=_OFTEN),
    "duplicate": FaultPlan(seed=7, duplicate=_OFTEN),
    "lie": FaultPlan(seed=8, lie=_OFTEN),
    "full": FaultPlan(seed=9, full=_OFTEN),
    "read_only": FaultPlan(seed=10, read_only=_OFTEN),
    "all": FaultPlan(
        seed=11,
        delay=0.02,
        delay_s=0.002,
        fail=0.05,
        drop=0.05,
        corrupt=0.05,
        truncate=0.05,
        swap=0.05,
        duplicate=0.05,
        lie=0.05,
        full=0.05,
        read_only=0.05,
    ),
}

DISKS = ("full_disk", "read_only_disk", "torn_disk")


class _FaultyDisk(DirectIO):
    """The file system of a segment log, which refuses while it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = ""
        self.num_faults = 0
        self._num_writes = 0

    def open(self, path: Path, flags: int) -> int:
        """A read-only file system opens nothing for writing."""
        if self.kind == "read_only_disk" and flags & (os.O_WRONLY | os.O_CREAT):
            self.num_faults += 1
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return super().open(path, flags)

    def write(self, fd: int, source: memoryview, offset: int) -> int:
        """A full one takes nothing, or now and then only a part."""
        self._num_writes += 1
        is_due = self._num_writes % 3 == 0
        if self.kind == "read_only_disk" or (self.kind == "full_disk" and is_due):
            self.num_faults += 1
            number = errno.EROFS if self.kind == "read_only_disk" else errno.ENOSPC
            raise OSError(number, os.strerror(number))
        if self.kind == "torn_disk" and is_due:
            self.num_faults += 1
            return super().write(fd, source[: len(source) // 2 & -4096], offset)
        return super().write(fd, source, offset)


def run_fault(
    name: str, num_operations: int, root: Path, num_chains: int = _NUM_CHAINS
) -> dict[str, Any]:
    """Work under one fault until so many page operations were asked of the faulty tiers.

    Args:
        name: of ``PLANS`` or ``DISKS``.
        num_operations: pages asked, put or deleted.
        root: for the SSD tier.
        num_chains: more than the tiers can hold, by default.

    Returns:
        A row of the report.
    """
    started = time.monotonic()
    plan = PLANS.get(name, FaultPlan())
    tiers: list[FaultyTier] = []

    def wrap(tier: KVTier) -> FaultyTier:
        tiers.append(FaultyTier(tier, replace(plan, seed=plan.seed + 1000 * len(tiers))))
        return tiers[-1]

    # The memory tier is too small for all pages, so that the disk is read too.
    config = KVStoreConfig(
        tiers=(
            MemoryTierConfig(budget_bytes=128 << 10),
            SsdTierConfig(root=root, budget_bytes=2 << 20, segment_bytes=1 << 20),
        ),
        breaker=BreakerConfig(max_failures=3, open_s=0.002, max_open_s=0.02),
    )
    verdict = Verdict()
    chains = make_chains(num_chains)
    disk = _FaultyDisk()
    with (
        patch("kv_store.tiers.segment_log.DirectIO", return_value=disk),
        closing(build_page_store(config, LAYOUT, wrap_tier=wrap)) as store,
        LastResortCounter(verdict),
    ):
        for chain in chains[: num_chains // 4]:
            save(store, chain, verdict)
        store.flush(PATIENT_S)
        disk.kind = name
        before, step = _num_operations(tiers), 0
        while _num_operations(tiers) < before + num_operations:
            work(store, chains, verdict, step)
            step += 1
        done = _num_operations(tiers) - before
        num_faults = sum(tier.num_faults for tier in tiers) + disk.num_faults
        disk.kind = ""
        for tier in tiers:
            tier.plan = FaultPlan()
        has_recovered = recovers(store, chains, verdict, _RECOVERY_ROUNDS)
        num_corrupt = sum(tier.num_corrupt for tier in store.stats().tiers.values())
    return {
        "fault": name,
        "page_operations": done,
        "faults": num_faults,
        "pages_asked": verdict.num_asked,
        "pages_served": verdict.num_served,
        "found_corrupt": num_corrupt,
        "wrong_pages": verdict.num_wrong,
        "raised": verdict.num_raised,
        "recovered": has_recovered,
        "seconds": round(time.monotonic() - started, 1),
        "errors": verdict.errors,
    }


def _num_operations(tiers: list[FaultyTier]) -> int:
    return sum(tier.num_operations for tier in tiers)
