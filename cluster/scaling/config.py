"""How pools grow and shrink. Frozen; read once."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class AutoscaleConfig(_Config):
    """How many replicas a pool may have, and when it grows and shrinks."""

    min_replicas: int = Field(default=1, ge=0)
    """Replicas kept without any load. 0 is for the draft pool alone: it is left empty while drafts
    do not pay or nobody asks."""
    max_replicas: int = Field(default=4, ge=1)
    """Replicas under any load, at most."""
    target_ongoing_requests: float = Field(default=8.0, gt=0)
    """Requests in flight per replica that ingress and target pools are sized for."""
    upscale_delay_s: float = Field(default=10.0, ge=0)
    """Seconds a need must last before replicas are added."""
    downscale_delay_s: float = Field(default=300.0, ge=0)
    """Seconds no higher need may have shown before replicas are removed."""
    look_back_s: float = Field(default=15.0, gt=0)
    """Seconds of load that are averaged."""

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> AutoscaleConfig:
        if self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas must not be below min_replicas")
        return self


class ScalingConfig(_Config):
    """What the policy of all pools that have ``autoscaling`` aims at."""

    ttft_slo_s: float = Field(default=2.0, gt=0)
    """Seconds to the first token at a target replica that requests are to have at most."""
    slo_headroom: float = Field(default=0.8, gt=0, le=1)
    """Part of the SLO that is planned with; the pool grows before the SLO is missed."""
    slo_memory_s: float = Field(default=1800.0, ge=0)
    """Seconds for which a load is remembered under which the SLO was in danger, and the replicas
    that it took; without it the pool would shrink and miss the SLO over and over again."""
    kv_occupancy: float = Field(default=0.85, gt=0, le=1)
    """Part of the targets' KV pages that may be owned by running sequences."""
    draft_utilisation: float = Field(default=0.7, gt=0, le=1)
    """Part of its time that a draft replica may spend drafting."""
    draft_replica_cost: float = Field(default=0.25, gt=0)
    """What a draft replica costs, in target replicas; drafts that save less do not pay."""
    retry_drafts_s: float = Field(default=300.0, gt=0)
    """Seconds after which drafts that did not pay are tried again; sooner, should the load fall to
    half of what it was."""
    tolerance: float = Field(default=0.1, ge=0, lt=1)
    """Differences between need and size that are let be."""
    stale_after_s: float = Field(default=30.0, gt=0)
    """Age at which what a replica has said is no longer believed. A pool of which less than half
    of the replicas have said anything since is left as it is."""
