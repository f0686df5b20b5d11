"""Reads safetensors checkpoints, single or sharded."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from safetensors import safe_open

from deployments.engine.errors import WeightsMissingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor

_INDEX = "model.safetensors.index.json"


def safetensors_files(folder: Path) -> list[Path]:
    """The checkpoint's files, in order; empty if the folder holds none.

    Raises:
        WeightsMissingError: the index names a file that is not there.
    """
    index = folder / _INDEX
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    files = [folder / name for name in sorted(names)]
    for path in files:
        if not path.is_file():
            raise WeightsMissingError(f"{_INDEX} names {path.name}, which is not in {folder}")
    return files


def read_safetensors(path: Path, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """The wanted tensors of one file, one at a time, in the checkpoint's dtype."""
    with safe_open(path, framework="pt") as checkpoint:
        for name in filter(is_wanted, checkpoint.keys()):
            yield name, checkpoint.get_tensor(name)
