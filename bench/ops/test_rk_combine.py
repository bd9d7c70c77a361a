"""The updates of a Runge-Kutta step, and the norm of its error; eager takes a pass per stage.

The weights are those of the steps of dopri5: five stages lead to the result, six to the error.
"""

from __future__ import annotations

import pytest
import torch

from bench.ops.contestants import BACKENDS, check, nbytes, require
from fusedres.benchmarking.shapes import ACTIVATIONS, name_of
from fusedres.ode import METHODS
from fusedres.ops.registry import OPS
from fusedres.testing import channels_last

COMBINE, BACKWARD, ERROR = OPS["rk_combine"], OPS["rk_combine_backward"], OPS["rk_error"]
STEP = 0.25
RESULT = [STEP * weight for weight in METHODS["dopri5"].b if weight]
ESTIMATE = [STEP * weight for weight in METHODS["dopri5"].error if weight]
TOLERANCES = (1e-3, 1e-3)


@pytest.mark.parametrize("contestant", ["eager", *BACKENDS])
@pytest.mark.parametrize("shape", ACTIVATIONS, ids=name_of, indirect=True)
def test_rk_combine(race, shape, dtype, contestant):
    y, *stages = (channels_last(shape, dtype, seed) for seed in range(1 + len(RESULT)))
    call = contender(COMBINE, contestant, dtype, [y, stages, RESULT], lambda: weighted(y, stages, RESULT))
    touched = nbytes(y, *stages, y)
    race(f"rk combine {name_of(shape)} {dtype}", call, dtype=dtype, touched=touched)


@pytest.mark.parametrize("contestant", ["eager", *BACKENDS])
@pytest.mark.parametrize("shape", ACTIVATIONS, ids=name_of, indirect=True)
def test_rk_combine_backward(race, shape, dtype, contestant):
    grad = channels_last(shape, dtype)
    call = contender(BACKWARD, contestant, dtype, [grad, RESULT], lambda: [grad * weight for weight in RESULT])
    touched = nbytes(grad, *[grad] * len(RESULT))
    race(f"rk combine backward {name_of(shape)} {dtype}", call, dtype=dtype, touched=touched)


@pytest.mark.parametrize("contestant", ["eager", *BACKENDS])
@pytest.mark.parametrize("shape", ACTIVATIONS, ids=name_of, indirect=True)
def test_rk_error(race, shape, dtype, contestant):
    y0, y1, *stages = (channels_last(shape, dtype, seed) for seed in range(2 + len(ESTIMATE)))
    arguments = [y0, y1, stages, ESTIMATE, *TOLERANCES]
    call = contender(ERROR, contestant, dtype, arguments, lambda: error(*arguments))
    touched = nbytes(y0, y1, *stages)
    race(f"rk error {name_of(shape)} {dtype}", call, dtype=dtype, touched=touched)


def contender(op, contestant, dtype, arguments, eager):
    """What a contestant runs, checked."""
    if contestant == "eager":
        return eager
    require(contestant, dtype)
    check(op, contestant, arguments)
    return lambda: op.overload(contestant)(*arguments)


def weighted(y, stages, weights):
    """Stock PyTorch at its best: each addition scales what it adds."""
    for stage, weight in zip(stages, weights):
        y = torch.add(y, stage, alpha=weight)
    return y


def error(y0, y1, stages, weights, rtol, atol):
    """Stock PyTorch."""
    estimate = weighted(weights[0] * stages[0], stages[1:], weights[1:])
    return (estimate / (atol + rtol * torch.maximum(y0.abs(), y1.abs()))).square().mean().sqrt()
