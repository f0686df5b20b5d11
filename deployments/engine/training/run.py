"""One training run in a folder: steps, evaluations, checkpoints, and the best draft so far.

A run that was interrupted, even by SIGKILL, goes on from its last checkpoint and ends with the very
same weights. Several processes may run together; the first one writes the files.
"""

from __future__ import annotations

import json
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import torch

from deployments.engine.training.errors import RunMismatchError
from deployments.engine.training.evaluation import DraftQuality, evaluate
from deployments.engine.training.pace import Pace
from deployments.engine.training.step_costs import SpeedUps
from deployments.engine.training.tree_shape import TreeShape

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator
    from pathlib import Path

    from deployments.engine.training.batches import FeatureText
    from deployments.engine.training.config import TrainingConfig
    from deployments.engine.training.draft_module import DraftModule
    from deployments.engine.training.plan import Plan
    from deployments.engine.training.step_costs import StepCosts
    from deployments.engine.training.trainer import DraftTrainer

DRAFT_FOLDER = "draft"
CURVE_FILE = "curve.jsonl"
_CHECKPOINT_FILE = "checkpoint.pt"


class Texts(Protocol):
    """Texts by index, on disk or computed when they are wanted."""

    def stream(self, indices: Iterable[int]) -> Generator[FeatureText, None, None]:
        """Texts in this order; may prepare some ahead, and is closed when no more are wanted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """One evaluation.

    Attributes:
        step: optimiser steps before it.
        num_tokens: trained on before it, padding not counted, on all processes.
        loss: mean over the steps since the evaluation before; None at the start.
        seconds: of training, evaluations included, in all sessions of the run.
        speed_ups: predicted from the run's costs.
    """

    step: int
    num_tokens: int
    loss: float | None
    seconds: float
    quality: DraftQuality
    speed_ups: SpeedUps

    @property
    def score(self) -> float:
        """What makes a draft better: tokens that a round of the longest chain commits."""
        return self.quality.mean_acceptance_length[-1]


class DraftRun:
    """The state of a run between its steps."""

    def __init__(
        self,
        folder: Path,
        trainer: DraftTrainer,
        config: TrainingConfig,
        texts: Texts,
        plan: Plan,
        held_out: Iterable[FeatureText],
        progress: Callable[[str], None],
        *,
        fingerprint: str,
        costs: StepCosts,
    ) -> None:
        """Begin a run, or go on with the one whose checkpoint the folder holds.

        Args:
            folder: made where it is missing.
            trainer: with nothing done yet.
            config: the same as when the run began.
            texts: likewise.
            plan: of the run's steps over them.
            held_out: for evaluations; gone through anew for each.
            progress: gets short lines for a person to read.
            fingerprint: of target and texts; a folder continues with the same only.
            costs: of the target's and the draft's steps.

        Raises:
            RunMismatchError: the folder's checkpoint is of another run.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._trainer = trainer
        self._config = config
        self._texts = texts
        self._plan = plan
        self._held_out = held_out
        self._progress = progress
        self._fingerprint = fingerprint
        self._costs = costs
        self._tree = TreeShape(config.tree_widths)
        self._mesh = trainer.mesh
        self._num_tokens = 0
        self._seconds = 0.0
        self._losses: list[float] = []
        self.curve: list[CurvePoint] = []
        self._resume()

    def run(self) -> CurvePoint:
        """Train to the end.

        Returns:
            The best evaluation; its draft is in the folder.
        """
        started = time.monotonic() - self._seconds
        pace = Pace(
            "steps",
            self._plan.num_steps,
            self._progress,
            done=self._trainer.num_steps_done,
        )
        if not self.curve:
            self._evaluate(0.0)
        for batches, end in self._steps_ahead():
            # Asked before a step, so that a run that stopped does not go on when it is repeated.
            if self._is_idle():
                self._progress("no better draft for a while: stopping early")
                break
            report = self._trainer.step(batches, end)
            self._losses.append(report.loss)
            num_tokens = self._mesh.total(report.num_tokens)
            self._num_tokens += num_tokens
            pace.advance(num_tokens, note=f"loss {report.loss:.3f}")
            self._seconds = time.monotonic() - started
            done = self._trainer.num_steps_done
            if done % self._config.evaluate_steps == 0:
                self._evaluate(self._seconds)
            if done % self._config.checkpoint_steps == 0:
                self._save()
        if self._losses:
            self._evaluate(time.monotonic() - started)
        self._save()
        return self.best

    @property
    def best(self) -> CurvePoint:
        """The best evaluation so far."""
        return max(self.curve, key=lambda point: point.score)

    def _steps_ahead(self) -> Iterator[tuple[list[list[FeatureText]], float]]:
        num_done = self._trainer.num_steps_done
        # Every forward gathers weights from all processes: who has nothing to learn from runs too.
        indices = (
            index
            for step in self._plan.steps(num_done)
            for batch in step.batches
            for index in self._mesh.share(batch) or batch[:1]
        )
        with closing(self._texts.stream(indices)) as texts:
            for step in self._plan.steps(num_done):
                yield [self._filled(texts, batch) for batch in step.batches], step.end

    def _filled(self, texts: Iterator[FeatureText], batch: list[int]) -> list[FeatureText]:
        mine = self._mesh.share(batch)
        return list(islice(texts, len(mine))) if mine else [_without_answer(next(texts))]

    def _evaluate(self, seconds: float) -> None:
        draft = _whole_draft(self._trainer)
        quality = self._quality(draft)
        loss = sum(self._losses) / len(self._losses) if self._losses else None
        self._losses = []
        point = CurvePoint(
            step=self._trainer.num_steps_done,
            num_tokens=self._num_tokens,
            loss=loss,
            seconds=seconds,
            quality=quality,
            speed_ups=self._costs.speed_ups(quality, self._tree),
        )
        self.curve.append(point)
        if draft is not None:
            if self.best is point:
                draft.save(self._folder / DRAFT_FOLDER)
            lines = [json.dumps(asdict(each)) + "\n" for each in self.curve]
            (self._folder / CURVE_FILE).write_text("".join(lines), encoding="utf-8")
        shown = " ".join(f"{share:.3f}" for share in quality.acceptance)
        taught = "" if loss is None else f", loss {loss:.3f}"
        self._progress(
            f"step {point.step}, {point.num_tokens} tokens{taught}: a round of "
            f"{self._config.num_draft_tokens} commits {point.score:.3f}, a tree "
            f"{quality.tree_acceptance_length:.3f}; {_worth(point.speed_ups)}; acceptance {shown}"
        )

    def _quality(self, draft: DraftModule | None) -> DraftQuality:
        """The first process measures, the others hear of it: all must decide alike."""
        quality = None
        if draft is not None:
            embedding = self._trainer.objective.get_buffer("embedding")
            quality = evaluate(
                draft.to(embedding.device),
                embedding,
                self._held_out,
                self._config.num_draft_tokens,
                self._tree,
            )
        return self._mesh.tell(quality)

    def _is_idle(self) -> bool:
        patience = self._config.patience
        return bool(patience) and self.curve.index(self.best) < len(self.curve) - patience

    def _save(self) -> None:
        state = self._trainer.state()
        if not self._mesh.is_first:
            return
        state |= {
            "config": self._config.model_dump(),
            "fingerprint": self._fingerprint,
            "num_tokens": self._num_tokens,
            "seconds": self._seconds,
            "losses": self._losses,
            "curve": [asdict(point) for point in self.curve],
        }
        partial = self._folder / f"{_CHECKPOINT_FILE}.partial"
        torch.save(state, partial)
        partial.replace(self._folder / _CHECKPOINT_FILE)

    def _resume(self) -> None:
        path = self._folder / _CHECKPOINT_FILE
        if not path.is_file():
            return
        state: dict[str, Any] = torch.load(path, weights_only=True)
        if state["config"] != self._config.model_dump():
            raise RunMismatchError(
                f"{path} belongs to a run with other settings; choose another folder or remove it"
            )
        if state["fingerprint"] != self._fingerprint:
            raise RunMismatchError(
                f"{path} belongs to a run on other texts; choose another folder or remove it"
            )
        self._trainer.load_state(state)
        self._num_tokens, self._seconds = state["num_tokens"], state["seconds"]
        self._losses = state["losses"]
        self.curve = [_point(raw) for raw in state["curve"]]
        self._progress(f"going on behind step {self._trainer.num_steps_done}")


def _whole_draft(trainer: DraftTrainer) -> DraftModule | None:
    """A copy of the trained draft, put together from all processes; every one must ask.

    Only the first process is given it.
    """
    weights = trainer.state()["model"]
    return trainer.objective.trained(weights) if weights else None


def _without_answer(text: FeatureText) -> FeatureText:
    return text._replace(is_answer=torch.zeros_like(text.is_answer))


def _worth(speed_ups: SpeedUps) -> str:
    best = speed_ups.best_length
    return f"predicted {speed_ups.chains[best - 1]:.2f}x with K = {best}"


def _point(raw: dict[str, Any]) -> CurvePoint:
    quality = raw["quality"]
    speed_ups = raw["speed_ups"]
    return CurvePoint(
        **{key: value for key, value in raw.items() if key not in ("quality", "speed_ups")},
        quality=DraftQuality(
            **quality
            | {name: tuple(quality[name]) for name in ("acceptance", "mean_acceptance_length")}
        ),
        speed_ups=SpeedUps(**speed_ups | {"chains": tuple(speed_ups["chains"])}),
    )
