"""SGLang's side of remote drafting: an algorithm of its own; imported in its processes alone.

A step runs the target over each sequence's last token and its draft in one forward, chooses a token
behind each of them with the request's own noise, and keeps what the draft foresaw. So the text is
that of plain decoding. A step without drafts is one of width one. SGLang's scheduler runs such
workers synchronously here: every step needs the tokens of the last one on the host.

B: sequences, W: width of the step, S: SGLang's fixed width of results, V: vocabulary.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sglang.srt.layers.logprob_processor import compute_spec_logprobs
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_device, get_spec
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker
from sglang.srt.speculative.ngram_info import NgramVerifyInput
from sglang.srt.speculative.spec_utils import GrammarTree, build_grammar_vocab_mask
from sglang.srt.utils.async_probe import sanitize_nan_logits

from deployments.engine.sglang_engine.choosing import choose
from deployments.engine.sglang_engine.draft_client import DraftClient
from deployments.engine.sglang_engine.draft_rounds import DraftRounds, Running
from deployments.engine.sglang_engine.noise_sampler import row_of
from deployments.engine.sglang_engine.own_params import (
    CUSTOM_PARAMS_KEY,
    DRAFT_LINK,
    read_own_params,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from deployments.engine.sglang_engine.draft_rounds import Committed


_MOST_SHAPES = 128


class RemoteDraftWorker(BaseSpecWorker):  # type: ignore[misc]
    """Verifies chains that a draft pool, or this process, guessed."""

    def __init__(
        self,
        server_args: Any,  # noqa: ANN401 - SGLang's
        gpu_id: int,
        nccl_port: int,
        target_worker: Any,  # noqa: ANN401
    ) -> None:
        """Called once per scheduler process, by name."""
        super().__init__()
        del gpu_id, nccl_port
        self._target_worker = target_worker
        self._draft_worker = None
        self._device = get_device().device
        self._stride: int = get_spec().speculative_num_draft_tokens
        # Recorded graphs are of this width alone; what is narrower runs kernel by kernel.
        self._is_fixed = self._device != "cpu" and not server_args.disable_cuda_graph
        client = DraftClient(os.environ[DRAFT_LINK])
        self._stalls = client.stalls
        self._rounds = DraftRounds(client.speculator, client.settings.identity.vocab_size)

    def alloc_memory_pool(self, **_: Any) -> None:  # noqa: ANN401, D102 - SGLang's method
        pool, allocator = self._target_worker.get_memory_pool()
        self.req_to_token_pool, self.token_to_kv_pool_allocator = pool, allocator

    def note_request_finished(self, *, rid: str, natural_stop: bool) -> None:  # noqa: D102
        del natural_stop
        self._rounds.leave(rid)

    def forward_batch_generation(  # noqa: D102
        self,
        batch: Any,  # noqa: ANN401
        on_publish: Any = None,  # noqa: ANN401
        pp_proxy_tensors: Any = None,  # noqa: ANN401
    ) -> GenerationBatchResult:
        if not batch.forward_mode.is_decode():
            return self._prefill(batch, on_publish, pp_proxy_tensors)
        began_at = time.perf_counter()
        drafts = self._rounds.begin([self._running(req) for req in batch.reqs])
        width = self._stride if self._is_fixed else 1 + max(map(len, drafts))
        tokens_BW = _rectangle(batch.reqs, drafts, width).to(self._device)
        self._prepare(batch, tokens_BW)
        self._rounds.announce()
        prepared_at = time.perf_counter()
        result = self._target_worker.forward_batch_generation(batch, is_verify=True)
        logits_output = result.logits_output
        self._adjust(batch, logits_output.next_token_logits, tokens_BW, drafts)
        choices = self._choose(batch, logits_output.next_token_logits, drafts, width)
        # Plain steps choose, too, and there the device is waited for: that is not the drafts' time.
        chosen_at = time.perf_counter()
        committed = self._rounds.end(choices)
        batch.forward_mode = ForwardMode.DECODE
        if batch.return_logprob:
            self._tell_logprobs(batch, logits_output, choices, committed, width)
        for req, one in zip(batch.reqs, committed, strict=True):
            _tell_counts(req, one)
        answer = self._result(batch, result, committed, on_publish)
        self._stalls.add(prepared_at - began_at + time.perf_counter() - chosen_at)
        return answer

    def _prefill(
        self,
        batch: Any,  # noqa: ANN401
        on_publish: Any,  # noqa: ANN401
        pp_proxy_tensors: Any,  # noqa: ANN401
    ) -> GenerationBatchResult:
        result = self._target_worker.forward_batch_generation(
            batch, pp_proxy_tensors=pp_proxy_tensors
        )
        num_reqs = len(batch.reqs)
        new_seq_lens = batch.seq_lens.clone()
        if on_publish is not None:
            on_publish(new_seq_lens)
        # One entry per output token; see ``_tell_counts``.
        result.logits_output.customized_info = {CUSTOM_PARAMS_KEY: [None] * num_reqs}
        accepted_BS = torch.zeros(num_reqs, self._stride, dtype=torch.int64, device=self._device)
        if num_reqs:
            accepted_BS[:, 0] = result.next_token_ids
        lens_B = torch.ones(num_reqs, dtype=torch.int32, device=self._device)
        result.accept_lens = lens_B
        result.new_seq_lens = new_seq_lens
        result.next_draft_input = self._relay(new_seq_lens, accepted_BS.flatten(), lens_B)
        result.speculative_num_draft_tokens = self._stride
        return result

    def _running(self, req: Any) -> Running:  # noqa: ANN401
        parameters = req.sampling_params
        room = parameters.max_new_tokens - len(req.output_ids) - 1
        return Running(
            rid=req.rid,
            own=read_own_params(parameters.custom_params),
            prompt_ids=req.origin_input_ids,
            output_ids=req.output_ids,
            max_draft_tokens=min(room, self._stride - 1),
        )

    def _prepare(self, batch: Any, tokens_BW: Tensor) -> None:  # noqa: ANN401
        """Make the batch one of verification."""
        num_reqs, width = tokens_BW.shape
        chains = _chains(num_reqs, width, self._device)
        positions_BW = batch.seq_lens[:, None] + chains.steps
        batch.forward_mode = ForwardMode.TARGET_VERIFY
        batch.input_ids = tokens_BW.flatten()
        # SGLang has reserved the slots behind the committed text.
        slots = batch.req_to_token_pool.req_to_token
        batch.out_cache_loc = (
            slots[batch.req_pool_indices[:, None], positions_BW].flatten().to(torch.int64)
        )
        batch.spec_info = NgramVerifyInput(
            draft_token=batch.input_ids,
            custom_mask=self._mask(batch, chains),
            positions=positions_BW.flatten(),
            retrieve_index=chains.rows,
            retrieve_next_token=chains.children,
            retrieve_next_sibling=chains.siblings,
            draft_token_num=width,
        )

    def _mask(self, batch: Any, chains: _Chains) -> Tensor:  # noqa: ANN401
        """Flat rows of who sees whom: all committed text and what comes before in the chain.

        On a CPU SGLang leaves the committed text out of it.
        """
        if self._device == "cpu":
            return chains.mask
        width = len(chains.steps)
        text = torch.ones(1, 1, dtype=torch.bool, device=self._device)
        return torch.cat(
            [
                torch.cat([text.expand(width, int(length)), chains.sees], dim=1).flatten()
                for length in batch.seq_lens_cpu
            ]
        )

    def _adjust(
        self,
        batch: Any,  # noqa: ANN401
        logits: Tensor,
        tokens_BW: Tensor,
        drafts: Sequence[tuple[int, ...]],
    ) -> None:
        """Penalties along each draft, the form, and biases; in place."""
        num_reqs, width = tokens_BW.shape
        logits_BWV = logits.view(num_reqs, width, -1)
        sanitize_nan_logits(logits, "verify: target model logits")
        for index, (req, draft) in enumerate(zip(batch.reqs, drafts, strict=True)):
            _penalise(logits_BWV[index], req, draft)
        if batch.has_grammar:
            mask = build_grammar_vocab_mask(
                reqs=batch.reqs,
                tree=GrammarTree.from_linear_chain(tokens_BW),
                sampling_info=batch.sampling_info,
                device=self._device,
                barrier=None,
            )
            if mask is not None:
                mask.apply(logits)
        if batch.sampling_info.logit_bias is not None:
            logits_BWV.add_(batch.sampling_info.logit_bias[:, None])

    def _choose(
        self,
        batch: Any,  # noqa: ANN401
        logits: Tensor,
        drafts: Sequence[tuple[int, ...]],
        width: int,
    ) -> list[list[int]]:
        """A token behind each sequence's text and behind each of its draft tokens."""
        wanted = [
            index * width + step
            for index, draft in enumerate(drafts)
            for step in range(len(draft) + 1)
        ]
        rows = [
            row
            for req, draft in zip(batch.reqs, drafts, strict=True)
            for row in [row_of(req)] * (len(draft) + 1)
        ]
        index_M = torch.tensor(wanted, device=self._device)
        positions_M = batch.spec_info.positions[index_M].to(torch.int64) + 1
        if len(wanted) < logits.shape[0]:
            logits = logits[index_M]
        found = iter(choose(logits, rows, positions_M).tolist())
        return [[next(found) for _ in range(len(draft) + 1)] for draft in drafts]

    def _tell_logprobs(
        self,
        batch: Any,  # noqa: ANN401
        logits_output: Any,  # noqa: ANN401
        choices: Sequence[Sequence[int]],
        committed: Sequence[Committed],
        width: int,
    ) -> None:
        predicted = torch.zeros(len(choices) * width, dtype=torch.int64)
        accepted_BS = torch.full((len(choices), self._stride), -1, dtype=torch.int64)
        for index, (chosen, one) in enumerate(zip(choices, committed, strict=True)):
            start = index * width
            predicted[start : start + len(chosen)] = torch.tensor(chosen)
            length = len(one.token_ids)
            accepted_BS[index, :length] = torch.arange(start, start + length)
        compute_spec_logprobs(
            batch,
            logits_output,
            predicted.to(self._device),
            accept_index=accepted_BS.to(self._device),
        )

    def _result(
        self,
        batch: Any,  # noqa: ANN401
        result: Any,  # noqa: ANN401
        committed: Sequence[Committed],
        on_publish: Any,  # noqa: ANN401
    ) -> GenerationBatchResult:
        lens = [len(one.token_ids) for one in committed]
        rows = [
            token_id
            for one in committed
            for token_id in (*one.token_ids, *[0] * (self._stride - len(one.token_ids)))
        ]
        lens_B = torch.tensor(lens, dtype=torch.int32, device=self._device)
        accepted = torch.tensor(rows, dtype=torch.int64, device=self._device)
        new_seq_lens = batch.seq_lens + lens_B
        if on_publish is not None:
            on_publish(new_seq_lens)
        return GenerationBatchResult(
            logits_output=result.logits_output,
            next_token_ids=accepted,
            can_run_cuda_graph=result.can_run_cuda_graph,
            accept_lens=lens_B,
            new_seq_lens=new_seq_lens,
            next_draft_input=self._relay(new_seq_lens, accepted, lens_B),
            speculative_num_draft_tokens=self._stride,
        )

    def _relay(self, new_seq_lens: Tensor, accepted: Tensor, lens_B: Tensor) -> NgramVerifyInput:
        return NgramVerifyInput(
            draft_token_num=self._stride,
            new_seq_lens=new_seq_lens,
            accept_tokens=accepted,
            accept_lens=lens_B,
        )


