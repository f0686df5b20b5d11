"""Log probabilities in OpenAI's two shapes, and in vLLM's for prompts."""

from __future__ import annotations

from codecs import getincrementaldecoder
from typing import TYPE_CHECKING, Any

from deployments.token_bytes import printed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from deployments.choice_text import PlacedLogprob
    from deployments.engine.types import TokenLogprob

    BytesOf = Callable[[int], bytes]

_LEAST = -9999.0
"""Stands for a token the model excludes, because JSON has no infinity."""


def chat_logprobs(placed: Iterable[PlacedLogprob], bytes_of: BytesOf) -> dict[str, Any]:
    """``choices[].logprobs`` of a chat completion or of one of its chunks.

    Args:
        placed: tokens of the message.
        bytes_of: the bytes a token id stands for.
    """

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = bytes_of(token_id)
        return {"token": printed(data), "logprob": _finite(logprob), "bytes": list(data)}

    content = [
        entry(logprob.token_id, logprob.logprob)
        | {"top_logprobs": [entry(*alternative) for alternative in logprob.top]}
        for logprob, _ in placed
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """``choices[].logprobs`` of a plain completion or of one of its chunks: lists side by side."""

    def __init__(self, bytes_of: BytesOf) -> None:
        self._bytes_of = bytes_of
        self._tokens: list[str] = []
        self._token_logprobs: list[float | None] = []
        self._top_logprobs: list[dict[str, float] | None] = []
        self._text_offset: list[int] = []

    def add(
        self, token_id: int, logprob: TokenLogprob | None, text_offset: int, num_top: int
    ) -> None:
        """Append one token.

        Args:
            token_id: the token.
            logprob: None for the first token of a prompt.
            text_offset: characters of the choice's text before the token.
            num_top: alternatives to show; the token itself is shown with them in any case.
        """
        self._tokens.append(self._name(token_id))
        self._text_offset.append(text_offset)
        if logprob is None:
            self._token_logprobs.append(None)
            self._top_logprobs.append(None)
            return
        shown = (*logprob.top[:num_top], (token_id, logprob.logprob))
        self._token_logprobs.append(_finite(logprob.logprob))
        self._top_logprobs.append({self._name(token): _finite(value) for token, value in shown})

    def body(self) -> dict[str, Any]:
        """The lists."""
        return {
            "tokens": self._tokens,
            "token_logprobs": self._token_logprobs,
            "top_logprobs": self._top_logprobs,
            "text_offset": self._text_offset,
        }

    def _name(self, token_id: int) -> str:
        data = self._bytes_of(token_id)
        name = printed(data)
        return name if name.encode() == data else f"bytes:{name}"


def prompt_logprobs(
    logprobs: Sequence[TokenLogprob | None], num_top: int, bytes_of: BytesOf
) -> list[dict[str, Any] | None]:
    """Shape ``prompt_logprobs`` as vLLM does: per token its alternatives and itself, by token id.

    Args:
        logprobs: one per prompt token, None for the first.
        num_top: alternatives to show.
        bytes_of: the bytes a token id stands for.
    """

    def entry(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        token = printed(bytes_of(token_id))
        return {"logprob": _finite(logprob), "rank": rank, "decoded_token": token}

    def position(own: TokenLogprob) -> dict[str, Any]:
        alternatives = {
            str(token_id): entry(token_id, logprob, rank)
            for rank, (token_id, logprob) in enumerate(own.top[:num_top], 1)
        }
        return alternatives | {str(own.token_id): entry(own.token_id, own.logprob, own.rank)}

    return [None if own is None else position(own) for own in logprobs]


def prompt_text(token_ids: Iterable[int], bytes_of: BytesOf) -> str:
    """The text of a prompt that was given in token ids, special tokens by their names."""
    return b"".join(map(bytes_of, token_ids)).decode(errors="replace")


def prompt_offsets(token_ids: Iterable[int], text: str, bytes_of: BytesOf) -> list[int]:
    """Where each token of a prompt begins in the prompt's text.

    Tokens that the tokenizer itself put before the text begin at 0.
    """
    decoder = getincrementaldecoder("utf-8")("replace")
    offsets: list[int] = []
    num_chars = 0
    for token_id in token_ids:
        offsets.append(num_chars)
        num_chars += len(decoder.decode(bytes_of(token_id)))
    num_added_chars = num_chars - len(text)
    return [max(0, offset - num_added_chars) for offset in offsets]


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
