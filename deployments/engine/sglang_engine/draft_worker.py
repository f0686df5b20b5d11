"""SGLang's side of remote drafting: an algorithm of its own; imported in its processes alone.

A step runs the target over each sequence's last token and its draft in one forward, chooses a token
behind each of them with the request's own noise, and keeps what the draft foresaw. So the text is
that of plain decoding. A step without drafts decodes plainly. SGLang's scheduler runs such
workers synchronously here: every step needs the tokens of the last one on the host. With tensor
parallelism each rank has a worker, and the first one's drafts and tokens are those of all.

B: sequences, W: width of the step, S: SGLang's fixed width of results, V: vocabulary.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.logprob_processor import compute_spec_logprobs
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_device, get_parallel, get_spec
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker
from sglang.srt.speculative.ngram_info import NgramVerifyInput
from sglang.srt.speculative.spec_utils import GrammarTree, build_grammar_vocab_mask
from sglang.srt.utils.async_probe import sanitize_nan_logits

from deployments.engine.sglang_engine.choosing import choose
from deployments.engine.sglang_engine.draft_client import DraftClient
from deployments.engine.sglang_engine.draft_ranks import FollowingRounds, LeadingRounds
from deployments.engine.sglang_engine.draft_rounds import DraftRounds, Running
from deployments.engine.sglang_engine.noise_sampler import row_of
from deployments.engine.sglang_engine.own_params import (
    CUSTOM_PARAMS_KEY,
    DRAFT_LINK,
    read_own_params,
)
from deployments.engine.sglang_engine.step_stalls import StepStalls
from deployments.engine.sglang_engine.verify_rows import moves, verify_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from deployments.engine.sglang_engine.draft_ranks import Rounds
    from deployments.engine.sglang_engine.draft_rounds import Committed
    from deployments.engine.sglang_engine.verify_rows import VerifyRows
    from deployments.engine.speculation.types import DraftTree


class RemoteDraftWorker(BaseSpecWorker):  # type: ignore[misc]
    """Verifies what a draft pool, or this process, guessed."""

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
        self._stalls, self._rounds = _rounds(self._stride - 1)

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
        rows = verify_rows([req.output_ids[-1] for req in batch.reqs], drafts, width)
        positions_N = (batch.seq_lens[:, None] + rows.depths.to(self._device)).flatten()
        with (
            self._verifying(batch, rows, positions_N) if width > 1 else self._decoding(batch, rows)
        ):
            self._rounds.announce()
            prepared_at = time.perf_counter()
            result = self._target_worker.forward_batch_generation(batch, is_verify=True)
        logits_output = result.logits_output
        self._adjust(batch, logits_output.next_token_logits, rows, drafts)
        choices = self._choose(logits_output.next_token_logits, batch.reqs, drafts, positions_N)
        # Plain steps choose, too, and there the device is waited for: that is not the drafts' time.
        chosen_at = time.perf_counter()
        committed = self._rounds.end(choices)
        self._move(batch, committed, width)
        if batch.return_logprob:
            self._tell_logprobs(batch, logits_output, committed, width)
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

    @contextmanager
    def _decoding(self, batch: Any, rows: VerifyRows) -> Iterator[None]:  # noqa: ANN401
        """Make the batch one of plain decoding: backends have a faster way for it."""
        self._place(batch, rows)
        spec_info = batch.spec_info
        lens = batch.seq_lens, batch.seq_lens_cpu, batch.orig_seq_lens
        batch.seq_lens, batch.seq_lens_cpu, batch.orig_seq_lens = (each + 1 for each in lens)
        batch.seq_lens_sum = batch.spec_info = None
        try:
            yield
        finally:
            batch.seq_lens, batch.seq_lens_cpu, batch.orig_seq_lens = lens
            batch.seq_lens_sum, batch.spec_info = None, spec_info

    @contextmanager
    def _verifying(
        self,
        batch: Any,  # noqa: ANN401
        rows: VerifyRows,
        positions_N: Tensor,
    ) -> Iterator[None]:
        """Make the batch one of verification."""
        num_reqs, width = rows.tokens.shape
        self._place(batch, rows)
        batch.forward_mode = ForwardMode.TARGET_VERIFY
        batch.spec_info = NgramVerifyInput(
            draft_token=batch.input_ids,
            custom_mask=self._mask(batch, rows.sees),
            positions=positions_N,
            retrieve_index=torch.arange(num_reqs * width, device=self._device).view(-1, width),
            retrieve_next_token=rows.first_child.to(self._device),
            retrieve_next_sibling=rows.next_sibling.to(self._device),
            draft_token_num=width,
        )
        try:
            yield
        finally:
            batch.forward_mode = ForwardMode.DECODE

    def _place(self, batch: Any, rows: VerifyRows) -> None:  # noqa: ANN401
        """Tokens to the device, and where their keys and values go."""
        batch.input_ids = rows.tokens.flatten().to(self._device)
        # SGLang has reserved the slots behind the committed text.
        steps_W = torch.arange(rows.tokens.shape[1], device=self._device)
        places_BW = batch.seq_lens[:, None] + steps_W
        slots = batch.req_to_token_pool.req_to_token
        batch.out_cache_loc = (
            slots[batch.req_pool_indices[:, None], places_BW].flatten().to(torch.int64)
        )

    def _mask(self, batch: Any, sees_BWW: Tensor) -> Tensor:  # noqa: ANN401
        """Flat rows of who sees whom: all committed text, and what comes before in the draft.

        On a CPU SGLang leaves the committed text out of it.
        """
        sees_BWW = sees_BWW.to(self._device)
        if self._device == "cpu":
            return sees_BWW.flatten()
        text = torch.ones(1, 1, dtype=torch.bool, device=self._device)
        return torch.cat(
            [
                torch.cat([text.expand(len(own), int(length)), own], dim=1).flatten()
                for own, length in zip(sees_BWW, batch.seq_lens_cpu, strict=True)
            ]
        )

    def _adjust(
        self,
        batch: Any,  # noqa: ANN401
        logits: Tensor,
        rows: VerifyRows,
        drafts: Sequence[DraftTree],
    ) -> None:
        """Penalties along each draft, the form, and biases; in place."""
        num_reqs, width = rows.tokens.shape
        logits_BWV = logits.view(num_reqs, width, -1)
        sanitize_nan_logits(logits, "verify: target model logits")
        for index, (req, draft) in enumerate(zip(batch.reqs, drafts, strict=True)):
            _penalise(logits_BWV[index], req, draft)
        if batch.has_grammar:
            mask = build_grammar_vocab_mask(
                reqs=batch.reqs,
                tree=GrammarTree.from_host(rows.first_child, rows.next_sibling, rows.tokens),
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
        logits: Tensor,
        reqs: Sequence[Any],
        drafts: Sequence[DraftTree],
        positions_N: Tensor,
    ) -> list[list[int]]:
        """A token behind each sequence's text and behind each node of its draft."""
        width = len(positions_N) // len(drafts)
        wanted = [
            index * width + step
            for index, draft in enumerate(drafts)
            for step in range(len(draft) + 1)
        ]
        rows = [
            row
            for req, draft in zip(reqs, drafts, strict=True)
            for row in [row_of(req)] * (len(draft) + 1)
        ]
        index_M = torch.tensor(wanted, device=self._device)
        positions_M = positions_N[index_M].to(torch.int64) + 1
        if len(wanted) < logits.shape[0]:
            logits = logits[index_M]
        found = iter(choose(logits, rows, positions_M).tolist())
        return [[next(found) for _ in range(len(draft) + 1)] for draft in drafts]

    def _move(self, batch: Any, committed: Sequence[Committed], width: int) -> None:  # noqa: ANN401
        """Put the keys and values of accepted nodes right behind the text, in order."""
        sources, destinations = moves([one.nodes for one in committed], width)
        if sources:
            slots = batch.out_cache_loc
            self.token_to_kv_pool_allocator.get_kvcache().move_kv_cache(
                tgt_loc=slots[destinations], src_loc=slots[sources]
            )

    def _tell_logprobs(
        self,
        batch: Any,  # noqa: ANN401
        logits_output: Any,  # noqa: ANN401
        committed: Sequence[Committed],
        width: int,
    ) -> None:
        predicted = torch.zeros(len(committed) * width, dtype=torch.int64)
        accepted_BS = torch.full((len(committed), self._stride), -1, dtype=torch.int64)
        for index, one in enumerate(committed):
            rows = torch.tensor([0, *(1 + node for node in one.nodes)]) + index * width
            predicted[rows] = torch.tensor(one.token_ids)
            accepted_BS[index, : len(rows)] = rows
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
        lens_B = torch.tensor(lens, dtype=torch.int32, device=self._device)
        accepted = torch.tensor(
            [
                token
                for one in committed
                for token in (*one.token_ids, *[0] * (self._stride - len(one.token_ids)))
            ],
            device=self._device,
        )
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


