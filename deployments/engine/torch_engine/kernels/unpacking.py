"""Rows of a packed matrix as numbers: how tokens are embedded where no dense copy is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from deployments.engine.torch_engine.kernels.compiling import kernel
from deployments.engine.torch_engine.kernels.vectors import (
    BLOCK,
    F32,
    LANES,
    Q4_1,
    Q4_1_TILE_BYTES,
    Q8_0_TILE_BYTES,
    Value,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from deployments.engine.torch_engine.kernels.packing import PackedMatrix

_HALF_BYTES = 2


def unpack_rows(matrix: PackedMatrix, rows: NDArray[np.int64], out: NDArray[np.float32]) -> None:
    """Write what the blocks of some rows mean.

    Args:
        matrix: packed.
        rows: [N], their numbers.
        out: [N or more, columns].
    """
    _unpack(matrix.data.reshape(-1), matrix.form, rows, matrix.columns // BLOCK, out)


@intrinsic
def _half(typing_context, bits):
    """The float16 of these bits, as float32."""

    def generate(_context: Any, builder: Value, _signature: Any, args: Sequence[Value]) -> Value:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), F32)

    return types.float32(types.uint16), generate


@kernel
def _half_at(data, at):
    return _half(np.uint16(data[at]) | np.uint16(np.uint16(data[at + 1]) << np.uint16(8)))


@kernel
def _unpack(data, form, rows, num_blocks, out):
    block_bytes = Q4_1_TILE_BYTES if form == Q4_1 else Q8_0_TILE_BYTES
    for n in range(rows.shape[0]):
        tile, lane = rows[n] // LANES, rows[n] % LANES
        for block in range(num_blocks):
            at = (tile * num_blocks + block) * block_bytes
            scale = _half_at(data, at + _HALF_BYTES * lane)
            at += _HALF_BYTES * LANES
            numbers = out[n, block * BLOCK : block * BLOCK + BLOCK]
            if form == Q4_1:
                minimum = _half_at(data, at + _HALF_BYTES * lane)
                at += _HALF_BYTES * LANES
                for i in range(BLOCK):
                    # Eight columns share an int32; even ones lie in its lower half, odd ones above.
                    place = i % 8
                    byte = data[at + 4 * (LANES * (i // 8) + lane) + 2 * (place % 2) + place // 4]
                    number = byte >> np.uint8(4) if place % 4 >= 2 else byte & np.uint8(15)
                    numbers[i] = np.float32(number) * scale + minimum
            else:
                for i in range(BLOCK):
                    byte = data[at + 2 * (LANES * (i // 2) + lane) + i % 2]
                    numbers[i] = np.float32(np.int8(byte)) * scale
