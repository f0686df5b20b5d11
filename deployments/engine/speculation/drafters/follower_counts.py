"""What followed this context before? Counts over the newest part of a growing text.

Of every position the text's last one, two, three and five tokens are contexts, and for each it is
counted which tokens followed them. Adding a token and looking contexts up cost O(1).

Source: prediction by partial matching (Cleary and Witten 1984), with escapes as Witten and Bell
(1991) weigh them: a context that was followed by many different tokens tells little of the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_ORDERS = (1, 2, 3, 5)
MAX_CONTEXT_TOKENS = _ORDERS[-1]
_MOST_FOLLOWERS = 8
_TOTAL = -1
"""Where the sum of all counts of a context stands, of followers that were forgotten too."""
_ESCAPE = 2.0
"""How many times each different follower counts for one that was never seen."""
_LEAST_WEIGHT = 0.03
"""Of the contexts not looked at yet, where looking on would change nothing."""

_Followers: TypeAlias = "int | dict[int, int]"
"""The one token that followed, once; or how often each of the most frequent ones did."""


class Follower(NamedTuple):
    """A token that may come next, and the chance that it does."""

    chance: float
    token_id: int


class FollowerCounts:
    """One text, or several one after the other.

    Args:
        max_tokens: at least half as many of the newest are remembered, and never more.
    """

    def __init__(self, max_tokens: int) -> None:
        # The older half is forgotten as a whole: no step pays for forgetting.
        self._max_newer = max(1, max_tokens // 2)
        self._newer: dict[int, _Followers] = {}
        self._older: dict[int, _Followers] = {}
        self._num_newer = 0
        self._num_older = 0
        self._context: list[int] = []

    def __len__(self) -> int:
        return self._num_newer + self._num_older

    def begin(self) -> None:
        """What is added next follows nothing that was added before."""
        self._context.clear()

    def extend(self, token_ids: Iterable[int]) -> None:
        """Append to the text."""
        context = self._context
        for token in token_ids:
            if self._num_newer == self._max_newer:
                self._older, self._newer = self._newer, {}
                self._num_older, self._num_newer = self._num_newer, 0
            for order in _ORDERS:
                if order > len(context):
                    break
                _count(self._newer, hash(tuple(context[-order:])), token)
            self._num_newer += 1
            context.append(token)
            if len(context) > MAX_CONTEXT_TOKENS:
                del context[0]

    def add_followers(self, key: int, weight: float, counts: dict[int, float]) -> float:
        """Add to ``counts`` what followed a context.

        Args:
            key: the hash of its tokens. Contexts that share one are taken for the same: that
                happens to one in 2**60 and makes a guess worse, no text wrong.
            weight: of each time.
            counts: by token.

        Returns:
            The sum, of tokens that ``counts`` does not get too.
        """
        total = 0.0
        for half in (self._newer, self._older):
            followers = half.get(key)
            if followers is None:
                continue
            if isinstance(followers, int):
                counts[followers] = counts.get(followers, 0.0) + weight
                total += weight
                continue
            for token, count in followers.items():
                if token == _TOTAL:
                    total += weight * count
                else:
                    counts[token] = counts.get(token, 0.0) + weight * count
        return total


def likeliest(
    texts: Sequence[tuple[FollowerCounts, float]], context: Sequence[int], most: int
) -> list[Follower]:
    """The tokens likeliest to come next, from the longest known contexts down to the shortest.

    Args:
        texts: each with how much it counts.
        context: the end of the text to go on.
        most: how many are wanted.
    """
    chances: dict[int, float] = {}
    weight = 1.0
    for order in reversed(_ORDERS):
        if order > len(context):
            continue
        key = hash(tuple(context[-order:]))
        counts: dict[int, float] = {}
        total = 0.0
        for text, its_weight in texts:
            total += text.add_followers(key, its_weight, counts)
        if not counts:
            continue
        escape = _ESCAPE * len(counts)
        share = weight / (total + escape)
        for token, count in counts.items():
            chances[token] = chances.get(token, 0.0) + share * count
        weight *= escape / (total + escape)
        if weight < _LEAST_WEIGHT:
            break
    ranked = sorted(chances.items(), key=lambda item: item[1], reverse=True)
    return [Follower(chance, token) for token, chance in ranked[:most]]


def _count(contexts: dict[int, _Followers], key: int, token: int) -> None:
    followers = contexts.get(key)
    if followers is None:
        contexts[key] = token
    elif isinstance(followers, int):
        if followers == token:
            contexts[key] = {_TOTAL: 2, token: 2}
        else:
            contexts[key] = {_TOTAL: 2, followers: 1, token: 1}
    else:
        followers[_TOTAL] += 1
        if token not in followers and len(followers) > _MOST_FOLLOWERS:
            # The total is never the smallest: it is the sum.
            del followers[min(followers, key=followers.__getitem__)]
        followers[token] = followers.get(token, 0) + 1
