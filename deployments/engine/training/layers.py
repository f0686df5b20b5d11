"""What the decoder layers of all trained drafts have in common, and how tensor parallelism cuts it.

T: tensor-parallel processes. A matrix that is cut by columns gives each of them a share of the
outputs (of the heads, of the feed-forward's width); the one behind it, cut by rows, adds up what
they made of those. In between nothing is exchanged.

Source: Megatron-LM (arXiv:1909.08053), section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle

_BY_COLUMNS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
)
_BY_ROWS = ("self_attn.o_proj", "mlp.down_proj")


class MLP(nn.Module):
    """Gated SiLU."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_BTE: Tensor) -> Tensor:
        """[B, T, E]."""
        output: Tensor = self.down_proj(F.silu(self.gate_proj(x_BTE)) * self.up_proj(x_BTE))
        return output


def layer_plan(layer: str) -> dict[str, ParallelStyle]:
    """How one decoder layer is cut; ``layer`` is its name inside the draft."""
    return {f"{layer}.{name}": ColwiseParallel() for name in _BY_COLUMNS} | {
        f"{layer}.{name}": RowwiseParallel() for name in _BY_ROWS
    }


def gathered() -> ParallelStyle:
    """Cut by columns, with the whole output for every process."""
    return ColwiseParallel(output_layouts=Replicate())
