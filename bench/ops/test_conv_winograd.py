"""3x3 convolutions in float32 by minimal filtering; eager is the vendor's. Folded, and as training runs them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench.ops.contestants import COMPILED, Contest, affine_rows, check, group_of, nbytes
from bench.shapes import CONVOLUTIONS, SMOKE_MOST
from fusedres.ops.activations import RELU
from fusedres.ops.registry import OPS
from fusedres.testing import channels_last

PACK, FOLDED = OPS["conv_winograd_pack"], OPS["conv_winograd"]
FPROP, DGRAD = OPS["conv_fused_fprop"], OPS["conv_fused_dgrad"]
SUITED = [c for network in CONVOLUTIONS.values() for c in network if c.size == 3 and c.stride == 1]
GEOMETRY = ([1, 1], [1, 1], [1, 1])


@pytest.mark.parametrize("contestant", ["eager", COMPILED, "cpu"])
@pytest.mark.parametrize("form", ["folded", "fprop", "dgrad"])
@pytest.mark.parametrize("convolution", SUITED, ids=str)
def test_conv_winograd(race, smoke, convolution, form, contestant):
    convolution = convolution.within(SMOKE_MOST) if smoke else convolution
    shape, filters = convolution.shape, convolution.channels
    group = group_of("conv_winograd", torch.float32, (*shape, filters), form)

    def contest():
        x, weight = channels_last(shape), channels_last((filters, shape[1], 3, 3), seed=1) / (9 * shape[1]) ** 0.5
        side = channels_last(convolution.out, seed=2)
        op, arguments, eager = FORMS[form](x, weight, side)
        calls = {"eager": lambda given: lambda: eager(*given), "cpu": lambda given: lambda: op.overload("cpu")(*given)}
        checks = {"cpu": lambda: check(op, "cpu", arguments)}
        return Contest(group, arguments, calls, checks, nbytes(x, weight, side), convolution.flops).with_compiled()

    race(group, contestant, contest)


def folded(x, weight, side):
    filters = len(weight)
    packed, bias = PACK.overload("cpu")(weight), torch.zeros(filters)

    def eager(x, packed, filters, bias, residual, *_):
        return torch.relu(F.conv2d(x, weight.to(x.dtype), bias, padding=1) + residual)

    return FOLDED, [x, packed, filters, bias, side, RELU.code, RELU.param, [1, 1]], eager


def fprop(x, weight, side):
    rows = affine_rows(x.shape[1])

    def eager(x, rows, act, param, weight, *_):
        z = torch.relu(rows[2, :, None, None] * x + rows[3, :, None, None])
        return torch.var_mean(F.conv2d(z, weight, padding=1), (0, 2, 3))

    return FPROP, [x, rows, RELU.code, RELU.param, weight, None, *GEOMETRY, True], eager


def dgrad(x, weight, side):
    rows = affine_rows(x.shape[1])

    def eager(g, _, __, weight, x, rows, *___):
        dz = torch.ops.aten.convolution_backward(g, x, weight, None, *GEOMETRY, False, [0, 0], 1, (True, False, False))
        dx = torch.where(rows[2, :, None, None] * x + rows[3, :, None, None] > 0, dz[0], 0)
        return dx, dx.sum((0, 2, 3)), (dx * x).sum((0, 2, 3))

    return DGRAD, [side, None, None, weight, x, rows, RELU.code, RELU.param, *GEOMETRY], eager


FORMS = {"folded": folded, "fprop": fprop, "dgrad": dgrad}
