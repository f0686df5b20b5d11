"""How many replicas each pool shall have: a pure function of what replicas say and what was before.

Every pool has *needs*: numbers of replicas, not rounded, each with its reason. The largest counts.
As in Kubernetes' horizontal autoscaler, a pool grows to the least need of its upscale window and
shrinks to the greatest of its downscale window, so neither a spike nor a dip moves it, and a steady
need never moves it back and forth. Without data there is no need, and a pool is left as it is.

Targets need replicas for their requests in flight, their KV pages, their prefill backlog and their
time to first token. Drafts need them for the rows that targets ask for, and no more than what they
save is worth: with R targets whose steps give a relative gain of g by drafts of the pool, the pool
saves R * g target replicas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from deployments.scaling_stats import TTFT_WINDOW_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from cluster.scaling.config import AutoscaleConfig, ScalingConfig
    from cluster.scaling.signals import DraftSignals, PoolSignals, TargetSignals

_MOST_NEEDED = 1e6
_MOST_BY_SLO = 2.0
"""A missed SLO at most doubles a pool at a time: how it missed it says little about how many more
replicas it takes."""
_SAME_LOAD = 0.9
_FULL = 0.9
_LATE = 0.05
_MIN_REPORTING = 0.5


@dataclass(frozen=True, slots=True)
class Decision:
    """What a pool shall have, and why.

    Attributes:
        num_replicas: within the pool's bounds.
        before: what it was to have until now.
        cause: the need that counted, or why there was none; one of few words, a metric's label.
        needs: replicas by cause.
        reason: all of it, for a reader.
    """

    pool: str
    num_replicas: int
    before: int
    cause: str
    needs: Mapping[str, float]
    reason: str


@dataclass(frozen=True, slots=True)
class LearnedFloor:
    """A load under which the SLO was in danger, and what it needed."""

    load: float
    need: float
    at_s: float


@dataclass(frozen=True, slots=True)
class PoolMemory:
    """What is known of a pool's past.

    Attributes:
        needs: (time, greatest need) within the longest window, oldest first.
        settled_at_s: since when all replicas that shall run do.
    """

    needs: tuple[tuple[float, float], ...] = ()
    settled_at_s: float | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """What the policy knows of the past; begins empty.

    Attributes:
        loads: (time, requests at the targets), oldest first, each more than at any later time.
        floors: what targets' loads needed, none of them about the same.
        unpaid: when drafts last did not pay.
    """

    pools: Mapping[str, PoolMemory] = field(default_factory=dict)
    loads: tuple[tuple[float, float], ...] = ()
    floors: tuple[LearnedFloor, ...] = ()
    unpaid: LearnedFloor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """What is known now; pools without autoscaling are None."""

    now_s: float
    ingress: PoolSignals | None = None
    target: TargetSignals | None = None
    draft: DraftSignals | None = None
    prefill: TargetSignals | None = None


@dataclass(frozen=True, slots=True)
class Rules:
    """The bounds of each pool by name, and what all aim at."""

    pools: Mapping[str, AutoscaleConfig]
    scaling: ScalingConfig


def decide(memory: Memory, signals: Signals, rules: Rules) -> tuple[list[Decision], Memory]:
    """Size all pools.

    Args:
        memory: what the last call returned.
        signals: of this moment; times never go back.
        rules: the same at every call.

    Returns:
        One decision for each pool that has signals, and what to remember.
    """
    decisions: list[Decision] = []
    if signals.ingress is not None:
        needs = {"requests": _by_requests(signals.ingress.num_requests, rules.pools["ingress"])}
        decision, memory = _sized(memory, signals.ingress, needs, signals.now_s, rules)
        decisions.append(decision)
    target = None
    if signals.target is not None:
        needs, memory = _target_needs(memory, signals.target, signals.now_s, rules)
        target, memory = _sized(memory, signals.target, needs, signals.now_s, rules)
        decisions.append(target)
    if signals.draft is not None:
        needs, memory = _draft_needs(memory, signals.draft, signals, target, rules.scaling)
        decision, memory = _sized(memory, signals.draft, needs, signals.now_s, rules)
        decisions.append(decision)
    if signals.prefill is not None:
        needs = _prefill_needs(signals.prefill, rules)
        decision, memory = _sized(memory, signals.prefill, needs, signals.now_s, rules)
        decisions.append(decision)
    return decisions, memory


def _by_requests(num_requests: float, pool: AutoscaleConfig) -> float:
    return num_requests / pool.target_ongoing_requests


def _target_needs(
    memory: Memory, signals: TargetSignals, now_s: float, rules: Rules
) -> tuple[dict[str, float], Memory]:
    scaling, pool = rules.scaling, rules.pools[signals.name]
    planned_s = scaling.ttft_slo_s * scaling.slo_headroom
    needs = {
        "requests": _by_requests(signals.num_requests, pool),
        "kv_pages": signals.num_running * signals.kv_share / scaling.kv_occupancy,
    }
    if signals.prefill_tokens_per_s:
        needs["prefill"] = signals.num_backlog_tokens / (signals.prefill_tokens_per_s * planned_s)
    loads = _loads(memory, signals.num_requests, now_s, scaling)
    floors = tuple(each for each in memory.floors if now_s - each.at_s < scaling.slo_memory_s)
    settled_at_s = memory.pools.get(signals.name, PoolMemory()).settled_at_s
    # While replicas start, and as long as waits of that time are told of, the waiting times are
    # those of fewer replicas than there are.
    told_s = pool.look_back_s + TTFT_WINDOW_S
    is_settled = settled_at_s is not None and now_s - settled_at_s >= told_s
    ttft_s = signals.ttft_p90_s
    if ttft_s is not None and ttft_s > planned_s and is_settled:
        needs["ttft"] = signals.num_running * min(_MOST_BY_SLO, ttft_s / planned_s)
        # Who waited had come before: a load that has fallen since is not what it takes them for.
        load = next(load for at_s, load in loads if now_s - at_s <= told_s + ttft_s)
        if load and signals.num_reporting:
            floors = _learned(floors, LearnedFloor(load, needs["ttft"], now_s))
    known = [each.need for each in floors if signals.num_requests >= _SAME_LOAD * each.load]
    if known:
        needs["ttft_before"] = max(known)
    return needs, replace(memory, loads=loads, floors=floors)


def _prefill_needs(signals: TargetSignals, rules: Rules) -> dict[str, float]:
    """A prefill pool's replicas hold no sequence for long: prompts are all they have to do."""
    scaling, pool = rules.scaling, rules.pools[signals.name]
    needs = {"requests": _by_requests(signals.num_requests, pool)}
    if signals.prefill_tokens_per_s:
        planned_s = scaling.ttft_slo_s * scaling.slo_headroom
        needs["prefill"] = signals.num_backlog_tokens / (signals.prefill_tokens_per_s * planned_s)
    return needs


