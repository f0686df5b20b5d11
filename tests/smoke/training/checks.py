"""What must hold of a trained draft, each as one number or one claim."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deployments.engine.errors import WeightsMismatchError
from deployments.engine.training.batches import collate
from deployments.engine.training.checkpoint import load_head, save_head
from deployments.engine.training.evaluation import evaluate
from deployments.engine.training.feature_store import FeatureStore
from deployments.engine.training.initial import random_head
from deployments.engine.training.training_time_test import unroll
from tests.eagle3_inference import drafted_one_by_one

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from deployments.engine.training.evaluation import DraftQuality

_NUM_STEPS = 3


def held_out_features(out: Path) -> FeatureStore:
    """The held-out texts of a job."""
    folder = out / "features" / "held-out"
    with safe_open(min(folder.glob("*.safetensors")), framework="pt") as file:
        return FeatureStore(folder, fingerprint=file.metadata()["fingerprint"])


def same_weights(first: Path, second: Path) -> bool:
    """Whether two jobs ended with the same bits: last weights, optimiser, exported draft."""
    states = [torch.load(out / "checkpoint.pt", weights_only=True) for out in (first, second)]
    exports = [load_file(out / "draft" / "model.safetensors") for out in (first, second)]
    return (
        _same(states[0]["model"], states[1]["model"])
        and _same(states[0]["optimizer"], states[1]["optimizer"])
        and _same(exports[0], exports[1])
    )


def largest_difference(first: Path, second: Path) -> float:
    """Of a weight, between the ends of two jobs."""
    one, two = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (first, second))
    return max(
        float((weight - two["model"][name]).abs().max())
        for name, weight in one["model"].items()
        if weight.is_floating_point()
    )


def untrained_quality(out: Path, embedding: Tensor, num_draft_tokens: int) -> DraftQuality:
    """Of random weights of the same shape and draft vocabulary, on the same texts."""
    trained = load_head(out / "draft")
    head = random_head(trained.config, trained.draft_token_ids, seed=0)
    return evaluate(head, embedding, held_out_features(out), num_draft_tokens)


@torch.no_grad()
def export_is_exact(out: Path, embedding: Tensor, scratch: Path) -> bool:
    """Whether the draft, saved again in its own precision and loaded, gives the same logits."""
    head = load_head(out / "draft")
    save_head(head, scratch, torch.float32)
    again = load_head(scratch)
    batch = collate([held_out_features(out).text(0)], torch.device("cpu"), torch.float32)
    return all(
        torch.equal(head.logits(a.hidden), again.logits(b.hidden))
        for a, b in zip(
            unroll(head, embedding, batch, _NUM_STEPS),
            unroll(again, embedding, batch, _NUM_STEPS),
            strict=True,
        )
    )


def missing_offsets_are_refused(out: Path, scratch: Path) -> bool:
    """Whether a draft without ``d2t``, which SGLang would load in silence, is refused."""
    shutil.copytree(out / "draft", scratch, dirs_exist_ok=True)
    tensors = load_file(scratch / "model.safetensors")
    del tensors["d2t"]
    save_file(tensors, scratch / "model.safetensors")
    try:
        load_head(scratch)
    except WeightsMismatchError as error:
        return "'d2t' is missing" in str(error)
    return False


@torch.no_grad()
def unrolled_difference(out: Path, embedding: Tensor) -> float:
    """Largest difference of a logit between the unrolled steps and step-by-step inference."""
    head = load_head(out / "draft")
    text = held_out_features(out).text(0)
    batch = collate([text], torch.device("cpu"), torch.float32)
    steps = list(unroll(head, embedding, batch, _NUM_STEPS))
    answers = text.is_answer.nonzero().flatten()
    places = [0, int(answers[0]), int(answers[-1]) - _NUM_STEPS]
    return max(
        float((head.logits(steps[step].hidden[0, at]) - logits).abs().max())
        for at in places
        for step, logits in enumerate(drafted_one_by_one(head, embedding, text, at, _NUM_STEPS))
    )


def _same(first: object, second: object) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(
            _same(value, second[key]) for key, value in first.items()
        )
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    return first == second
