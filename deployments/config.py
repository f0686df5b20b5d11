"""What a human may set about the surfaces and the deployments. Frozen; read once."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from deployments.engine.config import CanaryConfig

_API_KEY = re.compile(r"[!-~]+")
_NO_KEY = hashlib.sha256().digest()


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class TenantConfig(_Config):
    """One customer of the cluster: who may call, and how much at once."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    """Shown in metrics and logs; KV pages of two names are never shared."""
    api_keys: tuple[SecretStr, ...] = ()
    """Keys in clear text, of visible ASCII characters and without spaces. Prefer ``api_key_sha256``
    in files that others can read."""
    api_key_sha256: tuple[str, ...] = ()
    """Hex SHA-256 digests of keys, for configs that must not hold the keys themselves."""
    max_concurrent_requests: int = Field(default=64, ge=1)
    """Requests of this tenant in flight at one ingress replica; one more gets 429."""
    priority: int = Field(default=0, ge=-100, le=100)
    """Lower runs first when a target replica has to choose."""

    @property
    def key_digests(self) -> tuple[bytes, ...]:
        """SHA-256 of every key."""
        clear = (key.get_secret_value().encode() for key in self.api_keys)
        return (
            *(hashlib.sha256(key).digest() for key in clear),
            *(bytes.fromhex(digest) for digest in self.api_key_sha256),
        )

    @model_validator(mode="after")
    def _keys_can_be_sent(self) -> TenantConfig:
        for key in self.api_keys:
            if not _API_KEY.fullmatch(key.get_secret_value()):
                raise ValueError("api_keys holds visible ASCII characters, at least one per key")
        for digest in self.api_key_sha256:
            if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
                raise ValueError("api_key_sha256 holds 64 lower-case hex digits per key")
        if _NO_KEY in self.key_digests:
            raise ValueError("api_key_sha256 holds the digest of an empty key")
        return self


class AuthConfig(_Config):
    """Who may call."""

    tenants: tuple[TenantConfig, ...] = ()
    """Empty turns authentication off: every caller is the tenant ``default``."""
    cluster_secret: SecretStr = SecretStr("")
    """Tenants' KV namespaces are derived from it. Keep it across restarts, or pages are lost;
    empty is allowed only while authentication is off."""

    @model_validator(mode="after")
    def _complete(self) -> AuthConfig:
        names = [tenant.name for tenant in self.tenants]
        if len(set(names)) != len(names):
            raise ValueError("tenant names must differ")
        owners: dict[bytes, str] = {}
        for tenant in self.tenants:
            if not tenant.api_keys and not tenant.api_key_sha256:
                raise ValueError(f"tenant {tenant.name!r} has no API key")
            for digest in tenant.key_digests:
                if (owner := owners.setdefault(digest, tenant.name)) != tenant.name:
                    raise ValueError(f"tenants {owner!r} and {tenant.name!r} share an API key")
        if self.tenants and len(self.cluster_secret.get_secret_value()) < 16:
            raise ValueError("cluster_secret needs at least 16 characters when tenants are set")
        return self


class TrafficLogConfig(_Config):
    """Prompts kept for ``paceline draft refresh``; by default nobody's."""

    tenants: tuple[str, ...] = ()
    """Tenants that consented to have their conversations kept in clear text and trained on;
    ``default`` is everybody where authentication is off."""
    folder: Path | None = None
    """Where they are kept; each tenant has a folder in it."""
    max_tenant_bytes: int = Field(default=64 << 20, ge=64 << 10)
    """Of one tenant's prompts; beyond it the oldest are deleted. An eighth of it bounds one
    conversation."""

    @model_validator(mode="after")
    def _has_a_folder(self) -> TrafficLogConfig:
        if self.tenants and self.folder is None:
            raise ValueError("tenants consented to a traffic log that has no folder")
        return self


