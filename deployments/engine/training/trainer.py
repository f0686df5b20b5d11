"""Optimiser steps on a head, one process or several, and their exact continuation."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from deployments.engine.training.batches import collate
from deployments.engine.training.sharding import ALONE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

    from deployments.engine.training.batches import FeatureText
    from deployments.engine.training.config import TrainingConfig
    from deployments.engine.training.objective import DraftObjective
    from deployments.engine.training.sharding import ProcessMesh

_BETAS = (0.9, 0.95)
_LAST_RATE_SHARE = 0.01


class StepReport(NamedTuple):
    """One optimiser step.

    Attributes:
        loss: weighted sum over the unrolled steps.
        accuracy: share of counted positions at which the first draft is right.
        grad_norm: before it was shortened.
        num_tokens: of the step's texts, on this process.
    """

    loss: float
    accuracy: float
    grad_norm: float
    num_tokens: int


class DraftTrainer:
    """Holds the optimiser.

    Attributes:
        mesh: the processes that take every step together, each with its share of the batches.
    """

    def __init__(
        self,
        objective: DraftObjective,
        config: TrainingConfig,
        end: float,
        device: str,
        mesh: ProcessMesh = ALONE,
    ) -> None:
        """Prepare the first step.

        Args:
            objective: on ``device``; sharded over ``mesh`` already.
            config: of the run.
            end: where the last step of the run ends; the learning rate follows the way there.
            device: where it is trained.
            mesh: who else trains it.
        """
        self.objective = objective
        self.mesh = mesh
        self.num_steps_done = 0
        self._config = config
        self._end = end
        self._device = torch.device(device)
        self._parameters = [p for p in objective.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=config.learning_rate,
            betas=_BETAS,
            weight_decay=config.weight_decay,
        )

    def step(
        self, batches: Sequence[Sequence[FeatureText]], end: float | None = None
    ) -> StepReport:
        """One optimiser step.

        Args:
            batches: this process's texts of each batch of the step, at least one each; one without
                any answer counts for nothing.
            end: where on the way it ends; by default a way of steps.
        """
        filled = [collate(batch, self._device, torch.float32) for batch in batches]
        count = torch.zeros(self.objective.num_steps, device=self._device)
        for batch in filled:
            count += self.objective.count(batch)
        self.mesh.sum(count)
        rate = self._rate(self.num_steps_done + 1 if end is None else end)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        loss, right = torch.zeros((), device=self._device), torch.zeros_like(count)
        for batch in filled:
            with self._autocast():
                output = self.objective(batch, count)
            # Sharded gradients are averaged over the shares; their losses are to be added.
            (output.loss * self.mesh.num_shares).backward()
            loss += output.loss.detach()
            right += output.right
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._config.max_grad_norm)
        self._optimizer.step()
        self.num_steps_done += 1
        self.mesh.sum(loss)
        self.mesh.sum(right)
        return StepReport(
            loss=float(loss),
            accuracy=float(right[0] / count[0].clamp(min=1)),
            grad_norm=float(_whole(norm)),
            num_tokens=sum(
                text.num_tokens for batch in batches for text in batch if text.is_answer.any()
            ),
        )

    def state(self) -> dict[str, Any]:
        """All that the next steps depend on, as plain tensors.

        Every process must ask; the first one is given the tensors.
        """
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model, optimizer = get_state_dict(self.objective, self._optimizer, options=options)
        return {"model": model, "optimizer": optimizer, "num_steps_done": self.num_steps_done}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken, whatever number of processes took it."""
        options = StateDictOptions(full_state_dict=True)
        set_state_dict(
            self.objective,
            self._optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=options,
        )
        self.num_steps_done = int(state["num_steps_done"])

    def _rate(self, done: float) -> float:
        """Linear warm-up, a plateau, and a cosine down to a hundredth."""
        config = self._config
        warmup = config.warmup_share * self._end
        decay = max(1.0, config.decay_share * self._end)
        rise = min(1.0, done / warmup) if warmup else 1.0
        progress = min(1.0, max(0.0, (done - (self._end - decay)) / decay))
        fall = 0.5 * (1 + math.cos(math.pi * progress))
        return config.learning_rate * rise * (_LAST_RATE_SHARE + (1 - _LAST_RATE_SHARE) * fall)

    def _autocast(self) -> AbstractContextManager[object]:
        if self._config.precision == "float32":
            return nullcontext()
        return torch.autocast(self._device.type, torch.bfloat16)


def _whole(tensor: Tensor) -> Tensor:
    """The value of a tensor that may be spread over processes."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
