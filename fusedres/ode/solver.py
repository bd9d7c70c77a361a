"""The solvers: fixed steps, and steps chosen by the error estimate.

The step-size controller is that of torchdiffeq, so that both take the same steps and evaluate the function equally
often: a step whose error norm is at most one is accepted; the last step may pass the last time, and the state there
comes from the method's continuous extension. Steps are constants to autograd.

A state is a tuple of tensors. Its last ones may be *passive*: the derivative does not depend on them, so no stage needs
them, only the step's result (the adjoint's parameter gradients are such integrals).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.rk_combine import combine, error_norm
from .settings import Settings, Times
from .tableau import Tableau

__all__ = ["Dynamics", "State", "integrate", "last_state"]

State = tuple[Tensor, ...]


class Dynamics:
    """The derivative of a state, as the solvers call it.

    Attributes:
        evaluations: how often it was called.
        passive: how many of the state's tensors, at its end, the function does not read.
    """

    def __init__(self, function: Callable[[Tensor, State], State], passive: int = 0) -> None:
        self.evaluations = 0
        self.passive = passive
        self._function = function

    def __call__(self, t: float, state: State) -> State:
        self.evaluations += 1
        first = state[0]
        return self._function(torch.full((), t, dtype=first.dtype, device=first.device), state)


def integrate(dynamics: Dynamics, state: State, times: Times, settings: Settings) -> Iterator[State]:
    """Solves the initial value problem from ``state`` at ``times[0]``; yields the states at the other times.

    Raises:
        RuntimeError: where a step size is not finite or too small to make a difference, naming time and step, and where
            ``settings.max_num_steps`` do not suffice.
    """
    solver = _adaptive if settings.tableau.adaptive else _fixed
    return solver(dynamics, state, times, settings)


def last_state(dynamics: Dynamics, state: State, times: Times, settings: Settings) -> State:
    """The state at the last time; only fixed steps that are the times themselves stop in between."""
    if settings.tableau.adaptive or settings.step_size is not None:
        times = (times[0], times[-1])
    for reached in integrate(dynamics, state, times, settings):
        state = reached
    return state


# ---------------------------------------------------------------------------------------------------------------------
# One step
# ---------------------------------------------------------------------------------------------------------------------


def _update(state: State, stages: Sequence[State], h: float, row: Sequence[float]) -> State:
    """``state + h * sum(row[i] * stages[i])``; stages of weight zero are not read."""
    used = [i for i, weight in enumerate(row) if weight != 0]
    weights = [h * row[i] for i in used]
    return tuple(combine(y, [stages[i][part] for i in used], weights) for part, y in enumerate(state))


def _step(
    dynamics: Dynamics, tableau: Tableau, state: State, t: float, t1: float, h: float, first: State | None
) -> tuple[State, list[State]]:
    """The state at ``t1 = t + h``, and the stages; ``first`` is the first one where that is there already."""
    active = len(state) - dynamics.passive
    stages = [dynamics(t, state) if first is None else first]
    inner = len(tableau.c) - tableau.first_same_as_last
    for c, row in zip(tableau.c[1:inner], tableau.a[1:inner]):
        at = _update(state[:active], stages, h, row)
        stages.append(dynamics(t1 if c == 1 else t + c * h, (*at, *state[active:])))
    after = _update(state, stages, h, tableau.b[: len(stages)])
    if tableau.first_same_as_last:
        stages.append(dynamics(t1, after))
    return after, stages


# ---------------------------------------------------------------------------------------------------------------------
# Fixed steps
# ---------------------------------------------------------------------------------------------------------------------


def _fixed(dynamics: Dynamics, state: State, times: Times, settings: Settings) -> Iterator[State]:
    forward = times[0] < times[-1]
    grid = times if settings.step_size is None else _grid(times[0], times[-1], settings.step_size)
    reached = 1
    for t, t1 in zip(grid, grid[1:]):
        after, _ = _step(dynamics, settings.tableau, state, t, t1, t1 - t, None)
        while reached < len(times) and (times[reached] <= t1 if forward else times[reached] >= t1):
            target = times[reached]
            yield after if target == t1 else _between(state, after, (target - t) / (t1 - t))
            reached += 1
        state = after


def _grid(start: float, end: float, step_size: float) -> Times:
    """Steps of ``step_size`` from ``start``; the last one ends at ``end``."""
    count = math.ceil(abs(end - start) / step_size + 1)
    h = math.copysign(step_size, end - start)
    return (*(start + i * h for i in range(count - 1)), end)


def _between(before: State, after: State, x: float) -> State:
    return tuple(torch.lerp(a, b, x) for a, b in zip(before, after))


# ---------------------------------------------------------------------------------------------------------------------
# Chosen steps
# ---------------------------------------------------------------------------------------------------------------------


class _Taken(NamedTuple):
    """The last accepted step."""

    t: float
    t1: float
    h: float
    state: State
    after: State
    stages: list[State]

    def at(self, t: float, tableau: Tableau) -> State:
        """The state within the step."""
        if t == self.t1:
            return self.after
        return _update(self.state, self.stages, self.h, tableau.within((t - self.t) / (self.t1 - self.t)))


def _adaptive(dynamics: Dynamics, state: State, times: Times, settings: Settings) -> Iterator[State]:
    tableau = settings.tableau
    direction = math.copysign(1.0, times[-1] - times[0])
    t, first = times[0], dynamics(times[0], state)
    size = settings.first_step or _first_step(dynamics, state, first, t, direction, settings)
    taken = _Taken(t, t, 0.0, state, state, [])
    for target in times[1:]:
        steps = 0
        while (target - t) * direction > 0:
            size = min(max(size, settings.min_step), settings.max_step)  # in this order NaN stays
            h = direction * size
            _check_step(tableau, t, h, steps, settings)
            after, stages = _step(dynamics, tableau, state, t, t + h, h, first)
            error = _norm(state, after, stages, [h * e for e in tableau.error], settings)
            if error <= 1 or size <= settings.min_step:
                taken = _Taken(t, t + h, h, state, after, stages)
                t, state, first = t + h, after, stages[-1]  # the last stage is the next step's first
            size = _next_step(size, error, settings)
            steps += 1
        yield taken.at(target, tableau)


def _check_step(tableau: Tableau, t: float, h: float, steps: int, settings: Settings) -> None:
    if not math.isfinite(h):
        cause = "the state or its derivative is not finite"
        raise RuntimeError(f"{tableau.name}: the step size is {h} at t = {t}: {cause}")
    if t + h == t:
        raise RuntimeError(f"{tableau.name}: the step size {h} at t = {t} is too small to make a difference")
    if steps >= settings.max_num_steps:
        raise RuntimeError(f"{tableau.name}: max_num_steps={steps} end at t = {t}, the next step size being {h}")


def _norm(before: State, after: State, stages: list[State], row: Sequence[float], settings: Settings) -> float:
    """The largest of the state's error norms; NaN where one is."""
    used = [i for i, weight in enumerate(row) if weight != 0]
    weights = [row[i] for i in used]
    norms = [
        error_norm(y0, y1, [stages[i][part] for i in used], weights, settings.rtol, settings.atol).double()
        for part, (y0, y1) in enumerate(zip(before, after))
    ]
    return float(torch.stack(norms).max())