class IngressConfig(_Config):
    """Limits and defaults of the public surfaces."""

    max_body_bytes: int = Field(default=4 << 20, ge=1024)
    """Bytes of one HTTP body, at most."""
    max_prompt_chars: int = Field(default=1 << 20, ge=1)
    """Characters of one prompt before tokenisation, at most."""
    max_concurrent_requests: int = Field(default=256, ge=1)
    """Requests in flight at one ingress replica; one more gets 429 with Retry-After."""
    default_timeout_s: float = Field(default=600.0, gt=0)
    """Deadline of a request that names none."""
    max_timeout_s: float = Field(default=3600.0, gt=0)
    """Upper bound on the deadline a client may ask for."""
    default_tpot_target_s: float | None = Field(default=None, gt=0, le=60)
    """Target of a request that names none: seconds per output token, at most. Drafts
    that make its steps take longer are not verified, and those that it needs are verified first."""
    max_choices: int = Field(default=8, ge=1, le=64)
    """Sequences of one request (prompts times n), at most."""
    max_embedding_inputs: int = Field(default=128, ge=1, le=2048)
    """Texts of one embeddings request, at most."""
    max_resumes: int = Field(default=3, ge=0)
    """Times a request moves to another target replica after its replica died."""
    tokenizer_threads: int = Field(default=2, ge=1)
    """Threads that render templates and tokenise texts which would hold up the event loop."""
    traffic_log: TrafficLogConfig = TrafficLogConfig()
    """Whose prompts are kept for training drafts, and where."""


class DraftPoolConfig(_Config):
    """What runs in a draft replica."""

    drafter: str = "student"
    """``student`` (fitted to the target by ``paceline train student``), ``suffix``,
    ``model:NAME_OR_FOLDER`` for a small language model of the same vocabulary, or
    ``package.module:Name`` for a drafter of your own."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """In what a language-model drafter keeps its numbers. It never changes a text, only how soon
    and how well guesses come."""
    weights: Literal["auto", "dense", "file", "int8", "int4"] = "auto"
    """In which form it keeps its matrices, as ``engine.weights``. ``auto`` is ``file`` on a CPU
    where the model's file holds such blocks, else ``dense``."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where a language-model drafter runs."""
    num_threads: int = Field(default=1, ge=1)
    """CPU threads of one draft replica."""
    num_pages: int = Field(default=256, ge=2)
    """Pages of 64 tokens for the texts that a language-model drafter continues, all together."""
    max_sessions: int = Field(default=256, ge=1)
    """Sequences served at once; beyond it the one unused for longest is dropped. As many target
    replicas are served, and 64 at least."""
    max_session_tokens: int = Field(default=32_768, ge=64)
    """Longest text that is drafted for; never above what ``num_pages`` hold where a language model
    drafts."""
    canary: CanaryConfig = CanaryConfig()
    """How a new student is tried before it drafts for all; only for ``student``."""
    secret: SecretStr = SecretStr("")
    """Targets show it to draft replicas; the cluster draws one when it is empty."""

    @property
    def language_model(self) -> str | None:
        """The name or folder of the language model that drafts, if one does."""
        prefix, _, name = self.drafter.partition(":")
        return name or None if prefix == "model" else None


class PrefillConfig(_Config):
    """Which prompts the prefill pool computes, where there is one (``pools.prefill``)."""

    min_tokens: int = Field(default=1024, ge=64)
    """Prompt tokens in no cache from which on the pool is asked; shorter prompts are computed where
    they are answered."""
    timeout_s: float = Field(default=15.0, gt=0)
    """Seconds that a request waits for its pages, at most, and never more than half of the time to
    its deadline; then the target computes what is not there."""
    queue_timeout_s: float = Field(default=1.0, gt=0)
    """Seconds of these that a prompt waits for a prefill replica with room."""
    max_in_flight: int = Field(default=16, ge=1)
    """Prompts that one target replica has at the pool at once; it computes further ones itself."""
    max_slowdown: float = Field(default=1.5, gt=0)
    """Expected time by way of the pool, over the target's own, up to which the pool is asked. Above
    1, because a prompt that is computed elsewhere does not hold up other requests' tokens."""


class TracingConfig(_Config):
    """Where spans go."""

    exporter: Literal["none", "console", "file", "otlp"] = "none"
    """``file`` writes one JSON object per span and line; ``otlp`` is gRPC to a collector."""
    otlp_endpoint: str = "http://localhost:4317"
    """Collector address for ``otlp``."""
    file_path: Path | None = None
    """Folder for ``file``; every process writes its own file there."""
    sample_ratio: float = Field(default=1.0, ge=0.0, le=1.0)
    """Part of the root traces that is kept; a caller's own decision is respected."""

    @model_validator(mode="after")
    def _file_has_a_path(self) -> TracingConfig:
        if self.exporter == "file" and self.file_path is None:
            raise ValueError("exporter 'file' needs file_path")
        return self
