"""Where a model's files lie, and what they say of it.

Needs no torch, so that whoever only reads settings starts at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deployments.engine.config import DEFAULT_MODEL
from deployments.engine.errors import UnsupportedModelError, WeightsMissingError

_SNAPSHOT_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def builtin_folder(cache_dir: Path) -> Path:
    """Where the built-in model lies once it has been fetched."""
    return cache_dir / "models" / DEFAULT_MODEL


def find_model_folder(name_or_path: str, cache_dir: Path) -> Path:
    """The local folder of a model; a Hugging Face id is downloaded unless the hub is offline.

    Args:
        name_or_path: the built-in model's name, a folder, or a Hugging Face id.
        cache_dir: Paceline's cache; Hugging Face models stay in that library's own cache.

    Raises:
        WeightsMissingError: it is not here and cannot be had.
    """
    if name_or_path == DEFAULT_MODEL:
        folder = builtin_folder(cache_dir)
        if not folder.is_dir():
            raise WeightsMissingError(
                f"the model {DEFAULT_MODEL} is not in {cache_dir}; get it with: paceline fetch"
            )
        return folder
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name_or_path, allow_patterns=_SNAPSHOT_PATTERNS))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise WeightsMissingError(
            f"{name_or_path!r} is neither a folder nor a Hugging Face model that can be had now "
            f"({type(error).__name__}); get it with: paceline fetch --model {name_or_path}"
        ) from error


def read_settings(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """What a file of settings in a model's folder says.

    Raises:
        WeightsMissingError: it is not there.
        UnsupportedModelError: it is not JSON, or not of settings.
    """
    path = folder / name
    if not path.is_file():
        raise WeightsMissingError(f"{folder} has no {name}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise UnsupportedModelError(f"{path} holds no settings")
    return settings


def max_positions(folder: Path) -> int:
    """The context length that the model was trained for.

    Raises:
        WeightsMissingError: there is no ``config.json``.
        UnsupportedModelError: it does not say.
    """
    length = read_settings(folder).get("max_position_embeddings")
    if not isinstance(length, int):
        raise UnsupportedModelError("config.json has no 'max_position_embeddings'")
    return length
