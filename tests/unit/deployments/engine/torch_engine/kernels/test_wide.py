from __future__ import annotations

import torch
from torch.nn.functional import rms_norm

from deployments.engine.torch_engine.kernels import wide


def test_bfloat16_rows_are_normalised_and_rounded_once():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(37, 3, 48, generator=generator).bfloat16()
    weight = torch.randn(48, generator=generator).bfloat16()
    for given in (x, x.transpose(0, 1)):
        got = wide.rms_norm(given, weight, 1e-5)
        expected = rms_norm(given.double(), (48,), weight.double(), 1e-5)
        # Half a unit in the last of eight bits, and a little for float32.
        assert got.shape == given.shape
        assert ((got.double() - expected).abs() <= expected.abs() * 2.0**-8).all()
    assert wide.rms_norm(torch.full((1, 48), torch.nan).bfloat16(), weight, 1e-5).isnan().all()


def test_other_tensors_are_left_to_torch():
    x = torch.zeros(2, 16)
    assert wide.is_suited(x.bfloat16())
    assert not wide.is_suited(x)
    assert not wide.is_suited(x.bfloat16().requires_grad_())
