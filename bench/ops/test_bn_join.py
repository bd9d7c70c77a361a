"""A batch norm in training and the join behind it; eager takes three passes. Its kernel is in test_on_gpu.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench.ops.contestants import COMPILED, Contest, check, group_of, nbytes
from bench.shapes import activations
from fusedres.ops.activations import RELU
from fusedres.ops.registry import OPS
from fusedres.testing import channels_last

OP = OPS["bn_join"]


@pytest.mark.parametrize("contestant", ["eager", COMPILED, "reference"])
@pytest.mark.parametrize("shape", activations(), indirect=True)
def test_bn_join(race, shape, dtype, contestant):
    group = group_of("bn_join", dtype, shape)

    def eager(given):
        y, gamma, beta, mean, var, momentum, eps, side, *_ = given
        return lambda: torch.relu(F.batch_norm(y, mean, var, gamma, beta, True, momentum, eps) + side)

    def contest():
        y, side = channels_last(shape, dtype), channels_last(shape, dtype, 1)
        gamma, beta, mean, var = torch.ones(4, shape[1]).unbind(0)
        arguments = [y, gamma, beta, mean, var, 0.1, 1e-5, side, None, RELU.code, RELU.param]
        calls = {"eager": eager, "reference": lambda given: lambda: OP.overload("reference")(*given)}
        checks = {"reference": lambda: check(OP, "reference", arguments)}
        return Contest(group, arguments, calls, checks, nbytes(y, side, y)).with_compiled()

    race(group, contestant, contest)
