"""The policy as Ray Serve's controller calls it: one object for all pools of an application.

Serve pickles this module by value and everything it imports by name, so it holds no more than it
must. The pure part is in ``policy``; Serve's own delays and factors are set to do nothing.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from cluster.scaling.config import AutoscaleConfig, ScalingConfig
from cluster.scaling.explained import Explanations
from cluster.scaling.policy import Memory, Rules, Signals, decide
from cluster.scaling.signals import PoolState, draft_signals, pool_signals, target_signals

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

logger = logging.getLogger("ray.serve")

_PERIOD_S = 1.0
"""Serve asks ten times as often."""


class JointPolicy:
    """Sizes ingress, target, draft and prefill pools, as far as they have ``autoscaling``.

    Args:
        pools: by name, the fields of their ``AutoscaleConfig``.
        scaling: the fields of the ``ScalingConfig``.
        clock: what the policy goes by; never set back.
        wall_clock: seconds since the epoch, as replicas stamp what they say.
    """

    def __init__(
        self,
        pools: Mapping[str, Mapping[str, Any]],
        scaling: Mapping[str, Any],
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._rules = Rules(
            {name: AutoscaleConfig.model_validate(fields) for name, fields in pools.items()},
            ScalingConfig.model_validate(scaling),
        )
        self._clock = clock
        self._wall_clock = wall_clock
        self._memory = Memory()
        self._asked_at = -_PERIOD_S
        self._explanations = Explanations()

    def __call__(self, contexts: Mapping[Any, Any]) -> tuple[dict[Any, int], dict[Any, Any]]:
        """Replicas by deployment; those that keep theirs are left out.

        Serve would start a replica of an empty pool at once wherever a request waits for one; it
        does not where nothing is decided.

        Args:
            contexts: ``ray.serve.config.AutoscalingContext`` by deployment id.
        """
        now_s = self._clock()
        if now_s - self._asked_at < _PERIOD_S:
            return {}, {}
        self._asked_at = now_s
        try:
            return self._decide(contexts, now_s), {}
        except Exception:
            # A policy that fails must not keep the controller from its other work.
            logger.exception("the autoscaling policy failed; pools keep their sizes")
            return {}, {}

    def _decide(self, contexts: Mapping[Any, Any], now_s: float) -> dict[Any, int]:
        ids = {each.name: each for each in contexts if each.name in self._rules.pools}
        states = {name: _state(name, contexts[each]) for name, each in ids.items()}
        stale_s = self._rules.scaling.stale_after_s
        ingress, target, draft = (states.get(name) for name in ("ingress", "target", "draft"))
        prefill = states.get("prefill")
        told_at = self._wall_clock()
        signals = Signals(
            now_s=now_s,
            ingress=pool_signals(ingress) if ingress is not None else None,
            target=target_signals(target, told_at, stale_s) if target is not None else None,
            draft=draft_signals(draft, told_at, stale_s) if draft is not None else None,
            prefill=target_signals(prefill, told_at, stale_s) if prefill is not None else None,
        )
        decisions, self._memory = decide(self._memory, signals, self._rules)
        for decision in decisions:
            self._explanations.tell(decision)
        return {
            ids[decision.pool]: decision.num_replicas
            for decision in decisions
            if decision.num_replicas != decision.before
        }


def _state(name: str, context: Any) -> PoolState:  # noqa: ANN401 - Serve's
    return PoolState(
        name=name,
        num_target=context.target_num_replicas,
        num_running=context.current_num_replicas,
        num_requests=context.total_num_requests,
        num_queued=context.total_queued_requests or 0.0,
        reports={
            figure: {
                str(replica): [(point.timestamp, point.value) for point in points]
                for replica, points in by_replica.items()
            }
            for figure, by_replica in (context.raw_metrics or {}).items()
        },
    )
