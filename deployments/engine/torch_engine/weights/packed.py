"""Gives a model the quantised blocks of its GGUF file, beside the dense weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployments.engine.errors import UnsupportedModelError
from deployments.engine.torch_engine.kernels.packing import pack_blocks
from deployments.engine.torch_engine.kernels.vectors import Q4_1, Q8_0
from deployments.engine.torch_engine.models.llama import Weight
from deployments.engine.torch_engine.weights.gguf import GGUFFile

if TYPE_CHECKING:
    from pathlib import Path

    from deployments.engine.torch_engine.models.llama import Model
    from deployments.engine.torch_engine.weights.gguf import QuantizedBlocks

_FORMS = {"Q4_1": Q4_1, "Q8_0": Q8_0}


def attach_blocks(model: Model, files: list[Path]) -> None:
    """Keep the file's own blocks for narrow forwards; wide ones use their dense values.

    Args:
        model: filled from the same files.
        files: the model's weights.

    Raises:
        UnsupportedModelError: the files are not GGUF, or a matrix is quantised in another way.
    """
    if any(path.suffix != ".gguf" for path in files):
        raise UnsupportedModelError(
            "engine.weights: file needs a GGUF file with quantised matrices"
        )
    targets = model.weight_targets()
    parts: dict[int, list[tuple[int, QuantizedBlocks]]] = {}
    for path in files:
        for name, blocks in GGUFFile(path).blocks(targets.__contains__):
            target = targets[name]
            # Fused matrices own one memory; a part's place in it is its place in the stack.
            home = target.untyped_storage().data_ptr()
            parts.setdefault(home, []).append((int(target.storage_offset()), blocks))
    for name, weight in model.named_modules():
        if not isinstance(weight, Weight):
            continue
        found = sorted(
            parts.get(weight.weight.untyped_storage().data_ptr(), []), key=lambda p: p[0]
        )
        kinds = {blocks.kind for _, blocks in found}
        rows = sum(blocks.data.shape[0] for _, blocks in found)
        if len(kinds) != 1 or not kinds <= _FORMS.keys() or rows != weight.weight.shape[0]:
            has = ", ".join(sorted(kinds)) or "no quantised numbers"
            raise UnsupportedModelError(
                f"engine.weights: file needs one of {', '.join(_FORMS)} in {name}, which has {has}"
            )
        weight.packed = pack_blocks([blocks.data for _, blocks in found], _FORMS[kinds.pop()])
