"""A batch norm in training and the join behind it; eager takes three passes. Its kernel is in test_on_gpu.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench.ops.contestants import check, nbytes, require
from fusedres.benchmarking.shapes import ACTIVATIONS, name_of
from fusedres.ops.activations import RELU
from fusedres.ops.registry import OPS
from fusedres.testing import channels_last

OP = OPS["bn_join"]


@pytest.mark.parametrize("contestant", ["eager", "reference"])
@pytest.mark.parametrize("shape", ACTIVATIONS, ids=name_of, indirect=True)
def test_bn_join(race, shape, dtype, contestant):
    y, side = channels_last(shape, dtype), channels_last(shape, dtype, 1)
    gamma, beta, mean, var = torch.ones(4, shape[1]).unbind(0)
    if contestant == "eager":

        def call():
            return torch.relu(F.batch_norm(y, mean, var, gamma, beta, True, 0.1, 1e-5) + side)
    else:
        require(contestant, dtype)
        arguments = [y, gamma, beta, mean, var, 0.1, 1e-5, side, None, RELU.code, RELU.param]
        check(OP, contestant, arguments)

        def call():
            return OP.overload(contestant)(*arguments)

    race(f"bn join {name_of(shape)} {dtype}", call, dtype=dtype, touched=nbytes(y, side, y))
