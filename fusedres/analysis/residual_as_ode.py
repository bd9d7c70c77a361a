"""A residual stack as Euler's method: the more steps, the closer to the differential equation.

A residual network whose blocks share one function takes forward Euler steps of an ordinary differential equation (Chen
et al. 2018, "Neural Ordinary Differential Equations", eq. 1 and 2)

.. math:: x_{k+1} = x_k + h \\, f(t_k, x_k), \\; h = (t_1 - t_0) / K
    \\qquad\\longrightarrow\\qquad \\frac{dx}{dt} = f(t, x)

and its output's distance from the equation's solution falls as ``1 / K``.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..console import console, lacks, make_table, stages
from ..demo.data import digits
from ..nn import ODEBlock
from .output import COLOURS, add_output_arguments, new_figure, save_figure, write

__all__ = ["ResidualAsODE", "add_arguments", "residual_as_ode", "run", "save_plot"]

Function = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ResidualAsODE:
    """What :func:`residual_as_ode` found.

    Attributes:
        steps: how many blocks each stack has.
        errors: of each stack's output against the solution, ``|x_K - x(t_1)| / |x(t_1)|``.
        reference_error: of the solution itself, estimated from twice its steps; far below every error.
    """

    steps: tuple[int, ...]
    errors: tuple[float, ...]
    reference_error: float

    @property
    def orders(self) -> tuple[float, ...]:
        """The order of convergence between neighbours; 1 for Euler's method."""
        pairs = zip(self.steps, self.errors, self.steps[1:], self.errors[1:])
        return tuple(math.log(e / finer) / math.log(k_finer / k) for k, e, k_finer, finer in pairs)


def residual_as_ode(
    odefunc: nn.Module | Function,
    x: Tensor,
    steps: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    t: tuple[float, float] = (0.0, 1.0),
) -> ResidualAsODE:
    """Compares residual stacks that share ``odefunc`` with the solution of ``dx/dt = odefunc(t, x)``.

    The solution is :class:`fusedres.nn.ODEBlock`'s, by Kutta's fourth-order method with eight times as many steps as
    the deepest stack has blocks.

    Args:
        odefunc: ``(t, x) -> tensor of x's shape``, ``t`` a tensor without dimensions. A norm in it must use its
            running statistics, or else it is another function in every step.
        x: the initial state, in a dtype in which the errors can be told from rounding: float64 for many steps.
        steps: numbers of blocks, increasing.
        t: the interval.

    Raises:
        ValueError: for steps that do not increase from at least one, or a function whose value has another shape.
    """
    if not steps or steps[0] < 1 or any(b <= a for a, b in zip(steps, steps[1:])):
        raise ValueError(f"steps must increase from at least 1, got {tuple(steps)}")
    with torch.no_grad():
        slope = odefunc(x.new_tensor(t[0]), x)
        if slope.shape != x.shape:
            raise ValueError(f"odefunc must return x's shape {tuple(x.shape)}, got {tuple(slope.shape)}")
        fine = 4 * steps[-1]
        solution, finer = (_solution(odefunc, x, n, t) for n in (fine, 2 * fine))
        errors = [_relative(_stack(odefunc, x, n, t)[-1], finer) for n in steps]
        return ResidualAsODE(tuple(steps), tuple(errors), _relative(solution, finer))


def _stack(f: Function, x: Tensor, blocks: int, t: tuple[float, float]) -> list[Tensor]:
    """The state before and after every block of a residual stack."""
    h = (t[1] - t[0]) / blocks
    states = [x]
    for k in range(blocks):
        states.append(_block(f, t[0] + k * h, states[-1], h))
    return states


def _block(f: Function, t: float, x: Tensor, h: float) -> Tensor:
    """A residual block: ``x + h f(x)``."""
    return x + h * f(x.new_tensor(t), x)


def _solution(f: Function, x: Tensor, steps: int, t: tuple[float, float]) -> Tensor:
    """By a fourth-order Runge-Kutta method with ``steps`` equal steps."""
    return ODEBlock(f, method="rk4", t=torch.linspace(*t, steps + 1, dtype=torch.float64))(x)


