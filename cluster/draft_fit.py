"""The training of a draft in this process, or in several that share every step."""

from __future__ import annotations

import multiprocessing
import os
import queue
import tempfile
from multiprocessing.connection import wait
from threading import Thread
from typing import TYPE_CHECKING, NamedTuple

from cluster.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.queues import Queue
    from pathlib import Path

    from cluster.config import ClusterConfig
    from deployments.engine.torch_engine.weights.loader import LoadedModel
    from deployments.engine.training.job import DraftJob, JobReport
    from deployments.engine.training.prompt_split import PromptSplit
    from deployments.engine.training.self_chat import ChatFrame

_POLL_S = 0.5
_END_TIMEOUT_S = 10.0


class JobPlan(NamedTuple):
    """What every process needs to open the same job."""

    config: ClusterConfig
    folder: Path
    prompts: PromptSplit
    chat: ChatFrame | None = None


def open_job(plan: JobPlan, on_progress: Callable[[str], None]) -> DraftJob:
    """The job of a plan, as its folder holds it.

    Raises:
        WeightsMissingError: the model is not here.
        UnsupportedModelError: the model cannot be run.
        RunMismatchError: the folder keeps another job.
        ValueError: the model is too small for a draft.
    """
    from deployments.engine.torch_engine.model_config import ModelConfig
    from deployments.engine.torch_engine.weights.loader import weights_digest
    from deployments.engine.training.job import DraftJob
    from deployments.model_files import model_folder

    engine = plan.config.engine
    model = model_folder(engine.model, plan.config.cache_dir)
    return DraftJob(
        plan.folder,
        plan.config.training,
        plan.prompts,
        target_config=ModelConfig.from_folder(model),
        target_digest=f"{weights_digest(model)} {engine.dtype} {engine.weights}",
        progress=on_progress,
        chat=plan.chat,
    )


def capture_and_fit(plan: JobPlan, job: DraftJob, on_progress: Callable[[str], None]) -> JobReport:
    """Capture what is missing here, then train in as many processes as the plan wants.

    Raises:
        RunMismatchError: the folder's checkpoint is of other settings or texts.
        WeightsMismatchError: the model's files do not hold its tensors.
        TrainingError: one of several processes died.
    """
    on_progress(f"loading {plan.config.engine.model}")
    loaded = _load(plan.config, plan.config.engine.device, share=1)
    job.capture(loaded)
    if plan.config.training.num_processes == 1:
        return job.fit(loaded)
    del loaded
    return _fit_together(plan, on_progress)


def _load(config: ClusterConfig, device: str, share: int) -> LoadedModel:
    import torch

    from deployments.engine.torch_engine.weights.loader import load_model

    engine = config.engine
    num_threads = engine.num_threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, num_threads // share))
    return load_model(
        engine.model,
        dtype=engine.dtype,
        device=device,
        cache_dir=config.cache_dir,
        weights=engine.weights,
    )


def _fit_together(plan: JobPlan, on_progress: Callable[[str], None]) -> JobReport:
    from deployments.engine.training.job import JobReport

    spawning = multiprocessing.get_context("spawn")
    said: Queue[object] = spawning.Queue()
    with tempfile.TemporaryDirectory() as meeting:
        processes = [
            spawning.Process(
                target=_work, args=(rank, plan, f"file://{meeting}/store", said), daemon=True
            )
            for rank in range(plan.config.training.num_processes)
        ]
        for process in processes:
            process.start()
        try:
            while True:
                try:
                    message = said.get(timeout=_POLL_S)
                except queue.Empty:
                    codes = [process.exitcode for process in processes]
                    if any(code is not None and code != 0 for code in codes):
                        raise TrainingError(
                            f"a training process ended with {codes}; the same command goes on from "
                            "the last checkpoint"
                        ) from None
                    continue
                if isinstance(message, JobReport):
                    return message
                if isinstance(message, Exception):
                    raise message
                on_progress(str(message))
        finally:
            for process in processes:
                process.join(_END_TIMEOUT_S if process.exitcode == 0 else 0)
                process.kill()


def _work(rank: int, plan: JobPlan, meeting: str, said: Queue[object]) -> None:
    """One process; the first one speaks for all."""
    from torch import distributed

    from deployments.engine.errors import EngineError
    from deployments.engine.training.sharding import end_process

    Thread(target=_end_with_parent, daemon=True).start()
    world_size = plan.config.training.num_processes
    device = plan.config.engine.device
    distributed.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        init_method=meeting,
        rank=rank,
        world_size=world_size,
    )

    def tell(line: str) -> None:
        if rank == 0:
            said.put(line)

    try:
        loaded = _load(plan.config, device if device == "cpu" else f"{device}:{rank}", world_size)
        report = open_job(plan, tell).fit(loaded)
    except EngineError as error:
        said.put(error)
        raise
    if rank == 0:
        said.put(report)
        said.close()
        said.join_thread()
    end_process()


def _end_with_parent() -> None:
    """A command that was killed leaves nobody behind who writes to its folder."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
