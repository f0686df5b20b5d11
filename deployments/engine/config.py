"""What a human may set about an engine. Frozen; read once."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kv_store.layout import PAGE_TOKENS

DEFAULT_MODEL = "smollm2-135m-instruct"
_MASKED_ATTENTION = ("flashinfer", "triton", "torch_native")
"""SGLang's backends that let a draft's tokens see what its mask says. ``torch_native`` verifies no
drafts at all as SGLang ships it; where something teaches it to, as the tests do, it reads masks."""


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class PoolTlsConfig(_Config):
    """Files, the same in target and draft replicas, for TLS on the streams between them.

    Renewed files are read for the next stream.
    """

    certificate_file: Path
    """PEM: what draft replicas show, with the chain to the authority."""
    key_file: Path
    """PEM: its private key."""
    ca_file: Path
    """PEM: the authority that target replicas trust."""
    server_name: str = Field(min_length=1)
    """A name that the certificate is for; targets reach draft replicas by address."""


class SpeculationConfig(_Config):
    """Split speculation as the target sees it."""

    enabled: bool = True
    """Verify drafts at all. Off is plain decoding; the text is the same."""
    num_draft_tokens: int = Field(default=4, ge=1, le=32)
    """Draft tokens verified per sequence and step, at most (k)."""
    fanout: int = Field(default=4, ge=1, le=16)
    """Bonus tokens the pool guesses for each accepted length (F)."""
    local_drafter: Literal["suffix", "none"] = "suffix"
    """Drafts used when no row of the pool's outcome table fits."""
    head: str | None = None
    """Folder of an EAGLE-3 head, as SGLang loads it and ``paceline train draft`` writes it. It
    drafts beside the model, in every target replica, where its tokens are worth its time."""
    pool_tls: PoolTlsConfig | None = None
    """TLS on the streams to the draft pool; they are in the clear without."""


class CanaryConfig(_Config):
    """When a candidate takes the place of the drafter at work, and when it is given up."""

    share: float = Field(default=0.1, gt=0, lt=1)
    """Of the sessions of a draft replica that a candidate drafts for."""
    min_sessions: int = Field(default=20, ge=2)
    """Sessions of either drafter before anything is decided."""
    min_rounds: int = Field(default=400, ge=1)
    """Verification rounds of either drafter before anything is decided."""
    max_sessions: int = Field(default=2000, ge=2)
    """Sessions of a candidate after which it is given up unless it has shown to be better."""
    error_rate: float = Field(default=0.05, gt=0, lt=1)
    """Chance that a draft replica ever finds a difference where there is none; it holds for
    sessions that are independent of each other, the better the more of them there are."""

    @model_validator(mode="after")
    def _can_end(self) -> Self:
        if self.max_sessions < self.min_sessions:
            raise ValueError("max_sessions must not be below min_sessions")
        return self


class SGLangConfig(_Config):
    """What only SGLang needs to be told; read where ``engine.kind`` is ``sglang``."""

    python: Path | None = None
    """The Python of the environment that holds SGLang, with the same versions of Python and Ray as
    the cluster's own. Target replicas run in it, everything else beside it; null where one
    environment holds both."""
    attention_backend: str | None = None
    """SGLang's ``--attention-backend``; by default SGLang chooses."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs of one machine that share one replica's layers; as many as ``pools.target.num_gpus``."""
    draft_trees: bool = False
    """Verify a draft's branches too, and not only its likeliest chain. Needs an
    ``attention_backend`` that reads masks: ``flashinfer``, or ``triton`` where ``kv`` is null."""
    memory_fraction: float | None = Field(default=None, gt=0, lt=1)
    """Part of a GPU's memory for weights and pages. SGLang then counts its pages itself and
    ``num_pages`` says nothing."""
    extra_args: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """More of SGLang's server arguments, by the names of its ``ServerArgs``. One that SGLang does
    not have, or that another setting decides, is refused at the start."""

    @model_validator(mode="after")
    def _masks_are_read(self) -> Self:
        if self.draft_trees and self.attention_backend not in _MASKED_ATTENTION:
            raise ValueError(
                f"draft_trees needs attention_backend: {' or '.join(_MASKED_ATTENTION)}; others "
                "take every draft for a chain"
            )
        return self


class SimulatedConfig(_Config):
    """Times of the simulated engine; read where ``engine.kind`` is ``simulated``."""

    prefill_tokens_per_s: float = Field(default=4000.0, gt=0)
    """Prompt tokens that one replica computes in a second."""
    decode_step_s: tuple[tuple[float, float], ...] = ((1, 0.02), (16, 0.03), (64, 0.06))
    """Seconds of a decoding step by its rows (sequences and draft tokens); lines in between."""
    draft_acceptance: float = Field(default=0.7, ge=0, le=1)
    """Chance that a token of the draft pool is right if those before it are."""
    draft_batch_s: float = Field(default=0.004, ge=0)
    """Seconds of one call of the drafter, without its rows."""
    draft_row_s: float = Field(default=0.0002, ge=0)
    """Seconds of each row of an outcome table."""

    @model_validator(mode="after")
    def _points_rise(self) -> Self:
        rows = [row for row, _ in self.decode_step_s]
        seconds = [second for _, second in self.decode_step_s]
        if not rows or rows[0] < 1 or min(seconds) <= 0:
            raise ValueError("decode_step_s needs points of at least 1 row and over 0 s")
        if sorted(set(rows)) != rows or sorted(seconds) != seconds:
            raise ValueError("decode_step_s must rise, in rows and in seconds")
        return self


