"""The training of a draft in several processes, anywhere on a Ray cluster: a job of Ray Train.

Ray Train places the processes, makes them one group of torch's, and starts them anew when one is
lost, as many as there is room for. What they resume from is not Ray's but the run's own checkpoint
in the job's folder, which all machines must see.
"""

from __future__ import annotations

import logging
import shutil
import socket
import time
from collections import deque
from concurrent.futures import Future, wait
from threading import Thread
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer, get_device
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.draft_fit import load_target, open_job
from cluster.errors import TrainingError
from deployments.engine.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.draft_fit import JobPlan
    from deployments.engine.training.report import JobReport

_POLL_S = 0.5
_ASK_TIMEOUT_S = 60.0
_MAX_LINES = 1000
_RAY_FOLDER = "ray"
_GO_ON = "the same command goes on from the last checkpoint"


def fit_on_ray(
    plan: JobPlan, on_progress: Callable[[str], None], check_answers: Callable[[], None]
) -> JobReport:
    """Train in as many processes as the plan wants and the cluster has room for.

    Args:
        plan: its folder, cache and model are absolute paths; what must be stored is captured.
        on_progress: told what the first process says, and of losses.
        check_answers: raises what went wrong where answers are still being written.

    Raises:
        RunMismatchError: the folder's checkpoint is of other settings or texts.
        TrainingError: no processes were started, or more were lost than ``max_failures`` allows.
    """
    # Progress is told once, by the run itself.
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    training = plan.training
    storage = plan.folder / _RAY_FOLDER
    # The board must outlive every process but this one, so it stays beside it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(_Board).remote()
    resources: dict[str, float] = {"CPU": training.cpus_per_process}
    has_gpus = plan.engine.device.startswith("cuda")
    if has_gpus:
        resources["GPU"] = 1
    trainer = TorchTrainer(
        _work,
        train_loop_config={"plan": plan, "board": board},
        scaling_config=ScalingConfig(
            num_workers=(training.min_processes, training.num_processes),
            use_gpu=has_gpus,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=plan.folder.name,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=training.max_failures),
            callbacks=[_LossTeller(board)],
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        watched = _watch(
            trainer.fit, board, on_progress, training.start_timeout_s, check=check_answers
        )
        result = watched.return_value
    except RayError as error:
        raise TrainingError(f"the Ray cluster was lost: {_first_line(error)}; {_GO_ON}") from error
    except ray.train.TrainingFailedError as error:
        raise TrainingError(f"{_what_failed(error)}; {_GO_ON}") from error
    finally:
        # Ray notes there what it was asked for; without checkpoints of its own it reads none of it.
        shutil.rmtree(storage, ignore_errors=True)
    if isinstance(result, Exception):
        raise result
    report: JobReport = result
    return report


class _Board:
    """What the processes have to say, until the command asks for it. An actor."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=_MAX_LINES)
        self._is_training = False

    def began(self, line: str) -> None:
        self._is_training = True
        self._lines.append(line)

    def lost(self, line: str) -> None:
        self._is_training = False
        self._lines.append(line)

    def tell(self, line: str) -> None:
        self._lines.append(line)

    def take(self) -> tuple[list[str], bool]:
        """All lines since the last time, and whether processes are at work."""
        lines = list(self._lines)
        self._lines.clear()
        return lines, self._is_training


class _LossTeller(UserCallback):  # type: ignore[misc]
    """Runs beside Ray Train's controller."""

    def __init__(self, board: Any) -> None:  # noqa: ANN401 - a handle
        self._board = board

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        del run_context
        ranks = ", ".join(map(str, sorted(worker_exceptions)))
        self._board.lost.remote(f"warning: lost process {ranks} of the training")


def _watch(
    fit: Callable[[], Any],
    board: Any,  # noqa: ANN401 - a handle
    on_progress: Callable[[str], None],
    start_timeout_s: float,
    check: Callable[[], None] = lambda: None,
) -> Any:  # noqa: ANN401 - Ray Train's result
    """Wait for the end and pass on what is said until then."""
    # Off the main thread, where Ray Train would turn an interrupt into an exit without any error.
    ending = _in_background(fit)
    deadline = time.monotonic() + start_timeout_s
    while True:
        is_over = ending.done()
        lines, is_training = ray.get(board.take.remote(), timeout=_ASK_TIMEOUT_S)
        for line in lines:
            on_progress(line)
        if is_over:
            return ending.result()
        check()
        if is_training:
            deadline = time.monotonic() + start_timeout_s
        elif time.monotonic() > deadline:
            raise TrainingError(
                f"the Ray cluster has started no processes within {start_timeout_s:.0f} s "
                "(training.start_timeout_s): it needs room for training.min_processes of them, "
                f"each with training.cpus_per_process and, with CUDA, a GPU; {_GO_ON}"
            )
        wait([ending], timeout=_POLL_S)


def _in_background(action: Callable[[], Any]) -> Future[Any]:
    """Not an executor's: its thread would hold up the end of a command that is interrupted."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:  # noqa: BLE001 - the root of a thread; who waits gets it
            future.set_exception(error)

    Thread(target=run, name="ray-train", daemon=True).start()
    return future


def _work(parts: dict[str, Any]) -> JobReport | Exception:
    """One process; the first one speaks for all.

    What a second attempt would meet again is given back, not raised: Ray Train repeats an attempt
    that raises.
    """
    import torch
    from torch import distributed

    plan, board = parts["plan"], parts["board"]
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()

    def tell(line: str) -> None:
        if rank == 0:
            board.tell.remote(line)

    if rank == 0:
        board.began.remote(f"training in {size} of {plan.training.num_processes} processes")
    torch.set_num_threads(plan.training.cpus_per_process)
    problem: TrainingError | None = None
    try:
        # Asked before a job is opened, which makes what is missing.
        if not (plan.folder / "features").is_dir():
            raise FileNotFoundError(
                f"{plan.folder} is not here: --out must name a folder that every machine of the "
                "Ray cluster sees under the same path"
            )
        loaded = load_target(plan, str(get_device()))
        job = open_job(plan, tell, is_answering=False)
    except (EngineError, OSError, ValueError) as error:
        problem = TrainingError(f"on {socket.gethostname()}: {error}")
    problems: list[TrainingError | None] = [None] * size
    distributed.all_gather_object(problems, problem)
    for met in problems:
        if met is not None:
            return met
    try:
        return job.fit(loaded)
    except EngineError as error:
        return error


def _what_failed(error: Exception) -> str:
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    if not failures:
        return f"Ray Train failed: {_first_line(error)}"
    each = (f"process {rank}: {_first_line(failures[rank])}" for rank in sorted(failures))
    return f"training processes ended too often ({'; '.join(each)})"


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
