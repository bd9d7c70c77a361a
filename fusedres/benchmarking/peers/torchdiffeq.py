"""torchdiffeq: ordinary differential equations, through the steps and by the adjoint method."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...nn import ODEBlock
from .base import Peer, not_installed

__all__ = ["Torchdiffeq"]


class Torchdiffeq(Peer):
    """Solves what an :class:`~fusedres.nn.ODEBlock` solves, with the same function, method, steps and tolerances."""

    name = "torchdiffeq"

    def available(self) -> str | None:
        return not_installed("torchdiffeq")

    def prepare(self, model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
        import torchdiffeq

        if not isinstance(model, ODEBlock):
            raise TypeError(f"torchdiffeq takes an ODEBlock, got {type(model).__name__}")
        solve = torchdiffeq.odeint_adjoint if model.adjoint else torchdiffeq.odeint
        chosen = {name: getattr(model.settings, name) for name in ("step_size", "first_step")}
        arguments = {
            "method": model.settings.tableau.name,
            "rtol": model.settings.rtol,
            "atol": model.settings.atol,
            "options": {name: value for name, value in chosen.items() if value is not None},
        }
        times = torch.tensor(model.times, dtype=torch.float64)
        return lambda x: solve(model.odefunc, x, times, **arguments)[-1]
