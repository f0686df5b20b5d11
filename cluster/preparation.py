"""What must be here before a cluster can start: the model's weights, and whatever drafts for it.

The engine's modules bring torch. They are imported where they are used, so that commands that need
none of it start at once.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import ConfigError
from deployments.engine.config import DEFAULT_MODEL
from deployments.engine.errors import UnsupportedModelError, WeightsMismatchError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.config import ClusterConfig

DEFAULT_TOKENS_BUDGET = 20_000
"""What a student is fitted on unless asked otherwise."""

_STUDENT = "student"
_IMPORT_TIMEOUT_S = 60.0
_IMPORT_DRAFTER = """
import sys
from deployments.engine.speculation.drafters.load import find_factory
from deployments.engine.speculation.errors import DrafterLoadError
try:
    find_factory(sys.argv[1])
except DrafterLoadError as error:
    sys.exit(str(error))
"""


def fetch_weights(model: str, cache_dir: Path, on_progress: Callable[[str], None]) -> Path:
    """Bring a model here; quick if it is.

    Args:
        model: the built-in model's name, a folder, or a Hugging Face id.
        cache_dir: where the built-in model is put.
        on_progress: told what happens, a short line at a time.

    Returns:
        The model's folder.

    Raises:
        WeightsMissingError: it cannot be had.
    """
    from deployments.engine.torch_engine.weights.builtin import prepare_builtin
    from deployments.engine.torch_engine.weights.folders import find_model_folder

    if model == DEFAULT_MODEL:
        return prepare_builtin(cache_dir, on_progress)
    return find_model_folder(model, cache_dir)


def fit_student(
    model: str, cache_dir: Path, *, tokens_budget: int, on_progress: Callable[[str], None]
) -> Path:
    """Fit a student to a model and keep it; minutes at most for small models.

    Args:
        model: the target, whose weights are here.
        cache_dir: where the student is put.
        tokens_budget: prompt and answer tokens to look at; more is slower and better.
        on_progress: told what happens, a short line at a time.

    Returns:
        The student's file.

    Raises:
        WeightsMissingError: the target is not here.
        ConfigError: no student can be made of it.
    """
    import torch

    from deployments.engine.torch_engine import student_fitting
    from deployments.engine.torch_engine.prompts import bundled_prompts
    from deployments.engine.torch_engine.student import save_student
    from deployments.engine.torch_engine.weights.loader import load_model

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    on_progress(f"loading {model}")
    try:
        loaded = load_model(model, dtype="bfloat16", cache_dir=cache_dir)
        student = student_fitting.fit_student(
            loaded,
            bundled_prompts(loaded.folder),
            tokens_budget=tokens_budget,
            progress=on_progress,
        )
    except (UnsupportedModelError, WeightsMismatchError, ValueError) as error:
        raise ConfigError((f"engine.model: {error}",)) from error
    on_progress(
        f"fitted on {student.num_positions} positions; agrees with the target's next token on "
        f"{student.agreement or 0:.0%} of held-out ones"
    )
    return save_student(student, cache_dir)


def prepare(config: ClusterConfig, on_progress: Callable[[str], None]) -> None:
    """Bring or make whatever a start of this config needs and is not here yet.

    Raises:
        WeightsMissingError: a model cannot be had.
        ConfigError: no drafter of that name can be imported.
    """
    for model in config_models(config):
        on_progress(f"looking for {model}")
        fetch_weights(model, config.cache_dir, on_progress)
    if needs_student(config) and not has_student(config):
        on_progress("fitting a draft model to it, once (a minute or two)")
        fit_student(
            config.engine.model,
            config.cache_dir,
            tokens_budget=DEFAULT_TOKENS_BUDGET,
            on_progress=on_progress,
        )
    find_drafter(config)


def check_prepared(config: ClusterConfig) -> None:
    """Return if everything a start of this config needs is here.

    Raises:
        WeightsMissingError: something is not; the message names the command that brings it.
        ConfigError: no drafter of that name can be imported.
    """
    find_weights(config)
    find_drafter(config)


def config_models(config: ClusterConfig) -> tuple[str, ...]:
    """The models that a start of this config loads, the target's first."""
    models = [config.engine.model]
    if _drafts(config) and config.draft.language_model is not None:
        models.append(config.draft.language_model)
    return tuple(dict.fromkeys(models))


def find_weights(config: ClusterConfig) -> Path:
    """The model's folder.

    Raises:
        WeightsMissingError: it is not here.
    """
    from deployments.model_files import model_folder

    return model_folder(config.engine.model, config.cache_dir)


def find_student(config: ClusterConfig) -> Path:
    """The file of the student of the config's model: fitted here, or shipped.

    Raises:
        WeightsMissingError: model or student are not here.
    """
    from deployments.engine.torch_engine import student
    from deployments.engine.torch_engine.weights.loader import weights_digest

    return student.find_student(config.cache_dir, weights_digest(find_weights(config)))


def has_student(config: ClusterConfig) -> bool:
    """Whether the config's model, which is here, has a student."""
    from deployments.engine.errors import WeightsMissingError

    try:
        find_student(config)
    except WeightsMissingError:
        return False
    return True


def find_drafter(config: ClusterConfig) -> str | None:
    """What draft replicas will load: a file, a folder or an import path; None without any.

    Raises:
        WeightsMissingError: student or language model are not here.
        ConfigError: no drafter of that name can be imported.
    """
    if not _drafts(config) or config.engine.kind == "simulated":
        return None
    if needs_student(config):
        return str(find_student(config))
    if config.draft.language_model is not None:
        from deployments.model_files import model_folder

        return str(model_folder(config.draft.language_model, config.cache_dir))
    _check_import(config.draft.drafter)
    return config.draft.drafter


def needs_student(config: ClusterConfig) -> bool:
    """Whether draft replicas will ask for a student."""
    is_real = config.engine.kind != "simulated"
    return is_real and _drafts(config) and config.draft.drafter == _STUDENT


def _drafts(config: ClusterConfig) -> bool:
    return config.engine.takes_drafts and config.pools.draft is not None


def _check_import(drafter: str) -> None:
    """Import a drafter as a replica will: in a process of its own, the current folder included.

    In this process its module could import Ray Serve before the cluster's switches are set.
    """
    source_root = str(Path(__file__).resolve().parent.parent)
    python_path = os.pathsep.join(filter(None, (source_root, os.environ.get("PYTHONPATH"))))
    try:
        imported = subprocess.run(  # noqa: S603 - this interpreter, no shell
            [sys.executable, "-c", _IMPORT_DRAFTER, drafter],
            env=os.environ | {"PYTHONPATH": python_path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_IMPORT_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        problem = f"drafter {drafter!r} takes longer than {_IMPORT_TIMEOUT_S:.0f} s to import"
        raise ConfigError((f"draft.drafter: {problem}",)) from None
    if imported.returncode:
        lines = imported.stderr.strip().splitlines() or [f"drafter {drafter!r} ends its process"]
        raise ConfigError((f"draft.drafter: {lines[-1]}",))
