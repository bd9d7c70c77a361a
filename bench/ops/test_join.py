"""The join: affine, residual and ReLU in one pass; eager takes three."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench.ops.contestants import BACKENDS, COMPILED, Contest, affine_rows, check, group_of, nbytes
from bench.shapes import MODIFIED, activations
from fusedres.ops.activations import RELU
from fusedres.ops.registry import OPS
from fusedres.testing import channels_last, contiguous, sliced

OP, WITH_STATISTICS = OPS["join"], OPS["join_stats"]  # the second's kernel is in test_on_gpu.py
DROPOUT = 0.3


def ours(name):
    return lambda arguments: lambda: OP.overload(name)(*arguments)


def contest_of(group, arguments, eager, moved):
    calls = {"eager": eager} | {name: ours(name) for name in BACKENDS}
    checks = {name: lambda name=name: check(OP, name, arguments) for name in BACKENDS}
    return Contest(group, arguments, calls, checks, moved)


@pytest.mark.parametrize("contestant", ["eager", COMPILED, *BACKENDS])
@pytest.mark.parametrize("residual", ["none", "plain", "affine"])
@pytest.mark.parametrize("shape", activations(), indirect=True)
def test_join(race, shape, dtype, residual, contestant):
    group = group_of("join", dtype, shape, f"residual {residual}")

    def contest():
        y = channels_last(shape, dtype)
        side = None if residual == "none" else channels_last(shape, dtype, 1)
        side_norm = affine_rows(shape[1], 1) if residual == "affine" else None
        arguments = [y, affine_rows(shape[1]), side, side_norm, RELU.code, RELU.param]
        check(WITH_STATISTICS, "reference", arguments)
        return contest_of(group, arguments, lambda given: eager(*given[:4]), nbytes(y, side, y)).with_compiled()

    race(group, contestant, contest)


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


FORMS = {"slice": sliced, "contiguous": contiguous, "gain": channels_last, "dropout": channels_last}


@pytest.mark.parametrize("contestant", ["eager", *BACKENDS])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", MODIFIED, indirect=True)
def test_modified_join(race, shape, dtype, form, contestant):
    """Of a slice of the channels, in the other layout, with excitation's factors, with dropout's mask."""
    group = group_of("join", dtype, shape, form, "contiguous" if form == "contiguous" else "channels_last")

    def contest():
        y = FORMS[form](shape, dtype)
        gain = torch.rand(shape[:2]) if form == "gain" else None
        dropout, seed = (DROPOUT, torch.tensor([1])) if form == "dropout" else (0.0, None)
        arguments = [y, affine_rows(shape[1]), None, None, RELU.code, RELU.param, gain, dropout, seed]
        return contest_of(group, arguments, modified, nbytes(y, y))

    race(group, contestant, contest)


def modified(arguments):
    """Stock PyTorch: dropout is a pass of its own, and so is excitation."""
    y, norm, gain, dropout = arguments[0], arguments[1], arguments[6], arguments[7]
    plain = eager(y, norm, None, None) if gain is None else excited(y, norm, gain)
    return lambda: F.dropout(plain(), dropout, training=True) if dropout else plain()


def excited(y, norm, gain):
    factors = gain[:, :, None, None].to(y.dtype)
    mean, rstd, scale, shift = norm
    statistics = mean, rstd.reciprocal().square(), scale / rstd, shift + mean * scale
    return lambda: torch.relu(F.batch_norm(y, *statistics, False, 0.0, 0.0) * factors)
