"""Drafts and the questions they answer. Plain data; shared by engine, drafters and transport."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence


class DraftOrigin(StrEnum):
    """Who guessed a draft."""

    POOL = "pool"
    LOCAL = "local"
    HEAD = "head"
    STRUCTURE = "structure"
    """Nobody: the output's structure allows nothing else."""
    NONE = "none"


@dataclass(frozen=True, slots=True)
class DraftTree:
    """Guesses behind the last committed token.

    Attributes:
        token_ids: one per node, parents before children.
        parents: node index of each node's parent; -1 is the last committed token.
        origins: who guessed each node; empty where nobody wants to know.
    """

    token_ids: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    origins: tuple[DraftOrigin, ...] = ()

    @classmethod
    def chain(cls, token_ids: Sequence[int], origin: DraftOrigin) -> DraftTree:
        """A tree without branches."""
        length = len(token_ids)
        return cls(tuple(token_ids), tuple(range(-1, length - 1)), (origin,) * length)

    def cut(self, length: int) -> DraftTree:
        """The first nodes; parents come before children, so it is a tree."""
        return DraftTree(self.token_ids[:length], self.parents[:length], self.origins[:length])

    def walk(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        """The nodes that a text behind the last committed token passes, as far as there are any."""
        path: list[int] = []
        for token_id in token_ids:
            at = path[-1] if path else -1
            for node, parent in enumerate(self.parents):
                if parent == at and self.token_ids[node] == token_id:
                    path.append(node)
                    break
            else:
                break
        return tuple(path)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def is_chain(self) -> bool:
        """Whether every node's parent is the node before it."""
        return all(parent == node - 1 for node, parent in enumerate(self.parents))

    def path_to(self, node: int) -> tuple[int, ...]:
        """Node indices from the root's child down to ``node``; empty for -1."""
        path: list[int] = []
        while node >= 0:
            path.append(node)
            node = self.parents[node]
        return tuple(reversed(path))


class Ask(NamedTuple):
    """How large a table is wanted: tokens behind each bonus token (k), bonus tokens per node (F).

    Without bonus tokens none is wanted.

    Attributes:
        within_s: a table that comes later is late; infinite if nobody knows.
    """

    num_draft_tokens: int
    fanout: int
    within_s: float = math.inf


NO_ASK = Ask(0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftSampling:
    """The part of a request's sampling that a drafter couples its own choice to."""

    seed: int
    choice_index: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSpec:
    """One speculated sequence, from its prompt to its end.

    Attributes:
        session_id: unique within the target replica's life; never reused.
        token_ids: prompt and resumed output.
    """

    session_id: int
    request_id: str
    tenant: str
    token_ids: tuple[int, ...]
    sampling: DraftSampling
    traceparent: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftQuery:
    """Asks a drafter what may follow the verification of one round.

    The drafter answers for each likely outcome: the target accepts the path to some node of
    ``in_flight`` (or to none, -1) and emits a bonus token behind it.

    Attributes:
        token_ids: committed tokens, prompt included; the sequence the drafter continues.
        in_flight: the draft being verified; empty when the round is plain.
        num_draft_tokens: tokens wanted behind each bonus token (k).
        fanout: bonus tokens to guess for each node, on average (F).
        answer_by: in ``time.monotonic`` seconds; a smaller answer until then is worth more than a
            larger one later.
    """

    session_id: int
    token_ids: Sequence[int]
    in_flight: DraftTree
    num_draft_tokens: int
    fanout: int
    sampling: DraftSampling
    answer_by: float = math.inf


@dataclass(frozen=True, slots=True)
class OutcomeRow:
    """What to draft next if the target accepts up to ``node`` and emits ``bonus_token_id``.

    Attributes:
        node: index into the round's in-flight draft; -1 if nothing was accepted.
        draft_token_ids: a chain behind the bonus token; may be shorter than asked, even empty.
        chances: the drafter's own estimates, where it has some: of each token, from the bonus token
            on, that it is right if all before it are. Tokens are trusted by what those of about
            the same estimates were worth.
    """

    node: int
    bonus_token_id: int
    draft_token_ids: tuple[int, ...]
    chances: tuple[float, ...] = field(default=(), compare=False)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Bonus token and draft."""
        return (self.bonus_token_id, *self.draft_token_ids)
