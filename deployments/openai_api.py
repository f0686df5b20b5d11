"""OpenAI's request bodies as this server accepts them.

Types are strict, unknown fields are refused by name, and a parameter of the public API that is not
implemented here is accepted at its default and refused at any other value, so that no client is
ever answered as if something it asked for had been done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar

import orjson
from pydantic import Field

from deployments.engine.embedding import Pooling
from deployments.errors import RequestInvalidError
from deployments.openai_structure import (
    ResponseFormat,
    StructuredOutputs,
    requested_structure,
)
from deployments.sampling import INT32_MAX, NumLogprobs, SamplingFields, TokenId, TpotTarget
from deployments.wire_model import WireModel, validate

if TYPE_CHECKING:
    from deployments.engine.types import StructuredOutput

R = TypeVar("R", bound=WireModel)

TokenIds = Annotated[list[TokenId], Field(min_length=1)]
MaxTokens = Annotated[int, Field(ge=1, le=INT32_MAX)]

_UNIMPLEMENTED: dict[str, tuple[object, ...]] = {
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "web_search_options": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "verbosity": ("medium",),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "dimensions": (),
}
"""Of requests; see ``WireModel.unimplemented``."""

_UNIMPLEMENTED_IN_MESSAGES: dict[str, tuple[object, ...]] = {
    "refusal": ("",),
    "annotations": ([],),
    "audio": (),
    "tool_calls": ([],),
    "function_call": (),
    "tool_call_id": (),
}

_IGNORED = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})
"""Labels for the provider's own records; they never change an answer."""


class TextPart(WireModel):
    """One part of a message; only text is understood."""

    type: Literal["text"]
    """The part's kind."""
    text: str
    """Its text."""


class Message(WireModel):
    """One turn of a conversation; an answer of this server can be sent back as it is."""

    unimplemented = _UNIMPLEMENTED_IN_MESSAGES

    role: Literal["system", "developer", "user", "assistant"]
    """Who speaks."""
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    """What is said."""
    name: str | None = None
    """Accepted for compatibility; chat templates of text models do not show it."""

    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class StreamOptions(WireModel):
    """What a stream carries besides text."""

    include_usage: bool = False
    """Send one more chunk, without choices, that carries the usage."""
    include_obfuscation: bool = False
    """Accepted for compatibility; no padding is sent."""


class OpenAIRequest(SamplingFields):
    """What chat and plain completions share."""

    unimplemented = _UNIMPLEMENTED

    model: Annotated[str, Field(min_length=1, max_length=256)]
    """The served model's id."""
    n: Annotated[int, Field(ge=1, le=8)] | None = None
    """Choices per prompt; 1 by default."""
    stream: bool | None = None
    """Answer with server-sent events."""
    stream_options: StreamOptions | None = None
    """Only together with ``stream``."""
    speculation: bool = True
    """Let draft tokens be verified; the text is the same either way."""
    tpot_target_s: TpotTarget | None = None
    """Seconds per output token, at most: drafts of any request are verified only as far as this
    one's steps stay that short. The text is the same either way."""
    max_tokens: MaxTokens | None = None
    """Output tokens, at most."""
    response_format: ResponseFormat | None = None
    """The form of the text: JSON, or JSON of a schema."""
    structured_outputs: StructuredOutputs | None = None
    """The form of the text in vLLM's words, which know more forms."""

    @property
    def output_limit(self) -> tuple[int | None, str]:
        """The limit and the name the client gave it.

        Raises:
            RequestInvalidError: it was given twice.
        """
        return self.max_tokens, "max_tokens"

    @property
    def structure(self) -> StructuredOutput | None:
        """The form asked for.

        Raises:
            RequestInvalidError: it was asked for twice, or wrongly.
        """
        return requested_structure(self.response_format, self.structured_outputs)


