"""Steps that take as long as a target's on a GPU, where a row more costs next to nothing."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from deployments.engine.torch_engine.forward_batch import ForwardBatch
    from deployments.engine.torch_engine.model_runner import ModelRunner


class PacedRunner:
    """Computes what the model computes, and is not done before the time is up.

    Args:
        inner: the engine's own.
        step_s: seconds of every step; more only where this machine is slower than that.
    """

    def __init__(self, inner: ModelRunner, step_s: float) -> None:
        self._inner = inner
        self._step_s = step_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def forward(self, batch: ForwardBatch) -> Tensor:
        """As ``ModelRunner.forward``."""
        due = time.perf_counter() + self._step_s
        logits = self._inner.forward(batch)
        time.sleep(max(0.0, due - time.perf_counter()))
        return logits