def _rounds(max_nodes: int) -> tuple[StepStalls, Rounds]:
    """This rank's part in drafting, and who is told what it costs."""
    parallel = get_parallel()
    group = parallel.tp_group
    share = partial(torch.distributed.broadcast, src=group.first_rank, group=group.cpu_group)
    if parallel.tp_rank > 0:
        return StepStalls(), FollowingRounds(share, max_nodes)
    # Backends take a draft for a chain where SGLang is told of one branch.
    takes_trees = get_spec().speculative_eagle_topk > 1
    client = DraftClient(os.environ[DRAFT_LINK], takes_trees=takes_trees)
    vocab_size = client.settings.identity.vocab_size
    rounds = DraftRounds(client.speculator, vocab_size, takes_trees=takes_trees)
    if parallel.tp_size == 1:
        return client.stalls, rounds
    return client.stalls, LeadingRounds(rounds, share, max_nodes)


def _penalise(logits_WV: Tensor, req: Any, draft: DraftTree) -> None:  # noqa: ANN401
    """What SGLang's penalties of the output would be behind each node."""
    parameters = req.sampling_params
    presence, frequency = parameters.presence_penalty, parameters.frequency_penalty
    if not presence and not frequency:
        return
    written = Counter(req.output_ids)
    for node in range(-1, len(draft)):
        counts = written + Counter(draft.token_ids[step] for step in draft.path_to(node))
        ids = torch.tensor(list(counts), device=logits_WV.device)
        values = [-presence - frequency * count for count in counts.values()]
        logits_WV[node + 1].index_add_(
            0, ids, torch.tensor(values, dtype=logits_WV.dtype, device=logits_WV.device)
        )


def _tell_counts(req: Any, committed: Committed) -> None:  # noqa: ANN401
    """With the first of the step's tokens; SGLang slices these entries as it slices tokens."""
    if req.customized_info is None:
        req.customized_info = {}
    entries = req.customized_info.setdefault(CUSTOM_PARAMS_KEY, [])
    entries.append(list(committed.counts))
    entries += [None] * (len(committed.token_ids) - 1)
