"""Floats as their bits, inside compiled functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray


def _to_bits(context: object, value: types.Type) -> tuple[object, object]:
    del context, value

    def generate(
        _context: object, builder: ir.IRBuilder, _signature: object, args: Sequence[ir.Value]
    ) -> ir.Value:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), generate


def _float_of_bits(context: object, bits: types.Type) -> tuple[object, object]:
    del context, bits

    def generate(
        _context: object, builder: ir.IRBuilder, _signature: object, args: Sequence[ir.Value]
    ) -> ir.Value:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), generate


def _word_shift(context: object, words: types.Array) -> tuple[object, object]:
    del context
    shift = 32 - words.dtype.bitwidth  # type: ignore[attr-defined]

    def generate(
        _context: object, _builder: ir.IRBuilder, _signature: object, _args: Sequence[ir.Value]
    ) -> ir.Value:
        return ir.Constant(ir.IntType(32), shift)

    return types.uint32(words), generate


to_bits: Callable[[np.float32], np.uint32] = intrinsic(_to_bits)
"""The bits of a float32; inside compiled functions only."""
float_of_bits: Callable[[np.uint32], np.float32] = intrinsic(_float_of_bits)
"""The float32 of these bits; inside compiled functions only."""
word_shift: Callable[[NDArray[np.uint16] | NDArray[np.uint32]], np.uint32] = intrinsic(_word_shift)
"""From an array's words to float32's bits, a constant; inside compiled functions only."""