class ChatCompletionRequest(OpenAIRequest):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    """The conversation so far."""
    max_completion_tokens: MaxTokens | None = None
    """Output tokens, at most; the newer name of ``max_tokens``."""
    logprobs: bool | None = None
    """Tell the log probability of each output token."""
    top_logprobs: NumLogprobs | None = None
    """And those of this many of the likeliest tokens at its place."""

    @property
    def num_logprobs(self) -> int | None:
        """See ``SamplingFields``.

        Raises:
            RequestInvalidError: alternatives were asked for without log probabilities.
        """
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs:
            raise RequestInvalidError(
                "'top_logprobs' is only allowed when 'logprobs' is true.", param="top_logprobs"
            )
        return None

    @property
    def output_limit(self) -> tuple[int | None, str]:
        """See ``OpenAIRequest``; here it has two names.

        Raises:
            RequestInvalidError: both names were used.
        """
        if self.max_completion_tokens is None:
            return super().output_limit
        if self.max_tokens is not None:
            raise RequestInvalidError(
                "'max_tokens' and 'max_completion_tokens' cannot both be set.", param="max_tokens"
            )
        return self.max_completion_tokens, "max_completion_tokens"


class CompletionRequest(OpenAIRequest):
    """``POST /v1/completions``."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=64)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=64)]
    )
    """Text or token ids, one prompt or several."""
    max_tokens: Annotated[int, Field(ge=0, le=INT32_MAX)] = 16
    """Output tokens, at most; 0 tells about the prompt alone."""
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    """Tell the log probability of each token, and those of this many of the likeliest."""
    echo: bool | None = None
    """Begin the text with the prompt, whose tokens then have log probabilities as well."""

    @property
    def num_logprobs(self) -> int | None:
        """See ``SamplingFields``."""
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        """See ``SamplingFields``; the larger number if both ways were used."""
        asked = (self.prompt_logprobs, self.logprobs if self.echo else None)
        return max((number for number in asked if number is not None), default=None)

    def prompts(self) -> list[str | list[int]]:
        """Every prompt, in order."""
        return _texts(self.prompt)


class EmbeddingCall(NamedTuple):
    """Texts to embed, whichever surface they came from.

    Attributes:
        inputs: texts or token ids.
        param: the client's name for ``inputs``.
    """

    inputs: list[str | list[int]]
    pooling: Pooling
    normalize: bool
    param: str


class EmbeddingsRequest(WireModel):
    """``POST /v1/embeddings``. Vectors have the model's hidden size; ``dimensions`` is refused."""

    unimplemented = _UNIMPLEMENTED

    model: Annotated[str, Field(min_length=1, max_length=256)]
    """The served model's id."""
    input: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[TokenIds], Field(min_length=1)]
    )
    """Text or token ids, one input or several."""
    encoding_format: Literal["float", "base64"] = "float"
    """Numbers, or little-endian float32 in base64."""
    pooling: Literal["mean", "last"] = "mean"
    """Vector of a text: the mean of its tokens' final hidden states, or the last one."""
    normalize: bool = True
    """Scale vectors to length 1."""

    def call(self) -> EmbeddingCall:
        """What is asked for."""
        pooling = Pooling(self.pooling)
        return EmbeddingCall(_texts(self.input), pooling, self.normalize, param="input")


def _texts(value: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    # Items have one type, as validated, and there is at least one.
    if isinstance(value, str) or isinstance(value[0], int):
        return [value]
    return [*value]


def parse_body(body: bytes, model: type[R]) -> R:
    """Parse and validate one request body.

    Raises:
        RequestInvalidError: not JSON, not an object, or a field is wrong (named in ``param``).
        UnsupportedParameterError: a known parameter that is not implemented was set.
    """
    try:
        data: Any = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestInvalidError("The request body is not valid JSON.") from error
    if not isinstance(data, dict):
        raise RequestInvalidError("The request body must be a JSON object.")
    request = validate(model, {key: value for key, value in data.items() if key not in _IGNORED})
    if (
        isinstance(request, OpenAIRequest)
        and request.stream_options is not None
        and not request.stream
    ):
        raise RequestInvalidError(
            "'stream_options' is only allowed when 'stream' is true.", param="stream_options"
        )
    return request
