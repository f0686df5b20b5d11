"""Token sequences that must not occur: the last token of one is banned where the others stand."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def banned_tokens(
    sequences: Sequence[Sequence[int]], output: Sequence[int], path: Sequence[int]
) -> list[int]:
    """The tokens that would complete a bad sequence.

    Args:
        sequences: none is empty.
        output: committed output, at least the end of it that is as long as a sequence.
        path: draft tokens behind it.
    """
    text = (*output, *path)
    return [
        sequence[-1]
        for sequence in sequences
        if len(sequence) - 1 <= len(text)
        and tuple(sequence[:-1]) == text[len(text) - len(sequence) + 1 :]
    ]
