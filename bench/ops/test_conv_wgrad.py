"""The weight gradient of a convolution whose input is pending; eager has the input applied from the forward pass."""

from __future__ import annotations

import pytest
import torch

from bench.ops.contestants import BACKENDS, Contest, affine_rows, check, group_of, nbytes
from bench.shapes import CONVOLUTIONS, SMOKE_MOST
from fusedres.ops.activations import RELU
from fusedres.ops.conv import ConvGeometry
from fusedres.ops.conv_wgrad import fuses_wgrad
from fusedres.ops.registry import OPS
from fusedres.testing import channels_last

OP = OPS["conv_wgrad"]
ALL = [conv for of_network in CONVOLUTIONS.values() for conv in of_network]


@pytest.mark.parametrize("contestant", ["eager", *BACKENDS])
@pytest.mark.parametrize("conv", ALL, ids=str)
def test_conv_wgrad(race, smoke, conv, dtype, contestant):
    conv = conv.within(SMOKE_MOST) if smoke else conv
    group = group_of("conv_wgrad", dtype, conv.shape, f"to {conv.channels}, {conv.size}x{conv.size}")
    geometry = ([conv.stride] * 2, conv.padding, [1, 1])

    def eager(operands):
        grad, x, norm, weight = operands
        z = torch.ops.fusedres.join(x, norm, None, None, RELU.code, RELU.param)
        mask = (False, True, False)
        return lambda: torch.ops.aten.convolution_backward(grad, z, weight, None, *geometry, False, [0, 0], 1, mask)

    def ours(name):
        def make(operands):
            grad, x, norm, weight = operands
            return lambda: OP.overload(name)(grad, x, norm, RELU.code, RELU.param, *geometry, weight)

        return make

    def contest():
        x, grad = channels_last(conv.shape, dtype), channels_last(conv.out, dtype, 1)
        weight = channels_last((conv.channels, conv.shape[1], *[conv.size] * 2), dtype, 2)
        norm = affine_rows(conv.shape[1])
        arguments = [grad, x, norm, RELU.code, RELU.param, *geometry, weight]
        calls = {"eager": eager} | {name: ours(name) for name in BACKENDS}
        checks = {name: lambda name=name: check(OP, name, arguments) for name in BACKENDS}
        fuses = fuses_wgrad("cpu", x, grad, weight, ConvGeometry(*map(tuple, geometry), 1))
        absent = {"cpu": None if fuses else "the engine leaves this one to the vendor's library"}
        operands = (grad, x, norm, weight)
        return Contest(group, operands, calls, checks, nbytes(x, grad, weight), conv.flops, absent)

    race(group, contestant, contest)
