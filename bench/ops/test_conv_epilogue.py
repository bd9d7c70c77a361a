"""A 3x3 convolution with its norm, a residual and ReLU in the epilogue: CUTLASS's tiles against cuDNN's convolution.

Runs on a GPU where there is one; ``pytest bench/ops/test_conv_epilogue.py`` on an H100, with a library that was built
with ``FUSEDRES_CUTLASS=1``, says which tile is fastest, and whether any is faster than cuDNN and a pass for the rest.
"""

from __future__ import annotations

import pytest
import torch

from bench.ops.contestants import Contest, check, group_of
from bench.ops.gpu import DEVICE, graphed, on_device, repeats
from bench.shapes import EPILOGUES
from fusedres.ops.conv_epilogue import conv_epilogue_refuses
from fusedres.ops.registry import OPS
from fusedres.testing import channels_last

OP = OPS["conv_epilogue"]
GEOMETRY = ([1, 1], [1, 1], [1, 1])
TILES = {"64 x 64": 0, "128 x 64": 1, "128 x 128": 2}


@pytest.mark.parametrize("contestant", ["eager", *TILES])
@pytest.mark.parametrize("shape", EPILOGUES, indirect=True)
def test_conv_epilogue(race, smoke, shape, contestant):
    if DEVICE == "cpu" and not smoke:
        pytest.skip("needs a GPU")
    dtype, channels = torch.bfloat16, shape[1]
    group = group_of("conv_epilogue", dtype, shape)

    def contest():
        x, side = (on_device(channels_last(shape, dtype, seed)) for seed in range(2))
        weight = on_device(channels_last((channels, channels, 3, 3), dtype, 2) / (3 * channels**0.5))
        scale, bias = on_device(torch.rand(2, channels)).unbind(0)
        arguments = [x, weight, scale, bias, side, *GEOMETRY]
        check(OP, "reference", arguments)

        def eager():
            y = torch.conv2d(x, weight, None, *GEOMETRY)
            return torch.relu(torch.addcmul(bias.to(dtype)[:, None, None], scale.to(dtype)[:, None, None], y) + side)

        def tile(number):
            return lambda _: graphed([lambda: OP.overload("cutlass")(*arguments, number)])

        calls = {"eager": lambda _: graphed([eager])} | {name: tile(number) for name, number in TILES.items()}
        checks = {name: lambda number=n: check(OP, "cutlass", [*arguments, number]) for name, n in TILES.items()}
        absent = dict.fromkeys(TILES, conv_epilogue_refuses(x, weight))
        flops = repeats() * 2 * 9 * channels * x.numel()
        return Contest(group, (), calls, checks, flops=flops, absent=absent, memory=False)

    race(group, contestant, contest, DEVICE)
