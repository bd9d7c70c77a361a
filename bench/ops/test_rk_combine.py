"""The updates of a Runge-Kutta step, and the norm of its error; eager takes a pass per stage.

The weights are those of the steps of dopri5: five stages lead to the result, six to the error.
"""

from __future__ import annotations

import pytest
import torch

from bench.ops.contestants import BACKENDS, COMPILED, Contest, check, group_of, nbytes
from bench.shapes import ODE_STATES, activations
from fusedres.ode import METHODS
from fusedres.ops.registry import OPS
from fusedres.testing import channels_last

COMBINE, BACKWARD, ERROR = OPS["rk_combine"], OPS["rk_combine_backward"], OPS["rk_error"]
STEP = 0.25
RESULT = [STEP * weight for weight in METHODS["dopri5"].b if weight]
ESTIMATE = [STEP * weight for weight in METHODS["dopri5"].error if weight]
TOLERANCES = (1e-3, 1e-3)
SHAPES = (*ODE_STATES, *activations("ResNet-50"))


def contest_of(op, group, arguments, eager, moved):
    calls = {"eager": eager}
    calls |= {name: lambda given, name=name: lambda: op.overload(name)(*given) for name in BACKENDS}
    checks = {name: lambda name=name: check(op, name, arguments) for name in BACKENDS}
    return Contest(group, arguments, calls, checks, moved).with_compiled()


@pytest.mark.parametrize("contestant", ["eager", COMPILED, *BACKENDS])
@pytest.mark.parametrize("shape", SHAPES, indirect=True)
def test_rk_combine(race, shape, dtype, contestant):
    group = group_of("rk_combine", dtype, shape)

    def contest():
        y, *stages = (channels_last(shape, dtype, seed) for seed in range(1 + len(RESULT)))
        moved = nbytes(y, *stages, y)
        return contest_of(COMBINE, group, [y, stages, RESULT], lambda given: lambda: weighted(*given), moved)

    race(group, contestant, contest)


@pytest.mark.parametrize("contestant", ["eager", COMPILED, *BACKENDS])
@pytest.mark.parametrize("shape", SHAPES, indirect=True)
def test_rk_combine_backward(race, shape, dtype, contestant):
    group = group_of("rk_combine_backward", dtype, shape)

    def eager(given):
        grad, weights = given
        return lambda: [grad * weight for weight in weights]

    def contest():
        grad = channels_last(shape, dtype)
        return contest_of(BACKWARD, group, [grad, RESULT], eager, nbytes(grad, *[grad] * len(RESULT)))

    race(group, contestant, contest)


@pytest.mark.parametrize("contestant", ["eager", COMPILED, *BACKENDS])
@pytest.mark.parametrize("shape", SHAPES, indirect=True)
def test_rk_error(race, shape, dtype, contestant):
    group = group_of("rk_error", dtype, shape)

    def contest():
        y0, y1, *stages = (channels_last(shape, dtype, seed) for seed in range(2 + len(ESTIMATE)))
        arguments = [y0, y1, stages, ESTIMATE, *TOLERANCES]
        moved = nbytes(y0, y1, *stages)
        return contest_of(ERROR, group, arguments, lambda given: lambda: error(*given), moved)

    race(group, contestant, contest)


def weighted(y, stages, weights):
    """Stock PyTorch at its best: each addition scales what it adds."""
    for stage, weight in zip(stages, weights):
        y = torch.add(y, stage, alpha=weight)
    return y


def error(y0, y1, stages, weights, rtol, atol):
    """Stock PyTorch."""
    estimate = weighted(weights[0] * stages[0], stages[1:], weights[1:])
    return (estimate / (atol + rtol * torch.maximum(y0.abs(), y1.abs()))).square().mean().sqrt()