class EngineConfig(_Config):
    """What runs in a target replica."""

    kind: Literal["torch", "sglang", "simulated"] = "torch"
    """``torch`` is the embedded engine, ``sglang`` SGLang in an environment of its own (see
    ``sglang``). ``simulated`` computes nothing and writes words without sense in the time that
    ``simulated`` says: for tests of load and scaling alone. Settings of one engine alone are
    refused with the others."""
    model: str = DEFAULT_MODEL
    """The built-in model's name, a folder in Hugging Face layout, or a Hugging Face id."""
    served_model_name: str | None = None
    """The model id clients use; the last part of ``model`` by default."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic and KV precision. float32 is token-for-token reproducible across batch shapes."""
    weights: Literal["dense", "file", "int8", "int4"] = "dense"
    """``dense`` keeps one number of ``dtype`` per weight. ``file`` reads the Q4_1 and Q8_0 blocks
    of a GGUF file as they are, which is several times faster on a CPU; only where the processor
    multiplies bfloat16, long forwards use the dense values of the same blocks. ``int8`` and
    ``int4`` round the matrices of any checkpoint to such blocks when it is loaded; vocabulary
    matrices keep 8 bits."""
    deterministic: bool = False
    """The same seed gives the same text to the bit, in both dtypes, whatever the batch, chunks,
    caches, threads or drafts: one arithmetic computes every width. Prefill is slower where the
    processor multiplies bfloat16, or weights are dense; decoding is not. CPU only; models that the
    compiled kernels do not cover are refused."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where weights and pages live."""
    cuda_graphs: bool = True
    """Record the forwards that only decode and verify at the start, and replay them: on a GPU,
    launching their kernels one by one takes longer than running them. Has no effect on a CPU."""
    num_threads: int | None = Field(default=None, ge=1)
    """CPU threads of one replica's arithmetic. By default the replica's share of the machine: the
    whole CPUs that its pool asks for (``pools.target.num_cpus``), at least one."""
    max_model_len: int = Field(default=4096, ge=64)
    """Prompt and output tokens of one sequence, at most; never above the model's own limit or what
    ``num_pages`` hold."""
    num_pages: int = Field(default=256, ge=2)
    """Pages of 64 tokens in the replica's KV memory."""
    max_num_seqs: int = Field(default=16, ge=1)
    """Sequences decoded together, at most."""
    max_batch_tokens: int = Field(default=512, ge=64)
    """Token budget of one step; longer prefills are cut into chunks of at most this."""
    max_waiting: int = Field(default=128, ge=1)
    """Requests that may wait. When all places are taken, the tenant with the most of them loses its
    newest one to a tenant that has fewer; otherwise the newcomer is refused as overloaded."""
    kv_load_timeout_s: float = Field(default=1.0, gt=0)
    """How long a request waits for its prefix from the KV tier before it is computed instead."""
    speculation: SpeculationConfig = SpeculationConfig()
    """How drafts are used."""
    sglang: SGLangConfig = SGLangConfig()
    """SGLang's own settings."""
    simulated: SimulatedConfig = SimulatedConfig()
    """The simulated engine's own settings."""

    @model_validator(mode="after")
    def _of_one_engine(self) -> Self:
        if self.kind != "torch":
            for name in ("weights", "deterministic"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} is a setting of kind: torch")
        if self.kind != "sglang" and self.sglang != SGLangConfig():
            raise ValueError(f"sglang has settings, but kind is {self.kind}")
        if self.kind != "simulated" and self.simulated != SimulatedConfig():
            raise ValueError(f"simulated has settings, but kind is {self.kind}")
        return self

    @model_validator(mode="after")
    def _compiled_where_kernels_run(self) -> Self:
        if self.deterministic and self.device != "cpu":
            raise ValueError("deterministic arithmetic needs device: cpu")
        if self.weights in {"int8", "int4"} and self.device != "cpu":
            raise ValueError(f"weights: {self.weights} needs device: cpu")
        return self

    @property
    def takes_drafts(self) -> bool:
        """Whether the engine verifies drafts of the pool."""
        return self.speculation.enabled

    def context_length(self, max_positions: int) -> int:
        """Prompt and output tokens of one sequence, at most.

        Args:
            max_positions: the model's own limit.
        """
        longest = min(self.max_model_len, max_positions)
        if self.sglang.memory_fraction is not None:
            return longest
        return min(longest, self.num_pages * PAGE_TOKENS)


TorchEngineConfig = EngineConfig
