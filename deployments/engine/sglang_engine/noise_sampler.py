"""SGLang's sampler with our noise; imported in its scheduler processes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.sampler import Sampler

from deployments.engine.sglang_engine.choosing import choose, warm_up
from deployments.engine.sglang_engine.own_params import (
    GREEDY,
    SamplingRow,
    read_own_params,
    sampling_row,
)

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = "paceline_rows"
_ROW = "paceline_row"


class NoiseSampler(Sampler):  # type: ignore[misc] # SGLang has no types here
    """Draws with ``speculation.noise``: the text is a function of seed, choice and position."""

    def __init__(self) -> None:
        """Called once per scheduler process, before the model is loaded."""
        super().__init__()
        if not torch.cuda.is_available():
            warm_up()

    def forward(  # noqa: D102 - SGLang's method
        self,
        logits_output: Any,  # noqa: ANN401 - SGLang's
        sampling_info: Any,  # noqa: ANN401
        return_logprob: bool,
        top_logprobs_nums: list[int],
        token_ids_logprobs: list[list[int]],
        positions: Tensor,
        *,
        logprob_logits: Tensor | None = None,
    ) -> Tensor:
        rows: list[SamplingRow] | None = getattr(sampling_info, _ROWS, None)
        if rows is None or sampling_info.is_all_greedy:
            theirs: Tensor = super().forward(
                logits_output,
                sampling_info,
                return_logprob,
                top_logprobs_nums,
                token_ids_logprobs,
                positions,
                logprob_logits=logprob_logits,
            )
            return theirs
        logits = self._preprocess_logits(logits_output.next_token_logits, sampling_info)
        # What a token is chosen from stands at the position before its own.
        tokens = choose(logits, rows, positions.to(torch.int64) + 1)
        if return_logprob:
            self.output_logprob_processor.compute_logprobs(
                torch.log_softmax(logits, dim=-1), top_logprobs_nums, token_ids_logprobs, tokens
            ).write_output_to(logits_output)
        self._sync_token_ids_across_tp(tokens, sampling_info)
        return tokens


def row_of(req: Any) -> SamplingRow:  # noqa: ANN401 - SGLang's
    """How the tokens of one of SGLang's requests are chosen."""
    row: SamplingRow | None = getattr(req, _ROW, None)
    if row is None:
        params = read_own_params(req.sampling_params.custom_params)
        row = GREEDY if params is None else sampling_row(params)
        setattr(req, _ROW, row)
    return row


def add_rows(forward_batch: Any, _: type, batch: Any, *__: Any, **___: Any) -> None:  # noqa: ANN401
    """Behind ``ForwardBatch.init_new``: the sampler sees the sampling settings, not requests."""
    if forward_batch.sampling_info is not None:
        setattr(forward_batch.sampling_info, _ROWS, [row_of(req) for req in batch.reqs])
