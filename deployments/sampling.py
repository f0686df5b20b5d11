"""Sampling parameters of both surfaces: their ranges live here and nowhere else."""

from __future__ import annotations

from secrets import randbits
from typing import TYPE_CHECKING, Annotated, NamedTuple, TypeVar

from pydantic import Field

from deployments.engine.types import SamplingParams
from deployments.errors import RequestInvalidError
from deployments.wire_model import WireModel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deployments.engine.types import StructuredOutput

T = TypeVar("T")

_SEED_MASK = (1 << 64) - 1
INT32_MAX = (1 << 31) - 1
_MIN_TEMPERATURE = 1e-5
"""Logits divided by less may overflow; the likeliest token has all the probability anyway."""

TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
BadWord = Annotated[str, Field(max_length=256, pattern=r"\S")]
Bias = Annotated[float, Field(ge=-100, le=100)]
NumLogprobs = Annotated[int, Field(ge=0, le=20)]
MAX_TPOT_TARGET_S = 60.0
TpotTarget = Annotated[float, Field(gt=0, le=MAX_TPOT_TARGET_S)]


class SamplingFields(WireModel):
    """What a client may say about sampling."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 is greedy, and so is less than 0.00001; 1 by default."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Nucleus: the likeliest tokens whose probabilities reach this sum."""
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    """The likeliest tokens only; 0 and -1 are off."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Tokens less likely than this part of the likeliest are dropped."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Subtracted from logits of tokens that occurred in the output."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Subtracted once per occurrence in the output."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=2)] | None = None
    """Divides the logits of tokens that occurred in prompt or output; 1 is off."""
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    """The same seed and request give the same text; drawn by the server when absent."""
    logit_bias: Annotated[dict[str, Bias], Field(max_length=1024)] | None = None
    """Token id -> value added to its logit."""
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    """Up to 4 strings that end the text; they are not part of it."""
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    """Token ids that end the text, besides the model's own."""
    ignore_eos: bool = False
    """Go on behind the model's end-of-text token."""
    min_tokens: Annotated[int, Field(ge=0, le=INT32_MAX)] = 0
    """Nothing may end the text before this many tokens."""
    bad_words: Annotated[list[BadWord], Field(max_length=256)] | None = None
    """Words that are never written, at least not in the tokens they are usually written in."""
    prompt_logprobs: NumLogprobs | None = None
    """Tell the log probability of each prompt token, and as many of the likeliest tokens."""

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives wanted with each output token, None for no log probabilities at all.

        Each surface has its own way to ask for them.
        """
        return None

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Alternatives wanted with each prompt token, None for no log probabilities at all."""
        return self.prompt_logprobs


class Constraints(NamedTuple):
    """What a call's texts must and must not be, as the engine wants it said."""

    structure: StructuredOutput | None = None
    bad_token_sequences: tuple[tuple[int, ...], ...] = ()


UNCONSTRAINED = Constraints()


def build_sampling_params(
    fields: SamplingFields,
    *,
    max_tokens: int | None,
    max_tokens_param: str,
    room: int,
    vocab_size: int,
    constraints: Constraints = UNCONSTRAINED,
) -> SamplingParams:
    """The engine's parameters for one prompt.

    Args:
        fields: validated ranges.
        max_tokens: as asked; None takes all the room.
        max_tokens_param: the name the client used for it.
        room: tokens that fit behind the prompt.
        vocab_size: ids from here on do not exist.
        constraints: of the call.

    Raises:
        RequestInvalidError: a rule that spans fields, or the model, is broken.
    """
    limit = room if max_tokens is None else min(max_tokens, room)
    if max_tokens is not None and fields.min_tokens > max_tokens:
        raise RequestInvalidError(
            f"min_tokens must not exceed {max_tokens_param}.", param="min_tokens"
        )
    bias = _parse_logit_bias(fields.logit_bias or {}, vocab_size)
    stop_token_ids = tuple(fields.stop_token_ids or ())
    _check_token_ids(stop_token_ids, vocab_size, "stop_token_ids")
    stop = (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop or ())
    seed = randbits(64) if fields.seed is None else fields.seed & _SEED_MASK
    temperature = _default(fields.temperature, 1.0)
    return SamplingParams(
        max_tokens=limit,
        seed=seed,
        temperature=temperature if temperature >= _MIN_TEMPERATURE else 0.0,
        top_k=max(0, _default(fields.top_k, 0)),
        top_p=_default(fields.top_p, 1.0),
        min_p=_default(fields.min_p, 0.0),
        repetition_penalty=_default(fields.repetition_penalty, 1.0),
        presence_penalty=_default(fields.presence_penalty, 0.0),
        frequency_penalty=_default(fields.frequency_penalty, 0.0),
        logit_bias=bias,
        stop_strings=stop,
        stop_token_ids=stop_token_ids,
        ignore_eos=fields.ignore_eos,
        min_tokens=min(fields.min_tokens, limit),
        num_logprobs=fields.num_logprobs,
        num_prompt_logprobs=fields.num_prompt_logprobs,
        structure=constraints.structure,
        bad_token_sequences=constraints.bad_token_sequences,
    )


def check_prompt_token_ids(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Refuse ids the model does not have.

    Raises:
        RequestInvalidError: an id is negative or not below ``vocab_size``.
    """
    _check_token_ids(token_ids, vocab_size, param)


def _default(value: T | None, default: T) -> T:
    return default if value is None else value


def _parse_logit_bias(bias: dict[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    pairs: dict[int, float] = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit()) or len(key) > 10:
            raise RequestInvalidError(
                "Invalid key in 'logit_bias': keys are token ids.", param="logit_bias"
            )
        pairs[int(key)] = value
    _check_token_ids(tuple(pairs), vocab_size, "logit_bias")
    return tuple(sorted(pairs.items()))


def _check_token_ids(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocab_size):
        raise RequestInvalidError(
            f"Invalid value for '{param}': token ids must be in [0, {vocab_size}).", param=param
        )
