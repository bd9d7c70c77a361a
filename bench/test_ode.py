"""ODEBlock against torchdiffeq: the same steps of the same function, forward and backward."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from fusedres.benchmarking.shapes import name_of
from fusedres.models.ode import ODEFunction
from fusedres.nn import ODEBlock
from fusedres.testing import channels_last, compare

SHAPE = (32, 64, 7, 7)
"""The state of Chen et al.'s (2018) network on MNIST."""

SHAPES = (SHAPE, (16, 64, 32, 32))
SMOKE_SHAPE = (2, 32, 5, 5)

# The first step is given, since torchdiffeq differentiates its own choice of it where gradients go through the steps.
METHODS = {
    "euler": {"step_size": 1 / 8},
    "rk4": {"step_size": 1 / 4},
    "dopri5": {"first_step": 1 / 8, "rtol": 1e-3, "atol": 1e-3},
}


class Torchdiffeq(nn.Module):
    """torchdiffeq as a block."""

    def __init__(self, odefunc: nn.Module, method: str, adjoint: bool, rtol=1e-7, atol=1e-9, **options: float) -> None:
        super().__init__()
        import torchdiffeq

        self.odefunc = odefunc
        self.solve = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint
        self.arguments = {"method": method, "rtol": rtol, "atol": atol, "options": options}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t = torch.tensor([0.0, 1.0], dtype=torch.float64)
        return self.solve(self.odefunc, x, t, **self.arguments)[-1]


@pytest.mark.parametrize("contestant", ["torchdiffeq", "fusedres"])
@pytest.mark.parametrize("adjoint", [False, True], ids=["through the steps", "adjoint"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_ode_block(race, smoke, shape, method, adjoint, contestant):
    installed = importlib.util.find_spec("torchdiffeq") is not None
    if contestant == "torchdiffeq" and not installed:
        pytest.skip("torchdiffeq is not installed")
    shape = SMOKE_SHAPE if smoke else shape
    torch.manual_seed(0)
    function = ODEFunction(shape[1])
    ours = ODEBlock(function, method, adjoint=adjoint, **METHODS[method])
    block = ours if contestant == "fusedres" else Torchdiffeq(function, method, adjoint, **METHODS[method])
    if contestant == "fusedres" and installed:
        check(method, adjoint, function, shape)
    x = channels_last(shape).requires_grad_()
    grad = channels_last(shape, seed=1)

    def step() -> None:
        block.zero_grad()
        x.grad = None
        block(x).backward(grad)

    mode = "adjoint" if adjoint else "through the steps"
    race(f"ODE block, {method}, {mode}, {name_of(shape)}", step, dtype=torch.float32, images=shape[0])


def check(method: str, adjoint: bool, function: nn.Module, shape: tuple[int, ...]) -> None:
    """Raises AssertionError where a result is over the error budget, torchdiffeq's own being the measure."""

    def fuse(theirs: nn.Module) -> nn.Module:
        return ODEBlock(theirs.odefunc, method, adjoint=adjoint, **METHODS[method])

    theirs = Torchdiffeq(function, method, adjoint, **METHODS[method])
    compare(theirs, fuse, lambda seed: [channels_last(shape, seed=seed)]).check()
