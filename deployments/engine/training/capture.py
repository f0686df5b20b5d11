"""What a target computes on given texts, kept for training a draft."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from deployments.engine.torch_engine.forward_batch import ForwardBatch, SequenceSpan
from deployments.engine.torch_engine.kv_cache import KVCache
from deployments.engine.torch_engine.model_runner import ModelRunner
from deployments.engine.training.batches import FeatureText
from kv_store.layout import PAGE_TOKENS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from deployments.engine.torch_engine.weights.loader import LoadedModel

_LOGIT_ROWS = 256
"""Rows of the head at once: bounds the [rows, vocabulary] temporaries."""


class AnsweredPrompt(NamedTuple):
    """A text that the target wrote, or might have.

    Attributes:
        token_ids: prompt and answer.
        prompt_length: leading tokens that are not trained on.
    """

    token_ids: Sequence[int]
    prompt_length: int

    @classmethod
    def of(cls, text: FeatureText) -> AnsweredPrompt:
        """The text that was read for some features."""
        return cls(text.token_ids.tolist(), int(text.is_answer.nonzero()[0]) + 1)

    def fits(self, max_length: int) -> bool:
        """Whether there is something of an answer within the length."""
        return 0 < self.prompt_length < min(len(self.token_ids), max_length)


class FeatureCapture:
    """Runs a target over texts. Holds one KV pool, for one text at a time."""

    def __init__(
        self,
        loaded: LoadedModel,
        aux_layers: tuple[int, ...],
        *,
        max_length: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Allocate the pool.

        Args:
            loaded: the target.
            aux_layers: layers (counted from 0) whose outputs are kept.
            max_length: tokens of a text; the rest is cut off.
            dtype: of what is kept; the model's own by default.
        """
        model = loaded.model
        self._max_length = max_length
        self._dtype = dtype or model.dtype
        self._layers = (*(layer + 1 for layer in aux_layers), loaded.config.num_layers)
        num_pages = -(-max_length // PAGE_TOKENS)
        cache = KVCache(loaded.config, num_pages, dtype=model.dtype, device=model.device)
        self._model = model
        self._runner = ModelRunner(model, loaded.config, cache)

    def texts(self, answered: Iterable[AnsweredPrompt]) -> Iterator[FeatureText]:
        """One text with features for each that has an answer within the length, in order."""
        for prompt in answered:
            if prompt.fits(self._max_length):
                yield self._run(list(prompt.token_ids[: self._max_length]), prompt.prompt_length)

    def num_tokens(self, prompt: AnsweredPrompt) -> int:
        """Of a text, as far as it is read."""
        return min(len(prompt.token_ids), self._max_length)

    @torch.inference_mode()
    def _run(self, token_ids: list[int], prompt_length: int) -> FeatureText:
        rows = torch.arange(len(token_ids))
        batch = ForwardBatch(
            token_ids=torch.tensor(token_ids),
            positions=rows,
            slots=rows,
            spans=(SequenceSpan(start=0, length=len(rows), kv_slots=rows),),
            logit_rows=rows[-1:],
        )
        *aux, last = self._runner.forward_with_features(batch, self._layers).features
        hidden = self._model.norm(last)
        wanted = [self._model.lm_head(part).argmax(1) for part in hidden.split(_LOGIT_ROWS)]
        return FeatureText(
            token_ids=torch.tensor(token_ids, dtype=torch.int32),
            features=torch.cat(aux, dim=1).to("cpu", self._dtype),
            hidden=hidden.to("cpu", self._dtype),
            wanted=torch.cat(wanted).to("cpu", torch.int32),
            # The last row stands before a token that is not there.
            is_answer=(rows >= prompt_length - 1) & (rows < len(rows) - 1),
        )
