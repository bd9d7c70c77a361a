"""OpenVINO on a network converted from PyTorch: inference on CPUs."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..workloads import Workload
from .base import Peer, not_installed

__all__ = ["OpenVino"]

_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}


class OpenVino(Peer):
    """Tuned for latency, in the precision of the workload. It takes float32 images, so others are converted first."""

    name = "OpenVINO"
    trains = False
    devices = ("cpu",)
    seconds = (0.0, 12.0)

    def available(self) -> str | None:
        return not_installed("openvino")

    def refuses(self, workload: Workload, device: torch.device) -> str | None:
        if workload.dtype not in _PRECISIONS:
            return f"no {str(workload.dtype).removeprefix('torch.')} on CPUs"
        return super().refuses(workload, device)

    def prepare(self, model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
        import openvino

        wide = copy.deepcopy(model).float()
        images = example.float().contiguous()
        settings = {
            "INFERENCE_PRECISION_HINT": _PRECISIONS[example.dtype],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            converted = openvino.convert_model(wide, example_input=images, input=list(images.shape))
        compiled = openvino.Core().compile_model(converted, "CPU", settings)

        def call(images: Tensor) -> Tensor:
            found = compiled(images.float().contiguous().numpy())[0]
            return torch.from_numpy(found.copy()).to(images.dtype)  # the next call overwrites the result

        return call
