"""What a draft is trained to minimise, by name.

Every loss compares the draft's distribution q with the target's p over the draft vocabulary, both
[N, d] in float32, and gives one number per row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from deployments.engine.training.config import LossName

_TINY = 1e-9


def cross_entropy(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Against the target's whole distribution: EAGLE-3's own loss."""
    return -(teacher_logits.softmax(-1) * F.log_softmax(logits, -1)).sum(-1)


def kl(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Divergence of q from p; cross entropy without the target's own entropy."""
    log_p = F.log_softmax(teacher_logits, -1)
    return (log_p.exp() * (log_p - F.log_softmax(logits, -1))).sum(-1)


def acceptance(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Minus the log of the probability that a sampled draft is accepted, sum(min(p, q))."""
    shared = teacher_logits.softmax(-1).minimum(logits.softmax(-1)).sum(-1)
    return -(shared + _TINY).log()


def hybrid(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Divergence while the two are far apart, acceptance once they are near (SpecForge's LK)."""
    share = acceptance(logits, teacher_logits).neg().exp()
    weight = (-3.0 * share.detach()).exp()
    return weight * kl(logits, teacher_logits) + (1 - weight) * (1 - share)


LOSSES: dict[LossName, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": cross_entropy,
    "kl": kl,
    "acceptance": acceptance,
    "hybrid": hybrid,
}
