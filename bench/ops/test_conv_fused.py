"""A convolution with what surrounds it, in training (statistics behind) and in inference (a join behind).

On a CPU there is the reference alone, with the vendor's convolution; a GPU's kernels are timed by ``fusedres tune``.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench.ops.contestants import COMPILED, Contest, affine_rows, check, group_of, nbytes
from bench.shapes import CONVOLUTIONS, SMOKE_MOST
from fusedres.ops.activations import RELU
from fusedres.ops.registry import OPS
from fusedres.testing import channels_last

FPROP, JOIN = OPS["conv_fused_fprop"], OPS["conv_fused_join"]
CONTESTANTS = ("eager", COMPILED, "reference")


def applied(x, norm):
    """Stock PyTorch's normalised and activated input."""
    scale, shift = (row[:, None, None].to(x.dtype) for row in norm[2:])
    return torch.relu(scale * x + shift)


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("conv", CONVOLUTIONS["ResNet-50"], ids=str)
def test_conv_fused_fprop(race, smoke, conv, dtype, contestant):
    conv = conv.within(SMOKE_MOST) if smoke else conv
    geometry = ([conv.stride] * 2, conv.padding, [1, 1])
    group = group_of("conv_fused_fprop", dtype, conv.shape, f"to {conv.channels}, {conv.size}x{conv.size}")

    def eager(arguments):
        x, norm, *_, weight, _bias = arguments[:6]

        def call():
            y = F.conv2d(applied(x, norm), weight, None, *geometry)
            return y, torch.var_mean(y.float(), (0, 2, 3))

        return call

    def contest():
        x, weight = operands(conv, dtype)
        arguments = [x, affine_rows(conv.shape[1]), RELU.code, RELU.param, weight, None, *geometry, True]
        calls = {"eager": eager, "reference": lambda given: lambda: FPROP.overload("reference")(*given)}
        checks = {"reference": lambda: check(FPROP, "reference", arguments)}
        passed = nbytes(x, weight) + moved(conv, dtype)
        return Contest(group, arguments, calls, checks, passed, conv.flops).with_compiled()

    race(group, contestant, contest)


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("conv", CONVOLUTIONS["ResNet-50"], ids=str)
def test_conv_fused_join(race, smoke, conv, dtype, contestant):
    conv = conv.within(SMOKE_MOST) if smoke else conv
    geometry = ([conv.stride] * 2, conv.padding, [1, 1])
    group = group_of("conv_fused_join", dtype, conv.shape, f"to {conv.channels}, {conv.size}x{conv.size}")

    def eager(arguments):
        x, weight, norm, residual = arguments[0], arguments[4], arguments[9], arguments[10]

        def call():
            scale, shift = (row[:, None, None].to(dtype) for row in norm[2:])
            return torch.relu(scale * F.conv2d(x, weight, None, *geometry) + shift + residual)

        return call

    def contest():
        x, weight = operands(conv, dtype)
        residual, norm = channels_last(conv.out, dtype, 3), affine_rows(conv.channels)
        act = (RELU.code, RELU.param)
        arguments = [x, None, 0, 0.0, weight, None, *geometry, norm, residual, None, *act]
        calls = {"eager": eager, "reference": lambda given: lambda: JOIN.overload("reference")(*given)}
        checks = {"reference": lambda: check(JOIN, "reference", arguments)}
        passed = nbytes(x, weight, residual, residual)
        return Contest(group, arguments, calls, checks, passed, conv.flops).with_compiled()

    race(group, contestant, contest)


def operands(conv, dtype):
    """Input and weight."""
    return channels_last(conv.shape, dtype), channels_last((conv.channels, conv.shape[1], *[conv.size] * 2), dtype, 2)


def moved(conv, dtype):
    """Bytes of the result."""
    n, channels, h, w = conv.out
    return n * channels * h * w * dtype.itemsize