def _next_step(size: float, error: float, settings: Settings) -> float:
    if error == 0:
        return size * settings.ifactor
    least = 1.0 if error < 1 else settings.dfactor
    factor = settings.safety * error ** (-1 / settings.tableau.order)
    return size * min(max(factor, least), settings.ifactor)  # NaN stays


def _first_step(
    dynamics: Dynamics, state: State, first: State, t: float, direction: float, settings: Settings
) -> float:
    """Hairer, Norsett and Wanner (1993), section II.4: two guesses from the sizes of y, y' and an estimate of y''."""

    def norm(stages: list[State], row: Sequence[float]) -> float:
        return _norm(state, state, stages, row, settings)

    d0, d1 = norm([state], [1.0]), norm([first], [1.0])
    h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
    active = len(state) - dynamics.passive
    probe = (*_update(state[:active], [first], direction * h0, [1.0]), *state[active:])
    d2 = norm([first, dynamics(t + direction * h0, probe)], [-1.0, 1.0]) / h0 if h0 else math.inf
    still = d1 <= 1e-15 and d2 <= 1e-15
    h1 = max(1e-6, h0 * 1e-3) if still else (0.01 / max(d1, d2)) ** (1 / settings.tableau.order)
    return _least(100 * h0, h1)


def _least(a: float, b: float) -> float:
    """The smaller number; NaN where one is."""
    return a if a <= b else b if b <= a else math.nan
