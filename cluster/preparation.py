"""What must lie in the cache before a cluster can start: weights, and a student fitted to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployments.engine.config import DEFAULT_MODEL

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cluster.config import ClusterConfig

# The engine's modules bring torch; they are imported where they are used, so that commands that
# need none of it start at once.


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
    from deployments.engine.torch_engine.weights.loader import find_model_folder

    if model == DEFAULT_MODEL:
        return prepare_builtin(cache_dir, on_progress)
    return find_model_folder(model, cache_dir)


def prepare(config: ClusterConfig, on_progress: Callable[[str], None]) -> None:
    """Bring or make whatever a start of this config needs and is not here yet.

    Raises:
        WeightsMissingError: the model cannot be had.
    """
    fetch_weights(config.engine.model, config.cache_dir, on_progress)


def find_weights(config: ClusterConfig) -> Path:
    """The model's folder.

    Raises:
        WeightsMissingError: it is not here.
    """
    from deployments.model_files import model_folder

    return model_folder(config.engine.model, config.cache_dir)
