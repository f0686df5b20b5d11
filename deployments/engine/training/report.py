"""What a training job tells when it is done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deployments.engine.training.online import QueueStats
    from deployments.engine.training.run import CurvePoint
    from deployments.engine.training.step_costs import StepCosts


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReport:
    """What a stage has made so far.

    Attributes:
        seconds: in all processes that worked on it.
    """

    num_texts: int
    num_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JobReport:
    """A finished job.

    Attributes:
        is_self_chat: the target wrote the prompts to train on itself.
        answers: to given prompts, which are not counted; an answer's end is a token.
        features: of training and held-out texts, prompts included. In a self-chat they come with
            the texts, and the seconds are those of both.
        num_features_bytes: of both, on disk.
        queue: what went through memory instead, to the first process; only online.
        num_left_out: training texts for which there was no room left on disk.
        num_weights: of the draft that are trained.
        curve: first the draft before its first gradient step.
        best: the point whose draft was kept.
        costs: from which speed-ups are predicted.
    """

    is_self_chat: bool
    answers: StageReport
    features: StageReport
    num_features_bytes: int
    queue: QueueStats | None
    num_left_out: int
    num_weights: int
    curve: tuple[CurvePoint, ...]
    best: CurvePoint
    costs: StepCosts
