"""New drafts for a cluster that runs: from its own traffic, on trial, and back again.

The folder of a target's students (``student_shelf``) is all that these commands and the draft
replicas share; no replica is called.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from cluster.draft_training import train_draft
from cluster.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from cluster.config import ClusterConfig
    from deployments.engine.torch_engine.student_shelf import Decision, StudentShelf

_FILE = "student.safetensors"
_PROMPTS = "prompts.jsonl"
_LICENCE = "kept with the consent of the tenants they came from"
_POLL_S = 0.5


def open_shelf(config: ClusterConfig) -> StudentShelf:
    """The students of a config's model.

    Raises:
        WeightsMissingError: the model is not here.
        ConfigError: the config's draft replicas run no student.
    """
    from deployments.drafters import STUDENT
    from deployments.engine.torch_engine.student_shelf import StudentShelf
    from deployments.engine.torch_engine.weights.loader import weights_digest
    from deployments.model_files import model_folder

    if config.draft.drafter != STUDENT:
        raise ConfigError(
            (f"draft.drafter: only a student is refreshed, not {config.draft.drafter}",)
        )
    folder = model_folder(config.engine.model, config.cache_dir)
    return StudentShelf(config.cache_dir, weights_digest(folder))


def offer(config: ClusterConfig, source: Path) -> StudentShelf:
    """Put a student on trial; the draft replicas that see the folder take it up within seconds.

    Args:
        config: of the cluster.
        source: the student's file, or a folder that holds it.

    Raises:
        WeightsMissingError: the model is not here.
        ConfigError: there is no student that can be read, or it does not fit the config's model.
    """
    from deployments.engine.errors import WeightsMismatchError
    from deployments.engine.torch_engine.student import load_student

    shelf = open_shelf(config)
    file = next(
        (path for path in (source, source / _FILE, source / "draft" / _FILE) if path.is_file()),
        None,
    )
    if file is None:
        raise ConfigError((f"{source}: holds no {_FILE}",))
    try:
        load_student(
            config.engine.model,
            dtype=config.draft.dtype,
            cache_dir=config.cache_dir,
            student_file=file,
        )
    except (OSError, WeightsMismatchError) as error:
        raise ConfigError((f"{file}: {error}",)) from error
    shelf.offer(file)
    return shelf


def wait_for_decision(shelf: StudentShelf) -> Decision | None:
    """Wait until no candidate is on trial.

    Returns:
        What became of the last one; None if somebody took it away.
    """
    while shelf.candidate.exists():
        time.sleep(_POLL_S)
    return shelf.last_decision()


def refresh(
    config: ClusterConfig,
    folder: Path,
    *,
    prompt_files: Sequence[Path],
    command_line: str,
    on_progress: Callable[[str], None],
) -> StudentShelf:
    """Train a student on prompts or on logged traffic, and put it on trial.

    Traffic is copied first, so that a training that was killed goes on with the same prompts.

    Args:
        config: the cluster; of ``training``, the method is always ``student``.
        folder: of the work; must not hold a refresh that is done.
        prompt_files: as for ``train_draft``; the traffic log where there are none.
        command_line: for the draft's card.
        on_progress: told what happens, a short line at a time.

    Raises:
        WeightsMissingError: the model is not here.
        ConfigError: a file, a setting or the folder is wrong, or nothing was logged.
        TrainingError: one of several training processes died.
    """
    open_shelf(config)
    if (folder / "draft" / _FILE).is_file():
        raise ConfigError((f"--out: {folder} holds a refresh that is done; name another folder",))
    licences: list[str] = []
    if not prompt_files:
        prompt_files, licences = [_copy_traffic(config, folder)], [_LICENCE]
    training = config.training.model_copy(update={"method": "student"})
    _, draft_folder = train_draft(
        config.model_copy(update={"training": training}),
        folder,
        prompt_files=prompt_files,
        licences=licences,
        held_out_files=[],
        self_chat=False,
        command_line=command_line,
        on_progress=on_progress,
    )
    return offer(config, draft_folder)


def _copy_traffic(config: ClusterConfig, folder: Path) -> Path:
    """The traffic log as one file of the training's own, readable by its owner only."""
    copy = folder / _PROMPTS
    if copy.is_file():
        return copy
    source = config.ingress.traffic_log.folder
    files = sorted(source.rglob("*.jsonl")) if source is not None else []
    if not files:
        raise ConfigError(
            ("--prompts: none given, and ingress.traffic_log holds no prompts of any tenant",)
        )
    folder.mkdir(parents=True, exist_ok=True)
    partial = copy.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as sink:
        for file in files:
            with suppress(FileNotFoundError):  # it has made room for a newer one
                content = file.read_bytes()
                sink.write(content[: content.rfind(b"\n") + 1])
    partial.replace(copy)
    return copy
