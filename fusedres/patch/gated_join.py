"""A gated sum as data, and the call that runs it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..block import runs_modules
from ..ops import gated_join
from ..select import use_backend

__all__ = ["GatedJoin"]


@dataclass(frozen=True)
class GatedJoin:
    """``m * f + (1 - m) * x`` with ``m = sigmoid(logits)``, or ``m = sigmoid(logits) > threshold``.

    Args:
        gate: the path of the convolution that makes the logits; empty where it is something else.
        threshold: of a sparse gate.
        in_float: whether the mask is float32 (``.float()``), which makes the result float32 at least.
    """

    gate: str = ""
    threshold: float | None = None
    in_float: bool = False

    def join(self, f: Tensor, logits: Tensor, x: Tensor, backend: str = "auto", memory: str = "auto") -> Tensor:
        """The sum; tensors that do not agree in shape, device and dtype are broadcast and promoted as in stock PyTorch.

        Args:
            backend: the backend to force, or ``"auto"``.
            memory: there is nothing here that could be recomputed.
        """
        if runs_modules():
            return self._stock(f, logits, x)
        if not (f.shape == logits.shape == x.shape and f.is_floating_point() and f.device == logits.device == x.device):
            return self._stock(f, logits, x)
        if not (f.dtype == logits.dtype == x.dtype or torch.is_autocast_enabled(f.device.type)):
            return self._stock(f, logits, x)
        with nullcontext() if backend == "auto" else use_backend(backend):
            out = gated_join(f, logits, x, threshold=self.threshold)
        return out.to(torch.promote_types(out.dtype, torch.float32)) if self.in_float else out

    def _stock(self, f: Tensor, logits: Tensor, x: Tensor) -> Tensor:
        m = torch.sigmoid(logits)
        if self.threshold is not None:
            m = (m > self.threshold).to(torch.float32 if self.in_float else m.dtype)
        return m * f + (1 - m) * x

    def __str__(self) -> str:
        gate = f"sigmoid({self.gate or 'logits'})"
        return f"m * f + (1 - m) * x, m = {gate if self.threshold is None else f'{gate} > {self.threshold:g}'}"
