"""The text of one choice as it grows, without ever showing half a character or a stop string."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from deployments.engine.detokenizer import IncrementalDetokenizer
from deployments.engine.stopping import find_completed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from deployments.engine.types import TokenDelta, TokenLogprob


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
        at = find_completed(text, stop_match, len(text) - len(piece))
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