def _loads(
    memory: Memory, load: float, now_s: float, scaling: ScalingConfig
) -> tuple[tuple[float, float], ...]:
    """Of the time that is remembered; whatever window one looks at begins with its largest."""
    kept = (
        (at_s, before)
        for at_s, before in memory.loads
        if before > load and now_s - at_s < scaling.slo_memory_s
    )
    return (*kept, (now_s, load))


def _learned(floors: tuple[LearnedFloor, ...], new: LearnedFloor) -> tuple[LearnedFloor, ...]:
    """The same load's greater need; other loads keep theirs."""
    same = [each for each in floors if _SAME_LOAD * each.load <= new.load <= each.load / _SAME_LOAD]
    others = (each for each in floors if each not in same)
    merged = (replace(new, load=each.load, need=max(each.need, new.need)) for each in same)
    return (*others, *(merged if same else (new,)))


def _draft_needs(
    memory: Memory,
    draft: DraftSignals,
    signals: Signals,
    target: Decision | None,
    scaling: ScalingConfig,
) -> tuple[dict[str, float], Memory]:
    load = signals.target.num_requests if signals.target is not None else draft.num_requests
    if not draft.num_target:
        # Nothing is known of drafts that nobody makes: one replica finds out.
        if _is_unpaid(memory.unpaid, load, signals.now_s, scaling):
            return {"does_not_pay": 0.0}, memory
        return {"rows": 1.0 if load > 0 else 0.0}, replace(memory, unpaid=None)
    needs = {"rows": _by_rows(draft, scaling)}
    if target is not None and signals.target is not None and signals.target.num_running:
        # More targets will ask for more rows: what they bring is not waited for.
        needs["rows"] *= max(1.0, target.num_replicas / signals.target.num_running)
    worth = _worth(signals.target, scaling)
    if worth is None or worth >= needs["rows"]:
        return needs, replace(memory, unpaid=None)
    if worth < 1:
        # The time counts from the last moment at which there were drafts.
        unpaid = LearnedFloor(load, worth, signals.now_s)
        return {"does_not_pay": 0.0}, replace(memory, unpaid=unpaid)
    return {"rows_worth_it": worth}, replace(memory, unpaid=None)


