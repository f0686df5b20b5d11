"""Norms of many bfloat16 rows; torch's own make several passes.

Tensors hold bfloat16; compiled code sees their bits as int16.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from deployments.engine.torch_engine.kernels.compiling import kernel
from deployments.engine.torch_engine.kernels.memory import bits_of_float, float_of_bits

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


def is_suited(x: Tensor) -> bool:
    """Whether ``rms_norm`` takes this tensor."""
    return x.device.type == "cpu" and x.dtype is torch.bfloat16 and not x.requires_grad


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension; summed in float32, rounded once."""
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty_like(rows)
    _rms_norm(_bits(rows), _bits(weight), np.float32(eps), _bits(out))
    return out.view(x.shape)


def _bits(tensor: Tensor) -> NDArray[np.int16]:
    bits: NDArray[np.int16] = tensor.detach().view(torch.int16).numpy()
    return bits


@kernel
def _widen(bits):
    return float_of_bits(np.int32(bits) << np.int32(16))


@kernel
def _narrow(number):
    bits = bits_of_float(number)
    rounded = bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))
    return np.int16(rounded >> np.int32(16))


@kernel
def _rms_norm(x, weight, eps, out):
    num_rows, size = x.shape
    for n in range(num_rows):
        total = np.float32(0)
        for i in range(size):
            value = _widen(x[n, i])
            total += value * value
        scale = np.float32(1) / np.float32(math.sqrt(total / np.float32(size) + eps))
        for i in range(size):
            out[n, i] = _narrow(_widen(x[n, i]) * scale * _widen(weight[i]))
