"""Where a model's files lie, and what of it clients are told: its name and its context."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deployments.engine.config import EngineConfig


def served_model_name(engine: EngineConfig) -> str:
    """The model id that clients use."""
    return engine.served_model_name or engine.model.rstrip("/").rpartition("/")[2]


def model_folder(name_or_path: str, cache_dir: Path) -> Path:
    """The local folder of a model.

    Raises:
        WeightsMissingError: it is not on this machine.
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    from deployments.engine.torch_engine.weights.folders import find_model_folder

    return find_model_folder(name_or_path, cache_dir)


def context_length(engine: EngineConfig, folder: Path) -> int:
    """Prompt and output tokens of one sequence, at most: what the engine will compute with.

    Raises:
        WeightsMissingError: the model's folder has no ``config.json``.
        UnsupportedModelError: the model does not say how long its context is.
    """
    from deployments.engine.torch_engine.weights.folders import max_positions

    return engine.context_length(max_positions(folder))
