"""Whole blocks on this backend, against stock PyTorch and float64."""

from __future__ import annotations

import pytest
import torch

import fusedres
from fusedres.testing import channels_last, compare


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", ["ResidualBlock", "PreActResidualBlock", "BottleneckBlock"])
def test_a_block(device, block, dtype):
    made = getattr(fusedres.nn, block)(16, 32, 2).to(device)

    def forced(module):
        original = module.forward

        def forward(x):
            with fusedres.use_backend("triton"):
                return original(x)

        module.forward = forward

    with fusedres.use_backend("stock"):
        compare(made, forced, lambda seed: [channels_last((2, 16, 8, 6), seed=seed).to(device)], dtype=dtype).check()
