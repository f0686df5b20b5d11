"""What is run: settings of both clusters, arrivals, and how a shorter run shortens them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.config import (
    AutoscaleConfig,
    ClusterConfig,
    PoolConfig,
    PoolsConfig,
    ScalingConfig,
    ServerConfig,
)
from cluster.load.arrivals import arrival_times, parse_profile
from cluster.load.workload import of_lengths
from deployments.engine.config import EngineConfig, SimulatedConfig, SpeculationConfig

if TYPE_CHECKING:
    from cluster.load.workload import LoadRequest

TTFT_SLO_S = 5.0
PEAK = 8
MAX_TARGETS, MAX_DRAFTS = 6, 4
_PROMPT_TOKENS, _OUTPUT_TOKENS = 256, 48
_SHORTEST_S = 2.0


@dataclass(frozen=True, slots=True)
class Plan:
    """One load for both clusters.

    Attributes:
        rate: requests a second at 1x.
        time_scale: of all phases and delays; below 1 the run shows that everything works, for
            replicas start no faster than they do.
    """

    rate: float
    time_scale: float

    @property
    def profile(self) -> str:
        """Two minutes at 1x, a ramp of 30 s, three minutes at 8x, four minutes at 1x."""
        low, high = self.rate, self.rate * PEAK
        calm, ramp, peak, end = (each * self.time_scale for each in (120, 30, 180, 240))
        return f"{low:g}:{calm:g},{low:g}-{high:g}:{ramp:g},{high:g}:{peak:g},{low:g}:{end:g}"

    @property
    def seconds(self) -> float:
        """Of all phases."""
        return sum(segment.seconds for segment in parse_profile(self.profile))

    @property
    def update_at_s(self) -> float:
        """When all replicas are replaced: late in the last phase, at small pools."""
        return self.seconds - 90 * self.time_scale

    def schedule(self) -> list[LoadRequest]:
        """Every request of the run."""
        times = arrival_times(parse_profile(self.profile), burstiness=1.0, seed=0)
        return list(of_lengths(times, _PROMPT_TOKENS, _OUTPUT_TOKENS, 0))

    def trickle(self) -> list[LoadRequest]:
        """A few requests that nobody else's wait for, to bring drafts back after a silence."""
        times = arrival_times(parse_profile("2:8"), burstiness=0.0, seed=0)
        return list(of_lengths(times, _PROMPT_TOKENS, _OUTPUT_TOKENS, 1))

    def config(self, *, is_static: bool) -> ClusterConfig:
        """Of one of the clusters."""
        scaling = ScalingConfig(ttft_slo_s=TTFT_SLO_S, retry_drafts_s=300 * self.time_scale)
        return ClusterConfig(
            engine=EngineConfig(
                kind="simulated",
                max_num_seqs=8,
                speculation=SpeculationConfig(local_drafter="none"),
                simulated=SimulatedConfig(
                    prefill_tokens_per_s=4000,
                    decode_step_s=((1, 0.04), (8, 0.05), (40, 0.1)),
                    draft_row_s=0.0008,
                ),
            ),
            kv=None,
            pools=PoolsConfig(
                target=self._pool(is_static, MAX_TARGETS, 1, max_ongoing_requests=16),
                draft=self._pool(is_static, MAX_DRAFTS, 0, max_ongoing_requests=256),
            ),
            scaling=scaling,
            server=ServerConfig(http_port=0, grpc_port=0),
        )

    def updated(self) -> ClusterConfig:
        """The autoscaled cluster's settings with a change that replaces every replica."""
        config = self.config(is_static=False)
        simulated = config.engine.simulated.model_copy(update={"prefill_tokens_per_s": 4001.0})
        engine = config.engine.model_copy(update={"simulated": simulated})
        return config.model_copy(update={"engine": engine})

    def _pool(self, is_static: bool, most: int, least: int, **options: Any) -> PoolConfig:
        if is_static:
            return PoolConfig(replicas=most, **options)
        # So many more at once as few pools have room for; on one machine the room is a number.
        options["max_surge_percent"] = 100
        scale = self.time_scale
        autoscaling = AutoscaleConfig(
            min_replicas=least,
            max_replicas=most,
            # Of the eight that a replica runs at once: room for what comes while others start.
            target_ongoing_requests=3,
            upscale_delay_s=_SHORTEST_S,
            downscale_delay_s=max(2 * _SHORTEST_S, 40 * scale),
            look_back_s=2 * _SHORTEST_S,
        )
        return PoolConfig(autoscaling=autoscaling, **options)
