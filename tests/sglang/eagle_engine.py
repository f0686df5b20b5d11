"""SGLang drafts with an EAGLE-3 head on a CPU. Runs in SGLang's Python.

SGLang 0.5.23 has EAGLE kernels for CUDA and for CPUs with AMX alone, and no attention backend that
drafts without them. Here are the few that chains need (``topk`` 1), written in torch, and the two
attention backends; scheduler, workers, model classes and verification are SGLang's own. Every
forward of the head is kept as a file, in order: rows in, logits out.

``python eagle_engine.py JOB.json``: ``model``, ``head``, ``out`` (a folder), ``prompts`` (token
ids), ``max_tokens``, ``num_steps``. Writes ``out/answers.json`` and ``out/NNNNN.safetensors``.
"""

from __future__ import annotations

import json
import os
import sys
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sgl_kernel
import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from torch import Tensor

_OUT = "PACELINE_EAGLE_OUT"


# The names and arguments of these are SGLang's.


def assign_draft_cache_locs_contiguous_cpu(
    pools: Tensor, slots: Tensor, lengths: Tensor, out: Tensor, _: int, topk: int, steps: int
) -> None:
    width = topk * steps
    for row, (pool, length) in enumerate(zip(pools.tolist(), lengths.tolist(), strict=True)):
        out[row * width : (row + 1) * width] = slots[pool, length : length + width]


def assign_extend_cache_locs_cpu(
    pools: Tensor, slots: Tensor, starts: Tensor, ends: Tensor, out: Tensor, _: int
) -> None:
    at = 0
    for pool, start, end in zip(pools.tolist(), starts.tolist(), ends.tolist(), strict=True):
        out[at : at + end - start] = slots[pool, start:end]
        at += end - start


def assign_req_to_token_pool_cpu(
    pools: Tensor, slots: Tensor, starts: Tensor, ends: Tensor, given: Tensor, _: int
) -> None:
    at = 0
    for pool, start, end in zip(pools.tolist(), starts.tolist(), ends.tolist(), strict=True):
        slots[pool, start:end] = given[at : at + end - start].to(slots.dtype)
        at += end - start


def build_tree_kernel_efficient_cpu(
    parents: Tensor,
    selected: Tensor,
    lengths: Tensor,
    mask: Tensor,
    positions: Tensor,
    index: Tensor,
    next_token: Tensor,
    next_sibling: Tensor,
    topk: int,
    steps: int,
    width: int,
    mode: int,
) -> None:
    del parents, selected, steps, mode
    if topk != 1:
        raise NotImplementedError("chains only")
    rows, batch = torch.arange(width), len(lengths)
    mask.view(batch, width, width).copy_(rows[:, None] >= rows)
    positions.view(batch, width).copy_(lengths[:, None] + rows)
    index.copy_(torch.arange(batch * width).view(batch, width))
    next_token.copy_(torch.where(rows < width - 1, rows + 1, -1).expand(batch, -1))
    next_sibling.fill_(-1)


def verify_tree_greedy_cpu(
    *,
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    target_predict: Tensor,
    **_: Tensor,
) -> None:
    for row, (drafted, right) in enumerate(
        zip(candidates.tolist(), target_predict.tolist(), strict=True)
    ):
        accepted = 0
        while accepted + 1 < len(drafted) and drafted[accepted + 1] == right[accepted]:
            accepted += 1
        accept_token_num[row] = accepted
        accept_index[row, : accepted + 1] = retrive_index[row, : accepted + 1].int()
        predicts[retrive_index[row]] = target_predict[row].int()


def fill_bonus_tokens_cpu(tokens: Tensor, lengths: Tensor, bonus: Tensor, width: int) -> None:
    rows = torch.arange(len(lengths))
    bonus.copy_(tokens.view(-1, width)[rows, lengths.long() - 1])


def copy_all_layer_kv_cache_cpu(_: Tensor, __: Tensor, targets: Tensor, sources: Tensor) -> None:
    # SGLang tries it once at the start, on a row and itself. Rows of a chain are never moved.
    if not torch.equal(targets, sources):
        raise NotImplementedError("chains only")


for _kernel in (
    assign_draft_cache_locs_contiguous_cpu,
    assign_extend_cache_locs_cpu,
    assign_req_to_token_pool_cpu,
    build_tree_kernel_efficient_cpu,
    verify_tree_greedy_cpu,
    fill_bonus_tokens_cpu,
    copy_all_layer_kv_cache_cpu,
):
    setattr(sgl_kernel, _kernel.__name__, _kernel)

