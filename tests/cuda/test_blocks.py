"""Whole blocks on a GPU: the CUDA kernels around cuDNN's convolutions."""

from __future__ import annotations

import pytest
import torch
from cuda_blocks import BLOCKS, check_block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_block(name, dtype, training):
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        check_block(name, dtype, training, "cuda")
