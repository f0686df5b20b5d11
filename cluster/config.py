"""Everything a human may set, composed of the layers' own configs. Frozen; read once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.scaling.config import AutoscaleConfig, ScalingConfig
from deployments.config import (
    AuthConfig,
    DraftPoolConfig,
    IngressConfig,
    PrefillConfig,
    TracingConfig,
)
from deployments.engine.config import EngineConfig, TorchEngineConfig
from deployments.engine.training.config import DraftTrainingConfig
from kv_store.config import EmbeddedValkeyTierConfig, KVStoreConfig, SsdTierConfig

_LAPTOP_SSD_BYTES = 2 << 30


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class PoolConfig(_Config):
    """One kind of replica: how many, where, and with how much of a machine."""

    replicas: int = Field(default=1, ge=1)
    """Replicas while ``autoscaling`` is not set."""
    autoscaling: AutoscaleConfig | None = None
    """Sizes the pool by its load, together with the other pools that have it (see ``scaling``)."""
    num_cpus: float = Field(default=1.0, ge=0)
    """Logical CPUs that Ray reserves for one replica."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs of one replica; below 1 several replicas share one."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Custom Ray resources of one replica."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Node labels a replica insists on, such as ``paceline.io/pool: target``."""
    max_ongoing_requests: int = Field(default=64, ge=1)
    """Requests in flight at one replica; further ones wait at the caller."""
    max_queued_requests: int = Field(default=256, ge=1)
    """Serve's bound on requests that wait at one caller for a replica with room."""
    max_surge_percent: int = Field(default=0, ge=0, le=100)
    """Replicas that an update may start before it stops old ones, as a part of the pool, rounded
    up. Without any, a pool of one replica is empty while the new one starts; with some, an update
    waits until there is room for them."""
    shutdown_timeout_s: float = Field(default=20.0, gt=0)
    """Seconds that running requests get when a replica must go."""


class PoolsConfig(_Config):
    """The pools of a cluster."""

    ingress: PoolConfig = PoolConfig(num_cpus=0.5, max_ongoing_requests=512, max_surge_percent=100)
    """HTTP and gRPC surfaces, tokenisation, transcripts."""
    target: PoolConfig = PoolConfig()
    """Replicas that own the text: prefill, verification, KV pages."""
    draft: PoolConfig | None = PoolConfig(max_ongoing_requests=256)
    """Replicas that guess ahead; ``null`` serves without a draft pool."""
    prefill: PoolConfig | None = None
    """Replicas that compute long prompts for the targets, which load their pages from the KV tier
    (see ``prefill``); ``null`` leaves all prompts to the targets."""

    @property
    def by_name(self) -> dict[str, PoolConfig]:
        """Those that the cluster has."""
        pools = {
            "ingress": self.ingress,
            "target": self.target,
            "draft": self.draft,
            "prefill": self.prefill,
        }
        return {name: pool for name, pool in pools.items() if pool is not None}

    @model_validator(mode="after")
    def _only_drafts_may_be_none(self) -> PoolsConfig:
        for name, pool in self.by_name.items():
            if name == "draft" or pool.autoscaling is None:
                continue
            if not pool.autoscaling.min_replicas:
                raise ValueError(f"{name}.autoscaling.min_replicas must be at least 1")
        return self


class ServerConfig(_Config):
    """Addresses of a cluster on one machine. On Kubernetes the chart sets them."""

    host: str = "127.0.0.1"
    """IPv4 address that HTTP and gRPC bind, or a name of one; ``0.0.0.0`` opens them to the
    network."""
    http_port: int = Field(default=8000, ge=0, le=65535)
    """Port of the OpenAI-compatible surface; 0 picks a free one."""
    grpc_port: int = Field(default=9000, ge=0, le=65535)
    """Port of the gRPC surface; 0 picks a free one."""
    metrics_port: int = Field(default=0, ge=0, le=65535)
    """Port of the Prometheus endpoint; 0 picks a free one."""
    start_timeout_s: float = Field(default=300.0, gt=0)
    """Seconds until all replicas must be ready."""


