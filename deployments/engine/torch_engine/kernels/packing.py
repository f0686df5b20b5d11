"""Weights in the forms that ``products`` reads.

Dense matrices are read where the model keeps them. Quantised ones are laid out in tiles of sixteen
rows, so that one instruction works on sixteen rows at once. A tile holds, block after block of 32
columns: the sixteen scales (float16), for Q4_1 the sixteen minima (float16), then the columns. For
Q8_0 each column is sixteen int8; for Q4_1 four times sixteen int32 hold eight columns of a row
each. Their lower half has the even ones in its nibbles, their upper half the odd ones: so four
shifts give pairs of neighbours as int16. Rows are padded with zeros to whole tiles.
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
    Q4_1_SHORT,
    Q8_0,
    Q8_0_SHORT,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

_DENSE_FORMS = {torch.float32: DENSE_F32, torch.bfloat16: DENSE_BF16}
_HEADER_BYTES = {Q4_1: 4, Q8_0: 2}
_SHORT = {Q4_1: Q4_1_SHORT, Q8_0: Q8_0_SHORT}


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
    columns = tiles[..., header:]
    if form == Q4_1:
        columns = _interleaved(columns).permute(0, 2, 3, 1, 4)
    else:
        columns = columns.unflatten(-1, (-1, 2)).permute(0, 2, 3, 1, 4)
    packed = torch.cat((headers.flatten(2), columns.flatten(2)), dim=2)
    return PackedMatrix(packed.numpy(), form, rows, num_blocks * BLOCK)


def _interleaved(nibbles: Tensor) -> Tensor:
    """[..., 16] bytes of columns i and i + 16 -> [..., 4, 4] bytes of columns 8j to 8j + 7."""
    columns = torch.cat((nibbles & 15, nibbles >> 4), dim=-1)
    pairs = columns.unflatten(-1, (4, 2, 2, 2))  # int32, byte, nibble, even or odd
    low, high = pairs.unbind(-2)
    joined: Tensor = low | high << 4
    return joined.transpose(-1, -2).flatten(-2)


def matrix_row(
    weight: Tensor, bias: NDArray[np.float32] | None, packed: PackedMatrix | None
) -> list[int]:
    """The numbers that ``products.multiply`` wants of a matrix; the caller keeps it alive.

    Where the model computes in bfloat16, inputs of quantised rows may be rounded too: to sixteen
    bits per block, which is 64 times finer than bfloat16 and lets integer arithmetic do the work.
    """
    bias_at = bias.ctypes.data if bias is not None else 0
    if packed is not None:
        form = _SHORT[packed.form] if weight.dtype == torch.bfloat16 else packed.form
        return [packed.data.ctypes.data, form, packed.rows, packed.columns, bias_at]
    rows, columns = weight.shape
    return [weight.data_ptr(), _DENSE_FORMS[weight.dtype], rows, columns, bias_at]
