"""The join: affine, residual and ReLU in one pass; eager takes three."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench.ops.contestants import BACKENDS, affine_rows, check, nbytes, require
from bench.shapes import ACTIVATIONS, name_of
from fusedres.ops.activations import RELU
from fusedres.ops.registry import OPS
from fusedres.testing import channels_last

OP = OPS["join"]


@pytest.mark.parametrize("contestant", ["eager", *BACKENDS])
@pytest.mark.parametrize("residual", ["none", "plain", "affine"])
@pytest.mark.parametrize("shape", ACTIVATIONS, ids=name_of, indirect=True)
def test_join(race, shape, dtype, residual, contestant):
    y = channels_last(shape, dtype)
    side = None if residual == "none" else channels_last(shape, dtype, 1)
    norm = affine_rows(shape[1])
    side_norm = affine_rows(shape[1], 1) if residual == "affine" else None
    if contestant == "eager":
        call = eager(y, norm, side, side_norm)
    else:
        require(contestant, dtype)
        arguments = [y, norm, side, side_norm, RELU.code, RELU.param]
        check(OP, contestant, arguments)

        def call():
            return OP.overload(contestant)(*arguments)

    race(f"join, residual {residual}, {name_of(shape)} {dtype}", call, dtype=dtype, touched=nbytes(y, side, y))


def eager(y, norm, side, side_norm):
    """Stock PyTorch: batch norms with constant statistics, a sum, an activation."""

    def normalised(x, rows):
        mean, rstd, scale, shift = rows
        return F.batch_norm(x, mean, rstd.reciprocal().square(), scale / rstd, shift + mean * scale, False, 0.0, 0.0)

    def call():
        z = normalised(y, norm)
        if side is not None:
            z = z + (side if side_norm is None else normalised(side, side_norm))
        return torch.relu(z)

    return call
