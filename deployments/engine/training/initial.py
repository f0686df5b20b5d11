"""A head before its first gradient step: closed form where that is worth many tokens.

The fused feature is fitted by ridge regression to what the target's head will read one position
later, the layer starts as the identity, norm and head are the target's own. For a 135M target the
result guesses as well as some hundred thousand tokens of training from random weights.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from deployments.engine.training.eagle3 import Eagle3Head
from deployments.engine.training.losses import cross_entropy

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from deployments.engine.torch_engine.eagle3 import Eagle3Config
    from deployments.engine.torch_engine.models.llama import Model
    from deployments.engine.training.batches import FeatureText

_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
_SHARPNESSES = (0.3, 0.4, 0.5, 0.65, 0.8, 1.0)
_JUDGED_EVERY = 10
_MAX_JUDGED = 2048
_LEAST_SCALE = 1e-6


def draft_vocabulary(written: Iterable[int], size: int, vocab_size: int) -> Tensor:
    """The tokens that answers hold most often, then the lowest ids: [size] int64, ascending.

    A byte-pair vocabulary numbers its tokens by how early they were merged: low ids are frequent.
    """
    kept = {token_id for token_id, _ in Counter(written).most_common(size)}
    for token_id in range(vocab_size):
        if len(kept) >= size:
            break
        kept.add(token_id)
    return torch.tensor(sorted(kept))


def random_head(config: Eagle3Config, draft_token_ids: Tensor, seed: int) -> Eagle3Head:
    """A head that has learned nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = Eagle3Head(config)
    head.set_draft_vocabulary(draft_token_ids)
    return head


def feature_scale(texts: Iterable[FeatureText]) -> Tensor:
    """Root mean square of each fused feature over the positions that are trained on: [3E] float32.

    A target's stream has some places a hundred times larger than others; a step of the optimiser
    that is right for these would be far too long for those.
    """
    total = count = torch.zeros(())
    for text in texts:
        rows = text.features[:-1][text.is_answer[1:]].float()
        total = total + rows.square().sum(0)
        count = count + len(rows)
    return (total / count.clamp(min=1)).sqrt().clamp(min=_LEAST_SCALE)


@torch.no_grad()
def start_from_target(
    head: Eagle3Head, target: Model, texts: Iterable[FeatureText], scale: Tensor
) -> None:
    """Give a head the target's norm and head, and solve for the fusion.

    Ridge and sharpness of the guesses are those that fit every tenth text best.

    Args:
        head: on the CPU; overwritten. Its fusion is for features that are divided by ``scale``.
        target: on any device.
        texts: to fit on; some ten thousand positions are enough.
        scale: of the features.
    """
    norm = target.norm.weight.float().cpu()
    rows = target.lm_head.get_parameter("weight")[head.draft_token_ids.to(target.device)]
    head.lm_head.weight.copy_(rows)
    head.midlayer.self_attn.o_proj.weight.zero_()
    head.midlayer.mlp.down_proj.weight.zero_()
    fitted, judged = _NormalEquations(head), _NormalEquations(head)
    rows_judged = []
    for index, text in enumerate(texts):
        kept = text.is_answer[1:]
        x = text.features[:-1][kept].float() / scale
        y = text.hidden[1:][kept].float()
        if index % _JUDGED_EVERY == 0:
            judged.add(x, y / norm)
            rows_judged.append((x, y))
        else:
            fitted.add(x, y / norm)
    inputs = torch.cat([x for x, _ in rows_judged])[:_MAX_JUDGED]
    teacher_hidden = torch.cat([y for _, y in rows_judged])[:_MAX_JUDGED]
    teacher = F.linear(teacher_hidden, head.lm_head.weight)

    def best_loss(ridge: float) -> tuple[float, float, float]:
        guessed = F.rms_norm(F.linear(inputs, fitted.solve(ridge)), norm.shape) * norm
        logits = F.linear(guessed, head.lm_head.weight)
        losses = (cross_entropy(logits * sharpness, teacher) for sharpness in _SHARPNESSES)
        each = zip(losses, _SHARPNESSES, strict=True)
        return min((float(loss.mean()), sharpness, ridge) for loss, sharpness in each)

    _, sharpness, ridge = min(best_loss(ridge) for ridge in _RIDGES)
    head.norm.weight.copy_(norm * sharpness)
    fitted.join(judged)
    head.fc.weight.copy_(fitted.solve(ridge))


class _NormalEquations:
    """Of the fusion, in float64: [3E, 3E] and [3E, E]."""

    def __init__(self, head: Eagle3Head) -> None:
        size, width = head.fc.weight.shape
        self.normal = torch.zeros(width, width, dtype=torch.float64)
        self.mixed = torch.zeros(width, size, dtype=torch.float64)

    def add(self, inputs: Tensor, wanted: Tensor) -> None:
        inputs = inputs.double()
        self.normal += inputs.T @ inputs
        self.mixed += inputs.T @ wanted.double()

    def join(self, other: _NormalEquations) -> None:
        self.normal += other.normal
        self.mixed += other.mixed

    def solve(self, ridge: float) -> Tensor:
        """[E, 3E] float32."""
        normal = self.normal.clone()
        normal.diagonal().add_(ridge * normal.diagonal().mean().clamp(min=_LEAST_SCALE))
        solution: Tensor = torch.linalg.solve(normal, self.mixed)
        return solution.T.float()
