"""Where a model's files lie, and under which name clients ask for it."""

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
    # Imported late: it brings torch, which an ingress with a local folder never needs.
    from deployments.engine.torch_engine.weights.loader import find_model_folder

    return find_model_folder(name_or_path, cache_dir)
