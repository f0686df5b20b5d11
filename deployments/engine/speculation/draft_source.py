"""Where drafts come from, and how much drafts from there are worth."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from deployments.engine.speculation.budget import (
    INITIAL_ACCEPTANCE,
    draft_length,
    update_acceptance,
)
from deployments.engine.speculation.types import DraftOrigin, DraftTree

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deployments.engine.speculation.types import OutcomeRow

_PRIOR_WEIGHT = 0.02
_MOST_EVIDENCE = 4


class DraftSource(NamedTuple):
    """Where a draft came from, as far as that tells how good it will be.

    Attributes:
        evidence: doublings of the tokens that a copied draft rests on, up to a few.
    """

    origin: DraftOrigin
    evidence: int = 0

    @classmethod
    def of_copy(cls, row: OutcomeRow) -> DraftSource:
        """The source of a local drafter's row."""
        return cls(DraftOrigin.LOCAL, min(row.num_matched.bit_length(), _MOST_EVIDENCE))


POOL = DraftSource(DraftOrigin.POOL)


class Guess(NamedTuple):
    """A draft at hand."""

    tree: DraftTree
    source: DraftSource


NO_GUESS = Guess(DraftTree(), DraftSource(DraftOrigin.NONE))


class Trust:
    """How often tokens of each source were accepted, given that all before them were.

    Args:
        priors: of all sequences, shared between them; one starts from what the last ones did.
    """

    def __init__(self, priors: dict[DraftSource, float]) -> None:
        self._priors = priors
        self._own: dict[DraftSource, float] = {}

    def acceptance(self, source: DraftSource) -> float:
        """The chance of the next token of a draft from there."""
        return self._own.get(source, self._priors.get(source, INITIAL_ACCEPTANCE))

    def chances(self, guess: Guess) -> list[float]:
        """That each token of a draft is accepted, with all before it."""
        acceptance = self.acceptance(guess.source)
        return [acceptance**depth for depth in range(1, len(guess.tree) + 1)]

    def guess(self, token_ids: Sequence[int], source: DraftSource, max_draft_tokens: int) -> Guess:
        """A chain, as long as one from there is worth."""
        room = draft_length(self.acceptance(source), max_draft_tokens)
        return Guess(DraftTree.chain(token_ids[:room], source.origin), source)

    def better(self, one: Guess, other: Guess) -> Guess:
        """The one that promises more tokens; the first of equals."""
        return max(one, other, key=lambda guess: sum(self.chances(guess)))

    def learn(self, source: DraftSource, num_accepted: int, num_drafted: int) -> None:
        """What became of a draft."""
        prior = self._priors.get(source, INITIAL_ACCEPTANCE)
        self._own[source] = update_acceptance(self.acceptance(source), num_accepted, num_drafted)
        self._priors[source] = update_acceptance(
            prior, num_accepted, num_drafted, weight=_PRIOR_WEIGHT
        )
