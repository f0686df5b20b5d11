"""The training of a draft in this process, or in several that share every step."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

from cluster.errors import ConfigError
from cluster.local_ray import some_ray

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from deployments.engine.config import EngineConfig
    from deployments.engine.torch_engine.weights.loader import LoadedModel
    from deployments.engine.training.config import DraftTrainingConfig
    from deployments.engine.training.job import DraftJob
    from deployments.engine.training.prompt_split import PromptSplit
    from deployments.engine.training.report import JobReport
    from deployments.engine.training.self_chat import ChatFrame

_NEEDED_BY_RAY_TRAIN = ("pyarrow", "pandas")


class JobPlan(NamedTuple):
    """What every process needs to open the same job."""

    engine: EngineConfig
    cache_dir: Path
    training: DraftTrainingConfig
    folder: Path
    prompts: PromptSplit
    chat: ChatFrame | None = None


def check_processes(training: DraftTrainingConfig) -> None:
    """Find out early, before hours of answers, what several processes lack.

    Raises:
        ConfigError: Ray Train is not installed.
    """
    if training.num_processes > 1 and not all(map(find_spec, _NEEDED_BY_RAY_TRAIN)):
        raise ConfigError(
            ("training.num_processes: several need Ray Train; pip install 'paceline[train]'",)
        )


def open_job(
    plan: JobPlan, on_progress: Callable[[str], None], *, is_answering: bool = True
) -> DraftJob:
    """The job of a plan, as its folder holds it.

    Args:
        plan: see there.
        on_progress: told what happens.
        is_answering: this process has the prompts answered, not another one.

    Raises:
        WeightsMissingError: the model is not here.
        UnsupportedModelError: the model cannot be run.
        RunMismatchError: the folder keeps another job.
        ValueError: the model is too small for a draft, or cannot be cut as the plan wants.
    """
    from deployments.engine.torch_engine.model_config import ModelConfig
    from deployments.engine.torch_engine.weights.loader import weights_digest
    from deployments.engine.training.job import DraftJob
    from deployments.model_files import model_folder

    engine = plan.engine
    model = model_folder(engine.model, plan.cache_dir)
    return DraftJob(
        plan.folder,
        plan.training,
        plan.prompts,
        target_config=ModelConfig.from_folder(model),
        target_digest=f"{weights_digest(model)} {engine.dtype} {engine.weights}",
        progress=on_progress,
        chat=plan.chat,
        is_answering=is_answering,
    )


def load_target(plan: JobPlan, device: str) -> LoadedModel:
    """The plan's target, on a device."""
    from deployments.engine.torch_engine.weights.loader import load_model

    engine = plan.engine
    return load_model(
        engine.model,
        dtype=engine.dtype,
        device=device,
        cache_dir=plan.cache_dir,
        weights=engine.weights,
    )


def capture_and_fit(
    plan: JobPlan,
    job: DraftJob,
    on_progress: Callable[[str], None],
    check_answers: Callable[[], None],
) -> JobReport:
    """Capture what is missing here, then train in as many processes as the plan wants.

    Args:
        plan: of the job.
        job: as ``open_job`` opened it.
        on_progress: told what happens.
        check_answers: raises what went wrong where answers are still being written.

    Raises:
        RunMismatchError: the folder's checkpoint is of other settings or texts.
        WeightsMismatchError: the model's files do not hold its tensors.
        ClusterStartError: there is no Ray for several processes.
        TrainingError: several processes cannot train, or too many were lost.
    """
    import torch

    on_progress(f"loading {plan.engine.model}")
    torch.set_num_threads(plan.engine.num_threads or len(os.sched_getaffinity(0)))
    loaded = load_target(plan, plan.engine.device)
    job.capture(loaded)
    training = plan.training
    if training.num_processes == 1:
        return job.fit(loaded)
    del loaded
    with some_ray(training.num_processes * training.cpus_per_process, on_progress):
        # Not before: it imports Ray, which reads its environment then.
        from cluster.ray_training import fit_on_ray

        return fit_on_ray(plan, on_progress, check_answers)
