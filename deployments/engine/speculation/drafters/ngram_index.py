"""Where has this suffix occurred before? An index over one growing text.

Every position is filed under the n-grams that end there, for a few n. Positions of equal n-grams
form a chain from the newest backwards, so adding a token and looking one up both cost O(1). Hash
collisions are harmless: a candidate counts for the suffix it really shares.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MAX_MATCH_TOKENS = 32
_MAX_CANDIDATES = 8
_NONE = -1


class Match(NamedTuple):
    """An earlier occurrence of a suffix.

    Attributes:
        num_matched: tokens shared with the suffix, at most MAX_MATCH_TOKENS.
        position: index of the token that followed there.
    """

    num_matched: int
    position: int


class NgramIndex:
    """One text of bounded length.

    Args:
        min_match_tokens: n of the shortest n-grams; longer ones are two and four times that.
        max_tokens: text kept. Beyond it the older half is forgotten at once, which keeps the
            cost per token constant.
    """

    def __init__(self, *, min_match_tokens: int, max_tokens: int) -> None:
        self._sizes = (4 * min_match_tokens, 2 * min_match_tokens, min_match_tokens)
        self._max_tokens = max_tokens
        self._clear()

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, token_ids: Iterable[int]) -> None:
        """Append to the text."""
        for token in token_ids:
            if len(self._tokens) >= self._max_tokens:
                kept = self._tokens[-self._max_tokens // 2 :]
                self._clear()
                self.extend(kept)
            self._tokens.append(token)
            end = len(self._tokens)
            for size, newest, older in zip(self._sizes, self._newest, self._older, strict=True):
                previous = _NONE
                if end >= size:
                    key = hash(tuple(self._tokens[end - size :]))
                    previous = newest.get(key, _NONE)
                    newest[key] = end
                older.append(previous)

    def matches(self, suffix: Sequence[int]) -> list[Match]:
        """Earlier occurrences of the longest indexed n-gram that ends ``suffix``.

        Args:
            suffix: the end of a text, this one's or another's.

        Returns:
            The newest few that something follows; longest match first, then newest.
        """
        for size, newest, older in zip(self._sizes, self._newest, self._older, strict=True):
            if len(suffix) < size:
                continue
            position = newest.get(hash(tuple(suffix[-size:])), _NONE)
            found: list[Match] = []
            for _ in range(_MAX_CANDIDATES):
                if position == _NONE:
                    break
                if position < len(self._tokens):
                    num_matched = self._shared(suffix, position)
                    if num_matched >= size:
                        found.append(Match(num_matched, position))
                position = older[position - 1]
            if found:
                return sorted(found, reverse=True)
        return []

    def continuation(self, position: int, num_tokens: int) -> tuple[int, ...]:
        """The text from ``position`` on; behind its end it repeats, as a loop in the text would."""
        found = self._tokens[position : position + num_tokens]
        period = len(found)
        return tuple(found[index % period] for index in range(num_tokens))

    def _shared(self, suffix: Sequence[int], position: int) -> int:
        tokens = self._tokens
        limit = min(len(suffix), position, MAX_MATCH_TOKENS)
        for back in range(1, limit + 1):
            if suffix[-back] != tokens[position - back]:
                return back - 1
        return limit

    def _clear(self) -> None:
        self._tokens: list[int] = []
        self._newest: tuple[dict[int, int], ...] = tuple({} for _ in self._sizes)
        self._older: tuple[list[int], ...] = tuple([] for _ in self._sizes)