def default_cache_dir() -> Path:
    """``paceline`` in the user's XDG cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paceline"


def _default_kv(settings: dict[str, Any]) -> KVStoreConfig:
    root = settings["cache_dir"] / "kv"
    return KVStoreConfig(
        tiers=(
            EmbeddedValkeyTierConfig(),
            SsdTierConfig(root=root, budget_bytes=_LAPTOP_SSD_BYTES),
        )
    )


class ClusterConfig(_Config):
    """A whole cluster."""

    app_name: str = Field(default="paceline", pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    """The Ray Serve application's name."""
    cache_dir: Path = Field(default_factory=default_cache_dir)
    """Folder of weights and fitted drafts; ``paceline`` in the user's cache folder by default."""
    engine: EngineConfig = TorchEngineConfig()
    """What runs in a target replica."""
    draft: DraftPoolConfig = DraftPoolConfig()
    """What runs in a draft replica."""
    prefill: PrefillConfig = PrefillConfig()
    """Which prompts the prefill pool computes, where ``pools.prefill`` makes one."""
    kv: KVStoreConfig | None = Field(default_factory=_default_kv)
    """Where KV pages are shared; a Valkey of the cluster's own and a folder below ``cache_dir`` by
    default. ``null`` keeps pages inside their replica."""
    pools: PoolsConfig = PoolsConfig()
    """How many replicas of each kind, and where."""
    scaling: ScalingConfig = ScalingConfig()
    """What pools with ``autoscaling`` are sized for."""
    ingress: IngressConfig = IngressConfig()
    """Limits of the public surfaces."""
    auth: AuthConfig = AuthConfig()
    """Tenants and their keys."""
    tracing: TracingConfig = TracingConfig()
    """Where spans go."""
    server: ServerConfig = ServerConfig()
    """Ports and addresses of a local cluster."""
    training: DraftTrainingConfig = DraftTrainingConfig()
    """How ``paceline train draft`` makes a draft; a cluster that serves does not read it."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Of every process of the cluster."""

    @model_validator(mode="after")
    def _who_consents_is_known(self) -> ClusterConfig:
        known = {tenant.name for tenant in self.auth.tenants} or {"default"}
        if unknown := sorted(set(self.ingress.traffic_log.tenants) - known):
            raise ValueError(
                f"ingress.traffic_log.tenants names {', '.join(unknown)}; tenants are "
                f"{', '.join(sorted(known))}"
            )
        return self

    @model_validator(mode="after")
    def _prefilled_pages_have_a_way(self) -> ClusterConfig:
        if self.pools.prefill is None:
            return self
        if self.engine.kind == "sglang":
            raise ValueError("pools.prefill needs engine.kind torch: SGLang's pages are its own")
        kinds = {tier.kind for tier in self.kv.tiers} if self.kv is not None else set()
        if not kinds & {"valkey", "embedded_valkey"}:
            raise ValueError("pools.prefill hands pages over through a Valkey tier: add one to kv")
        return self

    @model_validator(mode="after")
    def _sglang_has_what_it_needs(self) -> ClusterConfig:
        sglang, num_gpus = self.engine.sglang, self.pools.target.num_gpus
        is_spread = sglang.tensor_parallel > 1 and self.engine.device == "cuda"
        if is_spread and num_gpus != sglang.tensor_parallel:
            raise ValueError(
                f"engine.sglang.tensor_parallel is {sglang.tensor_parallel}, but "
                f"pools.target.num_gpus is {num_gpus:g}"
            )
        if sglang.draft_trees and sglang.attention_backend == "triton" and self.kv is not None:
            # SGLang refuses its own trees there, as unstable.
            raise ValueError(
                "engine.sglang.draft_trees over pages of 64 tokens needs attention_backend: "
                "flashinfer; or set kv: null"
            )
        return self


def config_json_schema() -> dict[str, Any]:
    """The JSON schema of ``ClusterConfig``, for editors and for the chart's values."""
    schema = ClusterConfig.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema
