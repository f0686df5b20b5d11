"""Token ids to text, piece by piece, without ever showing half a character or a stop string."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from deployments.engine.types import TokenDelta, TokenLogprob

_REPLACEMENT = "\ufffd"
_MAX_INCOMPLETE = 3
"""A UTF-8 character has at most 3 bytes before its last one."""
_CONTEXT_TOKENS = 4
"""Tokens decoded again with each new one: some decoders treat the first token of a text apart."""


class IncrementalDetokenizer:
    """Text of a growing token sequence; each push decodes a bounded window."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        """Start with nothing.

        Args:
            decode: token ids to text, broken UTF-8 as U+FFFD.
        """
        self._decode = decode
        self._window: list[int] = []
        self._shown = 0

    def push(self, token_id: int) -> str:
        """The text that one more token adds; empty while a character is incomplete."""
        self._window.append(token_id)
        text = self._decode(self._window)
        incomplete = len(text) - len(text.rstrip(_REPLACEMENT))
        stable = len(text) - min(incomplete, _MAX_INCOMPLETE)
        piece = text[self._shown : stable]
        self._shown = max(self._shown, stable)
        if len(self._window) > 2 * _CONTEXT_TOKENS and (
            not incomplete or len(self._window) > 8 * _CONTEXT_TOKENS
        ):
            self._forget(len(text) - self._shown)
        return piece

    def flush(self) -> str:
        """What is still held back, once no token follows."""
        text = self._decode(self._window)
        piece = text[self._shown :]
        self._shown = len(text)
        return piece

    def _forget(self, held: int) -> None:
        del self._window[:-_CONTEXT_TOKENS]
        self._shown = max(0, len(self._decode(self._window)) - held)


class StopStringCutter:
    """Holds back text that may become a stop string, and cuts the one that ended the output.

    The engine decides when the output stops (it knows ``min_tokens``); this class only makes sure
    that no part of the stop string was shown before.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stop_strings = tuple(stop_strings)
        self._held = ""

    def push(self, piece: str) -> str:
        """Text that can be shown after ``piece``."""
        if not self._stop_strings:
            return piece
        text = self._held + piece
        hold = max(_overlap(text, stop) for stop in self._stop_strings)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def finish(self, piece: str, stop_match: str | int | None) -> str:
        """The last text.

        Args:
            piece: text of the last token.
            stop_match: the stop string that ended the output, if one did.
        """
        text = self._held + piece
        self._held = ""
        if not isinstance(stop_match, str):
            return text
        # The match ends inside the last token's text; an earlier one was not meant to stop.
        start = max(0, len(text) - len(piece) - len(stop_match) + 1)
        at = text.find(stop_match, start)
        return text if at < 0 else text[:at]


class PlacedLogprob(NamedTuple):
    """A token's log probability, and where its text begins.

    Attributes:
        text_offset: characters of the output before the token's own.
    """

    logprob: TokenLogprob
    text_offset: int


class ShownText(NamedTuple):
    """What one delta makes visible.

    Attributes:
        logprobs: of the tokens whose text has begun to show, if they were asked for.
    """

    text: str
    logprobs: tuple[PlacedLogprob, ...]


class ChoiceText:
    """The text of one choice, from its token deltas.

    A token's log probability is shown together with the first character of its text: not before
    the character is complete, and never if a stop string hides it. Tokens without text (the rest
    of a broken character, special tokens) come with the text behind them, or at the end.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stop_strings: Sequence[str] = ()
    ) -> None:
        self._detokenizer = IncrementalDetokenizer(decode)
        self._cutter = StopStringCutter(stop_strings)
        self._held: deque[PlacedLogprob] = deque()
        self._num_decoded_chars = 0
        self._num_shown_chars = 0

    def push(self, delta: TokenDelta) -> ShownText:
        """What ``delta`` makes visible; all that is left when it is the last one."""
        pieces = [self._detokenizer.push(token) for token in delta.token_ids]
        self._hold(delta, pieces)
        *earlier, last = ["", *pieces]
        text = "".join(self._cutter.push(piece) for piece in earlier)
        if delta.finish_reason is None:
            text += self._cutter.push(last)
        else:
            text += self._cutter.finish(last + self._detokenizer.flush(), delta.stop_match)
        self._num_shown_chars += len(text)
        return ShownText(text, tuple(self._release(delta)))

    def _hold(self, delta: TokenDelta, pieces: Sequence[str]) -> None:
        if not delta.logprobs:
            return
        for logprob, piece in zip(delta.logprobs, pieces, strict=True):
            self._held.append(PlacedLogprob(logprob, self._num_decoded_chars))
            self._num_decoded_chars += len(piece)

    def _release(self, delta: TokenDelta) -> Iterator[PlacedLogprob]:
        is_all_shown = delta.finish_reason is not None and not isinstance(delta.stop_match, str)
        while self._held and (is_all_shown or self._held[0].text_offset < self._num_shown_chars):
            yield self._held.popleft()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