def _relative(x: Tensor, reference: Tensor) -> float:
    return float((x - reference).norm() / reference.norm())


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


class ConvolutionalODE(nn.Module):
    """``f(t, x) = conv2(tanh(conv1(x)))``, smooth, so that the order can be seen down to rounding."""

    def __init__(self, channels: int = 1, hidden: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.conv2(torch.tanh(self.conv1(x)))


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128], help="blocks per stack")
    parser.add_argument("--time", type=float, default=2.0, help="length of the interval (default %(default)s)")
    add_output_arguments(parser, "residual-as-ode")


def run(args: Namespace) -> int:
    if lacks("residual-as-ode", "sklearn", "matplotlib"):
        return 2
    torch.manual_seed(0)
    f, x = ConvolutionalODE().double(), digits().train_images[:8].double()
    try:
        with stages(2, "residual stack as an ODE") as begin:
            begin("errors")
            found = residual_as_ode(f, x, args.steps, (0.0, args.time))
            begin("paths")
            paths, solution = _paths(f, x, args.steps[:4], args.time)
    except ValueError as error:
        console.print(f"fusedres residual-as-ode: {error}")
        return 2
    rows = [
        (str(n), f"{error:.2e}", "" if order is None else f"{order:.2f}")
        for n, error, order in zip(found.steps, found.errors, (None, *found.orders))
    ]
    caption = f"The solution's own error is about {found.reference_error:.0e}"
    console.print(make_table("a residual stack with one shared function", ("blocks", "error", "order"), rows, caption))
    write(
        args, {**asdict(found), "orders": found.orders}, lambda path: save_plot(path, found, paths, solution, args.time)
    )
    return 0


_DRAWN = 32
"""Points of the solution in the figure."""


def _paths(f: nn.Module, x: Tensor, stacks: Sequence[int], time: float) -> tuple[dict[int, list[float]], list[float]]:
    """One pixel, the one that moves most, after every block of some stacks, and along the solution."""
    times = [k * time / _DRAWN for k in range(1, _DRAWN + 1)]
    with torch.no_grad():
        solution = [x, *(_solution(f, x, _DRAWN, (0.0, t)) for t in times)]
        states = {n: _stack(f, x, n, (0.0, time)) for n in stacks}
    pixel = int((solution[-1] - x)[0].abs().argmax())

    def value(state: Tensor) -> float:
        return float(state[0].flatten()[pixel])

    return {n: [value(s) for s in each] for n, each in states.items()}, [value(s) for s in solution]


def save_plot(
    path: Path, found: ResidualAsODE, paths: Mapping[int, Sequence[float]], solution: Sequence[float], time: float
) -> None:
    """The error by the number of blocks, and a few stacks' paths beside the solution's."""
    figure, ((left, right),) = new_figure(1, 2, (11.0, 4.6))
    left.loglog(found.steps, found.errors, "o-", color=COLOURS["fused"], label="residual stack")
    left.loglog(
        found.steps,
        [found.errors[-1] * found.steps[-1] / n for n in found.steps],
        "--",
        color=COLOURS["stock"],
        label="first order: 1 / blocks",
    )
    left.set_xticks(found.steps, [str(n) for n in found.steps])
    left.minorticks_off()
    left.set(title="distance from the ODE's solution", xlabel="blocks that share the function", ylabel="relative error")
    left.grid(alpha=0.3)
    left.legend()
    for n, states in paths.items():
        right.plot([k * time / n for k in range(n + 1)], states, "o-", ms=4, label=f"{n} block{'s' if n > 1 else ''}")
    right.plot(
        [k * time / (len(solution) - 1) for k in range(len(solution))], solution, color="black", label="solution"
    )
    right.set(title="one pixel on its way through the stack", xlabel="t, depth", ylabel="value")
    right.grid(alpha=0.3)
    right.legend()
    save_figure(figure, path)
