"""Where drafts come from, and how much drafts from there are worth."""

from __future__ import annotations

from bisect import bisect
from functools import cache
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from deployments.engine.speculation.budget import INITIAL_ACCEPTANCE, update_acceptance
from deployments.engine.speculation.types import DraftOrigin, DraftTree

if TYPE_CHECKING:
    from collections.abc import Sequence

_OWN_WEIGHT = 0.05
_PRIOR_WEIGHT = 0.005
_PRIOR_TOKENS = 4
"""How many tokens' worth the first guess of a place's chance is."""
_GRADES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_MOST_DEPTH = 3
_WORTH_ASKING = 0.1
_WORTH_A_ROW = 0.03


class Place(NamedTuple):
    """What is known of a guess's token beforehand, as far as that tells how good it will be.

    Attributes:
        depth: how many tokens of the guess stand before it, up to a few; 0 where there is a grade.
        rank: 0 for what a drafter thinks likeliest; 0 where there is a grade.
        grade: of the drafter's own estimate; None if it has none.
        is_seconded: whether another drafter says the same.
    """

    origin: DraftOrigin
    depth: int = 0
    rank: int = 0
    grade: int | None = None
    is_seconded: bool = False

    @property
    def initial_chance(self) -> float:
        """What it is taken for until tokens of its kind were put to the test."""
        chance = INITIAL_ACCEPTANCE
        if self.grade is not None:
            bounds = (0.0, *_GRADES, 1.0)
            chance = (bounds[self.grade] + bounds[self.grade + 1]) / 2
        return 1 - (1 - chance) ** 2 if self.is_seconded else chance


@cache
def places(origin: DraftOrigin, length: int, rank: int = 0) -> tuple[Place, ...]:
    """Of the tokens of a guess whose drafter has no estimates."""
    return tuple(Place(origin, min(depth, _MOST_DEPTH), rank) for depth in range(length))


@cache
def _graded(origin: DraftOrigin, grade: int) -> Place:
    return Place(origin, grade=grade)


@cache
def _seconded(place: Place) -> Place:
    return place._replace(is_seconded=True)


class Prior(NamedTuple):
    """What is known of a place from all sequences.

    Attributes:
        num_tokens: that were put to the test there.
    """

    chance: float
    num_tokens: int


Priors: TypeAlias = dict[Place, Prior]


class Guess(NamedTuple):
    """A chain of tokens at hand, with the place of each."""

    token_ids: tuple[int, ...]
    places: tuple[Place, ...]

    @classmethod
    def of(
        cls,
        origin: DraftOrigin,
        token_ids: Sequence[int],
        chances: Sequence[float] = (),
        rank: int = 0,
    ) -> Guess:
        """A drafter's.

        Args:
            origin: the drafter.
            token_ids: the chain.
            chances: its own estimates of the first tokens, or none at all.
            rank: 0 for what it thinks likeliest.
        """
        graded = tuple(
            _graded(origin, bisect(_GRADES, chance)) for chance in chances[: len(token_ids)]
        )
        if len(graded) == len(token_ids):
            return cls(tuple(token_ids), graded)
        without = places(origin, len(token_ids), rank)
        return cls(tuple(token_ids), (*graded, *without[len(graded) :]))


def seconded(guesses: Sequence[Guess]) -> tuple[Guess, ...]:
    """The guesses, with a mark on tokens up to which one of another drafter says the same."""
    if len({guess.places[0].origin for guess in guesses if guess.places}) < 2:
        return tuple(guesses)
    marked = []
    for guess in guesses:
        most = max(
            (
                _num_shared(guess.token_ids, other.token_ids)
                for other in guesses
                if other.places
                and guess.places
                and other.places[0].origin != guess.places[0].origin
            ),
            default=0,
        )
        its = map(_seconded, guess.places[:most])
        marked.append(guess._replace(places=(*its, *guess.places[most:])))
    return tuple(marked)


def _num_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that two texts begin with alike."""
    count = 0
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            break
        count += 1
    return count


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
        takes_trees: whether drafts with branches can be verified.
    """

    def __init__(self, priors: Priors, *, takes_trees: bool = True) -> None:
        self._priors = priors
        self._takes_trees = takes_trees
        self._own: dict[Place, float] = {}

    def chances(self, guess_places: Sequence[Place]) -> list[float]:
        """That each token of a guess is accepted, with all before it."""
        chances, chance = [], 1.0
        for place in guess_places:
            chance *= self._acceptance(place)
            chances.append(chance)
        return chances

    def worth(self, origin: DraftOrigin, max_draft_tokens: int) -> int:
        """How many tokens are worth asking for, of a drafter without estimates.

        Returns:
            1 to ``max_draft_tokens``; 0 only if that is 0. One token is always worth a try, else a
            sequence whose text turns predictable would never notice.
        """
        chances = self.chances(places(origin, max_draft_tokens))
        return min(max_draft_tokens, max(1, sum(chance >= _WORTH_ASKING for chance in chances)))

    def merge(self, guesses: Sequence[Guess], max_draft_tokens: int) -> Merged:
        """The likeliest tokens of all guesses; what two of them share is the first one's."""
        if not guesses:
            return NOTHING
        nodes: dict[tuple[int, ...], tuple[float, DraftOrigin]] = {}
        for guess in guesses:
            chance = 1.0
            for depth, place in enumerate(guess.places):
                chance *= self._acceptance(place)
                if depth and chance < _WORTH_A_ROW:
                    break
                path = guess.token_ids[: depth + 1]
                known = nodes.get(path)
                if known is None or known[0] < chance:
                    nodes[path] = (chance, place.origin if known is None else known[1])
        # Parents were entered before their children and are at least as likely: they stay before.
        kept = sorted(nodes, key=lambda path: -nodes[path][0])
        if not self._takes_trees:
            kept = _likeliest_chain(kept)
        del kept[max_draft_tokens:]
        at = {path: node for node, path in enumerate(kept)} | {(): -1}
        tree = DraftTree(
            tuple(path[-1] for path in kept),
            tuple(at[path[:-1]] for path in kept),
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
            place = guess.places[depth]
            prior = self._prior(place)
            # While little is known of a place, every token teaches much of it.
            weight = 1 / (_PRIOR_TOKENS + prior.num_tokens)
            self._own[place] = update_acceptance(
                self._acceptance(place), was_right, max(_OWN_WEIGHT, weight)
            )
            chance = update_acceptance(prior.chance, was_right, max(_PRIOR_WEIGHT, weight))
            self._priors[place] = Prior(chance, prior.num_tokens + 1)
            if not was_right:
                return

    def _acceptance(self, place: Place) -> float:
        own = self._own.get(place)
        return self._prior(place).chance if own is None else own

    def _prior(self, place: Place) -> Prior:
        return self._priors.get(place) or Prior(place.initial_chance, 0)


def _likeliest_chain(paths: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Of paths by falling chance those that each go on behind the one before."""
    chain: list[tuple[int, ...]] = []
    for path in paths:
        if path[:-1] == (chain[-1] if chain else ()):
            chain.append(path)
    return chain
