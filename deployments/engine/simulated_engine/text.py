"""What a simulated model writes: a pure function, known to target and drafter alike.

The next token depends on the request's seed and choice, its place and the token before it. So a
request that resumes at another replica goes on with the same text, and a drafter can be as right as
it is meant to be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deployments.engine.errors import UnsupportedModelError
from deployments.engine.speculation.noise import row_key
from deployments.engine.torch_engine.weights.folders import read_settings

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# Ids of plain words in every vocabulary of today's models; a smaller one is used whole.
_FIRST_ID, _NUM_IDS = 1000, 8000
_SCALE = 1 << 64


@dataclass(frozen=True, slots=True)
class SimulatedText:
    """The text of every request.

    Attributes:
        vocab_size: of the model that is simulated.
        eos_token_ids: never written, so that outputs have the length that is asked for.
    """

    vocab_size: int
    eos_token_ids: frozenset[int]

    def next_token(self, seed: int, choice_index: int, position: int, previous: int) -> int:
        """The token at ``position``, counted from the first prompt token."""
        first = _FIRST_ID if self.vocab_size >= _FIRST_ID + _NUM_IDS else 0
        count = min(_NUM_IDS, self.vocab_size - first)
        key = row_key(seed + previous, choice_index, position)
        offset = key % count
        for step in range(count):
            token = first + (offset + step) % count
            if token not in self.eos_token_ids:
                return token
        raise ValueError("the vocabulary has end tokens only")

    def other_token(self, token_id: int) -> int:
        """A token that is not this one."""
        return (token_id + 1) % self.vocab_size


def effective_seed(seed: int, temperature: float) -> int:
    """The seed that a text depends on: greedy requests for one prompt have one text."""
    return seed if temperature > 0 else 0


def chance(seed: int, choice_index: int, position: int, previous: int) -> float:
    """A number in [0, 1), drawn once for each place of a text, apart from its token."""
    return row_key(seed ^ (previous + 1), choice_index + 1, ~position & (_SCALE - 1)) / _SCALE


def last_or_zero(token_ids: Sequence[int]) -> int:
    """The token before the next one."""
    return token_ids[-1] if token_ids else 0


def read_text(folder: Path) -> SimulatedText:
    """The text of the model whose configuration lies in a folder.

    Raises:
        WeightsMissingError: there is no ``config.json``.
        UnsupportedModelError: it does not say how many tokens it has.
    """
    settings = read_settings(folder)
    vocab_size = settings.get("vocab_size")
    if not isinstance(vocab_size, int):
        raise UnsupportedModelError("config.json has no 'vocab_size'")
    eos = settings.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [eos]
    return SimulatedText(vocab_size, frozenset(each for each in ids if isinstance(each, int)))
