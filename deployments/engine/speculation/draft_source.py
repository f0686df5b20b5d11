"""Where drafts come from, and how much drafts from there are worth."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from deployments.engine.speculation.budget import INITIAL_ACCEPTANCE, update_acceptance
from deployments.engine.speculation.types import DraftOrigin, DraftTree

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deployments.engine.speculation.types import OutcomeRow

_OWN_WEIGHT = 0.05
_PRIOR_WEIGHT = 0.005
_PRIOR_TOKENS = 4
"""How many tokens' worth the first guess of a place's chance is."""
_MOST_EVIDENCE = 4
_MOST_DEPTH = 3
_WORTH = 0.1


class DraftSource(NamedTuple):
    """Where a draft came from, as far as that tells how good it will be.

    Attributes:
        evidence: doublings of the tokens that a copied draft rests on, up to a few.
        rank: 0 for what a drafter thinks likeliest.
    """

    origin: DraftOrigin
    evidence: int = 0
    rank: int = 0

    @classmethod
    def of_copy(cls, row: OutcomeRow, rank: int) -> DraftSource:
        """The source of a local drafter's row."""
        return cls(DraftOrigin.LOCAL, min(row.num_matched.bit_length(), _MOST_EVIDENCE), rank)


POOL = DraftSource(DraftOrigin.POOL)
HEAD = DraftSource(DraftOrigin.HEAD)

_Place: TypeAlias = tuple[DraftSource, int]


class Prior(NamedTuple):
    """What is known of a place from all sequences.

    Attributes:
        num_tokens: that were put to the test there.
    """

    chance: float
    num_tokens: int


Priors: TypeAlias = dict[_Place, Prior]
_UNKNOWN = Prior(INITIAL_ACCEPTANCE, 0)


class Guess(NamedTuple):
    """A chain of tokens at hand."""

    token_ids: tuple[int, ...]
    source: DraftSource


class Merged(NamedTuple):
    """Guesses as one tree.

    Attributes:
        tree: nodes by falling chance.
        chances: of each node, that it and all before it are accepted.
    """

    tree: DraftTree
    chances: tuple[float, ...]


NOTHING = Merged(DraftTree(), ())


class Trust:
    """How often the tokens of each source were accepted, by their place in the guess.

    A place's estimate is the chance of that token given that all before it were accepted. A guess
    that was right so far is likelier to be right once more, so later places have better ones.

    Args:
        priors: of all sequences, shared between them; one starts from what the last ones did.
    """

    def __init__(self, priors: Priors) -> None:
        self._priors = priors
        self._own: dict[_Place, float] = {}

    def chances(self, source: DraftSource, length: int) -> list[float]:
        """That each of the first tokens of a guess is accepted, with all before it."""
        chances, chance = [], 1.0
        for depth in range(length):
            chance *= self._acceptance(_place(source, depth))
            chances.append(chance)
        return chances

    def worth(self, source: DraftSource, max_draft_tokens: int) -> int:
        """How many tokens of a guess may be worth verifying.

        Returns:
            1 to ``max_draft_tokens``; 0 only if that is 0. One token is always worth a try, else a
            sequence whose text turns predictable would never notice.
        """
        chances = self.chances(source, max_draft_tokens)
        return min(max_draft_tokens, max(1, sum(chance >= _WORTH for chance in chances)))

    def merge(self, guesses: Sequence[Guess], max_draft_tokens: int) -> Merged:
        """The likeliest tokens of all guesses; what two of them share is the first one's."""
        if not guesses:
            return NOTHING
        nodes: dict[tuple[int, ...], tuple[float, DraftOrigin]] = {}
        for guess in guesses:
            length = min(len(guess.token_ids), self.worth(guess.source, max_draft_tokens))
            for depth, chance in enumerate(self.chances(guess.source, length)):
                path = guess.token_ids[: depth + 1]
                known, origin = nodes.get(path, (0.0, guess.source.origin))
                nodes[path] = (max(known, chance), origin)
        # Parents were entered before their children and are at least as likely: they stay before.
        kept = sorted(nodes, key=lambda path: -nodes[path][0])[:max_draft_tokens]
        places = {path: node for node, path in enumerate(kept)} | {(): -1}
        tree = DraftTree(
            tuple(path[-1] for path in kept),
            tuple(places[path[:-1]] for path in kept),
            tuple(nodes[path][1] for path in kept),
        )
        return Merged(tree, tuple(nodes[path][0] for path in kept))

    def learn(self, guess: Guess, tree: DraftTree, accepted: Sequence[int]) -> None:
        """What became of a guess.

        Args:
            guess: as it was merged.
            tree: what was verified.
            accepted: nodes of the tree.
        """
        for depth, node in enumerate(tree.walk(guess.token_ids)):
            was_right = node in accepted
            place = _place(guess.source, depth)
            prior = self._priors.get(place, _UNKNOWN)
            # While little is known of a place, every token teaches much of it.
            weight = 1 / (_PRIOR_TOKENS + prior.num_tokens)
            self._own[place] = update_acceptance(
                self._acceptance(place), was_right, max(_OWN_WEIGHT, weight)
            )
            chance = update_acceptance(prior.chance, was_right, max(_PRIOR_WEIGHT, weight))
            self._priors[place] = Prior(chance, prior.num_tokens + 1)
            if not was_right:
                return

    def _acceptance(self, place: _Place) -> float:
        own = self._own.get(place)
        return self._priors.get(place, _UNKNOWN).chance if own is None else own


def _place(source: DraftSource, depth: int) -> _Place:
    return source, min(depth, _MOST_DEPTH)
