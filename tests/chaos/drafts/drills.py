"""The faults: each is brought about under load, lasts a while, and is undone."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.chaos.drafts.replicas import Replica
from tests.chaos.drafts.timeline import Timeline

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.chaos.drafts.load import Load

_PATIENCE_S = 60.0
_AFTER_S = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Something that happens to a replica.

    Attributes:
        begin: brings it about.
        end: undoes it; returns when the drafter is back.
        lasts_s: from the one to the other, at least.
    """

    title: str
    begin: Callable[[Replica], None]
    end: Callable[[Replica], None]
    lasts_s: float


def _nothing(replica: Replica) -> None:
    del replica


def faults(lasts_s: float) -> dict[str, Fault]:
    """All of them.

    Args:
        lasts_s: a frozen replica, and a short cut. A long cut lasts until keepalive has found out.
    """
    return {
        "kill": Fault(
            title="SIGKILL, restart", begin=Replica.kill, end=Replica.restart, lasts_s=2.0
        ),
        "freeze": Fault(
            title="SIGSTOP, SIGCONT", begin=Replica.freeze, end=Replica.thaw, lasts_s=lasts_s
        ),
        "cut": Fault(title="all bytes lost", begin=Replica.cut, end=Replica.mend, lasts_s=lasts_s),
        "long cut": Fault(
            title="all bytes lost, for long",
            begin=Replica.cut,
            end=Replica.mend,
            lasts_s=lasts_s + 20.0,
        ),
        "swap": Fault(title="hot swap", begin=_nothing, end=Replica.swap, lasts_s=0.0),
    }


async def run_drill(
    name: str, fault: Fault, load: Load, replicas: list[Replica], calm_s: float
) -> dict[str, Any]:
    """One fault of the first replica, while the load runs.

    Args:
        calm_s: how long everything is as it should be before the fault.

    Returns:
        A row of the report, with the samples.
    """
    began = await _calm(load, calm_s)
    num_answers = len(load.answers)
    begun_at = time.monotonic()
    await asyncio.to_thread(fault.begin, replicas[0])
    await asyncio.sleep(fault.lasts_s)
    await asyncio.to_thread(fault.end, replicas[0])
    back_at = time.monotonic()
    deadline = back_at + _PATIENCE_S
    while True:
        await asyncio.sleep(0.5)
        samples = [sample for sample in load.samples if sample.at >= began]
        timeline = Timeline(samples=samples, begun_at=begun_at, back_at=back_at)
        now = time.monotonic()
        if now > deadline or (timeline.recovery_s is not None and now > back_at + _AFTER_S):
            break
    recovered_at = back_at + (timeline.recovery_s or 0.0)
    is_long = back_at - begun_at > 1.0
    return {
        "fault": name,
        "how": fault.title,
        "replicas": len(replicas),
        "lasted_s": back_at - begun_at,
        "answers": len(load.answers) - num_answers,
        "tokens_per_s_before": timeline.token_rate(began, begun_at),
        "tokens_per_s_during": timeline.token_rate(begun_at, back_at) if is_long else None,
        "tokens_per_s_after": timeline.token_rate(recovered_at, samples[-1].at),
        "table_tokens_per_s_before": timeline.table_rate(began, begun_at),
        "table_tokens_per_s_during": timeline.table_rate(begun_at, back_at) if is_long else None,
        "table_tokens_per_s_after": timeline.table_rate(recovered_at, samples[-1].at),
        "first_table_token_s": timeline.first_table_token_s,
        "recovery_s": timeline.recovery_s,
        "samples": [(round(s.at - begun_at, 3), s.num_tokens, s.num_table_tokens) for s in samples],
    }


async def _calm(load: Load, calm_s: float) -> float:
    """Wait until tokens come from tables for so long; returns when that began."""
    deadline = time.monotonic() + 3 * _PATIENCE_S
    while time.monotonic() < deadline:
        began, before = time.monotonic(), load.samples[-1:]
        await asyncio.sleep(calm_s)
        if before and load.samples[-1].num_table_tokens >= before[0].num_table_tokens + calm_s / 2:
            return began
    raise TimeoutError("hardly any tokens come from tables, though nothing is wrong yet")
