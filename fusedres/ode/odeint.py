"""The public function: an initial value problem, differentiated through the solver's steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.checks import check_floating
from ..ops.layout import dense
from .function import Function, derivative
from .settings import settings, times_of
from .solver import Dynamics, integrate

__all__ = ["odeint"]


def odeint(
    odefunc: Function,
    x: Tensor,
    t: Tensor | Sequence[float] = (0.0, 1.0),
    *,
    method: str = "dopri5",
    **options: Any,
) -> Tensor:
    """The states of ``dx/dt = odefunc(t, x)``, ``x(t[0]) = x``, at every time of ``t``.

    Gradients, with respect to ``x`` and to whatever ``odefunc`` reads, go back through the steps that were taken, so
    autograd keeps what every evaluation saved; :class:`fusedres.nn.ODEBlock` has the adjoint method, which keeps
    nothing of them. Agrees with ``torchdiffeq.odeint``.

    Args:
        odefunc: ``odefunc(t, x)`` with ``t`` a tensor without dimensions, of ``x``'s dtype.
        x: the initial state, of any shape; bfloat16 and float16 are updated in float32 and rounded once per update.
        t: two or more times, increasing or decreasing.
        method: one of :data:`fusedres.ode.METHODS`.
        options: those of :class:`fusedres.ode.settings.Settings`: ``rtol``, ``atol``, ``step_size``, ``first_step``,
            ``min_step``, ``max_step``, ``safety``, ``ifactor``, ``dfactor``, ``max_num_steps``.

    Returns:
        ``[len(t), *x.shape]``, the first of which is ``x``.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming them.
        RuntimeError: where the step size is not finite or too small, naming the time and the step.
    """
    check_floating("odeint", x)
    chosen, times = settings(method, **options), times_of(t)
    dynamics = Dynamics(lambda t, state: (derivative(odefunc, t, state[0]),))
    start = dense(x)
    return torch.stack([start, *(state[0] for state in integrate(dynamics, (start,), times, chosen))])
