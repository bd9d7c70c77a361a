"""A convolution with what surrounds it, in training (statistics behind) and in inference (a join behind).

On a CPU there is the reference alone, with the vendor's convolution; a GPU's kernels are timed by ``fusedres tune``.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench.ops.contestants import affine_rows, check, nbytes
from fusedres.benchmarking.shapes import WEIGHT_GRADIENTS, name_of
from fusedres.ops.activations import RELU
from fusedres.ops.registry import OPS
from fusedres.testing import channels_last

FPROP, JOIN = OPS["conv_fused_fprop"], OPS["conv_fused_join"]
CONTESTANTS = ("eager", "reference")


def operands(shape, dtype, channels, size):
    weight = channels_last((channels, shape[1], size, size), dtype, 2)
    return channels_last(shape, dtype), weight, [size // 2, size // 2]


def applied(x, norm):
    """Stock PyTorch's normalised and activated input."""
    scale, shift = (row[:, None, None].to(x.dtype) for row in norm[2:])
    return torch.relu(scale * x + shift)


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize(("shape", "channels", "size"), WEIGHT_GRADIENTS, indirect=["shape"])
def test_conv_fused_fprop(race, shape, dtype, channels, size, contestant):
    x, weight, padding = operands(shape, dtype, channels, size)
    norm = affine_rows(shape[1])
    arguments = [x, norm, RELU.code, RELU.param, weight, None, [1, 1], padding, [1, 1], True]

    def eager():
        y = F.conv2d(applied(x, norm), weight, None, 1, padding)
        return y, torch.var_mean(y.float(), (0, 2, 3))

    def reference():
        return FPROP.overload("reference")(*arguments)

    check(FPROP, "reference", arguments)
    call = eager if contestant == "eager" else reference
    group = f"conv_fused_fprop {name_of(shape)} to {channels}, {size}x{size}, {dtype}"
    race(group, call, dtype=dtype, touched=nbytes(x, weight, eager()[0]))


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize(("shape", "channels", "size"), WEIGHT_GRADIENTS, indirect=["shape"])
def test_conv_fused_join(race, shape, dtype, channels, size, contestant):
    x, weight, padding = operands(shape, dtype, channels, size)
    out_norm, residual = affine_rows(channels), channels_last((shape[0], channels, *shape[2:]), dtype, 3)
    arguments = [
        x,
        None,
        0,
        0.0,
        weight,
        None,
        [1, 1],
        padding,
        [1, 1],
        out_norm,
        residual,
        None,
        RELU.code,
        RELU.param,
    ]

    def eager():
        scale, shift = (row[:, None, None].to(dtype) for row in out_norm[2:])
        return torch.relu(scale * F.conv2d(x, weight, None, 1, padding) + shift + residual)

    def reference():
        return JOIN.overload("reference")(*arguments)

    check(JOIN, "reference", arguments)
    call = eager if contestant == "eager" else reference
    group = f"conv_fused_join {name_of(shape)} to {channels}, {size}x{size}, {dtype}"
    race(group, call, dtype=dtype, touched=nbytes(x, weight, residual, residual))
