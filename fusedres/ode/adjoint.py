"""The adjoint method: gradients of an initial value problem from its final state alone.

Backward solves the problem once more, from the end to the start, together with the adjoint ``a = dL/dx(t)`` and the
parameters' gradients (Pontryagin et al. 1962; Chen et al. 2018, "Neural Ordinary Differential Equations", eqs. 4 and 5,
and appendix B):

.. math:: \\frac{dx}{dt} = f \\qquad \\frac{da}{dt} = -a^\\top \\frac{\\partial f}{\\partial x} \\qquad
    \\frac{d}{dt} \\frac{dL}{d\\theta} = -a^\\top \\frac{\\partial f}{\\partial \\theta}

What autograd keeps does not depend on the number of steps. The price is the trajectory's recomputation, whose error is
bounded by the tolerances and not by rounding, as the gradient's therefore is. ``odefunc`` is evaluated in backward
too: it must be deterministic, and batch norms in it update their running statistics there as well. Sums over time are
kept in float32 where the state, or a parameter, is of a smaller dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.bn_stats import statistics_dtype
from .function import derivative
from .settings import Settings, Times
from .solver import Dynamics, State, last_state

__all__ = ["AdjointProblem", "solve_adjoint"]


@dataclass
class AdjointProblem:
    """An initial value problem whose gradients come from the adjoint.

    Attributes:
        times: the first and the last are those between which it is solved; the others matter to fixed steps alone.
        forward, backward: how each direction is solved.
        evaluations: how often the function has been called, by forward and by backward.
    """

    odefunc: nn.Module
    times: Times
    forward: Settings
    backward: Settings
    evaluations: dict[str, int]


def solve_adjoint(problem: AdjointProblem, x: Tensor) -> Tensor:
    """The state at the last time."""
    parameters = [p for p in problem.odefunc.parameters() if p.requires_grad]
    return _Adjoint.apply(problem, x, *parameters)


class _Adjoint(torch.autograd.Function):
    """``(problem, x, *parameters) -> x(t[-1])``; keeps the result, and refers to the parameters."""

    @staticmethod
    def forward(ctx: Any, problem: AdjointProblem, x: Tensor, *parameters: Tensor) -> Tensor:
        dynamics = Dynamics(lambda t, state: (derivative(problem.odefunc, t, state[0]),))
        last = last_state(dynamics, (x,), problem.times, problem.forward)[0]
        problem.evaluations["forward"] = dynamics.evaluations
        ctx.problem = problem
        device_type = x.device.type
        ctx.autocast = device_type, torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type)
        ctx.save_for_backward(last, *parameters)
        return last

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # only with create_graph=True; a gradient that looks constant would be wrong
            raise RuntimeError("the adjoint method is differentiable once; second derivatives need adjoint=False")
        problem: AdjointProblem = ctx.problem
        x, *parameters = ctx.saved_tensors
        sums = [torch.zeros_like(p, dtype=statistics_dtype(p.dtype)) for p in parameters]
        state = (x, grad.to(statistics_dtype(grad.dtype)), *sums)
        dynamics = Dynamics(_augmented(problem.odefunc, parameters), passive=len(parameters))
        with torch.autocast(*ctx.autocast):
            _, adjoint, *sums = last_state(dynamics, state, problem.times[::-1], problem.backward)
        problem.evaluations["backward"] = dynamics.evaluations
        return (None, adjoint.to(grad.dtype), *(total.to(p.dtype) for total, p in zip(sums, parameters)))


def _augmented(odefunc: nn.Module, parameters: list[Tensor]) -> Any:
    """The derivative of ``(x, a, *parameter gradients)``."""

    def function(t: Tensor, state: State) -> State:
        with torch.enable_grad():
            x = state[0].detach().requires_grad_()
            value = derivative(odefunc, t, x)
        wanted = (x, *parameters)
        found: tuple[Tensor | None, ...] = (None,) * len(wanted)
        if value.requires_grad:
            found = torch.autograd.grad(value, wanted, state[1].to(value.dtype).neg(), allow_unused=True)
        return (value.detach(), *(torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found)))

    return function
