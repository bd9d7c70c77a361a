"""The gradients of a convolution between two norms, each with the norms' own gradients inside.

On a CPU there is the reference alone, whose convolutions are the vendor's; a GPU's kernels are timed by
``fusedres tune``.
"""

from __future__ import annotations

import pytest
import torch

from bench.ops.contestants import COMPILED, Contest, affine_rows, check, group_of, nbytes
from bench.shapes import CHANNELS, CONVOLUTIONS, SMOKE_MOST
from fusedres.ops.activations import RELU
from fusedres.ops.registry import OPS
from fusedres.testing import channels_last

ROWS, DGRAD, WGRAD = OPS["bn_grad_rows"], OPS["conv_fused_dgrad"], OPS["conv_fused_wgrad"]
CONTESTANTS = ("eager", COMPILED, "reference")


def gradient(g, y, rows):
    """Stock PyTorch's gradient of a norm's input, from the rows (scale, slope, mean, offset)."""
    scale, slope, mean, offset = (row[:, None, None].to(g.dtype) for row in rows)
    return scale * g + slope * (y - mean) + offset


@pytest.mark.parametrize("channels", CHANNELS)
def test_bn_grad_rows(race, channels):
    group = group_of("bn_grad_rows", torch.float32, (channels,))

    def contest():
        arguments = [affine_rows(channels), torch.randn(3, channels), 25088.0]
        calls = {"reference": lambda given: lambda: ROWS.overload("reference")(*given)}
        checks = {"reference": lambda: check(ROWS, "reference", arguments)}
        return Contest(group, arguments, calls, checks, nbytes(*arguments))

    race(group, "reference", contest)


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("op", [DGRAD, WGRAD], ids=lambda op: op.name)
@pytest.mark.parametrize("conv", CONVOLUTIONS["ResNet-50"], ids=str)
def test_conv_fused_gradients(race, smoke, conv, dtype, op, contestant):
    conv = conv.within(SMOKE_MOST) if smoke else conv
    group = group_of(op.name, dtype, conv.shape, f"to {conv.channels}, {conv.size}x{conv.size}")
    geometry, data = ([conv.stride] * 2, conv.padding, [1, 1]), op is DGRAD

    def eager(operands):
        (x, weight, g, y, rows), _ = operands

        def call():
            mask = (data, not data, False)
            dy = gradient(g, y, rows)
            return torch.ops.aten.convolution_backward(dy, x, weight, None, *geometry, False, [0, 0], 1, mask)

        return call

    def contest():
        x = channels_last(conv.shape, dtype)
        weight = channels_last((conv.channels, conv.shape[1], *[conv.size] * 2), dtype, 2)
        g, y = (channels_last(conv.out, dtype, seed) for seed in (1, 3))
        norm, rows = affine_rows(conv.shape[1]), affine_rows(conv.channels, 1)
        last = [] if data else [torch.empty_like(weight)]
        act = (RELU.code, RELU.param)
        arguments = [g, y, rows, *([weight] if data else []), x, norm, *act, *geometry, *last]
        calls = {"eager": eager, "reference": lambda given: lambda: op.overload("reference")(*given[1])}
        checks = {"reference": lambda: check(op, "reference", arguments)}
        together = ((x, weight, g, y, rows), arguments)
        return Contest(group, together, calls, checks, nbytes(g, y, x, weight), conv.flops).with_compiled()

    race(group, contestant, contest)
