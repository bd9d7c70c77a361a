"""TensorRT through Torch-TensorRT: inference on GPUs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .base import Peer, not_installed

__all__ = ["TensorRT"]


class TensorRT(Peer):
    name = "TensorRT"
    trains = False
    devices = ("cuda",)
    seconds = (0.0, 60.0)

    def available(self) -> str | None:
        return not_installed("tensorrt", "torch_tensorrt")

    def prepare(self, model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
        import torch_tensorrt

        with torch.no_grad():
            return torch_tensorrt.compile(
                model, ir="dynamo", inputs=[example], enabled_precisions={example.dtype}, use_explicit_typing=False
            )
