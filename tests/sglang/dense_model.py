"""The built-in model with one float32 number per weight, as SGLang can load it on a CPU."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from deployments.engine.torch_engine.weights.builtin import prepare_builtin
from deployments.engine.torch_engine.weights.gguf import GGUFFile
from deployments.engine.torch_engine.weights.loader import default_cache_dir

if TYPE_CHECKING:
    from pathlib import Path


def write_dense_model(folder: Path) -> Path:
    """Write the folder; both engines then read the same numbers."""
    source = prepare_builtin(default_cache_dir(), print)
    (weights,) = source.glob("*.gguf")
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.glob("*.json"):
        if path.name != "prepared.json":
            shutil.copy(path, folder)
    tensors = dict(GGUFFile(weights).tensors(lambda _: True))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
