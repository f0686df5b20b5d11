"""Token ids to text, piece by piece, without ever showing half a character.

Engine and ingress read an output with the same pieces: what one of them takes for the text of the
last token is so for the other, and a stop string that the engine finds in it can be cut off there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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