class _Chains(NamedTuple):
    """What all steps of one shape have in common; nobody writes to it.

    Attributes:
        steps: [W] 0, 1, ...
        rows: [B, W], places in the flat batch.
        children: [B, W], -1 behind the last token.
        siblings: [B, W], -1 throughout.
        sees: [W, W], who sees whom.
        mask: the same for all sequences, flat.
    """

    steps: Tensor
    rows: Tensor
    children: Tensor
    siblings: Tensor
    sees: Tensor
    mask: Tensor


@lru_cache(maxsize=_MOST_SHAPES)
def _chains(num_reqs: int, width: int, device: str) -> _Chains:
    steps_W = torch.arange(width, device=device)
    next_W = torch.where(steps_W + 1 < width, steps_W + 1, -1)
    next_BW = next_W.expand(num_reqs, width).contiguous()
    chain_WW = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    return _Chains(
        steps=steps_W,
        rows=torch.arange(num_reqs * width, device=device).view(num_reqs, width),
        children=next_BW,
        siblings=torch.full_like(next_BW, -1),
        sees=chain_WW,
        mask=chain_WW.flatten().repeat(num_reqs),
    )


def _rectangle(reqs: Sequence[Any], drafts: Sequence[tuple[int, ...]], width: int) -> Tensor:
    """[B, W] int64: the last token, the draft, and its last token again as padding."""
    rows = []
    for req, draft in zip(reqs, drafts, strict=True):
        chain = [req.output_ids[-1], *draft]
        rows.append(chain + chain[-1:] * (width - len(chain)))
    return torch.tensor(rows, dtype=torch.int64)


def _penalise(logits_WV: Tensor, req: Any, draft: tuple[int, ...]) -> None:  # noqa: ANN401
    """What SGLang's penalties of the output would be behind each draft token."""
    parameters = req.sampling_params
    presence, frequency = parameters.presence_penalty, parameters.frequency_penalty
    if not presence and not frequency:
        return
    counts = Counter(req.output_ids)
    for step in range(len(draft) + 1):
        if step:
            counts[draft[step - 1]] += 1
        ids = torch.tensor(list(counts), device=logits_WV.device)
        values = [-presence - frequency * count for count in counts.values()]
        logits_WV[step].index_add_(
            0, ids, torch.tensor(values, dtype=logits_WV.dtype, device=logits_WV.device)
        )


def _tell_counts(req: Any, committed: Committed) -> None:  # noqa: ANN401
    """With the first of the step's tokens; SGLang slices these entries as it slices tokens."""
    if req.customized_info is None:
        req.customized_info = {}
    entries = req.customized_info.setdefault(CUSTOM_PARAMS_KEY, [])
    entries.append(list(committed.counts))
    entries += [None] * (len(committed.token_ids) - 1)
