"""When an output ends: stop tokens, stop strings, its structure, the length limit; token by token.

Everything here is a function of the output tokens alone, fed one by one. How many tokens a step
commits together therefore cannot change where an output ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from deployments.engine.detokenizer import IncrementalDetokenizer
from deployments.engine.types import FinishReason

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True, slots=True)
class Stop:
    """The end of an output."""

    reason: FinishReason
    match: str | int | None = None


class Structure(Protocol):
    """The form of an output, as far as its end depends on it."""

    def advance(self, token_id: int) -> bool:
        """Add the next output token; whether nothing may follow it."""


class StopStringMatcher:
    """Finds the first stop string in a growing text."""

    def __init__(
        self, stop_strings: Sequence[str], detokenize: Callable[[Sequence[int]], str]
    ) -> None:
        self._stop_strings = [string for string in stop_strings if string]
        self._detokenizer = IncrementalDetokenizer(detokenize)
        self._num_kept_chars = max(map(len, self._stop_strings), default=1) - 1
        self._tail = ""

    def append(self, token_id: int) -> str | None:
        """Add a token; return the stop string that it completes, if any.

        Of several completed at once the one that starts first is returned, then the longest.
        """
        num_old_chars = len(self._tail)
        text = self._tail + self._detokenizer.push(token_id)
        self._tail = text[max(0, len(text) - self._num_kept_chars) :]
        found = []
        for string in self._stop_strings:
            # Only what this token completes: an earlier match may have been too early to count.
            start = find_completed(text, string, num_old_chars)
            if start >= 0:
                found.append((start, -len(string), string))
        return min(found)[2] if found else None


def find_completed(text: str, string: str, num_old_chars: int) -> int:
    """Where ``string`` first stands in ``text`` so that it was not yet whole in the old part.

    Args:
        text: what was there before, then what is new.
        string: not empty.
        num_old_chars: length of what was there before.

    Returns:
        Its start; -1 if it does not stand there.
    """
    return text.find(string, max(0, num_old_chars - len(string) + 1))


class StopCondition:
    """Decides, token by token, whether an output has ended."""

    def __init__(
        self,
        *,
        max_output_tokens: int,
        min_tokens: int,
        stop_token_ids: frozenset[int],
        stop_strings: Sequence[str],
        detokenize: Callable[[Sequence[int]], str],
        structure: Structure | None = None,
    ) -> None:
        self.max_output_tokens = max_output_tokens
        self.min_tokens = min_tokens
        self.stop_token_ids = stop_token_ids
        self._matcher = StopStringMatcher(stop_strings, detokenize) if any(stop_strings) else None
        self._structure = structure
        self.num_output_tokens = 0

    def append(self, token_id: int) -> Stop | None:
        """Add the next output token; return the reason if it is the last one."""
        self.num_output_tokens += 1
        match = self._matcher.append(token_id) if self._matcher else None
        is_whole = self._structure is not None and self._structure.advance(token_id)
        if self.num_output_tokens >= self.min_tokens:
            if token_id in self.stop_token_ids:
                return Stop(FinishReason.STOP, token_id)
            if match is not None:
                return Stop(FinishReason.STOP, match)
        if is_whole:
            return Stop(FinishReason.STOP)
        if self.num_output_tokens >= self.max_output_tokens:
            return Stop(FinishReason.LENGTH)
        return None

    def cut(self, token_ids: Sequence[int]) -> tuple[int, Stop | None]:
        """Add tokens until one of them ends the output.

        Returns:
            How many of them belong to the output, and the end if it was reached.
        """
        for index, token_id in enumerate(token_ids):
            if not self.max_output_tokens:
                return 0, Stop(FinishReason.LENGTH)
            stop = self.append(token_id)
            if stop is not None:
                return index + 1, stop
        return len(token_ids), None
