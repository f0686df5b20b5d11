"""The number a draft is trained to make small, as one module, so that it can be sharded as one.

d: draft vocabulary, E: hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deployments.engine.training.losses import LOSSES
from deployments.engine.training.training_time_test import unroll

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deployments.engine.torch_engine.models.llama import Model
    from deployments.engine.training.batches import FeatureBatch
    from deployments.engine.training.config import ObjectiveConfig
    from deployments.engine.training.draft_module import DraftModule


class ObjectiveOutput(NamedTuple):
    """One batch's share of the objective.

    Attributes:
        loss: scalar, with gradient.
        right: [steps] int64, counted positions where the draft's likeliest token is the target's.
    """

    loss: Tensor
    right: Tensor


class DraftObjective(nn.Module):
    """Training-time test of a draft against its target's distributions."""

    def __init__(
        self, draft: DraftModule, target: Model, config: ObjectiveConfig, scale: Tensor
    ) -> None:
        """Copy what is needed of the target: embedding, the head's drafted rows, the norm's scale.

        Args:
            draft: its draft vocabulary is final, and it reads scaled features.
            target: not trained, not kept.
            config: weights of the parts.
            scale: of the features, which are divided by it.
        """
        super().__init__()
        self.register_buffer("feature_scale", scale)
        self.draft = draft
        self._config = config
        rows = target.lm_head.get_parameter("weight")[draft.draft_token_ids.to(target.device)]
        for name, tensor in (
            ("embedding", target.embed_tokens.weight),
            ("target_rows", rows),
            ("target_scale", target.norm.weight),
        ):
            self.register_buffer(name, tensor.detach().float().clone(), persistent=False)

    @property
    def num_steps(self) -> int:
        """Unrolled steps."""
        return self._config.num_unrolls

    def count(self, batch: FeatureBatch) -> Tensor:
        """[steps] float32: the positions of a batch that count, at each step."""
        can_draft = batch.is_answer & self.draft.get_buffer("t2d")[batch.wanted]
        sums = [can_draft[:, step + 1 :].sum() for step in range(self.num_steps)]
        return torch.stack(sums).float()

    def forward(self, batch: FeatureBatch, num_counted: Tensor) -> ObjectiveOutput:
        """The batch's share of the mean loss.

        Args:
            batch: in the draft's dtype.
            num_counted: [steps], of all batches that make one optimiser step, on all processes;
                the losses of those batches add up to the mean.
        """
        config = self._config
        batch = batch._replace(features=batch.features / self.get_buffer("feature_scale"))
        loss = batch.features.new_zeros(())
        right = []
        embedding = self.get_buffer("embedding")
        for step, drafted in enumerate(unroll(self.draft, embedding, batch, self.num_steps)):
            kept = drafted.is_counted
            hidden, teacher = drafted.hidden[kept], drafted.teacher[kept]
            logits = self.draft.logits(hidden).float()
            target_logits = F.linear(teacher.float(), self.get_buffer("target_rows"))
            each = LOSSES[config.loss](logits, target_logits)
            if config.hidden_weight:
                each = each + config.hidden_weight * self._distance(hidden, teacher)
            weight = config.unroll_decay**step / num_counted[step].clamp(min=1)
            loss = loss + weight * each.sum()
            tokens = self.draft.draft_token_ids[logits.argmax(-1)]
            right.append((tokens == drafted.wanted[kept]).sum())
        return ObjectiveOutput(loss, torch.stack(right))

    def trained(self, weights: Mapping[str, Tensor]) -> DraftModule:
        """A copy of the draft that reads the target's features as they are.

        Args:
            weights: of this module, whole and on the CPU.
        """
        prefix = "draft."
        own = {
            name.removeprefix(prefix): tensor
            for name, tensor in weights.items()
            if name.startswith(prefix)
        }
        return self.draft.rebuilt(own, weights["feature_scale"])

    def _distance(self, hidden: Tensor, teacher: Tensor) -> Tensor:
        """Mean square between both streams, each at unit root mean square."""
        wanted = teacher.float() / self.get_buffer("target_scale")
        unit = F.rms_norm(hidden.float(), hidden.shape[-1:])
        return (unit - wanted).square().mean(-1)
