"""What followed this context before? Counts over the newest part of a growing text.

Of every position the text's last one, two, three and five tokens are contexts, and for each it is
counted which tokens followed them. Adding a token and looking contexts up cost O(1), in compiled
code.

Source: prediction by partial matching (Cleary and Witten 1984), with escapes as Witten and Bell
(1991) weigh them: a context that was followed by many different tokens tells little of the next.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from deployments.engine.speculation.drafters import follower_kernels
from deployments.engine.speculation.drafters.follower_kernels import MAX_CONTEXT_TOKENS, ORDERS

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from deployments.engine.speculation.drafters.follower_kernels import Table

_FEWEST_SLOTS = 64
_FULL = 0.6
"""The part of the slots that may be in use."""
_SECRET = secrets.randbits(63)
"""Of this process, see ``follower_kernels``."""
_NO_TOKENS = np.empty(0, np.int64)


class Chain(NamedTuple):
    """Tokens that may come next, one behind the other.

    Attributes:
        chances: that each is right if all before it are.
    """

    token_ids: tuple[int, ...]
    chances: tuple[float, ...]


class _Half:
    """Of a text: what followed what there."""

    __slots__ = ("_entries", "_slots", "num_tokens", "sizes")

    def __init__(self) -> None:
        self._slots = np.zeros((_FEWEST_SLOTS, 3), np.int64)
        self._entries = np.empty((_FEWEST_SLOTS, 3), np.int32)
        self.sizes = np.zeros(3, np.int64)
        self.num_tokens = 0

    @property
    def table(self) -> Table:
        return self._slots, self._entries

    def learn(self, context: np.ndarray, tokens: np.ndarray) -> None:
        """Append; ``context`` and the third of ``sizes`` say what stands before."""
        self._make_room(len(ORDERS) * len(tokens))
        follower_kernels.learn(self._slots, self._entries, self.sizes, context, tokens, _SECRET)
        self.num_tokens += len(tokens)

    def _make_room(self, num_new: int) -> None:
        num_contexts, num_entries = int(self.sizes[0]) + num_new, int(self.sizes[1]) + num_new
        if num_contexts > _FULL * len(self._slots):
            capacity = 1 << int(num_contexts / _FULL).bit_length()
            larger = np.zeros((capacity, 3), np.int64)
            follower_kernels.move(self._slots, larger)
            self._slots = larger
        if num_entries > len(self._entries):
            entries = np.empty((2 * num_entries, 3), np.int32)
            entries[: self.sizes[1]] = self._entries[: self.sizes[1]]
            self._entries = entries


class FollowerCounts:
    """One text, or several one after the other.

    Args:
        max_tokens: at least half as many of the newest are remembered, and never more.
    """

    def __init__(self, max_tokens: int) -> None:
        # The older half is forgotten as a whole: no step pays for forgetting.
        self._max_newer = max(1, max_tokens // 2)
        self._newer = _Half()
        self._older = _Half()
        self._context = np.zeros(MAX_CONTEXT_TOKENS, np.int64)

    def __len__(self) -> int:
        return self._newer.num_tokens + self._older.num_tokens

    @property
    def tables(self) -> tuple[Table, Table]:
        """Where ``chains_behind`` counts."""
        return self._newer.table, self._older.table

    def begin(self) -> None:
        """What is added next follows nothing that was added before."""
        self._newer.sizes[2] = 0

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append to the text."""
        tokens = np.asarray(token_ids, np.int64)
        while len(tokens):
            if self._newer.num_tokens == self._max_newer:
                self._older, self._newer = self._newer, _Half()
                self._newer.sizes[2] = self._older.sizes[2]
            room = self._max_newer - self._newer.num_tokens
            self._newer.learn(self._context, tokens[:room])
            tokens = tokens[room:]


_NOTHING = FollowerCounts(1)


class Followers:
    """What may come next, by two texts: some words' own, and what else is known.

    Args:
        own: the text to go on.
        own_weight: how much each of its counts counts; those of ``other`` count once.
    """

    __slots__ = ("_tables", "_weights")

    def __init__(
        self, own: FollowerCounts, own_weight: float, other: FollowerCounts | None = None
    ) -> None:
        self._tables = (*own.tables, *(other or _NOTHING).tables)
        self._weights = np.array((own_weight, own_weight, 1.0, 1.0))

    def chains_behind(
        self,
        context: Sequence[int],
        *,
        most: int,
        length: int,
        taken: Collection[int] = (),
        least_chance: float = 0.0,
    ) -> list[Chain]:
        """The likeliest next tokens, each with the likeliest ones behind it.

        Args:
            context: the end of the text; ``MAX_CONTEXT_TOKENS`` of it tell.
            most: chains, one for each next token.
            length: tokens of a chain, at most.
            taken: next tokens that are not wanted.
            least_chance: that a token is right with all before it; behind one that is less likely
                a chain ends.
        """
        token_ids = np.empty((most, length), np.int64)
        chances = np.empty((most, length))
        count = follower_kernels.chains(
            self._tables,
            self._weights,
            np.array(context[-MAX_CONTEXT_TOKENS:], np.int64),
            np.array(tuple(taken), np.int64) if taken else _NO_TOKENS,
            _SECRET,
            least_chance,
            token_ids,
            chances,
        )
        found = []
        for its_tokens, its_chances in zip(
            token_ids[:count].tolist(), chances[:count].tolist(), strict=True
        ):
            end = its_tokens.index(-1) if -1 in its_tokens else length
            found.append(Chain(tuple(its_tokens[:end]), tuple(its_chances[:end])))
        return found


def warm_up() -> None:
    """Compile before the first text."""
    counts = FollowerCounts(_FEWEST_SLOTS)
    counts.extend(range(_FEWEST_SLOTS))
    Followers(counts, 1.0).chains_behind((0,), most=1, length=2)
