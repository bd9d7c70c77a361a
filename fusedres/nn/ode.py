"""A block of continuous depth: Chen et al. (2018, "Neural Ordinary Differential Equations")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ode.adjoint import AdjointProblem, solve_adjoint
from ..ode.function import Function, derivative
from ..ode.settings import Times, check_positive, settings, times_of
from ..ode.solver import Dynamics, last_state
from ..ops.checks import check_floating
from ..ops.layout import dense

__all__ = ["Evaluations", "ODEBlock"]


class Evaluations(NamedTuple):
    """How often an ODE's function was evaluated: by the latest forward, and by the latest backward."""

    forward: int
    backward: int


class ODEBlock(nn.Module):
    """The state at the last time of an ordinary differential equation that starts from the input::

        dx/dt = odefunc(t, x),   x(t[0]) = input,   output = x(t[-1])

    A residual block ``x + F(x)`` is one step of size one of Euler's method for ``dx/dt = F(x)``; this is its limit in
    many small steps. Every update of the solver is one pass over the state, as is its backward. Key: ``odefunc``.

    Args:
        odefunc: called as ``odefunc(t, x)``, as torchdiffeq does, with ``t`` a tensor without dimensions of ``x``'s
            dtype; returns a tensor of ``x``'s shape. May contain fused blocks, and may be a plain function.
        method: ``"euler"``, ``"midpoint"``, ``"rk4"`` (Kutta's 3/8 rule, as torchdiffeq's), or ``"dopri5"``, which
            chooses its steps (Dormand and Prince 1980).
        t: two or more times, increasing or decreasing, as a tensor or as numbers. Without a ``step_size``, fixed steps
            go from each to the next; to ``dopri5`` only the first and the last matter. Times have no gradient.
        adjoint: gradients by the adjoint method: autograd keeps the output and nothing else, whatever the number of
            steps, and backward solves the problem in reverse. See :mod:`fusedres.ode.adjoint` for its price. Otherwise
            they go back through the steps, and autograd keeps what every evaluation of ``odefunc`` saved.
        rtol, atol: ``dopri5`` keeps its error estimate, per element, below ``atol + rtol * abs(x)``, in the root mean
            square.
        adjoint_rtol, adjoint_atol: the same for the adjoint; those of the forward if left out.
        options: those of the solver, as torchdiffeq names them: ``step_size`` for fixed steps; ``first_step``,
            ``min_step``, ``max_step``, ``safety``, ``ifactor``, ``dfactor``, ``max_num_steps`` for ``dopri5``. See
            :class:`fusedres.ode.settings.Settings`.

    Shapes and dtypes: the input may have any shape; float32, float64, bfloat16 or float16. Updates are computed in
    float32 (float64 for float64) and rounded once. Zero-size batches work. The output is like the input.

    Under ``torch.compile`` a method with fixed steps is one graph, and ``dopri5`` and the adjoint run uncompiled.

    Attributes:
        nfe: the :class:`Evaluations` of ``odefunc``.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming them; ``t`` must not require a gradient, and the
            adjoint needs ``odefunc`` to be a module.
        RuntimeError: where a step size is not finite or too small to make a difference, naming the time and the step.
    """

    def __init__(
        self,
        odefunc: nn.Module | Function,
        method: str = "dopri5",
        t: Tensor | Sequence[float] = (0.0, 1.0),
        adjoint: bool = False,
        *,
        rtol: float = 1e-7,
        atol: float = 1e-9,
        adjoint_rtol: float | None = None,
        adjoint_atol: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not callable(odefunc):
            raise TypeError(f"odefunc must be a module or a function (t, x), got {type(odefunc).__name__}")
        if adjoint and not isinstance(odefunc, nn.Module):
            raise TypeError(f"odefunc must be a module where adjoint=True, got {type(odefunc).__name__}")
        for name, tolerance in (("adjoint_rtol", adjoint_rtol), ("adjoint_atol", adjoint_atol)):
            if tolerance is not None:
                check_positive(name, tolerance, or_zero=True)
        self.odefunc = odefunc
        self.adjoint = adjoint
        self.times = times_of(t)
        self.settings = settings(method, rtol=rtol, atol=atol, **options)
        self.adjoint_settings = settings(
            method,
            rtol=rtol if adjoint_rtol is None else adjoint_rtol,
            atol=atol if adjoint_atol is None else adjoint_atol,
            **options,
        )
        self._evaluations = {"forward": 0, "backward": 0}

    @property
    def nfe(self) -> Evaluations:
        """How often ``odefunc`` was evaluated; backward evaluates it where the adjoint is on."""
        return Evaluations(**self._evaluations)

    def forward(self, x: Tensor, t: Tensor | Sequence[float] | None = None) -> Tensor:
        """The state at the last time.

        Args:
            x: the initial state.
            t: times for this call, instead of the block's.
        """
        check_floating("ODEBlock", x)
        times = self.times if t is None else times_of(t)
        solve = self._adjoint if self.adjoint else self._through_steps
        if torch.compiler.is_compiling() and (self.adjoint or self.settings.tableau.adaptive):
            # Steps that depend on values, and gradients within gradients, are nothing to trace: they run as they are.
            solve = torch.compiler.disable(solve)
        return solve(dense(x), times)

    def _adjoint(self, x: Tensor, times: Times) -> Tensor:
        problem = AdjointProblem(self.odefunc, times, self.settings, self.adjoint_settings, self._evaluations)
        return solve_adjoint(problem, x)

    def _through_steps(self, x: Tensor, times: Times) -> Tensor:
        dynamics = Dynamics(lambda t, state: (derivative(self.odefunc, t, state[0]),))
        (last,) = last_state(dynamics, (x,), times, self.settings)
        self._evaluations["forward"] = dynamics.evaluations
        return last

    def extra_repr(self) -> str:
        return f"method={self.settings.tableau.name!r}, t={self.times}, adjoint={self.adjoint}"
