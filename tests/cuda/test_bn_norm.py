"""The rows of a batch norm on a GPU."""

from __future__ import annotations

import pytest
import torch
from cuda_ops import check_bn_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("partials", [None, 1, 3, 256])
@pytest.mark.parametrize("absent", ["", "affine", "running"])
def test_against_float64(dtype, partials, absent):
    for channels in (1, 32, 45, 2048):
        check_bn_norm(channels, partials, dtype, "cuda", absent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_statistics(dtype):
    check_bn_norm(37, None, dtype, "cuda", "stats")
