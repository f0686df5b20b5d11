"""A pool in small steps of time: requests queue, replicas take a while to start and drain.

Nothing is real but the policy. What it is told is as late and as averaged as what Serve tells it.
"""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING

from cluster.scaling.policy import Memory, Rules, Signals, decide
from cluster.scaling.signals import TargetSignals

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.scaling.config import AutoscaleConfig, ScalingConfig

_STEP_S = 0.1
_TELL_EVERY_S = 2.0
_TTFT_WINDOW_S = 15.0


@dataclass(eq=False, slots=True)
class _Replica:
    runs_at_s: float
    ends_s: list[float] = field(default_factory=list)
    is_leaving: bool = False


@dataclass(slots=True)
class Told:
    """What happened.

    Attributes:
        sizes: replicas that the pool was to have, each second.
        waits_s: of every request until a replica took it up.
        replica_seconds: of all replicas that hold a place, those that start or drain as well.
    """

    sizes: list[int] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)
    replica_seconds: float = 0.0

    def good(self, slo_s: float) -> float:
        """Part of the requests that waited no longer."""
        return fmean(wait_s <= slo_s for wait_s in self.waits_s)

    def growths_and_shrinks_s(self) -> tuple[list[int], list[int]]:
        """When the pool was made larger, and when smaller."""
        steps = list(enumerate(pairwise(self.sizes), 1))
        grown = [second for second, (before, after) in steps if after > before]
        return grown, [second for second, (before, after) in steps if after < before]


class PoolSimulation:
    """One pool under an open-loop load.

    Args:
        pool: its bounds and delays.
        scaling: what it aims at.
        start_s: from when a replica is asked for until it runs.
        service_s: of one request at a replica.
        num_slots: requests that a replica runs at once.
        seed: of arrivals.
        role: of the pool, "target" or "prefill".
    """

    def __init__(
        self,
        pool: AutoscaleConfig,
        scaling: ScalingConfig,
        *,
        start_s: float,
        service_s: float = 2.4,
        num_slots: int = 8,
        seed: int = 0,
        role: str = "target",
    ) -> None:
        self._pool = pool
        self._role = role
        self._rules = Rules({role: pool}, scaling)
        self._start_s = start_s
        self._service_s = service_s
        self._num_slots = num_slots
        self._draw = random.Random(seed)  # noqa: S311 - arrivals, no secret
        self._replicas = [_Replica(-math.inf) for _ in range(pool.min_replicas)]
        self._waiting: deque[float] = deque()
        self._taken: deque[tuple[float, float]] = deque()
        self._open: deque[tuple[float, float]] = deque()
        self._told_s, self._told_open = 0.0, 0.0
        self._memory = Memory()
        self.told = Told()

    def run(self, rate: Callable[[float], float], seconds: float) -> Told:
        """Let requests arrive at a rate over time, and the policy decide once a second."""
        for step in range(round(seconds / _STEP_S)):
            now_s = step * _STEP_S
            self._arrive(now_s, rate(now_s))
            self._serve(now_s)
            self.told.replica_seconds += _STEP_S * len(self._replicas)
            if step % round(1 / _STEP_S) == 0:
                self._decide(now_s)
        return self.told

    def _arrive(self, now_s: float, rate: float) -> None:
        chance = rate * _STEP_S
        # At most a few arrivals a step: as good as Poisson at these rates.
        for _ in range(4):
            if self._draw.random() < chance / 4:
                self._waiting.append(now_s)

    def _serve(self, now_s: float) -> None:
        for replica in self._replicas:
            replica.ends_s = [end_s for end_s in replica.ends_s if end_s > now_s]
        self._replicas = [each for each in self._replicas if not each.is_leaving or each.ends_s]
        able = [each for each in self._replicas if each.runs_at_s <= now_s and not each.is_leaving]
        while self._waiting and able:
            emptiest = min(able, key=lambda each: len(each.ends_s))
            if len(emptiest.ends_s) >= self._num_slots:
                return
            waited_s = now_s - self._waiting.popleft()
            emptiest.ends_s.append(now_s + self._service_s)
            self._taken.append((now_s, waited_s))
            self.told.waits_s.append(waited_s)

    def _decide(self, now_s: float) -> None:
        kept = [each for each in self._replicas if not each.is_leaving]
        running = [each for each in kept if each.runs_at_s <= now_s]
        self._open.append((now_s, float(sum(len(each.ends_s) for each in running))))
        while self._open[0][0] < now_s - self._pool.look_back_s:
            self._open.popleft()
        while self._taken and self._taken[0][0] < now_s - _TTFT_WINDOW_S:
            self._taken.popleft()
        if now_s - self._told_s >= _TELL_EVERY_S:
            self._told_s, self._told_open = now_s, fmean(num for _, num in self._open)
        waits = sorted(waited_s for _, waited_s in self._taken)
        signals = TargetSignals(
            name=self._role,
            num_target=len(kept),
            num_running=len(running),
            num_reporting=len(running),
            num_requests=self._told_open + len(self._waiting),
            ttft_p90_s=waits[round(0.9 * (len(waits) - 1))] if waits else None,
        )
        pools = {self._role: signals}
        (decision,), self._memory = decide(
            self._memory,
            Signals(now_s=now_s, target=pools.get("target"), prefill=pools.get("prefill")),
            self._rules,
        )
        self._resize(kept, decision.num_replicas, now_s)
        self.told.sizes.append(decision.num_replicas)

    def _resize(self, kept: list[_Replica], num_replicas: int, now_s: float) -> None:
        for _ in range(num_replicas - len(kept)):
            self._replicas.append(_Replica(now_s + self._start_s))
        # As Serve does: those that start go first, then the youngest.
        youngest = sorted(kept, key=lambda each: -each.runs_at_s)
        for replica in youngest[: max(0, len(kept) - num_replicas)]:
            replica.is_leaving = True
