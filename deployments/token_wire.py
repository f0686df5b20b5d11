"""What an ingress and a target replica say to each other on a direct stream.

A line a message: one byte for its kind, then its fields as a JSON array. JSON because it needs no
second description of the engine's types, tells every float exactly, and runs nothing that a peer
sends. Decoding checks every field's type.
"""

# No deferred annotations: pydantic reads them when an adapter is made.

from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import ConfigDict, TypeAdapter, ValidationError

from deployments.engine import errors
from deployments.engine.types import (
    FinishReason,
    GenerationRequest,
    GenerationUsage,
    SpeculationStats,
    TokenDelta,
    TokenLogprob,
)

VERSION = 1
"""Both ends must speak the same one."""
MAX_LINE_BYTES = 64 * 1024 * 1024
"""The longest prompt, in tokens, has room."""


class WireError(Exception):
    """A peer sent something that is no message."""


class Hello(NamedTuple):
    """The ingress's first message."""

    version: int
    key: str


class Start(NamedTuple):
    """Generate.

    Attributes:
        stream: that answers name; unique on its connection.
        max_running: the target refuses if it runs as many already.
    """

    stream: int
    max_running: int
    request: GenerationRequest


class Cancel(NamedTuple):
    """Nobody waits for a stream any more."""

    stream: int


class Welcome(NamedTuple):
    """The target's first message."""

    version: int
    replica_id: str


class Admission(NamedTuple):
    """Whether a stream is taken; the first answer to ``Start``.

    Attributes:
        num_running: streams that the target runs, this one included if it is taken; at least
            ``max_running`` if it takes none.
    """

    stream: int
    is_accepted: bool
    num_running: int


class Delta(NamedTuple):
    """See ``TokenDelta``; what the ingress knows already is left out."""

    stream: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_match: int | str | None = None
    usage: GenerationUsage | None = None
    speculation: SpeculationStats | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


class Failure(NamedTuple):
    """A stream ended in an error.

    Attributes:
        error: an engine error's class; any other one's is a fault of the target.
        arguments: of an engine error.
    """

    stream: int
    error: str
    arguments: tuple[str | float | None, ...]


Message = Hello | Start | Cancel | Welcome | Admission | Delta | Failure

_CONFIG = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64", ser_json_inf_nan="constants")
_KINDS: dict[bytes, type[Message]] = {
    b"h": Hello,
    b"s": Start,
    b"c": Cancel,
    b"w": Welcome,
    b"a": Admission,
    b"d": Delta,
    b"f": Failure,
}
_ADAPTERS: dict[bytes, TypeAdapter[Any]] = {
    kind: TypeAdapter(message, config=_CONFIG) for kind, message in _KINDS.items()
}
_ENCODERS = {message: (kind, _ADAPTERS[kind].dump_json, b"\n") for kind, message in _KINDS.items()}
_ENGINE_ERRORS = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.EngineError)
}


def encode(message: Message) -> bytes:
    """One line."""
    kind, dump, end = _ENCODERS[type(message)]
    return kind + dump(message) + end


def decode(line: bytes) -> Message:
    """The message of a line without its end.

    Raises:
        WireError: it holds none.
    """
    adapter = _ADAPTERS.get(line[:1])
    if adapter is None:
        raise WireError("a message of an unknown kind")
    try:
        message: Message = adapter.validate_json(line[1:])
    except ValidationError as error:
        # Its own text would tell what was sent.
        kind = _KINDS[line[:1]].__name__
        raise WireError(f"a {kind} with {error.error_count()} errors") from None
    return message


class MessageReader:
    """Cuts what comes from a peer into messages.

    Args:
        max_line_bytes: of a message whose end has not come.
    """

    def __init__(self, max_line_bytes: int) -> None:
        self.max_line_bytes = max_line_bytes
        self._parts: list[bytes] = []
        self._num_bytes = 0

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that ``data`` completes.

        Raises:
            WireError: there is something else among them.
        """
        first, *others = data.split(b"\n")
        self._keep(first)
        for part in others:
            # A long prompt comes in many pieces: they are put together once.
            yield decode(b"".join(self._parts))
            self._parts, self._num_bytes = [], 0
            self._keep(part)

    def _keep(self, part: bytes) -> None:
        self._num_bytes += len(part)
        if self._num_bytes > self.max_line_bytes:
            raise WireError("a line too long")
        self._parts.append(part)


def to_wire(stream: int, delta: TokenDelta) -> Delta:
    """A delta of one stream. Hidden states do not travel this way."""
    return Delta(
        stream,
        delta.token_ids,
        delta.finish_reason,
        delta.stop_match,
        delta.usage,
        delta.speculation,
        delta.logprobs,
        delta.prompt_logprobs,
    )


def named_delta(request: GenerationRequest, replica_id: str) -> TokenDelta:
    """A stream's first delta, which only tells whose it is."""
    return TokenDelta(
        request_id=request.request_id,
        token_ids=(),
        choice_index=request.choice_index,
        replica_id=replica_id,
    )


def from_wire(message: Delta, request: GenerationRequest, replica_id: str) -> TokenDelta:
    """The delta of a request."""
    return TokenDelta(
        request_id=request.request_id,
        token_ids=message.token_ids,
        choice_index=request.choice_index,
        finish_reason=message.finish_reason,
        stop_match=message.stop_match,
        usage=message.usage,
        speculation=message.speculation,
        replica_id=replica_id,
        logprobs=message.logprobs,
        prompt_logprobs=message.prompt_logprobs,
    )


def failure_of(stream: int, error: Exception) -> Failure:
    """How an error travels."""
    name = type(error).__name__
    if _ENGINE_ERRORS.get(name) is type(error):
        return Failure(stream, name, error.args)
    return Failure(stream, name, (str(error),))


def error_of(failure: Failure) -> Exception:
    """What was raised, or a ``RuntimeError`` for what is no engine's error."""
    kind = _ENGINE_ERRORS.get(failure.error)
    if kind is None:
        text = ", ".join(map(str, failure.arguments))
        return RuntimeError(f"the target failed: {failure.error}: {text}")
    try:
        return kind(*failure.arguments)
    except TypeError:
        return RuntimeError(f"the target failed: {failure.error}")
