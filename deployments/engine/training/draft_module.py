"""What training asks of a draft, whatever its shape.

B: sequences, T: positions, E: hidden size, d: draft vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Self

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch.distributed.tensor.parallel import ParallelStyle

    from deployments.engine.training.batches import FeatureBatch


class DraftModule(nn.Module, ABC):
    """A draft whose gradients are wanted. Has a buffer ``t2d``: [V] bool, what can be drafted."""

    @property
    @abstractmethod
    def draft_token_ids(self) -> Tensor:
        """[d] int64: the target's id of each token of the draft vocabulary, ascending."""

    @abstractmethod
    def unrolled(
        self, embedding_VE: Tensor, batch: FeatureBatch, num_steps: int
    ) -> Iterator[Tensor]:
        """Draft behind every position, fed with the true tokens.

        Args:
            embedding_VE: the target's.
            batch: texts and features.
            num_steps: at least 1.

        Yields:
            [B, T, E], before the final norm. Row t of step s drafts the token at t + 2 + s: the one
            at t + 1 is the bonus that the target gave itself.
        """

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the draft vocabulary behind a step's rows: [..., d]."""

    @abstractmethod
    def rebuilt(self, weights: Mapping[str, Tensor], feature_scale: Tensor) -> Self:
        """A draft of this shape on the CPU, in evaluation mode, that reads features as they are.

        Args:
            weights: its state.
            feature_scale: by which the features were divided that it was trained on.
        """

    @abstractmethod
    def tensor_plan(self) -> dict[str, ParallelStyle]:
        """By name, the parts that tensor-parallel processes divide; each holds all of the rest."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what engines load into a folder, which is made where it is missing."""
