"""Targets and drafters by what their steps take, and what a closed form says of them."""

from __future__ import annotations

from typing import NamedTuple

_H100_BYTES_PER_S = 3.35e12


class Pair(NamedTuple):
    """A target and a drafter.

    Attributes:
        target_s: of a step that only reads the weights.
        draft_s: of one forward of a drafter on a GPU of its own.
        colocated_s: of one forward of the same drafter on the target's GPUs.
        acceptance: chance that a draft token is right, if all before it are; assumed.
        num_gpus: of the target; a drafter in the pool takes one.
        source: of the times.
    """

    name: str
    target_s: float
    draft_s: float
    colocated_s: float
    acceptance: float
    num_gpus: int
    source: str

    def closed_form(self, num_draft_tokens: int) -> float:
        """Clients that a saturated target holds with drafts elsewhere, over those beside it.

        Source: Speculation at a Distance, arXiv:2606.25091.
        """
        return 1 + num_draft_tokens * self.colocated_s / self.target_s


def _read_s(num_params: float, num_gpus: int = 1) -> float:
    """To read bfloat16 weights once, at an H100 SXM's bandwidth."""
    return 2 * num_params / num_gpus / _H100_BYTES_PER_S


_READ = "weights read once at 3.35 TB/s (H100 SXM data sheet), bfloat16; parameters: model cards"

PAIRS = (
    Pair("70B + 1B, assumed times", 0.030, 0.002, 0.0025, 0.7, 4, "cost model's assumed times"),
    Pair("70B + 8B, assumed times", 0.030, 0.005, 0.006, 0.8, 4, "cost model's assumed times"),
    Pair("70B + head, assumed times", 0.030, 0.0006, 0.0006, 0.7, 4, "cost model's assumed times"),
    Pair(
        "Llama 3.1 70B + Llama 3.2 1B",
        _read_s(70.6e9, 4),
        _read_s(1.24e9),
        _read_s(1.24e9, 4),
        0.7,
        4,
        _READ,
    ),
    Pair(
        "Llama 3.1 8B + Llama 3.2 1B",
        _read_s(8.03e9),
        _read_s(1.24e9),
        _read_s(1.24e9),
        0.7,
        1,
        _READ,
    ),
)
