"""TorchScript: traced, frozen and optimised for inference, which fuses batch norms into convolutions."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .base import Peer

__all__ = ["TorchScript"]


class TorchScript(Peer):
    name = "torch.jit, frozen"
    trains = False
    seconds = (0.0, 8.0)

    def prepare(self, model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that TorchScript has been deprecated
            traced = torch.jit.freeze(torch.jit.trace(model, example))
            return torch.jit.optimize_for_inference(traced)
