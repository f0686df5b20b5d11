"""Parts of a draft model that was cut out of its target; no checkpoint has them.

N: tokens of the batch, M: rows whose logits are wanted, E: hidden size, V: vocabulary, D: draft
vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from deployments.engine.torch_engine.models.llama import Weight

if TYPE_CHECKING:
    from deployments.engine.torch_engine.models.llama import LayerContext


class ConnectedLayer(nn.Module):
    """A decoder layer that reads the stream through the connector."""

    def __init__(self, connector: Weight, layer: nn.Module) -> None:
        super().__init__()
        self.connector = connector
        self.layer = layer

    def forward(self, x_NE: Tensor, k_pool: Tensor, v_pool: Tensor, ctx: LayerContext) -> Tensor:
        """The residual stream behind the layer: [N, E]."""
        streamed: Tensor = self.layer(self.connector(x_NE), k_pool, v_pool, ctx)
        return streamed


class DraftHead(nn.Module):
    """The head's rows of the draft vocabulary; every other token scores ``-inf``.

    Attributes:
        rows: [D, E].
        is_spread: whether scores are those of all tokens, or of the draft vocabulary alone.
    """

    def __init__(self, weight_VE: Tensor, token_ids: Tensor) -> None:
        super().__init__()
        self.vocab_size = weight_VE.shape[0]
        self.is_spread = True
        self.register_buffer("token_ids", token_ids.long().to(weight_VE.device), persistent=False)
        self.rows = Weight(len(token_ids), weight_VE.shape[1])
        self.rows.to(dtype=weight_VE.dtype, device=weight_VE.device)
        self.rows.weight.copy_(weight_VE[self.get_buffer("token_ids")])

    def forward(self, x_ME: Tensor) -> Tensor:
        """[M, V], or [M, D]."""
        return self.spread(self.rows(x_ME))

    def spread(self, scores_MD: Tensor) -> Tensor:
        """Scores of the draft vocabulary, if wanted among those of all tokens."""
        if not self.is_spread:
            return scores_MD
        scores_MV = scores_MD.new_full((scores_MD.shape[0], self.vocab_size), -torch.inf)
        return scores_MV.index_copy_(1, self.get_buffer("token_ids"), scores_MD)