def _is_unpaid(
    unpaid: LearnedFloor | None, load: float, now_s: float, scaling: ScalingConfig
) -> bool:
    """Whether drafts did not pay a while ago; larger batches only make them pay less."""
    if unpaid is None:
        return False
    return now_s - unpaid.at_s < scaling.retry_drafts_s and load > unpaid.load / 2


def _by_rows(draft: DraftSignals, scaling: ScalingConfig) -> float:
    need = draft.num_busy / scaling.draft_utilisation
    is_full = draft.num_busy >= _FULL * draft.num_running
    if draft.num_running and is_full and draft.late_share > _LATE:
        # Of replicas that cannot keep up, what they did not do is not in their rows.
        need = max(need, draft.num_running * (1 + draft.late_share) / scaling.draft_utilisation)
    return need


def _worth(target: TargetSignals | None, scaling: ScalingConfig) -> float | None:
    """Draft replicas that cost as much as drafts save; None while that was not measured."""
    if target is None or target.draft_gain is None:
        return None
    return max(0.0, target.num_running * target.draft_gain / scaling.draft_replica_cost)


def _sized(
    memory: Memory, signals: PoolSignals, needs: Mapping[str, float], now_s: float, rules: Rules
) -> tuple[Decision, Memory]:
    """The decision that needs lead to, once they have lasted."""
    pool = rules.pools[signals.name]
    known = memory.pools.get(signals.name, PoolMemory())
    before = signals.num_target
    is_settled = signals.num_running == before
    settled_at_s = None
    if is_settled:
        settled_at_s = now_s if known.settled_at_s is None else known.settled_at_s
    if signals.num_reporting < _MIN_REPORTING * signals.num_running or (
        before and not signals.num_running
    ):
        told = f"{signals.num_reporting} of {signals.num_running} running replicas report"
        # What was known before the gap is no evidence behind it.
        kept = replace(memory, pools={**memory.pools, signals.name: PoolMemory((), settled_at_s)})
        held = _bounded(before, pool)
        return Decision(signals.name, held, before, "no_data", {}, f"hold: {told}"), kept
    # A rate of almost nothing makes a need of almost infinity.
    needs = {name: min(need, _MOST_NEEDED) for name, need in needs.items()}
    cause = max(needs, key=needs.__getitem__)
    longest_s = max(pool.upscale_delay_s, pool.downscale_delay_s)
    # One entry older than the window is kept: it tells that the window is covered.
    history = (*known.needs, (now_s, needs[cause]))
    first = max((i for i, (at, _) in enumerate(history) if now_s - at >= longest_s), default=0)
    history = history[first:]
    memory = replace(
        memory, pools={**memory.pools, signals.name: PoolMemory(history, settled_at_s)}
    )
    tolerance = rules.scaling.tolerance
    up = _extreme(history, now_s, pool.upscale_delay_s, min)
    down = _extreme(history, now_s, pool.downscale_delay_s, max)
    wanted = before
    if up is not None and _ceil(up / (1 + tolerance)) > before:
        wanted = _ceil(up / (1 + tolerance))
    elif down is not None and _ceil(down * (1 + tolerance)) < before:
        wanted = _ceil(down * (1 + tolerance))
    num_replicas = _bounded(wanted, pool)
    told = ", ".join(f"{name} {need:.2f}" for name, need in sorted(needs.items()))
    verb = "grow" if num_replicas > before else "shrink" if num_replicas < before else "keep"
    reason = f"{verb} {before} -> {num_replicas}: needs {told}"
    if num_replicas != wanted:
        reason += f"; {wanted} is out of bounds"
    return Decision(signals.name, num_replicas, before, cause, dict(needs), reason), memory


def _extreme(
    history: tuple[tuple[float, float], ...],
    now_s: float,
    window_s: float,
    of: Callable[[Iterable[float]], float],
) -> float | None:
    """The least or greatest need of a window; None while it is not covered."""
    if now_s - history[0][0] < window_s:
        return None
    return of(need for at_s, need in history if now_s - at_s <= window_s)


def _ceil(need: float) -> int:
    # A need that is whole but for rounding errors is whole.
    return math.ceil(need - 1e-9)


def _bounded(num_replicas: int, pool: AutoscaleConfig) -> int:
    return max(pool.min_replicas, min(pool.max_replicas, num_replicas))
