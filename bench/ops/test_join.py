"""The join: affine, residual and ReLU in one pass; eager takes three."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench.ops.contestants import BACKENDS, affine_rows, check, nbytes, require
from fusedres.benchmarking.shapes import ACTIVATIONS, MODIFIED, name_of
from fusedres.ops.activations import RELU
from fusedres.ops.registry import OPS
from fusedres.testing import channels_last, sliced

OP, WITH_STATISTICS = OPS["join"], OPS["join_stats"]  # the second's kernel is in test_on_gpu.py
DROPOUT = 0.3


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
        check(WITH_STATISTICS, "reference", arguments)

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


@pytest.mark.parametrize("contestant", ["eager", *BACKENDS])
@pytest.mark.parametrize("form", ["slice", "gain", "dropout"])
@pytest.mark.parametrize("shape", MODIFIED, ids=name_of, indirect=True)
def test_modified_join(race, shape, dtype, form, contestant):
    """Of a slice of the channels, with excitation's factors, with dropout's mask."""
    y = (sliced if form == "slice" else channels_last)(shape, dtype)
    norm = affine_rows(shape[1])
    gain = torch.rand(shape[:2]) if form == "gain" else None
    dropout, seed = (DROPOUT, torch.tensor([1])) if form == "dropout" else (0.0, None)
    if contestant == "eager":
        plain = eager(y, norm, None, None) if gain is None else eager_excited(y, norm, gain)

        def call():
            return F.dropout(plain(), dropout, training=True) if dropout else plain()

    else:
        require(contestant, dtype)
        arguments = [y, norm, None, None, RELU.code, RELU.param, gain, dropout, seed]
        check(OP, contestant, arguments)

        def call():
            return OP.overload(contestant)(*arguments)

    race(f"join, {form}, {name_of(shape)} {dtype}", call, dtype=dtype, touched=nbytes(y, y))


def eager_excited(y, norm, gain):
    """Stock PyTorch: the excitation is a pass of its own."""
    factors = gain[:, :, None, None].to(y.dtype)
    mean, rstd, scale, shift = norm
    statistics = mean, rstd.reciprocal().square(), scale / rstd, shift + mean * scale
    return lambda: torch.relu(F.batch_norm(y, *statistics, False, 0.0, 0.0) * factors)
