"""When two texts of one request differ: is it rounding, or a defect?

Token for token equality is demanded. A difference is admissible only where float64 arithmetic shows
the two best scores of the first differing position closer than ``MAX_GAP``, it is printed, and
there is at most one per ``TOKENS_PER_MISMATCH`` tokens compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from deployments.engine.speculation.noise import gumbel, row_key
from deployments.engine.torch_engine.forward_batch import ForwardBatch, SequenceSpan
from deployments.engine.torch_engine.kv_cache import KVCache
from deployments.engine.torch_engine.sampling_math import process_logits

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from deployments.engine.types import GenerationRequest

MAX_GAP = 1e-4
TOKENS_PER_MISMATCH = 20_000


class Reference:
    """The default model in float64. Scores one position of one text at a time."""

    def __init__(self, cache_dir: Path) -> None:
        self._cache_dir = cache_dir
        self._model = None

    def gap(self, request: GenerationRequest, output_ids: Sequence[int]) -> float:
        """Distance of the two best scores behind prompt and output."""
        logits = self._logits([*request.prompt_token_ids, *output_ids])
        sampling = request.sampling
        if sampling.is_greedy:
            scores = logits[0]
        else:
            processed = process_logits(
                logits,
                [sampling.temperature],
                [sampling.top_k],
                [sampling.top_p],
                [sampling.min_p],
            )
            position = len(request.prompt_token_ids) + len(output_ids)
            key = row_key(sampling.seed, request.choice_index, position)
            scores = (processed.double() + gumbel([key], torch.arange(logits.shape[1])))[0]
        best = torch.topk(scores, 2).values
        return float(best[0] - best[1])

    def _logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        if self._model is None:
            from deployments.engine.torch_engine.weights.loader import load_model

            loaded = load_model(
                "smollm2-135m-instruct", dtype="float32", device="cpu", cache_dir=self._cache_dir
            )
            self._model = loaded.model.double()
        length = len(token_ids)
        memory = KVCache(self._model.config, -(-length // 64), dtype=torch.float64, device="cpu")
        rows = torch.arange(length)
        batch = ForwardBatch(
            token_ids=torch.tensor(token_ids),
            positions=rows,
            slots=rows,
            spans=(SequenceSpan(start=0, length=length, kv_slots=rows),),
            logit_rows=rows[-1:],
        )
        with torch.inference_mode():
            return self._model(batch, memory).logits


def assert_same_text(
    reference: Reference,
    requests: Sequence[GenerationRequest],
    expected: Mapping[str, Sequence[int]],
    actual: Mapping[str, Sequence[int]],
) -> None:
    """Fail on the first difference that rounding does not explain, or on too many that it does."""
    num_tokens = 0
    num_mismatches = 0
    for request in requests:
        ours, theirs = actual[request.request_id], expected[request.request_id]
        num_tokens += len(theirs)
        if list(ours) == list(theirs):
            continue
        shared = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
            min(len(ours), len(theirs)),
        )
        gap = reference.gap(request, theirs[:shared])
        print(f"{request.request_id}: differs at output token {shared}, float64 gap {gap:.2e}")  # noqa: T201
        assert gap < MAX_GAP, f"{request.request_id} differs at {shared} with a gap of {gap:.2e}"
        num_mismatches += 1
    assert num_mismatches <= 1 + num_tokens // TOKENS_PER_MISMATCH
