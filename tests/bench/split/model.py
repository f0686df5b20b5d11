"""What a mode should give, by a cost model, at the measured hit rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tests.bench.split.modes import Mode

if TYPE_CHECKING:
    from tests.bench.split.clock import Pair


class Measured(NamedTuple):
    """What drafts were worth.

    Attributes:
        hit_rate: steps that had a draft.
        tokens_per_hit: what such a step gave, its bonus token included.
        draft_length: of its draft.
    """

    hit_rate: float
    tokens_per_hit: float
    draft_length: float


def seconds_per_token(mode: Mode, pair: Pair, round_trip_s: float, measured: Measured) -> float:
    """Of one sequence alone.

    ``sync`` waits for the draft and the network in every step; ``colocated`` and ``chain`` for the
    draft; ``pull`` for the network, whether there is a row or not; the others for nothing.
    """
    hit_rate, tokens_per_hit, draft_length = measured
    step_s = hit_rate * pair.step_s(draft_length) + (1 - hit_rate) * pair.target_s
    if mode is Mode.SYNC:
        step_s += draft_length * pair.draft_s + round_trip_s
    elif mode in (Mode.COLOCATED, Mode.CHAIN):
        step_s += draft_length * pair.head_s
    elif mode is Mode.PULL:
        step_s += round_trip_s
    return step_s / (hit_rate * tokens_per_hit + 1 - hit_rate)
