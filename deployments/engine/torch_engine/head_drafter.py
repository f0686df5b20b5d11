"""Drafts with an EAGLE-3 head that runs beside its target, on features of the target's own steps.

Behind every step the head writes keys and values of the text that became final. To draft, it runs
once behind the last of them, which gives the first token, and then on its own output.

The row of a token lies in the head's pool where the token's row lies in the target's. So it is
shared, kept and freed with the target's page, and what lies behind the committed text is written
over like rejected rows. Pages that were filled without the head (by sequences without speculation,
or from the KV tier) hold no rows of it; it does not see them, which can only make guesses worse.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from deployments.engine.speculation.drafters.base import Drafter
from deployments.engine.speculation.types import DraftSampling, OutcomeRow
from deployments.engine.torch_engine.coupling import coupled_choices
from deployments.engine.torch_engine.forward_batch import ForwardBatch, SequenceSpan
from deployments.engine.torch_engine.kv_cache import KVCache
from kv_store.layout import PAGE_TOKENS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Sequence as SequenceOf

    from torch import Tensor

    from deployments.engine.speculation.types import DraftQuery
    from deployments.engine.torch_engine.eagle3 import Eagle3Model
    from deployments.engine.torch_engine.models.llama import Model
    from deployments.engine.torch_engine.sequence import Sequence


logger = logging.getLogger(__name__)


class FinalRows(NamedTuple):
    """Rows of a step that belong to a sequence's text for good.

    Attributes:
        first_row: where the first of them stands in the text.
        batch_rows: of the step, in text order.
        next_token_ids: of the text, each behind its row.
    """

    sequence: Sequence
    first_row: int
    batch_rows: list[int]
    next_token_ids: list[int]


class _Last(NamedTuple):
    """The end of what the head has read of a sequence.

    Attributes:
        row: in the text.
        feature: [E], fused.
    """

    sequence: Sequence
    row: int
    feature: Tensor


@dataclass(slots=True)
class _Chain:
    """A draft in the making.

    Attributes:
        row: of the text, that is run next.
        slots: of all rows it sees, then of ``row`` and those to come.
        num_seen: the first of them.
        feature: [E], of ``row``.
        token_id: behind ``row``.
    """

    index: int
    row: int
    slots: Tensor
    num_seen: int
    feature: Tensor
    token_id: int
    sampling: DraftSampling
    length: int
    token_ids: list[int] = field(default_factory=list)


class HeadDrafter(Drafter):
    """Belongs to the engine thread.

    Attributes:
        is_off: it failed to read; it reads and drafts no more, and the target goes on without it.
    """

    def __init__(self, head: Eagle3Model, target: Model, num_pages: int) -> None:
        """Allocate the head's pool.

        Args:
            head: for this target.
            target: embeds the tokens.
            num_pages: of the target's pool.
        """
        self.capture_layers = head.config.capture_layers
        self._head = head
        self._target = target
        self._cache = KVCache(head.config.layer, num_pages, dtype=head.dtype, device=head.device)
        self._has_row = torch.zeros(self._cache.num_slots, dtype=torch.bool)
        self._last: dict[int, _Last] = {}
        self.is_off = False

    def forget_page(self, page: int) -> None:
        """The target's page has been given away; the head's rows in it mean nothing any more."""
        self._has_row[page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS] = False

    def read(self, features: Mapping[int, Tensor], parts: SequenceOf[FinalRows]) -> None:
        """Write the rows of text that has become final.

        Args:
            features: per captured layer [N, E], of the whole step.
            parts: at most one per sequence, none empty.
        """
        try:
            self._read(features, parts)
        except Exception:
            # Whatever a drafter does wrong, the step that it reads from is right.
            logger.exception("the head cannot read and is switched off")
            self.is_off = True
            self._last.clear()

    @torch.inference_mode()
    def _read(self, features: Mapping[int, Tensor], parts: SequenceOf[FinalRows]) -> None:
        device = self._head.device
        rows = torch.tensor([row for part in parts for row in part.batch_rows], device=device)
        fused = self._head.fuse(
            torch.cat([features[layer].index_select(0, rows) for layer in self.capture_layers], -1)
        )
        positions: list[int] = []
        slots: list[Tensor] = []
        for part in parts:
            end = part.first_row + len(part.batch_rows)
            positions += range(part.first_row, end)
            slots.append(part.sequence.slots(part.first_row, end))
            feature = fused[len(positions) - 1].clone()
            self._last[part.sequence.session_id] = _Last(part.sequence, end - 1, feature)
        written = torch.cat(slots)
        embedded = self._embed([token for part in parts for token in part.next_token_ids])
        self._head.write_rows(
            embedded, fused, torch.tensor(positions, device=device), written.to(device), self._cache
        )
        self._has_row[written] = True

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Draft once, so that the first draft takes no longer than others. No row counts yet."""
        feature = torch.zeros(self._head.config.hidden_size, dtype=self._head.dtype)
        self._extend(
            [
                _Chain(
                    index=0,
                    row=0,
                    slots=torch.arange(1),
                    num_seen=0,
                    feature=feature.to(self._head.device),
                    token_id=0,
                    sampling=DraftSampling(seed=0),
                    length=1,
                )
            ]
        )

    def close(self, session_id: int) -> None:
        """Forget a sequence; its rows go with its pages."""
        self._last.pop(session_id, None)

    @torch.inference_mode()
    def propose(self, queries: SequenceOf[DraftQuery]) -> list[list[OutcomeRow]]:
        """One chain behind each committed text; nothing for texts that were not read to the end."""
        chains = [
            chain
            for index, query in enumerate(queries)
            if (chain := self._begin(index, query)) is not None
        ]
        active = chains
        while active:
            self._extend(active)
            active = [chain for chain in active if len(chain.token_ids) < chain.length]
        answers: list[list[OutcomeRow]] = [[] for _ in queries]
        for chain in chains:
            bonus, *behind = chain.token_ids
            answers[chain.index] = [OutcomeRow(-1, bonus, tuple(behind))]
        return answers

    def _begin(self, index: int, query: DraftQuery) -> _Chain | None:
        last = self._last.get(query.session_id)
        length = 1 + query.num_draft_tokens
        if last is None or last.row != len(query.token_ids) - 2 or len(query.in_flight):
            return None
        if last.sequence.num_slots < last.row + length:
            return None
        before = last.sequence.slots(0, last.row)
        seen = before[self._has_row[before]]
        return _Chain(
            index=index,
            row=last.row,
            slots=torch.cat((seen, last.sequence.slots(last.row, last.row + length))),
            num_seen=len(seen),
            feature=last.feature,
            token_id=query.token_ids[-1],
            sampling=query.sampling,
            length=length,
        )

    def _extend(self, chains: SequenceOf[_Chain]) -> None:
        """One token more for every chain, all in one pass."""
        batch = ForwardBatch(
            token_ids=torch.tensor([chain.token_id for chain in chains]),
            positions=torch.tensor([chain.row for chain in chains]),
            slots=torch.stack([chain.slots[chain.num_seen] for chain in chains]),
            spans=tuple(
                SequenceSpan(start=number, length=1, kv_slots=chain.slots[: chain.num_seen + 1])
                for number, chain in enumerate(chains)
            ),
            logit_rows=torch.arange(len(chains)),
        )
        hidden = self._head(
            self._embed([chain.token_id for chain in chains]),
            torch.stack([chain.feature for chain in chains]),
            batch,
            self._cache,
        )
        # A row scores the token two places behind it.
        choices = coupled_choices(
            self._head.logits(hidden),
            [chain.sampling for chain in chains],
            [chain.row + 2 for chain in chains],
            self._head.draft_token_ids,
        )
        for number, (chain, choice) in enumerate(zip(chains, choices, strict=True)):
            chain.token_ids.append(choice.token_id)
            chain.token_id, chain.feature = choice.token_id, hidden[number]
            chain.row += 1
            chain.num_seen += 1

    def _embed(self, token_ids: list[int]) -> Tensor:
        ids = torch.tensor(token_ids, device=self._head.device)
        return self._target.embed(ids).to(self._head.dtype)
