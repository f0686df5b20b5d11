"""Gives a model quantised blocks beside the dense weights: a GGUF file's own, or new ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gguf
import numpy as np
import torch

from deployments.engine.errors import UnsupportedModelError
from deployments.engine.torch_engine.kernels.packing import pack_blocks
from deployments.engine.torch_engine.kernels.vectors import BLOCK, Q4_1, Q8_0
from deployments.engine.torch_engine.models.llama import Weight
from deployments.engine.torch_engine.weights.gguf import GGUFFile, QuantizedBlocks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from deployments.engine.torch_engine.kernels.packing import PackedMatrix
    from deployments.engine.torch_engine.models.llama import Model

_FORMS = {"Q4_1": Q4_1, "Q8_0": Q8_0}
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
"""Kept in eight bits in any case: their errors go straight into the logits."""


def file_blocks(
    files: list[Path], is_wanted: Callable[[str], bool]
) -> Iterator[tuple[str, QuantizedBlocks]]:
    """The blocks of the wanted matrices as GGUF files hold them.

    Raises:
        UnsupportedModelError: the files are not GGUF.
    """
    if any(path.suffix != ".gguf" for path in files):
        raise UnsupportedModelError(
            "engine.weights: file needs a GGUF file with quantised matrices"
        )
    for path in files:
        yield from GGUFFile(path).blocks(is_wanted)


def quantised(
    tensors: Iterable[tuple[str, Tensor]], bits: int, blocks: dict[str, QuantizedBlocks]
) -> Iterator[tuple[str, Tensor]]:
    """Round every matrix to blocks, and pass on the values that the blocks mean.

    Args:
        tensors: of a checkpoint.
        bits: 8 for Q8_0 (symmetric, nearest), 4 for Q4_1 (between the block's minimum and maximum).
        blocks: gets the blocks by the tensor's name.

    Raises:
        UnsupportedModelError: a row is no whole number of blocks.
    """
    for name, tensor in tensors:
        if tensor.ndim != 2:
            yield name, tensor
            continue
        if tensor.shape[1] % BLOCK:
            raise UnsupportedModelError(
                f"engine.weights: {name} has {tensor.shape[1]} columns, which {BLOCK} must divide"
            )
        kind = "Q8_0" if bits == 8 or name in _VOCABULARY else "Q4_1"
        form = gguf.GGMLQuantizationType[kind]
        data = gguf.quants.quantize(tensor.float().numpy(), form)
        blocks[name] = QuantizedBlocks(kind, data)
        yield name, torch.from_numpy(gguf.quants.dequantize(data, form).astype(np.float32))


def attach_blocks(model: Model, blocks: Iterable[tuple[str, QuantizedBlocks]]) -> None:
    """Keep blocks for narrow forwards; wide ones use their dense values.

    Args:
        model: filled with the values of the same blocks.
        blocks: of all its matrices, by their checkpoint names.

    Raises:
        UnsupportedModelError: a matrix has no blocks, or is quantised in another way; the model
            keeps none then.
    """
    targets = model.weight_targets()
    packed: list[tuple[Weight, PackedMatrix]] = []
    parts: dict[int, list[tuple[int, QuantizedBlocks]]] = {}
    for name, found in blocks:
        target = targets.get(name)
        if target is not None:  # some files store a tied head a second time
            # Fused matrices own one memory; a part's place in it is its place in the stack.
            home = target.untyped_storage().data_ptr()
            parts.setdefault(home, []).append((int(target.storage_offset()), found))
    for name, weight in model.named_modules():
        if not isinstance(weight, Weight):
            continue
        home = weight.weight.untyped_storage().data_ptr()
        stacked = [part for _, part in sorted(parts.get(home, []), key=lambda part: part[0])]
        kinds = {part.kind for part in stacked}
        rows = sum(part.data.shape[0] for part in stacked)
        if len(kinds) != 1 or not kinds <= _FORMS.keys() or rows != weight.weight.shape[0]:
            has = ", ".join(sorted(kinds)) or "no quantised numbers"
            raise UnsupportedModelError(
                f"engine.weights: file needs one of {', '.join(_FORMS)} in {name}, which has {has}"
            )
        packed.append((weight, pack_blocks([part.data for part in stacked], _FORMS[kinds.pop()])))
    for weight, matrix in packed:
        weight.packed = matrix


def pack_rows(found: QuantizedBlocks, rows: NDArray[np.int64]) -> PackedMatrix:
    """Some rows of a quantised matrix that ``attach_blocks`` took."""
    return pack_blocks([found.data[rows]], _FORMS[found.kind])
