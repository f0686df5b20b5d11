"""A drafter of your own, in one file.

This one drafts fixed phrases: when the text ends in the beginning of a phrase it knows, it proposes
the rest. A drafter may be as wrong as it likes; the target's own sampler writes every token, so a
bad guess costs time and never changes the text.

Name it in the configuration of the draft pool as ``drafter: "docs.examples.custom_drafter:build"``
(any importable ``module:name`` that is called without arguments and returns a ``Drafter``), or hand
it to ``SplitSpeculator(..., local_drafter=...)`` to run it inside the target.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployments.engine.speculation.drafters.base import Drafter
from deployments.engine.speculation.types import OutcomeRow

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deployments.engine.speculation.types import DraftQuery


class PhraseDrafter(Drafter):
    """Completes phrases.

    Args:
        phrases: token ids of texts that are often repeated, such as licence headers.
    """

    def __init__(self, phrases: Sequence[Sequence[int]]) -> None:
        self._phrases = [tuple(phrase) for phrase in phrases]

    def propose(self, queries: Sequence[DraftQuery]) -> list[list[OutcomeRow]]:
        """For each query, one row per node of the draft in flight that is inside a phrase."""
        return [self._rows(query) for query in queries]

    def _rows(self, query: DraftQuery) -> list[OutcomeRow]:
        rows = []
        # Node -1 is the outcome "nothing accepted"; the others lie behind some accepted tokens.
        for node in range(-1, len(query.in_flight)):
            accepted = (query.in_flight.token_ids[at] for at in query.in_flight.path_to(node))
            text = (*query.token_ids, *accepted)
            rest = self._rest_of_phrase(text)[: query.num_draft_tokens + 1]
            if rest:
                rows.append(OutcomeRow(node, bonus_token_id=rest[0], draft_token_ids=rest[1:]))
        return rows

    def _rest_of_phrase(self, text: Sequence[int]) -> tuple[int, ...]:
        for phrase in self._phrases:
            for length in range(len(phrase) - 1, 1, -1):
                if tuple(text[-length:]) == phrase[:length]:
                    return phrase[length:]
        return ()


def build() -> PhraseDrafter:
    """What the configuration names; phrases would come from your own tokenizer."""
    return PhraseDrafter([(1, 2, 3, 4, 5, 6, 7, 8)])
