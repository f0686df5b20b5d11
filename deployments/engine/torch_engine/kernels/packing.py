"""Weights in the forms that ``products`` reads.

Dense matrices are read where the model keeps them. Quantised ones are laid out in tiles of sixteen
rows, so that one instruction works on sixteen rows at once. A tile holds, block after block of 32
columns: the sixteen scales (float16), for Q4_1 the sixteen minima (float16), then the columns. For
Q8_0 each column is sixteen int8; for Q4_1 sixteen bytes hold column i in their low and column
i + 16 in their high halves. Rows are padded with zeros to whole tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from deployments.engine.torch_engine.kernels.vectors import (
    BLOCK,
    DENSE_BF16,
    DENSE_F32,
    LANES,
    Q4_1,
    Q8_0,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

_DENSE_FORMS = {torch.float32: DENSE_F32, torch.bfloat16: DENSE_BF16}
_HEADER_BYTES = {Q4_1: 4, Q8_0: 2}


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """One quantised matrix.

    Attributes:
        data: uint8, tiles.
        form: ``Q4_1`` or ``Q8_0``.
    """

    data: NDArray[np.uint8]
    form: int
    rows: int
    columns: int


def pack_blocks(parts: Sequence[NDArray[np.uint8]], form: int) -> PackedMatrix:
    """Lay out a GGUF file's blocks in tiles.

    Args:
        parts: [rows, bytes] each, as the file holds them; stacked in this order.
        form: of all parts.
    """
    header = _HEADER_BYTES[form]
    block_bytes = header + (BLOCK // 2 if form == Q4_1 else BLOCK)
    rows = sum(part.shape[0] for part in parts)
    num_blocks = parts[0].shape[1] // block_bytes
    num_tiles = -(-rows // LANES)
    padded = torch.zeros(num_tiles * LANES, num_blocks * block_bytes, dtype=torch.uint8)
    np.concatenate(parts, out=padded[:rows].numpy())
    tiles = padded.view(num_tiles, LANES, num_blocks, block_bytes)
    headers = tiles[..., :header].unflatten(-1, (-1, 2)).permute(0, 2, 3, 1, 4)
    columns = tiles[..., header:].permute(0, 2, 3, 1)
    packed = torch.cat((headers.flatten(2), columns.flatten(2)), dim=2)
    return PackedMatrix(packed.numpy(), form, rows, num_blocks * BLOCK)


def matrix_row(
    weight: Tensor, bias: NDArray[np.float32] | None, packed: PackedMatrix | None
) -> list[int]:
    """The numbers that ``products.multiply`` wants of a matrix; the caller keeps it alive."""
    bias_at = bias.ctypes.data if bias is not None else 0
    if packed is not None:
        return [packed.data.ctypes.data, packed.form, packed.rows, packed.columns, bias_at]
    rows, columns = weight.shape
    return [weight.data_ptr(), _DENSE_FORMS[weight.dtype], rows, columns, bias_at]
