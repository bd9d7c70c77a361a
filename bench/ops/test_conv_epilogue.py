"""A 3x3 convolution with its norm, a residual and ReLU in the epilogue: CUTLASS's tiles against cuDNN's convolution.

Runs on a GPU where there is one; ``pytest bench/ops/test_conv_epilogue.py`` on an H100, with a library that was built
with ``FUSEDRES_CUTLASS=1``, says which tile is fastest, and whether any is faster than cuDNN and a pass for the rest.
"""

from __future__ import annotations

import pytest
import torch

from bench.ops.contestants import check
from bench.ops.gpu import DEVICE, graphed, on_device, repeats
from fusedres.benchmarking.shapes import name_of
from fusedres.ops.conv_epilogue import conv_epilogue_refuses
from fusedres.ops.registry import OPS
from fusedres.testing import channels_last

OP = OPS["conv_epilogue"]
SHAPES = ((256, 64, 56, 56), (256, 128, 28, 28), (256, 256, 14, 14), (256, 512, 7, 7))  # ResNet-50's, batch 256
GEOMETRY = ([1, 1], [1, 1], [1, 1])
TILES = {"64 x 64": 0, "128 x 64": 1, "128 x 128": 2}


@pytest.mark.parametrize("contestant", ["eager", *TILES])
@pytest.mark.parametrize("shape", SHAPES, ids=name_of, indirect=True)
def test_conv_epilogue(race, smoke, shape, contestant):
    if DEVICE == "cpu" and not smoke:
        pytest.skip("needs a GPU")
    dtype, channels = torch.bfloat16, shape[1]
    x, side = (on_device(channels_last(shape, dtype, seed)) for seed in range(2))
    weight = on_device(channels_last((channels, channels, 3, 3), dtype, 2) / (3 * channels**0.5))
    scale, bias = on_device(torch.rand(2, channels)).unbind(0)
    arguments = [x, weight, scale, bias, side, *GEOMETRY]
    if contestant == "eager":
        check(OP, "reference", arguments)

        def call():
            y = torch.conv2d(x, weight, None, *GEOMETRY)
            return torch.relu(torch.addcmul(bias.to(dtype)[:, None, None], scale.to(dtype)[:, None, None], y) + side)
    else:
        if reason := conv_epilogue_refuses(x, weight):
            pytest.skip(reason)
        arguments += [TILES[contestant]]
        check(OP, "cutlass", arguments)

        def call():
            return OP.overload("cutlass")(*arguments)

    flops = repeats() * 2 * 9 * channels * x.numel()
    race(f"conv epilogue {name_of(shape)}", graphed(call), dtype=dtype, flops=flops)
