"""Products with stored weights against float64."""

from __future__ import annotations

from itertools import pairwise

import gguf
import numpy as np
import pytest
import torch

from deployments.engine.torch_engine.kernels.elementwise import round_blocks
from deployments.engine.torch_engine.kernels.packing import matrix_row, pack_blocks
from deployments.engine.torch_engine.kernels.products import multiply
from deployments.engine.torch_engine.kernels.vectors import (
    Q4_1,
    Q4_1_SHORT,
    Q8_0,
    Q8_0_SHORT,
    SHORT_FORMS,
)

SHORT = {Q4_1: Q4_1_SHORT, Q8_0: Q8_0_SHORT}
TYPES = {Q4_1: gguf.GGMLQuantizationType.Q4_1, Q8_0: gguf.GGMLQuantizationType.Q8_0}


def product(matrix, x, rows, num_parts=1):
    matrix = np.array(matrix, dtype=np.int64)
    x = np.ascontiguousarray(x, dtype=np.float32)
    sums = np.ascontiguousarray(x.reshape(len(x), -1, 32).sum(axis=2))
    if matrix[1] in SHORT_FORMS:
        rounded, sums = rounded_blocks(x)
        return multiplied(matrix, rounded, sums, rows, num_parts)
    return multiplied(matrix, x, sums, rows, num_parts)


def rounded_blocks(x):
    rounded = np.zeros(x.shape, dtype=np.int16)
    scales = np.zeros((len(x), x.shape[1] // 32, 2), dtype=np.float32)
    round_blocks(x, 0, len(x), x.shape[1], rounded.reshape(-1), scales.reshape(-1))
    return rounded, scales


def multiplied(matrix, x, sums, rows, num_parts):
    y = np.full((len(x), -(-rows // 16) * 16), np.nan, dtype=np.float32)
    cuts = np.linspace(0, -(-rows // 16), num_parts + 1).astype(int)
    for first, last in pairwise(cuts):
        multiply(
            matrix, x.ctypes.data, sums.ctypes.data, y.ctypes.data, y.strides[0], first, last,
            len(x),
        )  # fmt: skip
    return y[:, :rows]


def inputs(num_tokens, columns):
    return np.random.default_rng(3).standard_normal((num_tokens, columns)).astype(np.float32)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 7, 8, 13])
@pytest.mark.parametrize("form", [Q4_1, Q8_0])
def test_blocks_are_multiplied_as_the_file_means_them(form, num_tokens):
    values = np.random.default_rng(1).standard_normal((150, 96)).astype(np.float32)
    blocks = gguf.quants.quantize(values, TYPES[form])
    meant = gguf.quants.dequantize(blocks, TYPES[form]).astype(np.float64)
    packed = pack_blocks([blocks[:40], blocks[40:]], form)
    x = inputs(num_tokens, 96)
    got = product(matrix_row(torch.empty(0), None, packed), x, 150, num_parts=3)
    np.testing.assert_allclose(got, x.astype(np.float64) @ meant.T, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("form", [Q4_1, Q8_0])
def test_rounded_inputs_are_multiplied_as_exactly_as_they_are_rounded(form, num_tokens):
    values = np.random.default_rng(1).standard_normal((150, 96)).astype(np.float32)
    blocks = gguf.quants.quantize(values, TYPES[form])
    meant = gguf.quants.dequantize(blocks, TYPES[form]).astype(np.float64)
    weight = torch.empty(0, dtype=torch.bfloat16)
    matrix = matrix_row(weight, None, packed := pack_blocks([blocks], form))
    assert matrix[1] == SHORT[form]
    assert packed.rows == 150
    x = inputs(num_tokens, 96) * 10.0 ** np.arange(-2, 1).repeat(32)
    rounded, scales = rounded_blocks(x.astype(np.float32))
    near = rounded.astype(np.float64) * scales[..., 0].astype(np.float64).repeat(32, axis=1)
    limit = np.abs(x).reshape(num_tokens, 3, 32).max(axis=2).repeat(32, axis=1) / 65000
    assert (np.abs(near - x) <= limit).all()
    got = product(matrix, x, 150, num_parts=3)
    np.testing.assert_allclose(got, x @ meant.T, rtol=1e-4, atol=2e-3)
    alone = product(matrix, x[-1:], 150)
    assert np.array_equal(alone[0], got[-1])


def test_what_is_not_a_number_is_not_rounded_away():
    x = np.zeros((3, 64), dtype=np.float32)
    x[1, 40], x[2, 3] = np.nan, np.inf
    _, scales = rounded_blocks(x)
    assert np.isfinite(scales[..., 1]).tolist() == [[True, True], [True, False], [False, True]]


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 6, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_rows_are_multiplied_where_they_lie(dtype, num_tokens):
    weight = torch.randn(37, 48, generator=torch.Generator().manual_seed(2)).to(dtype)
    bias = np.arange(37, dtype=np.float32)
    x = inputs(num_tokens, 48)
    matrix = np.array(matrix_row(weight, bias, None), dtype=np.int64)
    y = np.zeros((num_tokens, 48), dtype=np.float32)
    for tile in range(3):
        multiply(matrix, x.ctypes.data, 0, y.ctypes.data, y.strides[0], tile, tile + 1, num_tokens)
    expected = x.astype(np.float64) @ weight.double().numpy().T + bias
    np.testing.assert_allclose(y[:, :37], expected, rtol=1e-5, atol=2e-5)
    for row, beside in zip(x, y, strict=True):
        alone = np.zeros((1, 48), dtype=np.float32)
        multiply(matrix, row.ctypes.data, 0, alone.ctypes.data, alone.strides[0], 0, 3, 1)
        assert alone[0, :37].tobytes() == beside[:37].tobytes()
