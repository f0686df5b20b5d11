"""The engine seam's vocabulary: what goes in and what comes out, in token ids."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FINAL_NORM = -1
"""The place behind the final norm, among the places where hidden states can be taken."""


class FinishReason(StrEnum):
    """Why a generation ended without an error."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class StructureKind(StrEnum):
    """What the text of a ``StructuredOutput`` means."""

    JSON_SCHEMA = "json_schema"
    """A JSON schema."""
    JSON_OBJECT = "json_object"
    """Nothing: any JSON object will do."""
    REGEX = "regex"
    """A regular expression that the whole output matches."""
    CHOICE = "choice"
    """A JSON array of strings, one of which is the output."""
    GRAMMAR = "grammar"
    """A context-free grammar, as Lark or GBNF writes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutput:
    """The form an output must have.

    Attributes:
        text: what ``kind`` says.
        param: the client's name of the field, for errors.
    """

    kind: StructureKind
    text: str
    param: str = "structured_outputs"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. Ranges are checked by the surfaces before this is built.

    Attributes:
        max_tokens: output tokens at most, counting ``resumed_output_ids``; 0 ends the request, with
            the finish reason ``length``, behind its prompt.
        seed: 64-bit, unsigned; drawn by the ingress when the client gave none.
        temperature: 0 means greedy.
        top_k: 0 means off.
        repetition_penalty: over prompt and output (Hugging Face's form); 1 means off.
        presence_penalty: over output only (OpenAI's form); 0 means off.
        frequency_penalty: over output only (OpenAI's form); 0 means off.
        logit_bias: (token id, bias) pairs, added to the raw logits.
        stop_strings: the output ends with the token that completes one of these.
        min_tokens: no stop token or stop string may end the output before this many tokens.
        num_logprobs: likeliest tokens to tell beside each output token's own log probability; None
            tells nothing.
        num_prompt_logprobs: the same for the prompt's tokens.
        structure: the form of the output; it ends, with the finish reason ``stop``, where nothing
            more may follow, even before ``min_tokens``.
        bad_token_sequences: the output never contains one of these.
    """

    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    structure: StructuredOutput | None = None
    bad_token_sequences: tuple[tuple[int, ...], ...] = ()

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureSpec:
    """Hidden states to deliver with the output.

    Row i is the state of token i, from which token i + 1 follows. Output tokens come with the rows
    that they were chosen from, one each, in order; with speculation too, where only the rows of
    accepted tokens are delivered. The last output token is not computed and has no row.

    Attributes:
        layers: i is the residual stream that enters layer i, the number of layers the stream behind
            the last one, ``FINAL_NORM`` what the head sees. At least one, no two the same.
        includes_prompt: deliver also the rows before the first new token's. They are computed for
            this request even where their pages are cached.
    """

    layers: tuple[int, ...]
    includes_prompt: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenStates:
    """Hidden states of consecutive tokens.

    Attributes:
        first_row: index of the first one's token in the text, prompt included.
        values: [layers, rows, hidden size] float32, layers in the order of ``CaptureSpec.layers``.
    """

    first_row: int
    values: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One sequence to generate.

    Attributes:
        request_id: unique per (client request, choice).
        resumed_output_ids: output already delivered by a replica that died; generation goes on
            behind it and only new tokens are delivered.
        tenant_key: 32 secret bytes; pages of two keys are never shared.
        priority: lower runs first.
        deadline: seconds since the epoch, or None for no deadline.
        traceparent: W3C trace context of the caller.
        tpot_target_s: seconds per output token, at most, as far as the choice of drafts can help;
            the text does not depend on it.
        avoid_replicas: target replicas the router should not choose (they failed this request).
        capture: hidden states to deliver.
        num_tier_pages: leading pages that the KV tier has. Those behind them are queued for it
            even where this replica had them before; None queues only what it computes.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    choice_index: int = 0
    resumed_output_ids: tuple[int, ...] = ()
    tenant: str = "default"
    tenant_key: bytes = field(default=bytes(32), repr=False)
    priority: int = 0
    deadline: float | None = None
    traceparent: str | None = None
    speculation: bool = True
    tpot_target_s: float | None = None
    avoid_replicas: tuple[str, ...] = ()
    capture: CaptureSpec | None = None
    num_tier_pages: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefilled:
    """What became of a prompt that was computed for another replica.

    Attributes:
        num_prompt_tokens: of its full pages.
        num_cached_tokens: those of them that were not computed for it.
        num_shared_tokens: leading ones whose pages every replica finds in the KV tier now.
    """

    num_prompt_tokens: int
    num_cached_tokens: int = 0
    num_shared_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationStats:
    """Draft tokens of one request, by outcome.

    Attributes:
        num_spec_steps: verification steps that carried at least one draft token.
        num_draft_tokens: draft tokens verified.
        num_accepted_draft_tokens: draft tokens that became output.
        num_accepted_pool_tokens: those of them that came from the draft pool.
        num_accepted_head_tokens: those that came from the head beside the model.
        num_table_hits: steps whose draft came from an outcome table of the pool.
        num_table_misses: steps for which the pool was asked and no fitting row was at hand.
        acceptance_histogram: entry i counts the spec steps that accepted i draft tokens.
    """

    num_spec_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0
    num_accepted_pool_tokens: int = 0
    num_accepted_head_tokens: int = 0
    num_table_hits: int = 0
    num_table_misses: int = 0
    acceptance_histogram: tuple[int, ...] = ()

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens gained per spec step, the bonus token included; 1.0 when nothing was drafted."""
        if not self.num_spec_steps:
            return 1.0
        return 1.0 + self.num_accepted_draft_tokens / self.num_spec_steps


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationUsage:
    """Token counts of one finished generation.

    Attributes:
        num_cached_tokens: prompt tokens whose KV was not computed for this request.
        num_tier_cached_tokens: those of them whose pages came from the KV tier.
    """

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int = 0
    num_tier_cached_tokens: int = 0


class TokenLogprob(NamedTuple):
    """How likely the model found one token at its place.

    Log probabilities are those of the model itself: the log-softmax of its raw logits, before
    biases, penalties, temperature and filters (vLLM's ``raw_logprobs``). They therefore do not
    depend on how the token was chosen, and are the same with and without speculation, up to the
    rounding of the model's arithmetic.

    Attributes:
        logprob: natural logarithm; ``-inf`` for a token the model excludes.
        rank: 1 for the likeliest token; the number of likelier tokens plus one; 0 where the engine
            does not tell.
        top: (token id, log probability) of the likeliest tokens, best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenDelta:
    """New output tokens of one request; the last one has a finish reason.

    Attributes:
        token_ids: committed tokens, in order; empty only in a terminal delta, or before the first
            token in one that carries hidden states of the prompt.
        finish_reason: set exactly once, on the last delta.
        stop_match: the stop string or stop token id that ended the output.
        usage: on the last delta.
        speculation: on the last delta.
        replica_id: who produced it; set by the target deployment.
        logprobs: one per token, if they were asked for.
        prompt_logprobs: one per prompt token, None for the first, if they were asked for; on the
            first delta with tokens (or the last, if none has any), so a request that resumes output
            gets none.
        hidden_states: the next rows, if the request asked for them.
    """

    request_id: str
    token_ids: tuple[int, ...]
    choice_index: int = 0
    finish_reason: FinishReason | None = None
    stop_match: str | int | None = None
    usage: GenerationUsage | None = None
    speculation: SpeculationStats | None = None
    replica_id: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    hidden_states: HiddenStates | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot of one engine; counters count since the start.

    Attributes:
        num_free_pages: pages that a new request could take, cached-but-unused ones included.
        num_backlog_tokens: prompt tokens still to compute, of requests that wait or prefill.
        num_recomputed_tokens: tokens computed again because their sequence had been preempted.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_total_pages: int = 0
    num_free_pages: int = 0
    num_backlog_tokens: int = 0
    num_preemptions: int = 0
    num_recomputed_tokens: int = 0
    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_local_cached_tokens: int = 0
    num_tier_cached_tokens: int = 0
    step_time_ewma_s: float = 0.0
    speculation: SpeculationStats = field(default_factory=SpeculationStats)
