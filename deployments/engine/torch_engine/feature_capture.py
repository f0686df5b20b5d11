"""Lets a model write answers and keeps what passes between its layers on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from deployments.engine.torch_engine.forward_batch import ForwardBatch, SequenceSpan
from deployments.engine.torch_engine.kv_cache import KVCache
from deployments.engine.torch_engine.model_runner import ModelRunner
from kv_store.layout import PAGE_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from deployments.engine.torch_engine.weights.loader import LoadedModel

_PREFILL_TOKENS = 1024
_SAMPLED_TEMPERATURE = 0.8


class CapturedText(NamedTuple):
    """Texts and their features.

    Attributes:
        texts: prompt and answer of each sequence.
        prompt_lengths: of each sequence.
        features: per captured layer [N, E] float32 on the CPU.
        is_answer: [N] bool, whether the row predicts a token of the answer.
    """

    texts: list[list[int]]
    prompt_lengths: list[int]
    features: tuple[Tensor, ...]
    is_answer: Tensor


@dataclass(slots=True)
class _Sequence:
    token_ids: list[int]
    prompt_length: int
    temperature: float
    slots: Tensor
    num_computed: int = 0


def capture_answers(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    num_new_tokens: int,
    capture_layers: tuple[int, ...],
    progress: Callable[[str], None],
) -> CapturedText:
    """Answer all prompts together, every second one greedily, the others sampled.

    Args:
        loaded: the model that answers.
        prompts: token ids, none empty.
        num_new_tokens: length of an answer, unless the model ends it earlier.
        capture_layers: as in ``ModelRunner.forward_with_features``.
        progress: gets a short line from time to time.
    """
    longest = max(len(prompt) for prompt in prompts) + num_new_tokens
    pages_each = -(-longest // PAGE_TOKENS)
    cache = KVCache(
        loaded.config,
        pages_each * len(prompts),
        dtype=loaded.model.dtype,
        device=loaded.model.device,
    )
    runner = ModelRunner(loaded.model, loaded.config, cache)
    slots = torch.arange(cache.num_slots).view(len(prompts), -1)
    sequences = [
        _Sequence(list(prompt), len(prompt), _SAMPLED_TEMPERATURE * (i % 2), slots[i])
        for i, prompt in enumerate(prompts)
    ]
    collected: list[tuple[Tensor, ...]] = []
    is_answer: list[bool] = []
    generator = torch.Generator().manual_seed(0)
    running = sequences
    for step in range(num_new_tokens):
        for part in _cut(running):
            logits, features = runner.forward_with_features(_batch(part), capture_layers)
            collected.append(tuple(feature.float().cpu() for feature in features))
            for sequence, token_id in zip(part, _choose(logits, part, generator), strict=True):
                length = len(sequence.token_ids)
                first = sequence.prompt_length - 1
                is_answer += [at >= first for at in range(sequence.num_computed, length)]
                sequence.num_computed = length
                sequence.token_ids.append(token_id)
        ends = loaded.config.eos_token_ids
        running = [sequence for sequence in running if sequence.token_ids[-1] not in ends]
        if not running:
            break
        if step % 10 == 0:
            progress(f"writing answers: token {step + 1} of {num_new_tokens}")
    return CapturedText(
        texts=[sequence.token_ids for sequence in sequences],
        prompt_lengths=[sequence.prompt_length for sequence in sequences],
        features=tuple(torch.cat(layer) for layer in zip(*collected, strict=True)),
        is_answer=torch.tensor(is_answer),
    )


def _cut(sequences: Sequence[_Sequence]) -> list[list[_Sequence]]:
    """Batches of at most ``_PREFILL_TOKENS`` new tokens (or one longer sequence)."""
    batches: list[list[_Sequence]] = []
    room = 0
    for sequence in sequences:
        num_new = len(sequence.token_ids) - sequence.num_computed
        if not batches or num_new > room:
            batches.append([])
            room = _PREFILL_TOKENS
        batches[-1].append(sequence)
        room -= num_new
    return batches


def _batch(sequences: Sequence[_Sequence]) -> ForwardBatch:
    """All tokens that have no KV row yet; logits behind each sequence's last one."""
    spans: list[SequenceSpan] = []
    token_ids: list[int] = []
    positions: list[int] = []
    for sequence in sequences:
        start, end = sequence.num_computed, len(sequence.token_ids)
        spans.append(
            SequenceSpan(start=len(token_ids), length=end - start, kv_slots=sequence.slots[:end])
        )
        token_ids += sequence.token_ids[start:]
        positions += range(start, end)
    return ForwardBatch(
        token_ids=torch.tensor(token_ids),
        positions=torch.tensor(positions),
        slots=torch.cat([span.kv_slots[-span.length :] for span in spans]),
        spans=tuple(spans),
        logit_rows=torch.tensor([span.start + span.length - 1 for span in spans]),
    )


def _choose(
    logits_RV: Tensor, sequences: Sequence[_Sequence], generator: torch.Generator
) -> list[int]:
    logits_RV = logits_RV.cpu()
    temperature_R1 = torch.tensor([[s.temperature] for s in sequences])
    is_greedy = temperature_R1.squeeze(1) == 0
    probs_RV = (logits_RV / temperature_R1.clamp(min=1e-6)).softmax(dim=1)
    sampled = torch.multinomial(probs_RV, 1, generator=generator).squeeze(1)
    chosen: list[int] = torch.where(is_greedy, logits_RV.argmax(dim=1), sampled).tolist()
    return chosen
