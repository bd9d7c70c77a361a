"""What a solver is told: its method, its tolerances, its steps; and the times, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .tableau import METHODS, Tableau

__all__ = ["Settings", "Times", "check_positive", "settings", "times_of"]

Times = tuple[float, ...]


@dataclass(frozen=True)
class Settings:
    """How an initial value problem is solved. Names, defaults and meanings are torchdiffeq's.

    Attributes:
        rtol, atol: what an error estimate is measured by, ``atol + rtol * max(abs(y0), abs(y1))``.
        step_size: of a method with fixed steps; the last step ends at the last time. Without it, the times themselves
            are the steps.
        first_step: size of the first step; without it, chosen as in Hairer, Norsett and Wanner (1993), section II.4.
        min_step, max_step: bounds of a chosen step. A step of the smallest size is accepted, whatever its error.
        safety, ifactor, dfactor: the next step is the last one times ``safety * error ** (-1 / order)``, at most
            ``ifactor`` and at least ``dfactor`` (at least 1 behind an accepted step).
        max_num_steps: how many steps, rejected ones included, may lead from one time to the next.
    """

    tableau: Tableau
    rtol: float = 1e-7
    atol: float = 1e-9
    step_size: float | None = None
    first_step: float | None = None
    min_step: float = 0.0
    max_step: float = math.inf
    safety: float = 0.9
    ifactor: float = 10.0
    dfactor: float = 0.2
    max_num_steps: int = 2**31 - 1

    def __post_init__(self) -> None:
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            check_positive(field.name, value, or_zero=field.name in ("rtol", "atol", "min_step"))
            if value != field.default and self._pointless(field.name):
                raise ValueError(f"{field.name} means nothing to method={self.tableau.name!r}")
        if self.min_step > self.max_step:
            raise ValueError(f"min_step must be at most max_step, got {self.min_step} and {self.max_step}")

    def _pointless(self, name: str) -> bool:
        if name in ("rtol", "atol"):  # torchdiffeq gives them to every solver
            return False
        return (name == "step_size") == self.tableau.adaptive


def check_positive(name: str, value: Any, *, or_zero: bool = False) -> None:
    """Raises TypeError for what is no number, ValueError for what is not positive."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (value > 0 or (or_zero and value == 0)):
        raise ValueError(f"{name} must be positive, got {value}")


def settings(method: str, **options: Any) -> Settings:
    """The settings of a method by its name.

    Raises:
        TypeError: for an option that does not exist, or is no number.
        ValueError: for an unknown method, an option that it does not have, or a value out of range.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    known = [field.name for field in fields(Settings)[1:]]
    for name in options:
        if name not in known:
            raise TypeError(f"unknown option {name!r}; there are {', '.join(known)}")
    return Settings(METHODS[method], **options)


def times_of(t: Tensor | Sequence[float]) -> Times:
    """The times as numbers.

    Raises:
        TypeError: for something else than a tensor or a sequence of numbers.
        ValueError: for fewer than two times, times that are not strictly monotone or not finite, and for a tensor that
            requires a gradient, which the solvers do not give it.
    """
    if isinstance(t, Tensor):
        if t.requires_grad:
            raise ValueError("t must not require a gradient: times are constants here; pass t.detach()")
        if t.dim() != 1 or t.is_complex() or t.dtype == torch.bool:
            raise ValueError(f"t must be a tensor of numbers with one dimension, got shape {tuple(t.shape)}, {t.dtype}")
        values = t.tolist()
    else:
        if not isinstance(t, (tuple, list)) or any(not isinstance(v, (int, float)) for v in t):
            raise TypeError(f"t must be a tensor or a tuple of numbers, got {t!r}")
        values = list(t)
    times = tuple(float(value) for value in values)
    pairs = list(zip(times, times[1:]))
    if not pairs or not all(math.isfinite(value) for value in times):
        raise ValueError(f"t must hold two or more finite times, got {times}")
    if not (all(a < b for a, b in pairs) or all(a > b for a, b in pairs)):
        raise ValueError(f"t must be strictly increasing or strictly decreasing, got {times}")
    return times
