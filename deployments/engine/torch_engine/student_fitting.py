"""Fits a student's connector in closed form on text its target wrote: weighted ridge regression.

For a 135M model this takes about a minute on two cores. The same fit is a good start for training
by gradient, worth some hundred thousand tokens of it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from deployments.engine.torch_engine.feature_capture import capture_answers
from deployments.engine.torch_engine.forward_batch import ForwardBatch, SequenceSpan
from deployments.engine.torch_engine.kv_cache import KVCache
from deployments.engine.torch_engine.model_runner import ModelRunner
from deployments.engine.torch_engine.student import StudentWeights, cut_student
from kv_store.layout import PAGE_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from deployments.engine.torch_engine.feature_capture import CapturedText
    from deployments.engine.torch_engine.weights.loader import LoadedModel

_ANSWER_LENGTH = 80
_MAX_PROMPT_TOKENS = 192
_SEQUENCES_AT_ONCE = 64
_HELD_OUT_SHARE = 1 / 16
_ANSWER_WEIGHT = 3.0
"""Drafts are asked for behind answers, so their rows count more than the prompts'."""
_RIDGE = 1e-4
_DRAFT_VOCABULARY = 8192
"""Tokens a student may guess: 91 % of what the default model writes on MT-bench, for a sixth of the
head's bytes."""
_SCALES = torch.arange(0.3, 1.51, 0.05).tolist()


def fit_student(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    tokens_budget: int = 20_000,
    progress: Callable[[str], None],
) -> StudentWeights:
    """Let the target answer prompts and fit its student on what passes between the layers.

    Args:
        loaded: the target; bfloat16 is several times faster where the CPU has instructions for
            it, and the student fits either way.
        prompts: token ids, with the chat template applied; very long ones are left out.
        tokens_budget: prompt and answer tokens to look at, at most (but never under two prompts).
        progress: gets short lines for a person to read.

    Raises:
        ValueError: the model has too few layers, or fewer than two prompts can be used.
    """
    num_layers = loaded.config.num_layers
    if num_layers < 5:
        raise ValueError(f"a model of {num_layers} layers is no larger than its student")
    chosen = _within_budget(prompts, tokens_budget)
    num_held_out = max(1, round(len(chosen) * _HELD_OUT_SHARE))
    joint = 2
    parts = _capture(loaded, chosen[num_held_out:], (joint, num_layers - joint), progress)
    progress("solving for the connector")
    weight, bias = fit_connector(
        torch.cat([part.features[0] for part in parts]),
        torch.cat([part.features[1] for part in parts]),
        torch.cat([part.is_answer for part in parts]),
    )
    student = StudentWeights(
        connector_weight=weight,
        connector_bias=bias,
        draft_token_ids=draft_vocabulary(
            [
                token_id
                for part in parts
                for text, start in zip(part.texts, part.prompt_lengths, strict=True)
                for token_id in text[start:]
            ],
            loaded.config.vocab_size,
        ),
        logit_scale=1.0,
        kept_layers=(0, 1, num_layers - 2, num_layers - 1),
        joint=joint,
        target_digest=loaded.weights_digest,
        num_positions=sum(len(part.is_answer) for part in parts),
        agreement=None,
    )
    progress("measuring on held-out prompts")
    held_out = _capture(loaded, chosen[:num_held_out], (), progress)
    student = _calibrate(loaded, student, held_out)
    progress(f"agrees with its target on {student.agreement or 0:.1%} of held-out answer tokens")
    return student


def fit_connector(
    inputs_NE: Tensor, outputs_NE: Tensor, is_answer: Tensor
) -> tuple[Tensor, Tensor]:
    """Solve for the linear map between two streams.

    Every row is weighted by the inverse square of its output's length: the layer behind the map
    normalises its input, and the few rows on which all attention rests (a text's first token) are
    tens of times longer than the others and would decide the fit alone.

    Args:
        inputs_NE: float32.
        outputs_NE: float32.
        is_answer: [N] bool.

    Returns:
        weight [E, E] and bias [E], float32, for ``x @ weight.T + bias``.
    """
    weight_N1 = (1 / outputs_NE.double().square().sum(1, keepdim=True)) * torch.where(
        is_answer, _ANSWER_WEIGHT, 1.0
    ).unsqueeze(1)
    # The column of ones is scaled to the others, so that the ridge weighs on all alike.
    unit = inputs_NE.double().square().mean().sqrt()
    ones_N1 = unit.expand(inputs_NE.shape[0], 1)
    design_ND = torch.cat((inputs_NE.double(), ones_N1), dim=1)
    weighted_ND = design_ND * weight_N1
    normal_DD = weighted_ND.T @ design_ND
    normal_DD.diagonal().add_(_RIDGE * normal_DD.diagonal().mean())
    solution_DE = torch.linalg.solve(normal_DD, weighted_ND.T @ outputs_NE.double())
    bias_E = solution_DE[-1] * unit
    return solution_DE[:-1].T.float().contiguous(), bias_E.float()


