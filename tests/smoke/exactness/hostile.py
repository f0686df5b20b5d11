"""Drafts as no drafter makes them, and budgets as no engine has them."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING

from deployments.engine.speculation.drafters.base import Drafter
from deployments.engine.speculation.speculator import (
    NOTHING_ELSE,
    NoSpeculation,
    TakenDraft,
)
from deployments.engine.speculation.types import DraftOrigin, DraftTree, OutcomeRow

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from deployments.engine.speculation.speculator import DraftRequest, StepLoad
    from deployments.engine.speculation.types import DraftQuery

TEXTS_VARIABLE = "PACELINE_EXACTNESS_TEXTS"
_MOST_BRANCHES = 3
_HONESTY = 0.8


class RandomClock:
    """Steps seem to take anything, so budgets of draft tokens are anything."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)  # noqa: S311 - reproducible on purpose
        self._now = 0.0

    def __call__(self) -> float:
        """Seconds, later than any time before."""
        self._now += self._rng.uniform(0.5, 1.5)
        return self._now


class HalfOracle(Drafter):
    """Knows the plain texts, which ``TEXTS_VARIABLE`` names a file of, and lies now and then.

    Its bonus tokens are always right, so that its rows are found and its lies are verified.
    """

    def __init__(self) -> None:
        self._texts = json.loads(Path(os.environ[TEXTS_VARIABLE]).read_text(encoding="utf-8"))
        self._rng = random.Random(3)  # noqa: S311 - reproducible on purpose

    def propose(self, queries: Sequence[DraftQuery]) -> list[list[OutcomeRow]]:
        """A row for every node that the text may be accepted up to."""
        return [list(self._rows(query))[::-1] for query in queries]

    def _rows(self, query: DraftQuery) -> Iterator[OutcomeRow]:
        tree = query.in_flight
        for node in range(-1, len(tree)):
            path = [tree.token_ids[at] for at in tree.path_to(node)]
            truth = continuation(self._texts, [*query.token_ids, *path])
            if truth:
                drafted = truth[1 : query.num_draft_tokens + 1]
                yield OutcomeRow(node, truth[0], tuple(self._told(token) for token in drafted))

    def _told(self, token: int) -> int:
        return token if self._rng.random() < _HONESTY else token ^ 1


class RandomTrees(NoSpeculation):
    """Trees of any size and shape around the plain text.

    Attributes:
        texts: prompts with their plain answers, of all requests to come.
    """

    def __init__(self, vocab_size: int, seed: int) -> None:
        self.texts: list[list[int]] = []
        self._vocab_size = vocab_size
        self._rng = random.Random(seed)  # noqa: S311 - reproducible on purpose

    def take(
        self, requests: Sequence[DraftRequest], load: StepLoad = NOTHING_ELSE
    ) -> list[TakenDraft]:
        """Any tree that fits."""
        del load
        return [TakenDraft(tree=self._tree(request)) for request in requests]

    def _tree(self, request: DraftRequest) -> DraftTree:
        truth = continuation(self.texts, list(request.token_ids))
        size = self._rng.randint(0, request.max_draft_tokens)
        tokens: list[int] = []
        parents: list[int] = []
        right, depth = -1, 0  # the node that ends the right path
        while len(tokens) < size:
            is_right = depth < len(truth) and self._rng.random() < _HONESTY
            parent = right if is_right else self._rng.randint(-1, len(tokens) - 1)
            siblings = {token for token, at in zip(tokens, parents, strict=True) if at == parent}
            token = truth[depth] if is_right else self._rng.randrange(self._vocab_size)
            if token in siblings or len(siblings) == _MOST_BRANCHES:
                continue
            tokens.append(token)
            parents.append(parent)
            if is_right:
                right, depth = len(tokens) - 1, depth + 1
        return DraftTree(tuple(tokens), tuple(parents), (DraftOrigin.LOCAL,) * len(tokens))


def continuation(texts: Sequence[list[int]], beginning: list[int]) -> list[int]:
    """How the text goes on that begins so; empty if none does."""
    for text in texts:
        if text[: len(beginning)] == beginning:
            return text[len(beginning) :]
    return []
