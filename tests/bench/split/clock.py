"""A clock on which GPUs run: real tokens and a real transport, but steps take what they take there.

The target replays texts that the engine wrote before, so that it needs no processor; the drafter
computes, and waits for the rest of its time. All of it runs slower by one factor.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import torch

from deployments.engine.speculation.drafters.base import Drafter
from deployments.engine.torch_engine.forward_batch import ForwardBatch, SequenceSpan
from deployments.engine.torch_engine.kv_cache import KVCache
from deployments.engine.torch_engine.model_runner import FeatureOutput, ModelRunner
from kv_store.layout import PAGE_TOKENS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from deployments.engine.speculation.types import DraftQuery, OutcomeRow, SessionSpec

_CERTAIN = 1e6
_LONGEST_DECODE = 33


class Pair(NamedTuple):
    """A target and a drafter on their GPUs.

    Attributes:
        target_s: of a step that chooses one token.
        row_share: what one more token of the step adds to that.
        draft_s: of one forward of the drafter.
        head_s: of one forward of a drafter beside the target.
    """

    target_s: float
    row_share: float
    draft_s: float
    head_s: float

    def slowed(self, factor: float) -> Pair:
        """The pair on a clock that runs ``factor`` times slower."""
        return Pair(
            self.target_s * factor, self.row_share, self.draft_s * factor, self.head_s * factor
        )

    def step_s(self, num_extra_rows: float) -> float:
        """Of a step that verifies so many draft tokens."""
        return self.target_s * (1 + self.row_share * num_extra_rows)


class ReplayRunner:
    """Says again what the engine said, in the time that ``pair`` says.

    Args:
        texts: prompts with their answers, longer than anybody will ask.
        features: of each text, per layer [T, E]; for a head.
    """

    def __init__(
        self,
        texts: Sequence[Sequence[int]],
        vocab_size: int,
        pair: Pair,
        features: Sequence[Mapping[int, Tensor]] = (),
    ) -> None:
        self._texts = texts
        self._vocab_size = vocab_size
        self._pair = pair
        self._features = features
        # Whose text a sequence is shows in the slot of its first row, as long as that is cached.
        self._text_at: dict[int, int] = {}

    def forward(self, batch: ForwardBatch) -> Tensor:
        """As ``ModelRunner.forward``, without KV rows."""
        began = time.perf_counter()
        positions, rows = batch.positions.tolist(), batch.logit_rows.tolist()
        logits = torch.zeros(len(rows), self._vocab_size)
        is_decode = True
        for span in batch.spans:
            first, end = span.start, span.start + span.length
            slot = int(span.kv_slots[0])
            if positions[first] == 0:
                self._text_at[slot] = self._text_of(batch.token_ids[first:end].tolist())
            text = self._texts[self._text_at[slot]]
            for m, row in enumerate(rows):
                if first <= row < end and positions[row] + 1 < len(text):
                    logits[m, text[positions[row] + 1]] = _CERTAIN
            is_decode &= span.length <= _LONGEST_DECODE
        if is_decode:
            due = began + self._pair.step_s(len(positions) - len(batch.spans))
            time.sleep(max(0.0, due - time.perf_counter()))
        return logits

    def forward_with_features(
        self, batch: ForwardBatch, capture_layers: tuple[int, ...]
    ) -> FeatureOutput:
        """As ``ModelRunner.forward_with_features``; rows of drafts get those of the text."""
        logits = self.forward(batch)
        rows: dict[int, list[Tensor]] = {layer: [] for layer in capture_layers}
        for span in batch.spans:
            own = self._features[self._text_at[int(span.kv_slots[0])]]
            positions = batch.positions[span.start : span.start + span.length]
            for layer, parts in rows.items():
                parts.append(own[layer][positions.clamp(max=len(own[layer]) - 1)])
        return FeatureOutput(logits, tuple(torch.cat(parts) for parts in rows.values()))

    def _text_of(self, beginning: list[int]) -> int:
        fitting = [
            number
            for number, text in enumerate(self._texts)
            if list(text[: len(beginning)]) == beginning
        ]
        if len(fitting) != 1:
            raise ValueError(f"{len(fitting)} texts begin like this prompt")
        return fitting[0]


def features_of(
    runner: ModelRunner, text: Sequence[int], layers: Sequence[int]
) -> dict[int, Tensor]:
    """What a model computes on a text: per layer [T, E]."""
    rows = torch.arange(len(text))
    num_pages = -(-len(text) // PAGE_TOKENS)
    memory = KVCache(runner.config, num_pages, dtype=runner.model.dtype)
    batch = ForwardBatch(
        token_ids=torch.tensor(text),
        positions=rows,
        slots=rows,
        spans=(SequenceSpan(start=0, length=len(text), kv_slots=rows),),
        logit_rows=rows[-1:],
    )
    wanted = tuple(layers)
    alone = ModelRunner(runner.model, runner.config, memory)
    return dict(zip(wanted, alone.forward_with_features(batch, wanted).features, strict=True))


class PacedDrafter(Drafter):
    """Takes ``draft_s`` for every forward; more only if this machine is slower than that.

    A batch is one forward over the drafts in flight and one more for every token drafted. A head's
    is as many: its first one gives the bonus token.

    Attributes:
        draft_s: may be changed while nothing runs.
    """

    def __init__(self, inner: Drafter, draft_s: float) -> None:
        self._inner = inner
        self.draft_s = draft_s

    def open(self, session: SessionSpec) -> None:
        """Hand on."""
        self._inner.open(session)

    def append(self, session_id: int, token_ids: Sequence[int]) -> None:
        """Hand on."""
        self._inner.append(session_id, token_ids)

    def close(self, session_id: int) -> None:
        """Hand on."""
        self._inner.close(session_id)

    def propose(self, queries: Sequence[DraftQuery]) -> list[list[OutcomeRow]]:
        """Propose, not before the time is up."""
        began = time.perf_counter()
        answers = self._inner.propose(queries)
        lengths = (len(row.draft_token_ids) for rows in answers for row in rows)
        due = began + (1 + max(lengths, default=0)) * self.draft_s
        time.sleep(max(0.0, due - time.perf_counter()))
        return answers
