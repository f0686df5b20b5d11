"""A head before its first gradient step: closed form where that is worth many tokens.

The fused feature is fitted by ridge regression to what the target's head will read one position
later, the layer starts as the identity, norm and head are the target's own. For a 135M target the
result guesses as well as some hundred thousand tokens of training from random weights.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

from deployments.engine.training.eagle3 import Eagle3Head

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from deployments.engine.torch_engine.models.llama import Model
    from deployments.engine.training.batches import FeatureText
    from deployments.engine.training.eagle3 import Eagle3Config

_RIDGE = 1e-3


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


@torch.no_grad()
def start_from_target(head: Eagle3Head, target: Model, texts: Iterable[FeatureText]) -> None:
    """Give a head the target's norm and head, and solve for the fusion.

    Args:
        head: on the CPU; overwritten.
        target: on any device.
        texts: to fit on; some ten thousand positions are enough.
    """
    scale = target.norm.weight.float().cpu()
    head.norm.weight.copy_(target.norm.weight)
    rows = target.lm_head.get_parameter("weight")[head.draft_token_ids.to(target.device)]
    head.lm_head.weight.copy_(rows)
    head.midlayer.self_attn.o_proj.weight.zero_()
    head.midlayer.mlp.down_proj.weight.zero_()
    width, size = head.fc.weight.shape[1], head.config.hidden_size
    normal = torch.zeros(width, width, dtype=torch.float64)
    mixed = torch.zeros(width, size, dtype=torch.float64)
    for text in texts:
        kept = text.is_answer[1:]
        x = text.features[:-1][kept].double()
        y = (text.hidden[1:][kept].float() / scale).double()
        # A text's first positions have features tens of times longer than all others.
        weight = 1 / x.square().mean(1, keepdim=True)
        normal += (x * weight).T @ x
        mixed += (x * weight).T @ y
    normal.diagonal().add_(_RIDGE * normal.diagonal().mean())
    head.fc.weight.copy_(torch.linalg.solve(normal, mixed).T)