def draft_vocabulary(written: Sequence[int], vocab_size: int) -> Tensor:
    """The tokens a student may guess: the most written ones, then the lowest ids.

    A byte-pair vocabulary numbers its tokens by how early they were merged, so low ids are frequent
    in ordinary text too.

    Args:
        written: tokens the target wrote.
        vocab_size: of the target.

    Returns:
        [D] int32, ascending.
    """
    by_count = [token_id for token_id, _ in Counter(written).most_common(_DRAFT_VOCABULARY)]
    kept = set(by_count)
    for token_id in range(vocab_size):
        if len(kept) >= _DRAFT_VOCABULARY:
            break
        kept.add(token_id)
    return torch.tensor(sorted(kept), dtype=torch.int32)


def answer_logits(
    loaded: LoadedModel, texts: Sequence[Sequence[int]], starts: Sequence[int]
) -> Tensor:
    """The model's logits behind every position of the given texts from ``start - 1`` on.

    Returns:
        [M, V] float32, the texts one after another; the last token of each is not looked behind.
    """
    num_pages = -(-max(len(text) for text in texts) // PAGE_TOKENS)
    model = loaded.model
    cache = KVCache(loaded.config, num_pages, dtype=model.dtype, device=model.device)
    runner = ModelRunner(model, loaded.config, cache)
    found = []
    for text, start in zip(texts, starts, strict=True):
        slots = torch.arange(len(text) - 1)
        batch = ForwardBatch(
            token_ids=torch.tensor(text[:-1]),
            positions=slots,
            slots=slots,
            spans=(SequenceSpan(start=0, length=len(slots), kv_slots=slots),),
            logit_rows=slots[start - 1 :],
        )
        found.append(runner.forward(batch).cpu())
    return torch.cat(found)


def _within_budget(prompts: Sequence[Sequence[int]], budget: int) -> list[Sequence[int]]:
    chosen: list[Sequence[int]] = []
    for prompt in prompts:
        if not 0 < len(prompt) <= _MAX_PROMPT_TOKENS:
            continue
        budget -= len(prompt) + _ANSWER_LENGTH
        if budget < 0 and len(chosen) >= 2:
            break
        chosen.append(prompt)
    if len(chosen) < 2:
        raise ValueError(f"fewer than two prompts of at most {_MAX_PROMPT_TOKENS} tokens")
    return chosen


def _capture(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    layers: tuple[int, ...],
    progress: Callable[[str], None],
) -> list[CapturedText]:
    parts = []
    for start in range(0, len(prompts), _SEQUENCES_AT_ONCE):
        batch = prompts[start : start + _SEQUENCES_AT_ONCE]
        progress(
            f"the target answers prompts {start + 1} to {start + len(batch)} of {len(prompts)}"
        )
        parts.append(
            capture_answers(
                loaded,
                batch,
                num_new_tokens=_ANSWER_LENGTH,
                capture_layers=layers,
                progress=progress,
            )
        )
    return parts


def _calibrate(
    loaded: LoadedModel, student: StudentWeights, held_out: Sequence[CapturedText]
) -> StudentWeights:
    """Measure the agreement and choose the logit scale nearest to the target's distribution."""
    texts = [text for part in held_out for text in part.texts]
    starts = [length for part in held_out for length in part.prompt_lengths]
    target_MV = answer_logits(loaded, texts, starts)
    student_MV = answer_logits(cut_student(loaded, student), texts, starts)
    agreement = (target_MV.argmax(1) == student_MV.argmax(1)).float().mean()
    drafted = student.draft_token_ids.long()
    probs_MD = target_MV[:, drafted].softmax(1)
    scores_MD = student_MV[:, drafted]

    def cross_entropy(scale: float) -> float:
        return float(-(probs_MD * F.log_softmax(scores_MD * scale, dim=1)).sum(1).mean())

    return replace(student, agreement=float(agreement), logit_scale=min(_SCALES, key=cross_entropy))