# Behind the kernels: its modules take them by name when they are imported.
from sglang.srt.entrypoints.engine import Engine  # noqa: E402
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend  # noqa: E402
from sglang.srt.managers.scheduler import run_scheduler_process  # noqa: E402
from sglang.srt.models.llama_eagle3 import LlamaForCausalLMEagle3  # noqa: E402
from sglang.srt.speculative.draft_utils import DraftBackendFactory  # noqa: E402

_extend = TorchNativeAttnBackend.forward_extend
_head_forward = LlamaForCausalLMEagle3.forward


def _extend_or_verify(
    self: Any, q: Tensor, k: Tensor, v: Tensor, layer: Any, batch: Any, save_kv_cache: bool = True
) -> Tensor:
    """A chain under verification is an extension of the committed text by all of its tokens."""
    if not batch.forward_mode.is_target_verify():
        return _extend(self, q, k, v, layer, batch, save_kv_cache)
    committed, width = batch.seq_lens, batch.spec_info.draft_token_num
    batch.seq_lens = committed + width
    batch.extend_prefix_lens = committed
    batch.extend_seq_lens = torch.full_like(committed, width)
    try:
        return _extend(self, q, k, v, layer, batch, save_kv_cache)
    finally:
        batch.seq_lens = committed
        batch.extend_prefix_lens = batch.extend_seq_lens = None


class _DraftStep(TorchNativeAttnBackend):
    """Attention of one draft step, which sees the rows of the steps before it."""

    def __init__(self, runner: Any, step: int) -> None:
        super().__init__(runner)
        self._num_drafted = step + 1

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: Any,
        batch: Any,
        save_kv_cache: bool = True,
    ) -> Tensor:
        committed = batch.seq_lens
        batch.seq_lens = committed + self._num_drafted
        try:
            return super().forward_decode(q, k, v, layer, batch, save_kv_cache)
        finally:
            batch.seq_lens = committed


class _DraftSteps:
    """What SGLang calls a multi-step draft backend."""

    def __init__(self, factory: Any) -> None:
        steps = range(factory.speculative_num_steps - 1)
        self.attn_backends = [_DraftStep(factory.draft_model_runner, step) for step in steps]

    def init_forward_metadata(self, batch: Any) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata(batch)


def run_scheduler(*arguments: Any, **named: Any) -> Any:
    """SGLang's scheduler, in its own process."""
    out, number = Path(os.environ[_OUT]), count()

    def kept(self: Any, token_ids: Tensor, positions: Tensor, batch: Any, *rest: Any) -> Any:
        output = _head_forward(self, token_ids, positions, batch, *rest)
        tensors = {
            "token_ids": token_ids.long().clone(),
            "positions": positions.long().clone(),
            "logits": output.next_token_logits.float().clone(),
            "is_draft": torch.tensor(batch.forward_mode.is_decode()),
            "is_prompt": torch.tensor(not batch.forward_mode.is_draft_extend_v2()),
        }
        save_file(tensors, out / f"{next(number):05d}.safetensors")
        return output

    LlamaForCausalLMEagle3.forward = kept
    TorchNativeAttnBackend.forward_extend = _extend_or_verify
    DraftBackendFactory.create_decode_backend = lambda factory: _DraftSteps(factory)
    DraftBackendFactory.create_draft_extend_backend = lambda factory: TorchNativeAttnBackend(
        factory.draft_model_runner
    )
    return run_scheduler_process(*arguments, **named)


class _ChainEngine(Engine):
    run_scheduler_process_func = staticmethod(run_scheduler)


def main(job: dict[str, Any]) -> None:
    """Answer the prompts greedily, one behind the other."""
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    os.environ[_OUT] = str(out)
    engine = _ChainEngine(
        model_path=job["model"],
        device="cpu",
        attention_backend="torch_native",
        dtype="float32",
        max_total_tokens=4096,
        max_running_requests=1,
        disable_radix_cache=True,
        speculative_algorithm="EAGLE3",
        speculative_draft_model_path=job["head"],
        speculative_num_steps=job["num_steps"],
        speculative_num_draft_tokens=job["num_steps"] + 1,
        speculative_eagle_topk=1,
    )
    try:
        sampling = {"temperature": 0, "max_new_tokens": job["max_tokens"]}
        answers = [
            engine.generate(input_ids=ids, sampling_params=sampling) for ids in job["prompts"]
        ]
    finally:
        engine.shutdown()
    kept = [
        {"token_ids": answer["output_ids"], "num_rounds": answer["meta_info"]["spec_verify_ct"]}
        for answer in answers
    ]
    (out / "answers.json").write_text(json.dumps(kept), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
