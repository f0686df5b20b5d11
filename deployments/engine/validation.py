"""Refuses requests that this engine can never serve, in words a client understands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deployments.engine.errors import RequestRejectedError
from deployments.engine.types import FINAL_NORM

if TYPE_CHECKING:
    from collections.abc import Iterable

    from deployments.engine.types import GenerationRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """What the engine must know of the model it serves.

    Attributes:
        max_model_len: prompt and output tokens of one sequence, at most: the least of what the
            model, the configuration and the page pool allow.
        eos_token_ids: tokens that end an output unless the request ignores them.
        num_layers: of the model, for requests that want hidden states.
    """

    vocab_size: int
    max_model_len: int
    eos_token_ids: frozenset[int]
    num_layers: int = 0

    def max_output_tokens(self, request: GenerationRequest) -> int:
        """Output tokens the request may have: what it asks for, or what the context leaves."""
        room = self.max_model_len - len(request.prompt_token_ids)
        return min(request.sampling.max_tokens, room)

    def stop_token_ids(self, request: GenerationRequest) -> frozenset[int]:
        """Tokens that end the request's output."""
        eos = frozenset[int]() if request.sampling.ignore_eos else self.eos_token_ids
        return eos | frozenset(request.sampling.stop_token_ids)


def validate_request(request: GenerationRequest, limits: ModelLimits) -> None:
    """Check everything that depends on the model.

    Raises:
        RequestRejectedError: with the request field at fault.
    """
    num_prompt_tokens = len(request.prompt_token_ids)
    if not num_prompt_tokens:
        raise RequestRejectedError("The prompt has no tokens.", "prompt")
    num_least = min(1, request.sampling.max_tokens)
    if num_prompt_tokens + num_least > limits.max_model_len:
        raise RequestRejectedError(
            f"This model's maximum context length is {limits.max_model_len} tokens, of which "
            f"{num_least} must be left for the output. However, the prompt has "
            f"{num_prompt_tokens} tokens. Please shorten it.",
            "prompt",
        )
    if request.sampling.max_tokens < 0:
        raise RequestRejectedError("max_tokens must not be negative.", "max_tokens")
    if len(request.resumed_output_ids) > limits.max_output_tokens(request):
        raise RequestRejectedError(
            "The resumed output is longer than max_tokens allows.", "resumed_output_ids"
        )
    _check_tokens(request.prompt_token_ids, limits, "prompt")
    _check_tokens(request.resumed_output_ids, limits, "resumed_output_ids")
    _check_tokens((token for token, _ in request.sampling.logit_bias), limits, "logit_bias")
    _check_tokens(request.sampling.stop_token_ids, limits, "stop_token_ids")
    for sequence in request.sampling.bad_token_sequences:
        if not sequence:
            raise RequestRejectedError("A bad word has no tokens.", "bad_words")
        _check_tokens(sequence, limits, "bad_words")
    if request.capture is not None:
        _check_layers(request.capture.layers, limits.num_layers)


def _check_layers(layers: tuple[int, ...], num_layers: int) -> None:
    if not layers or len(set(layers)) != len(layers):
        raise RequestRejectedError("capture.layers must name layers, each once.", "capture.layers")
    for layer in layers:
        if not FINAL_NORM <= layer <= num_layers:
            raise RequestRejectedError(
                f"Layer {layer} cannot be captured: this model has {num_layers} layers.",
                "capture.layers",
            )


def _check_tokens(token_ids: Iterable[int], limits: ModelLimits, param: str) -> None:
    for token in token_ids:
        if not 0 <= token < limits.vocab_size:
            raise RequestRejectedError(
                f"Token id {token} in {param} is out of range: this model has "
                f"{limits.vocab_size} tokens.",
                param,
            )
