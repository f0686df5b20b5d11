"""One output's grammar: what it allows behind the committed text, and behind guesses of it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from deployments.engine.speculation.types import DraftOrigin, DraftTree

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import numpy as np
    from llguidance import LLMatcher
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

_NOTHING_FITS = "NoExtension"
"""How the library's report on a text that no token continues begins; others name a bound of it."""


class Constraint:
    """Follows an output through its grammar.

    One matcher serves all of a draft: it is walked from node to node, forwards by tokens and
    backwards by undoing them, and is taken back to the committed text before that grows. What is
    allowed at a place is a function of the grammar and the tokens that lead there.

    Args:
        compiled: the grammar at its beginning; only copied.
        eos_token_ids: tokens that are never part of the text.
        end_token_ids: tokens that may stand where the grammar lets the text end.
    """

    def __init__(
        self,
        compiled: LLMatcher,
        *,
        eos_token_ids: Collection[int],
        end_token_ids: Collection[int],
    ) -> None:
        self._compiled = compiled
        self._eos_token_ids = frozenset(eos_token_ids)
        self._end_token_ids = tuple(end_token_ids)
        self._matcher = compiled.deep_copy()
        self._committed: list[int] = []
        self._path: list[int] = []
        self._is_lost = False
        self.failure = ""
        """Which bound of the library was last reached, in its words."""

    @property
    def can_end(self) -> bool:
        """Whether the committed text is a whole one."""
        return self._stand_at(()) and self._matcher.is_accepting()

    def advance(self, token_id: int) -> bool:
        """Commit one token; behind one that is not allowed, nothing is.

        Returns:
            Whether the text is whole and nothing can follow.
        """
        if token_id in self._eos_token_ids:
            return False
        if not self._stand_at(()) or not self._take(token_id):
            self._is_lost = True
            return False
        self._committed.append(token_id)
        return self._matcher.is_stopped() and self._matcher.is_accepting()

    def draft(self, guessed: DraftTree, max_draft_tokens: int) -> DraftTree:
        """What is worth verifying: a guess as far as it is allowed, or tokens that are certain.

        Args:
            guessed: sound, possibly empty.
            max_draft_tokens: no more than this.
        """
        if max_draft_tokens <= 0 or not self._stand_at(()):
            return DraftTree()
        forced = self._matcher.compute_ff_tokens()
        fitting = self._fit(guessed)
        if not forced or forced[0] in fitting.token_ids[:1]:
            return fitting
        return DraftTree.chain(forced[:max_draft_tokens], DraftOrigin.STRUCTURE)

    def fill(self, path: Sequence[int], bits_W: NDArray[np.uint32]) -> None:
        """Mark what may follow.

        Args:
            path: draft tokens behind the committed text.
            bits_W: one bit per token id, the lowest first; overwritten, with nothing allowed if
                the path is not, or if the grammar has become too complex to follow.
        """
        bits_W[:] = 0
        if not self._stand_at(path):
            return
        self._matcher.unsafe_compute_mask_ptr(bits_W.ctypes.data, bits_W.nbytes)
        if self._matcher.is_error():
            # What the library then marks is the end.
            bits_W[:] = 0
            reason = self._matcher.get_error().partition("\n")[0]
            self.failure = "" if reason.startswith(_NOTHING_FITS) else reason
            return
        for token in self._eos_token_ids:
            bits_W[token >> 5] &= ~(1 << (token & 31)) & 0xFFFFFFFF
        if self._matcher.is_accepting():
            for token in self._end_token_ids:
                bits_W[token >> 5] |= 1 << (token & 31)

    def _fit(self, tree: DraftTree) -> DraftTree:
        """The nodes whose paths are allowed, without tokens that end the text."""
        kept: dict[int, int] = {-1: -1}
        token_ids: list[int] = []
        parents: list[int] = []
        origins: list[DraftOrigin] = []
        paths: list[tuple[int, ...]] = []
        for node, (parent, token) in enumerate(zip(tree.parents, tree.token_ids, strict=True)):
            if parent not in kept:
                continue
            path = paths[kept[parent]] if parent >= 0 else ()
            if self._stand_at((*path, token)):
                kept[node] = len(token_ids)
                token_ids.append(token)
                parents.append(kept[parent])
                origins += tree.origins[node : node + 1]
                paths.append((*path, token))
        return DraftTree(tuple(token_ids), tuple(parents), tuple(origins))

    def _stand_at(self, path: Sequence[int]) -> bool:
        """Walk to a place; False if the grammar does not lead there."""
        if self._is_lost:
            return False
        if self._matcher.is_error():
            self._recover()
        num_shared = 0
        for ours, wanted in zip(self._path, path, strict=False):
            if ours != wanted:
                break
            num_shared += 1
        if len(self._path) > num_shared:
            self._matcher.rollback(len(self._path) - num_shared)
            del self._path[num_shared:]
        for token in path[num_shared:]:
            if not self._take(token):
                return False
            self._path.append(token)
        return True

    def _take(self, token_id: int) -> bool:
        # The matcher would take an end of text without noting it, and could not undo it.
        if token_id in self._eos_token_ids:
            return False
        return bool(self._matcher.try_consume_tokens([token_id]) == 1)

    def _recover(self) -> None:
        """Start anew: what a matcher could not do behind a guess must not change the text."""
        logger.debug("a grammar could not follow a draft: %s", self._matcher.get_error())
        self._matcher = self._compiled.deep_copy()
        self._path.clear()
        for token in self._committed:
            self._take(token)
