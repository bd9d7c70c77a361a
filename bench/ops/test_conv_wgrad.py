"""The weight gradient of a convolution whose input is pending; eager applies the input first."""

from __future__ import annotations

import pytest
import torch

from bench.ops.contestants import BACKENDS, affine_rows, check, nbytes, require
from fusedres.benchmarking.shapes import WEIGHT_GRADIENTS, name_of
from fusedres.ops.activations import RELU
from fusedres.ops.conv import ConvGeometry
from fusedres.ops.conv_wgrad import fuses_wgrad
from fusedres.ops.registry import OPS
from fusedres.testing import channels_last

OP = OPS["conv_wgrad"]


@pytest.mark.parametrize("contestant", ["eager", *BACKENDS])
@pytest.mark.parametrize(("shape", "channels", "size"), WEIGHT_GRADIENTS, indirect=["shape"])
def test_conv_wgrad(race, shape, dtype, channels, size, contestant):
    x, grad = channels_last(shape, dtype), channels_last((shape[0], channels, *shape[2:]), dtype, 1)
    weight = channels_last((channels, shape[1], size, size), dtype, 2)
    padding = [size // 2, size // 2]
    arguments = [grad, x, affine_rows(shape[1]), RELU.code, RELU.param, [1, 1], padding, [1, 1], weight]
    if contestant == "eager":
        call = eager(grad, x, arguments[2], weight, padding)
    else:
        require(contestant, dtype)
        geometry = ConvGeometry((1, 1), tuple(padding), (1, 1), 1)
        if contestant == "cpu" and not fuses_wgrad("cpu", x, grad, weight, geometry):
            pytest.skip("the engine leaves this one to the vendor's library")
        check(OP, contestant, arguments)

        def call():
            return OP.overload(contestant)(*arguments)

    group = f"conv_wgrad {name_of(shape)} to {channels}, {size}x{size}, {dtype}"
    race(group, call, dtype=dtype, touched=nbytes(x, grad, weight))


def eager(grad, x, norm, weight, padding):
    """Stock PyTorch: the applied input is there from the forward pass."""
    z = torch.ops.fusedres.join(x, norm, None, None, RELU.code, RELU.param)
    mask = (False, True, False)
    return lambda: torch.ops.aten.convolution_backward(
        grad, z, weight, None, [1, 1], padding, [1, 1], False, [0, 0], 1, mask
    )
