"""The right-hand side that a user wrote, ``f(t, x)``, as the solvers and the adjoint call it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["Function", "derivative"]

Function = Callable[[Tensor, Tensor], Tensor]


def derivative(function: Function, t: Tensor, x: Tensor) -> Tensor:
    """``function(t, x)``, checked.

    Raises:
        TypeError: where it returns no tensor.
        ValueError: where its result has another shape than the state.
    """
    result = function(t, x)
    if not isinstance(result, Tensor):
        raise TypeError(f"odefunc must return a tensor, got {type(result).__name__}")
    if result.shape != x.shape:
        sides = f"got {tuple(result.shape)} for a state of shape {tuple(x.shape)}"
        raise ValueError(f"odefunc must return a derivative of the state's shape, {sides}")
    return result
